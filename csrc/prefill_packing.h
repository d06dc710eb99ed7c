// A batch of padded sequences as prefill reads it: what is not padded stands one behind the other, so that nothing is
// computed for the rest, and the sequences stand in the order in which threads share them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

namespace visualrwkv {

using at::Tensor;

struct Packing {
  std::vector<int64_t> sequence;   // which one of the batch
  std::vector<int64_t> begins;     // the first row of each, and the end
  std::vector<int64_t> positions;  // of each row: its place in (batch, time)
  // Of each row, for each layer and the output: in which row of the order before it stands; empty: in its own.
  std::vector<std::vector<int64_t>> sources;
  std::vector<int64_t> pieces;  // the first sequence of each, and the end

  int64_t rows() const { return positions.size(); }
  int64_t rows_of_piece(int64_t p) const { return begins[pieces[p + 1]] - begins[pieces[p]]; }
};

// The sequences of a piece each, for `pieces` of nearly the same number of rows, the longest one first.
inline std::vector<std::vector<int64_t>> share(const std::vector<int64_t>& lengths, int64_t pieces) {
  std::vector<int64_t> order(lengths.size()), rows(pieces);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  std::vector<std::vector<int64_t>> shares(pieces);
  for (int64_t b : order) {
    if (lengths[b] == 0) continue;
    const int64_t least = std::min_element(rows.begin(), rows.end()) - rows.begin();
    shares[least].push_back(b);
    rows[least] += lengths[b];
  }
  return shares;
}

// Whether threads that share sequences have nearly the same number of rows.
inline bool is_fair(const std::vector<int64_t>& lengths, int64_t threads) {
  int64_t most = 0, all = 0;
  for (const auto& one : share(lengths, threads)) {
    int64_t rows = 0;
    for (int64_t b : one) rows += lengths[b];
    most = std::max(most, rows);
    all += rows;
  }
  return 10 * most * threads <= 11 * all;
}

// real (batch, time): what is not padded, or undefined; sources: (batch, time) each, or undefined; piece_rows: of pieces, of
// which there is one where threads cannot share sequences fairly. Nothing where a source is padded.
inline std::optional<Packing> pack(
    int64_t batch, int64_t time, const Tensor& real, const std::vector<Tensor>& sources, int64_t threads,
    int64_t piece_rows) {
  const bool* const is_real = real.defined() ? real.const_data_ptr<bool>() : nullptr;
  std::vector<int64_t> lengths(batch, time);
  if (is_real)
    for (int64_t b = 0; b < batch; b++) lengths[b] = std::count(is_real + b * time, is_real + (b + 1) * time, true);
  int64_t pieces = 1;
  if (threads > 1 && is_fair(lengths, threads)) {
    const int64_t rows = std::accumulate(lengths.begin(), lengths.end(), int64_t(0));
    pieces = std::min(batch, threads * std::max<int64_t>(1, rows / (threads * piece_rows)));
  }

  Packing p;
  std::vector<int64_t> row(batch * time, -1);
  for (const auto& one : share(lengths, pieces)) {
    if (one.empty()) continue;
    p.pieces.push_back(p.sequence.size());
    for (int64_t b : one) {
      p.sequence.push_back(b);
      p.begins.push_back(p.rows());
      for (int64_t place = b * time; place < (b + 1) * time; place++)
        if (!is_real || is_real[place]) {
          row[place] = p.rows();
          p.positions.push_back(place);
        }
    }
  }
  p.pieces.push_back(p.sequence.size());
  p.begins.push_back(p.rows());

  for (const Tensor& source : sources) {
    std::vector<int64_t>& packed = p.sources.emplace_back();
    if (!source.defined()) continue;
    for (int64_t place : p.positions) {
      packed.push_back(row[place / time * time + source.const_data_ptr<int64_t>()[place]]);
      if (packed.back() < 0) return std::nullopt;
    }
  }
  return p;
}

}  // namespace visualrwkv
