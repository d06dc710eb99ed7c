// The forward kernels: a recurrent one for few tokens, one that works on chunks of 16 tokens, and the two that find the
// states between segments of a long sequence.
#pragma once

#include "wkv6_cuda_tiles.cuh"

namespace visualrwkv::cuda {

// ---- One token after the other, in float32: decoding, and pieces too short for a chunk.

constexpr int recurrent_threads = 128, recurrent_tokens = 8;

template <int N, int Columns>
struct RecurrentShared {
  float r[recurrent_tokens][N], k[recurrent_tokens][N], decay[recurrent_tokens][N];
  float v[recurrent_tokens][Columns];
  float parts[recurrent_threads / 32][recurrent_tokens][Columns];
};

// A block handles some columns of one state. Each thread holds 4 of them, of some rows, in registers; the rows' shares
// of y are added up over the lanes of a warp and, once for several tokens, over the warps.
template <int N, int Columns>
__global__ void __launch_bounds__(recurrent_threads) recurrent_kernel(const ForwardProblem p) {
  constexpr int groups = Columns / 4;                        // of columns
  constexpr int rows = N * groups / recurrent_threads;       // of a thread
  static_assert(rows >= 1 && groups <= 32, "a thread has at least a row, a warp at least all columns");
  using Shared = RecurrentShared<N, Columns>;
  VISUALRWKV_SHARED(Shared, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t matrix = blockIdx.x / (N / Columns);
  const int first_column = blockIdx.x % (N / Columns) * Columns;
  const int column = threadIdx.x % groups * 4, first_row = threadIdx.x / groups * rows;
  const int64_t head = matrix % p.heads;

  float4 s[rows];
  float u[rows];
  const int64_t state_place = (matrix * N + first_row) * N + first_column + column;
#pragma unroll
  for (int x = 0; x < rows; ++x) {
    u[x] = p.u[head * N + first_row + x];
    s[x] = p.state ? *reinterpret_cast<const float4*>(p.state + state_place + x * N) : float4{0.0f, 0.0f, 0.0f, 0.0f};
  }
  const int64_t r_place = place_of(p.r, matrix, p.heads, 0), k_place = place_of(p.k, matrix, p.heads, 0);
  const int64_t w_place = place_of(p.w, matrix, p.heads, 0);
  const int64_t v_place = place_of(p.v, matrix, p.heads, first_column);
  const int64_t y_place = place_of(p.y, matrix, p.heads, first_column);
  const auto read = [](const Rows& x, int64_t place) {
    const uint32_t bits = x.type == Type::f32 ? reinterpret_cast<const uint32_t*>(x.data)[place]
                                              : reinterpret_cast<const uint16_t*>(x.data)[place];
    return number(x.type, bits);
  };

  for (int64_t start = 0; start < p.time; start += recurrent_tokens) {
    const int count = p.time - start < recurrent_tokens ? static_cast<int>(p.time - start) : recurrent_tokens;
    for (int x = threadIdx.x; x < count * N; x += recurrent_threads) {
      const int t = x / N, i = x % N;
      shared.r[t][i] = read(p.r, r_place + (start + t) * p.r.time_stride + i);
      shared.k[t][i] = read(p.k, k_place + (start + t) * p.k.time_stride + i);
      shared.decay[t][i] = expf(-expf(read(p.w, w_place + (start + t) * p.w.time_stride + i)));
    }
    for (int x = threadIdx.x; x < count * Columns; x += recurrent_threads) {
      const int t = x / Columns, j = x % Columns;
      shared.v[t][j] = read(p.v, v_place + (start + t) * p.v.time_stride + j);
    }
    __syncthreads();
    for (int t = 0; t < count; ++t) {
      const float4 v = *reinterpret_cast<const float4*>(&shared.v[t][column]);
      float y[4] = {}, bonus = 0.0f;
#pragma unroll
      for (int x = 0; x < rows; ++x) {
        const float r = shared.r[t][first_row + x], k = shared.k[t][first_row + x];
        const float decay = shared.decay[t][first_row + x];
        bonus += r * u[x] * k;
        y[0] += r * s[x].x, y[1] += r * s[x].y, y[2] += r * s[x].z, y[3] += r * s[x].w;
        s[x].x = decay * s[x].x + k * v.x, s[x].y = decay * s[x].y + k * v.y;
        s[x].z = decay * s[x].z + k * v.z, s[x].w = decay * s[x].w + k * v.w;
      }
      y[0] += bonus * v.x, y[1] += bonus * v.y, y[2] += bonus * v.z, y[3] += bonus * v.w;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int other = groups; other < 32; other *= 2) y[c] += __shfl_xor_sync(all_lanes, y[c], other);
        if (lane < groups) shared.parts[warp][t][column + c] = y[c];
      }
    }
    __syncthreads();
    for (int x = threadIdx.x; x < count * Columns; x += recurrent_threads) {
      const int t = x / Columns, j = x % Columns;
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < recurrent_threads / 32; ++part) sum += shared.parts[part][t][j];
      store(p.y, y_place + (start + t) * p.y.time_stride + j, sum);
    }
    // The next tokens go to r, k, decay and v, which nobody reads any more; `parts` is read until the next barrier.
  }
