// Barriers of a block and of a cluster, fences, and waiting for the kernel before.
#include <algorithm>
#include <cstring>

#include "emulator/errors.h"
#include "emulator/sites.h"
#include "emulator/state.h"

namespace less::emulator {
namespace {

bool same_place(Where a, Where b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

// bar.sync counts warps: lanes that stay away are counted for, and make the result a matter of
// luck.
void check_whole_warps(const Block& block, const NamedBarrier& barrier) {
  uint32_t here[32] = {};
  for (const Thread* thread : barrier.counted) here[thread->warp->index] |= 1u << thread->lane;
  for (const auto& warp : block.warps) {
    const uint32_t missing = ~(here[warp->index] | warp->exited);
    if (here[warp->index] == 0 || missing == 0) continue;
    error("barrier-divergence",
          "barrier at %s:%d: lanes 0x%08x of warp %d stay away, and barriers are for whole warps",
          short_name(barrier.at.file), barrier.at.line, missing, warp->index);
    return;
  }
}

void meet(Block& block, NamedBarrier& barrier, bool whole_block) {
  for (const Thread* thread : barrier.waiting) barrier.gathered.add(*thread);
  const View view = barrier.gathered.view();
  for (Thread* thread : barrier.waiting) {
    if (whole_block) {
      thread->view = view;
    } else {
      acquire(*thread, view);
    }
    ++thread->clock;
  }
  barrier.gathered.clear();
  if (!whole_block) return;
  for (auto& warp : block.warps) flush(*warp);
}

NamedBarrier& join_barrier(Block& block, int id, int threads, Where at) {
  if (id < 0 || id > 15) {
    fatal("barrier-count", "barrier %d at %s:%d: there are 16", id, short_name(at.file), at.line);
  }
  if (threads > 0 && (threads % 32 != 0 || threads > (launch_state.block_threads + 31) / 32 * 32)) {
    fatal("barrier-count",
          "barrier %d at %s:%d: %d threads are no whole warps of a block of %d threads", id,
          short_name(at.file), at.line, threads, launch_state.block_threads);
  }
  NamedBarrier& barrier = block.barriers[size_t(id)];
  if (barrier.arrived == 0) {
    barrier.at = at;
    barrier.expected = threads;
  } else if (barrier.expected != threads) {
    fatal("barrier-count", "barrier %d: %s:%d counts %d threads, but %s:%d counts %d (0: all)", id,
          short_name(at.file), at.line, threads, short_name(barrier.at.file), barrier.at.line,
          barrier.expected);
  }
  Thread* const me = self();
  if (threads > 0 &&
      std::find(barrier.counted.begin(), barrier.counted.end(), me) != barrier.counted.end()) {
    fatal("barrier-count", "barrier %d at %s:%d: this thread is counted twice", id,
          short_name(at.file), at.line);
  }
  ++barrier.arrived;
  barrier.counted.push_back(me);
  return barrier;
}

}  // namespace

void try_release(Block& block, NamedBarrier& barrier) {
  const bool whole = barrier.expected <= 0;
  const int wanted = whole ? block.alive : std::min(barrier.expected, launch_state.block_threads);
  if (barrier.arrived == 0 || barrier.arrived < wanted) return;
  ++statistics.barriers;
  note_progress();
  if (!whole) check_whole_warps(block, barrier);
  if (tracking) meet(block, barrier, int(barrier.waiting.size()) == block.alive);
  if (timed) meet_clocks(barrier.waiting, Cause::barrier, site_of(barrier.at));
  barrier.result[barrier.phase & 1] = barrier.vote;
  ++barrier.phase;
  barrier.arrived = 0;
  barrier.counted.clear();
  for (Thread* thread : barrier.waiting) make_ready(thread);
  barrier.waiting.clear();
}

int block_barrier(int id, int threads, int predicate, Vote vote, Where at) {
  Thread& me = *self();
  Block& block = *me.home;
  NamedBarrier& barrier = join_barrier(block, id, threads, at);
  if (barrier.arrived == 1) barrier.vote = vote == Vote::all;
  if (threads <= 0 && !same_place(barrier.at, at)) {
    error("barrier-divergence", "threads of a block meet at different barriers: %s:%d and %s:%d",
          short_name(at.file), at.line, short_name(barrier.at.file), barrier.at.line);
    barrier.at = at;
  }
  if (vote == Vote::count) barrier.vote += predicate != 0;
  if (vote == Vote::all) barrier.vote &= predicate != 0;
  if (vote == Vote::any) barrier.vote |= predicate != 0;
  const uint32_t phase = barrier.phase;
  barrier.waiting.push_back(&me);
  me.status = Status::waiting;
  if (id == 0 && threads <= 0) {
    me.waiting = {"__syncthreads", at};
  } else {
    me.waiting = {"a named barrier",
                  at,
                  " (barrier %u, the %u. of %u threads)",
                  {uint32_t(id), uint32_t(barrier.arrived), uint32_t(threads)}};
  }
  try_release(block, barrier);
  stop_here();
  return barrier.result[phase & 1];
}

void named_arrive(int id, int threads, Where at) {
  if (threads <= 0) {
    fatal("barrier-count", "barrier %d at %s:%d: arriving wants a count of threads", id,
          short_name(at.file), at.line);
  }
  Thread& me = *self();
  NamedBarrier& barrier = join_barrier(*me.home, id, threads, at);
  if (tracking) {
    barrier.gathered.add(me);
    ++me.clock;
  }
  try_release(*me.home, barrier);
}

// -- clusters -------------------------------------------------------------------------------------

void try_release(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.alive) return;
  ++statistics.cluster_barriers;
  note_progress();
  ++cluster.phase;
  cluster.arrived = 0;
  cluster.seen = tracking ? cluster.gathered.view() : View();
  cluster.gathered.clear();
  if (timed && !cluster.clocks.empty()) {
    Timeline& met = cluster.met;
    met = Timeline();
    for (const Thread* thread : cluster.clocks) {
      if (thread->arrived.now >= met.now) met = thread->arrived;
    }
    cluster.clocks.clear();
  }
  for (Thread* thread : cluster.waiting) make_ready(thread);
  cluster.waiting.clear();
}

void cluster_arrive(bool relaxed, Where at) {
  Thread& me = *self();
  Cluster& cluster = *me.home->cluster;
  if (me.cluster_arrivals != 0) {
    fatal("cluster-barrier", "%s:%d: this thread arrives twice and has not waited",
          short_name(at.file), at.line);
  }
  me.cluster_arrivals = 1;
  me.cluster_phase = cluster.phase;
  ++cluster.arrived;
  me.arrived = me.line;
  if (timed) cluster.clocks.push_back(&me);
  if (tracking && !relaxed) {
    cluster.gathered.add(me);
    ++me.clock;
  }
  try_release(cluster);
}

void cluster_wait(Where at) {
  Thread& me = *self();
  Cluster& cluster = *me.home->cluster;
  if (me.cluster_arrivals == 0) {
    fatal("cluster-barrier", "%s:%d: this thread waits and has not arrived", short_name(at.file),
          at.line);
  }
  while (cluster.phase == me.cluster_phase) {
    cluster.waiting.push_back(&me);
    wait_here({"the cluster's barrier", at});
  }
  me.cluster_arrivals = 0;
  me.cluster_started = true;
  if (tracking) acquire(me, cluster.seen);
  if (!timed) return;
  Timeline met = cluster.met;
  met.wait(met.now + latency[int(Cause::cluster_barrier)], Cause::cluster_barrier);
  if (met.now > me.line.now) me.line = met;
  end_phase(me.line, site_of(at));
}

// -- fences ---------------------------------------------------------------------------------------

void fence(bool gpu) {
  if (timed && gpu) self()->line.wait(self()->line.now + latency[int(Cause::l2)], Cause::l2);
  if (!tracking || current == nullptr) return;
  Thread& me = *self();
  for (int scope = kBlockScope; scope <= (gpu ? kGpuScope : kBlockScope); ++scope) {
    acquire(me, me.pending[scope]);
    me.pending[scope] = Published();
    me.fenced[scope] = release(me);
    me.has_fenced[scope] = true;
  }
}

// -- dependent launch -----------------------------------------------------------------------------

void grid_dependency_wait(Where) {
  self()->dependency_waited = true;
  self()->view.waited = true;
}

void grid_launch_dependents(Where) {}

}  // namespace less::emulator
