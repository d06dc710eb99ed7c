// The operator of prefill on the CPU: many tokens through all layers of RWKV-6, without gradients. Matrix products are
// PyTorch's, the recurrence is wkv6, what lies between is in prefill_cpu_kernel.h. visualrwkv/inference.py calls it.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "prefill_cpu.h"
#include "weights.h"

namespace visualrwkv {
namespace {

bool has_avx512() {
  static const bool has = at::get_cpu_capability().rfind("AVX512", 0) == 0;
  return has;
}

template <typename E>
const PrefillKernels<E>& chosen_prefill_kernels() {
#if defined(__x86_64__)
  // PyTorch's own choice, so that its variable ATEN_CPU_CAPABILITY holds here too.
  if (has_avx512()) return avx512::prefill_kernels<E>();
  static const bool has_avx2 = at::get_cpu_capability().rfind("AVX2", 0) == 0;
  if (has_avx2) return avx2::prefill_kernels<E>();
#endif
  return plain::prefill_kernels<E>();
}

template <typename Body>
void by_rows(int64_t rows, int64_t size, Body body) {
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, size));
  at::parallel_for(0, rows, grain, body);
}

Tensor call(const char* name, std::vector<c10::IValue> arguments, size_t result = 0) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  op.callBoxed(&arguments);
  return arguments[result].toTensor();
}

// x weight^T; in float32 by oneDNN where visualrwkv/ops/linear.py takes it, and for the same reason.
Tensor multiply(const Tensor& x, const Tensor& weight) {
  if (x.scalar_type() != at::kFloat || !has_avx512() || !at::globalContext().userEnabledMkldnn() ||
      !at::globalContext().hasMKLDNN())
    return at::linear(x, weight);
  c10::List<std::optional<at::Scalar>> none;
  return call("mkldnn::_linear_pointwise", {x, weight, c10::IValue(), "none", none, ""});
}

// One call of the operator: the model, the sequences, and which rows are still worked on.
template <typename E>
class Prefill {
 public:
  Prefill(const Model& model, const Tensor& embeds, const Tensor& real, double norm_eps, double head_eps)
      : m_(model), options_(embeds.options()), kernels_(chosen_prefill_kernels<E>()), real_(real), norm_eps_(norm_eps),
        head_eps_(head_eps), batch_(embeds.size(0)), time_(embeds.size(1)) {
    // Before the first layer stands its ln0.
    x_ = matrix(m_.hidden);
    NormAndMix p = rows(Tensor());
    p.norm = m_.ln0;
    p.x = embeds.data_ptr();
    p.z = x_.data_ptr();
    run(p);
  }

