// What the operator of prefill (prefill.cpp) and its CPU kernels share; free of PyTorch headers.
//
// Activations are dense rows (rows, size) of float or bfloat16, sequences one behind the other without padding; every
// kernel handles the rows [begin, end).
#pragma once

#include "layer.h"

namespace visualrwkv {

// Sequences, and where the token shift of the first row of each finds the row before it.
struct Sequences {
  int64_t count;
  const int64_t* begins;  // (count + 1): the first row of each, and the end
  const int64_t* index;   // (count): which sequence of the batch
  const void* old_shift;  // (batch, size)
};

// The residual stream x' = x + logistic(gate) add, its norm z, and for each ratio z + (z before - z) * ratio.
struct NormAndMix : Sequences {
  int64_t size;
  float eps;
  Norm norm;
  const void *x, *add = nullptr, *gate = nullptr;  // add or gate may be null
  const int64_t* source = nullptr;  // (rows): of which row a row takes x, add and gate, counted from `origin`; null: its own
  int64_t origin = 0;
  void *x_out = nullptr, *z;        // x_out may be null
  int mixes = 0;
  const void* ratio[2];  // (size)
  void* mixed[2];
  void* new_shift = nullptr;  // (batch, size): z of the last row of a sequence; may be null
};

// The second half of low-rank maps: base + tanh(low) w.
struct LowRank {
  int64_t first, rank, size;
  const void* low;  // (rows, parts * rank), from row `first` on
  const void* w;    // (parts, rank, size)
};

// mixed[i] = z + (z before - z) * part i of the low-rank map.
struct MixByData : Sequences {
  LowRank low;
  const void* ratio[5];  // (size): the bases
  const void* z;
  void* mixed[5];
};

// y = norm of each head of y * gate logistic(gate).
struct NormAndGate {
  int64_t heads, size;  // of a row
  float eps;
  Norm norm;
  void* y;
  const void* gate;
};

template <typename E>  // float, or uint16_t for bfloat16
struct PrefillKernels {
  void (*norm_and_mix)(const NormAndMix&, int64_t begin, int64_t end);
  void (*mix_by_data)(const MixByData&, int64_t begin, int64_t end);
  void (*norm_and_gate)(const NormAndGate&, int64_t begin, int64_t end);
  void (*decays)(const LowRank&, const E* base, E* out, int64_t begin, int64_t end);  // one part: out (rows, size)
  void (*square_relu)(E* x, int64_t begin, int64_t end);  // elements
};

namespace plain {
template <typename E>
const PrefillKernels<E>& prefill_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <typename E>
const PrefillKernels<E>& prefill_kernels();
}
namespace avx512 {
template <typename E>
const PrefillKernels<E>& prefill_kernels();
}
#endif

}  // namespace visualrwkv
