#include "emulator/clock.h"

#include <algorithm>

#include "emulator/state.h"

namespace less::emulator {
namespace {

void join(Clocks& into, const Clocks& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

Snapshot joined(const Snapshot& a, const Snapshot& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  auto both = std::make_shared<Clocks>(*a);
  join(*both, *b);
  return both;
}

// Merges two ordered lists; what both have is combined.
template <typename Key, typename Value, typename Combine>
void merge(std::vector<std::pair<Key, Value>>& into, const std::vector<std::pair<Key, Value>>& from,
           Combine combine) {
  if (from.empty()) return;
  std::vector<std::pair<Key, Value>> both;
  both.reserve(into.size() + from.size());
  auto a = into.begin();
  auto b = from.begin();
  while (a != into.end() && b != from.end()) {
    if (a->first < b->first) {
      both.push_back(std::move(*a++));
    } else if (b->first < a->first) {
      both.push_back(*b++);
    } else {
      both.emplace_back(a->first, combine(a->second, b->second));
      ++a, ++b;
    }
  }
  both.insert(both.end(), a, into.end());
  both.insert(both.end(), b, from.end());
  into = std::move(both);
}

void merge(ByCluster& into, const ByCluster& from) { merge(into, from, joined); }

void merge(Chains& into, const Chains& from) {
  merge(into, from, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}

}  // namespace

void Gathered::add(const Thread& thread) {
  add(thread.view);
  add(thread.slot, thread.clock);
}

void Gathered::add(const View& view) {
  if (view.own && view.own != last_) {
    join(own_, *view.own);
    last_ = view.own;
  }
  if (view.others) merge(others_, *view.others);
  if (view.chains) merge(chains_, *view.chains);
  waited_ |= view.waited;
}

void Gathered::add(uint32_t slot, uint32_t clock) {
  if (own_.size() <= slot) own_.resize(slot + 1, 0);
  own_[slot] = std::max(own_[slot], clock);
}

void Gathered::clear() { *this = Gathered(); }

View Gathered::view() const {
  View view;
  if (!own_.empty()) view.own = std::make_shared<Clocks>(own_);
  if (!others_.empty()) view.others = std::make_shared<ByCluster>(others_);
  if (!chains_.empty()) view.chains = std::make_shared<Chains>(chains_);
  view.waited = waited_;
  return view;
}

void acquire(Thread& thread, const View& seen) {
  View& view = thread.view;
  view.own = joined(view.own, seen.own);
  if (seen.others && seen.others != view.others) {
    auto both =
        view.others ? std::make_shared<ByCluster>(*view.others) : std::make_shared<ByCluster>();
    merge(*both, *seen.others);
    view.others = both;
  }
  if (seen.chains && seen.chains != view.chains) {
    auto both = view.chains ? std::make_shared<Chains>(*view.chains) : std::make_shared<Chains>();
    merge(*both, *seen.chains);
    view.chains = both;
  }
  view.waited |= seen.waited;
}

void acquire(Thread& thread, const Published& seen) {
  View view;
  ByCluster others;
  for (const auto& entry : seen.clusters) {
    if (entry.first == thread.home->cluster->serial) {
      view.own = entry.second;
    } else {
      others.push_back(entry);
    }
  }
  if (!others.empty()) view.others = std::make_shared<ByCluster>(std::move(others));
  if (!seen.chains.empty()) view.chains = std::make_shared<Chains>(seen.chains);
  view.waited = seen.waited;
  acquire(thread, view);
}

Published release(Thread& thread) {
  Published published;
  if (thread.view.others) published.clusters = *thread.view.others;
  auto own =
      thread.view.own ? std::make_shared<Clocks>(*thread.view.own) : std::make_shared<Clocks>();
  if (own->size() <= thread.slot) own->resize(thread.slot + 1, 0);
  (*own)[thread.slot] = thread.clock++;
  merge(published.clusters, {{thread.home->cluster->serial, own}});
  if (thread.view.chains) published.chains = *thread.view.chains;
  published.waited = thread.view.waited;
  return published;
}

void join(Published& into, const Published& from) {
  merge(into.clusters, from.clusters);
  merge(into.chains, from.chains);
  into.waited |= from.waited;
}

void note_chain(Thread& thread, uintptr_t location, uint32_t version) {
  auto chains = thread.view.chains ? std::make_shared<Chains>(*thread.view.chains)
                                   : std::make_shared<Chains>();
  merge(*chains, {{location, version}});
  thread.view.chains = chains;
}

uint32_t chain_version(const Thread& thread, uintptr_t location) {
  if (!thread.view.chains) return 0;
  const Chains& chains = *thread.view.chains;
  const auto found = std::lower_bound(chains.begin(), chains.end(), std::pair(location, 0u));
  return found != chains.end() && found->first == location ? found->second : 0;
}

}  // namespace less::emulator
