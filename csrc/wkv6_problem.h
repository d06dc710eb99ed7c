// The arguments of the operator as its kernels see them, on whatever device; free of PyTorch headers, so that the kernels
// compile in seconds.
#pragma once

#include <cstdint>

namespace visualrwkv {

enum class Type { f32, f64, bf16, f16 };

// A tensor (batch, time, heads, size) of any strides, the last of which is 1; strides count elements.
struct Rows {
  char* data = nullptr;  // null: all zero
  Type type = Type::f32;
  int64_t batch_stride = 0, time_stride = 0, head_stride = 0;
};

// T is float or double everywhere: the type of the state and of all arithmetic. States are (..., key, value).
template <typename T>
struct Problem {
  int64_t batch, time, heads, size;
  Rows r, k, v, w;
  const T* u;      // (heads, size)
  const T* state;  // (batch, heads, size, size), or null for zeros
};

template <typename T>
struct Forward : Problem<T> {
  Rows y;
  T* final_state;  // (batch, heads, size, size)
};

template <typename T>
struct Backward : Problem<T> {
  Rows dy, dr, dk, dv, dw;
  const T* dfinal;  // (batch, heads, size, size), or null for zeros
  T* du;            // (batch, heads, size)
  T* dstate;        // (batch, heads, size, size)
};

}  // namespace visualrwkv
