// The operator of prefill on the CPU: many tokens through all layers of RWKV-6, without gradients. Matrix products are
// PyTorch's, the recurrence is wkv6, what lies between is in prefill_cpu_kernel.h. visualrwkv/inference.py calls it.

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <optional>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "barrier.h"
#include "cpu_choice.h"
#include "prefill_cpu.h"
#include "weights.h"
#include "wkv6_check.h"
#include "wkv6_cpu.h"

namespace visualrwkv {
namespace {

// Whether products in float32 go to oneDNN: where visualrwkv/ops/linear.py takes it, and for the same reason.
bool by_onednn() {
  return instruction_set() == InstructionSet::avx512 && at::globalContext().userEnabledMkldnn() &&
         at::Context::hasMKLDNN();
}

Tensor onednn_linear(const Tensor& x, const Tensor& weight) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "");
  std::vector<c10::IValue> values = {x, weight, c10::IValue(), "none", c10::List<std::optional<at::Scalar>>(), ""};
  op.callBoxed(&values);
  return values[0].toTensor();
}

struct Run {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// One call of the operator, by a team of threads. Each has a run of rows (positions of all sequences), for which it does
// everything but the recurrence, which it does for a run of heads; five times a layer they wait for each other. Products
// in a team are of one thread: with the few rows of a prompt a library's own threads would spend their time on waiting
// for each other, ten times a layer, all the more where the program has further threads that compute. A team of one
// leaves the threads to the libraries.
template <typename E>
class Prefill {
 public:
  Prefill(
      const Model& model, const Tensor& embeds, at::TensorList state, const Tensor& real,
      const std::vector<Tensor>& sources, int64_t tail, double norm_eps, double head_eps, int threads)
      : m_(model), options_(embeds.options()), kernels_(VISUALRWKV_CHOOSE(prefill_kernels<E>())),
        recurrence_(VISUALRWKV_CHOOSE(kernels<float>())), embeds_(embeds), real_(real), sources_(sources),
        state_(state), tail_(tail), norm_eps_(norm_eps), head_eps_(head_eps), batch_(embeds.size(0)),
        time_(embeds.size(1)), threads_(threads) {
    allocate();
    const int64_t D = m_.hidden, A = m_.attention, N = A / m_.heads;
    for (Tensor* t : {&r_, &k_, &v_, &w_, &y_}) *t = matrix(A);
    if (tail_) r_.zero_();  // y is wanted of the tail alone
    for (size_t n = 0; n < m_.layers.size(); n++) {
      after.push_back(at::empty({batch_, D}, options_));
      after.push_back(at::empty({batch_, m_.heads, N, N}, options_.dtype(at::kFloat)));
      after.push_back(at::empty({batch_, D}, options_));
    }
  }

  std::vector<Tensor> after;  // the state, in the order of the given one

  // Behind ln_out (B, T or `tail`, D).
  Tensor hidden() {
    team([this](int thread, int threads) { work(thread, threads); });
    if (tail_) last_positions();
    return hidden_.view({batch_, time_, m_.hidden});
  }

 private:
  // ---- The walk through the model

  void work(int thread, int threads) {
    const int64_t rows = batch_ * time_, last = m_.layers.size() - 1;
    const Run mine = {rows * thread / threads, rows * (thread + 1) / threads};
    NormAndMix p = norm_and_mix(m_.ln0, Tensor());
    p.x = embeds_.data_ptr();
    p.z = stream_[0].data_ptr();
    run(p, mine);
    for (int64_t n = 0; n <= last; n++) {
      wait();
      before_recurrence(n, mine, n == last && tail_);
      wait();
      recur(n, thread, threads);
      wait();
      if (n == last && tail_) return;
      after_recurrence(n, mine);
    }
    wait();
    output(sources_[last + 1], mine);
  }

  // The end of the last layer for the last positions of each sequence, which are copied together for it.
  void last_positions() {
    const int64_t last = m_.layers.size() - 1;
    const Tensor kept[] = {ends(stream_[1]), ends(y_), ends(mixed_[4])};
    threads_ = 1;
    time_ = tail_;
    real_ = Tensor();
    allocate();
    stream_[1] = kept[0];
    y_ = kept[1];
    mixed_[4] = kept[2];
    const Run all = {0, batch_ * time_};
    after_recurrence(last, all);
    output(Tensor(), all);
  }

