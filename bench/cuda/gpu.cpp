// The kernels of csrc/cuda alone, timed with CUDA events.
//
// A case is a graph that launches the op once on each of so many layers that together they do not
// fit the L2 cache by far. Before every replay, outside the timing, L2 is emptied (flush.h). A
// row's time is the fastest replay's share of a layer; its bytes follow from a formula, and its
// rate stands beside what this GPU copies in device memory (read and written bytes of cudaMemcpy).
// One JSON line a row.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "device_layer.h"
#include "flush.h"

namespace less::bench {
namespace {

constexpr char kUsage[] =
    "usage: less_gpu [--small] [--op NAME] [--dependent] [--soak N]\n"
    "  times every kernel of csrc/cuda, one JSON line each\n"
    "  --small      one replay of tiny layers, for compute-sanitizer\n"
    "  --op NAME    that op's kernels alone\n"
    "  --dependent  decode_step alone, whose launches may begin before the kernel before is over\n"
    "  --soak N     N replays of one graph of decode steps instead\n";
constexpr size_t kCopyBytes = size_t(1) << 30;
constexpr int kCopies = 10;
constexpr int kReplays = 30;
constexpr int64_t kBeyondCaches = 4;  // times L2: all layers of a graph together, at least
constexpr int64_t kLeastLayers = 16;

class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    require(cudaMalloc(&data_, bytes), "cudaMalloc");
    require(cudaMemset(data_, 0, bytes), "cudaMemset");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

class Clock {
 public:
  explicit Clock(cudaStream_t stream) : stream_(stream) {
    require(cudaEventCreate(&begin_), "cudaEventCreate");
    require(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~Clock() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Clock(const Clock&) = delete;
  Clock& operator=(const Clock&) = delete;

  double seconds(const std::function<void()>& enqueue) {
    require(cudaEventRecord(begin_, stream_), "cudaEventRecord");
    enqueue();
    require(cudaEventRecord(end_, stream_), "cudaEventRecord");
    require(cudaEventSynchronize(end_), "the kernels");
    float milliseconds = 0.0f;
    require(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    return 1e-3 * milliseconds;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
};

double copy_rate(cudaStream_t stream) {
  const Buffer from(kCopyBytes), to(kCopyBytes);
  Clock clock(stream);
  double best = 1e9;
  for (int i = 0; i < kCopies; ++i) {
    best = std::min(best, clock.seconds([&] {
      require(cudaMemcpyAsync(to.data(), from.data(), kCopyBytes, cudaMemcpyDeviceToDevice, stream),
              "cudaMemcpyAsync");
    }));
  }
  return 2.0 * double(kCopyBytes) / best;
}

struct Case {
  const char* op;
  Shape shape;
  int64_t bytes;  // that one layer must read and write
  double flops;   // multiplications and additions of one layer that tensor cores could do, or 0
  // Launches it on a layer, with the workspace of that size.
  std::function<cudaError_t(const DeviceLayer&, void*, cudaStream_t)> launch;
  std::function<int64_t(const DeviceLayer&)> workspace;
};

// Layers, and the graph that launches a case on each in turn.
class Graph {
 public:
  // The host's layer must outlive it.
  Graph(const Case& c, const Layer& host, int64_t layers, cudaStream_t stream) : stream_(stream) {
    layers_.push_back(std::make_unique<DeviceLayer>(host));
    for (int64_t i = 1; i < layers; ++i) {
      layers_.push_back(std::make_unique<DeviceLayer>(host, *layers_[0]));
    }
    workspace_ = std::make_unique<Buffer>(size_t(c.workspace ? c.workspace(*layers_[0]) : 0));
    {  // Once outside: a kernel is loaded at its first launch, and its failure is then its own.
      const DeviceLayer first(host, *layers_[0]);
      require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
      require(c.launch(first, workspace_->data(), stream), c.op);
      require(cudaDeviceSynchronize(), c.op);
    }
    cudaGraph_t graph = nullptr;
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    for (const auto& layer : layers_) {
      require(c.launch(*layer, workspace_->data(), stream), c.op);
    }
    require(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    size_t nodes = 0;
    require(cudaGraphGetNodes(graph, nullptr, &nodes), "cudaGraphGetNodes");
    launches_ = double(nodes) / double(layers);
    require(cudaGraphInstantiate(&graph_, graph, 0), "cudaGraphInstantiate");
    require(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }
  ~Graph() { cudaGraphExecDestroy(graph_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void replay() const { require(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch"); }
  double launches() const { return launches_; }  // of a layer
  const DeviceLayer& layer(int64_t i) const { return *layers_[size_t(i)]; }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
  double launches_ = 0.0;
  std::vector<std::unique_ptr<DeviceLayer>> layers_;
  std::unique_ptr<Buffer> workspace_;
};

Case decode_step(const Shape& s, bool dependent) {
  return {dependent ? "decode_step, dependent" : "decode_step",
          s,
          step_bytes(s),
          0.0,
          [dependent](const DeviceLayer& layer, void* workspace, cudaStream_t stream) {
            DecodeStepParams p = layer.decode_step(workspace);
            p.spec.dependent = dependent;
            return cuda::decode_step(p, stream);
          },
          [](const DeviceLayer& layer) {
            return cuda::decode_step_workspace(layer.decode_step(nullptr));
          }};
}

Case chunk_attention(const Shape& s) {
  // k and v of slots and call, q and out, H and z, the scores.
  const int64_t bytes = 2 * s.B * s.K * (s.S + s.T) * s.D * bytes_of(s.slots) +
                        2 * s.B * s.Q * s.T * s.D * bytes_of(s.model) +
                        4 * s.B * s.K * s.R * (s.D + 1) + 4 * s.B * s.Q * s.T * (s.R + 1) +
                        4 * s.B * s.K * (4 * s.S + s.T);
  // q k and p v, over the slots and half of the call.
  const double flops = 4.0 * double(s.B * s.Q * s.T * s.D) * (double(s.S) + 0.5 * double(s.T));
  return {"chunk_attention",
          s,
          bytes,
          flops,
          [](const DeviceLayer& layer, void* workspace, cudaStream_t stream) {
            return cuda::chunk_attention(layer.chunk_attention(workspace), stream);
          },
          [](const DeviceLayer& layer) {
            return cuda::chunk_attention_workspace(layer.chunk_attention(nullptr));
          }};
}

Case prompt_scores(const Shape& s) {
  const int64_t bytes = s.B * s.Q * s.T * (s.D * bytes_of(s.model) + 4) +
                        s.B * s.K * s.T * (s.D * bytes_of(s.slots) + 4);
  // q k twice, for the sums and for the scores, over half of the prompt.
  const double flops = 2.0 * double(s.B * s.Q * s.T * s.D) * double(s.T);
  return {"prompt_scores",
          s,
          bytes,
          flops,
          [](const DeviceLayer& layer, void* workspace, cudaStream_t stream) {
            return cuda::prompt_scores(layer.prompt_scores(workspace), stream);
          },
          [](const DeviceLayer& layer) {
            return cuda::prompt_scores_workspace(layer.prompt_scores(nullptr));
          }};
}

Case compact(const Shape& s) {
  // k and v of the call read, as many slots written, H and z read and written, what ranks them.
  const int64_t bytes = 2 * s.B * s.K * (s.T + std::min(s.S, s.T)) * s.D * bytes_of(s.slots) +
                        8 * s.B * s.K * s.R * (s.D + 1) + 4 * s.B * s.K * (6 * s.S + s.T) +
                        s.K * bytes_of(s.maps) * s.E * (s.D + s.R);
  return {"compact",
          s,
          bytes,
          0.0,
          [](const DeviceLayer& layer, void* workspace, cudaStream_t stream) {
            return cuda::compact(layer.compact(workspace), stream);
          },
          [](const DeviceLayer& layer) { return cuda::compact_workspace(layer.compact(nullptr)); }};
}

Case feature_map(const Shape& s) {
  const int64_t bytes = s.Q * bytes_of(s.maps) * s.E * (s.D + s.R) +
                        s.B * s.Q * s.T * (s.D * bytes_of(s.model) + 4 * s.R);
  const double flops = 2.0 * double(s.B * s.Q * s.T * s.E * (s.D + s.R));
  return {"feature_map",
          s,
          bytes,
          flops,
          [](const DeviceLayer& layer, void*, cudaStream_t stream) {
            return cuda::feature_map(layer.phi(), stream);
          },
          nullptr};
}

Case fold(const Shape& s) {
  const int64_t bytes =
      s.B * s.K * (8 * s.R * (s.D + 1) + s.T * (4 * s.R + s.D * bytes_of(s.slots)));
  return {"fold",
          s,
          bytes,
          0.0,
          [](const DeviceLayer& layer, void*, cudaStream_t stream) {
            return cuda::fold(layer.fold(), stream);
          },
          nullptr};
}

Case quantize(const Shape& s) {
  const int64_t bytes = s.B * s.K * s.T * (s.D * (bytes_of(s.slots) + 1) + 4);
  return {"quantize",
          s,
          bytes,
          0.0,
          [](const DeviceLayer& layer, void*, cudaStream_t stream) {
            return cuda::quantize(layer.quantize(DType::fp8), stream);
          },
          nullptr};
}

std::vector<Case> cases(bool small, bool dependent) {
  Shape llama2{.name = "llama-2-7b", .Q = 32, .K = 32, .D = 128, .S = 205};
  Shape llama3{.name = "llama-3-8b", .Q = 32, .K = 8, .D = 128, .S = 205};
  if (small) {
    llama2 = {.name = "small-mha", .Q = 2, .K = 2, .D = 64, .S = 37};
    llama3 = {.name = "small-gqa", .Q = 8, .K = 2, .D = 128, .S = 70};
  }
  std::vector<Case> all;
  const std::vector<int64_t> batches =
      small ? std::vector<int64_t>{1, 3} : std::vector<int64_t>{1, 8, 64};
  for (Shape shape : {llama2, llama3}) {
    shape.maps = DType::fp16;
    for (int64_t B : batches) {
      shape.B = B;
      for (DType slots : {DType::fp16, DType::bf16, DType::i8, DType::fp8, DType::f32}) {
        Shape step = shape;
        step.slots = slots;
        all.push_back(decode_step(step, dependent));
      }
      if (dependent) continue;
      Shape chunk = shape;
      chunk.T = small ? 19 : B == 64 ? 128 : 1024;
      all.push_back(chunk_attention(chunk));
      all.push_back(prompt_scores(chunk));
      all.push_back(compact(chunk));
      all.push_back(feature_map(chunk));
      all.push_back(fold(chunk));
      all.push_back(quantize(chunk));
    }
  }
  return all;
}

void print_row(const Case& c, const Graph& graph, int64_t layers, double best, double median,
               double copy) {
  const double rate = double(c.bytes) / best;
  std::printf(
      "{\"part\": \"kernels\", \"op\": \"%s\", \"shape\": \"%s\", \"B\": %lld, \"C\": %lld, "
      "\"T\": %lld, \"slots\": \"%s\", \"layers\": %lld, \"launches\": %.2f, \"best\": %.4g, "
      "\"median\": %.4g, \"bytes\": %lld, \"flops\": %.4g, \"copy\": %.4g, \"share\": %.4f}\n",
      c.op, c.shape.name, (long long)c.shape.B, (long long)c.shape.S, (long long)c.shape.T,
      name(c.shape.slots), (long long)layers, graph.launches(), best, median, (long long)c.bytes,
      c.flops, copy, copy > 0.0 ? rate / copy : 0.0);
  std::fflush(stdout);
}

void measure(const Case& c, const Layer& host, bool small, double copy, int64_t l2,
             cudaStream_t stream) {
  const int64_t enough = (kBeyondCaches * l2 + c.bytes - 1) / c.bytes;
  const int64_t layers = small ? 2 : std::max(kLeastLayers, enough);
  const Graph graph(c, host, layers, stream);
  const Buffer cleaner(size_t(2 * l2)), sink(16);
  Clock clock(stream);
  std::vector<double> times;
  graph.replay();
  for (int i = 0; i < (small ? 1 : kReplays); ++i) {
    require(flush(cleaner.data(), cleaner.bytes(), static_cast<float*>(sink.data()), stream),
            "flush");
    times.push_back(clock.seconds([&] { graph.replay(); }) / double(layers));
  }
  std::sort(times.begin(), times.end());
  print_row(c, graph, layers, times.front(), times[times.size() / 2], copy);
}

// Ends the program where the graph's steps have not all counted their token.
void require_seen(const DeviceLayer& layer, int64_t want) {
  const DecodeStepParams p = layer.decode_step(nullptr);
  for (int64_t b = 0; b < p.B; ++b) {
    int64_t got = 0;
    require(cudaMemcpy(&got, seen(page(p.pool, b)), sizeof got, cudaMemcpyDeviceToHost),
            "cudaMemcpy");
    if (got == want) continue;
    std::fprintf(stderr, "less_gpu: --soak: a row has seen %lld tokens, wanted %lld\n",
                 (long long)got, (long long)want);
    std::exit(1);
  }
}

void soak(int64_t replays, bool dependent, cudaStream_t stream) {
  Shape shape{.name = "llama-3-8b", .Q = 32, .K = 8, .D = 128, .S = 205};
  shape.B = 2;
  shape.maps = DType::fp16;
  constexpr int64_t kLayers = 2;
  const Pools memory(shape, 1);
  const Layer host(shape, 0, memory.of(0));
  const Graph graph(decode_step(shape, dependent), host, kLayers, stream);
  Clock clock(stream);
  const double seconds = clock.seconds([&] {
    for (int64_t i = 0; i < replays; ++i) graph.replay();
  });
  for (int64_t i = 0; i < kLayers; ++i) require_seen(graph.layer(i), shape.S + replays);
  std::printf("{\"part\": \"soak\", \"replays\": %lld, \"seconds\": %.4g}\n", (long long)replays,
              seconds);
}

int run(int argc, char** argv) {
  bool small = false, dependent = false;
  int64_t replays = 0;
  std::string op;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--small") == 0) {
      small = true;
    } else if (std::strcmp(argv[i], "--op") == 0 && i + 1 < argc) {
      op = argv[++i];
    } else if (std::strcmp(argv[i], "--dependent") == 0) {
      dependent = true;
    } else if (std::strcmp(argv[i], "--soak") == 0 && i + 1 < argc) {
      replays = std::atoll(argv[++i]);
    } else if (std::strcmp(argv[i], "--help") == 0) {
      std::fputs(kUsage, stdout);
      return 0;
    } else {
      std::fputs(kUsage, stderr);
      return 2;
    }
  }
  std::vector<Case> all = cases(small, dependent);
  if (!op.empty()) std::erase_if(all, [&](const Case& c) { return op != c.op; });
  if (all.empty()) {
    std::fprintf(stderr, "less_gpu: --op: there is no op %s\n", op.c_str());
    return 2;
  }
  int device = 0, l2 = 0;
  cudaDeviceProp properties;
  require(cudaGetDevice(&device), "cudaGetDevice");
  require(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  require(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device), "cudaDeviceGetAttribute");
  cudaStream_t stream;
  require(cudaStreamCreate(&stream), "cudaStreamCreate");
  const double copy = small ? 0.0 : copy_rate(stream);
  std::printf(
      "{\"part\": \"device\", \"gpu\": \"%s\", \"capability\": \"%d.%d\", \"l2\": %d, "
      "\"copy\": %.4g}\n",
      properties.name, properties.major, properties.minor, l2, copy);
  std::fflush(stdout);
  if (replays > 0) {
    soak(replays, dependent, stream);
  } else {
    // Shared by the cases of a shape: its numbers take seconds.
    std::unique_ptr<Pools> memory;
    std::unique_ptr<Layer> host;
    for (const Case& c : all) {
      if (host == nullptr || host->shape() != c.shape) {
        memory = std::make_unique<Pools>(c.shape, 1);
        host = std::make_unique<Layer>(c.shape, 0, memory->of(0));
      }
      measure(c, *host, small, copy, l2, stream);
    }
  }
  require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return 0;
}

}  // namespace
}  // namespace less::bench

int main(int argc, char** argv) { return less::bench::run(argc, argv); }
