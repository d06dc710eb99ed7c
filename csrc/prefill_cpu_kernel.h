// What prefill does between its matrix products, for one instruction set; included by cpu_kernels.h. Each function is one
// walk over rows of activations, with float32 in registers: norms, token shift, mixing and gates would otherwise be
// dozens of walks. What is computed is written down in visualrwkv/rwkv.py.

#pragma once

#include "cpu_elements.h"

namespace visualrwkv {
namespace VISUALRWKV_SET {
namespace {

// Where the rows of a run, which are walked through one by one, find the row before them.
template <typename E>
class Predecessor {
 public:
  // recompute(row) gives z of a row in front of the run, which may not be written yet.
  template <typename Recompute>
  Predecessor(const Sequences& s, int64_t size, int64_t row, Recompute recompute) : s_(s), size_(size) {
    n_ = std::upper_bound(s.begins, s.begins + s.count, row) - s.begins - 1;
    at = row == s.begins[n_] ? nullptr : recompute(row - 1);
  }

  void enter(int64_t row) {
    if (row == s_.begins[n_]) at = static_cast<const E*>(s_.old_shift) + s_.index[n_] * size_;
  }
  // The sequence of the batch that ends with this row, or -1.
  int64_t leave(int64_t row, const E* z) {
    at = z;
    return row + 1 == s_.begins[n_ + 1] ? s_.index[n_++] : -1;
  }

  const E* at;

