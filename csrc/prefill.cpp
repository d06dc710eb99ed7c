// The operator of prefill on the CPU: many tokens through all layers of RWKV-6, without gradients. Here are its schema, its
// checks and its threads; the way through the layers is in prefill_walk.h. visualrwkv/inference.py calls it.

#include <ATen/ThreadLocalState.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <optional>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "prefill_walk.h"

namespace visualrwkv {
namespace {

constexpr int64_t PIECE_ROWS = 512;         // a piece's activations stay in the caches between two walks
constexpr int64_t THREAD_ROWS = 8;          // fewer for each thread are left to the threads of the libraries

// Calls work(thread) on as many threads, or on fewer if there are no more, of which it sets the number; give_up() where one
// of them fails, so that the others need not wait for it.
template <typename Work, typename GiveUp>
void on_threads(int& threads, Work work, GiveUp give_up) {
#ifdef _OPENMP
  const at::ThreadLocalState here;
  std::exception_ptr failure;
  std::mutex lock;
#pragma omp parallel num_threads(threads)
  {
    const at::ThreadLocalStateGuard guard(here);
    try {
#pragma omp single
      threads = omp_get_num_threads();
      work(omp_get_thread_num());
    } catch (...) {
      const std::lock_guard<std::mutex> hold(lock);
      if (!failure) failure = std::current_exception();
      give_up();
    }
  }
  if (failure) std::rethrow_exception(failure);
#else
  work(0);
#endif
}

// By pieces where there are several, each thread taking the next one: nobody waits for anybody, whatever else takes the
// processor away meanwhile. Else all threads share the rows.
template <typename E>
void read(Call& call, int threads) {
  const int64_t pieces = call.packing.pieces.size() - 1;
  if (pieces > 1) {
    std::atomic<int64_t> next{0};
    on_threads(
        threads,
        [&](int) {
          const int alone = 1;
          Prefill<E> prefill(call, alone);
          for (int64_t piece; (piece = next++) < pieces;) {
            prefill.enter(piece);
            prefill.walk(0);
            prefill.finish();
          }
        },
        [&] { next = pieces; });
    return;
  }
  Prefill<E> prefill(call, threads);
  prefill.enter(0);
  if (threads > 1)
    on_threads(threads, [&](int thread) { prefill.walk(thread); }, [&] { prefill.give_up(); });
  else
    prefill.walk(0);
  threads = 1;  // the team has ended
  prefill.finish();
}

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
  // In a team, and by pieces, every thread reads all weights: with few rows for each the memory would be what they wait
  // for, unless the weights stay in the caches.
  int threads = 1;
  const int64_t rows = mask.defined() ? mask.sum().item<int64_t>() : batch * time;
#ifdef _OPENMP
  const int64_t wanted = at::get_num_threads();
  if (!omp_in_parallel() && rows >= THREAD_ROWS * wanted * (stay_in_caches(weights) ? 1 : wanted)) threads = wanted;
#endif
  std::optional<Packing> packing = pack(batch, time, mask, source, threads, PIECE_ROWS);
  if (!packing) return {};

  Call call{model, embeds, state, std::move(*packing)};
  call.norm_eps = norm_eps;
  call.head_eps = head_eps;
  call.keep = keep > 0 && keep < time ? keep : time;
  // The last layer works on the last positions alone where no more are wanted, and on one more for their token shift.
  call.tail = call.keep + 1 < time && plain_end(mask, source[layers], call.keep + 1) ? call.keep + 1 : 0;
  const bool padded = rows < batch * time;
  call.hidden = padded ? at::zeros({batch, call.keep, model.hidden}, embeds.options())
                       : at::empty({batch, call.keep, model.hidden}, embeds.options());
  const bool missing = int64_t(call.packing.sequence.size()) < batch;  // of these nothing is read
  for (const Tensor& before : state) call.after.push_back(missing ? before.clone() : at::empty_like(before));
  if (rows) type == at::kFloat ? read<float>(call, threads) : read<uint16_t>(call, threads);

  std::vector<Tensor> result = {call.hidden};
  result.insert(result.end(), call.after.begin(), call.after.end());
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