#pragma unroll
  for (int x = 0; x < rows; ++x) *reinterpret_cast<float4*>(p.final_state + state_place + x * N) = s[x];
}

// ---- Chunks.

// Which chunks of which sequence this block walks through.
struct Segment {
  int64_t matrix, index;  // index: of (matrix, segment)
  int first, end;         // chunks

  __device__ explicit Segment(const Plan& plan)
      : matrix(blockIdx.x / plan.segments), index(blockIdx.x), first(blockIdx.x % plan.segments * plan.segment_chunks) {
    end = first + plan.segment_chunks < plan.chunks ? first + plan.segment_chunks : plan.chunks;
  }
};

template <int N>
struct ForwardShared {
  ChunkRows<N> r, k, v;  // r decayed from the start of the chunk, k to its end
  float total[N], inverse[N];
  Square parts[N / 16], scores;
  float bonus[N / 16][chunk_length];
  StrongRows<N> strong;
};

// The matrix A of the tokens of a chunk, as sums of the warps' parts: what token s < t adds to y_t is A_ts v_s; on the
// diagonal the bonus.
template <int N>
__device__ inline void finish_scores(
    Square& scores, const Square* parts, const float (*bonus)[chunk_length], const StrongRows<N>* strong) {
  for (int place = threadIdx.x; place < chunk_length * chunk_length; place += 2 * N) {
    const int t = place / chunk_length, s = place % chunk_length;
    float sum = 0.0f;
    if (s <= t)
      for (int part = 0; part < N / 16; ++part) sum += s < t ? parts[part][t][s] : bonus[part][t];
    if (s < t && strong != nullptr) sum += strong->score(t, s);
    scores[t][s] = sum;
  }
}

