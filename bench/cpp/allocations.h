// Counts every heap allocation of the program, whoever makes it: operator new ends there too.
#pragma once

#include <cstdint>

namespace less::bench {

// Calls of malloc, calloc, realloc and aligned_alloc since the program started.
int64_t allocations();

}  // namespace less::bench
