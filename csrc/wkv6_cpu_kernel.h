// The CPU kernels of the operator, for one instruction set. Included by cpu_kernels.h.
//
// One sequence (batch entry, head) at a time. Its time axis is cut into blocks of `block_tokens`; for each block the
// rows of the operands are brought to the type of the arithmetic, and the state is walked in tiles that stay in
// registers for the whole block. There are two ways to take the decay into account:
//
//   plain   S <- d S + k v^T            3 operations per element and token with r S, exact for any decay
//   scaled  S/P <- S/P + (k / P') v^T   2 operations; P and P' are the products of the decays of the block up to the
//                                       token, without and with it
//
// The second needs k / P' to stay within range, hence it is taken where P' at the end of the block is at least
// `weakest` in all key channels of the tile. Nothing is clamped.
//
// The backward walks the blocks in reverse. With G the gradient of the state after a token, the recurrence of which is
// G <- d G + r dy^T, it needs per token S dy, G v, G^T k and sum_j (G o S). Nothing is kept from the forward: the
// states before each block of a segment (before each segment, in a long sequence) are computed once more, those of a
// tile within the block on the way. Here the tiles have the values as rows and the keys as columns, so that only G^T k
// is a sum along a vector.

#pragma once

#include "wkv6_cpu_vectors.h"

namespace visualrwkv {
namespace VISUALRWKV_SET {
namespace {

constexpr int64_t segment_blocks = 64;  // their states (float, size 64) fill 1 MiB, the second-level cache

// Rows and columns of a state in memory: a multiple of the widest vector and of a tile.
inline int64_t padded_size(int64_t size) { return (size + 15) / 16 * 16; }

inline int64_t tokens_from(int64_t start, int64_t time) {
  return time - start < block_tokens ? time - start : block_tokens;
}

// Product of the decays of a block down to which its tiles are scaled: r P and k / P' keep their precision for operands
// down to 1e-26 and up to 1e26 (float).
template <typename T>
constexpr T weakest() {
  return std::is_same<T, float>::value ? T(1e-12) : T(1e-100);
}

// Vectors per tile column: with four rows, a tile of the state and its operands fit the registers.
constexpr int wide = VISUALRWKV_BYTES == 64 ? 4 : 2;
constexpr int tile_rows = 4;

// Aligned memory, freed at the end of the scope.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    base_ = static_cast<char*>(std::malloc(bytes + 64));
    if (!base_) throw std::bad_alloc();
    next_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(base_) + 63) / 64 * 64);
  }
  ~Scratch() { std::free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* take(int64_t count) {
    T* p = next_;
    next_ += count;
    return p;
  }

 private:
  char* base_;
  T* next_;
};

// The operands of one block, rows of `padded` elements.
template <typename T>
struct Block {
  T *r, *k, *v, *decay;
  T* slope;             // d log decay / d w = -exp(w), backward only
  T *rp, *kp;           // r P and k / P'
  T *before, *inverse;  // P and 1 / P', backward only
  T* total;             // P' of the last token
  T* bonus;             // sum_i r u k, one per token
  T* u;                 // of the head
  static constexpr int arrays = 9;
};

template <typename T>
Block<T> take_block(Scratch<T>& scratch, int64_t padded) {
  Block<T> block;
  T** const rows[] = {&block.r,  &block.k,  &block.v,      &block.decay,  &block.slope,
                      &block.rp, &block.kp, &block.before, &block.inverse};
  for (T** p : rows) *p = scratch.take(block_tokens * padded);
  block.total = scratch.take(padded);
  block.bonus = scratch.take(block_tokens);
  block.u = scratch.take(padded);
  return block;
}

template <typename T>
int64_t block_elements(int64_t padded) {
  return Block<T>::arrays * block_tokens * padded + 2 * padded + block_tokens;
}

enum class Pass { forward, states, backward };

