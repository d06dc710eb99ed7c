// One token through all layers of RWKV-6, for one instruction set. Included by cpu_kernels.h.
//
// A token costs one read of the weights; everything here serves that. The matrices are read where the model keeps them,
// each thread walking over one run of rows. Activations are float32; only where several sequences meet a matrix of
// bfloat16, and the processor has products of that, they are rounded to it, as in the modules. A layer has seven phases
// between which the threads of the team wait for each other; what is cheap (norms, tanh of the low-rank maps) every
// thread computes for itself rather than wait for it.
//
// What is computed is written down in visualrwkv/rwkv.py.

#pragma once

#include "cpu_elements.h"

namespace visualrwkv {
namespace VISUALRWKV_SET {
namespace {

// The part of n that falls to a thread, in whole units.
struct Range {
  int64_t begin, end;
  Range(int64_t n, int thread, int threads, int64_t unit) {
    const int64_t units = (n + unit - 1) / unit;
    begin = units * thread / threads * unit;
    end = units * (thread + 1) / threads * unit;
    if (begin > n) begin = n;
    if (end > n) end = n;
  }
};

// ---- Products with a matrix

constexpr int group = 4;                             // rows whose sums are added up together
constexpr int tile = VISUALRWKV_BYTES == 64 ? 4 : 2;  // rows of a tile for several sequences, so that it fits the registers
constexpr int64_t ahead = 4096;                      // bytes: no hardware prefetcher looks beyond a page

// Sums of the products of a row with one vector, in one linear stream over the rows.
template <typename E>
VISUALRWKV_INLINE V dot(const E* __restrict__ w, const float* __restrict__ x, int64_t columns, float& tail) {
  V a = {}, b = {}, c = {}, d = {};
  int64_t n = 0;
  for (; n + 4 * W <= columns; n += 4 * W) {
    const char* next = reinterpret_cast<const char*>(w + n) + ahead;
    for (size_t line = 0; line < 4 * W * sizeof(E); line += 64) __builtin_prefetch(next + line);
    a += load_as_float(w + n) * load(x + n);
    b += load_as_float(w + n + W) * load(x + n + W);
    c += load_as_float(w + n + 2 * W) * load(x + n + 2 * W);
    d += load_as_float(w + n + 3 * W) * load(x + n + 3 * W);
  }
  for (; n + W <= columns; n += W) a += load_as_float(w + n) * load(x + n);
  tail = 0;
  for (; n < columns; n++) tail += as_float(w[n]) * x[n];
  return (a + b) + (c + d);
}

template <typename E>
void product_one(
    const E* w, const float* scale, int64_t columns, const float* x, float* y, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + group <= end; row += group) {
    V sums[group];
    float out[group];
    for (int i = 0; i < group; i++) sums[i] = dot(w + (row + i) * columns, x, columns, out[i]);
    add_sums(out, sums);
    for (int i = 0; i < group; i++) y[row + i] = scale ? out[i] * scale[row + i] : out[i];
  }
  for (; row < end; row++) {
    float tail;
    const V sums = dot(w + row * columns, x, columns, tail);
    y[row] = (sum<float>(sums) + tail) * (scale ? scale[row] : 1.0f);
  }
}

// Calls body(row, how many as a constant of the type) for rows [begin, end), `tile` of them at once as far as they go;
// asks for the next tile's bytes before.
template <typename E, typename Body>
VISUALRWKV_INLINE void by_tiles(const E* w, int64_t columns, int64_t begin, int64_t end, Body body) {
  int64_t row = begin;
  for (; row + tile <= end; row += tile) {
    const char* next = reinterpret_cast<const char*>(w + (row + tile) * columns);
    for (size_t line = 0; line < tile * columns * sizeof(E); line += 64) __builtin_prefetch(next + line);
    body(row, std::integral_constant<int, tile>());
  }
  for (; row < end; row++) body(row, std::integral_constant<int, 1>());
}

// out[n] += the sum of x[n].
template <int R>
VISUALRWKV_INLINE void add_up(float (&out)[R], const V (&x)[R]) {
  if constexpr (R == 4)
    add_sums(out, x);
  else
    for (int i = 0; i < R; i++) out[i] += sum<float>(x[i]);
}

// R rows times M sequences.
template <typename E, int R, int M>
VISUALRWKV_INLINE void product_tile(
    const E* __restrict__ w, const float* scale, int64_t columns, const float* __restrict__ x, int64_t x_stride,
    float* y, int64_t y_stride) {
  V s[M][R] = {};
  float out[M][R] = {};
  int64_t n = 0;
  for (; n + W <= columns; n += W) {
    V k[R];
    for (int i = 0; i < R; i++) k[i] = load_as_float(w + i * columns + n);
    for (int m = 0; m < M; m++) {
      const V z = load(x + m * x_stride + n);
      for (int i = 0; i < R; i++) s[m][i] += k[i] * z;
    }
  }
  for (; n < columns; n++)
    for (int i = 0; i < R; i++)
      for (int m = 0; m < M; m++) out[m][i] += as_float(w[i * columns + n]) * x[m * x_stride + n];
  for (int m = 0; m < M; m++) {
    add_up(out[m], s[m]);
    for (int i = 0; i < R; i++) y[m * y_stride + i] = scale ? out[m][i] * scale[i] : out[m][i];
  }
}

#if VISUALRWKV_BYTES == 64 && (__GNUC__ >= 11 || __clang_major__ >= 14)
#define VISUALRWKV_BF16_PRODUCTS 1

bool has_bf16_products() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}

// x (B, x_stride) -> out (B, columns), rounded to nearest even.
__attribute__((target("avx512bf16"))) void round_to_bf16(
    uint16_t* out, const float* x, int64_t x_stride, int64_t batch, int64_t columns) {
  for (int64_t m = 0; m < batch; m++)
    for (int64_t n = 0; n < columns; n += W) {
      const __mmask16 real = columns - n < W ? (1u << (columns - n)) - 1 : 0xffff;
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(real, x + m * x_stride + n));
      _mm256_mask_storeu_epi16(out + m * columns + n, real, rounded);
    }
}

