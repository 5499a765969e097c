// The inner loops of a decode step: a few query heads against contiguous rows of keys or values.
//
// Rows are read once from memory for all heads, widened or decoded in registers, and never copied.
// Heads are taken up to three at a time (four where there are 32 registers).
#pragma once

#include <algorithm>

#include "common/layout.h"
#include "cpu/codec.h"
#include "cpu/row_format.h"
#include "cpu/softmax.h"

namespace less::cpu::LESS_ISA {

// The scales of rows, by which their numbers are multiplied.
struct NoScales {
  LESS_INLINE Vec times(Vec a, int64_t, int) const { return a; }
};
template <typename T>
struct ScalesOf {
  const T* scale;

  LESS_INLINE Vec times(Vec a, int64_t s, int n) const { return a * load_some(scale + s, n); }
};

// Calls f with the scales of rows.
template <typename F>
LESS_INLINE void with_scales(const Stored& rows, F f) {
  if (packed(rows.dtype)) return f(ScalesOf<fp16>{reinterpret_cast<const fp16*>(rows.half)});
  if (rows.scale != nullptr) return f(ScalesOf<float>{rows.scale});
  f(NoScales{});
}

// Heads that may share one pass over rows of so many fields: as many accumulators as fit.
template <int kFields>
constexpr int kMostHeads = kFields == 8       ? 1
                           : Vec::kSize == 16 ? 4
                           : kFields == 4     ? 2
                                              : 3;

// Heads that share one pass over the rows, of `left` that are still to do: even shares.
template <int kFields>
LESS_INLINE int heads_at_once(int64_t left) {
  const int64_t passes = (left + kMostHeads<kFields> - 1) / kMostHeads<kFields>;
  return int((left + passes - 1) / passes);
}

// f(std::integral_constant<int, heads>{}) for the number of heads that share a pass.
template <int kFields, typename F>
LESS_INLINE void with_heads(int heads, F f) {
  unrolled<kMostHeads<kFields>>([&](auto less_one) {
    constexpr int kHeads = decltype(less_one)::value + 1;
    if (heads == kHeads) f(std::integral_constant<int, kHeads>{});
  });
}

// Asks for cache lines kAhead bytes before they are read: those of one head after the other, each
// line once, in the order in which they lie. A core's own prefetchers start anew at each field, and
// idle while it computes exponentials.
class Stream {
 public:
  static constexpr int64_t kAhead = 6144;

  // Reading begins with `now` and goes on with `next`; data is null where nothing follows.
  LESS_INLINE void enter(Span now, Span next) {
    asked_ = now.data == next_.data ? asked_next_ : now.data;
    end_ = now.data + now.nbytes;
    next_ = next;
    asked_next_ = next.data;
    read(now.data);
  }

  // Reading has come to p, in what was entered last.
  LESS_INLINE void read(const void* p) {
    const unsigned char* const to = static_cast<const unsigned char*>(p) + kAhead;
    if (to <= end_) return ask(asked_, to);
    ask(asked_, end_);
    ask(asked_next_, next_.data + std::min<int64_t>(to - end_, next_.nbytes));
  }

 private:
  static constexpr int64_t kLine = 64;
  static_assert(kPageAlign % (2 * kLine) == 0);

  // From `line` on, which moves; two lines at a time.
  static LESS_INLINE void ask(const unsigned char*& line, const unsigned char* to) {
    const unsigned char* at = line;
    if (at >= to) return;
    do {
      __builtin_prefetch(at);
      __builtin_prefetch(at + kLine);
      at += 2 * kLine;
    } while (at < to);
    line = at;
  }

