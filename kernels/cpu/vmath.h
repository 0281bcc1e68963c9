// Vectors of float32 as wide as the instruction set, with exp that vectorizes.
//
// GCC's and clang's vector extensions give arithmetic (+, -, *, /, comparisons, `mask ? a : b`) on every instruction
// set; only what they lack is written with intrinsics. Everything lies in the namespace of the instruction set, so
// that the linker cannot exchange copies compiled with different flags.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace lensc::LENSC_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));

inline vfloat load(const float* from) {
    vfloat x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float* to, vfloat x) { std::memcpy(to, &x, sizeof x); }

inline vfloat splat(float x) { return x - vfloat{}; }

inline vfloat max(vfloat a, vfloat b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__ARM_NEON)
    return vmaxq_f32(a, b);
#else
    return a > b ? a : b;
#endif
}

inline float reduce_add(vfloat x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#elif defined(__AVX2__)
    const __m128 fours = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
    const __m128 twos = fours + _mm_movehl_ps(fours, fours);
    return twos[0] + twos[1];
#endif
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
}

inline float reduce_max(vfloat x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(x);
#elif defined(__AVX2__)
    const __m128 fours = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 twos = _mm_max_ps(fours, _mm_movehl_ps(fours, fours));
    return _mm_max_ss(twos, _mm_movehdup_ps(twos))[0];
#endif
    float most = x[0];
    for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

#if defined(__AVX2__) && !defined(__AVX512F__)

// 8 x 8, turned.
inline void turn_8x8(__m256 (&x)[8]) {
    __m256 y[8];
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
            x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
        y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) x[i] = y[i];
}

#endif

inline vfloat as_float(vint x) { return reinterpret_cast<vfloat>(x); }
inline vint as_int(vfloat x) { return reinterpret_cast<vint>(x); }

// While it lives, float32 results and operands below 2**-126 are 0: on x86 each would take a hundred cycles.
class NoDenormals {
  public:
#if defined(__SSE2__)
    NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before_); }

  private:
    const unsigned before_;
#else
    NoDenormals() {}
    ~NoDenormals() {}
#endif

  public:
    NoDenormals(const NoDenormals&) = delete;
    NoDenormals& operator=(const NoDenormals&) = delete;
};

// p * 2**n for whole n; 0 where the result would be below 2**-126. 1/2 < p <= 2, n < 127.
inline vfloat scale_by_power(vfloat p, vfloat n) {
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, n);
#else
    // Adding 3 * 2**22 leaves n in the low bits of the mantissa.
    const vint exponent = as_int(n + 12582912.0f) << 23;
    const vfloat scaled = as_float(as_int(p) + exponent);
    return n < splat(-125.0f) ? splat(0.0f) : scaled;
#endif
}

// Nearest whole number, for |x| < 2**22.
inline vfloat nearest(vfloat x) {
#if defined(__AVX512F__)
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return (x + 12582912.0f) - 12582912.0f;
#endif
}

// 2**(x - floor(x)) by `polynomial`, times 2**floor(x); -inf gives 0.
template <class Polynomial>
inline vfloat exp2_by(vfloat x, Polynomial polynomial) {
#if defined(__AVX512DQ__)
    // reduce leaves 0 of -inf; scalef takes the floor of its second argument by itself.
    const vfloat fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(polynomial(fraction), x);
#else
    const vfloat bounded = max(x, splat(-200.0f));
    const vfloat floor = nearest(bounded - 0.5f);
    return scale_by_power(polynomial(bounded - floor), floor);
#endif
}

// 2**x, x < 127, -inf included: relative error below 2e-7 (minimax polynomial on [0, 1]: 8e-8).
inline vfloat exp2(vfloat x) {
    return exp2_by(x, [](vfloat r) {
        vfloat p = splat(0.0018671300495043397f);
        p = p * r + 0.009017030708491802f;
        p = p * r + 0.05579991266131401f;
        p = p * r + 0.24016444385051727f;
        p = p * r + 0.6931512951850891f;
        return p * r + 1.0f;
    });
}

// 2**r for r between 0 and 1, with a relative error below 1e-4.
inline vfloat coarse_power(vfloat r) {
    vfloat p = splat(0.07706703990697861f);
    p = p * r + 0.22764499485492706f;
    p = p * r + 0.6951167583465576f;
    return p * r + 1.0f;
}

// 2**x with a relative error below 1e-4, for what is rounded to bfloat16 (half a unit: 2e-3).
inline vfloat exp2_coarse(vfloat x) { return exp2_by(x, coarse_power); }

// e**x, x < 88, -inf included: relative error below 3e-7.
inline vfloat exp(vfloat x) {
    const vfloat bounded = max(x, splat(-140.0f));
    const vfloat n = nearest(bounded * 1.44269504f);
    // ln 2 in two parts: the product of n with the first is exact.
    const vfloat r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    vfloat p = splat(0.0014035567874088883f);
    p = p * r + 0.008372277952730656f;
    p = p * r + 0.04166555404663086f;
    p = p * r + 0.16666488349437714f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return scale_by_power(p, n);
}

}  // namespace lensc::LENSC_ISA
