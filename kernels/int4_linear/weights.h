// What few and many rows share: zero points, unpacked values, ends of sums. Included by cpu.cpp.
#pragma once
#include <algorithm>
#include <cstring>

#include "../cpu/bytes.h"
#include "int4_linear.h"

namespace lensc::LENSC_ISA {

constexpr int64_t block_outputs = 32;

// Which tiles are multiplied: `bytes` of the 64 of each, of `planes` of each of `chunks`.
struct TileRange {
    int64_t chunks, planes, bytes;
    int64_t x_apart;                  // bytes from chunk to chunk of x
    int64_t row_bytes, tile_bytes;  // of the values: from output to output, and from tile to tile
    bool whole_bytes;                 // values of 8 bits, else at most of 4
};

inline float zero_point_of(const GroupWeight& w, int64_t output, int64_t group) {
    const int64_t bit = (output * w.groups() + group) * w.bits;
    return static_cast<float>((w.zero_points[bit / 8] >> (bit % 8)) & ((1 << w.bits) - 1));
}

// Whole bytes that are stored as signed are 128 less already.
inline int64_t taken_from_zero_points(const GroupWeight& w) {
#if defined(LENSC_BYTES)
    return w.bits == 8 && bytes_are_signed ? 128 : 0;
#else
    static_cast<void>(w);
    return 0;
#endif
}

inline float dot(const float* a, const float* b, int64_t count) {
    vfloat sums = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) sums += load(a + i) * load(b + i);
    float sum = reduce_add(sums);
    for (; i < count; i++) sum += a[i] * b[i];
    return sum;
}

// What zero points take from an output: sum over units of scale * correction, times zero points if there are several.
inline float correction_of(const GroupWeight& w, int64_t output, const float* corrections) {
    const int64_t units = w.units(), groups = w.groups(), per_group = w.units_per_group();
    const float* scales = w.scales + output * groups;
    const auto taken = static_cast<float>(taken_from_zero_points(w));
    float sum = 0;
    if (!w.zero_points && taken != 0) return 0;  // one for all of whole bytes is 128
    if (!w.zero_points && units == groups) return dot(scales, corrections, units);
    for (int64_t g = 0; g < groups; g++) {
        float of_group = 0;
        for (int64_t u = g * per_group; u < std::min((g + 1) * per_group, units); u++) of_group += corrections[u];
        sum += scales[g] * of_group * (w.zero_points ? zero_point_of(w, output, g) - taken : 1);
    }
    return sum;
}

// A finished sum of products to y, with what zero points take from it, bias and residual.
inline void put_streamed(const Int4LinearArgs& a, int64_t output, int64_t row, float sum) {
    const int64_t at = row * a.weight.outputs + output;
    float y = sum - correction_of(a.weight, output, a.x.corrections + row * a.weight.units());
    if (a.bias) y += a.bias[output];
    if (a.residual) y += a.residual[at];
    a.y[at] = y;
}

#if defined(__AVX512BW__)
// Which bytes of a chunk are there, of `left` in the row.
inline __mmask64 held_of(int64_t left) { return left >= chunk_bytes ? ~__mmask64(0) : (__mmask64(1) << left) - 1; }
#endif

#if defined(LENSC_BYTES)

template <int Bits>
inline void unpack_bytes(const uint8_t* bytes, uint8_t flip, uint8_t* values, int64_t stride) {
    for (int part = 0; part < chunk_bytes; part += vector_bytes) {
        const vbytes packed = load_bytes(bytes + part);
        for (int p = 0; p < 8 / Bits; p++) {
            const vbytes plane = plane_of_bytes<Bits>(packed, p, flip);
            std::memcpy(values + p * stride + part, &plane, sizeof plane);
        }
    }
}

#endif

// The `count` bytes of a chunk as values of a byte each: planes of 64, `stride` apart; what is missing is 0.
inline void unpack(const GroupWeight& w, const uint8_t* bytes, int64_t count, uint8_t* values, int64_t stride) {
#if defined(__AVX512BW__)
    const __m512i packed = _mm512_maskz_loadu_epi8(held_of(count), bytes);
    if (w.bits == 8) {
        _mm512_storeu_si512(values, _mm512_xor_si512(packed, _mm512_set1_epi8(w.is_signed ? -128 : 0)));
    } else if (w.bits == 4) {
        const __m512i mask = _mm512_set1_epi8(15);
        _mm512_storeu_si512(values, _mm512_and_si512(packed, mask));
        _mm512_storeu_si512(values + stride, _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask));
    } else {
        const __m512i mask = _mm512_set1_epi8(3);
        for (int p = 0; p < 4; p++)
            _mm512_storeu_si512(values + p * stride, _mm512_and_si512(_mm512_srli_epi16(packed, 2 * p), mask));
    }
#else
    uint8_t whole[chunk_bytes];
    if (count < chunk_bytes) {
        std::memset(whole, 0, sizeof whole);
        std::memcpy(whole, bytes, static_cast<size_t>(count));
        bytes = whole;
    }
#if defined(LENSC_BYTES)
    switch (w.bits) {
        case 8: return unpack_bytes<8>(bytes, w.is_signed != bytes_are_signed ? 0x80 : 0, values, stride);
        case 4: return unpack_bytes<4>(bytes, 0, values, stride);
        default: return unpack_bytes<2>(bytes, 0, values, stride);
    }
#else
    const uint8_t flip = w.is_signed ? 0x80 : 0;
    const auto mask = static_cast<uint8_t>((1 << w.bits) - 1);
    for (int64_t p = 0; p < w.planes(); p++)
        for (int64_t i = 0; i < chunk_bytes; i++)
            values[p * stride + i] = ((bytes[i] >> (p * w.bits)) & mask) ^ flip;
#endif
#endif
}

}  // namespace lensc::LENSC_ISA