  const unsigned char* asked_ = nullptr;  // what comes next, of what was entered last
  const unsigned char* end_ = nullptr;
  const unsigned char* asked_next_ = nullptr;  // and of next_
  Span next_{};
};

// logit[h * stride + n] = q[h] . k[n] for kHeads heads and kRows rows, kRows 1 or a multiple of 4.
template <int kHeads, int kRows, typename Reader>
LESS_INLINE void dot_rows(const Reader& reader, const float* q, int64_t width, const uint8_t* k,
                          int64_t D, float* logit, int64_t stride) {
  constexpr int kFields = Reader::kFields;
  const int64_t part = D / kFields, bytes = reader.bytes();
  Vec a[kHeads][kRows];
  for (int h = 0; h < kHeads; ++h) {
    for (int n = 0; n < kRows; ++n) a[h][n] = Vec(0.0f);
  }
  const auto add = [&](int64_t d, int count) LESS_LAMBDA_INLINE {
    typename Reader::Raw raw[kRows];
    for (int n = 0; n < kRows; ++n) raw[n] = reader.load(k + n * bytes, d, count);
    unrolled<kFields>([&](auto j) LESS_LAMBDA_INLINE {
      Vec query[kHeads];
      for (int h = 0; h < kHeads; ++h) query[h] = load_some(q + h * width + j * part + d, count);
      for (int n = 0; n < kRows; ++n) {
        const Vec key = reader.template field<j>(raw[n]);
        for (int h = 0; h < kHeads; ++h) a[h][n] = fma(query[h], key, a[h][n]);
      }
    });
  };
  int64_t d = 0;
  for (; d + Vec::kSize <= part; d += Vec::kSize) add(d, Vec::kSize);
  if (d < part) add(d, int(part - d));
  for (int h = 0; h < kHeads; ++h) {
    if constexpr (kRows == 1) {
      logit[h * stride] = sum(a[h][0]);
    } else {
      for (int n = 0; n < kRows; n += 4) {
        const Vec four[4] = {a[h][n], a[h][n + 1], a[h][n + 2], a[h][n + 3]};
        sum(four, logit + h * stride + n);
      }
    }
  }
}

template <int kHeads, typename Reader>
LESS_INLINE void dot_all_rows(const Reader& reader, const float* q, int64_t width, const uint8_t* k,
                              int64_t N, int64_t D, float* logit, int64_t stride, Stream* stream) {
  // Enough accumulators to hide the latency of fma, no more than there are registers.
  constexpr int kRows = kHeads == 1 && Reader::kFields < 8 ? 8 : 4;
  const int64_t bytes = reader.bytes();
  int64_t n = 0;
  for (; n + kRows <= N; n += kRows) {
    if (stream != nullptr) stream->read(k + n * bytes);
    dot_rows<kHeads, kRows>(reader, q, width, k + n * bytes, D, logit + n, stride);
  }
  if constexpr (kRows == 8) {
    if (n + 4 <= N) {
      dot_rows<kHeads, 4>(reader, q, width, k + n * bytes, D, logit + n, stride);
      n += 4;
    }
  }
  for (; n < N; ++n) {
    dot_rows<kHeads, 1>(reader, q, width, k + n * bytes, D, logit + n, stride);
  }
}

// out[h * width + d] += sum_n p[h * stride + n] v[n][d] over kChunks vectors of every field from
// d on, with kTail of `tail` dims the last; n ascending.
template <int kHeads, int kChunks, bool kTail, typename Reader>
LESS_INLINE void add_rows(const Reader& reader, const float* p, int64_t stride, const uint8_t* v,
                          int64_t N, int64_t D, int64_t d, int tail, float* out, int64_t width) {
  constexpr int kFields = Reader::kFields;
  const int count = kTail ? tail : Vec::kSize;
  const int64_t part = D / kFields, bytes = reader.bytes();
  Vec a[kHeads][kChunks * kFields];
  const auto each = [&](auto f) LESS_LAMBDA_INLINE {
    for (int h = 0; h < kHeads; ++h) {
      for (int c = 0; c < kChunks; ++c) {
        for (int j = 0; j < kFields; ++j) {
          f(a[h][c * kFields + j], out + h * width + j * part + d + c * Vec::kSize,
            c + 1 < kChunks ? Vec::kSize : count);
        }
      }
    }
  };
  each([](Vec& x, float* at, int n) LESS_LAMBDA_INLINE { x = load_some(at, n); });
  for (int64_t n = 0; n < N; ++n) {
    Vec weight[kHeads];
    for (int h = 0; h < kHeads; ++h) weight[h] = Vec(p[h * stride + n]);
    unrolled<kChunks>([&](auto c) LESS_LAMBDA_INLINE {
      const auto raw =
          reader.load(v + n * bytes, d + c * Vec::kSize, c + 1 < kChunks ? Vec::kSize : count);
      unrolled<kFields>([&](auto j) LESS_LAMBDA_INLINE {
        const Vec value = reader.template field<j>(raw);
        for (int h = 0; h < kHeads; ++h) {
          a[h][c * kFields + j] = fma(weight[h], value, a[h][c * kFields + j]);
        }
      });
    });
  }
  each([](Vec& x, float* at, int n) LESS_LAMBDA_INLINE {
    if (n == Vec::kSize) return x.store(at);
    x.store(at, n);
  });
}

template <int kHeads, typename Reader>
LESS_INLINE void add_all_rows(const Reader& reader, const float* p, int64_t stride,
                              const uint8_t* v, int64_t N, int64_t D, float* out, int64_t width) {
  constexpr int kVecs = kHeads == 1 ? 8 : 4, kFields = Reader::kFields;
  constexpr int kChunks = kVecs > kFields ? kVecs / kFields : 1;
  const int64_t part = D / kFields;
  int64_t d = 0;
  const auto chunks = [&](auto count) LESS_LAMBDA_INLINE {
    constexpr int kCount = decltype(count)::value;
    for (; d + kCount * Vec::kSize <= part; d += kCount * Vec::kSize) {
      add_rows<kHeads, kCount, false>(reader, p, stride, v, N, D, d, Vec::kSize, out, width);
    }
  };
  chunks(std::integral_constant<int, kChunks>{});
  if constexpr (kChunks > 4) chunks(std::integral_constant<int, 4>{});
  if constexpr (kChunks > 1) chunks(std::integral_constant<int, 1>{});
  if (d < part) {
    add_rows<kHeads, 1, true>(reader, p, stride, v, N, D, d, int(part - d), out, width);
  }
}

// logit[h * stride + n] = q[h] . k[n], h < heads, n < N, without the rows' scales. q [heads, width]
// is padded with zeros; k is [N, D] of a dtype, of what the stream has entered; null: none.
inline void dots_of_rows(DType dtype, const float* q, int64_t heads, int64_t width, const void* k,
                         int64_t N, int64_t D, float* logit, int64_t stride, Stream* stream) {
  with_reader(dtype, D, [=](const auto& reader) LESS_LAMBDA_INLINE {
    constexpr int kFields = std::remove_reference_t<decltype(reader)>::kFields;
    const auto* const rows = static_cast<const uint8_t*>(k);
    const int64_t bytes = reader.bytes();
    // Where the heads take several passes, so many rows stay in the first-level cache over them.
    const int64_t tile = heads_at_once<kFields>(heads) == heads ? N : 16;
    for (int64_t n0 = 0; n0 < N; n0 += tile) {
      const int64_t count = N - n0 < tile ? N - n0 : tile;
      for (int64_t h = 0; h < heads;) {
        const int now = heads_at_once<kFields>(heads - h);
        Stream* const asks = h == 0 ? stream : nullptr;  // the first pass alone
        with_heads<kFields>(now, [&](auto n) LESS_LAMBDA_INLINE {
          dot_all_rows<n>(reader, q + h * width, width, rows + n0 * bytes, count, D,
                          logit + h * stride + n0, stride, asks);
        });
        h += now;
      }
    }
  });
}

// out[h * width + d] += sum_n p[h * stride + n] v[n][d], h < heads, n < N, in ascending order,
// without the rows' scales.
inline void add_weighted_rows(DType dtype, const float* p, int64_t heads, int64_t stride,
                              const void* v, int64_t N, int64_t D, float* out, int64_t width,
                              Stream* stream) {
  with_reader(dtype, D, [=](const auto& reader) LESS_LAMBDA_INLINE {
    constexpr int kFields = std::remove_reference_t<decltype(reader)>::kFields;
    constexpr int64_t kTile = 16;
    const auto* const rows = static_cast<const uint8_t*>(v);
    const int64_t bytes = reader.bytes();
    for (int64_t n0 = 0; n0 < N; n0 += kTile) {
      const int64_t count = N - n0 < kTile ? N - n0 : kTile;
      if (stream != nullptr) stream->read(rows + n0 * bytes);
      for (int64_t h = 0; h < heads;) {
        const int now = heads_at_once<kFields>(heads - h);
        with_heads<kFields>(now, [&](auto n) LESS_LAMBDA_INLINE {
          add_all_rows<n>(reader, p + h * stride + n0, stride, rows + n0 * bytes, count, D,
                          out + h * width, width);
        });
        h += now;
      }
    }
  });
}

}  // namespace less::cpu::LESS_ISA
