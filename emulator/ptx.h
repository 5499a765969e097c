// What the C++ that emulator/ptx2cpp makes of PTX is written with: the instructions that are no C++
// operator, on the emulator's runtime. Included by generated files alone.
//
// A register is an unsigned integer of its width. A generic address is the host's; a shared one is
// an offset, as on the device; global, local and param ones are the host's too.
//
// Compile generated files with -ffp-contract=off (PTX says fma where it means it).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/half.h"
#include "emulator/runtime.h"
#include "emulator/timeline.h"

namespace less::emulator::ptx {

using emulator::Access;
using emulator::arrive;
using emulator::block_barrier;
using emulator::block_index;
using emulator::block_size;
using emulator::bulk_copy;
using emulator::cluster_arrive;
using emulator::cluster_wait;
using emulator::copy_async;
using emulator::copy_async_commit;
using emulator::copy_async_wait;
using emulator::fence;
using emulator::grid_dependency_wait;
using emulator::grid_launch_dependents;
using emulator::grid_size;
using emulator::issue;
using emulator::lane;
using emulator::ldmatrix;
using emulator::map_shared;
using emulator::maybe_preempt;
using emulator::mbarrier_arrive;
using emulator::mbarrier_fence_init;
using emulator::mbarrier_init;
using emulator::mbarrier_wait;
using emulator::mma_m16n8k16;
using emulator::mma_m16n8k32;
using emulator::Ready;
using emulator::Registered;
using emulator::thread_index;
using emulator::timed;
using emulator::Vote;
using emulator::Where;

// Translated accesses report themselves: no hooks are wanted.
static const bool kTracking = (tracking = true);

// -- registers and their bits ---------------------------------------------------------------------

// Kernels are compiled without optimisation; what they do at every turn is still no call.
#define LESS_PTX_INLINE [[gnu::always_inline]] inline

LESS_PTX_INLINE float as_f32(uint32_t bits) { return __builtin_bit_cast(float, bits); }
LESS_PTX_INLINE double as_f64(uint64_t bits) { return __builtin_bit_cast(double, bits); }
LESS_PTX_INLINE uint32_t bits(float x) { return __builtin_bit_cast(uint32_t, x); }
LESS_PTX_INLINE uint64_t bits(double x) { return __builtin_bit_cast(uint64_t, x); }

inline uint32_t thread_count() { return block_size().x * block_size().y * block_size().z; }
inline uint32_t warp_count() { return (thread_count() + 31) / 32; }
inline uint32_t warp_index() {
  const uint3 thread = thread_index();
  return (thread.x + block_size().x * (thread.y + block_size().y * thread.z)) / 32;
}
inline uint32_t cluster_rank() { return current->cluster_rank; }
inline uint32_t cluster_blocks() { return cluster_size; }

[[noreturn]] inline void trap(Where at) { fatal("trap", "trap at %s:%d", at.file, at.line); }
[[noreturn]] inline void unreachable(Where at) {
  fatal("trap", "a jump past its table at %s:%d", at.file, at.line);
}

// -- memory ---------------------------------------------------------------------------------------

template <typename T, int N>
struct Values {
  T of[N];
};

inline uint8_t* param(void** params, int i) { return static_cast<uint8_t*>(params[i]); }
LESS_PTX_INLINE uint8_t* pointer(uint64_t address) { return reinterpret_cast<uint8_t*>(address); }
LESS_PTX_INLINE uint64_t address(const uint8_t* p) { return reinterpret_cast<uint64_t>(p); }
inline uint8_t* shared_at(uint32_t address, Where at) { return shared_pointer(address, at); }
inline uint64_t generic_shared(uint64_t offset, Where at) {
  return address(shared_pointer(uint32_t(offset), at));
}
inline uint64_t shared_offset(uint64_t generic, Where) { return shared_address(pointer(generic)); }

// The address of a static array; of no bytes: of the block's dynamic shared memory.
inline uint32_t shared_array(const char* name, size_t bytes, size_t align) {
  return shared_address(bytes == 0 ? dynamic_shared() : static_shared(name, 0, bytes, align));
}

// What nobody has written yet.
inline void poison(uint8_t* p, size_t bytes) { std::memset(p, 0xFF, bytes); }

template <typename T, int N>
Values<T, N> peek(const uint8_t* p) {
  Values<T, N> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename T, int N>
void poke(uint8_t* p, const Values<T, N>& v) {
  std::memcpy(p, &v, sizeof v);
}

template <typename T, int N>
Values<T, N> load(const uint8_t* p, Access access, Where at) {
  if (access != Access::read) maybe_preempt();
  access_at(p, sizeof(Values<T, N>), access, at);
  return peek<T, N>(p);
}

template <typename T, int N>
void store(uint8_t* p, const Values<T, N>& v, Access access, Where at) {
  if (access != Access::write) maybe_preempt();
  access_at(p, sizeof v, access, at);
  poke(p, v);
}

// The old value; change makes the new one of it.
template <typename T, typename Change>
T atomic(uint8_t* p, Change change, Where at) {
  maybe_preempt();
  access_at(p, sizeof(T), Access::atomic, at);
  const T old = peek<T, 1>(p).of[0];
  const T changed = change(old);
  poke(p, Values<T, 1>{{changed}});
  if (std::memcmp(&old, &changed, sizeof(T)) != 0) note_progress();
  return old;
}

// -- integers -------------------------------------------------------------------------------------

template <typename T>
T minimum(T a, T b) {
  return std::min(a, b);
}
template <typename T>
T maximum(T a, T b) {
  return std::max(a, b);
}

template <typename T>
T magnitude(T a) {
  using U = std::make_unsigned_t<T>;
  return a < 0 ? T(U(0) - U(a)) : a;
}

// The upper half of a product.
template <typename T>
T high_product(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return T((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
}

// Division by 0 has no result; the GPU's is all ones.
template <typename T>
T quotient(T a, T b) {
  if (b == 0) return T(~T(0));
  if (std::is_signed_v<T> && b == T(-1)) return T(std::make_unsigned_t<T>(0) - a);
  return a / b;
}
template <typename T>
T remainder_of(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return a % b;
}

// Shifts by the width and more give 0, or the sign.
template <typename T>
T shl(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <typename T>
T shr(T a, uint32_t n) {
  if (n >= 8 * sizeof(T)) return a < 0 ? T(-1) : T(0);
  return T(a >> n);
}

// Of the 64 bits b:a, shifted by n, the upper (left) or lower (right) 32.
inline uint32_t funnel_l_clamp(uint32_t a, uint32_t b, uint32_t n) {
  return uint32_t(((uint64_t(b) << 32 | a) << std::min(n, 32u)) >> 32);
}
inline uint32_t funnel_r_clamp(uint32_t a, uint32_t b, uint32_t n) {
  return uint32_t((uint64_t(b) << 32 | a) >> std::min(n, 32u));
}
inline uint32_t funnel_l_wrap(uint32_t a, uint32_t b, uint32_t n) {
  return funnel_l_clamp(a, b, n & 31);
}
inline uint32_t funnel_r_wrap(uint32_t a, uint32_t b, uint32_t n) {
  return funnel_r_clamp(a, b, n & 31);
}

// Any function of three bits, by its table of eight.
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if (!(table >> i & 1)) continue;
    result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

// Four of the eight bytes b:a, or copies of their signs.
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t all = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> (4 * i) & 15;
    uint32_t byte = uint32_t(all >> (8 * (choice & 7))) & 0xff;
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// Extract: bits beyond the top repeat the sign, of signed types.
template <typename T>
T bfe(T a, uint32_t from, uint32_t count) {
  constexpr uint32_t kWidth = 8 * sizeof(T);
  from &= 255, count &= 255;
  if (count == 0) return 0;
  const T field = shr(a, from);
  if (count >= kWidth || (std::is_signed_v<T> && from + count > kWidth)) return field;
  using U = std::make_unsigned_t<T>;
  const uint32_t unused = kWidth - count;
  return shr(T(U(field) << unused), unused);
}

// Insert the low bits of a into b.
template <typename T>
T bfi(T a, T b, uint32_t to, uint32_t count) {
  constexpr uint32_t kWidth = 8 * sizeof(T);
  to &= 255, count &= 255;
  const T ones = count >= kWidth ? T(~T(0)) : T((T(1) << count) - 1);
  const T mask = shl(ones, to);
  return T((b & ~mask) | (shl(a, to) & mask));
}

template <typename T>
uint32_t clz(T a) {
  if (a == 0) return 8 * sizeof(T);
  return sizeof(T) == 8 ? __builtin_clzll(uint64_t(a)) : __builtin_clz(uint32_t(a));
}
template <typename T>
uint32_t popc(T a) {
  return __builtin_popcountll(uint64_t(a));
}
template <typename T>
T brev(T a) {
  T result = 0;
  for (size_t i = 0; i < 8 * sizeof(T); ++i) result = T(result << 1 | (a >> i & 1));
  return result;
}
// Position of the highest bit that differs from the sign, ~0 where there is none.
template <typename T>
uint32_t bfind(T a) {
  using U = std::make_unsigned_t<T>;
  const U rest = a < 0 ? U(~U(a)) : U(a);
  return rest == 0 ? ~0u : 8 * sizeof(T) - 1 - clz(rest);
}
template <typename T>
uint32_t bfind_shift(T a) {
  const uint32_t found = bfind(a);
  return found == ~0u ? found : 8 * sizeof(T) - 1 - found;
}

// c + the sum of four products of bytes.
template <typename A, typename B>
uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += uint32_t(int32_t(A(a >> i)) * int32_t(B(b >> i)));
  return c;
}

template <typename T, typename From>
T clamp(From a) {
  const __int128 wide = a;
  if (wide < std::numeric_limits<T>::min()) return std::numeric_limits<T>::min();
  if (wide > std::numeric_limits<T>::max()) return std::numeric_limits<T>::max();
  return T(a);
}

// a above b, each saturated; two bytes go below the lower half of c.
template <typename T>
uint32_t pack(int32_t a, int32_t b, uint32_t c) {
  using U = std::make_unsigned_t<T>;
  constexpr int kWidth = 8 * sizeof(T);
  const uint32_t both = uint32_t(U(clamp<T>(a))) << kWidth | U(clamp<T>(b));
  return sizeof(T) == 1 ? c << 16 | both : both;
}

// -- floats ---------------------------------------------------------------------------------------

inline float flush(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}
// .sat: into [0, 1], NaN becomes 0.
template <typename T>
T saturate(T x) {
  return x > 0 ? std::min(x, T(1)) : T(0);
}
template <typename T>
T relu(T x) {
  return x < 0 ? T(0) : x;
}

template <typename T>
bool unordered(T a, T b) {
  return std::isnan(a) || std::isnan(b);
}
// -0 is less than +0, and a number goes before NaN.
inline float minimum(float a, float b) {
  if (unordered(a, b)) return std::isnan(a) ? b : a;
  return a == b ? (std::signbit(a) ? a : b) : std::min(a, b);
}
inline float maximum(float a, float b) {
  if (unordered(a, b)) return std::isnan(a) ? b : a;
  return a == b ? (std::signbit(a) ? b : a) : std::max(a, b);
}
inline double minimum(double a, double b) { return std::fmin(a, b); }
inline double maximum(double a, double b) { return std::fmax(a, b); }
// .NaN: NaN goes before a number.
inline float minimum_nan(float a, float b) { return unordered(a, b) ? a + b : minimum(a, b); }
inline float maximum_nan(float a, float b) { return unordered(a, b) ? a + b : maximum(a, b); }

// A number of more bits than a double has: sum + lost, lost below the last bit of sum.
struct Exact {
  double sum;
  double lost;
};
// a * b + c, of floats: the product is exact, the sum is Knuth's two-sum.
inline Exact exact_fma(float a, float b, float c) {
  const double product = double(a) * double(b), sum = product + c;
  const double back = sum - product;
  return {sum, (product - (sum - back)) + (double(c) - back)};
}
// As a float that is not above (.rm), not below (.rp), not further from 0 (.rz).
enum class Direction { rm, rp, rz };
template <Direction direction>
float directed(Exact x) {
  const float near = float(x.sum);
  if (!std::isfinite(x.sum)) return near;
  const double above = (x.sum - double(near)) + x.lost;  // its sign is exact
  const bool down = direction == Direction::rm || (direction == Direction::rz && x.sum > 0);
  if (down && above < 0) return std::nextafter(near, -std::numeric_limits<float>::infinity());
  if (!down && above > 0) return std::nextafter(near, std::numeric_limits<float>::infinity());
  return near;
}
template <Direction direction>
float directed_add(float a, float b) {
  return directed<direction>(exact_fma(a, 1.0f, b));
}
template <Direction direction>
float directed_sub(float a, float b) {
  return directed<direction>(exact_fma(a, 1.0f, -b));
}
template <Direction direction>
float directed_mul(float a, float b) {
  return directed<direction>({double(a) * double(b), 0.0});
}
template <Direction direction>
float directed_fma(float a, float b, float c) {
  return directed<direction>(exact_fma(a, b, c));
}

// A rounded float as an integer; what is too large becomes the largest.
template <typename T, typename F>
T to_integer(F x, uint64_t nan) {
  if (std::isnan(x)) return T(nan);
  if (x >= std::ldexp(F(1), std::numeric_limits<T>::digits)) return std::numeric_limits<T>::max();
  if (x <= F(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  return T(x);
}

// -- halves ---------------------------------------------------------------------------------------

// A double as a float that rounds on to a half as the double would have.
inline float to_odd(double x) {
  const float near = float(x);
  if (double(near) == x || std::isnan(x) || std::isinf(near)) return near;
  const float toward = std::fabs(double(near)) > std::fabs(x) ? std::nextafter(near, 0.0f) : near;
  return as_f32(bits(toward) | 1);
}

template <typename Type>
struct Half {
  static float wide(uint16_t x) { return to_float(Type{x}); }
  static uint16_t narrow(float x) { return from_float<Type>(x).bits; }
  static uint16_t narrow(double x) { return narrow(to_odd(x)); }
};
using F16 = Half<fp16>;
using BF16 = Half<bf16>;

// A function of halves, on both halves of pairs.
template <auto Function, typename... Pair>
uint32_t both(Pair... pair) {
  const uint32_t upper = Function(uint16_t(pair >> 16)...);
  return upper << 16 | Function(uint16_t(pair)...);
}

// A float holds a sum or product of halves so well that rounding it again is no second rounding.
template <typename H>
uint16_t half_add(uint16_t a, uint16_t b) {
  return H::narrow(H::wide(a) + H::wide(b));
}
template <typename H>
uint16_t half_sub(uint16_t a, uint16_t b) {
  return H::narrow(H::wide(a) - H::wide(b));
}
template <typename H>
uint16_t half_mul(uint16_t a, uint16_t b) {
  return H::narrow(H::wide(a) * H::wide(b));
}
template <typename H>
float once_rounded_fma(uint16_t a, uint16_t b, uint16_t c) {
  Exact x = exact_fma(H::wide(a), H::wide(b), H::wide(c));
  if (x.lost != 0 && std::isfinite(x.sum)) {  // the last bit remembers that something was lost
    if ((x.lost > 0) != (x.sum > 0)) x.sum = std::nextafter(x.sum, 0.0);
    x.sum = as_f64(bits(x.sum) | 1);
  }
  return to_odd(x.sum);
}
template <typename H>
uint16_t half_fma(uint16_t a, uint16_t b, uint16_t c) {
  return H::narrow(once_rounded_fma<H>(a, b, c));
}
template <typename H>
uint16_t half_fma_relu(uint16_t a, uint16_t b, uint16_t c) {
  return H::narrow(relu(once_rounded_fma<H>(a, b, c)));
}
template <typename H>
uint16_t half_min(uint16_t a, uint16_t b) {
  return H::narrow(minimum(H::wide(a), H::wide(b)));
}
template <typename H>
uint16_t half_max(uint16_t a, uint16_t b) {
  return H::narrow(maximum(H::wide(a), H::wide(b)));
}
template <typename H>
uint16_t half_min_nan(uint16_t a, uint16_t b) {
  return H::narrow(minimum_nan(H::wide(a), H::wide(b)));
}
template <typename H>
uint16_t half_max_nan(uint16_t a, uint16_t b) {
  return H::narrow(maximum_nan(H::wide(a), H::wide(b)));
}
template <typename H>
uint16_t half_neg(uint16_t a) {
  return a ^ 0x8000;
}
template <typename H>
uint16_t half_abs(uint16_t a) {
  return a & 0x7fff;
}
template <typename H>
uint16_t half_ex2(uint16_t a) {
  return H::narrow(std::exp2(double(H::wide(a))));
}
template <typename H>
uint16_t half_tanh(uint16_t a) {
  return H::narrow(std::tanh(double(H::wide(a))));
}

// -- 8-bit floats ---------------------------------------------------------------------------------

// Sign, exponent and kMantissa bits; rounds to nearest even, kLargest and above become kLargest.
template <int kMantissa, int kBias, int kLargest>
uint16_t to_fp8(float x) {
  if (std::isnan(x)) return 0x7f;
  const double a = std::fabs(double(x));
  const int exponent = a == 0 ? 1 - kBias : std::max(std::ilogb(a), 1 - kBias);
  // Beyond the largest exponent everything saturates.
  if (exponent > 31) return uint16_t((std::signbit(x) ? 0x80 : 0) | kLargest);
  const int mantissa = int(std::nearbyint(std::ldexp(a, kMantissa - exponent)));
  const int code = ((exponent + kBias - 1) << kMantissa) + mantissa;
  return uint16_t((std::signbit(x) ? 0x80 : 0) | std::min(code, kLargest));
}

// The first into the upper byte.
inline uint16_t to_e4m3x2(float upper, float lower) {
  return uint16_t(to_fp8<3, 7, 0x7e>(upper) << 8 | to_fp8<3, 7, 0x7e>(lower));
}
inline uint16_t to_e5m2x2(float upper, float lower) {
  return uint16_t(to_fp8<2, 15, 0x7b>(upper) << 8 | to_fp8<2, 15, 0x7b>(lower));
}
inline uint16_t to_e4m3x2(uint32_t pair) {
  return to_e4m3x2(F16::wide(uint16_t(pair >> 16)), F16::wide(uint16_t(pair)));
}
inline uint16_t to_e5m2x2(uint32_t pair) {
  return to_e5m2x2(F16::wide(uint16_t(pair >> 16)), F16::wide(uint16_t(pair)));
}

inline uint16_t half_of_e4m3(uint32_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return 0x7fff;
  const double value =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return uint16_t((code & 0x80) << 8 | F16::narrow(value));
}
inline uint32_t from_e4m3x2(uint16_t pair) {
  return uint32_t(half_of_e4m3(pair >> 8)) << 16 | half_of_e4m3(pair & 0xff);
}
inline uint32_t from_e5m2x2(uint16_t pair) {  // the upper byte of a half
  return uint32_t(pair & 0xff00) << 16 | uint32_t(pair & 0xff) << 8;
}

// -- warps ----------------------------------------------------------------------------------------

// What every lane of a mask brought.
class Brought {
 public:
  template <typename T>
  Brought(uint32_t mask, const char* kind, T mine, bool orders, Where at)
      : table_(warp_exchange(mask, kind, &mine, sizeof mine, &live, orders, at)) {}
  ~Brought() { warp_release(table_); }
  Brought(const Brought&) = delete;
  Brought& operator=(const Brought&) = delete;

  bool has(int from) const { return live >> from & 1; }
  template <typename T>
  T of(int from) const {
    T value;
    std::memcpy(&value, table_ + from * kExchangeStride, sizeof value);
    return value;
  }

  uint32_t live;

 private:
  const unsigned char* table_;
};

inline void warp_sync(uint32_t mask, Where at) { Brought(mask, "__syncwarp", 0, true, at); }

enum class Shuffle { up, down, bfly, idx };

// shfl.sync: `control` holds the clamp and, above it, the mask of segments.
inline uint32_t shuffle(Shuffle mode, uint32_t mine, uint32_t by, uint32_t control, uint32_t mask,
                        bool* valid, Where at) {
  const int me = lane(), n = int(by & 31), clamp = int(control & 31);
  const int segment = int(control >> 8 & 31), last = (me & segment) | (clamp & ~segment);
  int from = me;
  switch (mode) {
    case Shuffle::up:
      from = me - n;
      break;
    case Shuffle::down:
      from = me + n;
      break;
    case Shuffle::bfly:
      from = me ^ n;
      break;
    case Shuffle::idx:
      from = (me & segment) | (n & ~segment);
      break;
  }
  *valid = mode == Shuffle::up ? from >= last : from <= last;
  if (!*valid) from = me;
  const Brought all(mask, "shfl.sync", mine, false, at);
  if (!all.has(from)) {
    error("shuffle-source", "shfl.sync at %s:%d: lane %d reads lane %d, not in the mask or exited",
          at.file, at.line, me, from);
    return mine;
  }
  return all.of<uint32_t>(from);
}

inline uint32_t vote_ballot(bool mine, uint32_t mask, Where at) {
  const Brought all(mask, "vote.sync", mine, false, at);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) {
    if (all.has(i) && all.of<bool>(i)) result |= 1u << i;
  }
  return result;
}
inline bool vote_any(bool mine, uint32_t mask, Where at) {
  return vote_ballot(mine, mask, at) != 0;
}
inline bool vote_all(bool mine, uint32_t mask, Where at) {
  return vote_ballot(!mine, mask, at) == 0;
}
inline bool vote_uni(bool mine, uint32_t mask, Where at) {
  const Brought all(mask, "vote.sync.uni", mine, false, at);
  for (int i = 0; i < 32; ++i) {
    if (all.has(i) && all.of<bool>(i) != mine) return false;
  }
  return true;
}

template <typename T>
uint32_t match_any(T mine, uint32_t mask, Where at) {
  const Brought all(mask, "match.any.sync", mine, false, at);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) {
    if (all.has(i) && all.of<T>(i) == mine) result |= 1u << i;
  }
  return result;
}
template <typename T>
uint32_t match_all(T mine, uint32_t mask, Where at) {
  const Brought all(mask, "match.all.sync", mine, false, at);
  for (int i = 0; i < 32; ++i) {
    if (all.has(i) && all.of<T>(i) != mine) return 0;
  }
  return all.live;
}

template <typename T, typename Combine>
T reduce(T mine, uint32_t mask, Combine combine, Where at) {
  const Brought all(mask, "redux.sync", mine, false, at);
  T result = mine;
  bool first = true;
  for (int i = 0; i < 32; ++i) {
    if (!all.has(i)) continue;
    result = first ? all.of<T>(i) : combine(result, all.of<T>(i));
    first = false;
  }
  return result;
}
template <typename T>
T reduce_add(T mine, uint32_t mask, Where at) {
  return reduce(mine, mask, [](T a, T b) { return T(uint32_t(a) + uint32_t(b)); }, at);
}
template <typename T>
T reduce_min(T mine, uint32_t mask, Where at) {
  return reduce(mine, mask, [](T a, T b) { return std::min(a, b); }, at);
}
template <typename T>
T reduce_max(T mine, uint32_t mask, Where at) {
  return reduce(mine, mask, [](T a, T b) { return std::max(a, b); }, at);
}
template <typename T>
T reduce_and(T mine, uint32_t mask, Where at) {
  return reduce(mine, mask, [](T a, T b) { return a & b; }, at);
}
template <typename T>
T reduce_or(T mine, uint32_t mask, Where at) {
  return reduce(mine, mask, [](T a, T b) { return a | b; }, at);
}
template <typename T>
T reduce_xor(T mine, uint32_t mask, Where at) {
  return reduce(mine, mask, [](T a, T b) { return a ^ b; }, at);
}

// The lowest lane of the mask that is still there.
inline uint32_t elect(uint32_t mask, Where at) {
  const Brought all(mask, "elect.sync", 0, false, at);
  return uint32_t(__builtin_ctz(all.live));
}

// -- barriers -------------------------------------------------------------------------------------

inline void block_sync(int id, int threads, Where at) {
  block_barrier(id, threads, 0, Vote::none, at);
}
inline void block_arrive(int id, int threads, Where at) { named_arrive(id, threads, at); }

}  // namespace less::emulator::ptx
