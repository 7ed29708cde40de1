// One vector of floats, as wide as the instruction set of this build makes it. Here stands only
// what kernels write by hand: loops that the compiler vectorises well stay plain loops.
#pragma once
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastddpm {
namespace {

#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * WIDTH)));

inline Vector vector_of(float x) { return x - Vector{}; }  // not +, which would lose a -0

inline Vector load_vector(const float* x) {
  Vector v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

inline void store_vector(float* x, Vector v) { __builtin_memcpy(x, &v, sizeof v); }

// a b + c, fused where the target has it. By intrinsics: the compiler is told not to contract.
inline Vector vector_madd(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// As many bytes of float64, for what is rounded once from it.
constexpr int64_t HALF_WIDTH = WIDTH / 2;

typedef float HalfVector __attribute__((vector_size(2 * WIDTH)));
typedef double Doubles __attribute__((vector_size(4 * WIDTH)));

inline Doubles load_doubles(const float* x) {
  HalfVector v;
  __builtin_memcpy(&v, x, sizeof v);
  return __builtin_convertvector(v, Doubles);
}

inline void store_doubles(float* x, Doubles v) {
  const HalfVector rounded = __builtin_convertvector(v, HalfVector);
  __builtin_memcpy(x, &rounded, sizeof rounded);
}

}  // namespace
}  // namespace fastddpm
