// Storage types and their conversion to and from float32. Arithmetic is float32 whatever the
// storage. On a GPU the conversions are its own instructions, which give the same bits.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTDDPM_HD __host__ __device__ __forceinline__
#else
#define FASTDDPM_HD inline __attribute__((always_inline))
#endif

namespace fastddpm {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, u8 = 3 };

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Internal linkage: this file is compiled once per instruction set, and the linker must not pick
// the AVX-512 copy of a function for the plain build.
namespace {

template <class To, class From>
FASTDDPM_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

FASTDDPM_HD float to_float(float x) { return x; }

FASTDDPM_HD float to_float(uint8_t x) { return float(x); }

FASTDDPM_HD float to_float(BF16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

FASTDDPM_HD float to_float(F16 x) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(x.bits));
  return converted;
#else
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000)
                                                                     << 16;
  const uint32_t exponent = magnitude & 0x0f800000;
  // Subnormal halves are made normal by adding 2^-14 and taking it off again: exact, and right
  // even where the processor flushes float32 subnormals.
  const float subnormal = bit_cast<float>(magnitude + 0x38800000) - 0x1p-14f;
  const uint32_t rebias = exponent == 0x0f800000 ? 0x70000000u : 0x38000000u;  // inf and NaN: 255
  const uint32_t normal = magnitude + rebias;
  return bit_cast<float>((exponent == 0 ? bit_cast<uint32_t>(subnormal) : normal) | sign);
#endif
}

template <class T>
FASTDDPM_HD T from_float(float x);

template <>
FASTDDPM_HD float from_float<float>(float x) {
  return x;
}

template <>
FASTDDPM_HD BF16 from_float<BF16>(float x) {  // to nearest even; a NaN stays a NaN
#if defined(__CUDA_ARCH__)
  BF16 converted;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(converted.bits) : "f"(x));
  return converted;
#else
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = u + 0x7fff + ((u >> 16) & 1);
  return {uint16_t((x != x ? u | 0x400000 : rounded) >> 16)};
#endif
}

template <>
FASTDDPM_HD F16 from_float<F16>(float x) {  // to nearest even; a NaN stays a NaN
#if defined(__CUDA_ARCH__)
  F16 converted;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(converted.bits) : "f"(x));
  return converted;
#else
  const uint32_t u = bit_cast<uint32_t>(x), magnitude = u & 0x7fffffff;
  // Below 2^-14 adding 0.5 puts the half's last bit at the float's last bit, rounding on the way.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  return {uint16_t((magnitude >= 0x47800000 ? special : finite) | ((u >> 16) & 0x8000))};
#endif
}

}  // namespace
}  // namespace fastddpm
