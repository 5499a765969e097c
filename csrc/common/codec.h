// Packed rows: codes of 4, 3 or 2 bits and an fp16 scale, x = scale level[code]. This is the only
// file that knows levels and packing; less/reference/codec.py says the same in Python, and every
// kernel gets its bits: each step is one float rounding, in the order that is given here.
//
//   rms = sqrt(sum x^2 / D);  code = number of thresholds t with x > t rms;
//   scale = sum x level / sum level^2, rounded to fp16, at most 65504
//
// Sums: of 16 lanes, lane j adds up the numbers j, j + 16, ...; then lanes j and j + 8 are added, j
// and j + 4, j and j + 2, and the last two.
// Packing, little bits first: of 4 bits byte i holds the codes of dims i and i + D/2; of 2 bits
// those of i, i + D/4, i + D/2, i + 3D/4. Of 3 bits, the lower two lie as a row of 2 bits, and then
// the third: byte i holds those of i, i + D/8, ..., i + 7D/8.
#pragma once

#include <cmath>
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

constexpr Levels make_levels(const int8_t* positive, int half, double rms) {
  Levels levels{};
  levels.count = 2 * half;
  for (int i = 0; i < 16; ++i) {
    const int code = i % levels.count;
    levels.n[i] = code < half ? int8_t(-positive[half - 1 - code]) : positive[code - half];
    levels.value[i] = float(levels.n[i]) / 64.0f;
  }
  for (int i = 0; i + 1 < levels.count; ++i) {
    levels.threshold[i] = float((levels.n[i] + levels.n[i + 1]) / (2 * rms));
  }
  return levels;
}

// Lloyd and Max's for the Gaussian; the second number is what of a level is one rms.
constexpr int8_t kPositive4[] = {6, 18, 31, 44, 58, 75, 96, 127};
constexpr int8_t kPositive3[] = {14, 45, 79, 127};
constexpr int8_t kPositive2[] = {38, 127};
constexpr Levels kLevels4 = make_levels(kPositive4, 8, 46.5);
constexpr Levels kLevels3 = make_levels(kPositive3, 4, 59.0);
constexpr Levels kLevels2 = make_levels(kPositive2, 2, 84.0);

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
