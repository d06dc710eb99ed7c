// The backward kernels: one walks forward in time, for the gradient of r; one backward, for those of k, v, w and the
// initial state. With G the gradient of the state, R = r decayed from the start of a chunk, K = k decayed to its end:
//
//   dA = tril(dY V^T)        dr' = before (S dY^T + (K / total)^T dA^T)     dr = dr' + dA_tt u k
//   dV = A^T dY + K G        dk' = after (G V^T + (R / total)^T dA)         dk = dk' + dA_tt u r
//   G <- total G + R^T dY    du = sum dA_tt r k
//
// The gradient of the logarithm of the decay needs no products of the size of the state. With D_t = sum_j (G o S) after
// token t, D_t = dlw_t + k_t dk'_t and D_t-1 = dlw_t + r_t dr'_t. That is a difference of sums, with the rounding error
// of the largest: D starts anew from the states at the end of each span, and where decays are strong (dlw is far
// smaller than its terms) the terms that pass through token t are added up instead. No atomics: results repeat.
#pragma once

#include "wkv6_cuda_forward.cuh"

namespace visualrwkv::cuda {

// Below this a channel is strong for the gradient of its decay. Exact: where the difference would be too far off. Else
// where what passes from the state before the chunk to the one after it, and then is left out, is too small to be seen.
template <bool Exact>
constexpr float mild_total_backward = Exact ? 1e-3f : 3e-8f;

template <int N, bool Exact>
__global__ void __launch_bounds__(2 * N) segment_dstate_kernel(const BackwardProblem p) {
  segment_share<N, Exact, true>(p.r, p.dy, p.w, p.heads, p.time, p.plan, p.dstates, p.decays);
}

__global__ void __launch_bounds__(scan_threads) scan_dstates_kernel(const BackwardProblem p) {
  scan_segments<true>(p.plan, p.size, p.dfinal, p.dstates, p.decays);
}

// dA: the parts summed, below the diagonal; the diagonal apart.
template <int N>
__device__ inline void finish_dscores(Square& scores, float* diagonal, const Square* parts) {
  for (int place = threadIdx.x; place < chunk_length * chunk_length; place += 2 * N) {
    const int t = place / chunk_length, s = place % chunk_length;
    float sum = 0.0f;
    if (s <= t)
      for (int part = 0; part < N / 16; ++part) sum += parts[part][t][s];
    scores[t][s] = s < t ? sum : 0.0f;
    if (s == t) diagonal[t] = sum;
  }
}

__device__ inline bool ends_span(const Plan& plan, int chunk) {
  return (chunk + 1) % plan.span_chunks == 0 || chunk + 1 == plan.chunks;
}

template <int N>
struct ReceptanceShared {
  ChunkRows<N> k, v, dy;
  ChunkRows<N> plain_k, decay;  // written only in chunks with a strong channel
  float total[N], inverse[N];
  Square parts[N / 16], dscores;
  float diagonal[chunk_length];
};

// dr and du, the states at the end of each span, and `products`: r dr', of strong channels without the share of the
// chunk's own tokens. A warp has 16 rows of the state.
template <int N, bool Exact>
__global__ void __launch_bounds__(2 * N) receptance_kernel(const BackwardProblem p) {
  VISUALRWKV_SHARED(ReceptanceShared<N>, shared);
  const Place at;
  const Segment segment(p.plan);
  const float u = p.u[segment.matrix % p.heads * N + at.channel];
  const int64_t r_place = place_of(p.r, segment.matrix, p.heads, at.channel);
  const int64_t k_place = place_of(p.k, segment.matrix, p.heads, at.channel);
  const int64_t v_place = place_of(p.v, segment.matrix, p.heads, at.channel);
  const int64_t w_place = place_of(p.w, segment.matrix, p.heads, at.channel);
  const int64_t dy_place = place_of(p.dy, segment.matrix, p.heads, at.channel);
  const int64_t dr_place = place_of(p.dr, segment.matrix, p.heads, at.channel);
  float* products = p.products + segment.matrix * p.time * N + at.channel;

  StateRows<N> s;
  const float* start = p.plan.segments > 1 ? p.states + segment.index * N * N
                       : p.state          ? p.state + segment.matrix * N * N
                                          : nullptr;
  load_state<N, false>(s, start, at);
  float du = 0.0f;
  int64_t token = int64_t(segment.first) * chunk_length + at.half * half_chunk;
  Tokens k = fetch(p.k, k_place, token, p.time), v = fetch(p.v, v_place, token, p.time);
  Tokens w = fetch(p.w, w_place, token, p.time), dy = fetch(p.dy, dy_place, token, p.time);

  for (int chunk = segment.first; chunk < segment.end; ++chunk) {
    const Decays decays(p.w, w, token, p.time, at);
#pragma unroll
    for (int q = 0; q < half_chunk; ++q) {
      const int t = at.half * half_chunk + q;
      shared.k[t][at.channel] = number(p.k.type, k.bits[q]) * decays.after[q];
      shared.v[t][at.channel] = number(p.v.type, v.bits[q]);
      shared.dy[t][at.channel] = number(p.dy.type, dy.bits[q]);
    }
    const bool strong = decays.strong(mild_total_backward<Exact>);
    if (at.half == 0) {
      shared.total[at.channel] = decays.total;
      shared.inverse[at.channel] = strong ? 0.0f : 1.0f / decays.total;
    }
    if (__syncthreads_or(strong)) {
#pragma unroll
      for (int q = 0; q < half_chunk; ++q) {
        const int t = at.half * half_chunk + q;
        shared.plain_k[t][at.channel] = number(p.k.type, k.bits[q]);
        shared.decay[t][at.channel] = decays.each[q];
      }
    }
    const Tokens r = fetch(p.r, r_place, token, p.time), k_here = k;
    const int64_t here = token;
    token += chunk_length;
    if (chunk + 1 < segment.end) {
      k = fetch(p.k, k_place, token, p.time), v = fetch(p.v, v_place, token, p.time);
      w = fetch(p.w, w_place, token, p.time), dy = fetch(p.dy, dy_place, token, p.time);
    }

    partial_scores<N, as_read<Exact>, as_read<Exact>>(shared.parts[at.warp], shared.dy, shared.v, nullptr, at);
    __syncthreads();
    finish_dscores<N>(shared.dscores, shared.diagonal, shared.parts);
    __syncthreads();

    float x[2][4] = {};  // transposed: 16 channels, 16 tokens
    apply_state<N, Operand::split, as_read<Exact>>(x, s, shared.dy, at);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      float a[4];
      transposed_a(a, shared.k, 8 * step, at.first, at);
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] *= shared.inverse[at.first + at.row + 8 * (e % 2)];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float b[2];
        transposed_b(b, shared.dscores, 8 * n, 8 * step, at);
        add_product<Operand::split, Operand::split>(x[n], a, b);
      }
    }
    update_state<N, Operand::split, as_read<Exact>, false>(s, shared.total, shared.k, shared.v, at);
    if (ends_span(p.plan, chunk)) {
      const int64_t span = segment.matrix * p.plan.spans + chunk / p.plan.span_chunks;
      store_state<N, false>(p.checkpoints + span * N * N, s, at);
    }

    put_transposed(shared.parts[at.warp], x, at);
    __syncwarp();