// R rows times M sequences, products of bfloat16 with sums in float32.
template <int R, int M>
__attribute__((target("avx512bf16"))) void product_tile_bf16(
    const uint16_t* __restrict__ w, int64_t columns, const uint16_t* __restrict__ x, float* y, int64_t y_stride) {
  V s[M][R];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) s[m][i] = V{};
  for (int64_t n = 0; n < columns; n += 2 * W) {
    const __mmask32 real = columns - n < 2 * W ? (1u << (columns - n)) - 1 : 0xffffffffu;
    __m512bh k[R];
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) k[i] = (__m512bh)_mm512_maskz_loadu_epi16(real, w + i * columns + n);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const __m512bh z = (__m512bh)_mm512_maskz_loadu_epi16(real, x + m * columns + n);
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) s[m][i] = (V)_mm512_dpbf16_ps((__m512)s[m][i], k[i], z);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) {
    float out[R] = {};
    add_up(out, s[m]);
    for (int i = 0; i < R; i++) y[m * y_stride + i] = out[i];
  }
}

void product_bf16(
    const uint16_t* w, int64_t columns, const float* x, int64_t x_stride, int64_t batch, float* y, int64_t y_stride,
    int64_t begin, int64_t end) {
  thread_local std::vector<uint16_t> rounded;
  rounded.resize(batch * columns);
  round_to_bf16(rounded.data(), x, x_stride, batch, columns);
  by_tiles(w, columns, begin, end, [&](int64_t row, auto rows) {
    by_fours(batch, [&](int64_t m, auto sequences) {
      product_tile_bf16<decltype(rows)::value, decltype(sequences)::value>(
          w + row * columns, columns, rounded.data() + m * columns, y + m * y_stride + row, y_stride);
    });
  });
}
#endif

template <typename E>
void product_of(
    const E* w, const float* scale, int64_t columns, const float* x, int64_t x_stride, int64_t batch, float* y,
    int64_t y_stride, int64_t begin, int64_t end) {
  if (batch == 1) return product_one(w, scale, columns, x, y, begin, end);
#ifdef VISUALRWKV_BF16_PRODUCTS
  if constexpr (std::is_same<E, uint16_t>::value)
    if (has_bf16_products()) return product_bf16(w, columns, x, x_stride, batch, y, y_stride, begin, end);
#endif
  by_tiles(w, columns, begin, end, [&](int64_t row, auto rows) {
    by_fours(batch, [&](int64_t m, auto sequences) {
      product_tile<E, decltype(rows)::value, decltype(sequences)::value>(
          w + row * columns, scale ? scale + row : scale, columns, x + m * x_stride, x_stride, y + m * y_stride + row,
          y_stride);
    });
  });
}