// Fills a block; the pass over the states needs only k, v and the decays.
template <typename T, Pass pass>
void load_block(
    const Block<T>& x, const Problem<T>& p, int64_t b, int64_t h, int64_t start, int64_t count, int64_t padded) {
  constexpr int W = Vectors<T>::lanes;
  constexpr int direction = pass == Pass::backward ? -1 : 1;
  constexpr bool outputs = pass != Pass::states, backward = pass == Pass::backward;
  constexpr T none = -std::numeric_limits<T>::infinity();  // w without decay
  const Vec<T> one = Vec<T>{} + T(1);
  for (int64_t t = 0; t < count; t++) {
    const int64_t row = t * padded;
    if (outputs) load_row<T, direction>(x.r + row, p.r, b, start + t, h, p.size, padded);
    load_row<T, direction>(x.k + row, p.k, b, start + t, h, p.size, padded);
    load_row<T, direction>(x.v + row, p.v, b, start + t, h, p.size, padded);
    load_row<T, direction>(x.decay + row, p.w, b, start + t, h, p.size, padded, none);
    Vec<T> bonus = {};
    for (int64_t n = row; n < row + padded; n += W) {
      const Vec<T> rate = exponential(load(x.decay + n));
      store(x.decay + n, exponential(-rate));
      if (backward) store(x.slope + n, -rate);
      if (outputs) bonus += load(x.r + n) * load(x.k + n) * load(x.u + (n - row));
    }
    if (outputs) x.bonus[t] = sum<T>(bonus);
  }
  for (int64_t n = 0; n < padded; n += W) {
    Vec<T> through = one;
    for (int64_t t = 0; t < count; t++) {
      const int64_t at = t * padded + n;
      if (outputs) store(x.rp + at, load(x.r + at) * through);
      if (backward) store(x.before + at, through);
      through *= load(x.decay + at);
      const Vec<T> inverse = one / through;
      store(x.kp + at, load(x.k + at) * inverse);
      if (backward) store(x.inverse + at, inverse);
    }
    store(x.total + n, through);
  }
}

template <typename T>
VISUALRWKV_INLINE bool weak(const T* total, int64_t count) {
  bool all = true;
  for (int64_t n = 0; n < count; n++) all &= total[n] >= weakest<T>();
  return all;
}

// ---- Forward: rows of a tile are keys, columns are values.

template <typename T, int columns, bool scaled>
VISUALRWKV_INLINE void forward_tile(
    const Block<T>& x, T* y, const T* from, T* to, int64_t i, int64_t j, int64_t count, int64_t padded) {
  constexpr int W = Vectors<T>::lanes;
  const T* __restrict__ const rs = scaled ? x.rp : x.r;
  const T* __restrict__ const ks = scaled ? x.kp : x.k;
  const T* __restrict__ const vs = x.v;
  const T* __restrict__ const decays = x.decay;
  T* __restrict__ const ys = y;
  Vec<T> s[tile_rows][columns];
  for (int n = 0; n < tile_rows; n++)
    for (int c = 0; c < columns; c++) s[n][c] = load(from + (i + n) * padded + j + c * W);
  for (int64_t t = 0; t < count; t++) {
    const int64_t keys = t * padded + i, values = t * padded + j;
    Vec<T> out[columns] = {};
    for (int n = 0; n < tile_rows; n++) {
      const T r = rs[keys + n], k = ks[keys + n];
      for (int c = 0; c < columns; c++) {
        out[c] += s[n][c] * r;
        const Vec<T> add = load(vs + values + c * W) * k;
        s[n][c] = scaled ? s[n][c] + add : s[n][c] * decays[keys + n] + add;
      }
    }
    for (int c = 0; c < columns; c++) store(ys + values + c * W, load(ys + values + c * W) + out[c]);
  }
  for (int n = 0; n < tile_rows; n++)
    for (int c = 0; c < columns; c++)
      store(to + (i + n) * padded + j + c * W, scaled ? s[n][c] * x.total[i + n] : s[n][c]);
}

