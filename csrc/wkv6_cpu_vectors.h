// What the CPU kernels are made of: vectors of the width VISUALRWKV_BYTES, the exponential function, and rows of any
// floating point type. Compiled once for each instruction set (cpu_kernels.h); vectors are those of GCC and Clang, which
// turn them into instructions of whatever set is switched on.

#pragma once

namespace visualrwkv {
namespace VISUALRWKV_SET {
namespace {

constexpr int64_t block_tokens = 16;  // tokens handled at once

template <typename T>
struct Vectors {
  static constexpr int lanes = VISUALRWKV_BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(VISUALRWKV_BYTES), may_alias));
  typedef T Unaligned __attribute__((vector_size(VISUALRWKV_BYTES), may_alias, aligned(sizeof(T))));
};

template <typename T>
using Vec = typename Vectors<T>::V;

#define VISUALRWKV_INLINE inline __attribute__((always_inline))

template <typename T>
VISUALRWKV_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Vectors<T>::Unaligned*>(p);
}

template <typename T>
VISUALRWKV_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Vectors<T>::Unaligned*>(p) = x;
}

template <typename T>
VISUALRWKV_INLINE T sum(Vec<T> x) {
  T part[Vectors<T>::lanes];
  store(part, x);
  for (int half = Vectors<T>::lanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define VISUALRWKV_SHUFFLE 1
#endif
#endif

// Four floats, which compilers that can shuffle vectors transpose and add up without a detour through memory.
typedef float Quad __attribute__((vector_size(16), may_alias));
typedef float UnalignedQuad __attribute__((vector_size(16), may_alias, aligned(4)));

#ifdef VISUALRWKV_SHUFFLE
VISUALRWKV_INLINE void transpose(Quad& a, Quad& b, Quad& c, Quad& d) {
  const Quad e = __builtin_shufflevector(a, b, 0, 4, 1, 5), f = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad g = __builtin_shufflevector(c, d, 0, 4, 1, 5), h = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(e, g, 0, 1, 4, 5);
  b = __builtin_shufflevector(e, g, 2, 3, 6, 7);
  c = __builtin_shufflevector(f, h, 0, 1, 4, 5);
  d = __builtin_shufflevector(f, h, 2, 3, 6, 7);
}

VISUALRWKV_INLINE Quad quarter(Vec<float> x) {
#if VISUALRWKV_BYTES == 64
  typedef float Half __attribute__((vector_size(32)));
  const Half h = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
#elif VISUALRWKV_BYTES == 32
  return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
  return x;
#endif
}

// out[n] += sum of x[n], by additions of halves and a transposition.
VISUALRWKV_INLINE void add_sums(float* out, const Vec<float> (&x)[4]) {
  Quad a = quarter(x[0]), b = quarter(x[1]), c = quarter(x[2]), d = quarter(x[3]);
  transpose(a, b, c, d);
  *reinterpret_cast<UnalignedQuad*>(out) += (a + b) + (c + d);
}
#else
VISUALRWKV_INLINE void add_sums(float* out, const Vec<float> (&x)[4]) {
  for (int n = 0; n < 4; n++) out[n] += sum<float>(x[n]);
}
#endif

VISUALRWKV_INLINE void add_sums(double* out, const Vec<double> (&x)[4]) {
  for (int n = 0; n < 4; n++) out[n] += sum<double>(x[n]);
}

// out (columns, rows) = transpose of in (rows, columns); strides are those of the rows.
template <typename T>
void transpose_square(T* out, int64_t out_stride, const T* in, int64_t in_stride, int64_t rows, int64_t columns) {
  int64_t i = 0;
#ifdef VISUALRWKV_SHUFFLE
  if constexpr (std::is_same<T, float>::value) {
    for (; i + 4 <= rows; i += 4) {
      int64_t j = 0;
      for (; j + 4 <= columns; j += 4) {
        Quad q[4];
        for (int n = 0; n < 4; n++) q[n] = *reinterpret_cast<const UnalignedQuad*>(in + (i + n) * in_stride + j);
        transpose(q[0], q[1], q[2], q[3]);
        for (int n = 0; n < 4; n++) *reinterpret_cast<UnalignedQuad*>(out + (j + n) * out_stride + i) = q[n];
      }
      for (; j < columns; j++)
        for (int n = 0; n < 4; n++) out[j * out_stride + i + n] = in[(i + n) * in_stride + j];
    }
  }
#endif
  for (; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) out[j * out_stride + i] = in[i * in_stride + j];
}

// 2^n p for whole n; n may lie beyond the range of the exponent.
VISUALRWKV_INLINE Vec<float> scale(Vec<float> p, Vec<float> n) {
#if VISUALRWKV_BYTES == 64
  return _mm512_scalef_ps(p, n);
#else
  typedef int32_t I __attribute__((vector_size(VISUALRWKV_BYTES), may_alias));
  const I whole = __builtin_convertvector(n, I), half = whole >> 1;
  const I first = (half + 127) << 23, second = (whole - half + 127) << 23;
  return p * reinterpret_cast<const Vec<float>&>(first) * reinterpret_cast<const Vec<float>&>(second);
#endif
}

// e^x with an error of about one unit in the last place; 0 and inf at the ends, e^0 = 1 exactly, NaN stays NaN.
// Coefficients: Cephes expf (S. Moshier).
VISUALRWKV_INLINE Vec<float> exponential(Vec<float> x) {
  const Vec<float> zero = {}, low = zero - 104.0f, high = zero + 89.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec<float> whole = (x * 1.44269504088896341f + magic) - magic;
  Vec<float> f = x - whole * 0.693359375f;
  f = f + whole * 2.12194440e-4f;
  Vec<float> p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  return scale(p, whole);
}

VISUALRWKV_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < Vectors<double>::lanes; i++) x[i] = std::exp(x[i]);
  return x;
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x != x ? uint16_t(0x7fc0) : uint16_t(rounded);
}