#pragma unroll
    for (int q = 0; q < half_chunk; ++q) {
      const int t = at.half * half_chunk + q;
      const float rq = number(p.r.type, r.bits[q]), kq = number(p.k.type, k_here.bits[q]);
      float dr = decays.before[q] * shared.parts[at.warp][t][at.lane % 16];
      const float product = rq * dr;
      if (strong) {
        float decay = 1.0f;
        for (int i = t - 1; i >= 0; --i) {
          dr += shared.dscores[t][i] * shared.plain_k[i][at.channel] * decay;
          decay *= shared.decay[i][at.channel];
        }
      }
      if (here + q < p.time) {
        products[(here + q) * N] = product;
        store(p.dr, dr_place + (here + q) * p.dr.time_stride, dr + shared.diagonal[t] * u * kq);
        du += shared.diagonal[t] * rq * kq;
      }
    }
    __syncthreads();
  }
  du += __shfl_xor_sync(all_lanes, du, 16);
  if (at.half == 0) p.du[segment.index * N + at.channel] = du;
}

template <int N>
struct KeyValueShared {
  ChunkRows<N> r, k, v, dy;
  float total[N], inverse[N], edge[N];
  Square parts[N / 16], dparts[N / 16], scores, dscores;
  float bonus[N / 16][chunk_length], diagonal[chunk_length];
  StrongRows<N> strong;
};