template <typename T, int columns>
void forward_block(const Block<T>& x, T* y, const T* from, T* to, int64_t count, int64_t padded) {
  constexpr int64_t step = columns * Vectors<T>::lanes;
  for (int64_t i = 0; i < padded; i += tile_rows) {
    const bool scaled = count > 1 && weak(x.total + i, tile_rows);
    for (int64_t j = 0; j < padded; j += step) {
      if (scaled)
        forward_tile<T, columns, true>(x, y, from, to, i, j, count, padded);
      else
        forward_tile<T, columns, false>(x, y, from, to, i, j, count, padded);
    }
  }
}

template <typename T>
void load_state(T* out, const T* in, int64_t size, int64_t padded) {
  std::memset(static_cast<void*>(out), 0, sizeof(T) * padded * padded);
  if (in)
    for (int64_t i = 0; i < size; i++) std::memcpy(out + i * padded, in + i * size, sizeof(T) * size);
}

// Row h of p.u to out, the padding zero.
template <typename T>
void load_u(T* out, const Problem<T>& p, int64_t h, int64_t padded) {
  std::memset(static_cast<void*>(out), 0, sizeof(T) * padded);
  std::memcpy(out, p.u + h * p.size, sizeof(T) * p.size);
}

template <typename T>
void forward(const Forward<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t W = Vectors<T>::lanes;
  const int64_t size = p.size, padded = padded_size(size), area = padded * padded;
  Scratch<T> scratch(block_elements<T>(padded) + block_tokens * padded + area);
  const Block<T> x = take_block(scratch, padded);
  T *y = scratch.take(block_tokens * padded), *own = scratch.take(area);
  for (int64_t sequence = begin; sequence < end; sequence++) {
    const int64_t b = sequence / p.heads, h = sequence % p.heads;
    load_u(x.u, p, h, padded);
    // A state without padding is read where it lies and never copied.
    const T* state = p.state ? p.state + sequence * size * size : nullptr;
    T* final_state = p.final_state + sequence * size * size;
    T* target = padded == size ? final_state : own;
    const T* from = state;
    if (!state || padded != size) {
      load_state(target, state, size, padded);
      from = target;
    }
    for (int64_t start = 0; start < p.time; start += block_tokens) {
      const int64_t count = tokens_from(start, p.time);
      load_block<T, Pass::forward>(x, p, b, h, start, count, padded);
      for (int64_t t = 0; t < count; t++)
        for (int64_t n = 0; n < padded; n += W) store(y + t * padded + n, load(x.v + t * padded + n) * x.bonus[t]);
      if (padded % (wide * W) == 0)
        forward_block<T, wide>(x, y, from, target, count, padded);
      else
        forward_block<T, 1>(x, y, from, target, count, padded);
      from = target;
      for (int64_t t = 0; t < count; t++) store_row<T>(y + t * padded, p.y, b, start + t, h, size);
    }
    if (target != final_state)
      for (int64_t i = 0; i < size; i++) std::memcpy(final_state + i * size, own + i * padded, sizeof(T) * size);
  }
}

// ---- Backward: rows of a tile are values, columns are keys.

// The state (value, key) after a block, from the one before it; they may be the same.
template <typename T, int columns, bool scaled>
VISUALRWKV_INLINE void advance_tile(
    const Block<T>& x, const T* from, T* to, int64_t j, int64_t i, int64_t count, int64_t padded) {
  constexpr int W = Vectors<T>::lanes;
  const T* __restrict__ const ks = (scaled ? x.kp : x.k) + i;
  const T* __restrict__ const decays = x.decay + i;
  const T* __restrict__ const vs = x.v + j;
  Vec<T> s[tile_rows][columns];
  for (int n = 0; n < tile_rows; n++)
    for (int c = 0; c < columns; c++) s[n][c] = load(from + (j + n) * padded + i + c * W);
  for (int64_t t = 0; t < count; t++) {
    const int64_t row = t * padded;
    for (int n = 0; n < tile_rows; n++) {
      const T v = vs[row + n];
      for (int c = 0; c < columns; c++) {
        const Vec<T> add = load(ks + row + c * W) * v;
        s[n][c] = scaled ? s[n][c] + add : s[n][c] * load(decays + row + c * W) + add;
      }
    }
  }
  for (int n = 0; n < tile_rows; n++)
    for (int c = 0; c < columns; c++)
      store(to + (j + n) * padded + i + c * W, scaled ? s[n][c] * load(x.total + i + c * W) : s[n][c]);
}

