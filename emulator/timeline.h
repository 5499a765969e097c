// How long a launch would take whose blocks had the machine to themselves: each thread of a
// translated kernel has a clock, in cycles.
//
// A thread takes a cycle for each instruction, which begins once what it reads is there, and whose
// result is there so many cycles later as the option latency_<cause> says; a load's cause is where
// its bytes are. Between two jumps or barriers one that has to wait holds up none but those that
// read its result, as if the assembler had put it off; before a jump or a barrier all must have
// begun. Barriers and warp-wide operations take all to the clock of the last; so the last clock of
// a block is the length of its longest chain of waits, and tells for each cause how often that
// chain waited and how long.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace less::emulator {

struct Block;
struct Thread;
class Json;

// What a thread waits for: the result of an instruction, or others.
enum class Cause : uint8_t {
  issue,
  arithmetic,
  special,   // exponentials, roots, divisions, conversions
  division,  // of integers
  shared,
  shuffle,
  tensor,
  dram,    // a sector that nobody has loaded in this launch
  l2,      // one that somebody has; stores, atomics and fences that are waited for
  remote,  // another block's shared memory
  barrier,
  cluster_barrier,
  count,
};
constexpr int kCauses = int(Cause::count);

struct Phase;

struct Timeline {
  double now = 0;
  double spent[kCauses] = {};
  uint32_t waits[kCauses] = {};  // that took time
  uint32_t trips = 0;            // to L2, DRAM or another SM, one after the other
  std::shared_ptr<const Phase> phases;

  // Waits until a moment, for a cause.
  void wait(double until, Cause cause);
};

// When a value is there, and the chain of what it waited for.
struct Ready {
  float at = 0;
  uint16_t memory = 0;  // cycles of that chain that memory took
  uint8_t trips = 0;    // how often
  uint8_t causes = 0;   // of its last wait, and times 16 of its last trip

  Cause cause() const { return Cause(causes % 16); }
  Cause from() const { return Cause(causes / 16); }
};

// From one barrier to the next, as the last to come had it.
struct Phase {
  std::shared_ptr<const Phase> before;
  uint32_t site;  // of the barrier at its end
  double now;
  double spent[kCauses];
};

// Until a value is there.
void wait_for(Timeline& line, const Ready& value);

extern bool timed;  // whether kernels keep clocks
extern double latency[kCauses];

// "latency_dram" sets its cycles; false: there is no such option.
bool set_latency(const std::string& option, double cycles);

// All take the clock of the last of them; then they wait so long as the cause takes. That ends a
// phase.
void meet_clocks(const std::vector<Thread*>& threads, Cause cause, uint32_t site);
void end_phase(Timeline& line, uint32_t site);
// Those of a warp that do something together.
void align_clocks(Thread* const* lanes, uint32_t mask);
void note_end(const Thread& thread);  // of a block's last thread to end
void reset_timeline();
void write_timeline(Json& json);

// -- of translated kernels
// -------------------------------------------------------------------------

// An instruction: cause, sources, kNoRegister, destinations, kNoRegister.
constexpr uint16_t kNoRegister = 0xffff;
constexpr uint16_t kEnds = 0x100;  // beside the cause: all before it must have begun
void issue(Ready* registers, const uint16_t* instruction);
// What the thread has asked for with its last access is there then.
Ready trip(const Thread& thread);
// What the instruction loaded has come.
void arrive(Ready* registers, const uint16_t* instruction);

}  // namespace less::emulator