// Half precision by arithmetic on floats: exact in this direction, round to nearest even in the other.
inline float from_f16(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13, sign = uint32_t(x & 0x8000) << 16;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;  // also turns subnormal halves into normal floats
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits = (x & 0x7c00) == 0x7c00 ? 0x7f800000u | magnitude : bits;
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to more than the largest half
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal half: the addition aligns and rounds
    float f;
    std::memcpy(&f, &bits, 4);
    f += 0.5f;
    std::memcpy(&half, &f, 4);
    half -= 0x3f000000;
  } else {
    half = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13;
  }
  return sign | uint16_t(half);
}

VISUALRWKV_INLINE int64_t bytes_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

VISUALRWKV_INLINE char* row_address(const Rows& x, int64_t b, int64_t t, int64_t h) {
  return x.data + bytes_of(x.type) * (b * x.batch_stride + t * x.time_stride + h * x.head_stride);
}

// One row of `size` elements to out[0, padded); the rest becomes `fill`. Blocks are taken in the given direction.
template <typename T, int direction>
VISUALRWKV_INLINE void load_row(
    T* __restrict__ out, const Rows& x, int64_t b, int64_t t, int64_t h, int64_t size, int64_t padded, T fill = 0) {
  int64_t n = 0;
  if (x.data) {
    const char* p = row_address(x, b, t, h);
    // The same row of the next block: rows of a head may lie pages apart, where no hardware prefetcher looks.
    const char* next = p + direction * block_tokens * x.time_stride * bytes_of(x.type);
    for (int64_t at = 0; at < size * bytes_of(x.type); at += 64) __builtin_prefetch(next + at);
    if (x.type == Type::f32) {
      if constexpr (std::is_same<T, float>::value)
        for (constexpr int W = Vectors<T>::lanes; n + W <= size; n += W)
          store(out + n, load(reinterpret_cast<const T*>(p) + n));
      for (; n < size; n++) out[n] = T(reinterpret_cast<const float*>(p)[n]);
    } else if (x.type == Type::f64) {
      for (; n < size; n++) out[n] = T(reinterpret_cast<const double*>(p)[n]);
    } else if (x.type == Type::bf16) {
      for (; n < size; n++) out[n] = T(from_bf16(reinterpret_cast<const uint16_t*>(p)[n]));
    } else {
      for (; n < size; n++) out[n] = T(from_f16(reinterpret_cast<const uint16_t*>(p)[n]));
    }
  }
  for (; n < padded; n++) out[n] = fill;
}

template <typename T>
VISUALRWKV_INLINE void store_row(
    const T* __restrict__ in, const Rows& x, int64_t b, int64_t t, int64_t h, int64_t size) {
  char* p = row_address(x, b, t, h);
  if (x.type == Type::f32) {
    int64_t n = 0;
    if constexpr (std::is_same<T, float>::value)
      for (constexpr int W = Vectors<T>::lanes; n + W <= size; n += W)
        store(reinterpret_cast<T*>(p) + n, load(in + n));
    for (; n < size; n++) reinterpret_cast<float*>(p)[n] = float(in[n]);
  } else if (x.type == Type::f64) {
    for (int64_t n = 0; n < size; n++) reinterpret_cast<double*>(p)[n] = double(in[n]);
  } else if (x.type == Type::bf16) {
    for (int64_t n = 0; n < size; n++) reinterpret_cast<uint16_t*>(p)[n] = to_bf16(float(in[n]));
  } else {
    for (int64_t n = 0; n < size; n++) reinterpret_cast<uint16_t*>(p)[n] = to_f16(float(in[n]));
  }
}

}  // namespace
}  // namespace VISUALRWKV_SET
}  // namespace visualrwkv