template <typename T, int columns>
void advance_block(const Block<T>& x, const T* from, T* to, int64_t count, int64_t padded) {
  constexpr int64_t step = columns * Vectors<T>::lanes;
  for (int64_t i = 0; i < padded; i += step) {
    const bool scaled = weak(x.total + i, step);
    for (int64_t j = 0; j < padded; j += tile_rows) {
      if (scaled)
        advance_tile<T, columns, true>(x, from, to, j, i, count, padded);
      else
        advance_tile<T, columns, false>(x, from, to, j, i, count, padded);
    }
  }
}

template <typename T>
void advance(
    const Block<T>& x, const Problem<T>& p, int64_t b, int64_t h, int64_t block, const T* from, T* to, int64_t padded) {
  const int64_t start = block * block_tokens, count = tokens_from(start, p.time);
  load_block<T, Pass::states>(x, p, b, h, start, count, padded);
  if (padded % (wide * Vectors<T>::lanes) == 0)
    advance_block<T, wide>(x, from, to, count, padded);
  else
    advance_block<T, 1>(x, from, to, count, padded);
}

// The gradients of one block, rows of `padded` elements; `dy` is given, the others are summed up over the tiles. In
// scaled tiles dr lacks the factor P and dk the factor 1 / P'; in plain tiles dlog lacks the decay.
template <typename T>
struct BlockGradients {
  T *dy, *dr, *dk, *dv, *dlog;
  static constexpr int arrays = 5;
};

template <typename T, int columns, bool scaled>
VISUALRWKV_INLINE void backward_tile(
    const Block<T>& x, const BlockGradients<T>& g, const T* state, T* dstate, T* history, int64_t j, int64_t i,
    int64_t count, int64_t padded) {
  constexpr int W = Vectors<T>::lanes;
  constexpr int64_t area = tile_rows * columns * W;
  const T* __restrict__ const rs = (scaled ? x.rp : x.r) + i;
  const T* __restrict__ const ks = (scaled ? x.kp : x.k) + i;
  const T* __restrict__ const decays = x.decay + i;
  const T* __restrict__ const vs = x.v + j;
  const T* __restrict__ const dys = g.dy + j;
  T* __restrict__ const drs = g.dr + i;
  T* __restrict__ const dks = g.dk + i;
  T* __restrict__ const dlogs = g.dlog + i;
  T* __restrict__ const dvs = g.dv + j;
  T* __restrict__ const kept = history;
  Vec<T> s[tile_rows][columns];
  for (int n = 0; n < tile_rows; n++)
    for (int c = 0; c < columns; c++) s[n][c] = load(state + (j + n) * padded + i + c * W);
  for (int64_t t = 0; t < count; t++) {
    const int64_t row = t * padded;
    Vec<T> dr[columns] = {};
    for (int n = 0; n < tile_rows; n++) {
      const T v = vs[row + n], dy = dys[row + n];
      for (int c = 0; c < columns; c++) {
        store(kept + t * area + (n * columns + c) * W, s[n][c]);
        dr[c] += s[n][c] * dy;
        const Vec<T> add = load(ks + row + c * W) * v;
        s[n][c] = scaled ? s[n][c] + add : s[n][c] * load(decays + row + c * W) + add;
      }
    }
    for (int c = 0; c < columns; c++) store(drs + row + c * W, load(drs + row + c * W) + dr[c]);
  }
  for (int n = 0; n < tile_rows; n++)
    for (int c = 0; c < columns; c++) {
      const Vec<T> after = load(dstate + (j + n) * padded + i + c * W);
      s[n][c] = scaled ? after * load(x.total + i + c * W) : after;
    }
  for (int64_t t = count - 1; t >= 0; t--) {
    const int64_t row = t * padded;
    Vec<T> dk[columns] = {}, dlog[columns] = {}, dv[tile_rows] = {};
    for (int n = 0; n < tile_rows; n++) {
      const T v = vs[row + n], dy = dys[row + n];
      for (int c = 0; c < columns; c++) {
        dlog[c] += s[n][c] * load(kept + t * area + (n * columns + c) * W);
        dk[c] += s[n][c] * v;
        dv[n] += s[n][c] * load(ks + row + c * W);
        const Vec<T> add = load(rs + row + c * W) * dy;
        s[n][c] = scaled ? s[n][c] + add : s[n][c] * load(decays + row + c * W) + add;
      }
    }
    add_sums(dvs + row, dv);
    for (int c = 0; c < columns; c++) {
      store(dks + row + c * W, load(dks + row + c * W) + dk[c]);
      store(dlogs + row + c * W, load(dlogs + row + c * W) + dlog[c]);
    }
  }
  for (int n = 0; n < tile_rows; n++)
    for (int c = 0; c < columns; c++) store(dstate + (j + n) * padded + i + c * W, s[n][c]);
}

