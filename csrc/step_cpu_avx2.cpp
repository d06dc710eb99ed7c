// The kernels of decoding for processors with AVX2 and FMA. The standard headers come before the instruction set is
// switched on: their inline functions may be shared with code that runs everywhere.

#if defined(__x86_64__)

#include "step_cpu.h"

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define VISUALRWKV_BYTES 32
#define VISUALRWKV_SET avx2
#include "step_cpu_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
