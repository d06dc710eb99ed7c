// How prefill walks through the layers: what stands in memory, in which order things are done, where threads wait for each
// other. Matrix products are PyTorch's, the recurrence is wkv6, what lies between is in prefill_cpu_kernel.h.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "barrier.h"
#include "cpu_choice.h"
#include "prefill_cpu.h"
#include "prefill_packing.h"
#include "weights.h"
#include "wkv6_check.h"
#include "wkv6_cpu.h"

namespace visualrwkv {
namespace {

// Products are of multiples of so many rows: a library prepares itself for each size that it has not met lately, which
// takes several times as long as the product of a prompt.
constexpr int64_t GRAIN = 8;

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

// Whether products of bfloat16 are computed in float32: where visualrwkv/ops/wide.py does it, and for the same reason.
bool slow_in_bfloat16() {
  static const bool slow = [] {
    if (instruction_set() == InstructionSet::avx2 || !at::Context::hasMKLDNN()) return true;
    std::vector<c10::IValue> values;
    c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_is_mkldnn_bf16_supported", "").callBoxed(&values);
    return !values[0].toBool();
  }();
  return slow;
}

constexpr int64_t WIDENED = 1 << 18;  // weights that are widened together: a MiB, which stays in a cache

// out = x weight^T in float32, of x and out in bfloat16 and of a weight of any type.
void multiply_wide(const Tensor& out, const Tensor& x, const Tensor& weight) {
  const Tensor wide = x.to(at::kFloat);
  const int64_t rows = weight.size(0), step = std::max<int64_t>(1, WIDENED / weight.size(1));
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t count = std::min(step, rows - begin);
    out.narrow(1, begin, count).copy_(at::linear(wide, weight.narrow(0, begin, count).to(at::kFloat)));
  }
}

struct Run {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// One call of the operator.
struct Call {
  Model model;
  Tensor embeds;  // (B, T, D)
  at::TensorList state;
  Packing packing;
  int64_t keep;  // positions of `hidden`
  int64_t tail;  // rows at the end of each sequence that the end of the last layer works on, or 0: all
  double norm_eps, head_eps;
  Tensor hidden;              // (B, keep, D) behind ln_out
  std::vector<Tensor> after;  // the state, in the order of the given one

  int64_t time() const { return embeds.size(1); }
  int64_t layers() const { return model.layers.size(); }
};

// Reads pieces of a call, with memory of its own, one after the other: alone, where other threads read other pieces or
// the libraries have the threads, or as a team of threads that share the rows of a piece. In a team each has a run of
// rows, for which it does everything but the recurrence, which it does for a run of heads; five times a layer they wait
// for each other. Products in a team are of one thread: with the few rows of a prompt a library's own threads would spend
// their time on waiting for each other, ten times a layer, all the more where the program has further threads that compute.
template <typename E>
class Prefill {
 public:
  // threads: of the team; may change between two calls of the functions below.
  Prefill(Call& call, const int& threads)
      : call_(call), m_(call.model), options_(call.embeds.options()), kernels_(VISUALRWKV_CHOOSE(prefill_kernels<E>())),
        recurrence_(VISUALRWKV_CHOOSE(kernels<float>())), threads_(threads) {}

  void enter(int64_t piece) {
    const Packing& p = call_.packing;
    const int64_t first = p.pieces[piece], last = p.pieces[piece + 1];
    first_row_ = p.begins[first];
    sequence_ = p.sequence.data() + first;
    begins_.clear();
    for (int64_t n = first; n <= last; n++) begins_.push_back(p.begins[n] - first_row_);
    allocate();
    for (Tensor* t : {&r_, &k_, &v_, &w_, &y_}) *t = matrix(m_.attention);
    if (call_.tail) r_.zero_();  // y is wanted of the tail alone
  }

