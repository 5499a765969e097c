// Warp-wide operations: every lane of a mask brings something, and sees what the others brought.
#include <algorithm>
#include <cstring>
#include <memory>

#include "emulator/errors.h"
#include "emulator/state.h"

namespace less::emulator {
namespace {

constexpr char kSyncWarp[] = "__syncwarp";

std::vector<std::unique_ptr<Exchange>> all_exchanges;
std::vector<Exchange*> free_exchanges;

Exchange* new_exchange(Warp& warp, uint32_t mask, const char* kind, bool orders, Where at) {
  if (free_exchanges.empty()) {
    all_exchanges.push_back(std::make_unique<Exchange>());
    free_exchanges.push_back(all_exchanges.back().get());
  }
  Exchange* const exchange = free_exchanges.back();
  free_exchanges.pop_back();
  exchange->mask = mask;
  exchange->arrived = exchange->live = 0;
  exchange->kind = kind;
  exchange->at = at;
  exchange->done = false;
  exchange->orders = orders;
  warp.exchanges.push_back(exchange);
  return exchange;
}

// The operation of this mask that others have begun, if this one is the same.
Exchange* find_exchange(Warp& warp, uint32_t mask, uint32_t bit, const char* kind, Where at) {
  for (Exchange* exchange : warp.exchanges) {
    if (exchange->done || exchange->mask != mask || (exchange->arrived & bit)) continue;
    const Where other = exchange->at;
    if (std::strcmp(exchange->kind, kind)) {
      fatal("divergent-collective", "%s at %s:%d meets %s at %s:%d (mask 0x%08x)", kind,
            short_name(at.file), at.line, exchange->kind, short_name(other.file), other.line, mask);
    }
    const bool same = other.line == at.line && !std::strcmp(other.file, at.file);
    if (!same && std::strcmp(kind, kSyncWarp)) {
      error("divergent-collective", "lanes of mask 0x%08x reach %s at %s:%d and at %s:%d", mask,
            kind, short_name(at.file), at.line, short_name(other.file), other.line);
      exchange->at = at;
    }
    return exchange;
  }
  return nullptr;
}

void order_lanes(Warp& warp, uint32_t lanes) {
  Gathered gathered;
  for (int i = 0; i < 32; ++i) {
    if (lanes >> i & 1) gathered.add(*warp.lanes[i]);
  }
  const View view = gathered.view();
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    warp.lanes[i]->view = view;
    ++warp.lanes[i]->clock;
  }
}

}  // namespace

void try_complete(Warp& warp, Exchange* exchange) {
  const uint32_t wanted = exchange->mask & ~warp.exited;
  if ((exchange->arrived & wanted) != wanted) return;
  exchange->done = true;
  exchange->live = exchange->arrived;
  exchange->left = __builtin_popcount(exchange->arrived);
  ++statistics.warp_operations;
  note_progress();
  if (tracking && exchange->orders) order_lanes(warp, exchange->arrived);
  if (timed) align_clocks(warp.lanes, exchange->arrived);
  if (tracking && (exchange->arrived | warp.exited) == ~0u) flush(warp);
  for (int i = 0; i < 32; ++i) {
    if ((exchange->arrived >> i & 1) && warp.lanes[i]->status == Status::waiting) {
      make_ready(warp.lanes[i]);
    }
  }
}

const unsigned char* warp_exchange(uint32_t mask, const char* kind, const void* in, unsigned n,
                                   uint32_t* live, bool orders, Where at) {
  Thread& me = *self();
  Warp& warp = *me.warp;
  const uint32_t bit = 1u << me.lane;
  if (!(mask & bit)) {
    fatal("mask", "%s at %s:%d: the calling lane is not in its own mask 0x%08x", kind,
          short_name(at.file), at.line, mask);
  }
  Exchange* exchange = find_exchange(warp, mask, bit, kind, at);
  if (exchange == nullptr) exchange = new_exchange(warp, mask, kind, orders, at);
  if (n > 0) std::memcpy(exchange->data[me.lane], in, n);
  exchange->arrived |= bit;
  try_complete(warp, exchange);
  if (!exchange->done) wait_here({kind, at, " (mask 0x%08x)", {mask}});
  *live = exchange->live;
  return exchange->data[0];
}

void warp_release(const unsigned char* table) {
  // The table is the exchange's first member.
  auto* const exchange = reinterpret_cast<Exchange*>(const_cast<unsigned char*>(table));
  if (--exchange->left > 0) return;
  std::vector<Exchange*>& mine = self()->warp->exchanges;
  mine.erase(std::find(mine.begin(), mine.end(), exchange));
  free_exchanges.push_back(exchange);
}

void drop_exchanges(Warp& warp) {
  free_exchanges.insert(free_exchanges.end(), warp.exchanges.begin(), warp.exchanges.end());
  warp.exchanges.clear();
}

}  // namespace less::emulator