// dlw of a strong channel, from the last token to the first: the pairs of tokens s < t < last around t. The caller adds
// the terms of the states before and after the chunk.
template <int N>
struct StrongPairs {
  const StrongRows<N>& x;
  const Square& dscores;
  const int channel;
  float later[chunk_length];  // of s: sum over last > t of dA_last,s r_last d_last-1 ... d_t+1

  __device__ StrongPairs(const StrongRows<N>& x, const Square& dscores, int channel)
      : x(x), dscores(dscores), channel(channel) {
#pragma unroll 1
    for (int s = 0; s < chunk_length; ++s) later[s] = 0.0f;
  }

  __device__ float sum(int t) const {
    float total = 0.0f, decay = x.decay[t][channel];
#pragma unroll 1
    for (int s = t - 1; s >= 0; --s) {
      total += x.k[s][channel] * decay * later[s];
      decay *= x.decay[s][channel];
    }
    return total;
  }

  // From t to the token before it, for those of `count` tokens s that come before t.
  __device__ void step(int t, int count) {
    const float r = x.r[t][channel], decay = x.decay[t][channel];
#pragma unroll 1
    for (int s = 0; s < count && s < t; ++s) later[s] = dscores[t][s] * r + decay * later[s];
  }
};

// Of the state's row of the thread's channel and that of its gradient, the sum of the products.
template <int N>
__device__ inline float row_products(const float* state, const StateRows<N>& rows, float* sums, const Place& at) {
  float sum[2] = {};
#pragma unroll
  for (int tile = 0; tile < N / 8; ++tile)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e / 2] += state[state_place<N, false>(tile, e, at)] * rows[tile][e];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(all_lanes, sum[i], 1);
    sum[i] += __shfl_xor_sync(all_lanes, sum[i], 2);
    if (at.pair == 0) sums[at.first + at.row + 8 * i] = sum[i];
  }
  __syncwarp();
  return sums[at.channel];
}

