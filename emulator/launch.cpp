// Launches: clusters, blocks and threads begin and end, and what it means when none can run.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "emulator/errors.h"
#include "emulator/memory.h"
#include "emulator/sites.h"
#include "emulator/state.h"

namespace less::emulator {

Context* current = nullptr;
dim3 block_dim, grid_dim;
uint32_t cluster_size = 1;
Options options;
Launch launch_state;

namespace {

constexpr int kMaxThreadsAlive = 8192;
constexpr int kMaxCluster = 8;  // the portable limit

void (*kernel_body)(void*);
void* kernel_argument;

std::vector<std::unique_ptr<Block>> all_blocks;  // of this launch and those before
std::vector<Block*> free_blocks;
std::vector<std::unique_ptr<Cluster>> live;
std::vector<uint64_t> order;  // of the clusters of the grid
size_t next_cluster;

void check_remote_accesses(const Block& block) {
  for (const auto& [slot, access] : block.remote) {
    if (block.last_seen.seen(slot) >= access.clock) continue;
    error("cluster-exit",
          "block (%u,%u,%u) may have ended when another block of its cluster touches its shared "
          "memory at %s:%d: no cluster barrier between that and its end",
          block.index.x, block.index.y, block.index.z, short_name(access.at.file), access.at.line);
    return;
  }
}

void end_block(Block& block) {
  check_remote_accesses(block);
  check_guards(block);
  for (auto& warp : block.warps) flush(*warp);
  if (launch_state.dependent) {
    bool waited = false;
    for (int i = 0; i < launch_state.block_threads; ++i) {
      waited |= block.threads[size_t(i)]->dependency_waited;
    }
    if (!waited) {
      error("dependent-launch",
            "a kernel launched as dependent ended without waiting for the one before it");
    }
  }
}

void check_no_copies(Thread& thread) {
  thread.copy_groups.push_back(std::move(thread.open_copies));
  for (const auto& group : thread.copy_groups) {
    if (group.empty()) continue;
    const Where at = group[0].at;
    if (first_time("async-pending", site_of(at), 0)) {
      error("async-pending", "a thread ends and has not waited for the copy of %s:%d",
            short_name(at.file), at.line);
    }
    return;
  }
}

void end_thread() {
  Thread& me = *self();
  Block& block = *me.home;
  Cluster& cluster = *block.cluster;
  if (me.cluster_arrivals != 0) {
    error("cluster-barrier",
          "a thread ended between arriving at the cluster's barrier and waiting");
  }
  check_no_copies(me);
  if (tracking) block.last_seen.add(me);
  if (timed) note_end(me);
  me.status = Status::done;
  me.warp->exited |= 1u << me.lane;
  --block.alive;
  --cluster.alive;
  note_progress();
  for (size_t i = 0; i < me.warp->exchanges.size(); ++i) {
    Exchange* const exchange = me.warp->exchanges[i];
    if (!exchange->done) try_complete(*me.warp, exchange);
  }
  for (NamedBarrier& barrier : block.barriers) {
    if (barrier.arrived > 0) try_release(block, barrier);
  }
  try_release(cluster);
  if (block.alive == 0) end_block(block);
  if (cluster.alive == 0) {  // the launching thread takes the blocks back
    current = nullptr;
    leave(me.fiber, true);
  }
  run_next(true);
  std::abort();
}

void run_thread() {
  kernel_body(kernel_argument);
  end_thread();
}

void begin_thread(Block& block, int index) {
  const uint32_t place = block.rank * uint32_t(launch_state.block_threads + 1);
  std::unique_ptr<Thread>& owner = block.threads[size_t(index)];
  owner = std::make_unique<Thread>();
  Thread& thread = *owner;
  const unsigned i = unsigned(index), x = block_dim.x, y = block_dim.y;
  thread.thread = {i % x, i / x % y, i / (x * y)};
  thread.block = block.index;
  thread.lane = index % 32;
  thread.window = block.window;
  thread.cluster_rank = block.rank;
  thread.home = &block;
  thread.warp = block.warps[size_t(index / 32)].get();
  thread.warp->lanes[thread.lane] = &thread;
  thread.warp->exited &= ~(1u << thread.lane);
  thread.index = index;
  thread.slot = place + i;
  thread.cluster_started = cluster_size == 1;
  prepare(thread.fiber, &run_thread);
  make_ready(&thread);
}

Block* take_block() {
  if (free_blocks.empty()) {
    all_blocks.push_back(std::make_unique<Block>());
    make_window(*all_blocks.back());
    return all_blocks.back().get();
  }
  Block* const block = free_blocks.back();
  free_blocks.pop_back();
  return block;
}

void begin_block(Cluster& cluster, uint32_t rank, uint3 index) {
  const int threads = launch_state.block_threads;
  Block& block = *take_block();
  block.cluster = &cluster;
  block.index = index;
  block.rank = rank;
  block.alive = threads;
  for (NamedBarrier& barrier : block.barriers) barrier = NamedBarrier();
  block.mbarriers.clear();
  block.bulk_clock = 0;
  block.bulk_slot = rank * uint32_t(threads + 1) + uint32_t(threads);
  block.remote.clear();
  block.last_seen.clear();
  if (block.threads.size() < size_t(threads)) block.threads.resize(size_t(threads));
  for (auto& warp : block.warps) drop_exchanges(*warp);
  block.warps.clear();
  for (int i = 0; i < (threads + 31) / 32; ++i) {
    block.warps.push_back(std::make_unique<Warp>());
    block.warps.back()->home = &block;
    block.warps.back()->index = i;
    block.warps.back()->exited = ~0u;
  }
  begin_memory(block);
  cluster.blocks.push_back(&block);
  for (int i = 0; i < threads; ++i) begin_thread(block, i);
  ++statistics.blocks;
  statistics.threads += uint64_t(threads);
}

uint3 first_block(uint64_t cluster) {
  const uint64_t along_x = grid_dim.x / cluster_size;
  return {unsigned(cluster % along_x * cluster_size), unsigned(cluster / along_x % grid_dim.y),
          unsigned(cluster / along_x / grid_dim.y)};
}

void begin_cluster() {
  live.push_back(std::make_unique<Cluster>());
  Cluster& cluster = *live.back();
  uint3 index = first_block(order[next_cluster]);
  cluster.serial = launch_state.first_serial + uint32_t(next_cluster++);
  cluster.alive = int(cluster_size) * launch_state.block_threads;
  for (uint32_t rank = 0; rank < cluster_size; ++rank, ++index.x) {
    begin_block(cluster, rank, index);
  }
  if (options.schedule == Schedule::warp_behind) {
    const Block& block = *cluster.blocks[random_below(cluster_size)];
    prefer(block.warps[random_below(block.warps.size())].get());
  }
}

void take_back(const Cluster& cluster) {
  for (Block* block : cluster.blocks) {
    for (int i = 0; i < launch_state.block_threads; ++i) {
      take_stack(block->threads[size_t(i)]->fiber);
    }
    free_blocks.push_back(block);
  }
}

// Those that have ended; all of them where the launch is over.
void end_clusters(bool all) {
  for (size_t i = 0; i < live.size();) {
    if (live[i]->alive > 0 && !all) {
      ++i;
      continue;
    }
    take_back(*live[i]);
    live.erase(live.begin() + ptrdiff_t(i));
  }
}

void report_deadlock() {
  for (const auto& cluster : live) {
    for (const Block* block : cluster->blocks) {
      std::map<std::string, std::pair<int, int>> waits;  // how many, the first
      for (int i = 0; i < launch_state.block_threads; ++i) {
        const Thread& thread = *block->threads[size_t(i)];
        if (thread.status != Status::waiting) continue;
        const Waiting& w = thread.waiting;
        char detail[100];
        std::snprintf(detail, sizeof detail, w.detail, w.numbers[0], w.numbers[1], w.numbers[2]);
        const std::string text = std::string(w.kind) + " at " + short_name(w.at.file) + ":" +
                                 std::to_string(w.at.line) + detail;
        auto [entry, fresh] = waits.try_emplace(text, 0, i);
        ++entry->second.first;
      }
      if (waits.empty()) continue;
      std::string text;
      for (const auto& [wait, who] : waits) {
        text += " [" + std::to_string(who.first) + " threads, the first " +
                std::to_string(who.second) + ", in " + wait + "]";
      }
      error("deadlock", "block (%u,%u,%u): no thread can run; waiting:%s; %d have ended",
            block->index.x, block->index.y, block->index.z, text.c_str(),
            launch_state.block_threads - block->alive);
      report_mbarriers(*block);
    }
  }
}

const char* wrong_with(const LaunchConfig& config, int64_t threads) {
  const dim3 &grid = config.grid, &block = config.block;
  if (threads < 1 || threads > 1024 || block.z > 64) return "a block of that many threads";
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) return "an empty grid";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "a grid that large";
  if (config.shared > size_t(shared_of_a_block()) + kRoomForGuards) {
    return "that much dynamic shared memory";
  }
  if (config.cluster < 1 || config.cluster > kMaxCluster) return "a cluster of that many blocks";
  if (grid.x % unsigned(config.cluster) != 0) return "a grid that clusters do not divide along x";
  if (config.cluster > 1 && code_architecture() < 90) return "a cluster, of code for sm_80";
  if (config.dependent && code_architecture() < 90) return "a dependent launch, of code for sm_80";
  return nullptr;
}

int clusters_alive() {
  int wanted = options.blocks;
  if (wanted <= 0) {
    wanted = one_at_a_time() ? 1 : 3;
  }
  const int threads = launch_state.block_threads * int(cluster_size);
  return std::max(1, std::min(wanted, kMaxThreadsAlive / threads));
}

void order_clusters() {
  const uint64_t along_x = grid_dim.x / cluster_size, every = uint64_t(options.stride);
  uint64_t rows = (uint64_t{grid_dim.y} * grid_dim.z + every - 1) / every;
  if (options.rows > 0) rows = std::min(rows, uint64_t(options.rows));
  const uint64_t total = rows * along_x;
  order.resize(total);
  for (uint64_t i = 0; i < total; ++i) order[i] = i / along_x * every * along_x + i % along_x;
  switch (options.schedule) {
    case Schedule::in_order:
    case Schedule::lockstep:
      break;
    case Schedule::reverse:
      std::reverse(order.begin(), order.end());
      break;
    default:
      for (uint64_t i = total; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  next_cluster = 0;
}

void begin_launch(const LaunchConfig& config, int threads) {
  Launch& launch = launch_state;
  launch.previous_serial = launch.first_serial;
  launch.first_serial += uint32_t(order.size());  // still those of the launch before
  launch.architecture = architecture();
  launch.block_threads = threads;
  launch.dynamic_bytes = config.shared;
  launch.dependent = config.dependent;
  launch.failed = false;
  grid_dim = config.grid;
  block_dim = config.block;
  cluster_size = uint32_t(config.cluster);
  begin_schedule();
  order_clusters();
  reset_timeline();
  begin_launch_memory();
}

}  // namespace

size_t clusters_to_begin() { return order.size() - next_cluster; }

uint3 block_of(uint32_t serial, uint32_t slot) {
  uint3 index = first_block(order[serial - launch_state.first_serial]);
  index.x += slot / uint32_t(launch_state.block_threads + 1);
  return index;
}

cudaError_t run(const LaunchConfig& config, void (*body)(void*), void* argument) {
  const dim3 &grid = config.grid, &block = config.block;
  const int64_t threads = int64_t{block.x} * block.y * block.z;
  if (const char* what = wrong_with(config, threads)) {
    error("launch", "%s: grid (%u,%u,%u), block (%u,%u,%u), shared %zu, cluster %d", what, grid.x,
          grid.y, grid.z, block.x, block.y, block.z, config.shared, config.cluster);
    return cudaErrorInvalidConfiguration;
  }
  begin_launch(config, int(threads));
  kernel_body = body;
  kernel_argument = argument;
  const size_t at_once = size_t(clusters_alive());
  while (!launch_state.failed) {
    while (live.size() < at_once && next_cluster < order.size()) begin_cluster();
    if (live.empty()) break;
    Thread* const first = pick();
    if (first == nullptr) {
      report_deadlock();
      launch_state.failed = true;
      end_clusters(true);
      break;
    }
    current = first;
    enter(first->fiber);
    current = nullptr;
    end_clusters(launch_state.failed);
  }
  if (launch_state.failed) drop_bulk_copies();
  end_launch_memory();
  return launch_state.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace less::emulator
