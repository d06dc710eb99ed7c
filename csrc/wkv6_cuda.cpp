// The CUDA side of the operator: memory, device and stream. The schema and what it means stand in wkv6.cpp.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "wkv6_check.h"
#include "wkv6_cuda.h"

namespace visualrwkv {
namespace {

void check_cuda(const Tensor& r, at::ArrayRef<Tensor> others) {
  TORCH_CHECK_VALUE(
      cuda::has_kernels(r.size(3)), "r has shape ", r.sizes(), ": the CUDA kernels are for heads of 32, 64 and 128");
  for (const Tensor& x : others)
    if (x.defined())
      TORCH_CHECK_VALUE(x.device() == r.device(), "u or a state is on ", x.device(), " but r is on ", r.device());
}

void check_single(at::ArrayRef<Tensor> tensors) {
  TORCH_CHECK_VALUE(compute_type(tensors) == at::kFloat, "the CUDA kernels do not take float64");
}

// In float, dense, and where 16 bytes can be read at once.
Tensor aligned(const Tensor& x) {
  const Tensor y = dense(x, at::kFloat);
  return !y.defined() || reinterpret_cast<uintptr_t>(y.data_ptr()) % 16 == 0 ? y : y.clone();
}

int multiprocessors(const Tensor& r) {
  int count = 0;
  const auto error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, r.get_device());
  TORCH_CHECK(error == cudaSuccess, "wkv6: ", cudaGetErrorString(error));
  return count;
}

Tensor scratch(const Tensor& r, at::IntArrayRef sizes) { return at::empty(sizes, r.options().dtype(at::kFloat)); }

// y; the state after the last token goes to `final_state`, which may be the state itself: a block reads its part of it
// before it writes there, and nobody else does.
Tensor run_forward(
    const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_, const Tensor& u_, const Tensor& state,
    const Tensor& final_state) {
  const Tensor r = with_dense_rows(r_), k = with_dense_rows(k_), v = with_dense_rows(v_), w = with_dense_rows(w_);
  const Tensor u = dense(u_, at::kFloat), y = at::empty(r.sizes(), r.options());
  cuda::ForwardProblem p;
  set_problem<float>(p, r, k, v, w, u, state);
  const int count = multiprocessors(r);
  p.plan = cuda::make_plan(p, Rows{}, count);
  p.y = rows_of(y);
  p.final_state = pointer<float>(final_state);
  Tensor states, decays;
  if (p.plan.segments > 1) {
    states = scratch(r, {p.plan.matrices, p.plan.segments, p.size, p.size});
    decays = scratch(r, {p.plan.matrices, p.plan.segments, p.size});
  }
  p.states = pointer<float>(states);
  p.decays = pointer<float>(decays);
  const char* error = cuda::forward(p, count, c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK(error == nullptr, "wkv6: ", error);
  return y;
}

std::tuple<Tensor, Tensor> forward_cuda(
    const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
    const std::optional<Tensor>& state) {
  const Tensor initial = state.value_or(Tensor());
  check(r, k, v, w, u, initial);
  check_cuda(r, {u, initial});
  check_single({r, k, v, w, u, initial});
  const c10::cuda::CUDAGuard guard(r.device());
  const Tensor final_state = scratch(r, {r.size(0), r.size(2), r.size(3), r.size(3)});
  return {run_forward(r, k, v, w, u, aligned(initial), final_state), final_state};
}

Tensor forward_in_place_cuda(
    const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, const Tensor& state) {
  check(r, k, v, w, u, state);
  check_cuda(r, {u, state});
  check_single({r, k, v, w, u});
  const c10::cuda::CUDAGuard guard(r.device());
  TORCH_CHECK_VALUE(
      state.scalar_type() == at::kFloat && aligned(state).is_same(state),
      "a state that is replaced in place has to be a dense, aligned float32 tensor");
  return run_forward(r, k, v, w, u, state, state);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_, const Tensor& u_,
    const std::optional<Tensor>& state_, const std::optional<Tensor>& dy_, const std::optional<Tensor>& dfinal_) {
  const Tensor initial = state_.value_or(Tensor()), dy_given = dy_.value_or(Tensor());
  const Tensor dfinal_given = dfinal_.value_or(Tensor());
  check(r_, k_, v_, w_, u_, initial);
  check_gradients(dy_given, dfinal_given, r_);
  check_cuda(r_, {u_, initial, dfinal_given});
  check_single({r_, k_, v_, w_, u_, initial, dy_given});
  const c10::cuda::CUDAGuard guard(r_.device());
  const Tensor r = with_dense_rows(r_), k = with_dense_rows(k_), v = with_dense_rows(v_), w = with_dense_rows(w_);
  const Tensor u = dense(u_, at::kFloat), state = aligned(initial), dfinal = aligned(dfinal_given);
  const Tensor dy = with_dense_rows(dy_given);
  const int64_t batch = r.size(0), heads = r.size(2), size = r.size(3);
  const auto like = [](const Tensor& x) { return at::empty(x.sizes(), x.options()); };
  const Tensor dr = like(r), dk = like(k), dv = like(v), dw = like(w), dstate = scratch(r, {batch, heads, size, size});

  cuda::BackwardProblem p;
  set_problem<float>(p, r, k, v, w, u, state);
  p.dy = rows_of(dy);
  p.plan = cuda::make_plan(p, p.dy, multiprocessors(r));
  p.dr = rows_of(dr);
  p.dk = rows_of(dk);
  p.dv = rows_of(dv);
  p.dw = rows_of(dw);
  p.dfinal = pointer<float>(dfinal);
  p.dstate = pointer<float>(dstate);
  const Tensor du = scratch(r, {batch, heads, p.plan.segments, size});
  const Tensor checkpoints = scratch(r, {p.plan.matrices, p.plan.spans, size, size});
  const Tensor products = scratch(r, {p.plan.matrices, p.time, size});
  Tensor states, dstates, decays;
  if (p.plan.segments > 1) {
    states = scratch(r, {p.plan.matrices, p.plan.segments, size, size});
    dstates = scratch(r, {p.plan.matrices, p.plan.segments, size, size});
    decays = scratch(r, {p.plan.matrices, p.plan.segments, size});
  }
  p.du = pointer<float>(du);
  p.checkpoints = pointer<float>(checkpoints);
  p.products = pointer<float>(products);
  p.states = pointer<float>(states);
  p.dstates = pointer<float>(dstates);
  p.decays = pointer<float>(decays);
  const char* error = cuda::backward(p, c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK(error == nullptr, "wkv6_backward: ", error);
  return {dr, dk, dv, dw, du.sum(at::IntArrayRef({0, 2})).to(u_.scalar_type()), dstate};
}

}  // namespace
}  // namespace visualrwkv

// For decoding: no second copy of the state, no gradients.
TORCH_LIBRARY_FRAGMENT(visualrwkv, m) {
  m.def("wkv6_in_place(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor(a!) state) -> Tensor");
}

TORCH_LIBRARY_IMPL(visualrwkv, CUDA, m) {
  m.impl("wkv6_in_place", visualrwkv::forward_in_place_cuda);
  m.impl("wkv6", visualrwkv::forward_cuda);
  m.impl("wkv6_backward", visualrwkv::backward_cuda);
}