// y (B, y_stride) [begin, end) = x (B, x_stride) w^T, for rows [begin, end) of w.
void product(
    const Matrix& w, const float* x, int64_t x_stride, int64_t batch, float* y, int64_t y_stride, int64_t begin,
    int64_t end) {
  if (w.format == Format::f32)
    product_of(
        static_cast<const float*>(w.data), nullptr, w.columns, x, x_stride, batch, y, y_stride, begin, end);
  else if (w.format == Format::bf16)
    product_of(
        static_cast<const uint16_t*>(w.data), nullptr, w.columns, x, x_stride, batch, y, y_stride, begin, end);
  else
    product_of(static_cast<const int8_t*>(w.data), w.scale, w.columns, x, x_stride, batch, y, y_stride, begin, end);
}

// out[0, K vectors) += sum over rows i < count of x[i] * w[i], the rows `stride` apart.
template <typename E, int K>
VISUALRWKV_INLINE void add_rows_block(
    float* __restrict__ out, const E* __restrict__ w, int64_t stride, const float* __restrict__ x, int64_t count) {
  V sums[K];
  for (int k = 0; k < K; k++) sums[k] = load(out + k * W);
  for (int64_t i = 0; i < count; i++, w += stride)
    for (int k = 0; k < K; k++) sums[k] += load_as_float(w + k * W) * x[i];
  for (int k = 0; k < K; k++) store(out + k * W, sums[k]);
}

// The same for out[begin, end).
template <typename E>
void add_rows(
    float* __restrict__ out, const E* __restrict__ w, int64_t stride, const float* x, int64_t count, int64_t begin,
    int64_t end) {
  int64_t n = begin;
  for (; n + 8 * W <= end; n += 8 * W) add_rows_block<E, 8>(out + n, w + n, stride, x, count);
  for (; n + 2 * W <= end; n += 2 * W) add_rows_block<E, 2>(out + n, w + n, stride, x, count);
  for (; n + W <= end; n += W) add_rows_block<E, 1>(out + n, w + n, stride, x, count);
  for (; n < end; n++)
    for (int64_t i = 0; i < count; i++) out[n] += as_float(w[i * stride + n]) * x[i];
}

// Asks for columns [begin, end) of `count` rows: what this thread reads in the next phase comes while it waits for the
// others. The small matrices would otherwise cost more in latency than the large ones, line for line.
template <typename E>
void fetch(const void* w, int64_t stride, int64_t count, int64_t begin, int64_t end) {
  const E* row = static_cast<const E*>(w) + begin;
  for (int64_t i = 0; i < count && begin < end; i++, row += stride) {
    const char* bytes = reinterpret_cast<const char*>(row);
    for (size_t line = 0; line < (end - begin) * sizeof(E); line += 64) __builtin_prefetch(bytes + line, 0, 2);
  }
}

