// What the operators of decoding (step.cpp) and their CPU kernels share; free of PyTorch headers.
#pragma once

#include <cstdint>

#include "barrier.h"
#include "layer.h"

namespace visualrwkv {

// Where a layer's state is read and written; the two never overlap.
struct LayerMemory {
  const void *att_shift, *ffn_shift;  // (B, D)
  const float* wkv;                   // (B, H, N, N)
  void *new_att_shift, *new_ffn_shift;
  float* new_wkv;
};

struct Step : Sizes {
  int64_t batch, layers;
  int64_t shares;  // in which the low-rank maps are summed up: not as many as there are threads now, which changes the sums
  float norm_eps, head_eps;
  const void* embeds;  // (B, D), before ln0
  void* out;           // (B, D), after ln_out
  Norm ln0, ln_out;
  const LayerWeights* weights;
  const LayerMemory* memory;
  float* scratch;  // of `step_scratch` floats, 64-byte aligned
};

// Multiples of 16 floats keep the arrays of the scratch apart by whole cache lines.
inline int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }

inline int64_t step_scratch(const Step& s, int64_t threads) {
  const int64_t d = padded16(s.hidden), a = padded16(s.attention), own = 4 * d;
  const int64_t low = padded16(5 * s.mix_rank) + padded16(s.decay_rank);
  return s.batch * (7 * d + 6 * a + padded16(s.inner) + s.shares * low + threads * (own + low));
}

// The kernels of one instruction set. `step` is called by all threads of a team at once, `product` for some rows:
// y (B, y_stride) [rows begin to end) = x (B, columns) w^T.
struct StepKernels {
  void (*step_f32)(const Step&, Barrier&, int thread, int threads);
  void (*step_bf16)(const Step&, Barrier&, int thread, int threads);
  void (*product)(const Matrix&, const float* x, int64_t batch, float* y, int64_t y_stride, int64_t begin, int64_t end);
};

namespace plain {
const StepKernels& step_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const StepKernels& step_kernels();
}
namespace avx512 {
const StepKernels& step_kernels();
}
#endif

}  // namespace visualrwkv
