// The tensors of a model, in the order of visualrwkv/inference.py, taken apart for the kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "layer.h"

namespace visualrwkv {

using at::Tensor;

// Takes the tensors of a list in turn and notes whether each is what is wanted.
class Reader {
 public:
  Reader(at::TensorList tensors, at::TensorList scales, at::ScalarType type)
      : tensors_(tensors), scales_(scales), type_(type) {}

  const Tensor* next() {
    if (at_ == tensors_.size()) good = false;
    return good ? &tensors_[at_++] : nullptr;
  }

  const void* vector(int64_t numel) { return pointer(next(), numel, type_); }

  Norm norm(int64_t size) {
    Norm n;
    n.weight = vector(size);
    n.bias = vector(size);
    return n;
  }

  Matrix matrix(int64_t rows, int64_t columns) {
    const Tensor* t = next();
    Matrix m;
    m.rows = rows;
    m.columns = columns;
    const bool quantised = good && t->scalar_type() == at::kChar;
    m.format = quantised ? Format::int8 : type_ == at::kFloat ? Format::f32 : Format::bf16;
    m.data = pointer(t, rows * columns, quantised ? at::kChar : type_);
    good = good && t->dim() == 2 && t->size(0) == rows;
    if (quantised) {
      good = good && scale_ < scales_.size();
      if (good) m.scale = static_cast<const float*>(pointer(&scales_[scale_++], rows, at::kFloat));
    }
    return m;
  }

  const void* pointer(const Tensor* t, int64_t numel, at::ScalarType type) {
    good = good && t->device().is_cpu() && t->layout() == at::kStrided && t->scalar_type() == type &&
           t->numel() == numel && t->is_contiguous();
    return good ? t->data_ptr() : nullptr;
  }

  bool finished() const { return good && at_ == tensors_.size() && scale_ == scales_.size(); }

  bool good = true;

 private:
  at::TensorList tensors_, scales_;
  at::ScalarType type_;
  size_t at_ = 0, scale_ = 0;
};

// Whether weights are few enough to stay in the caches, so that every thread may read them all.
inline bool stay_in_caches(at::TensorList weights) {
  int64_t bytes = 0;
  for (const Tensor& w : weights) bytes += w.nbytes();
  return bytes <= 32 << 20;
}

// A whole model; `layers` is empty where the tensors are not those of one.
struct Model : Sizes {
  Norm ln0, ln_out;
  std::vector<LayerWeights> layers;
};

inline LayerWeights read_layer(Reader& in, const Sizes& s) {
  const int64_t d = s.hidden, a = s.attention;
  LayerWeights p;
  p.ln1 = in.norm(d);
  p.ln2 = in.norm(d);
  for (const void*& ratio : p.maa) ratio = in.vector(d);
  p.maa_w1 = in.vector(d * 5 * s.mix_rank);
  p.maa_w2 = in.vector(5 * s.mix_rank * d);
  p.decay = in.vector(a);
  p.decay_w1 = in.vector(d * s.decay_rank);
  p.decay_w2 = in.vector(s.decay_rank * a);
  p.bonus = in.vector(a);
  for (Matrix* m : {&p.receptance, &p.key, &p.value, &p.gate}) *m = in.matrix(a, d);
  p.output = in.matrix(d, a);
  p.ln_x = in.norm(a);
  p.ffn_maa_k = in.vector(d);
  p.ffn_maa_r = in.vector(d);
  p.ffn_key = in.matrix(s.inner, d);
  p.ffn_receptance = in.matrix(d, d);
  p.ffn_value = in.matrix(d, s.inner);
  return p;
}

// weights: ln0, ln_out, then per layer those of `read_layer`, in its order, in the type of the activations or int8;
// scales: (rows) float32 of each int8 matrix.
inline Model read_model(
    at::TensorList weights, at::TensorList scales, at::ScalarType type, int64_t hidden, int64_t heads) {
  constexpr size_t outside = 4, per_layer = 28, maa_w1 = 10, decay_w1 = 13, bonus = 15, ffn_key = 25;
  Model m{};
  if ((type != at::kFloat && type != at::kBFloat16) || weights.size() < outside + per_layer ||
      (weights.size() - outside) % per_layer || heads < 1)
    return m;
  const Tensor* first = &weights[outside];
  m.hidden = hidden;
  m.heads = heads;
  m.mix_rank = first[maa_w1].size(-1) / 5;
  m.decay_rank = first[decay_w1].size(-1);
  m.attention = first[bonus].numel();
  m.inner = first[ffn_key].size(0);
  if (m.attention == 0 || m.attention % heads) return m;
  Reader in(weights, scales, type);
  m.ln0 = in.norm(hidden);
  m.ln_out = in.norm(hidden);
  for (size_t n = 0; n < (weights.size() - outside) / per_layer; n++) m.layers.push_back(read_layer(in, m));
  if (!in.finished()) m.layers.clear();
  return m;
}

}  // namespace visualrwkv