 private:
  const Sequences& s_;
  int64_t size_, n_;
};

template <typename E>
void norm_and_mix(const NormAndMix& p, int64_t begin, int64_t end) {
  const int64_t size = p.size;
  std::vector<float> row(size);
  std::vector<E> before(size);
  const auto read = [&](int64_t m, E* x_out, E* z) {
    const int64_t from = (p.source ? p.source[m] - p.origin : m) * size;
    const E* const x = static_cast<const E*>(p.x) + from;
    const E* const add = p.add ? static_cast<const E*>(p.add) + from : nullptr;
    const E* const gate = p.gate ? static_cast<const E*>(p.gate) + from : nullptr;
    each(0, size, [&](int64_t n, auto lanes) {
      auto value = get(x + n, lanes);
      if (add) value += gate ? get(add + n, lanes) * logistic(get(gate + n, lanes)) : get(add + n, lanes);
      set(row.data() + n, value);
      if (x_out) set(x_out + n, value);
    });
    normalise<E>(row.data(), row.data(), p.norm, size, p.eps);
    each(0, size, [&](int64_t n, auto lanes) { set(z + n, get(row.data() + n, lanes)); });
  };
  const auto read_row = [&](int64_t m) {
    E* const z = static_cast<E*>(p.z) + m * size;
    read(m, p.x_out ? static_cast<E*>(p.x_out) + m * size : nullptr, z);
    return z;
  };
  if (!p.old_shift) {
    for (int64_t m = begin; m < end; m++) read_row(m);
    return;
  }
  Predecessor<E> previous(p, size, begin, [&](int64_t m) {
    read(m, nullptr, before.data());
    return before.data();
  });
  for (int64_t m = begin; m < end; m++) {
    const E* const z = read_row(m);
    previous.enter(m);
    for (int i = 0; i < p.mixes; i++) {
      const E* ratio = static_cast<const E*>(p.ratio[i]);
      E* out = static_cast<E*>(p.mixed[i]) + m * size;
      each(0, size, [&](int64_t n, auto lanes) {
        const auto here = get(z + n, lanes);
        set(out + n, here + (get(previous.at + n, lanes) - here) * get(ratio + n, lanes));
      });
    }
    const int64_t ended = previous.leave(m, z);
    if (p.new_shift && ended >= 0) std::memcpy(static_cast<E*>(p.new_shift) + ended * size, z, sizeof(E) * size);
  }
}

constexpr int columns_at_once = VISUALRWKV_BYTES == 64 ? 4 : 2;  // vectors; with four rows the sums fit the registers

// Columns [n, n + C lanes) of M rows of base + low w, handed to use(row, column, sum).
template <int M, int C, typename E, typename Use>
VISUALRWKV_INLINE void low_rank_columns(
    const float* __restrict__ low, int64_t low_stride, const E* __restrict__ w, const E* base, int64_t rank,
    int64_t size, int64_t n, Use use) {
  V sums[M][C];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) sums[m][c] = load_as_float(base + n + c * W);
  for (int64_t i = 0; i < rank; i++) {
    V row[C];
    for (int c = 0; c < C; c++) row[c] = load_as_float(w + i * size + n + c * W);
    for (int m = 0; m < M; m++)
      for (int c = 0; c < C; c++) sums[m][c] += row[c] * low[m * low_stride + i];
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) use(m, n + c * W, sums[m][c]);
}

template <int M, typename E, typename Use>
VISUALRWKV_INLINE void low_rank(
    const float* low, int64_t low_stride, const E* w, const E* base, int64_t rank, int64_t size, Use use) {
  int64_t n = 0;
  for (; n + columns_at_once * W <= size; n += columns_at_once * W)
    low_rank_columns<M, columns_at_once>(low, low_stride, w, base, rank, size, n, use);
  for (; n + W <= size; n += W) low_rank_columns<M, 1>(low, low_stride, w, base, rank, size, n, use);
  for (; n < size; n++)
    for (int m = 0; m < M; m++) {
      float sum = as_float(base[n]);
      for (int64_t i = 0; i < rank; i++) sum += as_float(w[i * size + n]) * low[m * low_stride + i];
      use(m, n, sum);
    }
}

// tanh of rows [begin, begin + count) of a low-rank map, `width` numbers each.
template <typename E>
void tangents(float* out, const LowRank& p, int64_t width, int64_t begin, int64_t count) {
  const E* low = static_cast<const E*>(p.low) + (begin - p.first) * width;
  each(0, count * width, [&](int64_t n, auto lanes) { set(out + n, tangent(get(low + n, lanes))); });
}

template <typename E>
void decays(const LowRank& p, const E* base, E* out, int64_t begin, int64_t end) {
  std::vector<float> low(4 * p.rank);
  by_fours(end - begin, [&](int64_t first, auto count) {
    constexpr int M = decltype(count)::value;
    tangents<E>(low.data(), p, p.rank, begin + first, M);
    E* const rows = out + (begin + first) * p.size;
    low_rank<M>(low.data(), p.rank, static_cast<const E*>(p.w), base, p.rank, p.size, [&](int m, int64_t n, auto sum) {
      set(rows + m * p.size + n, sum);
    });
  });
}

template <typename E>
void mix_by_data(const MixByData& p, int64_t begin, int64_t end) {
  const int64_t size = p.low.size, rank = p.low.rank;
  const E* const all = static_cast<const E*>(p.z);
  std::vector<float> low(4 * 5 * rank);
  Predecessor<E> previous(p, size, begin, [&](int64_t m) { return all + m * size; });
  by_fours(end - begin, [&](int64_t first, auto count) {
    constexpr int M = decltype(count)::value;
    const E *z[M], *before[M];
    for (int m = 0; m < M; m++) {
      z[m] = all + (begin + first + m) * size;
      previous.enter(begin + first + m);
      before[m] = previous.at;
      previous.leave(begin + first + m, z[m]);
    }
    tangents<E>(low.data(), p.low, 5 * rank, begin + first, M);
    for (int i = 0; i < 5; i++) {
      const E* const w = static_cast<const E*>(p.low.w) + i * rank * size;
      E* const out = static_cast<E*>(p.mixed[i]) + (begin + first) * size;
      low_rank<M>(low.data() + i * rank, 5 * rank, w, static_cast<const E*>(p.ratio[i]), rank, size,
                  [&](int m, int64_t n, auto share) {
                    const auto here = get(z[m] + n, share);
                    set(out + m * size + n, here + (get(before[m] + n, share) - here) * share);
                  });
    }
  });
}

template <typename E>
void norm_and_gate(const NormAndGate& p, int64_t begin, int64_t end) {
  const int64_t head = p.size / p.heads;
  std::vector<float> row(head);
  for (int64_t m = begin; m < end; m++)
    for (int64_t h = 0; h < p.heads; h++) {
      E* const y = static_cast<E*>(p.y) + m * p.size + h * head;
      const E* const gate = static_cast<const E*>(p.gate) + m * p.size + h * head;
      const Norm norm = {static_cast<const E*>(p.norm.weight) + h * head, static_cast<const E*>(p.norm.bias) + h * head};
      each(0, head, [&](int64_t n, auto lanes) { set(row.data() + n, get(y + n, lanes)); });
      normalise<E>(row.data(), row.data(), norm, head, p.eps);
      each(0, head, [&](int64_t n, auto lanes) {
        const auto open = get(gate + n, lanes);
        set(y + n, get(row.data() + n, lanes) * open * logistic(open));
      });
    }
}

template <typename E>
void square_relu(E* x, int64_t begin, int64_t end) {
  each(begin, end, [&](int64_t n, auto lanes) {
    const auto value = get(x + n, lanes), positive = value <= 0 ? 0 * lanes : value;
    set(x + n, positive * positive);
  });
}

template <typename E>
const PrefillKernels<E>& table() {
  static const PrefillKernels<E> kernels = {
      norm_and_mix<E>, mix_by_data<E>, norm_and_gate<E>, decays<E>, square_relu<E>};
  return kernels;
}

}  // namespace

template <>
const PrefillKernels<float>& prefill_kernels<float>() {
  return table<float>();
}
template <>
const PrefillKernels<uint16_t>& prefill_kernels<uint16_t>() {
  return table<uint16_t>();
}

}  // namespace VISUALRWKV_SET
}  // namespace visualrwkv
