// Pages that begin become those of an empty sequence: position -1, all else 0.
//
// Grid:   (parts of a head, K, B); the blocks of rows whose page goes on do nothing.
// Memory: a page is written once, in pieces of 16 bytes.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace less::cuda {

constexpr int kResetThreads = 256;
constexpr int kResetPieces = 16;  // of a thread, as a rule
constexpr int64_t kResetParts = 64;

// Bytes [begin, end) of a page, shared by the grid's blocks of one head.
template <typename Word>
LESS_DEVICE void fill(unsigned char* begin, unsigned char* end, const Word& word) {
  const int64_t step = int64_t{gridDim.x} * kResetThreads * 16;
  unsigned char* at = begin + (int64_t{blockIdx.x} * kResetThreads + threadIdx.x) * 16;
  for (; at < end; at += step) {
    store16(at, make_uint4(word(at), word(at + 4), word(at + 8), word(at + 12)));
  }
}

__global__ void __launch_bounds__(kResetThreads)
    reset_kernel(const __grid_constant__ ResetParams p) {
  const int64_t h = blockIdx.y, b = blockIdx.z;
  unsigned char* const memory = page(p.pool, b);
  if (memory == nullptr || p.pool.fresh[b] == 0) return;
  const Span span = head_span(p.layout, memory, h);
  const Slots slots = head(p.layout, memory, h).slots;
  const auto* const position = reinterpret_cast<const unsigned char*>(slots.position);
  // The page's header goes with the first head.
  fill(h == 0 ? memory : span.data, span.data + span.nbytes, [=](const unsigned char* at) {
    return at >= position && at < position + 4 * slots.S ? 0xffffffffu : 0u;
  });
}

cudaError_t reset_pages(const ResetParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.pool.fresh == nullptr) return cudaSuccess;
  if (p.B > 65535) return cudaErrorInvalidValue;
  if (!aligned16(p.pool.data)) return cudaErrorMisalignedAddress;
  const int64_t largest =
      head_offsets(formats(p.layout), p.layout.D, p.layout.R, p.layout.S).nbytes;
  constexpr int64_t kPart = int64_t{kResetThreads} * kResetPieces * 16;
  const int64_t parts = (largest + kPart - 1) / kPart;
  const dim3 grid(unsigned(parts < kResetParts ? parts : kResetParts), unsigned(p.layout.K),
                  unsigned(p.B));
  return launch(reset_kernel, Launch{grid, dim3(kResetThreads), 0, stream}, p);
}

}  // namespace less::cuda
