// The few instructions of the GPU that CUDA C++ has no plain name for. tests/cuda_emulation.h has the same in C++.
#pragma once

#include <cstdint>

#define VISUALRWKV_SHARED(type, name)                                  \
  extern __shared__ __align__(16) unsigned char visualrwkv_shared[]; \
  type& name = *reinterpret_cast<type*>(visualrwkv_shared)

namespace visualrwkv::cuda {

// The nearest number with the 11 leading bits that the tensor cores read.
__device__ inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// d += a b, of 16 x 8, 16 x 8 and 8 x 8 numbers spread over the lanes of a warp (PTX: mma.m16n8k8).
__device__ inline void tensor_core_multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline float float_of_half(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
}

__device__ inline uint16_t half_of_float(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ inline uint16_t bfloat16_of_float(float x) {
  uint32_t bits;  // two at once is the only form that all processors since sm_80 have
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(0.0f), "f"(x));
  return static_cast<uint16_t>(bits);
}

template <typename Kernel, typename Problem>
cudaError_t launch(Kernel* kernel, int64_t blocks, int threads, size_t shared, const Problem& p, void* stream) {
  if (shared > 48 * 1024) {  // more than that is given on request only
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace visualrwkv::cuda
