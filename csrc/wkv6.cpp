// The operator of RWKV-6: schema, and the CPU side. What it computes is written down in
// visualrwkv/ops/reference.py; visualrwkv/ops/kernel.py adds the shapes for tracing and the autograd formula.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "cpu_choice.h"
#include "wkv6_check.h"
#include "wkv6_cpu.h"

namespace visualrwkv {
namespace {

template <typename T>
const Kernels<T>& chosen_kernels() {
  if constexpr (std::is_same<T, double>::value)
    return plain::kernels<double>();
  else
    return VISUALRWKV_CHOOSE(kernels<float>());
}

// Runs a kernel over batch * heads sequences. Starting a thread costs about as much as some dozen tokens.
template <typename Arguments>
void run(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& p) {
  constexpr int64_t tokens_per_thread = 32;
  const int64_t grain = std::max<int64_t>(1, tokens_per_thread / p.time);
  at::parallel_for(0, p.batch * p.heads, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

std::tuple<Tensor, Tensor> forward_cpu(
    const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_, const Tensor& u_,
    const std::optional<Tensor>& state_) {
  const Tensor initial = state_.value_or(Tensor());
  check(r_, k_, v_, w_, u_, initial);
  const auto type = compute_type({r_, k_, v_, w_, u_, initial});
  const Tensor r = with_dense_rows(r_), k = with_dense_rows(k_), v = with_dense_rows(v_), w = with_dense_rows(w_);
  const Tensor u = dense(u_, type), state = dense(initial, type);
  const Tensor y = at::empty(r.sizes(), r.options());
  const Tensor final_state = at::empty({r.size(0), r.size(2), r.size(3), r.size(3)}, r.options().dtype(type));
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    Forward<T> p;
    set_problem<T>(p, r, k, v, w, u, state);
    p.y = rows_of(y);
    p.final_state = pointer<T>(final_state);
    run(chosen_kernels<T>().forward, p);
  };
  if (type == at::kDouble)
    go(double());
  else
    go(float());
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_, const Tensor& u_,
    const std::optional<Tensor>& state_, const std::optional<Tensor>& dy_, const std::optional<Tensor>& dfinal_) {
  const Tensor initial = state_.value_or(Tensor()), dy_given = dy_.value_or(Tensor());
  const Tensor dfinal_given = dfinal_.value_or(Tensor());
  check(r_, k_, v_, w_, u_, initial);
  const int64_t batch = r_.size(0), heads = r_.size(2), size = r_.size(3);
  check_gradients(dy_given, dfinal_given, r_);
  const auto type = compute_type({r_, k_, v_, w_, u_, initial});
  const Tensor r = with_dense_rows(r_), k = with_dense_rows(k_), v = with_dense_rows(v_), w = with_dense_rows(w_);
  const Tensor u = dense(u_, type), state = dense(initial, type), dfinal = dense(dfinal_given, type);
  const Tensor dy = with_dense_rows(dy_given);
  const auto like = [](const Tensor& x) { return at::empty(x.sizes(), x.options()); };
  const Tensor dr = like(r), dk = like(k), dv = like(v), dw = like(w);
  const auto options = r.options().dtype(type);
  const Tensor du = at::empty({batch, heads, size}, options), dstate = at::empty({batch, heads, size, size}, options);
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    Backward<T> p;
    set_problem<T>(p, r, k, v, w, u, state);
    p.dy = rows_of(dy);
    p.dr = rows_of(dr);
    p.dk = rows_of(dk);
    p.dv = rows_of(dv);
    p.dw = rows_of(dw);
    p.dfinal = pointer<T>(dfinal);
    p.du = pointer<T>(du);
    p.dstate = pointer<T>(dstate);
    run(chosen_kernels<T>().backward, p);
  };
  if (type == at::kDouble)
    go(double());
  else
    go(float());
  return {dr, dk, dv, dw, du.sum(0).to(u_.scalar_type()), dstate};
}

}  // namespace
}  // namespace visualrwkv

// wkv6 -> y, final state. wkv6_backward -> the gradients of r, k, v, w, u and the initial state (in the type of the
// arithmetic, also where none was given), from those of y and of the final state (None: zero).
TORCH_LIBRARY(visualrwkv, m) {
  m.def("wkv6(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? state) -> (Tensor, Tensor)");
  m.def(
      "wkv6_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? state, Tensor? dy, Tensor? dfinal)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(visualrwkv, CPU, m) {
  m.impl("wkv6", visualrwkv::forward_cpu);
  m.impl("wkv6_backward", visualrwkv::backward_cpu);
}