  // Time-mix up to the operands of the recurrence.
  void before_recurrence(int64_t n, const Run& mine, bool for_tail) {
    const LayerWeights& w = m_.layers[n];
    const int64_t D = m_.hidden, A = m_.attention, R = m_.mix_rank;
    NormAndMix p = norm_and_mix(w.ln1, state_[3 * n]);
    p.x = stream_[0].data_ptr();
    if (n) {
      p.add = channel_.data_ptr();
      p.gate = channel_gate_.data_ptr();
    }
    p.source = sources_[n].defined() ? sources_[n].const_data_ptr<int64_t>() : nullptr;
    p.x_out = stream_[1].data_ptr();
    p.z = z_.data_ptr();
    p.mixes = 1;
    p.ratio[0] = w.maa[0];
    p.mixed[0] = mixed_[0].data_ptr();
    p.new_shift = after[3 * n].data_ptr();
    run(p, mine);

    const Tensor low = multiply(part(mixed_[0], mine), weight(w.maa_w1, D, 5 * R).t());
    wait();  // z is complete
    MixByData mix;
    static_cast<Sequences&>(mix) = p;
    mix.low = {mine.begin, R, D, low.data_ptr(), w.maa_w2};
    mix.z = z_.data_ptr();
    for (int i = 0; i < 5; i++) {
      mix.ratio[i] = w.maa[1 + i];
      mix.mixed[i] = mixed_[i].data_ptr();
    }
    by_rows(mine, 5 * D, [&](int64_t begin, int64_t end) { kernels_.mix_by_data(mix, begin, end); });

    const Tensor decay_low = multiply(part(mixed_[0], mine), weight(w.decay_w1, D, m_.decay_rank).t());
    const LowRank decay = {mine.begin, m_.decay_rank, A, decay_low.data_ptr(), w.decay_w2};
    by_rows(mine, A, [&](int64_t begin, int64_t end) {
      kernels_.decays(decay, static_cast<const E*>(w.decay), elements(w_), begin, end);
    });
    multiply_into(k_, mine, part(mixed_[1], mine), w.key);
    multiply_into(v_, mine, part(mixed_[2], mine), w.value);
    if (real_.defined())  // nothing is written and nothing decays
      for (int64_t m = mine.begin; m < mine.end; m++)
        if (!real_.const_data_ptr<bool>()[m]) {
          std::memset(elements(k_) + m * A, 0, sizeof(E) * A);
          std::fill_n(elements(w_) + m * A, A, no_decay());
        }
    for (const Run& wanted : for_tail ? tails(mine) : std::vector<Run>{mine})
      multiply_into(r_, wanted, part(mixed_[3], wanted), w.receptance);
  }

  void recur(int64_t n, int thread, int threads) {
    const int64_t H = m_.heads, N = m_.attention / H;
    const auto heads = [&](const Tensor& t) { return t.view({batch_, time_, H, N}); };
    const Tensor bonus = vector(m_.layers[n].bonus, m_.attention).to(at::kFloat).view({H, N});
    Forward<float> p;
    set_problem<float>(p, heads(r_), heads(k_), heads(v_), heads(w_), bonus, state_[3 * n + 1]);
    p.y = rows_of(heads(y_));
    p.final_state = after[3 * n + 1].mutable_data_ptr<float>();
    const int64_t sequences = batch_ * H;
    if (threads_ > 1)
      recurrence_.forward(p, sequences * thread / threads, sequences * (thread + 1) / threads);
    else
      at::parallel_for(0, sequences, 1, [&](int64_t begin, int64_t end) { recurrence_.forward(p, begin, end); });
  }