  // Reads the sequences in the order that `source` gives, relative to the order of the layer before; layers with `last`
  // give the outputs of so many positions only.
  void layer(const LayerWeights& w, const Tensor& source, const Tensor (&state)[3], int64_t last, Tensor (&after)[3]) {
    const int64_t D = m_.hidden, A = m_.attention, R = m_.mix_rank, H = m_.heads, N = A / H;
    after[0] = at::empty({batch_, D}, options_);
    after[2] = at::empty({batch_, D}, options_);

    // Time-mix: the residual stream of the layer before, its norm, the token shift that depends on the data.
    const Tensor x = matrix(D), z = matrix(D), shifted = matrix(D);
    NormAndMix p = rows(state[0]);
    p.norm = w.ln1;
    residual(p, source);
    p.x_out = x.data_ptr();
    p.z = z.data_ptr();
    p.mixes = 1;
    p.ratio[0] = w.maa[0];
    p.mixed[0] = shifted.data_ptr();
    p.new_shift = after[0].data_ptr();
    run(p);
    x_ = x;
    const Tensor low = multiply(shifted, weight(w.maa_w1, D, 5 * R).t());
    Tensor part[5], mixed[5];
    E* parts[5];
    for (int i = 0; i < 5; i++) {
      part[i] = matrix(R);
      parts[i] = elements(part[i]);
    }
    by_rows(low.size(0), 5 * R, [&](int64_t begin, int64_t end) {
      kernels_.tangents(elements(low), parts, 5, R, begin, end);
    });
    MixByData mix;
    static_cast<Sequences&>(mix) = p;
    mix.size = D;
    mix.z = z.data_ptr();
    for (int i = 0; i < 5; i++) {
      mixed[i] = multiply(part[i], weight(static_cast<const E*>(w.maa_w2) + i * R * D, R, D).t());
      mix.ratio[i] = w.maa[1 + i];
      mix.mixed[i] = mixed[i].data_ptr();
    }
    by_rows(z.size(0), 5 * D, [&](int64_t begin, int64_t end) { kernels_.mix_by_data(mix, begin, end); });

    // The recurrence, over all positions.
    const Tensor decay_low = multiply(mixed[0], weight(w.decay_w1, D, m_.decay_rank).t());
    E* decay_part = elements(decay_low);
    by_rows(decay_low.size(0), m_.decay_rank, [&](int64_t begin, int64_t end) {
      kernels_.tangents(decay_part, &decay_part, 1, m_.decay_rank, begin, end);
    });
    const Tensor decay = multiply(decay_low, weight(w.decay_w2, m_.decay_rank, A).t()).add_(vector(w.decay, A));
    const Tensor k = product(mixed[1], w.key), v = product(mixed[2], w.value);
    if (real_.defined())  // nothing is written and nothing decays
      for (int64_t m = 0; m < batch_ * time_; m++)
        if (!real_.const_data_ptr<bool>()[m]) {
          std::memset(elements(k) + m * A, 0, sizeof(E) * A);
          std::fill_n(elements(decay) + m * A, A, no_decay());
        }
    const Tensor r = last ? at::zeros({batch_ * time_, A}, options_) : product(mixed[3], w.receptance);
    if (last) ends(r, last).copy_(product(ends(mixed[3], last).flatten(0, 1), w.receptance).view({batch_, last, A}));
    const auto heads = [&](const Tensor& t) { return t.view({batch_, time_, H, N}); };
    std::vector<c10::IValue> arguments = {heads(r), heads(k), heads(v), heads(decay), vector(w.bonus, A).view({H, N}),
                                          state[1]};
    c10::Dispatcher::singleton().findSchemaOrThrow("visualrwkv::wkv6", "").callBoxed(&arguments);
    Tensor y = arguments[0].toTensor().view({batch_ * time_, A}), gate_in = mixed[4];
    after[1] = arguments[1].toTensor();
    if (last) {
      y = ends(y, last).flatten(0, 1);
      gate_in = ends(gate_in, last).flatten(0, 1);
      x_ = ends(x_, last).flatten(0, 1);
      real_ = Tensor();
      time_ = last;
    }

    const Tensor gate = product(gate_in, w.gate);
    NormAndGate g;
    g.heads = H;
    g.size = A;
    g.eps = head_eps_;
    g.norm = w.ln_x;
    g.y = y.data_ptr();
    g.gate = gate.data_ptr();
    by_rows(y.size(0), A, [&](int64_t begin, int64_t end) { kernels_.norm_and_gate(g, begin, end); });
    add_ = product(y, w.output);
    gate_ = Tensor();

    // Channel-mix.
    const Tensor through = matrix(D), normed = matrix(D), key_in = matrix(D), receptance_in = matrix(D);
    p = rows(state[2]);
    p.norm = w.ln2;
    residual(p, Tensor());
    p.x_out = through.data_ptr();
    p.z = normed.data_ptr();
    p.mixes = 2;
    p.ratio[0] = w.ffn_maa_k;
    p.ratio[1] = w.ffn_maa_r;
    p.mixed[0] = key_in.data_ptr();
    p.mixed[1] = receptance_in.data_ptr();
    p.new_shift = after[2].data_ptr();
    run(p);
    x_ = through;
    const Tensor inner = product(key_in, w.ffn_key);
    by_rows(inner.numel(), 1, [&](int64_t begin, int64_t end) { kernels_.square_relu(elements(inner), begin, end); });
    add_ = product(inner, w.ffn_value);
    gate_ = product(receptance_in, w.ffn_receptance);
  }