  // Everything but the end of the last layer where only tails are wanted of it; all threads of the team.
  void walk(int thread) {
    const int64_t last = call_.layers() - 1;
    const int64_t grains = matrix_rows() / GRAIN;
    const auto begin = [&](int64_t n) { return std::min(GRAIN * (grains * n / threads_), rows()); };
    const Run mine = {begin(thread), begin(thread + 1)};
    NormAndMix p = norm_and_mix(m_.ln0, Tensor());
    p.x = call_.embeds.data_ptr();
    p.source = call_.packing.positions.data() + first_row_;
    p.z = stream_[0].data_ptr();
    run(p, mine);
    for (int64_t n = 0; n <= last; n++) {
      wait();
      before_recurrence(n, mine, n == last && call_.tail);
      wait();
      recur(n, thread);
      wait();
      if (n == last && call_.tail) return;
      after_recurrence(n, mine);
    }
    wait();
    output(mine);
    for (int64_t m = mine.begin; m < mine.end; m++) hand_over(m, call_.packing.positions[first_row_ + m]);
  }

  // The end of the last layer for the last rows of each sequence, which are copied together for it; one thread.
  void finish() {
    if (!call_.tail) return;
    const int64_t last = call_.layers() - 1, tail = call_.tail;
    std::vector<int64_t> wanted, begins = {0};
    for (size_t n = 1; n < begins_.size(); n++) {
      for (int64_t m = begins_[n] - tail; m < begins_[n]; m++) wanted.push_back(m);
      begins.push_back(wanted.size());
    }
    const Tensor whole[] = {stream_[1], y_, mixed_[4]};
    begins_ = begins;
    allocate();
    y_ = matrix(m_.attention);
    const auto copy = [&](const Tensor& to, const Tensor& from) {
      const int64_t size = from.size(1);
      for (int64_t m = 0; m < rows(); m++)
        std::memcpy(elements(to) + m * size, elements(from) + wanted[m] * size, sizeof(E) * size);
    };
    copy(stream_[1], whole[0]);
    copy(y_, whole[1]);
    copy(mixed_[4], whole[2]);
    after_recurrence(last, {0, rows()});
    output({0, rows()});
    for (int64_t m = 0; m < rows(); m++) hand_over(m, call_.packing.positions[first_row_ + wanted[m]]);
  }

  // A thread of the team has failed.
  void give_up() { barrier_.give_up(); }

 private:
  // ---- The walk through the model

  // Time-mix up to the operands of the recurrence.
  void before_recurrence(int64_t n, const Run& mine, bool for_tail) {
    const LayerWeights& w = m_.layers[n];
    const int64_t D = m_.hidden, A = m_.attention, R = m_.mix_rank;
    NormAndMix p = norm_and_mix(w.ln1, call_.state[3 * n]);
    p.x = stream_[0].data_ptr();
    if (n) {
      p.add = channel_.data_ptr();
      p.gate = channel_gate_.data_ptr();
    }
    set_source(p, n);
    p.x_out = stream_[1].data_ptr();
    p.z = z_.data_ptr();
    p.mixes = 1;
    p.ratio[0] = w.maa[0];
    p.mixed[0] = mixed_[0].data_ptr();
    p.new_shift = call_.after[3 * n].data_ptr();
    run(p, mine);

    const Tensor low = multiply(part(mixed_[0], filled(mine)), weight(w.maa_w1, D, 5 * R).t());
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

    const Tensor decay_low = multiply(part(mixed_[0], filled(mine)), weight(w.decay_w1, D, m_.decay_rank).t());
    const LowRank decay = {mine.begin, m_.decay_rank, A, decay_low.data_ptr(), w.decay_w2};
    by_rows(mine, A, [&](int64_t begin, int64_t end) {
      kernels_.decays(decay, static_cast<const E*>(w.decay), elements(w_), begin, end);
    });
    multiply_into(k_, filled(mine), part(mixed_[1], filled(mine)), w.key);
    multiply_into(v_, filled(mine), part(mixed_[2], filled(mine)), w.value);
    for (const Run& wanted : for_tail ? tails(mine) : std::vector<Run>{filled(mine)})
      multiply_into(r_, wanted, part(mixed_[3], wanted), w.receptance);
  }