// A warp has 16 columns of the state. Within a chunk, with R and K as they lie in shared memory:
//   y = A V + R S,   A = tril(R (K / total)^T) + strong channels + bonus,   S <- total S + K^T V
// Exact: y is wanted as precise as float32 allows; else the rows are bfloat16, which goes into the tensor cores as it
// is, and y is rounded to bfloat16 anyway. The state is float32 in both.
template <int N, bool Exact>
__global__ void __launch_bounds__(2 * N, N == 64 ? 4 : 1) forward_kernel(const ForwardProblem p) {
  VISUALRWKV_SHARED(ForwardShared<N>, shared);
  const Place at;
  const Segment segment(p.plan);
  const float u = p.u[segment.matrix % p.heads * N + at.channel];
  const int64_t r_place = place_of(p.r, segment.matrix, p.heads, at.channel);
  const int64_t k_place = place_of(p.k, segment.matrix, p.heads, at.channel);
  const int64_t v_place = place_of(p.v, segment.matrix, p.heads, at.channel);
  const int64_t w_place = place_of(p.w, segment.matrix, p.heads, at.channel);
  const int64_t y_place = place_of(p.y, segment.matrix, p.heads, at.channel);

  StateRows<N> s;
  const float* start = p.plan.segments > 1 ? p.states + segment.index * N * N
                       : p.state          ? p.state + segment.matrix * N * N
                                          : nullptr;
  load_state<N, true>(s, start, at);
  int64_t token = int64_t(segment.first) * chunk_length + at.half * half_chunk;
  Tokens r = fetch(p.r, r_place, token, p.time), k = fetch(p.k, k_place, token, p.time);
  Tokens v = fetch(p.v, v_place, token, p.time), w = fetch(p.w, w_place, token, p.time);

  for (int chunk = segment.first; chunk < segment.end; ++chunk) {
    bool any_strong;
    {
      const Decays decays(p.w, w, token, p.time, at);
      float bonus[half_chunk];
#pragma unroll
      for (int q = 0; q < half_chunk; ++q) {
        const int t = at.half * half_chunk + q;
        const float rq = number(p.r.type, r.bits[q]), kq = number(p.k.type, k.bits[q]);
        shared.r[t][at.channel] = rq * decays.before[q];
        shared.k[t][at.channel] = kq * decays.after[q];
        shared.v[t][at.channel] = number(p.v.type, v.bits[q]);
        bonus[q] = rq * u * kq;
      }
      const bool strong = decays.strong(mild_total);
      if (at.half == 0) {
        shared.total[at.channel] = decays.total;
        shared.inverse[at.channel] = strong ? 0.0f : 1.0f / decays.total;
      }
      sum_over_channels(bonus, shared.bonus[at.warp], at);
      any_strong = __syncthreads_or(strong);
      if (any_strong) shared.strong.put(p.r, r, p.k, k, decays, strong, at);
    }
    const int64_t here = token;
    token += chunk_length;
    if (chunk + 1 < segment.end) {  // on its way while this chunk is worked on
      r = fetch(p.r, r_place, token, p.time), k = fetch(p.k, k_place, token, p.time);
      v = fetch(p.v, v_place, token, p.time), w = fetch(p.w, w_place, token, p.time);
    }

    partial_scores<N, rough<Exact>, rough<Exact>>(shared.parts[at.warp], shared.r, shared.k, shared.inverse, at);
    __syncthreads();
    finish_scores<N>(shared.scores, shared.parts, shared.bonus, any_strong ? &shared.strong : nullptr);
    __syncthreads();

    float y[2][4] = {};  // transposed: 16 columns, 16 tokens
    apply_state<N, rough<Exact>, rough<Exact>>(y, s, shared.r, at);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      float a[4];
      transposed_a(a, shared.v, 8 * step, at.first, at);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float b[2];
        transposed_b(b, shared.scores, 8 * n, 8 * step, at);
        add_product<as_read<Exact>, rough<Exact>>(y[n], a, b);
      }
    }
    update_state<N, as_read<Exact>, Operand::split, true>(s, shared.total, shared.v, shared.k, at);

    put_transposed(shared.parts[at.warp], y, at);
    __syncwarp();
#pragma unroll
    for (int q = 0; q < half_chunk; ++q) {
      const float yq = shared.parts[at.warp][at.half * half_chunk + q][at.lane % 16];
      if (here + q < p.time) store(p.y, y_place + (here + q) * p.y.time_stride, yq);
    }
    __syncthreads();
  }
  if (segment.end == p.plan.chunks) store_state<N, true>(p.final_state + segment.matrix * N * N, s, at);
}

// ---- The states between segments: each segment's own share, from zero, then a scan over the segments.