// dk, dv, dw and the gradient of the initial state. A warp has 16 rows of the state's gradient, for dk, and 16 columns,
// for dv.
template <int N, bool Exact>
__global__ void __launch_bounds__(2 * N) key_value_kernel(const BackwardProblem p) {
  VISUALRWKV_SHARED(KeyValueShared<N>, shared);
  const Place at;
  const Segment segment(p.plan);
  const float u = p.u[segment.matrix % p.heads * N + at.channel];
  const int64_t r_place = place_of(p.r, segment.matrix, p.heads, at.channel);
  const int64_t k_place = place_of(p.k, segment.matrix, p.heads, at.channel);
  const int64_t v_place = place_of(p.v, segment.matrix, p.heads, at.channel);
  const int64_t w_place = place_of(p.w, segment.matrix, p.heads, at.channel);
  const int64_t dy_place = place_of(p.dy, segment.matrix, p.heads, at.channel);
  const int64_t dk_place = place_of(p.dk, segment.matrix, p.heads, at.channel);
  const int64_t dv_place = place_of(p.dv, segment.matrix, p.heads, at.channel);
  const int64_t dw_place = place_of(p.dw, segment.matrix, p.heads, at.channel);
  const float* products = p.products + segment.matrix * p.time * N + at.channel;

  StateRows<N> rows, columns;
  const float* end = p.plan.segments > 1 ? p.dstates + segment.index * N * N
                     : p.dfinal         ? p.dfinal + segment.matrix * N * N
                                        : nullptr;
  load_state<N, false>(rows, end, at);
  load_state<N, true>(columns, end, at);
  float edge = 0.0f;  // D after the last token of the chunk
  int64_t token = int64_t(segment.end - 1) * chunk_length + at.half * half_chunk;
  Tokens r = fetch(p.r, r_place, token, p.time), k = fetch(p.k, k_place, token, p.time);
  Tokens v = fetch(p.v, v_place, token, p.time), w = fetch(p.w, w_place, token, p.time);
  Tokens dy = fetch(p.dy, dy_place, token, p.time);

  for (int chunk = segment.end - 1; chunk >= segment.first; --chunk) {
    float through = 0.0f;  // Exact: sum_j of (the state before the chunk o its gradient after the chunk)
    if (ends_span(p.plan, chunk)) {
      const float* state = p.checkpoints + (segment.matrix * p.plan.spans + chunk / p.plan.span_chunks) * N * N;
      edge = row_products<N>(state, rows, shared.edge, at);
      if (Exact) {  // a span is a chunk
        const float* before = chunk > 0 ? state - N * N : p.state ? p.state + segment.matrix * N * N : nullptr;
        if (before) through = row_products<N>(before, rows, shared.edge, at);
      }
    }

    const Decays decays(p.w, w, token, p.time, at);
    const bool strong = decays.strong(mild_total_backward<Exact>);
    float bonus[half_chunk];
#pragma unroll
    for (int q = 0; q < half_chunk; ++q) {
      const int t = at.half * half_chunk + q;
      const float rq = number(p.r.type, r.bits[q]), kq = number(p.k.type, k.bits[q]);
      shared.r[t][at.channel] = rq * decays.before[q];
      shared.k[t][at.channel] = kq * decays.after[q];
      shared.v[t][at.channel] = number(p.v.type, v.bits[q]);
      shared.dy[t][at.channel] = number(p.dy.type, dy.bits[q]);
      bonus[q] = rq * u * kq;
    }
    if (at.half == 0) {
      shared.total[at.channel] = decays.total;
      shared.inverse[at.channel] = strong ? 0.0f : 1.0f / decays.total;
    }
    sum_over_channels(bonus, shared.bonus[at.warp], at);
    const bool any_strong = __syncthreads_or(strong);
    if (any_strong) shared.strong.put(p.r, r, p.k, k, decays, strong, at);
    const Tokens r_here = r, k_here = k, w_here = w;
    const int64_t here = token;
    token -= chunk_length;
    if (chunk > segment.first) {
      r = fetch(p.r, r_place, token, p.time), k = fetch(p.k, k_place, token, p.time);
      v = fetch(p.v, v_place, token, p.time), w = fetch(p.w, w_place, token, p.time);
      dy = fetch(p.dy, dy_place, token, p.time);
    }

    partial_scores<N, rough<Exact>, rough<Exact>>(shared.parts[at.warp], shared.r, shared.k, shared.inverse, at);
    partial_scores<N, as_read<Exact>, as_read<Exact>>(shared.dparts[at.warp], shared.dy, shared.v, nullptr, at);
    __syncthreads();
    finish_scores<N>(shared.scores, shared.parts, shared.bonus, any_strong ? &shared.strong : nullptr);
    finish_dscores<N>(shared.dscores, shared.diagonal, shared.dparts);
    __syncthreads();

    {
      float x[2][4] = {};  // dv transposed: 16 columns, 16 tokens
      apply_state<N, rough<Exact>, rough<Exact>>(x, columns, shared.k, at);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        float a[4];
        transposed_a(a, shared.dy, 8 * step, at.first, at);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float b[2];
          plain_b(b, shared.scores, 8 * step, 8 * n, at);
          add_product<as_read<Exact>, rough<Exact>>(x[n], a, b);
        }
      }
      put_transposed(shared.parts[at.warp], x, at);
    }
    {
      float x[2][4] = {};  // dk' / after, transposed: 16 channels, 16 tokens
      apply_state<N, Operand::split, as_read<Exact>>(x, rows, shared.v, at);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        float a[4];
        transposed_a(a, shared.r, 8 * step, at.first, at);
#pragma unroll
        for (int e = 0; e < 4; ++e) a[e] *= shared.inverse[at.first + at.row + 8 * (e % 2)];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float b[2];
          plain_b(b, shared.dscores, 8 * step, 8 * n, at);
          add_product<Operand::split, Operand::split>(x[n], a, b);
        }
      }
      put_transposed(shared.dparts[at.warp], x, at);
    }
    update_state<N, Operand::split, as_read<Exact>, false>(rows, shared.total, shared.r, shared.dy, at);
    update_state<N, as_read<Exact>, Operand::split, true>(columns, shared.total, shared.dy, shared.r, at);
    __syncwarp();

    // From here on each thread for its channel. dlw from the last token to the first, the second half before the first.
    float dk[half_chunk], product[half_chunk];
    float products_sum = 0.0f, keys_sum = 0.0f;  // of r dr' and of k dk' (strong: their shares of the state)