  void recur(int64_t n, int thread) {
    const int64_t H = m_.heads, N = m_.attention / H, all = int64_t(begins_.size() - 1) * H;
    const Tensor bonus = vector(m_.layers[n].bonus, m_.attention).to(at::kFloat);
    const float* const old = call_.state[3 * n + 1].const_data_ptr<float>();
    float* const now = call_.after[3 * n + 1].mutable_data_ptr<float>();
    const auto heads = [&](int64_t begin, int64_t end) {
      for (int64_t s = begin / H; s * H < end; s++) {
        const auto rows = [&](const Tensor& t) {
          return Rows{reinterpret_cast<char*>(elements(t) + begins_[s] * m_.attention), type_of(t), 0, m_.attention, N};
        };
        Forward<float> p;
        p.batch = 1;
        p.time = begins_[s + 1] - begins_[s];
        p.heads = H;
        p.size = N;
        p.r = rows(r_);
        p.k = rows(k_);
        p.v = rows(v_);
        p.w = rows(w_);
        p.y = rows(y_);
        p.u = bonus.const_data_ptr<float>();
        p.state = old + sequence_[s] * H * N * N;
        p.final_state = now + sequence_[s] * H * N * N;
        recurrence_.forward(p, std::max<int64_t>(begin - s * H, 0), std::min(end - s * H, H));
      }
    };
    if (threads_ > 1)
      heads(all * thread / threads_, all * (thread + 1) / threads_);
    else
      at::parallel_for(0, all, 1, heads);
  }

  // The end of the time-mix, and the channel-mix.
  void after_recurrence(int64_t n, const Run& mine) {
    const LayerWeights& w = m_.layers[n];
    const Tensor gate = multiply(part(mixed_[4], filled(mine)), w.gate);
    NormAndGate g;
    g.heads = m_.heads;
    g.size = m_.attention;
    g.eps = call_.head_eps;
    g.norm = w.ln_x;
    g.y = part(y_, mine).data_ptr();
    g.gate = gate.data_ptr();
    by_rows({0, mine.count()}, m_.attention, [&](int64_t begin, int64_t end) { kernels_.norm_and_gate(g, begin, end); });
    multiply_into(time_mix_, filled(mine), part(y_, filled(mine)), w.output);
    wait();  // the token shift looks at the row before

    NormAndMix p = norm_and_mix(w.ln2, call_.state[3 * n + 2]);
    p.x = stream_[1].data_ptr();
    p.add = time_mix_.data_ptr();
    p.x_out = stream_[0].data_ptr();
    p.z = z_.data_ptr();
    p.mixes = 2;
    p.ratio[0] = w.ffn_maa_k;
    p.ratio[1] = w.ffn_maa_r;
    p.mixed[0] = mixed_[0].data_ptr();
    p.mixed[1] = mixed_[1].data_ptr();
    p.new_shift = call_.after[3 * n + 2].data_ptr();
    run(p, mine);
    const Tensor inner = multiply(part(mixed_[0], filled(mine)), w.ffn_key);
    by_rows({0, inner.numel()}, 1, [&](int64_t begin, int64_t end) {
      kernels_.square_relu(elements(inner), begin, end);
    });
    multiply_into(channel_, filled(mine), inner, w.ffn_value);
    multiply_into(channel_gate_, filled(mine), part(mixed_[1], filled(mine)), w.ffn_receptance);
  }

  void output(const Run& mine) {
    NormAndMix p = norm_and_mix(m_.ln_out, Tensor());
    p.x = stream_[0].data_ptr();
    p.add = channel_.data_ptr();
    p.gate = channel_gate_.data_ptr();
    if (!call_.tail) set_source(p, call_.layers());
    p.z = z_.data_ptr();
    run(p, mine);
  }

  // A row of z to its place in the result, if it is wanted.
  void hand_over(int64_t row, int64_t position) {
    const int64_t time = call_.time(), t = position % time - (time - call_.keep), D = m_.hidden;
    if (t >= 0)
      std::memcpy(elements(call_.hidden) + (position / time * call_.keep + t) * D, elements(z_) + row * D, sizeof(E) * D);
  }

