// How a test steers the emulator and reads what it found. Plain C, so that ctypes serves as well.
//
// Each emulated library has a runtime of its own: options, errors and memory are the library's.
// Not thread-safe: one thread launches and asks.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define LESS_EMULATOR_API __attribute__((visibility("default")))

extern "C" {

// "fast", "asan", "track", or "ptx" where translated kernels are launched.
LESS_EMULATOR_API const char* less_emulator_tier(void);

// Sets an option from its text; 0, or -1 where there is no such option or value. Environment
// variables LESS_EMULATOR_<OPTION> set the same when the library is loaded.
//   schedule     in_order reverse random warp_ahead warp_behind lockstep
//   seed         of everything random
//   async        late early random: when asynchronous copies become visible
//   tensor       exact device: how tensor cores add
//   blocks       clusters that live at once; 0: as the schedule likes
//   preempt      track: another thread may run after about this many accesses; 0: never
//   race         track: 0 1, races, uninitialised reads, bounds
//   profile      track: 0 1, statistics per instruction
//   ptx          0 1: launch translated kernels, where they are linked in
//   max_errors   errors kept
//   rows         of each launch's blocks run so many rows along x, no others; 0: all
//   stride       and of those every so many: 1
//   latency_*    cycles, for each cause in timeline.h, where kernels keep clocks
LESS_EMULATOR_API int less_emulator_set(const char* option, const char* value);

// Forgets errors and statistics; options and memory stay.
LESS_EMULATOR_API void less_emulator_reset(void);

LESS_EMULATOR_API int64_t less_emulator_error_count(void);
// [{"kind": "race", "message": "..."}, ...]; valid until the next call.
LESS_EMULATOR_API const char* less_emulator_errors_json(void);
// Totals, and one entry per memory instruction; valid until the next call.
LESS_EMULATOR_API const char* less_emulator_profile_json(void);

// Global memory with guarded ends; bytes are 0xFF. initialised 0: reading what no kernel wrote is
// an error.
LESS_EMULATOR_API void* less_emulator_alloc(size_t bytes, const char* name, int initialised);
LESS_EMULATOR_API void less_emulator_free(void* p);
// The same checks for memory of someone else's, such as a tensor's, until unregistered. While
// anything is registered, a kernel that touches other memory is out of bounds.
LESS_EMULATOR_API void less_emulator_register(const void* p, size_t bytes, const char* name,
                                              int initialised);
LESS_EMULATOR_API void less_emulator_unregister(const void* p);
// How many of these bytes kernels have written since they were registered; track alone.
LESS_EMULATOR_API int64_t less_emulator_written(const void* p, size_t bytes);

}  // extern "C"