// Asks for the first rows of a matrix, a few lines at a time, by the way of a phase that leaves the memory idle.
class Ahead {
 public:
  Ahead(const Matrix& w, const Range& rows) {
    const int64_t bytes = w.columns * (w.format == Format::int8 ? 1 : w.format == Format::bf16 ? 2 : 4);
    at_ = static_cast<const char*>(w.data) + rows.begin * bytes;
    end_ = at_ + std::min<int64_t>((rows.end - rows.begin) * bytes, 256 << 10);  // what a second-level cache has room for
  }
  VISUALRWKV_INLINE void fetch(int lines) {
    if (at_ >= end_) return;
    for (int line = 0; line < lines; line++, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
};

// ---- The parts of a layer

// z and `back`, the way from it to the input before; the thread's part of z becomes the new shift.
template <typename E>
void shift(
    float* z, float* back, const void* old_shift, void* new_shift, int64_t size, const Range& part) {
  const E* before = static_cast<const E*>(old_shift);
  each(0, size, [&](int64_t n, auto lanes) { set(back + n, get(before + n, lanes) - get(z + n, lanes)); });
  E* after = static_cast<E*>(new_shift);
  for (int64_t n = part.begin; n < part.end; n++) put(after + n, z[n]);
}

// Columns [j, j + C lanes) of one head: y = r S + bonus v, S' = d S + k v^T.
template <int C>
VISUALRWKV_INLINE void wkv_columns(
    float* y, const float* s, float* next, const float* r, const float* k, const float* v, const float* d, float bonus,
    int64_t size, Ahead& ahead) {
  V out[C], value[C];
  for (int c = 0; c < C; c++) {
    value[c] = load(v + c * W);
    out[c] = value[c] * bonus;
  }
  for (int64_t i = 0; i < size; i++, s += size, next += size) {
    ahead.fetch(8);
    for (int c = 0; c < C; c++) {
      const V old = load(s + c * W);
      out[c] += old * r[i];
      store(next + c * W, old * d[i] + value[c] * k[i]);
    }
  }
  for (int c = 0; c < C; c++) store(y + c * W, out[c]);
}

void wkv_head(
    float* y, const float* s, float* next, const float* r, const float* k, const float* v, const float* d, float bonus,
    int64_t size, Ahead& ahead) {
  int64_t j = 0;
  for (; j + 4 * W <= size; j += 4 * W) wkv_columns<4>(y + j, s + j, next + j, r, k, v + j, d, bonus, size, ahead);
  for (; j + W <= size; j += W) wkv_columns<1>(y + j, s + j, next + j, r, k, v + j, d, bonus, size, ahead);
  for (; j < size; j++) {
    float out = bonus * v[j];
    for (int64_t i = 0; i < size; i++) {
      out += s[i * size + j] * r[i];
      next[i * size + j] = s[i * size + j] * d[i] + k[i] * v[j];
    }
    y[j] = out;
  }
}

// Sum of the shares of a low-rank map (`count` arrays, `stride` apart), then tanh.
void finish_low(float* out, const float* shares, int64_t stride, int count, int64_t size) {
  each(0, size, [&](int64_t n, auto lanes) {
    auto total = get(shares + n, lanes);
    for (int t = 1; t < count; t++) total += get(shares + t * stride + n, lanes);
    set(out + n, tangent(total));
  });
}

template <typename E>
const E* of(const void* p) {
  return static_cast<const E*>(p);
}

template <typename E>
void step(const Step& s, Barrier& barrier, int thread, int threads) {
  const int64_t B = s.batch, D = s.hidden, A = s.attention, F = s.inner, H = s.heads, N = A / H;
  const int64_t R = s.mix_rank, C = s.decay_rank, d = padded16(D), a = padded16(A), f = padded16(F);
  const int64_t l = padded16(5 * R), c = padded16(C);
  float* next = s.scratch;
  const auto take = [&](int64_t count) {
    float* p = next;
    next += B * count;
    return p;
  };
  // Shared by the team: the residual stream, the mixed inputs, the outputs of the maps.
  float *const x = take(d), *const mixed = take(5 * d), *const gate_ffn = take(d);
  float *const r = take(a), *const k = take(a), *const v = take(a), *const g = take(a), *const w = take(a);
  float *const y = take(a), *const inner = take(f);
  float *const shares = take(s.shares * l), *const decay_shares = take(s.shares * c);
  // Of this thread alone.
  next += thread * B * (4 * d + l + c);
  float *const z = take(d), *const back = take(d), *const xk = take(d), *const xr = take(d);
  float *const low = take(l), *const decay_low = take(c);
  const Range mine(D, thread, threads, 16), my_heads(H, thread, threads, 1);
  const Range rows_a(A, thread, threads, 16), rows_f(F, thread, threads, 16);

  for (int64_t b = 0; b < B; b++) {
    const E* embeds = of<E>(s.embeds) + b * D;
    each(0, D, [&](int64_t n, auto lanes) { set(back + n, get(embeds + n, lanes)); });
    normalise<E>(z, back, s.ln0, D, s.norm_eps);
    std::memcpy(x + b * d + mine.begin, z + mine.begin, sizeof(float) * (mine.end - mine.begin));
  }
  fetch<E>(s.weights[0].maa_w1, 0, 1, mine.begin * 5 * R, mine.end * 5 * R);
  barrier.wait(threads);

  for (int64_t layer = 0; layer < s.layers; layer++) {
    const LayerWeights& p = s.weights[layer];
    const LayerMemory& m = s.memory[layer];

    // Time-mix: this thread's shares of the low-rank map of the token shift.
    for (int64_t b = 0; b < B; b++) {
      float *zb = z + b * d, *bb = back + b * d;
      normalise<E>(zb, x + b * d, p.ln1, D, s.norm_eps);
      shift<E>(zb, bb, of<E>(m.att_shift) + b * D, static_cast<E*>(m.new_att_shift) + b * D, D, mine);
      for (int64_t i = thread; i < s.shares; i += threads) {
        const Range part(D, i, s.shares, 16);
        float* share = shares + (i * B + b) * l;
        each(part.begin, part.end, [&](int64_t n, auto lanes) {
          set(xk + n, get(zb + n, lanes) + get(bb + n, lanes) * get(of<E>(p.maa[0]) + n, lanes));
        });
        std::memset(share, 0, sizeof(float) * 5 * R);
        add_rows(share, of<E>(p.maa_w1) + part.begin * 5 * R, 5 * R, xk + part.begin, part.end - part.begin, 0, 5 * R);
      }
    }
    fetch<E>(p.maa_w2, D, 5 * R, mine.begin, mine.end);
    barrier.wait(threads);

    // The five mixed inputs, this thread's channels.
    for (int64_t b = 0; b < B; b++) {
      finish_low(low, shares + b * l, B * l, s.shares, 5 * R);
      for (int64_t i = 0; i < 5; i++) {
        float* out = mixed + (i * B + b) * d;
        const E* ratio = of<E>(p.maa[1 + i]);
        each(mine.begin, mine.end, [&](int64_t n, auto lanes) { set(out + n, get(ratio + n, lanes)); });
        add_rows(out, of<E>(p.maa_w2) + i * R * D, D, low + i * R, R, mine.begin, mine.end);
        each(mine.begin, mine.end, [&](int64_t n, auto lanes) {
          set(out + n, get(z + b * d + n, lanes) + get(back + b * d + n, lanes) * get(out + n, lanes));
        });
      }
    }
    barrier.wait(threads);

    // Receptance, key, value, gate; this thread's shares of the low-rank map of the decay.
    const float *const mixed_w = mixed, *const mixed_k = mixed + B * d, *const mixed_v = mixed + 2 * B * d;
    const float *const mixed_r = mixed + 3 * B * d, *const mixed_g = mixed + 4 * B * d;
    for (int64_t b = 0; b < B; b++)
      for (int64_t i = thread; i < s.shares; i += threads) {
        const Range part(D, i, s.shares, 16);
        float* share = decay_shares + (i * B + b) * c;
        std::memset(share, 0, sizeof(float) * C);
        add_rows(
            share, of<E>(p.decay_w1) + part.begin * C, C, mixed_w + b * d + part.begin, part.end - part.begin, 0, C);
      }
    product(p.receptance, mixed_r, d, B, r, a, rows_a.begin, rows_a.end);
    product(p.key, mixed_k, d, B, k, a, rows_a.begin, rows_a.end);
    product(p.value, mixed_v, d, B, v, a, rows_a.begin, rows_a.end);
    product(p.gate, mixed_g, d, B, g, a, rows_a.begin, rows_a.end);
    const int64_t from = my_heads.begin * N, to = my_heads.end * N;
    fetch<E>(p.decay_w2, A, C, from, to);
    for (int64_t b = 0; b < B; b++) fetch<float>(m.wkv + b * A * N, 0, 1, from * N, to * N);
    barrier.wait(threads);

    // The recurrence, the norm and the gate, this thread's heads.
    Ahead output(p.output, mine);
    for (int64_t b = 0; b < B && from < to; b++) {
      finish_low(decay_low, decay_shares + b * c, B * c, s.shares, C);
      float *wb = w + b * a, *yb = y + b * a;
      each(from, to, [&](int64_t n, auto lanes) { set(wb + n, get(of<E>(p.decay) + n, lanes)); });
      add_rows(wb, of<E>(p.decay_w2), A, decay_low, C, from, to);
      each(from, to, [&](int64_t n, auto lanes) {
        set(wb + n, exponential_of(-exponential_of(get(wb + n, lanes))));
      });
      for (int64_t h = my_heads.begin; h < my_heads.end; h++) {
        const int64_t at = b * a + h * N, state = (b * H + h) * N * N;
        float bonus = 0;
        for (int64_t n = 0; n < N; n++) bonus += r[at + n] * k[at + n] * as_float(of<E>(p.bonus)[h * N + n]);
        wkv_head(y + at, m.wkv + state, m.new_wkv + state, r + at, k + at, v + at, w + at, bonus, N, output);
        const Norm norm = {of<E>(p.ln_x.weight) + h * N, of<E>(p.ln_x.bias) + h * N};
        normalise<E>(y + at, y + at, norm, N, s.head_eps);
      }
      each(from, to, [&](int64_t n, auto lanes) {
        const auto gate = get(g + b * a + n, lanes);
        set(yb + n, get(yb + n, lanes) * gate * logistic(gate));
      });
    }
    barrier.wait(threads);

    product(p.output, y, a, B, mixed, d, mine.begin, mine.end);
    for (int64_t b = 0; b < B; b++)
      each(mine.begin, mine.end, [&](int64_t n, auto lanes) {
        set(x + b * d + n, get(x + b * d + n, lanes) + get(mixed + b * d + n, lanes));
      });
    barrier.wait(threads);

    // Channel-mix: key and receptance.
    for (int64_t b = 0; b < B; b++) {
      float *zb = z + b * d, *bb = back + b * d;
      normalise<E>(zb, x + b * d, p.ln2, D, s.norm_eps);
      shift<E>(zb, bb, of<E>(m.ffn_shift) + b * D, static_cast<E*>(m.new_ffn_shift) + b * D, D, mine);
      each(0, D, [&](int64_t n, auto lanes) {
        const auto here = get(zb + n, lanes), way = get(bb + n, lanes);
        set(xk + b * d + n, here + way * get(of<E>(p.ffn_maa_k) + n, lanes));
        set(xr + b * d + n, here + way * get(of<E>(p.ffn_maa_r) + n, lanes));
      });
    }
    product(p.ffn_key, xk, d, B, inner, f, rows_f.begin, rows_f.end);
    product(p.ffn_receptance, xr, d, B, gate_ffn, d, mine.begin, mine.end);
    for (int64_t b = 0; b < B; b++) {
      each(rows_f.begin, rows_f.end, [&](int64_t n, auto lanes) {
        const auto u = get(inner + b * f + n, lanes), positive = u <= 0 ? 0 * lanes : u;
        set(inner + b * f + n, positive * positive);
      });
      each(mine.begin, mine.end, [&](int64_t n, auto lanes) {
        set(gate_ffn + b * d + n, logistic(get(gate_ffn + b * d + n, lanes)));
      });
    }
    barrier.wait(threads);

    product(p.ffn_value, inner, f, B, mixed, d, mine.begin, mine.end);
    for (int64_t b = 0; b < B; b++)
      each(mine.begin, mine.end, [&](int64_t n, auto lanes) {
        const auto gate = get(gate_ffn + b * d + n, lanes);
        set(x + b * d + n, get(x + b * d + n, lanes) + gate * get(mixed + b * d + n, lanes));
      });
    if (layer + 1 < s.layers)
      fetch<E>(s.weights[layer + 1].maa_w1, 0, 1, mine.begin * 5 * R, mine.end * 5 * R);
    barrier.wait(threads);
  }

  for (int64_t b = thread; b < B; b += threads) {
    normalise<E>(z, x + b * d, s.ln_out, D, s.norm_eps);
    for (int64_t n = 0; n < D; n++) put(static_cast<E*>(s.out) + b * D + n, z[n]);
  }
}

void product_dense(
    const Matrix& w, const float* x, int64_t batch, float* y, int64_t y_stride, int64_t begin, int64_t end) {
  product(w, x, w.columns, batch, y, y_stride, begin, end);
}

}  // namespace

const StepKernels& step_kernels() {
  static const StepKernels table = {step<float>, step<uint16_t>, product_dense};
  return table;
}

}  // namespace VISUALRWKV_SET
}  // namespace visualrwkv
