// The weights of a layer of RWKV-6 as the CPU kernels see them; free of PyTorch headers, so that kernels compile in seconds.
#pragma once

#include <cstdint>

namespace visualrwkv {

enum class Format { f32, bf16, int8 };

// Weights (rows, columns) of a linear map, dense; of format int8 each row has a scale.
struct Matrix {
  const void* data = nullptr;
  const float* scale = nullptr;
  Format format = Format::f32;
  int64_t rows = 0, columns = 0;
};

// Every pointer of these has the element type of the activations, float or bfloat16, unless it says otherwise.
struct Norm {
  const void *weight, *bias;
};

struct Sizes {
  int64_t hidden, attention, inner, heads, mix_rank, decay_rank;  // D, A, F, H, R, C below
};

struct LayerWeights {
  Norm ln1, ln2, ln_x;
  const void* maa[6];  // (D): x, w, k, v, r, g
  const void* maa_w1;  // (D, 5 R)
  const void* maa_w2;  // (5, R, D)
  const void *decay, *decay_w1, *decay_w2;  // (A), (D, C), (C, A)
  const void* bonus;                        // (H, N)
  Matrix receptance, key, value, gate, output;
  const void *ffn_maa_k, *ffn_maa_r;  // (D)
  Matrix ffn_key, ffn_receptance, ffn_value;
};

}  // namespace visualrwkv
