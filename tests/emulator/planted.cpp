// planted CASE RIGHT|WRONG [OPTION=VALUE ...]: runs one case under every schedule and every time
// for asynchronous copies (unless an option names one), and prints what was found, as JSON.
#include "planted.h"

#include <cstdio>
#include <cstring>
#include <string>

std::vector<unsigned> less::cuda::seen;

namespace {

using less::cuda::Case;

const Case* find_case(const char* name) {
  for (const auto* cases : {&less::cuda::block_cases(), &less::cuda::async_cases(),
                            &less::cuda::grid_cases(), &less::cuda::profile_cases()}) {
    for (const Case& each : *cases) {
      if (!std::strcmp(each.name, name)) return &each;
    }
  }
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  const Case* const found = argc > 2 ? find_case(argv[1]) : nullptr;
  if (found == nullptr) {
    std::fputs("usage: planted CASE right|wrong [OPTION=VALUE ...]\n", stderr);
    return 2;
  }
  const bool wrong = !std::strcmp(argv[2], "wrong");
  std::vector<const char*> schedules{"in_order",   "reverse",     "random",
                                     "warp_ahead", "warp_behind", "lockstep"};
  std::vector<const char*> asyncs{"late", "early", "random"};
  for (int i = 3; i < argc; ++i) {
    const std::string option(argv[i], std::strcspn(argv[i], "="));
    const char* const value = argv[i] + option.size() + 1;
    if (option == "schedule") schedules = {value};
    if (option == "async") asyncs = {value};
    if (less_emulator_set(option.c_str(), value) != 0) return 2;
  }
  less_emulator_set("max_errors", "200");
  int right = 0, runs = 0;
  for (const char* schedule : schedules) {
    for (const char* async : asyncs) {
      if (less_emulator_set("schedule", schedule) != 0) return 2;
      if (less_emulator_set("async", async) != 0) return 2;
      right += found->run(wrong);
      ++runs;
    }
  }
  std::printf("{\"tier\": \"%s\", \"runs\": %d, \"right\": %d, \"errors\": %s",
              less_emulator_tier(), runs, right, less_emulator_errors_json());
  std::printf(", \"seen\": [");
  for (size_t i = 0; i < less::cuda::seen.size(); ++i) {
    std::printf("%s%u", i == 0 ? "" : ", ", less::cuda::seen[i]);
  }
  std::printf("], \"profile\": %s}\n", less_emulator_profile_json());
  return 0;
}
