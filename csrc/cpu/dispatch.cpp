// See dispatch.h. Compiled once, for the baseline instruction set.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <optional>
#include <stdexcept>

namespace less::cpu {
namespace {

struct Known {
  Level level;
  const char* name;
  bool compiled;
  bool (*machine_has)();
};

bool always() { return true; }

#ifdef LESS_HAVE_avx2
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

#ifdef LESS_HAVE_avx512
bool has_avx512() {
#ifdef LESS_EMULATED
  return has_avx2();
#else
  // The builtins ask the operating system too, whether it keeps the wide registers.
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
}
#endif

constexpr Known kLevels[] = {
    {Level::portable, "portable", true, always},
#ifdef LESS_HAVE_avx2
    {Level::avx2, "avx2", true, has_avx2},
#else
    {Level::avx2, "avx2", false, nullptr},
#endif
#ifdef LESS_HAVE_avx512
    {Level::avx512, "avx512", true, has_avx512},
#else
    {Level::avx512, "avx512", false, nullptr},
#endif
#ifdef LESS_HAVE_neon  // every aarch64 has it
    {Level::neon, "neon", true, always},
#else
    {Level::neon, "neon", false, nullptr},
#endif
};

bool usable(const Known& known) { return known.compiled && known.machine_has(); }

Level parse(const std::string& text, const std::string& who) {
  std::string names;
  for (const Known& known : kLevels) {
    if (text == known.name) {
      if (!known.compiled) throw std::runtime_error(who + ": " + text + " was not compiled in");
      if (!usable(known)) throw std::runtime_error(who + ": this machine cannot run " + text);
      return known.level;
    }
    names += (names.empty() ? "" : ", ") + std::string(known.name);
  }
  throw std::runtime_error(who + " must be one of " + names + ", got '" + text + "'");
}

Level choose() {
  const char* wanted = std::getenv("LESS_SIMD");
  if (wanted != nullptr && *wanted != '\0') return parse(wanted, "LESS_SIMD");
  Level best = Level::portable;
  for (const Known& known : kLevels) {
    if (usable(known)) best = known.level;
  }
  return best;
}

std::optional<Level>& current() {
  static std::optional<Level> level;
  return level;
}

}  // namespace

Level level() {
  // less._C's initialisation is the first to call, before any kernel thread can.
  std::optional<Level>& level = current();
  if (!level) level = choose();
  return *level;
}

const char* name(Level level) {
  for (const Known& known : kLevels) {
    if (known.level == level) return known.name;
  }
  return "unknown";
}

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (const Known& known : kLevels) {
    if (usable(known)) names.emplace_back(known.name);
  }
  return names;
}

void set_level(const std::string& text) { current() = parse(text, "set_simd"); }

}  // namespace less::cpu
