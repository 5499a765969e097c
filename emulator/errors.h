// What was found, in the order in which it was.
#pragma once

#include <string>
#include <vector>

#include "emulator/runtime.h"

namespace less::emulator {

struct Error {
  std::string kind;
  std::string message;
};

struct Errors {
  std::vector<Error> kept;  // options.max_errors of them
  int64_t count = 0;
};
extern Errors errors;

// Says the same thing of the same two places only once per launch.
bool first_time(const char* kind, uint32_t site, uint32_t other_site);
void forget_times();

}  // namespace less::emulator
