// The pieces the chunk kernels are made of: products of small matrices on the tensor cores, reading and writing the
// rows of the tensors, and the products of decays within a chunk.
//
// A block has two threads for each channel and a warp for each 16 channels. Where rows are read or written, a thread
// stands for one channel and one half of the chunk; the two halves of a channel are 16 lanes apart.
#pragma once

#include "wkv6_cuda.h"

namespace visualrwkv::cuda {

constexpr int half_chunk = chunk_length / 2;
constexpr unsigned all_lanes = 0xffffffffu;

struct Place {
  int lane, warp;
  int channel, half;  // what the thread reads and writes
  int first;          // the warp's first channel
  int row, pair;      // the lane's place in the matrices of the tensor cores

  __device__ Place()
      : lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        channel(16 * warp + lane % 16),
        half(lane / 16),
        first(16 * warp),
        row(lane / 4),
        pair(lane % 4) {}
};

// Rows of a chunk in shared memory. The padding makes the reads below fall into different banks.
template <int N>
using ChunkRows = float[chunk_length][N + 8];
// A matrix of weights between the tokens of a chunk, and room for a 16 x 16 result of a warp.
using Square = float[chunk_length][chunk_length + 4];

// ---- Products. A 16 x 8 operand a, an 8 x 8 operand b, a 16 x 8 result d. Lane (row, pair) holds of a 16 x 8 matrix
// the places (row, .) and (row + 8, .), and of d the columns 2 pair and 2 pair + 1. Along the inner dimension k a
// product is free to choose the order, as long as both operands choose the same: "adjacent" operands hold k = 2 pair
// and 2 pair + 1 (the order in which d is held; one 64-bit read where k is contiguous), the others pair and pair + 4.

// The tensor cores read the 11 leading bits of a number. An operand is `whole` where it has no more (what came in as
// bfloat16), `rounded` where they do, or `split`: the rest is a second term, worth one more product.
enum class Operand { whole, rounded, split };

// The rows of the tensors as they were read, and what is made of them where the result is rounded to bfloat16.
template <bool Exact>
constexpr Operand as_read = Exact ? Operand::split : Operand::whole;
template <bool Exact>
constexpr Operand rough = Exact ? Operand::split : Operand::rounded;

template <Operand A, Operand B>
__device__ inline void multiply_add(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    a_high[x] = A == Operand::whole ? __float_as_uint(a[x]) : round_to_tf32(a[x]);
    if (A == Operand::split) a_low[x] = round_to_tf32(a[x] - __uint_as_float(a_high[x]));
  }
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    b_high[x] = B == Operand::whole ? __float_as_uint(b[x]) : round_to_tf32(b[x]);
    if (B == Operand::split) b_low[x] = round_to_tf32(b[x] - __uint_as_float(b_high[x]));
  }
  if (A == Operand::split) tensor_core_multiply_add(d, a_low, b_high);
  if (B == Operand::split) tensor_core_multiply_add(d, a_high, b_low);
  tensor_core_multiply_add(d, a_high, b_high);
}

// a[m][k] = x[m][k0 + k]
template <int W>
__device__ inline void adjacent_a(float (&a)[4], const float (*x)[W], int k0, const Place& at) {
  const float2 low = *reinterpret_cast<const float2*>(&x[at.row][k0 + 2 * at.pair]);
  const float2 high = *reinterpret_cast<const float2*>(&x[at.row + 8][k0 + 2 * at.pair]);
  a[0] = low.x, a[1] = high.x, a[2] = low.y, a[3] = high.y;
}

// b[k][n] = x[n0 + n][k0 + k]
template <int W>
__device__ inline void adjacent_b(float (&b)[2], const float (*x)[W], int n0, int k0, const Place& at) {
  const float2 both = *reinterpret_cast<const float2*>(&x[n0 + at.row][k0 + 2 * at.pair]);
  b[0] = both.x, b[1] = both.y;
}

// An earlier result as the operand a of an adjacent product.
__device__ inline void result_a(float (&a)[4], const float (&d)[4]) {
  a[0] = d[0], a[1] = d[2], a[2] = d[1], a[3] = d[3];
}

// a[m][k] = x[k0 + k][m0 + m]
template <int W>
__device__ inline void transposed_a(float (&a)[4], const float (*x)[W], int k0, int m0, const Place& at) {
  const float(*from)[W] = x + k0 + at.pair;
  const int m = m0 + at.row;
  a[0] = from[0][m], a[1] = from[0][m + 8], a[2] = from[4][m], a[3] = from[4][m + 8];
}

// b[k][n] = x[k0 + k][n0 + n]
template <int W>
__device__ inline void plain_b(float (&b)[2], const float (*x)[W], int k0, int n0, const Place& at) {
  b[0] = x[k0 + at.pair][n0 + at.row], b[1] = x[k0 + at.pair + 4][n0 + at.row];
}

// b[k][n] = x[n0 + n][k0 + k]
template <int W>
__device__ inline void transposed_b(float (&b)[2], const float (*x)[W], int n0, int k0, const Place& at) {
  b[0] = x[n0 + at.row][k0 + at.pair], b[1] = x[n0 + at.row][k0 + at.pair + 4];
}

