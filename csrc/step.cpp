// Operators of decoding on the CPU: one token through all layers of RWKV-6, and a linear map of few rows. Both read the
// weights where the model keeps them. visualrwkv/inference.py calls them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <optional>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu_choice.h"
#include "crowd.h"
#include "step_cpu.h"
#include "weights.h"

namespace visualrwkv {
namespace {

using at::Tensor;

const StepKernels& chosen_step_kernels() { return VISUALRWKV_CHOOSE(step_kernels()); }

constexpr uintptr_t huge_page = 2 << 20;
Crowd crowd;
constexpr int64_t THREAD_SEQUENCES = 4;  // for fewer a thread would read the weights hardly faster than for one

// Asks for huge pages from `begin` on, which is a multiple of theirs; for what is there already too, with `now`. Where
// the system has none nothing happens.
void advise_huge(uintptr_t begin, uintptr_t bytes, bool now) {
#ifdef __linux__
  constexpr int collapse = 25;  // MADV_COLLAPSE, since Linux 6.1; older C libraries do not name it
  void* const place = reinterpret_cast<void*>(begin);
  if (madvise(place, bytes, MADV_HUGEPAGE) == 0 && now) madvise(place, bytes, collapse);
#endif
}

// Moves weights to huge pages: a token reads every page once, and with pages of 4 KB it waits for their addresses, longest
// in a virtual machine. Small tensors stand between other things, so it goes by the page: one of which weights take a
// quarter is worth moving. The contents stay.
void use_huge_pages(at::TensorList weights) {
  std::map<uintptr_t, uintptr_t> taken;  // bytes of weights in each page
  for (const Tensor& t : weights)
    if (t.device().is_cpu() && t.is_contiguous()) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr()), end = begin + t.nbytes();
      for (uintptr_t at = begin / huge_page * huge_page; at < end; at += huge_page)
        taken[at] += std::min(end, at + huge_page) - std::max(begin, at);
    }
  for (const auto& [at, bytes] : taken)
    if (bytes >= huge_page / 4) advise_huge(at, huge_page, true);
}

// Memory for the matrices of a state. A new state follows an old one at every token, each tens of megabytes large with
// several sequences; memory fresh from the system would cost more than the recurrence. So the last two are kept, and
// used again once nobody else holds them.
Tensor state_memory(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static std::mutex lock;
  static std::array<Tensor, 2> kept;
  static size_t oldest = 0;
  const std::lock_guard<std::mutex> guard(lock);
  for (const Tensor& t : kept)
    if (t.defined() && t.sizes() == sizes && t.is_inference() == c10::InferenceMode::is_enabled() &&
        t.use_count() == 1 && t.storage().use_count() == 1)
      return t;
  const Tensor fresh = at::empty(sizes, options);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.const_data_ptr()), end = begin + fresh.nbytes();
  const uintptr_t first = (begin + huge_page - 1) / huge_page * huge_page, last = end / huge_page * huge_page;
  if (first < last) advise_huge(first, last - first, false);
  kept[oldest] = fresh;
  oldest = 1 - oldest;
  return fresh;
}

// Where the sequences from `first` on find theirs in the memory of a batch; E: of the activations.
template <typename E>
std::vector<LayerMemory> behind(const std::vector<LayerMemory>& memory, const Step& s, int64_t first) {
  const int64_t shift = first * s.hidden, matrix = first * s.attention * (s.attention / s.heads);
  std::vector<LayerMemory> found;
  for (const LayerMemory& m : memory)
    found.push_back(
        {static_cast<const E*>(m.att_shift) + shift, static_cast<const E*>(m.ffn_shift) + shift, m.wkv + matrix,
         static_cast<E*>(m.new_att_shift) + shift, static_cast<E*>(m.new_ffn_shift) + shift, m.new_wkv + matrix});
  return found;
}

float* aligned(const Tensor& scratch) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data_ptr()) + 63) / 64 * 64);
}

// Moves the sequences of a step, on a team of threads. Where each of them has several sequences, and the weights stay in
// the caches, each reads all weights for its own sequences alone: nobody waits for anybody, whatever else takes the
// processor away meanwhile. Else they share the rows of the weights, unless it is too crowded for that.
template <typename E>
void move(Step s, const std::vector<LayerMemory>& memory, int threads, bool weights_stay) {
  const StepKernels& kernels = chosen_step_kernels();
  const auto run = std::is_same<E, float>::value ? kernels.step_f32 : kernels.step_bf16;
  const bool by_sequences = weights_stay && s.batch >= THREAD_SEQUENCES * threads;
  s.shares = by_sequences ? 1 : threads;
  if (threads > 1 && !by_sequences && crowd.takes_one()) threads = 1;
  const Tensor scratch = at::empty({step_scratch(s, threads) + 16}, at::kFloat);
  s.memory = memory.data();
  s.scratch = aligned(scratch);
  Barrier barrier;
#ifdef _OPENMP
  if (threads > 1) {
    const auto begin = std::chrono::steady_clock::now();
    std::atomic<int64_t> work{0};
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num(), team = omp_get_num_threads();
      if (by_sequences) {
        const int64_t first = s.batch * thread / team, last = s.batch * (thread + 1) / team;
        const std::vector<LayerMemory> own = behind<E>(memory, s, first);
        Step part = s;
        part.batch = last - first;
        part.embeds = static_cast<const E*>(s.embeds) + first * s.hidden;
        part.out = static_cast<E*>(s.out) + first * s.hidden;
        part.memory = own.data();
        part.scratch = s.scratch + step_scratch(s, 1) / s.batch * first;
        Barrier alone;
        run(part, alone, 0, 1);
      } else {
        work -= core_time();
        run(s, barrier, thread, team);
        work += core_time();
      }
    }
    const std::chrono::nanoseconds wall = std::chrono::steady_clock::now() - begin;
    if (!by_sequences) crowd.took(wall.count(), work - barrier.waited());
    return;
  }
