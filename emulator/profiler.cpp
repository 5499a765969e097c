#include "emulator/profiler.h"

#include <algorithm>
#include <map>

#include "emulator/json.h"
#include "emulator/sites.h"
#include "emulator/state.h"

namespace less::emulator {

Statistics statistics;

namespace {

std::vector<Instruction> instructions;  // by place

uint64_t count_distinct(std::vector<uint64_t>& numbers) {
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return numbers.size();
}

void add(Traffic& to, uint64_t bytes, uint64_t sectors) {
  to.bytes += bytes;
  to.sectors += sectors;
  to.ideal_sectors += (bytes + 31) / 32;
}

void count_global(Instruction& instruction, const Request& request) {
  static std::vector<uint64_t> sectors, words;
  sectors.clear();
  words.clear();
  const uint64_t grain = std::min(request.bytes, 4u);
  for (int lane = 0; lane < 32; ++lane) {
    if (!(request.mask >> lane & 1)) continue;
    const uint64_t first = request.address[lane], last = first + request.bytes - 1;
    for (uint64_t sector = first / 32; sector <= last / 32; ++sector) sectors.push_back(sector);
    for (uint64_t word = first / grain; word <= last / grain; ++word) words.push_back(word);
  }
  const uint64_t bytes = count_distinct(words) * grain, touched = count_distinct(sectors);
  add(instruction.traffic, bytes, touched);
  add(request.writes ? statistics.store : statistics.load, bytes, touched);
}

// 32 banks of 4 bytes. Accesses of 8 bytes are served by half warps, of 16 by quarters; each part
// takes as many wavefronts as its fullest bank has distinct words.
void count_shared(Instruction& instruction, const Request& request) {
  static std::vector<uint64_t> words;
  const int lanes = request.bytes <= 4 ? 32 : request.bytes <= 8 ? 16 : 8;
  for (int first = 0; first < 32; first += lanes) {
    words.clear();
    for (int lane = first; lane < first + lanes; ++lane) {
      if (!(request.mask >> lane & 1)) continue;
      const uint64_t low = request.address[lane], high = low + request.bytes - 1;
      for (uint64_t word = low / 4; word <= high / 4; ++word) words.push_back(word);
    }
    if (words.empty()) continue;
    count_distinct(words);
    int per_bank[32] = {}, most = 0;
    for (const uint64_t word : words) most = std::max(most, ++per_bank[word % 32]);
    instruction.wavefronts += uint64_t(most);
    statistics.wavefronts += uint64_t(most);
    ++instruction.ideal_wavefronts;
    ++statistics.ideal_wavefronts;
  }
  ++statistics.shared_requests;
}

void count(uint32_t place, const Request& request) {
  if (instructions.size() <= place) instructions.resize(place + 64);
  Instruction& instruction = instructions[place];
  instruction.bytes = request.bytes;
  instruction.writes = request.writes;
  ++instruction.requests;
  instruction.lanes += uint64_t(__builtin_popcount(request.mask));
  if (place % 2 == 0) {
    count_global(instruction, request);
  } else {
    count_shared(instruction, request);
  }
}

// A copy of many bytes by one thread: whole sectors, past the banks.
void count_bulk(uint32_t place, unsigned bytes, bool writes) {
  if (instructions.size() <= place) instructions.resize(place + 64);
  Instruction& instruction = instructions[place];
  instruction.bytes = bytes;
  instruction.writes = writes;
  ++instruction.requests;
  ++instruction.lanes;
  if (place % 2 != 0) return;
  add(instruction.traffic, bytes, (bytes + 31) / 32);
  add(writes ? statistics.store : statistics.load, bytes, (bytes + 31) / 32);
}

}  // namespace

void record(Thread& thread, uint32_t site, bool shared, uintptr_t address, unsigned bytes,
            bool writes) {
  const uint32_t place = 2 * site + shared;
  if (bytes > 16) return count_bulk(place, bytes, writes);
  if (thread.occurrences.size() <= place) thread.occurrences.resize(place + 64, 0);
  const size_t time = thread.occurrences[place]++;
  WarpRequests& requests = thread.warp->requests;
  if (requests.by_place.size() <= place) requests.by_place.resize(place + 64);
  std::vector<Request>& here = requests.by_place[place];
  if (here.empty()) requests.used.push_back(place);
  if (here.size() <= time) here.resize(time + 1);
  Request& request = here[time];
  request.mask |= 1u << thread.lane;
  request.bytes = bytes;
  request.writes = writes;
  request.address[thread.lane] = address;
}

void flush(Warp& warp) {
  WarpRequests& requests = warp.requests;
  if (requests.used.empty()) return;
  for (const uint32_t place : requests.used) {
    for (const Request& request : requests.by_place[place]) {
      if (request.mask != 0) count(place, request);
    }
    requests.by_place[place].clear();
  }
  requests.used.clear();
  for (Thread* thread : warp.lanes) {
    if (thread != nullptr) std::fill(thread->occurrences.begin(), thread->occurrences.end(), 0);
  }
}

void reset_profile() {
  statistics = Statistics();
  instructions.clear();
}

namespace {

void write_traffic(Json& json, const char* name, const Traffic& traffic, uint64_t touched) {
  json.open(name);
  json.number("bytes", traffic.bytes);
  json.number("sectors", traffic.sectors);
  json.number("ideal_sectors", traffic.ideal_sectors);
  json.number("distinct_sectors", touched);
  json.close();
}

void write_instruction(Json& json, const std::string& name, uint32_t place, const Instruction& i) {
  json.open();
  json.text("where", name);
  json.text("memory", place % 2 ? "shared" : "global");
  json.text("does", i.writes ? "store" : "load");
  json.number("bytes_per_lane", i.bytes);
  json.number("requests", i.requests);
  json.number("lanes", i.lanes);
  if (place % 2 == 0) {
    json.number("bytes", i.traffic.bytes);
    json.number("sectors", i.traffic.sectors);
    json.number("ideal_sectors", i.traffic.ideal_sectors);
  } else {
    json.number("wavefronts", i.wavefronts);
    json.number("ideal_wavefronts", i.ideal_wavefronts);
  }
  json.close();
}

}  // namespace

std::string profile_json() {
  const Statistics& s = statistics;
  Json json;
  json.open();
  json.number("blocks", s.blocks);
  json.number("threads", s.threads);
  json.number("barriers", s.barriers);
  json.number("cluster_barriers", s.cluster_barriers);
  json.number("warp_operations", s.warp_operations);
  json.number("async_copies", s.async_copies);
  json.number("async_bytes", s.async_bytes);
  json.number("accesses", s.accesses);
  write_traffic(json, "load", s.load, s.touched_load_sectors);
  write_traffic(json, "store", s.store, s.touched_store_sectors);
  json.open("shared");
  json.number("requests", s.shared_requests);
  json.number("wavefronts", s.wavefronts);
  json.number("ideal_wavefronts", s.ideal_wavefronts);
  json.close();
  std::multimap<std::string, uint32_t> by_name;
  resolve_sites();
  write_timeline(json);
  for (uint32_t place = 0; place < instructions.size(); ++place) {
    if (instructions[place].requests > 0) by_name.emplace(where(place / 2), place);
  }
  json.open_list("instructions");
  for (const auto& [name, place] : by_name) {
    write_instruction(json, name, place, instructions[place]);
  }
  json.close_list();
  json.close();
  return json.text();
}

}  // namespace less::emulator