// The 16 x 16 result d of a warp as x[n][m] (for the thread of a channel m to read its tokens n), or as x[m][n].
__device__ inline void put_transposed(float (*x)[chunk_length + 4], const float (&d)[2][4], const Place& at) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[8 * n + 2 * at.pair + e % 2][at.row + 8 * (e / 2)] = d[n][e];
}

__device__ inline void put(float (*x)[chunk_length + 4], const float (&d)[2][4], const Place& at) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[at.row + 8 * (e / 2)][8 * n + 2 * at.pair + e % 2] = d[n][e];
}

// d += a b. Tensor cores round what they add up toward zero, and errors of one sign do not cancel (csrc/README.md). So
// they sum no more than 16 products, from zero; what is more than these is added in float32.
template <Operand A, Operand B>
__device__ inline void add_product(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  float sum[4] = {};
  multiply_add<A, B>(sum, a, b);
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] += sum[e];
}

// ---- States. A warp holds 16 rows of an N x N matrix as results d: of a state the rows of 16 keys, or transposed,
// the columns of 16 values.

template <int N>
using StateRows = float[N / 8][4];

template <int N, bool Transposed>
__device__ inline int state_place(int tile, int e, const Place& at) {
  const int m = at.first + at.row + 8 * (e / 2), n = 8 * tile + 2 * at.pair + e % 2;
  return Transposed ? n * N + m : m * N + n;
}

template <int N, bool Transposed>
__device__ inline void load_state(StateRows<N>& s, const float* from, const Place& at) {
#pragma unroll
  for (int tile = 0; tile < N / 8; ++tile)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[tile][e] = from ? from[state_place<N, Transposed>(tile, e, at)] : 0.0f;
}

template <int N, bool Transposed>
__device__ inline void store_state(float* to, const StateRows<N>& s, const Place& at) {
#pragma unroll
  for (int tile = 0; tile < N / 8; ++tile)
#pragma unroll
    for (int e = 0; e < 4; ++e) to[state_place<N, Transposed>(tile, e, at)] = s[tile][e];
}

// The state moves past a chunk: rows decay by `total`, then the product of the chunk's rows x (this warp's columns) and
// y is added. Transposed, the columns decay.
template <int N, Operand X, Operand Y, bool Transposed>
__device__ inline void update_state(
    StateRows<N>& s, const float* total, const float (*x)[N + 8], const float (*y)[N + 8], const Place& at) {
  float a[2][4];
#pragma unroll
  for (int step = 0; step < 2; ++step) transposed_a(a[step], x, 8 * step, at.first, at);
#pragma unroll
  for (int tile = 0; tile < N / 8; ++tile) {
    float sum[4] = {};  // as in `add_product`
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      float b[2];
      plain_b(b, y, 8 * step, 8 * tile, at);
      multiply_add<X, Y>(sum, a[step], b);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int channel = Transposed ? 8 * tile + 2 * at.pair + e % 2 : at.first + at.row + 8 * (e / 2);
      s[tile][e] = s[tile][e] * total[channel] + sum[e];
    }
  }
}

// d += (rows of the state of this warp) x^T, with x of shape (16, N)
template <int N, Operand State, Operand X>
__device__ inline void apply_state(
    float (&d)[2][4], const StateRows<N>& s, const float (*x)[N + 8], const Place& at) {
#pragma unroll
  for (int tile = 0; tile < N / 8; ++tile) {
    float a[4];
    result_a(a, s[tile]);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float b[2];
      adjacent_b(b, x, 8 * n, 8 * tile, at);
      add_product<State, X>(d[n], a, b);
    }
  }
}

// part = x y^T over this warp's 16 channels; `scale` of a channel multiplies y, where given.
template <int N, Operand X, Operand Y>
__device__ inline void partial_scores(
    Square& part, const float (*x)[N + 8], const float (*y)[N + 8], const float* scale, const Place& at) {
  float d[2][4] = {};
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const int k = at.first + 8 * step;
    float a[4];
    adjacent_a(a, x, k, at);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float b[2];
      adjacent_b(b, y, 8 * n, k, at);
      if (scale) b[0] *= scale[k + 2 * at.pair], b[1] *= scale[k + 2 * at.pair + 1];
      multiply_add<X, Y>(d[n], a, b);
    }
  }
  put(part, d, at);
}

// ---- Rows of the tensors. A thread reads and writes its channel of the 8 tokens of its half.

struct Tokens {
  uint32_t bits[half_chunk];
};

__device__ inline float number(Type type, uint32_t bits) {
  if (type == Type::f32) return __uint_as_float(bits);
  return type == Type::bf16 ? __uint_as_float(bits << 16) : float_of_half(bits);
}

__device__ inline int64_t place_of(const Rows& x, int64_t matrix, int64_t heads, int channel) {
  return matrix / heads * x.batch_stride + matrix % heads * x.head_stride + channel;
}