#endif
  run(s, barrier, 0, 1);
}

// embeds (B, D) before ln0; weights, scales: see `read_model`; state: att_shift (B, D), wkv (B, H, N, N) float32 and
// ffn_shift (B, D) of each layer. Returns hidden (B, D) after ln_out, wkv (L, B, H, N, N) and the shifts (L, 2, B, D)
// behind the token; nothing where the arguments are not of that kind.
std::vector<Tensor> rwkv6_step(
    const Tensor& embeds, at::TensorList weights, at::TensorList scales, at::TensorList state, int64_t heads,
    double norm_eps, double head_eps) {
  const auto type = embeds.scalar_type();
  if (!embeds.device().is_cpu() || embeds.dim() != 2 || embeds.numel() == 0 || !embeds.is_contiguous()) return {};
  const Model model = read_model(weights, scales, type, embeds.size(1), heads);
  if (model.layers.empty() || state.size() != 3 * model.layers.size()) return {};
  Step s{};
  static_cast<Sizes&>(s) = model;
  s.batch = embeds.size(0);
  s.layers = model.layers.size();
  s.norm_eps = norm_eps;
  s.head_eps = head_eps;
  s.ln0 = model.ln0;
  s.ln_out = model.ln_out;

  const int64_t size = s.attention / heads, shifts = s.batch * s.hidden, area = s.batch * s.attention * size;
  const Tensor hidden = at::empty({s.batch, s.hidden}, embeds.options());
  const Tensor wkv = state_memory({s.layers, s.batch, heads, size, size}, embeds.options().dtype(at::kFloat));
  const Tensor shift = at::empty({s.layers, 2, s.batch, s.hidden}, embeds.options());
  Reader old(state, {}, type);
  std::vector<LayerMemory> memory(s.layers);
  char* new_shift = static_cast<char*>(shift.data_ptr());
  for (int64_t n = 0; n < s.layers; n++) {
    LayerMemory& m = memory[n];
    m.att_shift = old.vector(shifts);
    m.wkv = static_cast<const float*>(old.pointer(old.next(), area, at::kFloat));
    m.ffn_shift = old.vector(shifts);
    m.new_att_shift = new_shift + 2 * n * shifts * shift.element_size();
    m.new_ffn_shift = new_shift + (2 * n + 1) * shifts * shift.element_size();
    m.new_wkv = wkv.mutable_data_ptr<float>() + n * area;
  }
  if (!old.finished()) return {};

  s.embeds = embeds.data_ptr();
  s.out = hidden.data_ptr();
  s.weights = model.layers.data();
  int threads = 1;
#ifdef _OPENMP
  if (!omp_in_parallel()) threads = at::get_num_threads();
#endif
  const bool stay = stay_in_caches(weights);
  type == at::kFloat ? move<float>(s, memory, threads, stay) : move<uint16_t>(s, memory, threads, stay);
  return {hidden, wkv, shift};
}

// x (B, columns) times the transpose of weight (rows, columns), of x's type or int8 with a scale (rows) float32.
Tensor small_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "x has shape ", x.sizes(),
      " but weight has shape ", weight.sizes());
  TORCH_CHECK_VALUE(weight.is_contiguous(), "weight must be contiguous");
  TORCH_CHECK_VALUE(
      scale ? weight.scalar_type() == at::kChar : weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16,
      "weight has dtype ", weight.scalar_type(), "; use float32, bfloat16, or int8 with a scale");
  Matrix w;
  w.rows = weight.size(0);
  w.columns = weight.size(1);
  w.data = weight.data_ptr();
  if (scale) {
    TORCH_CHECK_VALUE(
        scale->scalar_type() == at::kFloat && scale->is_contiguous() && scale->numel() == w.rows,
        "scale must be float32 with one number for each row of weight");
    w.scale = scale->data_ptr<float>();
    w.format = Format::int8;
  } else {
    w.format = weight.scalar_type() == at::kFloat ? Format::f32 : Format::bf16;
  }
  const Tensor in = x.to(at::kFloat).contiguous();
  // The rows of y are apart by no power of two: they would all meet in the same few lines of the cache.
  const int64_t stride = x.size(0) == 1 ? w.rows : w.rows + 16;
  const Tensor y = at::empty({x.size(0), stride}, in.options());
  const auto product = chosen_step_kernels().product;
  const int64_t grain = std::max<int64_t>(16, (1 << 15) / std::max<int64_t>(1, w.columns));
  at::parallel_for(0, w.rows, grain, [&](int64_t begin, int64_t end) {
    product(w, in.data_ptr<float>(), x.size(0), y.data_ptr<float>(), stride, begin, end);
  });
  return y.narrow(1, 0, w.rows).to(x.scalar_type()).contiguous();
}

}  // namespace
}  // namespace visualrwkv

TORCH_LIBRARY_FRAGMENT(visualrwkv, m) {
  m.def(
      "rwkv6_step(Tensor embeds, Tensor[] weights, Tensor[] scales, Tensor[] state, int heads, float norm_eps, "
      "float head_eps) -> Tensor[]");
  m.def("use_huge_pages(Tensor[] weights) -> ()");
  m.def("small_linear(Tensor x, Tensor weight, Tensor? scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(visualrwkv, CPU, m) {
  m.impl("rwkv6_step", visualrwkv::rwkv6_step);
  m.impl("use_huge_pages", visualrwkv::use_huge_pages);
  m.impl("small_linear", visualrwkv::small_linear);
}
