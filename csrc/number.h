// Storage types: what lies in memory, and how it becomes and leaves the float or double that is computed with.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define LP_INLINE __host__ __device__ __forceinline__
#define LP_UNROLL _Pragma("unroll")
#define LP_NO_UNROLL _Pragma("unroll 1")
#else
#define LP_INLINE inline __attribute__((always_inline))
#define LP_UNROLL
#define LP_NO_UNROLL
#endif

namespace layerpipe {

enum class Dtype : int32_t { f32, f64, bf16, f16 };

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
    static constexpr Dtype value = Dtype::f32;
};
template <>
struct DtypeOf<double> {
    static constexpr Dtype value = Dtype::f64;
};
template <>
struct DtypeOf<bf16> {
    static constexpr Dtype value = Dtype::bf16;
};
template <>
struct DtypeOf<f16> {
    static constexpr Dtype value = Dtype::f16;
};

constexpr int size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

LP_INLINE uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
LP_INLINE float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

LP_INLINE uint64_t bits_of(double x) {
    uint64_t u;
    memcpy(&u, &x, 8);
    return u;
}
LP_INLINE double float_of(uint64_t u) {
    double x;
    memcpy(&x, &u, 8);
    return x;
}

// A choice that is the same for all elements, as a mask of bits: a condition would make compilers split the loop over
// them once or twice and then leave the rest of it scalar.
template <class T>
struct Choice {
    decltype(bits_of(T())) mask;
    Choice() = default;
    LP_INLINE explicit Choice(bool first) : mask(first ? ~decltype(mask)(0) : decltype(mask)(0)) {}
    LP_INLINE T operator()(T first, T second) const {
        return float_of((bits_of(first) & mask) | (bits_of(second) & ~mask));
    }
};

LP_INLINE float to_compute(float x) { return x; }
LP_INLINE double to_compute(double x) { return x; }
LP_INLINE float to_compute(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

#if defined(__CUDA_ARCH__)
LP_INLINE float to_compute(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
#else
// Multiplying by 2^112 moves the exponent's bias, subnormals included; infinities and NaNs get theirs afterwards.
LP_INLINE float to_compute(f16 x) {
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
    const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    return float_of(bits_of(float_of(magnitude) * 0x1p112f) | special | sign);
}
#endif

template <class S, class T>
LP_INLINE S round_to(T x);

template <>
LP_INLINE float round_to<float, float>(float x) {
    return x;
}
template <>
LP_INLINE double round_to<double, double>(double x) {
    return x;
}

// To nearest, ties to even.
template <>
LP_INLINE bf16 round_to<bf16, float>(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0u | (u >> 16) : rounded)};
}

template <>
LP_INLINE f16 round_to<f16, float>(float x) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 1/2 leaves a subnormal's bits, rounded to even by the addition itself, at the end of the mantissa.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t h = magnitude >= 0x477ff000u ? large : magnitude < 0x38800000u ? subnormal : normal;
    return {static_cast<uint16_t>(h | sign)};
#endif
}

// A bijection of 32-bit numbers that spreads every input bit over the output (constants by Chris Wellons,
// "Prospecting for hash functions", lowbias32). Counter in, random bits out: the same on every backend.
LP_INLINE uint32_t hash32(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// Up or down with the probability that makes the mean exact. `random` counts in its low 16 bits.
LP_INLINE bf16 round_stochastic(float x, uint32_t random) {
    const uint32_t u = bits_of(x);
    const bool finite = (u & 0x7f800000u) != 0x7f800000u;
    return {static_cast<uint16_t>(x != x ? 0x7fc0u | (u >> 16) : (finite ? u + (random & 0xffffu) : u) >> 16)};
}

}  // namespace layerpipe
