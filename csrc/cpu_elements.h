// Elements of the CPU kernels of whole models: float32, bfloat16 and int8 in memory, vectors of float32 in registers, and
// what is done with a row of them. For one instruction set, as everything that includes it; see cpu_*.cpp.

#pragma once

#include "layer.h"
#include "wkv6_cpu_vectors.h"

namespace visualrwkv {
namespace VISUALRWKV_SET {
namespace {

constexpr int W = Vectors<float>::lanes;
typedef Vec<float> V;

VISUALRWKV_INLINE V load_as_float(const float* p) { return load(p); }

VISUALRWKV_INLINE V load_as_float(const uint16_t* p) {  // bfloat16
#if VISUALRWKV_BYTES == 64
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
#elif VISUALRWKV_BYTES == 32
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
#else
  typedef uint16_t Half __attribute__((vector_size(2 * W)));
  typedef uint32_t Whole __attribute__((vector_size(4 * W)));
  Half x;
  std::memcpy(&x, p, sizeof(x));
  return (V)(__builtin_convertvector(x, Whole) << 16);
#endif
}

VISUALRWKV_INLINE V load_as_float(const int8_t* p) {
#if VISUALRWKV_BYTES == 64
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
#elif VISUALRWKV_BYTES == 32
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
#else
  typedef int8_t Byte __attribute__((vector_size(W)));
  typedef int32_t Whole __attribute__((vector_size(4 * W)));
  Byte x;
  std::memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(__builtin_convertvector(x, Whole), V);
#endif
}

VISUALRWKV_INLINE float as_float(float x) { return x; }
VISUALRWKV_INLINE float as_float(uint16_t x) { return from_bf16(x); }
VISUALRWKV_INLINE float as_float(int8_t x) { return x; }
VISUALRWKV_INLINE void put(float* p, float x) { *p = x; }
VISUALRWKV_INLINE void put(uint16_t* p, float x) { *p = to_bf16(x); }

VISUALRWKV_INLINE V broadcast(float x) { return V{} + x; }

// Runs body(n, lanes) over [begin, end), with whole vectors as far as they go. `Lanes` is V, then float.
template <typename Body>
VISUALRWKV_INLINE void each(int64_t begin, int64_t end, Body body) {
  int64_t n = begin;
  for (; n + W <= end; n += W) body(n, V{});
  for (; n < end; n++) body(n, 0.0f);
}

template <typename E>
VISUALRWKV_INLINE V get(const E* p, V) { return load_as_float(p); }
template <typename E>
VISUALRWKV_INLINE float get(const E* p, float) { return as_float(*p); }
VISUALRWKV_INLINE void set(float* p, V x) { store(p, x); }
VISUALRWKV_INLINE void set(float* p, float x) { *p = x; }
VISUALRWKV_INLINE void set(uint16_t* p, float x) { *p = to_bf16(x); }
VISUALRWKV_INLINE void set(uint16_t* p, V x) {
  typedef uint32_t Whole __attribute__((vector_size(4 * W)));
  typedef uint16_t Half __attribute__((vector_size(2 * W)));
  const Whole bits = (Whole)x, nan = (Whole)(x != x);
  const Whole rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Half half = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), Half);
  std::memcpy(p, &half, sizeof(half));
}

// Calls body(first, how many as a constant of the type) for at most 4 of `count` at once.
template <typename Body>
VISUALRWKV_INLINE void by_fours(int64_t count, Body body) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) body(m, std::integral_constant<int, 4>());
  if (count - m == 3) body(m, std::integral_constant<int, 3>());
  if (count - m == 2) body(m, std::integral_constant<int, 2>());
  if (count - m == 1) body(m, std::integral_constant<int, 1>());
}

VISUALRWKV_INLINE void accumulate(V& sums, float&, V x) { sums += x; }
VISUALRWKV_INLINE void accumulate(V&, float& rest, float x) { rest += x; }

VISUALRWKV_INLINE float first(V x) { return x[0]; }
VISUALRWKV_INLINE V exponential_of(V x) { return exponential(x); }
VISUALRWKV_INLINE float exponential_of(float x) { return first(exponential(broadcast(x))); }

template <typename X>
VISUALRWKV_INLINE X logistic(X x) { return 1.0f / (1.0f + exponential_of(-x)); }
template <typename X>
VISUALRWKV_INLINE X tangent(X x) { return 1.0f - 2.0f / (1.0f + exponential_of(2.0f * x)); }

// out = norm(x), both float32, with weights of type E; they may be the same.
template <typename E>
void normalise(float* out, const float* x, const Norm& norm, int64_t size, float eps) {
  V sums = {};
  float mean = 0, square = 0;
  each(0, size, [&](int64_t n, auto lanes) {
    accumulate(sums, mean, get(x + n, lanes));
  });
  mean = (mean + sum<float>(sums)) / size;
  sums = V{};
  each(0, size, [&](int64_t n, auto lanes) {
    const auto c = get(x + n, lanes) - mean;
    accumulate(sums, square, c * c);
  });
  const float rate = 1.0f / std::sqrt((square + sum<float>(sums)) / size + eps);
  const E *weight = static_cast<const E*>(norm.weight), *bias = static_cast<const E*>(norm.bias);
  each(0, size, [&](int64_t n, auto lanes) {
    set(out + n, (get(x + n, lanes) - mean) * rate * get(weight + n, lanes) + get(bias + n, lanes));
  });
}

}  // namespace
}  // namespace VISUALRWKV_SET
}  // namespace visualrwkv
