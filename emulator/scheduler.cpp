// Which thread runs next, and how threads stop and go on.
#include <algorithm>
#include <cstdlib>

#include "emulator/errors.h"
#include "emulator/state.h"

namespace less::emulator {
namespace {

constexpr uint32_t kPollsBeforeYield = 64;
constexpr uint64_t kPollsBeforeLivelock = 1 << 16;
constexpr uint64_t kPollsBeforeMercy = 1 << 10;  // of warp_behind: they may wait for the last one

uint64_t random_state;
std::vector<Warp*> runnable;  // warps with a ready lane
const Warp* favourite;        // of warp_ahead; of warp_behind the one that comes last
size_t turn;                  // of lockstep
uint64_t polls_since_progress;

size_t choose_warp() {
  const size_t n = runnable.size();
  switch (options.schedule) {
    case Schedule::in_order:
      return 0;
    case Schedule::reverse:
      return n - 1;
    case Schedule::random:
      return random_below(n);
    case Schedule::lockstep:
      return turn++ % n;
    case Schedule::warp_ahead: {
      const auto found = std::find(runnable.begin(), runnable.end(), favourite);
      if (found != runnable.end()) return size_t(found - runnable.begin());
      const size_t at = random_below(n);
      favourite = runnable[at];
      return at;
    }
    case Schedule::warp_behind: {
      const size_t at = random_below(n);
      const bool last = runnable[at] == favourite && polls_since_progress < kPollsBeforeMercy;
      return last ? (at + 1) % n : at;
    }
  }
  return 0;
}

int choose_lane(const Warp& warp) {
  if (options.schedule == Schedule::random) {
    uint32_t left = warp.ready;
    for (uint64_t skip = random_below(uint64_t(__builtin_popcount(left))); skip > 0; --skip) {
      left &= left - 1;
    }
    return __builtin_ctz(left);
  }
  if (options.schedule == Schedule::reverse) {
    const uint32_t below = warp.last_lane < 0 ? 0 : warp.ready & ((1u << warp.last_lane) - 1);
    return 31 - __builtin_clz(below ? below : warp.ready);
  }
  const uint32_t above = warp.last_lane == 31 ? 0 : warp.ready & (~0u << (warp.last_lane + 1));
  return __builtin_ctz(above ? above : warp.ready);
}

}  // namespace

void begin_schedule() {
  random_state = options.seed * 0x9e3779b97f4a7c15ull | 1;
  runnable.clear();
  favourite = nullptr;
  turn = 0;
  polls_since_progress = 0;
}

void prefer(const Warp* warp) { favourite = warp; }

bool one_at_a_time() {
  return options.schedule == Schedule::in_order || options.schedule == Schedule::reverse;
}

uint64_t random_below(uint64_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (random_state >> 20) % n;
}

Thread* pick() {
  if (options.async == Async::random && random_below(8) == 0) land_bulk_copy();
  while (runnable.empty()) {
    if (!land_bulk_copy()) return nullptr;
  }
  const size_t at = choose_warp();
  Warp& warp = *runnable[at];
  const int lane = choose_lane(warp);
  warp.ready &= ~(1u << lane);
  warp.last_lane = lane;
  if (warp.ready == 0) {
    warp.listed = false;
    runnable.erase(runnable.begin() + ptrdiff_t(at));
  }
  return warp.lanes[lane];
}

void run_next(bool over) {
  Thread* const from = self();
  Thread* const to = pick();
  if (to == from) return;
  ++statistics.switches;
  current = to;
  if (to == nullptr) {
    leave(from->fiber, over);
  } else {
    switch_fibers(from->fiber, to->fiber, over);
  }
}

void make_ready(Thread* thread) {
  thread->status = Status::ready;
  Warp& warp = *thread->warp;
  warp.ready |= 1u << thread->lane;
  if (warp.listed) return;
  warp.listed = true;
  runnable.push_back(&warp);
}

void stop_here() { run_next(false); }

void wait_here(const Waiting& waiting) {
  self()->status = Status::waiting;
  self()->waiting = waiting;
  run_next(false);
}

void yield_here() {
  Thread& me = *self();
  me.polls = 0;
  if (options.schedule == Schedule::warp_ahead) favourite = nullptr;
  make_ready(&me);
  Warp* const mine = me.warp;  // to the end of the queue
  runnable.erase(std::find(runnable.begin(), runnable.end(), mine));
  if (options.schedule == Schedule::reverse) {
    runnable.insert(runnable.begin(), mine);
  } else {
    runnable.push_back(mine);
  }
  run_next(false);
}

void note_progress() { polls_since_progress = 0; }

void maybe_preempt() {
  if (current == nullptr) return;
  if (++polls_since_progress > kPollsBeforeLivelock) {
    fatal("livelock",
          "all running threads poll memory, and nothing changes; %zu clusters have not begun",
          clusters_to_begin());
  }
  if (!one_at_a_time() || ++self()->polls > kPollsBeforeYield) yield_here();
}

void abandon_launch() {
  launch_state.failed = true;
  Thread& me = *self();
  current = nullptr;
  leave(me.fiber, true);
  std::abort();
}

}  // namespace less::emulator