  // The end of the time-mix, and the channel-mix.
  void after_recurrence(int64_t n, const Run& mine) {
    const LayerWeights& w = m_.layers[n];
    const Tensor gate = multiply(part(mixed_[4], mine), w.gate);
    NormAndGate g;
    g.heads = m_.heads;
    g.size = m_.attention;
    g.eps = head_eps_;
    g.norm = w.ln_x;
    g.y = part(y_, mine).data_ptr();
    g.gate = gate.data_ptr();
    by_rows({0, mine.count()}, m_.attention, [&](int64_t begin, int64_t end) { kernels_.norm_and_gate(g, begin, end); });
    multiply_into(time_mix_, mine, part(y_, mine), w.output);
    wait();  // the token shift looks at the row before

    NormAndMix p = norm_and_mix(w.ln2, state_[3 * n + 2]);
    p.x = stream_[1].data_ptr();
    p.add = time_mix_.data_ptr();
    p.x_out = stream_[0].data_ptr();
    p.z = z_.data_ptr();
    p.mixes = 2;
    p.ratio[0] = w.ffn_maa_k;
    p.ratio[1] = w.ffn_maa_r;
    p.mixed[0] = mixed_[0].data_ptr();
    p.mixed[1] = mixed_[1].data_ptr();
    p.new_shift = after[3 * n + 2].data_ptr();
    run(p, mine);
    const Tensor inner = multiply(part(mixed_[0], mine), w.ffn_key);
    by_rows({0, inner.numel()}, 1, [&](int64_t begin, int64_t end) {
      kernels_.square_relu(elements(inner), begin, end);
    });
    multiply_into(channel_, mine, inner, w.ffn_value);
    multiply_into(channel_gate_, mine, part(mixed_[1], mine), w.ffn_receptance);
  }

  void output(const Tensor& source, const Run& mine) {
    NormAndMix p = norm_and_mix(m_.ln_out, Tensor());
    p.x = stream_[0].data_ptr();
    p.add = channel_.data_ptr();
    p.gate = channel_gate_.data_ptr();
    p.source = source.defined() ? source.const_data_ptr<int64_t>() : nullptr;
    p.z = hidden_.data_ptr();
    run(p, mine);
  }

  // ---- Threads

  template <typename Work>
  void team(Work work) {
#ifdef _OPENMP
    if (threads_ > 1) {
      const at::ThreadLocalState here;
      std::exception_ptr failure;
      std::mutex lock;
#pragma omp parallel num_threads(threads_)
      {
        const at::ThreadLocalStateGuard guard(here);
        try {
#pragma omp single
          threads_ = omp_get_num_threads();
          work(omp_get_thread_num(), omp_get_num_threads());
        } catch (...) {
          const std::lock_guard<std::mutex> hold(lock);
          if (!failure) failure = std::current_exception();
          barrier_.give_up();
        }
      }
      if (failure) std::rethrow_exception(failure);
      return;
    }
#endif
    work(0, 1);
  }

  void wait() { barrier_.wait(threads_); }