// The numbers as they lie in memory: nothing waits for them before they are used. Tokens past the end are 0.
__device__ inline Tokens fetch(const Rows& x, int64_t place, int64_t first_token, int64_t time) {
  Tokens tokens;
#pragma unroll
  for (int q = 0; q < half_chunk; ++q) tokens.bits[q] = 0;
  if (x.data == nullptr) return tokens;
  if (x.type == Type::f32) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(x.data) + place;
#pragma unroll
    for (int q = 0; q < half_chunk; ++q)
      if (first_token + q < time) tokens.bits[q] = from[(first_token + q) * x.time_stride];
  } else {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(x.data) + place;
#pragma unroll
    for (int q = 0; q < half_chunk; ++q)
      if (first_token + q < time) tokens.bits[q] = from[(first_token + q) * x.time_stride];
  }
  return tokens;
}

__device__ inline void store(const Rows& x, int64_t place, float value) {
  if (x.type == Type::f32)
    reinterpret_cast<float*>(x.data)[place] = value;
  else
    reinterpret_cast<uint16_t*>(x.data)[place] = x.type == Type::bf16 ? bfloat16_of_float(value) : half_of_float(value);
}

// ---- Decays. Products of decays instead of the exponential of a sum of logarithms: they have the precision of their
// factors however strong some of them are, they cannot overflow, and a complete decay is a factor 0.
//
// Between token s and a later token t a channel decays by d_s+1 ... d_t-1 = before_t after_s / total. A channel is mild
// where total is a number that can be divided by; in the others this pair product is multiplied out ("strong" below).

constexpr float mild_total = 1e-12f;

__device__ inline float log_decay(Type type, uint32_t w) { return -expf(number(type, w)); }

struct Decays {
  float each[half_chunk];    // of this half's tokens; past the end of the sequence nothing decays
  float before[half_chunk];  // from the start of the chunk to before the token
  float after[half_chunk];   // from after the token to the end of the chunk
  float total;               // of the chunk

  __device__ Decays(const Rows& w, const Tokens& tokens, int64_t first_token, int64_t time, const Place& at) {
    float product = 1.0f;
#pragma unroll
    for (int q = 0; q < half_chunk; ++q) {
      each[q] = first_token + q < time ? expf(log_decay(w.type, tokens.bits[q])) : 1.0f;
      before[q] = product;
      product *= each[q];
    }
    float suffix = 1.0f;
#pragma unroll
    for (int q = half_chunk - 1; q >= 0; --q) {
      after[q] = suffix;
      suffix *= each[q];
    }
    const float other = __shfl_xor_sync(all_lanes, product, 16);
#pragma unroll
    for (int q = 0; q < half_chunk; ++q) (at.half ? before[q] : after[q]) *= other;
    total = product * other;
  }

  __device__ bool strong(float mild) const { return !(total >= mild); }  // also where it is not a number
};

// Sums over the 16 channels of a warp, for each token: x[q] of 8 tokens and both halves, to sums[16].
__device__ inline void sum_over_channels(float (&x)[half_chunk], float* sums, const Place& at) {
#pragma unroll
  for (int count = half_chunk / 2, bit = 8; count > 0; count /= 2, bit /= 2) {
    const bool upper = at.lane & bit;  // each step halves the tokens a lane has to do with
#pragma unroll
    for (int q = 0; q < count; ++q) {
      const float sent = upper ? x[q] : x[q + count];
      x[q] = (upper ? x[q + count] : x[q]) + __shfl_xor_sync(all_lanes, sent, bit);
    }
  }
  x[0] += __shfl_xor_sync(all_lanes, x[0], 1);
  if (at.lane % 2 == 0) sums[half_chunk * at.half + at.lane % 16 / 2] = x[0];
}

// What a strong channel needs; written only in chunks that have one.
template <int N>
struct StrongRows {
  ChunkRows<N> r, k, decay;
  unsigned channels[N / 16];  // of each warp, a bit for each strong channel

  __device__ void put(
      const Rows& r_rows, const Tokens& rs, const Rows& k_rows, const Tokens& ks, const Decays& decays, bool strong,
      const Place& at) {
#pragma unroll
    for (int q = 0; q < half_chunk; ++q) {
      const int t = at.half * half_chunk + q;
      r[t][at.channel] = number(r_rows.type, rs.bits[q]);
      k[t][at.channel] = number(k_rows.type, ks.bits[q]);
      decay[t][at.channel] = decays.each[q];
    }
    const unsigned lanes = __ballot_sync(all_lanes, strong);
    if (at.lane == 0) channels[at.warp] = lanes & 0xffff;
  }

  // Of each strong channel r_t d_t-1 ... d_s+1 k_s, summed.
  __device__ float score(int t, int s) const {
    float sum = 0.0f;
    for (int warp = 0; warp < N / 16; ++warp)
      for (unsigned left = channels[warp]; left != 0; left &= left - 1) {
        const int i = 16 * warp + __ffs(left) - 1;
        float product = r[t][i] * k[s][i];
        for (int q = s + 1; q < t; ++q) product *= decay[q][i];
        sum += product;
      }
    return sum;
  }
};

}  // namespace visualrwkv::cuda