template <int N>
struct SegmentShared {
  ChunkRows<N> x, y;
  float total[N];
};

// Forward in time the share of the state, sum k v decayed to the end of the segment; with Reverse, backward in time,
// the share of its gradient, sum r dy decayed to the start. The rows x are k (or r), y are v (or dy).
template <int N, bool Exact, bool Reverse>
__device__ inline void segment_share(
    const Rows& x_rows, const Rows& y_rows, const Rows& w_rows, int64_t heads, int64_t time, const Plan& plan,
    float* shares, float* segment_decays) {
  VISUALRWKV_SHARED(SegmentShared<N>, shared);
  const Place at;
  const Segment segment(plan);
  const int64_t x_place = place_of(x_rows, segment.matrix, heads, at.channel);
  const int64_t y_place = place_of(y_rows, segment.matrix, heads, at.channel);
  const int64_t w_place = place_of(w_rows, segment.matrix, heads, at.channel);
  StateRows<N> s = {};
  float decay = 1.0f;
  int64_t token = int64_t(Reverse ? segment.end - 1 : segment.first) * chunk_length + at.half * half_chunk;
  Tokens x = fetch(x_rows, x_place, token, time), y = fetch(y_rows, y_place, token, time);
  Tokens w = fetch(w_rows, w_place, token, time);
  for (int chunk = segment.first; chunk < segment.end; ++chunk) {  // counts the chunks, in whatever order
    {
      const Decays decays(w_rows, w, token, time, at);
#pragma unroll
      for (int q = 0; q < half_chunk; ++q) {
        const int t = at.half * half_chunk + q;
        shared.x[t][at.channel] = number(x_rows.type, x.bits[q]) * (Reverse ? decays.before[q] : decays.after[q]);
        shared.y[t][at.channel] = number(y_rows.type, y.bits[q]);
      }
      if (at.half == 0) shared.total[at.channel] = decays.total;
      decay *= decays.total;
    }
    token += Reverse ? -chunk_length : chunk_length;
    if (chunk + 1 < segment.end) {
      x = fetch(x_rows, x_place, token, time), y = fetch(y_rows, y_place, token, time);
      w = fetch(w_rows, w_place, token, time);
    }
    __syncthreads();
    update_state<N, Operand::split, as_read<Exact>, false>(s, shared.total, shared.x, shared.y, at);
    __syncthreads();
  }
  store_state<N, false>(shares + segment.index * N * N, s, at);
  if (at.half == 0) segment_decays[segment.index * N + at.channel] = decay;
}

template <int N, bool Exact, typename Problem>
__global__ void __launch_bounds__(2 * N) segment_state_kernel(const Problem p) {
  segment_share<N, Exact, false>(p.k, p.v, p.w, p.heads, p.time, p.plan, p.states, p.decays);
}

// A thread for each entry of the state. The shares are replaced by the states at the start of the segments (with
// Reverse by the gradients at their end).
constexpr int scan_threads = 256;

template <bool Reverse>
__device__ inline void scan_segments(
    const Plan& plan, int64_t size, const float* start, float* states, const float* decays) {
  const int64_t entry = int64_t(blockIdx.x) * scan_threads + threadIdx.x, square = size * size;
  if (entry >= plan.matrices * square) return;
  const int64_t matrix = entry / square, within = entry % square, key = within / size;
  float carry = start ? start[entry] : 0.0f;
  for (int64_t step = 0; step < plan.segments; ++step) {
    const int64_t index = matrix * plan.segments + (Reverse ? plan.segments - 1 - step : step);
    float& state = states[index * square + within];
    const float share = state;
    state = carry;
    carry = decays[index * size + key] * carry + share;
  }
}

template <typename Problem>
__global__ void __launch_bounds__(scan_threads) scan_states_kernel(const Problem p) {
  scan_segments<false>(p.plan, p.size, p.state, p.states, p.decays);
}

}  // namespace visualrwkv::cuda
