// The kernels of csrc/cpu under Google Benchmark, one thread: `make bench-cpp`.
//
// A case rotates over so many layers that their slots come from memory, as in a real decode, and
// not from the last cache. Repetitions of all cases are shuffled into one another, each beside a
// measurement of what the core can read; minima of time and the best of those reads count.
#include "cpu/kernels.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "allocations.h"
#include "head_at_a_time.h"
#include "layer.h"
#include "read.h"

namespace less::bench {
namespace {

constexpr int64_t kLeastLayers = 24;
constexpr int64_t kBeyondCaches = int64_t(128) << 20;  // bytes of all layers together, at least
constexpr size_t kReadBytes = size_t(512) << 20;

using Run = std::function<void(Layer&)>;

void decode(Layer& layer, Victim victim) {
  const Shape& s = layer.shape();
  cpu::decode_step(layer.decode_step(victim), 0, s.B * s.K);
  if (victim != Victim::none) layer.advance();
}

void chunk(Layer& layer) {
  const ChunkAttentionParams p = layer.chunk_attention();
  cpu::chunk_attention(p, 0, p.B * p.spec.K * p.strips);
  cpu::chunk_scores(p, 0, p.B * p.spec.K);
}

void measure(::benchmark::State& state, const Shape& shape, const Run& run, bool slots) {
  static const std::vector<std::byte> buffer(kReadBytes, std::byte{1});
  const int64_t each = step_bytes(shape);
  const int64_t count = std::max(kLeastLayers, (kBeyondCaches + each - 1) / each);
  const Pools pools(shape, count);
  std::vector<std::unique_ptr<Layer>> layers;
  for (int64_t i = 0; i < count; ++i) {
    layers.push_back(std::make_unique<Layer>(shape, i, pools.of(i)));
  }
  const ReadRate rate = read_rate(buffer.data(), buffer.size());
  for (const auto& layer : layers) run(*layer);
  const int64_t before = allocations();
  size_t next = 0;
  for (auto _ : state) {
    run(*layers[next]);
    next = next + 1 == layers.size() ? 0 : next + 1;
  }
  const int64_t made = allocations() - before;
  state.counters["allocations"] = double(made);
  state.counters["layers"] = double(count);
  state.counters["read"] = rate.best;
  state.counters["stream"] = rate.stream;
  state.counters["bytes"] = double(slots ? slot_bytes(layers[0]->shape()) : 0);
}

void add(const std::string& what, const Shape& s, Run run, bool slots) {
  std::string text = what + "/" + s.name + "/C" + std::to_string(s.S) + "/" + name(s.slots);
  if (s.R > 0) text += "/maps_" + std::string(name(s.maps));
  if (s.T > 1) text += "/T" + std::to_string(s.T);
  if (!s.huge_pages) text += "/small_pages";
  ::benchmark::RegisterBenchmark(text.c_str(), [=](::benchmark::State& state) {
    measure(state, s, run, slots);
  })->Unit(::benchmark::kMicrosecond);
}

const Run kStep = [](Layer& layer) { decode(layer, Victim::fold); };
const Run kMerge = [](Layer& layer) { decode(layer, Victim::merge); };
const Run kAttention = [](Layer& layer) { decode(layer, Victim::none); };

void register_all() {
  const Shape llama2{.name = "llama-2-7b", .Q = 32, .K = 32, .D = 128, .S = 205};
  const Shape llama3{.name = "llama-3-8b", .Q = 32, .K = 8, .D = 128, .S = 205};
  const Shape smollm2{.name = "smollm2", .Q = 9, .K = 3, .D = 64, .S = 205};
  for (const Shape& model : {llama2, llama3, smollm2}) {
    for (DType slots : {DType::f32, DType::bf16, DType::fp16, DType::i8}) {
      Shape s = model;
      s.slots = slots;
      s.model = slots == DType::i8 ? DType::fp16 : slots;
      s.R = 0;
      add("decode_step", s, kStep, true);
      add("attention_alone", s, kAttention, true);
    }
    for (DType maps : {DType::f32, DType::fp16, DType::i8}) {
      Shape s = model;
      s.maps = maps;
      add("decode_step", s, kStep, true);
    }
    for (DType slots : {DType::fp16, DType::b4}) {
      Shape s = model;
      s.slots = slots;
      s.model = DType::fp16;
      s.R = 0;
      if (slots == DType::b4) add("decode_step", s, kStep, true);
      add("merging_step", s, kMerge, true);
    }
    for (int64_t S : {410, 820}) {
      Shape s = model;
      s.S = S;
      s.R = 0;
      add("decode_step", s, kStep, true);
    }
  }
  for (int64_t S : {205, 820}) {
    Shape s = llama2;
    s.S = S;
    s.R = 0;
    s.huge_pages = false;
    add("decode_step", s, kStep, true);
  }
  for (const Shape& model : {llama3, smollm2}) {
    Shape s = model;
    s.R = 0;
    add(
        "head_at_a_time", s, [](Layer& layer) { head_at_a_time(layer.decode_step(Victim::none)); },
        true);
    add(
        "online_attention", s,
        [](Layer& layer) {
          cpu::online_attention(layer.decode_step(Victim::none), 0, layer.shape().Q);
        },
        true);
  }
  for (const Shape& model : {llama2, llama3, smollm2}) {
    add(
        "feature_map", model,
        [](Layer& layer) { cpu::feature_map(layer.phi(), 0, layer.shape().Q); }, false);
    for (int64_t T : {1, 512}) {
      Shape s = model;
      s.T = T;
      add("fold", s, [](Layer& layer) { cpu::fold(layer.fold(), 0, layer.shape().K); }, false);
      add(
          "compact", s,
          [](Layer& layer) {
            cpu::compact(layer.compact(), 0, layer.shape().K);
            if (layer.shape().T > 1) {
              layer.rewind();
            } else {
              layer.advance();
            }
          },
          false);
    }
    Shape s = model;
    s.T = 512;
    add("chunk_attention", s, [](Layer& layer) { chunk(layer); }, false);
  }
}

// One row per case: the fastest repetition, against the best read of all repetitions.
class Table : public ::benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override { return true; }

  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      if (run.run_type != Run::RT_Iteration) continue;
      const std::string name = run.run_name.function_name;
      if (rows_.count(name) == 0) order_.push_back(name);
      Row& row = rows_[name];
      const double seconds = run.GetAdjustedRealTime() * 1e-6;
      row.seconds.push_back(seconds);
      row.bytes = run.counters.at("bytes");
      row.layers = run.counters.at("layers");
      row.allocations = std::max<double>(row.allocations, run.counters.at("allocations"));
      read_ = std::max<double>(read_, run.counters.at("read"));
      stream_ = std::max<double>(stream_, run.counters.at("stream"));
    }
  }

  void Finalize() override {
    std::printf("# one core reads %.1f GB/s, from one sequential stream %.1f; SIMD level %s\n",
                read_ / 1e9, stream_ / 1e9, cpu::name(cpu::level()));
    std::printf("%-58s %9s %9s %7s %7s %6s %6s\n", "kernel", "us, min", "median", "GB/s", "of read",
                "layers", "allocs");
    for (const std::string& name : order_) {
      Row& row = rows_[name];
      std::sort(row.seconds.begin(), row.seconds.end());
      const double best = row.seconds.front(), median = row.seconds[row.seconds.size() / 2];
      std::printf("%-58s %9.2f %9.2f", name.c_str(), best * 1e6, median * 1e6);
      if (row.bytes > 0) {
        std::printf(" %7.2f %6.0f%%", row.bytes / best / 1e9, 100 * row.bytes / best / read_);
      } else {
        std::printf(" %7s %7s", "", "");
      }
      std::printf(" %6.0f %6.0f\n", row.layers, row.allocations);
    }
  }

 private:
  struct Row {
    std::vector<double> seconds;
    double bytes = 0, layers = 0, allocations = 0;
  };
  std::map<std::string, Row> rows_;
  std::vector<std::string> order_;
  double read_ = 0, stream_ = 0;
};

}  // namespace
}  // namespace less::bench

int main(int argc, char** argv) {
  // Ours first: what the user says of the same flag comes later and wins.
  std::vector<std::string> defaults = {"--benchmark_repetitions=9", "--benchmark_min_time=0.03",
                                       "--benchmark_enable_random_interleaving=true"};
  std::vector<char*> words = {argv[0]};
  for (std::string& word : defaults) words.push_back(word.data());
  words.insert(words.end(), argv + 1, argv + argc);
  int count = int(words.size());
  words.push_back(nullptr);
  ::benchmark::Initialize(&count, words.data());
  if (::benchmark::ReportUnrecognizedArguments(count, words.data())) return 1;
  less::bench::register_all();
  less::bench::Table table;
  return ::benchmark::RunSpecifiedBenchmarks(&table) == 0;
}
