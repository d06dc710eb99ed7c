// Which CUDA kernel does what, and how the sequences are cut for them.

#ifndef VISUALRWKV_EMULATION  // tests/cuda_emulation.h stands in for these two
#include <cuda_runtime.h>

#include "wkv6_cuda_primitives.cuh"
#endif

#include <algorithm>
#include <cstdint>

#include "wkv6_cuda_backward.cuh"

namespace visualrwkv::cuda {
namespace {

constexpr int64_t recurrent_limit = 16;  // shorter pieces are not worth a chunk
constexpr int shortest_segment = 8, longest_span = 8;  // in chunks
constexpr int64_t most_blocks = 0x7fffffff;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Results in float16 are rounded no more coarsely than the tensor cores round operands: it goes the way of float32.
bool is_coarse(const Rows& x) { return x.data == nullptr || x.type == Type::bf16; }

template <typename Kernel, typename Problem>
const char* run(Kernel* kernel, int64_t blocks, int threads, size_t shared, const Problem& p, void* stream) {
  const cudaError_t error = launch(kernel, blocks, threads, shared, p, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int64_t blocks_of_chunks(const Plan& plan) { return plan.matrices * plan.segments; }

int64_t blocks_of_scan(const Plan& plan, int64_t size) { return ceil_div(plan.matrices * size * size, scan_threads); }

template <int N, bool Exact>
const char* chunk_forward(const ForwardProblem& p, void* stream) {
  if (p.plan.segments > 1) {
    if (const char* error = run(
            segment_state_kernel<N, Exact, ForwardProblem>, blocks_of_chunks(p.plan), 2 * N, sizeof(SegmentShared<N>),
            p, stream))
      return error;
    if (const char* error =
            run(scan_states_kernel<ForwardProblem>, blocks_of_scan(p.plan, N), scan_threads, 0, p, stream))
      return error;
  }
  return run(forward_kernel<N, Exact>, blocks_of_chunks(p.plan), 2 * N, sizeof(ForwardShared<N>), p, stream);
}

template <int N, int Columns>
const char* recurrent_forward(const ForwardProblem& p, void* stream) {
  return run(
      recurrent_kernel<N, Columns>, p.plan.matrices * (N / Columns), recurrent_threads,
      sizeof(RecurrentShared<N, Columns>), p, stream);
}

template <int N>
const char* forward_of_size(const ForwardProblem& p, int multiprocessors, void* stream) {
  if (p.time < recurrent_limit)
    // Few matrices are spread over more blocks, by columns.
    return p.plan.matrices < 2 * multiprocessors ? recurrent_forward<N, 16>(p, stream)
                                                 : recurrent_forward<N, N>(p, stream);
  return p.plan.exact ? chunk_forward<N, true>(p, stream) : chunk_forward<N, false>(p, stream);
}

template <int N, bool Exact>
const char* chunk_backward(const BackwardProblem& p, void* stream) {
  const int64_t blocks = blocks_of_chunks(p.plan), scan_blocks = blocks_of_scan(p.plan, N);
  if (p.plan.segments > 1) {
    if (const char* error = run(
            segment_state_kernel<N, Exact, BackwardProblem>, blocks, 2 * N, sizeof(SegmentShared<N>), p, stream))
      return error;
    if (const char* error = run(scan_states_kernel<BackwardProblem>, scan_blocks, scan_threads, 0, p, stream))
      return error;
    if (const char* error =
            run(segment_dstate_kernel<N, Exact>, blocks, 2 * N, sizeof(SegmentShared<N>), p, stream))
      return error;
    if (const char* error = run(scan_dstates_kernel, scan_blocks, scan_threads, 0, p, stream)) return error;
  }
  if (const char* error = run(receptance_kernel<N, Exact>, blocks, 2 * N, sizeof(ReceptanceShared<N>), p, stream))
    return error;
  return run(key_value_kernel<N, Exact>, blocks, 2 * N, sizeof(KeyValueShared<N>), p, stream);
}

template <int N>
const char* backward_of_size(const BackwardProblem& p, void* stream) {
  return p.plan.exact ? chunk_backward<N, true>(p, stream) : chunk_backward<N, false>(p, stream);
}

}  // namespace

bool has_kernels(int64_t size) { return size == 32 || size == 64 || size == 128; }

Plan make_plan(const Problem<float>& p, const Rows& dy, int multiprocessors) {
  const int64_t matrices = p.batch * p.heads;
  Plan plan;
  plan.matrices = matrices;
  plan.chunks = static_cast<int>(ceil_div(p.time, chunk_length));
  plan.exact = !(is_coarse(p.r) && is_coarse(p.k) && is_coarse(p.v) && is_coarse(dy));
  // Enough matrices fill the GPU by themselves. Else segments do, at the price of a second walk over the sequence.
  plan.segment_chunks = plan.chunks;
  if (0 < matrices && matrices < multiprocessors) {
    const int64_t segments = std::max<int64_t>(1, ceil_div(2 * multiprocessors, matrices));
    const int64_t wanted = std::max<int64_t>(shortest_segment, ceil_div(plan.chunks, segments));
    plan.segment_chunks = static_cast<int>(std::min<int64_t>(plan.chunks, wanted));
  }
  plan.span_chunks = plan.exact ? 1 : std::min(plan.segment_chunks, longest_span);
  if (plan.segment_chunks < plan.chunks)  // a segment ends where a span does
    plan.segment_chunks = ceil_div(plan.segment_chunks, plan.span_chunks) * plan.span_chunks;
  plan.segments = ceil_div(plan.chunks, plan.segment_chunks);
  plan.spans = ceil_div(plan.chunks, plan.span_chunks);
  return plan;
}

const char* forward(const ForwardProblem& p, int multiprocessors, void* stream) {
  if (p.plan.matrices == 0) return nullptr;
  if (std::max(blocks_of_chunks(p.plan), blocks_of_scan(p.plan, p.size)) > most_blocks) return "too many sequences";
  switch (p.size) {
    case 32: return forward_of_size<32>(p, multiprocessors, stream);
    case 64: return forward_of_size<64>(p, multiprocessors, stream);
    case 128: return forward_of_size<128>(p, multiprocessors, stream);
    default: return "there are kernels for heads of 32, 64 and 128 channels";
  }
}

const char* backward(const BackwardProblem& p, void* stream) {
  if (p.plan.matrices == 0) return nullptr;
  if (std::max(blocks_of_chunks(p.plan), blocks_of_scan(p.plan, p.size)) > most_blocks) return "too many sequences";
  switch (p.size) {
    case 32: return backward_of_size<32>(p, stream);
    case 64: return backward_of_size<64>(p, stream);
    case 128: return backward_of_size<128>(p, stream);
    default: return "there are kernels for heads of 32, 64 and 128 channels";
  }
}

}  // namespace visualrwkv::cuda
