// Fragments of the tensor cores, laid out as the PTX ISA says.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulator/state.h"

namespace less::emulator {
namespace {

float widen(uint16_t bits, bool bf16) {
  if (bf16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return float(x);
}

// x cut off, not rounded, at multiples of 2^unit.
double cut_off(double x, int unit) { return std::ldexp(std::trunc(std::ldexp(x, -unit)), unit); }

// c plus products, as it has been measured on devices (Fasi et al., "Numerical behavior of NVIDIA
// tensor cores", 2021; Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores", 2025): what
// is added is first cut off `extra` bits below the last place that the largest would have as a
// float, and so is the sum, to a float.
float add_cut_off(float c, const float* a, const float* b, int n, int extra) {
  double terms[17] = {c};
  int largest = c == 0.0f ? -149 : std::ilogb(c);
  for (int k = 0; k < n; ++k) {
    terms[k + 1] = double(a[k]) * b[k];
    // A product's exponent is the sum of its factors', whether or not it has a carry.
    if (terms[k + 1] != 0.0) largest = std::max(largest, std::ilogb(a[k]) + std::ilogb(b[k]));
  }
  double sum = 0.0;
  for (int k = 0; k <= n; ++k) sum += cut_off(terms[k], largest - 23 - extra);
  if (sum == 0.0) return float(sum);
  return float(cut_off(sum, std::max(std::ilogb(sum), -126) - 23));
}

float add_products(float c, const float (&a)[16], const float (&b)[16]) {
  double exact = c;
  for (int k = 0; k < 16; ++k) exact += double(a[k]) * b[k];
  if (options.tensor == Tensor::exact || !std::isfinite(exact)) return float(exact);
  if (launch_state.architecture >= 90) return add_cut_off(c, a, b, 16, 2);
  return add_cut_off(add_cut_off(c, a, b, 8, 1), a + 8, b + 8, 8, 1);
}

// Half `e` of a fragment's register, of a lane's entry in the table of an exchange.
uint16_t half_of(const unsigned char* table, int lane, int reg, int e) {
  uint16_t bits;
  std::memcpy(&bits, table + lane * int(kExchangeStride) + reg * 4 + e * 2, sizeof bits);
  return bits;
}

}  // namespace

void ldmatrix(uint32_t* d, int num, const void* row, bool transposed, Where at) {
  const int lane = current->lane;
  uint16_t mine[8] = {};
  if (lane < 8 * num) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
      fatal("misaligned", "%s:%d: ldmatrix of a row at %p", short_name(at.file), at.line, row);
    }
    access_at(row, 16, Access::read, at);
    std::memcpy(mine, row, 16);
  }
  uint32_t live;
  const unsigned char* const table =
      warp_exchange(~0u, "ldmatrix", mine, sizeof mine, &live, false, at);
  for (int matrix = 0; matrix < num; ++matrix) {
    uint32_t pair = 0;
    for (int e = 0; e < 2; ++e) {
      const int i = lane / 4, j = lane % 4 * 2 + e;
      const int from = transposed ? j : i, element = transposed ? i : j;
      const uint32_t bits = half_of(table, 8 * matrix + from, element / 2, element % 2);
      pair |= bits << (16 * e);
    }
    d[matrix] = pair;
  }
  warp_release(table);
}

// Sums are what Options::tensor says.
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool bf16,
                  Where at) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  uint32_t live;
  const unsigned char* const table =
      warp_exchange(~0u, "mma.m16n8k16", mine, sizeof mine, &live, false, at);
  const int lane = current->lane;
  float column[2][16];  // of b
  for (int j = 0; j < 2; ++j) {
    const int n = lane % 4 * 2 + j;
    for (int k = 0; k < 16; ++k) {
      column[j][k] = widen(half_of(table, n * 4 + k % 8 / 2, 4 + k / 8, k % 2), bf16);
    }
  }
  for (int i = 0; i < 2; ++i) {  // rows lane / 4 and 8 more
    float row[16];
    for (int k = 0; k < 16; ++k) {
      row[k] = widen(half_of(table, lane / 4 * 4 + k % 8 / 2, i + 2 * (k / 8), k % 2), bf16);
    }
    for (int j = 0; j < 2; ++j) {
      d[2 * i + j] = add_products(c[2 * i + j], row, column[j]);
    }
  }
  warp_release(table);
}

// Sums wrap around.
void mma_m16n8k32(int32_t* d, const uint32_t* a, const uint32_t* b, const int32_t* c, Where at) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  uint32_t live;
  const unsigned char* const table =
      warp_exchange(~0u, "mma.m16n8k32", mine, sizeof mine, &live, false, at);
  const int lane = current->lane;
  // Byte k % 4 of a register of the lane that has k of this row or column.
  const auto byte = [table](int of, int reg, int k) {
    return int8_t(table[(of * 4 + k % 16 / 4) * int(kExchangeStride) + reg * 4 + k % 4]);
  };
  for (int i = 0; i < 2; ++i) {  // rows lane / 4 and 8 more
    for (int j = 0; j < 2; ++j) {
      uint32_t sum = uint32_t(c[2 * i + j]);
      for (int k = 0; k < 32; ++k) {
        const int of_a = byte(lane / 4, i + 2 * (k / 16), k);
        sum += uint32_t(of_a * byte(lane % 4 * 2 + j, 4 + k / 16, k));
      }
      d[2 * i + j] = int32_t(sum);
    }
  }
  warp_release(table);
}

}  // namespace less::emulator
