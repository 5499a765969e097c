// See dispatch.h. Compiled once, for the baseline instruction set.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <optional>
#include <stdexcept>

namespace less::cpu {
namespace {

bool compiled(Level level) {
  switch (level) {
    case Level::portable:
      return true;
    case Level::avx2:
#ifdef LESS_HAVE_avx2
      return true;
#else
      return false;
#endif
  }
  return false;
}

bool machine_has(Level level) {
  if (level == Level::portable) return true;
#ifdef LESS_HAVE_avx2
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

constexpr Level kLevels[] = {Level::portable, Level::avx2};

Level parse(const std::string& text, const std::string& who) {
  std::string names;
  for (Level level : kLevels) {
    if (text == name(level)) {
      if (!compiled(level)) throw std::runtime_error(who + ": " + text + " was not compiled in");
      if (!machine_has(level)) {
        throw std::runtime_error(who + ": this machine cannot run " + text);
      }
      return level;
    }
    names += (names.empty() ? "" : ", ") + std::string(name(level));
  }
  throw std::runtime_error(who + " must be one of " + names + ", got '" + text + "'");
}

Level choose() {
  const char* wanted = std::getenv("LESS_SIMD");
  if (wanted != nullptr && *wanted != '\0') return parse(wanted, "LESS_SIMD");
  Level best = Level::portable;
  for (Level level : kLevels) {
    if (compiled(level) && machine_has(level)) best = level;
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
  switch (level) {
    case Level::portable:
      return "portable";
    case Level::avx2:
      return "avx2";
  }
  return "unknown";
}

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (Level level : kLevels) {
    if (compiled(level) && machine_has(level)) names.emplace_back(name(level));
  }
  return names;
}

void set_level(const std::string& text) { current() = parse(text, "set_simd"); }

}  // namespace less::cpu
