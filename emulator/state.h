// What is alive during a launch: clusters of blocks of warps of threads, and the options that all
// parts of the runtime look at.
#pragma once

#include <array>
#include <memory>
#include <unordered_map>
#include <vector>

#include "emulator/clock.h"
#include "emulator/fiber.h"
#include "emulator/profiler.h"
#include "emulator/runtime.h"
#include "emulator/timeline.h"

namespace less::emulator {

struct Block;
class Shadow;
struct Cluster;
struct Warp;

// One cp.async or bulk copy under way.
struct Copy {
  void* shared;
  const void* global;
  unsigned bytes;
  unsigned source_bytes;  // the others are 0
  bool landed;            // the bytes are there, though nobody has waited for them
  Where at;
  Ready ready{};  // on the clock of the thread that asked for them
};

// What a waiting thread waits for, for the report of a deadlock.
struct Waiting {
  const char* kind = "";
  Where at{"", 0};
  const char* detail = "";  // a format of up to three numbers
  uint32_t numbers[3] = {};
};

enum class Status : uint8_t { ready, waiting, done };

// Scopes of a fence, and of the locations that its atomics publish to: shared and global memory.
enum Scope { kBlockScope, kGpuScope, kScopes };

struct Thread : Context {
  Fiber fiber;
  Block* home = nullptr;
  Warp* warp = nullptr;
  int index = 0;  // in its block
  Status status = Status::done;
  Waiting waiting;
  uint32_t polls = 0;  // atomics since it last let others run

  std::vector<Copy> open_copies;  // not yet committed
  std::vector<std::vector<Copy>> copy_groups;

  int cluster_arrivals = 0;  // arrived at the cluster's barrier and not yet waited: 1
  uint32_t cluster_phase = 0;
  bool cluster_started = false;  // has passed a barrier of the cluster: all its blocks run
  bool dependency_waited = false;

  // Happens-before; only where accesses are tracked.
  uint32_t slot = 0;  // in its cluster
  uint32_t clock = 1;
  View view;
  Published fenced[kScopes];   // by its last fence
  Published pending[kScopes];  // from locations it has read, acquired by its next fence
  bool has_fenced[kScopes] = {};
  std::vector<uint32_t> occurrences;  // per instruction, since the warp last met

