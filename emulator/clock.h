// Who has seen what of whom: the happens-before order that races are judged by.
//
// Every thread of a cluster has a slot, and so have the bulk copies of each block; a slot's clock
// counts its releases. A View holds, per slot, the clock up to which its owner has seen that slot's
// work: of its own cluster through barriers, of other clusters through fences and atomics. Clusters
// have serial numbers that never repeat, so that work of an earlier launch is told by its serial.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace less::emulator {

struct Thread;

using Clocks = std::vector<uint32_t>;
using Snapshot = std::shared_ptr<const Clocks>;  // null: nothing seen

// Work of several clusters, ordered by serial.
using ByCluster = std::vector<std::pair<uint32_t, Snapshot>>;
// How often an atomic's location had been changed when it was last looked at, by address.
using Chains = std::vector<std::pair<uintptr_t, uint32_t>>;

struct View {
  Snapshot own;
  std::shared_ptr<const ByCluster> others;
  std::shared_ptr<const Chains> chains;
  bool waited = false;  // for the kernel before this one
};

// What a fence has made ready to be published by the atomics that follow it.
struct Published {
  ByCluster clusters;
  Chains chains;
  bool waited = false;
};

// What those who arrive have seen, for those who leave.
class Gathered {
 public:
  // The thread's view, and its own work up to now.
  void add(const Thread& thread);
  void add(const View& view);
  void add(uint32_t slot, uint32_t clock);
  void clear();
  bool empty() const { return own_.empty() && others_.empty() && chains_.empty() && !waited_; }
  View view() const;
  // Up to which clock this slot has been seen.
  uint32_t seen(uint32_t slot) const { return slot < own_.size() ? own_[slot] : 0; }

 private:
  Clocks own_;
  ByCluster others_;
  Chains chains_;
  bool waited_ = false;
  Snapshot last_;  // the snapshot that was joined last: warps share theirs
};

// Joins what the others have seen into a thread's own view.
void acquire(Thread& thread, const View& seen);
void acquire(Thread& thread, const Published& seen);
// What the thread has done and seen up to now; its later work has a new clock.
Published release(Thread& thread);
void join(Published& into, const Published& from);
// The thread changes the location for the version'th time, or sees that it was changed so often.
void note_chain(Thread& thread, uintptr_t location, uint32_t version);
uint32_t chain_version(const Thread& thread, uintptr_t location);

}  // namespace less::emulator