template <typename T, int columns>
void backward_block(
    const Block<T>& x, const BlockGradients<T>& g, const T* state, T* dstate, T* history, int64_t count,
    int64_t padded) {
  constexpr int64_t W = Vectors<T>::lanes, step = columns * W;
  const Vec<T> zero = {};
  for (int64_t i = 0; i < padded; i += step) {
    const bool scaled = weak(x.total + i, step);
    for (int64_t j = 0; j < padded; j += tile_rows) {
      if (scaled)
        backward_tile<T, columns, true>(x, g, state, dstate, history, j, i, count, padded);
      else
        backward_tile<T, columns, false>(x, g, state, dstate, history, j, i, count, padded);
    }
    for (int64_t t = 0; t < count; t++)
      for (int64_t n = t * padded + i; n < t * padded + i + step; n += W) {
        const Vec<T> slope = load(x.slope + n), decay = load(x.decay + n);
        if (scaled) {
          store(g.dr + n, load(g.dr + n) * load(x.before + n));
          store(g.dk + n, load(g.dk + n) * load(x.inverse + n));
          store(g.dlog + n, load(g.dlog + n) * slope);
        } else {  // where the decay is complete its derivative is 0, not 0 * inf
          store(g.dlog + n, load(g.dlog + n) * (decay == zero ? zero : decay * slope));
        }
      }
  }
}

// One block of the backward: turns the gradient of the state after it into that of the state before it, which is given.
template <typename T>
void retreat(
    const Block<T>& x, const BlockGradients<T>& g, const Backward<T>& p, int64_t b, int64_t h, int64_t block,
    const T* state, T* dstate, T* du, T* history, int64_t padded) {
  constexpr int64_t W = Vectors<T>::lanes;
  const int64_t start = block * block_tokens, count = tokens_from(start, p.time);
  load_block<T, Pass::backward>(x, p, b, h, start, count, padded);
  for (int64_t t = 0; t < count; t++) {
    const int64_t row = t * padded;
    load_row<T, -1>(g.dy + row, p.dy, b, start + t, h, p.size, padded);
    for (int64_t n = row; n < row + padded; n += W) {
      const Vec<T> zero = {};
      store(g.dr + n, zero);
      store(g.dk + n, zero);
      store(g.dlog + n, zero);
      store(g.dv + n, load(g.dy + n) * x.bonus[t]);
    }
  }
  if (padded % (wide * W) == 0)
    backward_block<T, wide>(x, g, state, dstate, history, count, padded);
  else
    backward_block<T, 1>(x, g, state, dstate, history, count, padded);
  for (int64_t t = 0; t < count; t++) {
    const int64_t row = t * padded;
    Vec<T> product = {};
    for (int64_t n = row; n < row + padded; n += W) product += load(x.v + n) * load(g.dy + n);
    const T weight = sum<T>(product);  // the gradient of the bonus sum_i r u k
    for (int64_t n = 0; n < padded; n += W) {
      const Vec<T> r = load(x.r + row + n) * weight, k = load(x.k + row + n) * weight;
      store(g.dr + row + n, load(g.dr + row + n) + load(x.u + n) * k);
      store(g.dk + row + n, load(g.dk + row + n) + load(x.u + n) * r);
      store(du + n, load(du + n) + load(x.r + row + n) * k);
    }
    store_row<T>(g.dr + row, p.dr, b, start + t, h, p.size);
    store_row<T>(g.dk + row, p.dk, b, start + t, h, p.size);
    store_row<T>(g.dv + row, p.dv, b, start + t, h, p.size);
    store_row<T>(g.dlog + row, p.dw, b, start + t, h, p.size);
  }
}

