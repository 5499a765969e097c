#include "emulator/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "emulator/errors.h"

namespace less::emulator {
namespace {

constexpr size_t kSector = 32;
constexpr size_t kPage = 4096;
constexpr size_t kStaticGuard = 128;  // bytes behind each static array

// By their end: upper_bound of an address finds the one that could hold it.
std::map<uintptr_t, Region> regions;
Region* last_region;
size_t registered;  // regions that are neither windows nor automatic

struct StaticArray {
  const char* file;
  int line;
  size_t bytes, offset;
};
std::vector<StaticArray> statics;  // of the kernel under way
size_t static_begin, static_end;   // offsets into a window

unsigned char* map_memory(size_t bytes) {
  void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::perror("less emulator: memory"), std::abort();
  return static_cast<unsigned char*>(p);
}

Region& add_region(uintptr_t low, size_t bytes, std::string name) {
  Region& region = regions[low + bytes];
  region.low = low;
  region.high = low + bytes;
  region.name = std::move(name);
  last_region = nullptr;
  return region;
}

void make_global(Region& region) {
  if (!tracking) return;
  region.shadow.resize(region.low, region.high);
  region.loaded.assign((region.high - region.low) / kSector + 2, 0);
  region.stored = region.loaded;
}

void drop_overlapping(uintptr_t low, uintptr_t high) {
  for (auto i = regions.upper_bound(low); i != regions.end() && i->second.low < high;) {
    if (!i->second.automatic && i->second.window_of == nullptr) --registered;
    i = regions.erase(i);
  }
  last_region = nullptr;
}

Region& add_registered(const void* p, size_t bytes, const char* name, bool initialised) {
  const uintptr_t low = reinterpret_cast<uintptr_t>(p);
  drop_overlapping(low, low + bytes);
  Region& region = add_region(low, bytes, name);
  region.initialised = initialised;
  ++registered;
  make_global(region);
  return region;
}

size_t sectors_touched(std::vector<uint8_t>& sectors) {
  const size_t touched = size_t(std::count(sectors.begin(), sectors.end(), 1));
  std::fill(sectors.begin(), sectors.end(), 0);
  return touched;
}

// Bytes of a window that the kernel under way uses: two stretches.
struct Stretch {
  unsigned char* begin;
  size_t bytes;
};
std::array<Stretch, 2> used(const Block& block) {
  return {{{block.window, launch_state.dynamic_bytes},
           {block.window + static_begin, static_end - static_begin}}};
}

}  // namespace

Region* find_region(uintptr_t address) {
  if (last_region != nullptr && address - last_region->low < last_region->high - last_region->low) {
    return last_region;
  }
  const auto found = regions.upper_bound(address);
  if (found == regions.end() || address < found->second.low) return nullptr;
  return last_region = &found->second;
}

const Region* region_below(uintptr_t address) {
  auto found = regions.upper_bound(address);
  while (found != regions.begin()) {
    --found;
    if (found->second.window_of == nullptr) return &found->second;
  }
  return nullptr;
}

Region* region_for_access(uintptr_t address) {
  if (Region* const region = find_region(address)) return region;
  if (registered != 0) return nullptr;
  Region& region = add_region(address / kPage * kPage, kPage, "memory that nobody registered");
  region.automatic = true;
  region.initialised = true;
  make_global(region);
  return &region;
}

// -- shared memory --------------------------------------------------------------------------------

void make_window(Block& block) {
  block.window = map_memory(kWindowBytes);
  Region& region =
      add_region(reinterpret_cast<uintptr_t>(block.window), kWindowBytes, "shared memory");
  region.window_of = &block;
  if (tracking) region.shadow.resize(region.low, region.high);
  block.shadow = tracking ? &region.shadow : nullptr;
}

void begin_launch_memory() {
  statics.clear();
  static_begin = (launch_state.dynamic_bytes + 1023) / 1024 * 1024 + 1024;
  static_end = static_begin;
  begin_launch_accesses();
}

void begin_memory(Block& block) {
  ASAN_UNPOISON_MEMORY_REGION(block.window, kWindowBytes);
  // Static arrays of a kernel are known only once it has run through their declarations.
  std::memset(block.window, 0xff, launch_state.dynamic_bytes);
  std::memset(block.window + static_begin, 0xff, kMaxStaticShared);
  if (tracking) block.shadow->clear();
  block.guards.clear();
  const size_t behind = (launch_state.dynamic_bytes + 7) / 8 * 8;
  ASAN_POISON_MEMORY_REGION(block.window + behind, static_begin - behind);
  forget_locations(block.window, kWindowBytes);
}

void check_guards(const Block& block) {
  for (const Stretch& stretch : used(block)) {
    ASAN_UNPOISON_MEMORY_REGION(stretch.begin, stretch.bytes);
  }
  for (const SharedGuard& guard : block.guards) {
    for (const unsigned char* p = guard.begin; p < guard.end; ++p) {
      if (*p == 0xff) continue;
      error(
          "out-of-bounds",
          "block (%u,%u,%u): something wrote %zu bytes behind a shared array, at byte %zu of %s",
          block.index.x, block.index.y, block.index.z, size_t(p - guard.begin) + 1,
          size_t(p - block.window) < static_begin ? size_t(p - block.window)
                                                  : size_t(p - block.window) - static_begin,
          size_t(p - block.window) < static_begin ? "dynamic shared memory" : "the static arrays");
      return;
    }
  }
}

bool in_shared_arrays(size_t offset) {
  return offset < launch_state.dynamic_bytes || (offset >= static_begin && offset < static_end);
}

bool in_window(const Block& block, const void* p, size_t bytes) {
  const size_t offset = size_t(static_cast<const unsigned char*>(p) - block.window);
  return offset < kWindowBytes && offset + bytes <= kWindowBytes;
}

void set_in_flight(const Block& block, void* shared, unsigned bytes, bool in_flight) {
  if (in_flight) {
    ASAN_POISON_MEMORY_REGION(shared, bytes);
  } else {
    ASAN_UNPOISON_MEMORY_REGION(shared, bytes);
  }
  if (!tracking) return;
  block.shadow->each(reinterpret_cast<uintptr_t>(shared), bytes,
                     [=](Cell& cell, uintptr_t) { cell.in_flight = in_flight; });
}

unsigned char* dynamic_shared() { return current->window; }

void shared_guard(void* array, size_t bytes, void* end) {
  unsigned char* const low = static_cast<unsigned char*>(array) + bytes;
  unsigned char* const high = static_cast<unsigned char*>(end);
  if (current == nullptr || low == high) return;
  Block& block = *self()->home;
  for (const SharedGuard& guard : block.guards) {
    if (guard.begin == low) return;
  }
  block.guards.push_back({low, high});
  const size_t odd = (8 - reinterpret_cast<uintptr_t>(low) % 8) % 8;  // poison comes by eights
  ASAN_POISON_MEMORY_REGION(low + odd, size_t(high - low) - odd);
  if (!tracking) return;
  block.shadow->each(reinterpret_cast<uintptr_t>(low), size_t(high - low),
                     [](Cell& cell, uintptr_t) { cell.guard = true; });
}

void* static_shared(const char* file, int line, size_t bytes, size_t align) {
  if (launch_state.dynamic_bytes > 0) {
    fatal("launch", "%s: a static array beside dynamic shared memory, which no launch counts",
          file);
  }
  const auto same = [=](const StaticArray& array) {
    return array.line == line && array.bytes == bytes && !std::strcmp(array.file, file);
  };
  auto found = std::find_if(statics.begin(), statics.end(), same);
  if (found == statics.end()) {
    const size_t offset = (static_end + align - 1) / align * align;
    static_end = (offset + bytes + 127) / 128 * 128 + kStaticGuard;
    if (static_end > static_begin + kMaxStaticShared)
      fatal("launch", "too much static shared memory");
    found = statics.insert(found, {file, line, bytes, offset});
  }
  unsigned char* const array = current->window + found->offset;
  shared_guard(array, bytes, array + (bytes + 127) / 128 * 128 + kStaticGuard);
  return array;
}

// -- shared addresses, one's own and others' ------------------------------------------------------
// As PTX sees them: an offset into the window, with rank + 1 above for another block's.

namespace {

constexpr int kRankShift = 24;

const Block& block_of_rank(uint32_t rank, Where at) {
  Thread& me = *self();
  const Block& own = *me.home;
  if (rank >= cluster_size) {
    fatal("cluster-rank", "%s:%d: rank %u of a cluster of %u blocks", short_name(at.file), at.line,
          rank, cluster_size);
  }
  Block& other = *own.cluster->blocks[rank];
  if (&other == &own) return other;
  if (other.alive == 0) {
    fatal("cluster-exit", "%s:%d: shared memory of block (%u,%u,%u), which has ended",
          short_name(at.file), at.line, other.index.x, other.index.y, other.index.z);
  }
  if (!me.cluster_started && first_time("cluster-start", 0, 0)) {
    error("cluster-start",
          "%s:%d: shared memory of block (%u,%u,%u), which may not have begun: no cluster barrier "
          "before",
          short_name(at.file), at.line, other.index.x, other.index.y, other.index.z);
  }
  if (tracking) other.remote[me.slot] = {me.clock, at};
  return other;
}

}  // namespace

void* cluster_pointer(const void* own, uint32_t rank, Where at) {
  const Block& home = *self()->home;
  if (!in_window(home, own, 1)) {
    fatal("address-space", "%s:%d: not an address of shared memory", short_name(at.file), at.line);
  }
  const ptrdiff_t offset = static_cast<const unsigned char*>(own) - home.window;
  return block_of_rank(rank, at).window + offset;
}

uint32_t shared_address(const void* own) {
  return uint32_t(static_cast<const unsigned char*>(own) - current->window);
}

uint32_t map_shared(uint32_t own, uint32_t rank, Where at) {
  if (rank >= cluster_size) {
    fatal("cluster-rank", "%s:%d: rank %u of a cluster of %u blocks", short_name(at.file), at.line,
          rank, cluster_size);
  }
  return (own & ((1u << kRankShift) - 1)) | (rank + 1) << kRankShift;
}

unsigned char* shared_pointer(uint32_t address, Where at) {
  const uint32_t offset = address & ((1u << kRankShift) - 1), rank = address >> kRankShift;
  return (rank == 0 ? current->window : block_of_rank(rank - 1, at).window) + offset;
}

// -- global memory --------------------------------------------------------------------------------

void* allocate(size_t bytes, const char* name, bool initialised) {
  void* p = nullptr;
#if LESS_EMULATOR_ASAN
  if (posix_memalign(&p, 256, std::max<size_t>(bytes, 1)) != 0) std::abort();
#else
  // A page on either side belongs to nobody.
  const size_t whole = (bytes + kPage - 1) / kPage * kPage + 2 * kPage;
  p = map_memory(whole) + kPage;
#endif
  std::memset(p, 0xff, bytes);
  add_registered(p, std::max<size_t>(bytes, 1), name, initialised).owned = true;
  return p;
}

void release_memory(void* p) {
  const Region* const region = find_region(reinterpret_cast<uintptr_t>(p));
  if (region == nullptr || !region->owned) return;
  [[maybe_unused]] const size_t pages = (region->high - region->low + kPage - 1) / kPage + 2;
  unregister_memory(p);
#if LESS_EMULATOR_ASAN
  std::free(p);
#else
  munmap(static_cast<unsigned char*>(p) - kPage, pages * kPage);
#endif
}

void register_memory(const void* p, size_t bytes, const char* name, bool initialised) {
  if (bytes > 0) add_registered(p, bytes, name, initialised);
}

void unregister_memory(const void* p) {
  const Region* const region = find_region(reinterpret_cast<uintptr_t>(p));
  if (region == nullptr || region->low != reinterpret_cast<uintptr_t>(p)) return;
  drop_overlapping(region->low, region->high);
}

int64_t written_bytes(const void* p, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  Region* const region = find_region(address);
  if (!tracking || region == nullptr || address + bytes > region->high) return 0;
  int64_t written = 0;
  region->shadow.each_byte(address, bytes, [&](const Cell& cell) { written += cell.written; });
  return written;
}

void end_launch_memory() {
  for (auto& [high, region] : regions) {
    statistics.touched_load_sectors += sectors_touched(region.loaded);
    statistics.touched_store_sectors += sectors_touched(region.stored);
  }
}

}  // namespace less::emulator
