// The inner loops of a decode step: a few query heads against contiguous rows of keys or values.
//
// Rows are read once from memory for all heads, widened in registers, and never copied. Heads are
// taken up to three at a time (four where there are 32 registers): as many accumulators as fit.
#pragma once

#include <algorithm>

#include "common/layout.h"
#include "cpu/softmax.h"

namespace less::cpu::LESS_ISA {

// Heads that share one pass over the rows, of `left` that are still to do: even shares.
LESS_INLINE int heads_at_once(int64_t left) {
  constexpr int64_t kMost = Vec::kSize == 16 ? 4 : 3;
  const int64_t passes = (left + kMost - 1) / kMost;
  return int((left + passes - 1) / passes);
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
  static_assert(kFieldAlign % (2 * kLine) == 0);

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

// logit[h * stride + n] = q[h] . k[n] for kHeads heads and kRows rows, kRows a multiple of four.
template <typename T, int kHeads, int kRows>
LESS_INLINE void dot_rows(const float* q, int64_t width, const T* k, int64_t D, float* logit,
                          int64_t stride) {
  Vec a[kHeads][kRows];
  for (int h = 0; h < kHeads; ++h) {
    for (int n = 0; n < kRows; ++n) a[h][n] = Vec(0.0f);
  }
  int64_t d = 0;
  for (; d + Vec::kSize <= D; d += Vec::kSize) {
    Vec query[kHeads];
    for (int h = 0; h < kHeads; ++h) query[h] = Vec::load(q + h * width + d);
    for (int n = 0; n < kRows; ++n) {
      const Vec key = Vec::load(k + n * D + d);
      for (int h = 0; h < kHeads; ++h) a[h][n] = fma(query[h], key, a[h][n]);
    }
  }
  if (d < D) {
    for (int n = 0; n < kRows; ++n) {
      const Vec key = Vec::load(k + n * D + d, int(D - d));
      for (int h = 0; h < kHeads; ++h) {
        a[h][n] = fma(Vec::load(q + h * width + d), key, a[h][n]);
      }
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int n = 0; n < kRows; n += 4) {
      const Vec four[4] = {a[h][n], a[h][n + 1], a[h][n + 2], a[h][n + 3]};
      sum(four, logit + h * stride + n);
    }
  }
}

// The same for up to three rows.
template <typename T, int kHeads>
LESS_INLINE void dot_last_rows(const float* q, int64_t width, const T* k, int64_t count, int64_t D,
                               float* logit, int64_t stride) {
  for (int64_t n = 0; n < count; ++n) {
    Vec a[kHeads];
    for (int h = 0; h < kHeads; ++h) a[h] = Vec(0.0f);
    for (int64_t d = 0; d < D; d += Vec::kSize) {
      const T* at = k + n * D + d;
      const Vec key = d + Vec::kSize <= D ? Vec::load(at) : Vec::load(at, int(D - d));
      for (int h = 0; h < kHeads; ++h) a[h] = fma(Vec::load(q + h * width + d), key, a[h]);
    }
    for (int h = 0; h < kHeads; ++h) logit[h * stride + n] = sum(a[h]);
  }
}

template <typename T, int kHeads>
LESS_INLINE void dot_all_rows(const float* q, int64_t width, const T* k, int64_t N, int64_t D,
                              float* logit, int64_t stride, Stream* stream) {
  // Enough accumulators to hide the latency of fma, no more than there are registers.
  constexpr int kRows = kHeads == 1 ? 8 : 4;
  int64_t n = 0;
  for (; n + kRows <= N; n += kRows) {
    if (stream != nullptr) stream->read(k + n * D);
    dot_rows<T, kHeads, kRows>(q, width, k + n * D, D, logit + n, stride);
  }
  if constexpr (kRows == 8) {
    if (n + 4 <= N) {
      dot_rows<T, kHeads, 4>(q, width, k + n * D, D, logit + n, stride);
      n += 4;
    }
  }
  if (n < N) dot_last_rows<T, kHeads>(q, width, k + n * D, N - n, D, logit + n, stride);
}

// out[h * width + d] += sum_n p[h * stride + n] v[n][d] over kVecs vectors from d on; n ascending.
template <typename T, int kHeads, int kVecs>
LESS_INLINE void add_rows(const float* p, int64_t stride, const T* v, int64_t N, int64_t D,
                          int64_t d, float* out, int64_t width) {
  Vec a[kHeads][kVecs];
  for (int h = 0; h < kHeads; ++h) {
    for (int j = 0; j < kVecs; ++j) a[h][j] = Vec::load(out + h * width + d + j * Vec::kSize);
  }
  for (int64_t n = 0; n < N; ++n) {
    const T* row = v + n * D + d;
    Vec weight[kHeads];
    for (int h = 0; h < kHeads; ++h) weight[h] = Vec(p[h * stride + n]);
    for (int j = 0; j < kVecs; ++j) {
      const Vec value = Vec::load(row + j * Vec::kSize);
      for (int h = 0; h < kHeads; ++h) a[h][j] = fma(weight[h], value, a[h][j]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int j = 0; j < kVecs; ++j) a[h][j].store(out + h * width + d + j * Vec::kSize);
  }
}

template <typename T, int kHeads>
LESS_INLINE void add_all_rows(const float* p, int64_t stride, const T* v, int64_t N, int64_t D,
                              float* out, int64_t width) {
  constexpr int kVecs = kHeads == 1 ? 8 : 4;
  int64_t d = 0;
  for (; d + kVecs * Vec::kSize <= D; d += kVecs * Vec::kSize) {
    add_rows<T, kHeads, kVecs>(p, stride, v, N, D, d, out, width);
  }
  if constexpr (kVecs == 8) {
    if (d + 4 * Vec::kSize <= D) {
      add_rows<T, kHeads, 4>(p, stride, v, N, D, d, out, width);
      d += 4 * Vec::kSize;
    }
  }
  for (; d + Vec::kSize <= D; d += Vec::kSize) {
    add_rows<T, kHeads, 1>(p, stride, v, N, D, d, out, width);
  }
  if (d == D) return;
  for (int h = 0; h < kHeads; ++h) {
    Vec a = Vec::load(out + h * width + d);
    for (int64_t n = 0; n < N; ++n) {
      a = fma(Vec(p[h * stride + n]), Vec::load(v + n * D + d, int(D - d)), a);
    }
    a.store(out + h * width + d);
  }
}

// logit[h * stride + n] = q[h] . k[n], h < heads, n < N. q [heads, width] is padded with zeros;
// k is [N, D], of what the stream has entered; null: none.
template <typename T>
LESS_INLINE void dots_of_rows(const float* q, int64_t heads, int64_t width, const T* k, int64_t N,
                              int64_t D, float* logit, int64_t stride, Stream* stream) {
  // Where the heads take several passes, so many rows stay in the first-level cache over them.
  const int64_t tile = heads_at_once(heads) == heads ? N : 16;
  for (int64_t n0 = 0; n0 < N; n0 += tile) {
    const int64_t count = N - n0 < tile ? N - n0 : tile;
    for (int64_t h = 0; h < heads;) {
      const int now = heads_at_once(heads - h);
      const float* query = q + h * width;
      Stream* const asks = h == 0 ? stream : nullptr;  // the first pass alone
      float* l = logit + h * stride + n0;
      const T* rows = k + n0 * D;
      if (now == 1) dot_all_rows<T, 1>(query, width, rows, count, D, l, stride, asks);
      if (now == 2) dot_all_rows<T, 2>(query, width, rows, count, D, l, stride, asks);
      if (now == 3) dot_all_rows<T, 3>(query, width, rows, count, D, l, stride, asks);
      if constexpr (Vec::kSize == 16) {
        if (now == 4) dot_all_rows<T, 4>(query, width, rows, count, D, l, stride, asks);
      }
      h += now;
    }
  }
}

// out[h * width + d] += sum_n p[h * stride + n] v[n][d], h < heads, n < N, in ascending order.
template <typename T>
LESS_INLINE void add_weighted_rows(const float* p, int64_t heads, int64_t stride, const T* v,
                                   int64_t N, int64_t D, float* out, int64_t width,
                                   Stream* stream) {
  constexpr int64_t kTile = 16;
  for (int64_t n0 = 0; n0 < N; n0 += kTile) {
    const int64_t count = N - n0 < kTile ? N - n0 : kTile;
    if (stream != nullptr) stream->read(v + n0 * D);
    for (int64_t h = 0; h < heads;) {
      const int now = heads_at_once(heads - h);
      const float* weight = p + h * stride + n0;
      const T* rows = v + n0 * D;
      float* o = out + h * width;
      if (now == 1) add_all_rows<T, 1>(weight, stride, rows, count, D, o, width);
      if (now == 2) add_all_rows<T, 2>(weight, stride, rows, count, D, o, width);
      if (now == 3) add_all_rows<T, 3>(weight, stride, rows, count, D, o, width);
      if constexpr (Vec::kSize == 16) {
        if (now == 4) add_all_rows<T, 4>(weight, stride, rows, count, D, o, width);
      }
      h += now;
    }
  }
}

}  // namespace less::cpu::LESS_ISA
