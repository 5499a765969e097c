// less::rotate: schema and checks; see ops/library.h.
#include "ops/layer.h"
#include "ops/library.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "rotate";

Tensor rotate(Tensor x, OptionalTensor valid, Tensor maps, Tensor layer, int64_t rotation) {
  check_dim(kOp, "x", x, 4, "[B, heads, T, D]");
  const DType x_dtype = slot_dtype(kOp, "x", x);
  const LayerArguments of = read_layer(kOp, layer);
  if (rotation < 0 || rotation > int64_t(Rotation::rounded_query)) {
    fail(kOp, ": rotation must be in 0 .. 4, got ", rotation);
  }
  const Rotation which = Rotation(rotation);
  const bool queries = which != Rotation::key && which != Rotation::value;
  const int64_t B = x.size(0), T = x.size(2), D = of.spec.D, K = of.spec.K;
  const int64_t heads = queries ? of.spec.Q : K;
  const Arguments arguments{kOp, "x", x};
  const HeadRows rows = head_rows(arguments, "x", x, x_dtype, {B, heads, T, D});
  arguments.check("valid", valid, ScalarType::Bool, {B, T});
  const Space space = read_maps(arguments, of, maps).space;
  if (space.key_mean == nullptr) fail(kOp, ": layer must have a space");
  Tensor y = arguments.output("y", ScalarType::Float, {B, heads, T, D});
  const RotateParams params{
      .space = space,
      .x = rows,
      .y = y.mutable_data_ptr<float>(),
      .valid = valid ? valid->const_data_ptr<bool>() : nullptr,
      .rotation = which,
      .B = B,
      .heads = heads,
      .K = K,
      .T = T,
      .D = D,
  };
#ifdef LESS_LAUNCHES
  check_row_dim(kOp, "x", D);
  launch(arguments, cuda::rotate, params, {{"x", x}});
#else
  torch::stable::parallel_for(0, B * heads * T, grain(8 * D),
                              [&](int64_t begin, int64_t end) { cpu::rotate(params, begin, end); });
#endif
  return y;
}

}  // namespace
}  // namespace less::ops

LESS_OP(rotate,
        "rotate(Tensor x, Tensor? valid, Tensor maps, Tensor layer, int rotation) -> Tensor")
