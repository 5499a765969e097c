// Memory that kernels may touch: what has been allocated or registered, and the blocks' windows of
// shared memory. A window holds the dynamic part first, the static arrays behind it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator/shadow.h"
#include "emulator/state.h"

namespace less::emulator {

constexpr size_t kWindowBytes = 384 << 10;
constexpr size_t kMaxStaticShared = 64 << 10;
// More than a device's blocks may have: room for the guards that arrays have here.
constexpr size_t kRoomForGuards = 4 << 10;

struct Region {
  uintptr_t low, high;
  std::string name;
  bool owned = false;
  bool initialised = false;
  bool automatic = false;       // nobody registered it
  Block* window_of = nullptr;   // null: global memory
  Shadow shadow;                // where accesses are tracked
  std::vector<uint8_t> loaded;  // 32-byte sectors, by the launch under way
  std::vector<uint8_t> stored;
};

// The region that holds this address, or null.
Region* find_region(uintptr_t address);
// The same; where nothing is registered, all memory is taken as it comes.
Region* region_for_access(uintptr_t address);
// What lies nearest below, for messages.
const Region* region_below(uintptr_t address);
Region& window_region(const Block& block);

void make_window(Block& block);
void begin_memory(Block& block);
void begin_launch_memory();
// Counts the sectors touched.
void end_launch_memory();
// Whether something wrote behind a shared array.
void check_guards(const Block& block);
// Whether a byte of the window belongs to an array of the kernel, by its offset.
bool in_shared_arrays(size_t offset);
bool in_window(const Block& block, const void* p, size_t bytes);
// Bytes of shared memory that a copy will write: nobody may touch them.
void set_in_flight(const Block& block, void* shared, unsigned bytes, bool in_flight);

void* allocate(size_t bytes, const char* name, bool initialised);
void release_memory(void* p);
void register_memory(const void* p, size_t bytes, const char* name, bool initialised);
void unregister_memory(const void* p);
int64_t written_bytes(const void* p, size_t bytes);

}  // namespace less::emulator
