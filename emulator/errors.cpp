#include "emulator/errors.h"

#include <cstdarg>
#include <cstdio>
#include <set>
#include <tuple>

#include "emulator/state.h"

namespace less::emulator {

Errors errors;

namespace {

std::set<std::tuple<std::string, uint32_t, uint32_t>> said;

void note(const char* kind, const char* format, va_list arguments) {
  ++errors.count;
  if (int(errors.kept.size()) >= options.max_errors) return;
  char text[1500];
  std::vsnprintf(text, sizeof text, format, arguments);
  std::string message = text;
  if (current != nullptr) {
    const Thread& thread = *self();
    std::snprintf(text, sizeof text, "block (%u,%u,%u) thread %d: ", thread.block.x, thread.block.y,
                  thread.block.z, thread.index);
    message = text + message;
  }
  errors.kept.push_back({kind, std::move(message)});
}

}  // namespace

void error(const char* kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  note(kind, format, arguments);
  va_end(arguments);
}

void fatal(const char* kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  note(kind, format, arguments);
  va_end(arguments);
  abandon_launch();
}

bool first_time(const char* kind, uint32_t site, uint32_t other_site) {
  return said.emplace(kind, site, other_site).second;
}

void forget_times() { said.clear(); }

}  // namespace less::emulator