  // Behind ln_out (B, time, D), in the order that `source` gives.
  Tensor hidden(const Tensor& source) {
    const Tensor out = matrix(m_.hidden);
    NormAndMix p = rows(Tensor());
    p.norm = m_.ln_out;
    residual(p, source);
    p.z = out.data_ptr();
    run(p);
    return out.view({batch_, time_, m_.hidden});
  }

 private:
  // Minus infinity: the state decays by exp(-exp(w)).
  static E no_decay() {
    if constexpr (std::is_same<E, float>::value) return -std::numeric_limits<float>::infinity();
    return E(0xff80);
  }

  static E* elements(const Tensor& x) { return static_cast<E*>(x.data_ptr()); }

  Tensor matrix(int64_t columns) const { return at::empty({batch_ * time_, columns}, options_); }

  Tensor weight(const void* data, int64_t rows, int64_t columns) const {
    return at::from_blob(const_cast<void*>(data), {rows, columns}, options_);
  }
  Tensor vector(const void* data, int64_t size) const { return at::from_blob(const_cast<void*>(data), {size}, options_); }

  Tensor product(const Tensor& x, const Matrix& w) const {
    if (w.format != Format::int8) return multiply(x, weight(w.data, w.rows, w.columns));
    const Tensor bytes = at::from_blob(const_cast<void*>(w.data), {w.rows, w.columns}, options_.dtype(at::kChar));
    const Tensor scale = at::from_blob(const_cast<float*>(w.scale), {w.rows}, options_.dtype(at::kFloat));
    return multiply(x, bytes.to(x.scalar_type())).mul_(scale);
  }

  // The last positions of each sequence (B, count, columns).
  Tensor ends(const Tensor& x, int64_t count) const {
    return x.view({batch_, time_, x.size(1)}).narrow(1, time_ - count, count);
  }

  NormAndMix rows(const Tensor& shift) const {
    NormAndMix p;
    p.batch = batch_;
    p.time = time_;
    p.real = real_.defined() ? real_.const_data_ptr<bool>() : nullptr;
    p.old_shift = shift.defined() ? shift.data_ptr() : nullptr;
    p.size = m_.hidden;
    p.eps = norm_eps_;
    return p;
  }

  // The stream so far: x, and what the part before adds to it.
  void residual(NormAndMix& p, const Tensor& source) const {
    p.x = x_.data_ptr();
    p.add = add_.defined() ? add_.data_ptr() : nullptr;
    p.gate = gate_.defined() ? gate_.data_ptr() : nullptr;
    p.source = source.defined() ? source.const_data_ptr<int64_t>() : nullptr;
  }

  void run(const NormAndMix& p) const {
    by_rows(p.batch * p.time, p.size, [&](int64_t begin, int64_t end) { kernels_.norm_and_mix(p, begin, end); });
  }

  const Model& m_;
  const at::TensorOptions options_;
  const PrefillKernels<E>& kernels_;
  Tensor real_, x_, add_, gate_;
  double norm_eps_, head_eps_;
  int64_t batch_, time_;
};

// Whether the last `count` positions of all sequences are real, and read in their natural order.
bool plain_end(const Tensor& real, const Tensor& source, int64_t count) {
  const int64_t time = real.defined() ? real.size(1) : source.defined() ? source.size(1) : 0;
  for (int64_t t = time - count; t < time; t++) {
    if (real.defined() && !real.select(1, t).all().item<bool>()) return false;
    if (source.defined() && !source.select(1, t).eq(t).all().item<bool>()) return false;
  }
  return true;
}

