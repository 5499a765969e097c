// Runs one function of simd.h over an array, whole vectors and then the tail.
#include "cpu/simd_test.h"

#include "cpu/simd.h"

namespace less::cpu::LESS_ISA {
namespace {

template <typename In, typename Out, typename Function>
void map(const SimdTestParams& p, int64_t begin, int64_t end, Function function) {
  const In* src = static_cast<const In*>(p.src);
  Out* dst = static_cast<Out*>(p.dst);
  int64_t i = begin;
  for (; i + Vec::kSize <= end; i += Vec::kSize) function(Vec::load(src + i)).store(dst + i);
  if (i < end) function(Vec::load(src + i, int(end - i))).store(dst + i, int(end - i));
}

}  // namespace

void simd_test(const SimdTestParams& p, int64_t begin, int64_t end) {
  const auto same = [](Vec x) { return x; };
  const float* src = static_cast<const float*>(p.src);
  float* dst = static_cast<float*>(p.dst);
  switch (p.what) {
    case SimdTest::exp:
      return map<float, float>(p, begin, end, [](Vec x) { return exp(x); });
    case SimdTest::gelu:
      return map<float, float>(p, begin, end, [](Vec x) { return gelu(x); });
    case SimdTest::tanh:
      return map<float, float>(p, begin, end, [](Vec x) { return tanh(x); });
    case SimdTest::from_bf16:
      return map<bf16, float>(p, begin, end, same);
    case SimdTest::from_fp16:
      return map<fp16, float>(p, begin, end, same);
    case SimdTest::to_bf16:
      return map<float, bf16>(p, begin, end, same);
    case SimdTest::to_fp16:
      return map<float, fp16>(p, begin, end, same);
    case SimdTest::from_i8:
      return map<int8_t, float>(p, begin, end, same);
    case SimdTest::to_i8:
      return map<float, int8_t>(p, begin, end, same);
    case SimdTest::sum:
      *dst = sum(Vec::load(src, int(end - begin)));
      return;
    case SimdTest::max:
      *dst = max_of(Vec::load(src, int(end - begin), -kInfinity));
      return;
    case SimdTest::sums: {
      Vec x[4];
      for (int i = 0; i < 4; ++i) x[i] = Vec::load(src + i * Vec::kSize);
      sum(x, dst);
      return;
    }
    case SimdTest::width:
      *dst = float(Vec::kSize);
      return;
  }
}

}  // namespace less::cpu::LESS_ISA
