// Packed rows: codes of 4, 3 or 2 bits and an fp16 scale, x = scale level[code]. This is the only
// file that knows levels and packing; less/reference/codec.py says the same in Python, and every
// kernel gets its bits: each step is one float rounding, in the order that is given here.
//
//   code = number of thresholds t with x > t (clip max|x|);
//   scale = sum x level / sum level^2, rounded to fp16, at most 65504
//
// The n levels are uniform, (2 code + 1) 2/n - 2; thresholds lie halfway between levels that reach
// from -1 to 1.
// Sums: of 16 lanes, lane j adds up the numbers j, j + 16, ...; then lanes j and j + 8 are added, j
// and j + 4, j and j + 2, and the last two.
// Packing, little bits first: of 4 bits byte i holds the codes of dims i and i + D/2; of 2 bits
// those of i, i + D/4, i + D/2, i + 3D/4. Of 3 bits, the lower two lie as a row of 2 bits, and then
// the third: byte i holds those of i, i + D/8, ..., i + 7D/8.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace less {

constexpr int kCodecLanes = 16;
constexpr float kLargestHalf = 65504.0f;

// The levels of a format, all 16 places filled: a code's level is at every place whose lowest bits
// it is.
struct Levels {
  int8_t n[16];     // in units of 1/64 of a row's scale
  float value[16];  // n / 64
  float threshold[15];
  int count;
};

constexpr Levels make_levels(int count) {
  Levels levels{};
  levels.count = count;
  for (int i = 0; i < 16; ++i) {
    levels.n[i] = int8_t((2 * (i % count) + 1) * 128 / count - 128);
    levels.value[i] = float(levels.n[i]) / 64.0f;
  }
  for (int i = 0; i + 1 < count; ++i) {
    levels.threshold[i] = float(double(2 * i - count + 2) / (count - 1));
  }
  return levels;
}

constexpr Levels kLevels4 = make_levels(16);
constexpr Levels kLevels3 = make_levels(8);
constexpr Levels kLevels2 = make_levels(4);

// The part of a row's largest number that rows of D numbers are clipped to, that of the nearest
// length: of least squared error for Gaussian numbers.
LESS_HD constexpr float clip_of(DType dtype, int64_t D) {
  const bool four = dtype == DType::b4, three = dtype == DType::b3;
  if (D < 24) return four ? 0.98f : three ? 0.90f : 0.70f;
  if (D < 48) return four ? 0.96f : three ? 0.86f : 0.64f;
  if (D < 96) return four ? 0.92f : three ? 0.80f : 0.58f;
  if (D < 192) return four ? 0.88f : three ? 0.74f : 0.52f;
  return four ? 0.84f : three ? 0.68f : 0.48f;
}

LESS_HD constexpr const Levels& levels_of(DType dtype) {
  return dtype == DType::b4 ? kLevels4 : dtype == DType::b3 ? kLevels3 : kLevels2;
}

// The code of dim d of a packed row.
LESS_HD int code_at(DType dtype, const uint8_t* row, int64_t D, int64_t d) {
  if (dtype == DType::b4) {
    const int64_t half = D / 2;
    return d < half ? row[d] & 15 : row[d - half] >> 4;
  }
  const int64_t quarter = D / 4;
  const int low = row[d % quarter] >> (2 * (d / quarter)) & 3;
  if (dtype == DType::b2) return low;
  const int64_t eighth = D / 8;
  return low | (row[quarter + d % eighth] >> (d / eighth) & 1) << 2;
}

// Byte i of a packed row, of the codes of all its dims.
template <typename Code>
LESS_HD uint8_t packed_byte(DType dtype, int64_t D, int64_t i, Code code) {
  if (dtype == DType::b4) return uint8_t(code(i) | code(i + D / 2) << 4);
  const int64_t quarter = D / 4, eighth = D / 8;
  int byte = 0;
  if (i < quarter) {
    for (int j = 0; j < 4; ++j) byte |= (code(i + j * quarter) & 3) << (2 * j);
  } else {
    for (int j = 0; j < 8; ++j) byte |= (code(i - quarter + j * eighth) >> 2 & 1) << j;
  }
  return uint8_t(byte);
}

}  // namespace less