// embeds (B, T, D) before ln0; weights, scales: see `read_model`; state: att_shift (B, D), wkv (B, H, N, N) float32 and
// ffn_shift (B, D) of each layer; real (B, T) bool: what is not padded, all of it where it is not given; sources: for each
// layer, and for the output, (B, T) at which position of the order before each position of the next order stands, where
// they differ; keep: of how many positions the output is wanted, 0: of all. Returns hidden (B, keep or T, D) after
// ln_out, then the state in the order of the given one; nothing where the arguments are not of that kind.
std::vector<Tensor> rwkv6_prefill(
    const Tensor& embeds, at::TensorList weights, at::TensorList scales, at::TensorList state,
    const std::optional<Tensor>& real, const c10::List<std::optional<Tensor>>& sources, int64_t keep, int64_t heads,
    double norm_eps, double head_eps) {
  const auto type = embeds.scalar_type();
  if (!embeds.device().is_cpu() || embeds.dim() != 3 || embeds.numel() == 0 || !embeds.is_contiguous()) return {};
  const Model model = read_model(weights, scales, type, embeds.size(2), heads);
  const int64_t batch = embeds.size(0), time = embeds.size(1), layers = model.layers.size();
  if (layers == 0 || int64_t(state.size()) != 3 * layers || int64_t(sources.size()) != layers + 1) return {};
  Reader old(state, {}, type);
  for (int64_t n = 0; n < layers; n++) {
    old.vector(batch * model.hidden);
    old.pointer(old.next(), batch * model.attention * (model.attention / heads), at::kFloat);
    old.vector(batch * model.hidden);
  }
  if (!old.finished()) return {};
  const auto positions = [&](const std::optional<Tensor>& t, at::ScalarType wanted) {
    if (!t) return Tensor();
    TORCH_CHECK_VALUE(
        t->dim() == 2 && t->size(0) == batch && t->size(1) == time && t->scalar_type() == wanted,
        "positions have shape ", t->sizes(), " and dtype ", t->scalar_type(), " but embeds have shape ", embeds.sizes());
    return t->contiguous();
  };
  const Tensor mask = positions(real, at::kBool);
  std::vector<Tensor> source;
  for (const std::optional<Tensor> t : sources) source.push_back(positions(t, at::kLong));
  // The last layer works on the last positions alone where no more are wanted, and on one more for their token shift.
  int64_t tail = keep > 0 && keep + 1 < time ? keep + 1 : 0;
  if (tail && !plain_end(mask, source[layers], tail)) tail = 0;

  std::vector<Tensor> result(1);
  const auto go = [&](auto zero) {
    Prefill<decltype(zero)> prefill(model, embeds, mask, norm_eps, head_eps);
    for (int64_t n = 0; n < layers; n++) {
      const Tensor before[3] = {state[3 * n], state[3 * n + 1], state[3 * n + 2]};
      Tensor after[3];
      prefill.layer(model.layers[n], source[n], before, n + 1 == layers ? tail : 0, after);
      result.insert(result.end(), after, after + 3);
    }
    result[0] = prefill.hidden(tail ? Tensor() : source[layers]);
  };
  if (type == at::kFloat)
    go(float());
  else
    go(uint16_t());
  if (keep > 0 && keep < result[0].size(1)) result[0] = result[0].narrow(1, result[0].size(1) - keep, keep).contiguous();
  return result;
}

}  // namespace
}  // namespace visualrwkv

TORCH_LIBRARY_FRAGMENT(visualrwkv, m) {
  m.def(
      "rwkv6_prefill(Tensor embeds, Tensor[] weights, Tensor[] scales, Tensor[] state, Tensor? real, Tensor?[] sources, "
      "int keep, int heads, float norm_eps, float head_eps) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(visualrwkv, CPU, m) { m.impl("rwkv6_prefill", visualrwkv::rwkv6_prefill); }
