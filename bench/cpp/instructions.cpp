// Each kernel once, at a fixed shape, for callgrind to count its instructions.
//
// Prints the compiler. bench/instructions.py runs this under valgrind and holds the counts against
// those committed. A case runs once before it counts, so that scratch is there and lazy binding is
// done.
#include <valgrind/callgrind.h>

#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "layer.h"

namespace less::bench {
namespace {

void count(const std::string& name, const Shape& shape, const std::function<void(Layer&)>& run) {
  const Pools pools(shape, 1);
  Layer layer(shape, 0, pools.of(0));
  run(layer);
  CALLGRIND_ZERO_STATS;
  CALLGRIND_TOGGLE_COLLECT;
  run(layer);
  CALLGRIND_TOGGLE_COLLECT;
  CALLGRIND_DUMP_STATS_AT(name.c_str());
}

void step(Layer& layer, Victim victim) {
  const DecodeStepParams p = layer.decode_step(victim);
  cpu::decode_step(p, 0, p.B * p.spec.K);
  layer.advance();
}

void decode(Layer& layer) { step(layer, Victim::fold); }
void forget(Layer& layer) { step(layer, Victim::forget); }
void merge(Layer& layer) { step(layer, Victim::merge); }

void chunk(Layer& layer) {
  const ChunkAttentionParams p = layer.chunk_attention();
  cpu::chunk_attention(p, 0, p.B * p.spec.K * p.strips);
  cpu::chunk_scores(p, 0, p.B * p.spec.K);
}

void compact(Layer& layer) {
  layer.rewind();
  const CompactParams p = layer.compact();
  cpu::compact(p, 0, p.B * p.spec.K);
}

void feature_map(Layer& layer) {
  const FeatureMapParams p = layer.phi();
  cpu::feature_map(p, 0, p.B * p.heads * p.T);
}

void fold(Layer& layer) {
  const FoldParams p = layer.fold();
  cpu::fold(p, 0, p.heads);
}

void count_all() {
  // Two kv heads of Llama-2-7B, two of Llama-3-8B, all three of SmolLM2: a layer's count is a
  // multiple of these.
  const Shape llama2{.name = "llama-2", .Q = 2, .K = 2, .D = 128, .S = 205, .R = 0};
  const Shape llama3{.name = "llama-3", .Q = 8, .K = 2, .D = 128, .S = 205, .R = 0};
  const Shape smollm2{.name = "smollm2", .Q = 9, .K = 3, .D = 64, .S = 205, .R = 0};
  for (const Shape& shape : {llama2, llama3, smollm2}) {
    for (DType slots : {DType::f32, DType::bf16, DType::fp16, DType::i8}) {
      Shape s = shape;
      s.slots = slots;
      count(std::string("decode_step ") + s.name + " " + name(slots), s, decode);
    }
    for (DType maps : {DType::f32, DType::fp16, DType::i8}) {
      Shape s = shape;
      s.R = 8;
      s.maps = maps;
      count(std::string("decode_step ") + s.name + " float16 maps " + name(maps), s, decode);
    }
    Shape s = shape;
    s.R = 8;
    s.T = 64;
    count(std::string("chunk_attention ") + s.name + " float16 T=64", s, chunk);
    count(std::string("compact ") + s.name + " float16 T=64", s, compact);
    count(std::string("fold ") + s.name + " float16 N=64", s, fold);
    count(std::string("feature_map ") + s.name + " float16 T=64", s, feature_map);
  }
  for (DType slots : {DType::fp16, DType::i8, DType::b4}) {
    for (int64_t S : {220, 745}) {
      Shape s = smollm2;
      s.slots = slots;
      s.S = S;
      const std::string step =
          std::string("decode_step ") + s.name + " " + name(slots) + " S=" + std::to_string(S);
      count(step + " forget", s, forget);
      count(step + " merge", s, merge);
    }
  }
}

}  // namespace
}  // namespace less::bench

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: less_instructions LEVEL\n");
    return 2;
  }
  try {
    less::cpu::set_level(argv[1]);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "less_instructions: %s\n", error.what());
    return 2;
  }
  std::printf("compiler %s\n", LESS_COMPILER);
  less::bench::count_all();
  return 0;
}
