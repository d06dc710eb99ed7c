// What the operator (wkv6.cpp) and the CPU kernels share.
#pragma once

#include "wkv6_problem.h"

namespace visualrwkv {

// The kernels of one instruction set; each handles the sequences [begin, end) of batch * heads.
template <typename T>
struct Kernels {
  void (*forward)(const Forward<T>&, int64_t begin, int64_t end);
  void (*backward)(const Backward<T>&, int64_t begin, int64_t end);
};

namespace plain {  // what every processor of the platform has; the only one for double
template <typename T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>();
template <>
const Kernels<double>& kernels<double>();
}  // namespace plain

#if defined(__x86_64__)
namespace avx2 {
template <typename T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>();
}  // namespace avx2

namespace avx512 {
template <typename T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>();
}  // namespace avx512
#endif

}  // namespace visualrwkv
