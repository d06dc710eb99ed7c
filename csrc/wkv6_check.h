// What the operator does on every device before a kernel runs: checks of the arguments, and tensors as kernels see them.
#pragma once

#include <ATen/core/Tensor.h>

#include "wkv6_problem.h"

namespace visualrwkv {

using at::Tensor;

inline void check_rows(const char* name, const Tensor& x, const Tensor& r) {
  TORCH_CHECK_VALUE(x.sizes() == r.sizes(), name, " has shape ", x.sizes(), " but r has shape ", r.sizes());
  TORCH_CHECK_VALUE(x.device() == r.device(), name, " is on ", x.device(), " but r is on ", r.device());
  TORCH_CHECK_VALUE(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble || x.scalar_type() == at::kBFloat16 ||
          x.scalar_type() == at::kHalf,
      name, " has dtype ", x.scalar_type(), "; a floating point dtype of 16, 32 or 64 bits is needed");
}

// The type of the state and of all arithmetic: double if an argument is, else float.
inline at::ScalarType compute_type(at::ArrayRef<Tensor> tensors) {
  for (const Tensor& x : tensors)
    if (x.defined() && x.scalar_type() == at::kDouble) return at::kDouble;
  return at::kFloat;
}

inline void check(
    const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, const Tensor& state) {
  TORCH_CHECK_VALUE(r.dim() == 4, "r must have shape (batch, time, heads, head_size), got ", r.sizes());
  check_rows("r", r, r);
  check_rows("k", k, r);
  check_rows("v", v, r);
  check_rows("w", w, r);
  TORCH_CHECK_VALUE(r.size(1) >= 1, "r has shape ", r.sizes(), ": at least one time step is needed");
  TORCH_CHECK_VALUE(
      u.sizes() == at::IntArrayRef({r.size(2), r.size(3)}), "u has shape ", u.sizes(), " but r has shape ", r.sizes());
  if (state.defined())
    TORCH_CHECK_VALUE(
        state.sizes() == at::IntArrayRef({r.size(0), r.size(2), r.size(3), r.size(3)}), "state has shape ",
        state.sizes(), " but r has shape ", r.sizes());
}

// The gradients given to the backward pass: of y and of the final state.
inline void check_gradients(const Tensor& dy, const Tensor& dfinal, const Tensor& r) {
  if (dy.defined()) check_rows("dy", dy, r);
  if (dfinal.defined())
    TORCH_CHECK_VALUE(
        dfinal.sizes() == at::IntArrayRef({r.size(0), r.size(2), r.size(3), r.size(3)}), "dfinal has shape ",
        dfinal.sizes(), " but r has shape ", r.sizes());
}

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return Type::f64;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: return Type::f32;
  }
}

inline Rows rows_of(const Tensor& x) {
  if (!x.defined()) return Rows{};
  return Rows{static_cast<char*>(x.data_ptr()), type_of(x), x.stride(0), x.stride(1), x.stride(2)};
}

// Rows need to be contiguous along the last axis only.
inline Tensor with_dense_rows(const Tensor& x) {
  return !x.defined() || x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous();
}

inline Tensor dense(const Tensor& x, at::ScalarType type) { return x.defined() ? x.to(type).contiguous() : x; }

template <typename T>
T* pointer(const Tensor& x) {
  return x.defined() ? x.mutable_data_ptr<T>() : nullptr;
}

template <typename T>
void set_problem(
    Problem<T>& p, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
    const Tensor& state) {
  p.batch = r.size(0);
  p.time = r.size(1);
  p.heads = r.size(2);
  p.size = r.size(3);
  p.r = rows_of(r);
  p.k = rows_of(k);
  p.v = rows_of(v);
  p.w = rows_of(w);
  p.u = pointer<T>(u);
  p.state = pointer<T>(state);
}

}  // namespace visualrwkv
