#include "emulator/control.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "emulator/errors.h"
#include "emulator/json.h"
#include "emulator/memory.h"
#include "emulator/profiler.h"
#include "emulator/sites.h"
#include "emulator/state.h"

namespace less::emulator {
namespace {

std::string answer;  // what was asked for last

std::map<std::string, Translated>& translated_kernels() {
  static std::map<std::string, Translated> kernels;
  return kernels;
}

// Sets what has the place of a word among the words of a list, if it has one.
template <size_t n, typename Enum>
bool chosen(const char* const (&words)[n], const char* word, Enum& option) {
  for (size_t i = 0; i < n; ++i) {
    if (!std::strcmp(words[i], word)) return option = Enum(i), true;
  }
  return false;
}

constexpr const char* kSchedules[] = {"in_order",   "reverse",     "random",
                                      "warp_ahead", "warp_behind", "lockstep"};
constexpr const char* kAsyncs[] = {"late", "early", "random"};
constexpr const char* kTensors[] = {"exact", "device"};
constexpr const char* kOptions[] = {"schedule", "seed",       "async", "tensor",
                                    "blocks",   "preempt",    "race",  "profile",
                                    "ptx",      "max_errors", "rows",  "stride"};

bool set_number(const std::string& option, long long n) {
  if (option == "seed") {
    options.seed = uint64_t(n);
  } else if (option == "blocks") {
    options.blocks = int(n);
  } else if (option == "preempt") {
    options.preempt = int(n);
  } else if (option == "race") {
    options.race = n != 0;
  } else if (option == "profile") {
    options.profile = n != 0;
  } else if (option == "ptx") {
    options.ptx = n != 0;
  } else if (option == "rows") {
    options.rows = int(n);
  } else if (option == "stride" && n > 0) {
    options.stride = int(n);
  } else if (option == "max_errors") {
    options.max_errors = int(n);
  } else {
    return set_latency(option, double(n));
  }
  return true;
}

bool set_option(const std::string& option, const char* value) {
  if (option == "schedule") return chosen(kSchedules, value, options.schedule);
  if (option == "async") return chosen(kAsyncs, value, options.async);
  if (option == "tensor") return chosen(kTensors, value, options.tensor);
  char* end;
  const long long n = std::strtoll(value, &end, 10);
  return *value != 0 && *end == 0 && n >= 0 && set_number(option, n);
}

// LESS_EMULATOR_SCHEDULE and so on. What nobody understands must not pass unseen.
struct FromEnvironment {
  FromEnvironment() {
    for (const char* option : kOptions) {
      std::string name = "LESS_EMULATOR_";
      for (const char* c = option; *c; ++c) name += *c == '_' ? '_' : char(*c - 'a' + 'A');
      const char* const value = std::getenv(name.c_str());
      if (value == nullptr || set_option(option, value)) continue;
      std::fprintf(stderr, "%s: no such value: %s\n", name.c_str(), value);
      std::abort();
    }
  }
} const from_environment;

}  // namespace

Registered::Registered(const char* name, Translated kernel) { translated_kernels()[name] = kernel; }

Translated translated(const void* kernel) {
  if (!options.ptx || translated_kernels().empty()) return nullptr;
  static std::map<const void*, Translated> known;
  const auto [entry, fresh] = known.try_emplace(kernel, nullptr);
  launch_state.kernel = kernel;
  if (!fresh) return entry->second;
  const std::string name = symbol_at(kernel);
  const auto found = translated_kernels().find(name);
  if (found != translated_kernels().end()) entry->second = found->second;
  if (entry->second == nullptr) {
    std::fprintf(stderr, "less emulator: ptx: no translated kernel %s\n", name.c_str());
    std::abort();
  }
  return entry->second;
}

}  // namespace less::emulator

using namespace less::emulator;

const char* less_emulator_tier(void) {
  if (LESS_EMULATOR_ASAN) return "asan";
  if (options.ptx && !translated_kernels().empty()) return "ptx";
  return tracking ? "track" : "fast";
}

int less_emulator_set(const char* option, const char* value) {
  return set_option(option, value) ? 0 : -1;
}

void less_emulator_reset(void) {
  errors = Errors();
  reset_profile();
}

int64_t less_emulator_error_count(void) { return errors.count; }

const char* less_emulator_errors_json(void) {
  Json json;
  json.open_list();
  for (const Error& each : errors.kept) {
    json.open();
    json.text("kind", each.kind);
    json.text("message", each.message);
    json.close();
  }
  json.close_list();
  answer = json.text();
  return answer.c_str();
}

const char* less_emulator_profile_json(void) {
  answer = profile_json();
  return answer.c_str();
}

void* less_emulator_alloc(size_t bytes, const char* name, int initialised) {
  return allocate(bytes, name, initialised != 0);
}

void less_emulator_free(void* p) { release_memory(p); }

void less_emulator_register(const void* p, size_t bytes, const char* name, int initialised) {
  register_memory(p, bytes, name, initialised != 0);
}

void less_emulator_unregister(const void* p) { unregister_memory(p); }

int64_t less_emulator_written(const void* p, size_t bytes) { return written_bytes(p, bytes); }