#pragma unroll
    for (int q = 0; q < half_chunk; ++q) {
      const int t = at.half * half_chunk + q;
      dk[q] = decays.after[q] * shared.dparts[at.warp][t][at.lane % 16];
      product[q] = here + q < p.time ? products[(here + q) * N] : 0.0f;
      products_sum += product[q];
      keys_sum += number(p.k.type, k_here.bits[q]) * dk[q];
    }
    const float other_products = __shfl_xor_sync(all_lanes, products_sum, 16);
    const float other_keys = __shfl_xor_sync(all_lanes, keys_sum, 16);
    float d = at.half ? edge : edge + (other_products - other_keys);  // D after the last token of this half
    float later_products = at.half ? 0.0f : other_products;           // r dr' of the tokens after q
    StrongPairs<N> pairs(shared.strong, shared.dscores, at.channel);
    const int end_of_half = (at.half + 1) * half_chunk;
    if (strong)
      for (int t = chunk_length - 1; t >= end_of_half; --t) pairs.step(t, end_of_half);
#pragma unroll
    for (int q = half_chunk - 1; q >= 0; --q) {
      const int t = at.half * half_chunk + q;
      const float rq = number(p.r.type, r_here.bits[q]), kq = number(p.k.type, k_here.bits[q]);
      float dlw;
      if (strong) {
        float earlier_keys = at.half ? other_keys : 0.0f;
#pragma unroll
        for (int i = 0; i < half_chunk; ++i)
          if (i < q) earlier_keys += number(p.k.type, k_here.bits[i]) * dk[i];
        dlw = decays.total * through + later_products + earlier_keys + pairs.sum(t);
        pairs.step(t, end_of_half);
        later_products += product[q];
        float decay = 1.0f;
        for (int i = t + 1; i < chunk_length; ++i) {
          dk[q] += shared.dscores[i][t] * shared.strong.r[i][at.channel] * decay;
          decay *= shared.strong.decay[i][at.channel];
        }
      } else {
        dlw = d - kq * dk[q];
      }
      d = dlw + product[q];
      if (here + q < p.time) {
        const float lw = log_decay(p.w.type, w_here.bits[q]);
        store(p.dk, dk_place + (here + q) * p.dk.time_stride, dk[q] + shared.diagonal[t] * u * rq);
        store(p.dv, dv_place + (here + q) * p.dv.time_stride, shared.parts[at.warp][t][at.lane % 16]);
        // A decay of exp(-1e4) is 0 and so is its gradient; without the bound it would be 0 times infinity.
        store(p.dw, dw_place + (here + q) * p.dw.time_stride, (lw < -1e4f ? -1e4f : lw) * dlw);
      }
    }
    edge = __shfl_sync(all_lanes, d, at.lane % 16);
    __syncthreads();
  }
  if (segment.first == 0) store_state<N, false>(p.dstate + segment.matrix * N * N, rows, at);
}

}  // namespace visualrwkv::cuda
