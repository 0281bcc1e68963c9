// float16 (as its bits) and int8 to and from float32: one value, one vector, or the first few of a vector.
#pragma once

#include "vmath.h"

namespace lensc::LENSC_ISA {

inline float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t rest = uint32_t(half & 0x7fff) << 13;
    if (rest >= 0x7c00u << 13) return bits_float(sign | 0x7f800000u | (rest & 0x7fffffu));
    // The exponent's bias goes from 15 to 127 by a product, which makes denormals right as well.
    return bits_float(sign | float_bits(bits_float(rest) * 0x1p112f));
}

// Rounds to nearest, ties to even; beyond 65504 (rounded) infinity.
inline uint16_t float_to_half(float x) {
    const uint32_t sign = float_bits(x) >> 16 & 0x8000;
    const float magnitude = bits_float(float_bits(x) & 0x7fffffffu);
    if (magnitude != magnitude) return uint16_t(sign | 0x7e00);
    if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00);
    // Adding a power of two 2**13 above the result's last place rounds there.
    if (magnitude < 0x1p-14f) return uint16_t(sign | (float_bits(magnitude + 0.5f) - 0x3f000000u));
    const uint32_t bits = float_bits(magnitude);
    return uint16_t(sign | ((bits - (112u << 23) + 0xfffu + (bits >> 13 & 1)) >> 13));
}

inline vfloat load(const uint16_t* half) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half)));
#else
    vfloat x;
    for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(half[i]);
    return x;
#endif
}

inline void store(uint16_t* to, vfloat x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(x)));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = float_to_half(x[i]);
#endif
}

inline vfloat load(const int8_t* integers) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(integers))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(integers))));
#else
    vfloat x;
    for (int i = 0; i < kLanes; ++i) x[i] = integers[i];
    return x;
#endif
}

// The first `count` values, zeros behind; reads no others. Type: float, uint16_t (float16) or int8_t.
template <class Type>
inline vfloat load_first(const Type* from, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 mask = __mmask16((1u << count) - 1);
    if constexpr (sizeof(Type) == 4) return _mm512_maskz_loadu_ps(mask, from);
    if constexpr (sizeof(Type) == 2) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
    if constexpr (sizeof(Type) == 1)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, from)));
#else
    Type buffer[kLanes] = {};
    std::memcpy(buffer, from, sizeof(Type) * size_t(count));
    return load(static_cast<const Type*>(buffer));
#endif
}

}  // namespace lensc::LENSC_ISA
