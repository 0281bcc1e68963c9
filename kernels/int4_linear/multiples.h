// Weights whose scales are whole multiples of one step per output: (value - zero point) * multiple fits in a byte, so that a
// chunk is looked up in the table of its multiple and all inputs of an output are summed as integers. Included by cpu.cpp.
#pragma once
#include <array>
#include <cstring>

#include "../cpu/bytes.h"
#include "int4_linear.h"
#include "weights.h"

namespace lensc::LENSC_ISA {

// A finished sum to y: times the step, and with bias and residual.
inline void put_sum(const Int4LinearArgs& a, int64_t output, int64_t row, float sum) {
    const int64_t at = row * a.weight.outputs + output;
    float y = sum * a.weight.scales[output];
    if (a.bias) y += a.bias[output];
    if (a.residual) y += a.residual[at];
    a.y[at] = y;
}

// Of an output that is unpacked: a line more, as rows of whole pages would share the few lines of a cache that have one place.
constexpr int64_t unpacked_bytes = span_inputs + chunk_bytes;

// Whole bytes of weights are unsigned, 128 more, where the products want them so.
#if defined(LENSC_BYTES)
constexpr int byte_offset = bytes_are_signed ? 0 : 128;
#else
constexpr int byte_offset = 128;
#endif

// What products have too much by a unit's sum, of two's complement: where an input is no number the sum is any.
inline int32_t offset_of(int32_t sum) {
    return static_cast<int32_t>(static_cast<uint32_t>(byte_offset) * static_cast<uint32_t>(sum));
}

// By the low five bits of a multiple, -15 to 15 (whatever a file holds, there is a table): what each value of 2 or 4 bits
// stands for. A table of 2 bits is repeated.
struct MultipleTables {
    alignas(64) std::array<std::array<uint8_t, 16>, 32> tables;

    constexpr explicit MultipleTables(int bits) : tables() {
        for (int m = -most_multiple; m <= most_multiple; m++)
            for (int i = 0; i < 16; i++)
                tables[static_cast<size_t>(m & 31)][static_cast<size_t>(i)] =
                    static_cast<uint8_t>((i % (1 << bits) - (1 << (bits - 1))) * m + byte_offset);
    }
};

template <int Bits>
inline const uint8_t* table_of(int8_t multiple) {
    static constexpr MultipleTables all(Bits);
    return all.tables[static_cast<size_t>(multiple & 31)].data();
}

// Which multiple belongs to which bytes of a row: a group is 16 or 32 bytes, or 2^n chunks.
struct GroupsOfChunks {
    const int8_t* multiples;
    int64_t groups;
    int chunk_shift, lane_shift;  // group = chunk >> chunk_shift, or (chunk * 4 + lane) >> lane_shift

    explicit GroupsOfChunks(const GroupWeight& w) : multiples(w.multiples), groups(w.groups()), chunk_shift(0), lane_shift(0) {
        const int64_t bytes = w.group * w.bits / 8;
        while (groups > 1 && (chunk_bytes << chunk_shift) < bytes) chunk_shift++;
        if (groups == 1) chunk_shift = 62;
        while ((16 << lane_shift) < bytes) lane_shift++;
    }

    const int8_t* of_output(int64_t output) const { return multiples + output * groups; }
    int8_t of_chunk(const int8_t* of_output, int64_t chunk) const { return of_output[chunk >> chunk_shift]; }
    // Lanes behind the end of a row have the last group's, for want of another.
    int8_t of_lane(const int8_t* of_output, int64_t chunk, int lane) const {
        return of_output[std::min(groups - 1, (chunk * 4 + lane) >> lane_shift)];
    }
};

// Whether a group is less than a chunk.
inline bool has_lanes(const GroupWeight& w) { return w.groups() > 1 && w.group * w.bits / 8 < chunk_bytes; }

#if defined(__AVX512BW__)

// The tables of a chunk's four lanes.
template <int Bits, bool Lanes>
inline __m512i tables_of(const GroupsOfChunks& g, const int8_t* output, int64_t chunk) {
    const auto load = [](int8_t multiple) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(table_of<Bits>(multiple)));
    };
    if (!Lanes) return _mm512_broadcast_i32x4(load(g.of_chunk(output, chunk)));
    __m512i tables = _mm512_castsi128_si512(load(g.of_lane(output, chunk, 0)));
    tables = _mm512_inserti32x4(tables, load(g.of_lane(output, chunk, 1)), 1);
    tables = _mm512_inserti32x4(tables, load(g.of_lane(output, chunk, 2)), 2);
    return _mm512_inserti32x4(tables, load(g.of_lane(output, chunk, 3)), 3);
}

