// Checks of a layer's slots, shared by the ops that read or write them.
#pragma once

#include "ops/check.h"

namespace less::ops {

// The slots [B, K, S, D] of a layer on the device of `first`; S is what slot_k says. The scales
// belong to int8 slots, and to them alone.
inline Slots check_slots(const char* op, const char* first_name, const Tensor& first, int64_t B,
                         int64_t K, int64_t D, const Tensor& slot_k, const Tensor& slot_v,
                         const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                         const Tensor& position, const Tensor& score, const Tensor& weight) {
  check_dim(op, "slot_k", slot_k, 4, "[B, K, S, D]");
  const int64_t S = slot_k.size(2);
  const ScalarType type = slot_k.scalar_type();
  if (bool(k_scale) != bool(v_scale)) fail(op, ": k_scale and v_scale must be given together");
  if (!k_scale && type == ScalarType::Char) {
    fail(op, ": k_scale and v_scale must be given with int8 slots");
  }
  if (k_scale && type != ScalarType::Char) {
    fail(op, ": k_scale and v_scale belong to int8 slots alone, got ", dtype_name(type));
  }
  const DType dtype = k_scale ? DType::i8 : slot_dtype(op, "slot_k", slot_k);
  check(op, "slot_k", slot_k, type, {B, K, S, D});
  check(op, "slot_v", slot_v, type, {B, K, S, D});
  check(op, "position", position, ScalarType::Int, {B, K, S});
  check(op, "score", score, ScalarType::Float, {B, K, S});
  check(op, "weight", weight, ScalarType::Float, {B, K, S});
  check_device(op, "slot_k", slot_k, first_name, first);
  check_device(op, "slot_v", slot_v, first_name, first);
  check_device(op, "position", position, first_name, first);
  check_device(op, "score", score, first_name, first);
  check_device(op, "weight", weight, first_name, first);
  if (k_scale) {
    check(op, "k_scale", *k_scale, ScalarType::Float, {B, K, S});
    check(op, "v_scale", *v_scale, ScalarType::Float, {B, K, S});
    check_device(op, "k_scale", *k_scale, first_name, first);
    check_device(op, "v_scale", *v_scale, first_name, first);
  }
  return Slots{
      .k = slot_k.mutable_data_ptr(),
      .v = slot_v.mutable_data_ptr(),
      .k_scale = k_scale ? k_scale->mutable_data_ptr<float>() : nullptr,
      .v_scale = v_scale ? v_scale->mutable_data_ptr<float>() : nullptr,
      .position = position.mutable_data_ptr<int32_t>(),
      .score = score.mutable_data_ptr<float>(),
      .weight = weight.mutable_data_ptr<float>(),
      .dtype = dtype,
      .S = S,
  };
}

// The k, v [B, K, T, D] of a call, of the slots' dtype, with the scales of int8 rows.
inline void check_rows(const char* op, const char* first_name, const Tensor& first, int64_t B,
                       int64_t K, int64_t T, int64_t D, const Tensor& slot_k, const Tensor& k,
                       const Tensor& v, const OptionalTensor& k_scale,
                       const OptionalTensor& v_scale) {
  check(op, "k", k, slot_k.scalar_type(), {B, K, T, D});
  check(op, "v", v, slot_k.scalar_type(), {B, K, T, D});
  check_device(op, "k", k, first_name, first);
  check_device(op, "v", v, first_name, first);
  const bool wanted = slot_k.scalar_type() == ScalarType::Char;
  if (bool(k_scale) != wanted || bool(v_scale) != wanted) {
    fail(op, ": chunk_k_scale and chunk_v_scale belong to int8 slots, and must be given with them");
  }
  if (!wanted) return;
  check(op, "chunk_k_scale", *k_scale, ScalarType::Float, {B, K, T});
  check(op, "chunk_v_scale", *v_scale, ScalarType::Float, {B, K, T});
  check_device(op, "chunk_k_scale", *k_scale, first_name, first);
  check_device(op, "chunk_v_scale", *v_scale, first_name, first);
}

}  // namespace less::ops
