// Copies to shared memory that land later: cp.async in groups, bulk copies with mbarriers.
//
// When the bytes land is the option async: as late as allowed, at once, or either. Whatever it is,
// nobody may touch them between the order and the wait.
#include <algorithm>
#include <cstring>

#include "emulator/errors.h"
#include "emulator/memory.h"
#include "emulator/sites.h"
#include "emulator/state.h"

namespace less::emulator {
namespace {

struct BulkCopy {
  Copy copy;
  Block* block;
  uint64_t* bar;
};
std::vector<BulkCopy> bulk_copies;  // under way

constexpr uint64_t kMbarrierBytes = 0x4d42415252494552;  // what an mbarrier's memory holds

void land(Copy& copy) {
  ASAN_UNPOISON_MEMORY_REGION(copy.shared, copy.bytes);
  std::memcpy(copy.shared, copy.global, copy.source_bytes);
  std::memset(static_cast<char*>(copy.shared) + copy.source_bytes, 0,
              copy.bytes - copy.source_bytes);
  copy.landed = true;
}

// From now on the bytes may be read, by those who have seen this clock of this slot.
void finish(Block& block, Copy& copy, uint32_t slot, uint32_t clock) {
  if (!copy.landed) land(copy);
  set_in_flight(block, copy.shared, copy.bytes, false);
  if (!tracking) return;
  const Epoch now{block.cluster->serial, slot, clock, site_of(copy.at)};
  block.shadow->each(reinterpret_cast<uintptr_t>(copy.shared), copy.bytes,
                     [&](Cell& cell, uintptr_t) {
                       cell.write = now;
                       cell.initialised = cell.written = true;
                       cell.atomic_write = false;
                     });
}

void check_copy(const Block& block, const Copy& copy, unsigned align) {
  const auto bits = reinterpret_cast<uintptr_t>(copy.shared) |
                    reinterpret_cast<uintptr_t>(copy.global) | copy.bytes;
  const char* const file = short_name(copy.at.file);
  if (bits % align != 0) {
    fatal("misaligned", "%s:%d: a copy of %u bytes from %p to %p, which wants multiples of %u",
          file, copy.at.line, copy.bytes, copy.global, copy.shared, align);
  }
  if (!in_window(block, copy.shared, copy.bytes)) {
    fatal("address-space", "%s:%d: the destination of a copy is not this block's shared memory",
          file, copy.at.line);
  }
#if LESS_EMULATOR_ASAN
  if (__asan_region_is_poisoned(copy.shared, copy.bytes) != nullptr) {
    error("async-race", "%s:%d: a copy to bytes that another copy is yet to write, or to none",
          file, copy.at.line);
  }
  if (copy.source_bytes > 0 &&
      __asan_region_is_poisoned(const_cast<void*>(copy.global), copy.source_bytes) != nullptr) {
    error("out-of-bounds", "%s:%d: a copy of %u bytes from outside their array", file, copy.at.line,
          copy.source_bytes);
  }
#endif
}

void begin(Block& block, Copy& copy) {
  ++statistics.async_copies;
  statistics.async_bytes += copy.source_bytes;
  if (copy.source_bytes > 0) access_at(copy.global, copy.source_bytes, Access::read, copy.at);
  if (copy.source_bytes == 0) self()->from = Cause::shared;
  copy.ready = trip(*self());
  // The order counts as a write: what others still read there is a race already.
  access_at(copy.shared, copy.bytes, Access::write, copy.at);
  const bool early =
      options.async == Async::early || (options.async == Async::random && random_below(2) == 0);
  if (early) {
    land(copy);
  } else {
    std::memset(copy.shared, 0xff, copy.bytes);
  }
  set_in_flight(block, copy.shared, copy.bytes, true);
}

}  // namespace

// -- cp.async -------------------------------------------------------------------------------------

void copy_async(void* shared, const void* global, unsigned n, unsigned source_n, Where at) {
  Block& block = *self()->home;
  if ((n != 4 && n != 8 && n != 16) || source_n > n) {
    fatal("address-space", "%s:%d: cp.async of %u bytes", short_name(at.file), at.line, n);
  }
  Copy copy{shared, global, n, source_n, false, at};
  check_copy(block, copy, n);
  begin(block, copy);
  self()->open_copies.push_back(copy);
}

void copy_async_commit() {
  Thread& me = *self();
  me.copy_groups.push_back(std::move(me.open_copies));
  me.open_copies.clear();
}

void copy_async_wait(int groups, Where) {
  Thread& me = *self();
  const size_t under_way = me.copy_groups.size();
  const size_t over = under_way - std::min(under_way, size_t(groups));
  for (size_t i = 0; i < over; ++i) {
    for (Copy& copy : me.copy_groups[i]) {
      finish(*me.home, copy, me.slot, me.clock);
      if (timed) wait_for(me.line, copy.ready);
    }
  }
  me.copy_groups.erase(me.copy_groups.begin(), me.copy_groups.begin() + ptrdiff_t(over));
}

// -- mbarriers ------------------------------------------------------------------------------------

namespace {

Mbarrier& mbarrier(Block& block, uint64_t* bar, Where at) {
  const auto found = block.mbarriers.find(bar);
  if (found == block.mbarriers.end()) {
    fatal("mbarrier", "%s:%d: nobody has initialised this mbarrier", short_name(at.file), at.line);
  }
  if (*bar != kMbarrierBytes) {
    fatal("mbarrier", "%s:%d: something has written over this mbarrier", short_name(at.file),
          at.line);
  }
  return found->second;
}

void try_phase(Mbarrier& state) {
  if (state.pending != 0 || state.bytes > 0) return;
  if (state.bytes < 0) {
    error("mbarrier-bytes",
          "the mbarrier of %s:%d: copies have brought %lld bytes more than were expected",
          short_name(state.at.file), state.at.line, static_cast<long long>(-state.bytes));
    state.bytes = 0;
  }
  ++state.phase;
  state.pending = state.count;
  note_progress();
  for (Thread* thread : state.waiting) make_ready(thread);
  state.waiting.clear();
}

}  // namespace

void mbarrier_init(uint64_t* bar, uint32_t arrivals, Where at) {
  Block& block = *self()->home;
  if (reinterpret_cast<uintptr_t>(bar) % 8 != 0 || !in_window(block, bar, 8)) {
    fatal("mbarrier", "%s:%d: no mbarrier can lie at %p", short_name(at.file), at.line,
          static_cast<void*>(bar));
  }
  access_at(bar, 8, Access::write, at);
  Mbarrier state;
  state.count = state.pending = arrivals;
  state.initialised_by = self();
  state.at = at;
  block.mbarriers[bar] = std::move(state);
  *bar = kMbarrierBytes;
}

void mbarrier_fence_init() {
  for (auto& [bar, state] : self()->home->mbarriers) {
    if (state.initialised_by == self()) state.initialised_by = nullptr;
  }
}

void mbarrier_arrive(uint64_t* bar, uint32_t bytes, Where at) {
  access_at(bar, 8, Access::atomic, at);
  Thread& me = *self();
  Mbarrier& state = mbarrier(*me.home, bar, at);
  if (state.pending == 0) {
    fatal("mbarrier", "%s:%d: more than the %u arrivals that %s:%d has said", short_name(at.file),
          at.line, state.count, short_name(state.at.file), state.at.line);
  }
  if (tracking) {
    state.gathered.add(me);
    ++me.clock;
  }
  state.bytes += bytes;
  --state.pending;
  try_phase(state);
}

void mbarrier_wait(uint64_t* bar, uint32_t parity, Where at) {
  access_at(bar, 8, Access::atomic, at);
  Thread& me = *self();
  Mbarrier& state = mbarrier(*me.home, bar, at);
  while ((state.phase & 1) == parity) {
    state.waiting.push_back(&me);
    wait_here({"an mbarrier", at, " (parity %u, %u arrivals to come)", {parity, state.pending}});
  }
  if (tracking) acquire(me, state.gathered.view());
}

void report_mbarriers(const Block& block) {
  for (const auto& [bar, state] : block.mbarriers) {
    if (state.waiting.empty() || state.pending != 0 || state.bytes <= 0) continue;
    error("mbarrier-bytes", "the mbarrier of %s:%d: %lld bytes are expected that no copy brings",
          short_name(state.at.file), state.at.line, static_cast<long long>(state.bytes));
  }
}

// -- bulk copies ----------------------------------------------------------------------------------

void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* bar, Where at) {
  Block& block = *self()->home;
  Copy copy{shared, global, bytes, bytes, false, at};
  check_copy(block, copy, 16);
  const Mbarrier& state = mbarrier(block, bar, at);
  if (state.initialised_by != nullptr && first_time("mbarrier-fence", site_of(at), 0)) {
    error("mbarrier-fence", "%s:%d: no mbarrier_fence_init() after the mbarrier's init at %s:%d",
          short_name(at.file), at.line, short_name(state.at.file), state.at.line);
  }
  begin(block, copy);
  bulk_copies.push_back({copy, &block, bar});
  if (options.async == Async::early) land_bulk_copy();
}

bool land_bulk_copy() {
  if (bulk_copies.empty()) return false;
  const auto chosen = bulk_copies.begin() + ptrdiff_t(random_below(bulk_copies.size()));
  BulkCopy bulk = *chosen;
  bulk_copies.erase(chosen);
  Block& block = *bulk.block;
  if (block.alive == 0) {
    error("async-pending", "block (%u,%u,%u) has ended before the bulk copy of %s:%d",
          block.index.x, block.index.y, block.index.z, short_name(bulk.copy.at.file),
          bulk.copy.at.line);
    return true;
  }
  finish(block, bulk.copy, block.bulk_slot, ++block.bulk_clock);
  Mbarrier& state = block.mbarriers[bulk.bar];
  if (tracking) state.gathered.add(block.bulk_slot, block.bulk_clock);
  state.bytes -= int64_t(bulk.copy.bytes);
  try_phase(state);
  return true;
}

void drop_bulk_copies() { bulk_copies.clear(); }

}  // namespace less::emulator