// Plane p of a chunk.
template <int Bits>
inline __m512i multiplied(__m512i tables, __m512i packed, int p) {
    const __m512i index = p ? _mm512_srli_epi16(packed, p * Bits) : packed;
    return _mm512_shuffle_epi8(tables, _mm512_and_si512(index, _mm512_set1_epi8((1 << Bits) - 1)));
}

// `count` chunks of an output from `first` on, of which `left` bytes are there: to `values`, plane after plane.
template <int Bits, bool Lanes>
inline void unpack_multiplied(const GroupsOfChunks& g, int64_t output, int64_t first, int64_t count, const uint8_t* from,
                              int64_t left, uint8_t* values) {
    const int8_t* of_output = g.of_output(output);
    const auto put = [&](int64_t c, __m512i packed) {
        const __m512i tables = tables_of<Bits, Lanes>(g, of_output, first + c);
        for (int p = 0; p < 8 / Bits; p++)
            _mm512_storeu_si512(values + (c * (8 / Bits) + p) * chunk_bytes, multiplied<Bits>(tables, packed, p));
    };
    const int64_t whole = std::min(count, left / chunk_bytes);
    for (int64_t c = 0; c < whole; c++) put(c, _mm512_loadu_si512(from + c * chunk_bytes));
    if (whole < count) put(whole, _mm512_maskz_loadu_epi8(held_of(left - whole * chunk_bytes), from + whole * chunk_bytes));
}

#else

// `count` chunks of an output from `first` on, of which `left` bytes are there: to `values`, plane after plane.
template <int Bits, bool Lanes>
inline void unpack_multiplied(const GroupsOfChunks& g, int64_t output, int64_t first, int64_t count, const uint8_t* from,
                              int64_t left, uint8_t* values) {
    constexpr int planes = 8 / Bits;
    uint8_t last[chunk_bytes];
    const int8_t* of_output = g.of_output(output);
    for (int64_t c = 0; c < count; c++, from += chunk_bytes, left -= chunk_bytes, values += planes * chunk_bytes) {
        if (left < chunk_bytes) {
            std::memset(last, 0, sizeof last);
            std::memcpy(last, from, static_cast<size_t>(left));
            from = last;
        }
        for (int lane = 0; lane < 4; lane++) {
            const uint8_t* table = table_of<Bits>(Lanes ? g.of_lane(of_output, first + c, lane) : g.of_chunk(of_output, first + c));
#if defined(__AVX2__)
            const __m128i entries = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
            const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + lane * 16));
            for (int p = 0; p < planes; p++) {
                const __m128i index = _mm_and_si128(_mm_srli_epi16(packed, p * Bits), _mm_set1_epi8((1 << Bits) - 1));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(values + p * chunk_bytes + lane * 16),
                                 _mm_shuffle_epi8(entries, index));
            }
#elif defined(__ARM_FEATURE_DOTPROD)
            const uint8x16_t entries = vld1q_u8(table), packed = vld1q_u8(from + lane * 16);
            for (int p = 0; p < planes; p++) {
                const uint8x16_t shifted = p ? vshlq_u8(packed, vdupq_n_s8(static_cast<int8_t>(-p * Bits))) : packed;
                const uint8x16_t index = vandq_u8(shifted, vdupq_n_u8((1 << Bits) - 1));
                vst1q_u8(values + p * chunk_bytes + lane * 16, vqtbl1q_u8(entries, index));
            }
#else
            for (int p = 0; p < planes; p++)
                for (int i = lane * 16; i < lane * 16 + 16; i++)
                    values[p * chunk_bytes + i] = table[(from[i] >> (p * Bits)) & ((1 << Bits) - 1)];
#endif
        }
    }
}

#endif

}  // namespace lensc::LENSC_ISA
