// What the memory system would be asked for: exact counts, no time.
//
// A warp's lanes run one after another here, so the accesses that one instruction makes together on
// the device are matched by how often each lane has been at that place since the warp last met.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace less::emulator {

struct Thread;
struct Warp;

// One warp-wide memory request, as its lanes report.
struct Request {
  uint32_t mask = 0;
  uint32_t bytes = 0;  // per lane
  bool writes = false;
  uint64_t address[32];
};

struct WarpRequests {
  std::vector<std::vector<Request>> by_place;  // 2 * site + (shared memory)
  std::vector<uint32_t> used;
};

struct Traffic {
  uint64_t bytes = 0;          // distinct within each request
  uint64_t sectors = 0;        // of 32 bytes
  uint64_t ideal_sectors = 0;  // were the bytes of each request contiguous
};

// Of one memory instruction, in one of the two memories.
struct Instruction {
  uint32_t bytes = 0;  // per lane, of the last request
  bool writes = false;
  uint64_t requests = 0;
  uint64_t lanes = 0;
  Traffic traffic;                // global memory
  uint64_t wavefronts = 0;        // shared memory
  uint64_t ideal_wavefronts = 0;  // without bank conflicts
};

struct Statistics {
  uint64_t blocks = 0, threads = 0, barriers = 0, cluster_barriers = 0, warp_operations = 0;
  uint64_t switches = 0, accesses = 0, async_copies = 0, async_bytes = 0;
  Traffic load, store;
  uint64_t touched_load_sectors = 0;  // distinct ones, launch by launch
  uint64_t touched_store_sectors = 0;
  uint64_t shared_requests = 0, wavefronts = 0, ideal_wavefronts = 0;
};
extern Statistics statistics;

void record(Thread& thread, uint32_t site, bool shared, uintptr_t address, unsigned bytes,
            bool writes);
// The warp has met: what its lanes have reported so far belongs together.
void flush(Warp& warp);
void reset_profile();
std::string profile_json();

}  // namespace less::emulator