  // Only where kernels keep clocks.
  Timeline line;
  Timeline arrived;            // at the barrier of its cluster
  Cause from = Cause::shared;  // where its last access went
  uint64_t issued = 0;
  Ready start;    // when its last instruction began
  Ready delayed;  // the latest of these
};

// A warp-wide operation that lanes are joining.
struct Exchange {
  unsigned char data[32][kExchangeStride];  // first, for warp_release
  uint32_t mask, arrived, live;
  int left;  // lanes that still have to read
  const char* kind;
  Where at;
  bool done, orders;
};

struct Warp {
  Block* home = nullptr;
  int index = 0;
  Thread* lanes[32] = {};
  uint32_t ready = 0;
  uint32_t exited = 0;  // and lanes that never were
  int last_lane = -1;
  bool listed = false;  // among the warps that can run
  std::vector<Exchange*> exchanges;
  WarpRequests requests;
};

struct NamedBarrier {
  int arrived = 0;
  int expected = 0;  // <= 0: all of the block
  int vote = 0;
  int result[2] = {0, 0};
  uint32_t phase = 0;
  Where at{"", 0};
  std::vector<Thread*> waiting;
  std::vector<Thread*> counted;  // all that arrived
  Gathered gathered;
};

struct Mbarrier {
  uint32_t count = 0;
  uint32_t pending = 0;
  int64_t bytes = 0;  // expected and not yet arrived
  uint32_t phase = 0;
  const Thread* initialised_by = nullptr;  // null once its fence has made it known
  Where at{"", 0};
  std::vector<Thread*> waiting;
  Gathered gathered;
};

// Bytes of a window behind an array, that nobody may touch.
struct SharedGuard {
  unsigned char* begin;
  unsigned char* end;
};

// A touch of this block's shared memory by another block.
struct RemoteAccess {
  uint32_t clock;
  Where at;
};

struct Block {
  Cluster* cluster = nullptr;
  uint3 index{};
  uint32_t rank = 0;
  unsigned char* window = nullptr;
  Shadow* shadow = nullptr;                      // of the window, where accesses are tracked
  std::vector<std::unique_ptr<Thread>> threads;  // as many as any launch has used
  std::vector<std::unique_ptr<Warp>> warps;
  int alive = 0;
  std::array<NamedBarrier, 16> barriers;
  std::unordered_map<uint64_t*, Mbarrier> mbarriers;
  uint32_t bulk_clock = 0;
  uint32_t bulk_slot = 0;
  std::vector<SharedGuard> guards;
  std::unordered_map<uint32_t, RemoteAccess> remote;  // by the other's slot
  Gathered last_seen;                                 // by its threads when they ended
};

struct Cluster {
  uint32_t serial = 0;
  std::vector<Block*> blocks;
  int alive = 0;
  int arrived = 0;
  uint32_t phase = 0;
  std::vector<Thread*> waiting;
  Gathered gathered;
  View seen;                    // by those who arrived at the phase before
  std::vector<Thread*> clocks;  // of those who have arrived
  Timeline met;                 // when the phase before was over
};

enum class Schedule { in_order, reverse, random, warp_ahead, warp_behind, lockstep };
enum class Async { late, early, random };

// How tensor cores add: exactly, rounding once, or as a device of that architecture.
enum class Tensor { exact, device };

struct Options {
  Schedule schedule = Schedule::in_order;
  uint64_t seed = 1;
  Async async = Async::late;
  Tensor tensor = Tensor::exact;
  int blocks = 0;
  int rows = 0;
  int stride = 1;
  int preempt = 0;
  bool race = true;
  bool profile = true;
  bool ptx = true;
  int max_errors = 20;
};
extern Options options;

// The launch under way.
struct Launch {
  int architecture = 90;
  int block_threads = 0;
  size_t dynamic_bytes = 0;
  uint32_t first_serial = 1;     // of this launch's clusters
  uint32_t previous_serial = 1;  // of the launch before it
  bool dependent = false;
  bool failed = false;           // ended by a fatal error or a deadlock
  const void* kernel = nullptr;  // the launched one, where a translated one runs
};
extern Launch launch_state;

inline Thread* self() { return static_cast<Thread*>(current); }

// A number below n, of a sequence that the seed determines.
uint64_t random_below(uint64_t n);

// Who runs next: scheduler.cpp.

void begin_schedule();
// Whether the schedule has clusters run one after another.
bool one_at_a_time();
// The warp that comes last under warp_behind.
void prefer(const Warp* warp);
// The next to run, or null where nobody can.
Thread* pick();
// Gives way to it; over: for good.
void run_next(bool over);
void make_ready(Thread* thread);
// The current thread, of status waiting, stops here; or goes on, should it be ready again.
void stop_here();
// The same, with what it waits for.
void wait_here(const Waiting& waiting);
// The current thread lets others run.
void yield_here();
// Ends the launch from within a thread.
[[noreturn]] void abandon_launch();

// The launch: launch.cpp.

size_t clusters_to_begin();
// Block of a cluster of this launch, for messages.
uint3 block_of(uint32_t serial, uint32_t slot);

// -- the parts, as the scheduler calls them -------------------------------------------------------

void try_release(Block& block, NamedBarrier& barrier);
void try_release(Cluster& cluster);
void try_complete(Warp& warp, Exchange* exchange);
void drop_exchanges(Warp& warp);
// Lets one bulk copy land; false where none is under way.
bool land_bulk_copy();
void drop_bulk_copies();
// In case of a deadlock: mbarriers that copies can no longer complete.
void report_mbarriers(const Block& block);

}  // namespace less::emulator
