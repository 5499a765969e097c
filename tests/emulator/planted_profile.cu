// Kernels whose values and costs are known: fragments, half arithmetic, traffic, bank conflicts.
#include "planted.h"

namespace less::cuda {

// Both in exact small numbers. a [16, 16], b [16, 8], d = a b.
template <typename T, typename Tag>
__global__ void fragments_kernel(const T* a, const T* b, float* d) {
  SMEM_ARRAY(T, rows, 16 * 16);
  SMEM_ARRAY(T, columns, 16 * 8);
  const int t = threadIdx.x;
  store16_shared(rows + t * 8, load16(a + t * 8));
  if (t < 16) store16_shared(columns + t * 8, load16(b + t * 8));
  __syncwarp();
  uint32_t left[4], right[2];
  ldmatrix_x4(left, rows + t % 16 * 16 + t / 16 * 8);
  ldmatrix_x2_trans(right, columns + t % 16 * 8);
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  mma_m16n8k16(sum, left, right, Tag{});
  for (int i = 0; i < 4; ++i) {
    store(d + (t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2, sum[i]);
  }
}

template <typename T, typename Tag, typename Narrow>
bool fragments(Narrow narrow) {
  Array<T> a(16 * 16, "a", true), b(16 * 8, "b", true);
  Array<float> d(16 * 8);
  const auto left = [](int i, int k) { return float((i * 5 + k * 3) % 17 - 8); };
  const auto right = [](int k, int j) { return float((k * 7 + j * 2) % 13 - 6); };
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) a[i * 16 + k] = narrow(left(i, k));
    for (int j = 0; j < 8; ++j) b[i * 8 + j] = narrow(right(i, j));
  }
  launch(fragments_kernel<T, Tag>, {dim3(1), dim3(32), 0, nullptr}, a.data(), b.data(), d.data());
  bool good = d.all_written();
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += left(i, k) * right(k, j);
      good &= d[i * 8 + j] == sum;
    }
  }
  return good;
}

bool fragments_fp16(bool) {
  return fragments<__half, HalfTag>([](float x) { return __float2half_rn(x); });
}

bool fragments_bf16(bool) {
  return fragments<__nv_bfloat16, BFloatTag>([](float x) { return __float2bfloat16_rn(x); });
}

__global__ void halves_kernel(float* out) {
  const __half2 half = __hfma2(__floats2half2_rn(1.5f, -2.0f), __floats2half2_rn(3.0f, 4.0f),
                               __hadd2(__floats2half2_rn(0.25f, 1.0f), __float2half2_rn(1.0f)));
  const __nv_bfloat162 bf = __hfma2(__floats2bfloat162_rn(1.5f, -2.0f),
                                    __floats2bfloat162_rn(3.0f, 4.0f), __float2bfloat162_rn(2.0f));
  store(out, __low2float(half));
  store(out + 1, __high2float(half));
  store(out + 2, __low2float(bf));
  store(out + 3, __high2float(bf));
  store(out + 4, float(__nv_fp8_e4m3(17.0f)));  // halfway between 16 and 18
  store(out + 5, float(__nv_fp8_e4m3(1000.0f)));
  store(out + 6, exp2_approx(-3.0f));
  store(out + 7, exp2_approx(-140.0f));
}

bool halves(bool) {
  Array<float> out(8);
  launch(halves_kernel, {dim3(1), dim3(1), 0, nullptr}, out.data());
  const float wanted[] = {5.75f, -6.0f, 6.5f, -6.0f, 16.0f, 448.0f, 0.125f, 0.0f};
  bool right = true;
  for (int i = 0; i < 8; ++i) right &= out[i] == wanted[i];
  return right;
}

// Copies 16 bytes a thread: neighbours, or wrong, every other 16 bytes.
__global__ void traffic_kernel(const float* in, float* out, bool wrong) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  store16(out + t * 4, load16(in + t * (wrong ? 8 : 4)));
}

bool traffic(bool wrong) {
  Array<float> in(2 * 64 * 8, "in", true), out(2 * 64 * 4);
  in.count();
  launch(traffic_kernel, {dim3(2), dim3(64), 0, nullptr}, in.data(), out.data(), wrong);
  return out.all_written();
}

template <int stride>
__global__ void banks_kernel(float* out) {
  SMEM_ARRAY(float, x, 32 * stride);
  const int t = threadIdx.x;
  x[t * stride] = float(t);
  __syncwarp();
  store(out + t, x[t * stride]);
}

template <int stride>
bool banks(bool) {
  Array<float> out(32);
  launch(banks_kernel<stride>, {dim3(1), dim3(32), 0, nullptr}, out.data());
  return out.all_written();
}

// Who comes when: the schedules differ in nothing else.
__global__ void arrivals_kernel(int* counter, int* out) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  __syncwarp();
  store(out + t, atomic_add(counter, 1));
}

bool arrivals(bool) {
  Array<int> counter(1, "counter", true), out(4 * 64);
  counter.fill(0);
  launch(arrivals_kernel, {dim3(4), dim3(64), 0, nullptr}, counter.data(), out.data());
  unsigned hash = 1;
  for (int i = 0; i < 4 * 64; ++i) hash = hash * 31 + unsigned(out[i]);
  seen.push_back(hash);
  return counter[0] == 4 * 64;
}

const std::vector<Case>& profile_cases() {
  static const std::vector<Case> cases{
      {"fragments_fp16", fragments_fp16},
      {"fragments_bf16", fragments_bf16},
      {"halves", halves},
      {"traffic", traffic},
      {"banks_1", banks<1>},
      {"banks_2", banks<2>},
      {"banks_32", banks<32>},
      {"banks_33", banks<33>},
      {"arrivals", arrivals},
  };
  return cases;
}

}  // namespace less::cuda
