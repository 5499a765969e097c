#include "emulator/timeline.h"

#include <algorithm>

#include "emulator/json.h"
#include "emulator/sites.h"
#include "emulator/state.h"

namespace less::emulator {

bool timed = false;
double latency[kCauses] = {};

namespace {

constexpr const char* kNames[kCauses] = {"issue",  "arithmetic", "special", "division",
                                         "shared", "shuffle",    "tensor",  "dram",
                                         "l2",     "remote",     "barrier", "cluster_barrier"};

// Of the launch under way: the clock of the last thread to end, what all threads issued.
Timeline last;
uint64_t issued, blocks;

void write_causes(Json& json, const double* spent, const double* before) {
  json.open("cycles_by_cause");
  for (int i = 0; i < kCauses; ++i) {
    json.number(kNames[i], uint64_t(spent[i] - (before == nullptr ? 0 : before[i]) + 0.5));
  }
  json.close();
}

}  // namespace

void Timeline::wait(double until, Cause cause) {
  if (until <= now) return;
  spent[int(cause)] += until - now;
  ++waits[int(cause)];
  now = until;
}

bool set_latency(const std::string& option, double cycles) {
  for (int i = 0; i < kCauses; ++i) {
    if (option == std::string("latency_") + kNames[i]) return latency[i] = cycles, true;
  }
  return false;
}

void end_phase(Timeline& line, uint32_t site) {
  auto phase = std::make_shared<Phase>();
  phase->before = line.phases;
  phase->site = site;
  phase->now = line.now;
  std::copy_n(line.spent, kCauses, phase->spent);
  line.phases = phase;
}

void meet_clocks(const std::vector<Thread*>& threads, Cause cause, uint32_t site) {
  const auto later = [](const Thread* a, const Thread* b) { return a->line.now < b->line.now; };
  Timeline line = (*std::max_element(threads.begin(), threads.end(), later))->line;
  line.wait(line.now + latency[int(cause)], cause);
  end_phase(line, site);
  for (Thread* thread : threads) thread->line = line;
}

void align_clocks(Thread* const* lanes, uint32_t mask) {
  const Timeline* latest = nullptr;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (latest == nullptr || latest->now < lanes[i]->line.now) latest = &lanes[i]->line;
  }
  const Timeline line = *latest;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) lanes[i]->line = line;
  }
}

void note_end(const Thread& thread) {
  if (thread.line.now >= last.now) last = thread.line;
  if (thread.index % 32 == 0) issued += thread.issued;
  blocks += thread.index == 0;
}

void reset_timeline() {
  last = Timeline();
  issued = blocks = 0;
}

void write_timeline(Json& json) {
  if (!timed) return;
  json.open("timeline");
  json.open("launch");
  json.text("kernel", symbol_at(launch_state.kernel));
  json.number("blocks", uint64_t{grid_dim.x} * grid_dim.y * grid_dim.z);
  json.number("cluster", cluster_size);
  json.number("threads", uint64_t(launch_state.block_threads));
  json.number("shared", launch_state.dynamic_bytes);
  json.close();
  json.number("cycles", uint64_t(last.now + 0.5));
  json.number("trips", last.trips);
  json.number("warp_instructions", issued);
  json.number("blocks", blocks);
  write_causes(json, last.spent, nullptr);
  json.open("waits");
  for (int i = 0; i < kCauses; ++i) json.number(kNames[i], last.waits[i]);
  json.close();
  std::vector<const Phase*> phases;
  for (const Phase* p = last.phases.get(); p != nullptr; p = p->before.get()) phases.push_back(p);
  std::reverse(phases.begin(), phases.end());
  json.open_list("phases");
  const double* before = nullptr;
  for (const Phase* phase : phases) {
    json.open();
    json.text("until", where(phase->site));
    json.number("at", uint64_t(phase->now + 0.5));
    write_causes(json, phase->spent, before);
    json.close();
    before = phase->spent;
  }
  json.close_list();
  json.close();
}

void wait_for(Timeline& line, const Ready& value) {
  if (value.at <= line.now) return;
  line.trips += value.trips;
  const double own = double(value.at) - line.now - value.memory;
  if (own > 0) line.wait(line.now + own, value.cause());
  line.wait(value.at, value.memory > 0 ? value.from() : value.cause());
}

void issue(Ready* registers, const uint16_t* instruction) {
  Thread& me = *self();
  Timeline& line = me.line;
  const bool ends = (instruction[0] & kEnds) != 0;
  const Cause cause = Cause(instruction[0] & ~kEnds);
  if (cause != Cause::count) {
    ++me.issued;
    line.now += latency[int(Cause::issue)];
    line.spent[int(Cause::issue)] += latency[int(Cause::issue)];
  }
  me.start = Ready{float(line.now)};
  const uint16_t* operand = instruction + 1;
  for (; *operand != kNoRegister; ++operand) {
    if (registers[*operand].at > me.start.at) me.start = registers[*operand];
  }
  if (cause != Cause::count && me.start.at > me.delayed.at) me.delayed = me.start;
  Ready result = me.start;
  if (cause != Cause::count) {
    result.at += float(latency[int(cause)]);
    result.causes = uint8_t(int(result.from()) * 16 + int(cause));
  }
  for (++operand; *operand != kNoRegister; ++operand) registers[*operand] = result;
  if (ends) wait_for(line, me.delayed);
}

void arrive(Ready* registers, const uint16_t* instruction) {
  Thread& me = *self();
  const uint16_t* operand = instruction + 1;
  while (*operand != kNoRegister) ++operand;
  Ready result = trip(me);
  for (++operand; *operand != kNoRegister; ++operand) registers[*operand] = result;
}

Ready trip(const Thread& thread) {
  Ready result = thread.start;
  const double cycles = latency[int(thread.from)];
  result.at += float(cycles);
  if (thread.from == Cause::shared) {
    result.causes = uint8_t(int(result.from()) * 16 + int(Cause::shared));
    return result;
  }
  result.memory = uint16_t(result.memory + cycles);
  ++result.trips;
  result.causes = uint8_t(int(thread.from) * 17);
  return result;
}

}  // namespace less::emulator
