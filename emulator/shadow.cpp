#include "emulator/shadow.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "emulator/errors.h"
#include "emulator/memory.h"
#include "emulator/sites.h"
#include "emulator/state.h"

namespace less::emulator {

bool tracking = false;

// -- cells ----------------------------------------------------------------------------------------

Shadow::~Shadow() {
  if (cells_ != nullptr) munmap(cells_, count_ * sizeof(Cell));
}

void Shadow::resize(uintptr_t low, uintptr_t high) {
  low_ = low / 4 * 4;
  dirty_ = low_;
  count_ = (high - low_ + 3) / 4;
  void* const p = mmap(nullptr, count_ * sizeof(Cell), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  cells_ = static_cast<Cell*>(p);
}

void Shadow::clear() {
  std::memset(static_cast<void*>(cells_), 0, (dirty_ - low_ + 3) / 4 * sizeof(Cell));
  dirty_ = low_;
  splits_.clear();
}

std::array<Cell, 4>& Shadow::split(Cell& whole, uintptr_t address) {
  dirty_ = std::max(dirty_, address / 4 * 4 + 4);
  if (whole.split == 0) {
    splits_.push_back({whole, whole, whole, whole});
    whole.split = uint32_t(splits_.size());
  }
  return splits_[whole.split - 1];
}

namespace {

// -- order ----------------------------------------------------------------------------------------

// What the atomics on a location have published to those who read it.
struct Location {
  uint32_t version = 0;
  Published published;
};
std::unordered_map<uintptr_t, Location> locations;

// One access as its cells are checked.
struct Use {
  Thread& thread;
  Region& region;
  uint32_t site;
  bool atomic;  // or relaxed
  bool reads;
  bool writes;
  Epoch epoch;
};

enum class Order { before, unordered, earlier_launch };

// Whether that moment is before what the thread does now.
Order order_of(const Thread& thread, const Epoch& then) {
  const uint32_t serial = thread.home->cluster->serial;
  if (then.cluster == serial) {
    if (then.slot == thread.slot) return Order::before;
    const Snapshot& own = thread.view.own;
    const bool seen = own && then.slot < own->size() && (*own)[then.slot] >= then.clock;
    return seen ? Order::before : Order::unordered;
  }
  if (then.cluster < launch_state.first_serial) {
    const bool over = !launch_state.dependent || thread.view.waited ||
                      then.cluster < launch_state.previous_serial;
    return over ? Order::before : Order::earlier_launch;
  }
  if (!thread.view.others) return Order::unordered;
  const ByCluster& others = *thread.view.others;
  const auto found =
      std::lower_bound(others.begin(), others.end(), then.cluster,
                       [](const auto& entry, uint32_t serial) { return entry.first < serial; });
  if (found == others.end() || found->first != then.cluster) return Order::unordered;
  const Clocks& clocks = *found->second;
  const bool seen = then.slot < clocks.size() && clocks[then.slot] >= then.clock;
  return seen ? Order::before : Order::unordered;
}

std::string who(const Use& use, const Epoch& then) {
  if (then.cluster < launch_state.first_serial) return "the kernel before";
  const uint32_t threads = uint32_t(launch_state.block_threads);
  const uint32_t thread = then.slot % (threads + 1);
  std::string text = thread == threads ? "a bulk copy" : "thread " + std::to_string(thread);
  const uint3 block = block_of(then.cluster, then.slot);
  const uint3 own = use.thread.block;
  if (block.x == own.x && block.y == own.y && block.z == own.z) return text + " of this block";
  return text + " of block (" + std::to_string(block.x) + "," + std::to_string(block.y) + "," +
         std::to_string(block.z) + ")";
}

void report(const char* kind, const char* what, const Use& use, const Epoch& then,
            uintptr_t address) {
  if (!first_time(kind, use.site, then.site)) return;
  error(kind, "%s: %s of %s, byte %zu: %s did so at %s, and nothing orders the two",
        where(use.site).c_str(), what, use.region.name.c_str(), size_t(address - use.region.low),
        who(use, then).c_str(), where(then.site).c_str());
}

void check_order(const char* what, const Use& use, const Epoch& then, uintptr_t address) {
  if (then.cluster == 0) return;
  switch (order_of(use.thread, then)) {
    case Order::before:
      return;
    case Order::unordered:
      return report("race", what, use, then, address);
    case Order::earlier_launch:
      return report("dependent-launch", what, use, then, address);
  }
}

// -- one cell -------------------------------------------------------------------------------------

// A thread that has changed a location by an atomic, or seen who did, comes after those changes.
bool after_atomics(const Use& use, uintptr_t address) {
  const auto found = locations.find(address / 4 * 4);
  return found != locations.end() &&
         chain_version(use.thread, address / 4 * 4) == found->second.version;
}

void check_write(const Use& use, const Cell& cell, uintptr_t address) {
  if (cell.write.cluster != 0 && !(use.atomic && cell.atomic_write)) {
    if (!(cell.atomic_write && after_atomics(use, address))) {
      check_order(use.reads && !use.writes ? "read after a write" : "write after a write", use,
                  cell.write, address);
    }
  }
  if (!use.writes || (use.atomic && !cell.plain_read)) return;
  check_order("write after a read", use, cell.read, address);
  check_order("write after a read", use, cell.other, address);
}

void note(const Use& use, Cell& cell) {
  if (use.writes) {
    cell.write = use.epoch;
    cell.atomic_write = use.atomic;
    cell.initialised = cell.written = true;
    cell.read = cell.other = Epoch();
    cell.plain_read = false;
    return;
  }
  const bool same = cell.read.cluster == use.epoch.cluster && cell.read.slot == use.epoch.slot;
  if (!same) cell.other = cell.read;
  cell.read = use.epoch;
  if (!use.atomic) cell.plain_read = true;
}

// False: the rest of the access is not worth a look.
bool check_cell(const Use& use, Cell& cell, uintptr_t address) {
  if (cell.guard) {
    if (first_time("out-of-bounds", use.site, 0)) {
      error("out-of-bounds", "%s: %s behind its shared array, at byte %zu of shared memory",
            where(use.site).c_str(), use.writes ? "write" : "read",
            size_t(address - use.region.low));
    }
    return false;
  }
  if (cell.in_flight) {
    report("async-race",
           use.writes ? "write to bytes that a copy is yet to write"
                      : "read of bytes that a copy is yet to write",
           use, cell.write, address);
    return false;
  }
  if (use.reads && !cell.initialised && !use.region.initialised &&
      first_time("uninitialised", use.site, 0)) {
    error("uninitialised", "%s: read of %s, byte %zu, that nobody has written",
          where(use.site).c_str(), use.region.name.c_str(), size_t(address - use.region.low));
  }
  check_write(use, cell, address);
  note(use, cell);
  return true;
}

// -- whole accesses -------------------------------------------------------------------------------

void report_bounds(uintptr_t address, unsigned n, bool writes, uint32_t site) {
  if (!first_time("out-of-bounds", site, 0)) return;
  const Region* region = find_region(address);
  if (region == nullptr) region = region_below(address);
  if (region == nullptr) {
    error("out-of-bounds", "%s: %u-byte %s of memory that nobody registered", where(site).c_str(),
          n, writes ? "write" : "read");
    return;
  }
  error("out-of-bounds", "%s: %u-byte %s at byte %zu of %s, which has %zu", where(site).c_str(), n,
        writes ? "write" : "read", size_t(address - region->low), region->name.c_str(),
        size_t(region->high - region->low));
}

bool check_bounds(Region* region, uintptr_t address, unsigned n, bool writes, uint32_t site) {
  if (region == nullptr || address + n > region->high) {
    report_bounds(address, n, writes, site);
    return false;
  }
  if (region->window_of == nullptr) return true;
  const size_t offset = address - region->low;
  if (!in_shared_arrays(offset) || !in_shared_arrays(offset + n - 1)) {
    if (first_time("out-of-bounds", site, 0)) {
      error("out-of-bounds", "%s: %s at byte %zu of shared memory, where no array is",
            where(site).c_str(), writes ? "write" : "read", offset);
    }
    return false;
  }
  if (region->window_of->cluster == self()->home->cluster) return true;
  fatal("address-space", "%s: shared memory of another cluster", where(site).c_str());
}

void publish(Thread& thread, uintptr_t address, Access kind, bool shared) {
  const Scope scope = shared ? kBlockScope : kGpuScope;
  Location& location = locations[address / 4 * 4];
  if (kind != Access::relaxed_write) join(thread.pending[scope], location.published);
  if (kind == Access::relaxed_read) return;
  if (thread.has_fenced[scope]) join(location.published, thread.fenced[scope]);
  note_chain(thread, address / 4 * 4, ++location.version);
}

void track(uintptr_t address, unsigned n, Access kind, uint32_t site) {
  Thread& thread = *self();
  const bool reads = kind != Access::write && kind != Access::relaxed_write;
  const bool writes = kind != Access::read && kind != Access::relaxed_read;
  Region* const region = region_for_access(address);
  if (region == nullptr && in_loaded_module(reinterpret_cast<const void*>(address))) return;
  if (!check_bounds(region, address, n, writes, site)) return;
  ++statistics.accesses;
  if (n <= 16 && address % n != 0 && first_time("misaligned", site, 0)) {
    error("misaligned", "%s: %u-byte access at byte %zu of %s", where(site).c_str(), n,
          size_t(address - region->low), region->name.c_str());
  }
  const bool atomic = kind != Access::read && kind != Access::write;
  // What the test's own memory holds may be of the kernel before.
  if (launch_state.dependent && region->initialised && !thread.view.waited &&
      first_time("dependent-launch", site, 0)) {
    error("dependent-launch", "%s: %s of %s before grid_dependency_wait()", where(site).c_str(),
          writes ? "write" : "read", region->name.c_str());
  }
  if (options.race) {
    const Epoch now{thread.home->cluster->serial, thread.slot, thread.clock, site};
    const Use use{thread, *region, site, atomic, reads, writes, now};
    bool going = true;
    region->shadow.each(address, n, [&](Cell& cell, uintptr_t at) {
      if (going) going = check_cell(use, cell, at);
    });
    if (atomic) publish(thread, address, kind, region->window_of != nullptr);
  }
  if (region->window_of != nullptr) {
    thread.from = region->window_of == thread.home ? Cause::shared : Cause::remote;
  }
  if (!options.profile) return;
  if (region->window_of == nullptr) {
    std::vector<uint8_t>& sectors = writes ? region->stored : region->loaded;
    const uintptr_t first = region->low / 32;
    const bool known = region->loaded[address / 32 - first] || region->stored[address / 32 - first];
    thread.from = known ? Cause::l2 : Cause::dram;
    for (uintptr_t s = address / 32; s <= (address + n - 1) / 32; ++s) sectors[s - first] = 1;
  }
  record(thread, site, region->window_of != nullptr, address, n, writes);
}

void maybe_switch() {
  static int countdown;
  if (options.preempt <= 0 || --countdown > 0) return;
  countdown = 1 + int(random_below(uint64_t(2 * options.preempt)));
  yield_here();
}

bool of_no_interest(const void* p) {
  return current == nullptr || on_stack(self()->fiber, p) || on_main_stack(p);
}

void access_site(const void* p, unsigned n, Access kind, uint32_t site) {
  if (on_any_stack(p)) {
    if (first_time("stack", site, 0)) {
      error("stack", "%s: the stack of another thread", where(site).c_str());
    }
    return;
  }
  track(reinterpret_cast<uintptr_t>(p), n, kind, site);
  maybe_switch();
}

}  // namespace

void access(const void* p, unsigned n, Access kind, const void* pc) {
  if (!of_no_interest(p)) access_site(p, n, kind, site_of(pc));
}

void access_at(const void* p, unsigned n, Access kind, Where at) {
  if (tracking && !of_no_interest(p)) access_site(p, n, kind, site_of(at));
}

void begin_launch_accesses() {
  locations.clear();
  forget_times();
}

void forget_locations(const void* p, size_t bytes) {
  if (locations.empty()) return;
  const uintptr_t low = reinterpret_cast<uintptr_t>(p);
  for (auto i = locations.begin(); i != locations.end();) {
    i = i->first - low < bytes ? locations.erase(i) : std::next(i);
  }
}

}  // namespace less::emulator
