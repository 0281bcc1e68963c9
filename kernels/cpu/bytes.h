// Products of bytes on vectors of 32 (AVX2) or 16 bytes (NEON), summed four by four into the lanes of a vector of int32.
//
// Weights are at most 4 bits and unsigned, or whole bytes; inputs are int8 within +-127. What an instruction set multiplies
// decides how whole bytes are stored: `bytes_are_signed`.
#pragma once

#include "vmath.h"

// Speed on ARM is unmeasured: the code was run under emulation only.
#if (defined(__AVX2__) && !defined(__AVX512F__)) || defined(__ARM_FEATURE_DOTPROD)
#define LENSC_BYTES
#if defined(__AVX2__) && !defined(__AVXVNNI__)
#define LENSC_PAIRS  // products are summed in pairs, as int16, before they are int32
#endif

namespace lensc::LENSC_ISA {

constexpr int vector_bytes = 4 * kLanes;

// Whole bytes of weights are two's complement, 128 less where they are unsigned by nature; else they are unsigned, 128 more
// where they are signed by nature.
#if defined(__AVXVNNI__)
constexpr bool bytes_are_signed = false;
#else
constexpr bool bytes_are_signed = true;
#endif

#if defined(__AVX2__)

typedef __m256i vbytes;

inline vbytes load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Four bytes, again and again.
inline vbytes repeat_quad(const void* from) {
    int32_t quad;
    std::memcpy(&quad, from, sizeof quad);
    return _mm256_set1_epi32(quad);
}

// Plane p of packed values of `Bits` bits; `flip` is xored to whole bytes.
template <int Bits>
inline vbytes plane_of_bytes(vbytes packed, int p, uint8_t flip) {
    if (Bits == 8) return _mm256_xor_si256(packed, _mm256_set1_epi8(static_cast<char>(flip)));
    return _mm256_and_si256(p ? _mm256_srli_epi16(packed, p * Bits) : packed, _mm256_set1_epi8((1 << Bits) - 1));
}

// Sums of products of weights of `Bits` bits and inputs: at most `most` are added to a Sum before it is taken as int32.
template <int Bits>
struct Products {
    typedef __m256i Sum;
#if defined(__AVXVNNI__)
    static constexpr int most = 1 << 16;
    static Sum add(Sum sum, vbytes weights, vbytes x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
    static vint whole(Sum sum) { return reinterpret_cast<vint>(sum); }
#else
    // vpmaddubsw sums two products in an int16 and saturates: 2 * 15 * 127 fits in 8 times
    static constexpr int most = 8;
    static Sum add(Sum sum, vbytes weights, vbytes x) {
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, x));
        asm("" : "+x"(sum));  // in this order: in another, terms of many sums wait for each other outside the registers
        return sum;
    }
    static vint whole(Sum sum) { return reinterpret_cast<vint>(_mm256_madd_epi16(sum, _mm256_set1_epi16(1))); }
#endif
    static Sum zero() { return _mm256_setzero_si256(); }
};

#if !defined(__AVXVNNI__)
template <>
struct Products<8> {
    typedef __m256i Sum;
    static constexpr int most = 1 << 16;
    // The sign of the weight goes to x, which has room for it: 2 * 128 * 127 just fits in an int16.
    static Sum add(Sum sum, vbytes weights, vbytes x) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        asm("" : "+x"(sum));
        return sum;
    }
    static vint whole(Sum sum) { return reinterpret_cast<vint>(sum); }
    static Sum zero() { return _mm256_setzero_si256(); }
};
#endif

inline vfloat to_floats(vint integers) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(integers)); }

// The scale of each lane: lanes [0, 2^shift) have the first one, and so on; there are `left`, and lanes beyond have 0.
inline vfloat lane_scales(const float* scales, int64_t left, int shift) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i held = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left < 8 ? left : 8)), lane);
    return _mm256_permutevar8x32_ps(_mm256_maskload_ps(scales, held), _mm256_srli_epi32(lane, shift));
}

#else

typedef int8x16_t vbytes;

inline vbytes load_bytes(const void* from) { return vld1q_s8(static_cast<const int8_t*>(from)); }

inline vbytes repeat_quad(const void* from) {
    int32_t quad;
    std::memcpy(&quad, from, sizeof quad);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

template <int Bits>
inline vbytes plane_of_bytes(vbytes packed, int p, uint8_t flip) {
    const uint8x16_t bytes = vreinterpretq_u8_s8(packed);
    if (Bits == 8) return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(flip)));
    const uint8x16_t shifted = p ? vshlq_u8(bytes, vdupq_n_s8(static_cast<int8_t>(-p * Bits))) : bytes;
    return vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8((1 << Bits) - 1)));
}

template <int Bits>
struct Products {
    typedef int32x4_t Sum;
    static constexpr int most = 1 << 16;
    static Sum add(Sum sum, vbytes weights, vbytes x) { return vdotq_s32(sum, weights, x); }
    static vint whole(Sum sum) { return reinterpret_cast<vint>(sum); }
    static Sum zero() { return vdupq_n_s32(0); }
};

inline vfloat to_floats(vint integers) { return vcvtq_f32_s32(reinterpret_cast<int32x4_t>(integers)); }

inline vfloat lane_scales(const float* scales, int64_t left, int shift) {
    vfloat found = {};
    for (int i = 0; i < kLanes; i++)
        if ((i >> shift) < left) found[i] = scales[i >> shift];
    return found;
}

#endif

}  // namespace lensc::LENSC_ISA

#endif