template <typename T>
void backward(const Backward<T>& p, int64_t begin, int64_t end) {
  const int64_t size = p.size, padded = padded_size(size), area = padded * padded;
  const int64_t blocks = (p.time + block_tokens - 1) / block_tokens;
  const int64_t segments = (blocks + segment_blocks - 1) / segment_blocks;
  const int64_t tile = tile_rows * wide * Vectors<T>::lanes * block_tokens;
  const int64_t kept = blocks < segment_blocks ? blocks : segment_blocks;
  Scratch<T> scratch(
      block_elements<T>(padded) + BlockGradients<T>::arrays * block_tokens * padded + padded + tile +
      (segments + kept + 1) * area);
  const Block<T> x = take_block(scratch, padded);
  BlockGradients<T> g;
  T** const rows[] = {&g.dy, &g.dr, &g.dk, &g.dv, &g.dlog};
  for (T** a : rows) *a = scratch.take(block_tokens * padded);
  T *du = scratch.take(padded), *history = scratch.take(tile), *dstate = scratch.take(area);
  T* const starts = scratch.take(segments * area);  // the states before the segments
  T* const states = scratch.take(kept * area);      // the states before the blocks of one segment; the first is unused
  for (int64_t sequence = begin; sequence < end; sequence++) {
    const int64_t b = sequence / p.heads, h = sequence % p.heads, at = sequence * size * size;
    load_u(x.u, p, h, padded);
    std::memset(static_cast<void*>(du), 0, sizeof(T) * padded);
    std::memset(static_cast<void*>(dstate), 0, sizeof(T) * area);
    if (p.dfinal) transpose_square(dstate, padded, p.dfinal + at, size, size, size);
    std::memset(static_cast<void*>(starts), 0, sizeof(T) * area);
    if (p.state) transpose_square(starts, padded, p.state + at, size, size, size);
    for (int64_t block = 0; block < (segments - 1) * segment_blocks; block++) {
      T* const to = starts + (block / segment_blocks + 1) * area;
      advance(x, p, b, h, block, block % segment_blocks ? to : to - area, to, padded);
    }
    for (int64_t segment = segments - 1; segment >= 0; segment--) {
      const int64_t first = segment * segment_blocks;
      const int64_t count = blocks - first < segment_blocks ? blocks - first : segment_blocks;
      const auto before = [&](int64_t n) { return n ? states + n * area : starts + segment * area; };
      for (int64_t n = 0; n + 1 < count; n++) advance(x, p, b, h, first + n, before(n), before(n + 1), padded);
      for (int64_t n = count - 1; n >= 0; n--)
        retreat(x, g, p, b, h, first + n, before(n), dstate, du, history, padded);
    }
    std::memcpy(p.du + sequence * size, du, sizeof(T) * size);
    transpose_square(p.dstate + at, size, dstate, padded, size, size);
  }
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float> table = {forward<float>, backward<float>};
  return table;
}

#ifdef VISUALRWKV_DOUBLE
template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double> table = {forward<double>, backward<double>};
  return table;
}
#endif

}  // namespace VISUALRWKV_SET
}  // namespace visualrwkv