  template <typename Body>
  void by_rows(const Run& rows, int64_t size, Body body) const {
    if (threads_ > 1) return body(rows.begin, rows.end);
    at::parallel_for(rows.begin, rows.end, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, size)), body);
  }

  void run(const NormAndMix& p, const Run& mine) const {
    by_rows(mine, p.size, [&](int64_t begin, int64_t end) { kernels_.norm_and_mix(p, begin, end); });
  }

  // ---- Memory

  void allocate() {
    const int64_t D = m_.hidden;
    for (Tensor* t : {&stream_[0], &stream_[1], &z_, &time_mix_, &channel_, &channel_gate_, &hidden_}) *t = matrix(D);
    for (Tensor& t : mixed_) t = matrix(D);
  }

  Tensor matrix(int64_t columns) const { return at::empty({batch_ * time_, columns}, options_); }

  static E* elements(const Tensor& x) { return static_cast<E*>(x.data_ptr()); }

  static Tensor part(const Tensor& x, const Run& rows) { return x.narrow(0, rows.begin, rows.count()); }

  // Those of the last `tail_` positions of each sequence that are in a run of rows.
  std::vector<Run> tails(const Run& rows) const {
    std::vector<Run> found;
    for (int64_t b = 0; b < batch_; b++) {
      const Run tail = {std::max((b + 1) * time_ - tail_, rows.begin), std::min((b + 1) * time_, rows.end)};
      if (tail.begin < tail.end) found.push_back(tail);
    }
    return found;
  }

  Tensor ends(const Tensor& x) const {
    return x.view({batch_, time_, x.size(1)}).narrow(1, time_ - tail_, tail_).flatten(0, 1);
  }

  // Minus infinity: the state decays by exp(-exp(w)).
  static E no_decay() {
    if constexpr (std::is_same<E, float>::value)
      return -std::numeric_limits<float>::infinity();
    else
      return 0xff80;
  }

  NormAndMix norm_and_mix(const Norm& norm, const Tensor& shift) const {
    NormAndMix p;
    p.batch = batch_;
    p.time = time_;
    p.real = real_.defined() ? real_.const_data_ptr<bool>() : nullptr;
    p.old_shift = shift.defined() ? shift.data_ptr() : nullptr;
    p.size = m_.hidden;
    p.eps = norm_eps_;
    p.norm = norm;
    return p;
  }

  // ---- Products

  Tensor weight(const void* data, int64_t rows, int64_t columns) const {
    return at::from_blob(const_cast<void*>(data), {rows, columns}, options_);
  }
  Tensor vector(const void* data, int64_t size) const { return at::from_blob(const_cast<void*>(data), {size}, options_); }

  // x weight^T.
  static Tensor multiply(const Tensor& x, const Tensor& weight) {
    return x.scalar_type() == at::kFloat && by_onednn() ? onednn_linear(x, weight) : at::linear(x, weight);
  }

  Tensor multiply(const Tensor& x, const Matrix& w) const {
    if (w.format != Format::int8) return multiply(x, weight(w.data, w.rows, w.columns));
    const Tensor bytes = at::from_blob(const_cast<void*>(w.data), {w.rows, w.columns}, options_.dtype(at::kChar));
    const Tensor scale = at::from_blob(const_cast<float*>(w.scale), {w.rows}, options_.dtype(at::kFloat));
    return multiply(x, bytes.to(x.scalar_type())).mul_(scale);
  }

  // The same into some rows of `out`.
  static void multiply_into(const Tensor& out, const Run& rows, const Tensor& x, const Tensor& weight) {
    Tensor to = part(out, rows);
    if (x.scalar_type() == at::kFloat && by_onednn())
      to.copy_(onednn_linear(x, weight));
    else
      at::mm_out(to, x, weight.t());
  }

  void multiply_into(const Tensor& out, const Run& rows, const Tensor& x, const Matrix& w) const {
    if (w.format == Format::int8)
      part(out, rows).copy_(multiply(x, w));
    else
      multiply_into(out, rows, x, weight(w.data, w.rows, w.columns));
  }

  const Model& m_;
  const at::TensorOptions options_;
  const PrefillKernels<E>& kernels_;
  const Kernels<float>& recurrence_;
  const Tensor embeds_;
  Tensor real_;
  const std::vector<Tensor>& sources_;
  at::TensorList state_;
  const int64_t tail_;
  const double norm_eps_, head_eps_;
  const int64_t batch_;
  int64_t time_;
  int threads_;
  Barrier barrier_;
  // Rows of all threads. The residual stream changes its place twice a layer: neighbours still read the former one.
  Tensor stream_[2], z_, mixed_[5], r_, k_, v_, w_, y_, time_mix_, channel_, channel_gate_, hidden_;
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
  for (const std::optional<Tensor> t : sources) {
    source.push_back(positions(t, at::kLong));
    TORCH_CHECK_VALUE(
        !t || (t->min().item<int64_t>() >= 0 && t->max().item<int64_t>() < time), "sources point outside of the sequence");
  }
  // The last layer works on the last positions alone where no more are wanted, and on one more for their token shift.
  int64_t tail = keep > 0 && keep + 1 < time ? keep + 1 : 0;
  if (tail && !plain_end(mask, source[layers], tail)) tail = 0;

  int threads = 1;
#ifdef _OPENMP
  // In a team every thread reads all weights: with few rows for each the memory would be what they wait for.
  const int64_t wanted = at::get_num_threads();
  if (!omp_in_parallel() && batch * time >= 8 * wanted * wanted) threads = wanted;
#endif

  std::vector<Tensor> result(1);
  const auto go = [&](auto zero) {
    Prefill<decltype(zero)> prefill(model, embeds, state, mask, source, tail, norm_eps, head_eps, threads);
    result[0] = prefill.hidden();
    result.insert(result.end(), prefill.after.begin(), prefill.after.end());
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
