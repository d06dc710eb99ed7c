// The CPU kernels for processors with AVX-512 (F, BW, DQ, VL).

#if defined(__x86_64__)

#include "cpu_headers.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC's own immintrin.h
#endif

#define VISUALRWKV_BYTES 64
#define VISUALRWKV_SET avx512
#include "cpu_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