  // ---- Threads

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
    for (Tensor* t : {&stream_[0], &stream_[1], &z_, &time_mix_, &channel_, &channel_gate_}) *t = matrix(D);
    for (Tensor& t : mixed_) t = matrix(D);
  }

  int64_t rows() const { return begins_.back(); }
  int64_t matrix_rows() const { return (rows() + GRAIN - 1) / GRAIN * GRAIN; }

  Tensor matrix(int64_t columns) const {
    const Tensor t = at::empty({matrix_rows(), columns}, options_);
    std::memset(elements(t) + rows() * columns, 0, sizeof(E) * (matrix_rows() - rows()) * columns);
    return t;
  }

  // A run that begins with a grain, up to the end of its last grain.
  static Run filled(const Run& rows) { return {rows.begin, rows.begin + (rows.count() + GRAIN - 1) / GRAIN * GRAIN}; }

  static E* elements(const Tensor& x) { return static_cast<E*>(x.data_ptr()); }

  static Tensor part(const Tensor& x, const Run& rows) { return x.narrow(0, rows.begin, rows.count()); }

  // The tails of all sequences, as far as they lie in a run of rows.
  std::vector<Run> tails(const Run& rows) const {
    std::vector<Run> found;
    for (size_t n = 1; n < begins_.size(); n++) {
      const Run tail = {std::max(begins_[n] - call_.tail, rows.begin), std::min(begins_[n], rows.end)};
      if (tail.begin < tail.end) found.push_back(tail);
    }
    return found;
  }

  NormAndMix norm_and_mix(const Norm& norm, const Tensor& shift) const {
    NormAndMix p;
    p.count = begins_.size() - 1;
    p.begins = begins_.data();
    p.index = sequence_;
    p.old_shift = shift.defined() ? shift.data_ptr() : nullptr;
    p.size = m_.hidden;
    p.eps = call_.norm_eps;
    p.norm = norm;
    return p;
  }

  void set_source(NormAndMix& p, int64_t order) const {
    const std::vector<int64_t>& source = call_.packing.sources[order];
    if (source.empty()) return;
    p.source = source.data() + first_row_;
    p.origin = first_row_;
  }

  // ---- Products

  Tensor weight(const void* data, int64_t rows, int64_t columns) const {
    return at::from_blob(const_cast<void*>(data), {rows, columns}, options_);
  }
  Tensor vector(const void* data, int64_t size) const { return at::from_blob(const_cast<void*>(data), {size}, options_); }

  // x weight^T.
  static Tensor multiply(const Tensor& x, const Tensor& weight) {
    if (x.scalar_type() == at::kFloat && by_onednn()) return onednn_linear(x, weight);
    if (x.scalar_type() == at::kBFloat16 && slow_in_bfloat16()) {
      const Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
      multiply_wide(out, x, weight);
      return out;
    }
    return at::linear(x, weight);
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
    else if (x.scalar_type() == at::kBFloat16 && slow_in_bfloat16())
      multiply_wide(to, x, weight);
    else
      at::mm_out(to, x, weight.t());
  }

  void multiply_into(const Tensor& out, const Run& rows, const Tensor& x, const Matrix& w) const {
    if (w.format == Format::int8)
      part(out, rows).copy_(multiply(x, w));
    else
      multiply_into(out, rows, x, weight(w.data, w.rows, w.columns));
  }

  Call& call_;
  const Model& m_;
  const at::TensorOptions options_;
  const PrefillKernels<E>& kernels_;
  const Kernels<float>& recurrence_;
  const int& threads_;
  Barrier barrier_;
  // The piece at hand.
  int64_t first_row_;
  const int64_t* sequence_;      // which of the batch its sequences are
  std::vector<int64_t> begins_;  // their first rows, and the end
  // Its rows. The residual stream changes its place twice a layer: neighbours still read the former one.
  Tensor stream_[2], z_, mixed_[5], r_, k_, v_, w_, y_, time_mix_, channel_, channel_gate_;
};

}  // namespace
}  // namespace visualrwkv
