// What is known of every byte of memory: who wrote it and read it last, and what it is good for.
//
// A cell stands for four bytes as long as they are only touched together; the first narrower access
// splits it into a cell per byte.
#pragma once

#include <sys/mman.h>

#include <array>
#include <cstdint>
#include <vector>

namespace less::emulator {

// A moment of someone's work: the slot's clock then, and where in the source.
struct Epoch {
  uint32_t cluster;  // 0: nobody
  uint32_t slot;
  uint32_t clock;
  uint32_t site;
};

// All zero: nobody has touched it.
struct Cell {
  Epoch write;
  Epoch read;   // the last one
  Epoch other;  // the last one by someone else
  uint32_t split;
  bool initialised;
  bool written;       // by a kernel
  bool atomic_write;  // the last write was one
  bool plain_read;    // some read since then was not relaxed or atomic
  bool in_flight;     // a copy will write it
  bool guard;         // nobody may touch it
};

class Shadow {
 public:
  Shadow() = default;
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;
  ~Shadow();
  void resize(uintptr_t low, uintptr_t high);
  void clear();

  // f(cell, address of its first byte) over the cells of these bytes.
  template <typename F>
  void each(uintptr_t address, size_t bytes, F f) {
    const uintptr_t end = address + bytes;
    while (address < end) {
      Cell& whole = cells_[(address - low_) / 4];
      if (address % 4 == 0 && end - address >= 4 && whole.split == 0) {
        if (address + 4 > dirty_) dirty_ = address + 4;
        f(whole, address);
        address += 4;
        continue;
      }
      f(split(whole, address)[address % 4], address);
      ++address;
    }
  }

  // f(cell) once for each of these bytes; splits nothing.
  template <typename F>
  void each_byte(uintptr_t address, size_t bytes, F f) const {
    for (uintptr_t end = address + bytes; address < end; ++address) {
      const Cell& whole = cells_[(address - low_) / 4];
      f(whole.split == 0 ? whole : splits_[whole.split - 1][address % 4]);
    }
  }

 private:
  std::array<Cell, 4>& split(Cell& whole, uintptr_t address);

  Cell* cells_ = nullptr;
  size_t count_ = 0;
  uintptr_t low_ = 0;    // a multiple of 4
  uintptr_t dirty_ = 0;  // cells from there on are zero
  std::vector<std::array<Cell, 4>> splits_;
};

// -- accesses -------------------------------------------------------------------------------------

void begin_launch_accesses();
// Shared memory is given to another block: what atomics have published there is over.
void forget_locations(const void* p, size_t bytes);

}  // namespace less::emulator
