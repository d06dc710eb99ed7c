// The CPU kernels for processors with AVX2 and FMA.

#if defined(__x86_64__)

#include "cpu_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define VISUALRWKV_BYTES 32
#define VISUALRWKV_SET avx2
#include "cpu_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
