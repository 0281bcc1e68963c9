// See int4_linear.h. Compiled once per instruction set, included by cpu/table.cpp.
#include <algorithm>
#include <cstring>

#include "int4_linear.h"
#include "integer_sums.h"
#include "narrow.h"
#include "panels.h"
#include "quantize.h"
#include "streams.h"
#include "weights.h"

namespace lensc::LENSC_ISA {

// --- few rows: weights stream past -----------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)

// Lanes that belong to each unit of a chunk, as indices into its scales.
inline __m512i unit_lanes(const GroupWeight& w) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    int shift = 0;
    while ((4 << shift) < w.unit_bytes()) shift++;
    return _mm512_srli_epi32(lane, shift);
}

template <int Bits>
inline __m512i plane_of(__m512i bytes, int p, __m512i mask, __m512i flip) {
    if (Bits == 8) return _mm512_xor_si512(bytes, flip);
    return _mm512_and_si512(p ? _mm512_srli_epi16(bytes, p * Bits) : bytes, mask);
}

// `Outputs` outputs, `apart` from each other, of `Rows` rows.
template <int Bits, int Outputs, int Rows, bool WholeChunk>
inline void stream_outputs(const Int4LinearArgs& a, int64_t output, int64_t apart, int64_t row) {
    constexpr int planes = 8 / Bits;
    const GroupWeight& w = a.weight;
    const int64_t row_bytes = w.row_bytes(), chunks = w.chunks(), groups = w.groups(), units = w.units();
    const int64_t padded = w.padded_inputs(), per_chunk = w.units_per_chunk();
    const int64_t units_per_group = w.units_per_group();
    const uint8_t* values = w.values + output * row_bytes;
    const float* scales = w.scales + output * groups;
    const __m512i mask = _mm512_set1_epi8(Bits == 2 ? 3 : 15), flip = _mm512_set1_epi8(w.is_signed ? -128 : 0);
    const __m512i lanes = unit_lanes(w);
    // All loops over outputs and rows are unrolled, or the compiler keeps the sums in memory.
    __m512 sums[Outputs][Rows];
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; o++)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) sums[o][r] = _mm512_setzero_ps();
    // Scales of the next outputs: rows as short as theirs begin before anything has seen that they are streams.
    for (int o = 0; o < Outputs; o++)
        for (int64_t g = 0; g < groups; g += 16) __builtin_prefetch(scales + (o * apart + 1) * groups + g);
    for (int64_t c = 0; c < chunks; c++) {
        const __mmask64 held = held_of(row_bytes - c * chunk_bytes);
        const int64_t first = c * per_chunk, group = c / units_per_group;
        const __mmask16 scale_mask = static_cast<__mmask16>((1u << std::min<int64_t>(per_chunk, units - first)) - 1);
        __m512i unpacked[Outputs][planes];
        __m512 scale[Outputs];
#pragma GCC unroll 8
        for (int o = 0; o < Outputs; o++) {
            const uint8_t* at = values + o * apart * row_bytes + c * chunk_bytes;
            __builtin_prefetch(at + fetched_ahead);
            const __m512i packed = _mm512_maskz_loadu_epi8(held, at);
#pragma GCC unroll 4
            for (int p = 0; p < planes; p++) unpacked[o][p] = plane_of<Bits>(packed, p, mask, flip);
            const float* of_output = scales + o * apart * groups;
            scale[o] = WholeChunk ? _mm512_set1_ps(of_output[group])
                                  : _mm512_permutexvar_ps(lanes, _mm512_maskz_loadu_ps(scale_mask, of_output + first));
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            const int8_t* x = a.x.values + (row + r) * padded + c * chunk_bytes * planes;
            const float* x_scales = a.x.scales + (row + r) * units + first;
            const __m512 x_scale =
                WholeChunk ? _mm512_set1_ps(*x_scales)
                           : _mm512_permutexvar_ps(lanes, _mm512_maskz_loadu_ps(scale_mask, x_scales));
#pragma GCC unroll 8
            for (int o = 0; o < Outputs; o++) {
                __m512i product = _mm512_setzero_si512();
#pragma GCC unroll 4
                for (int p = 0; p < planes; p++)
                    product = _mm512_dpbusd_epi32(product, unpacked[o][p], _mm512_loadu_si512(x + p * 64));
                sums[o][r] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(product), x_scale), scale[o], sums[o][r]);
            }
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; o++)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) put_streamed(a, output + o * apart, row + r, _mm512_reduce_add_ps(sums[o][r]));
}

#endif

#if defined(__AVX512VNNI__) || defined(LENSC_BYTES)

template <int Bits, bool WholeChunk>
void stream_bits(const Int4LinearArgs& a, Range outputs) {
    stream_past(a.x.rows, outputs, [&](auto at_once, auto rows, int64_t output, int64_t apart, int64_t row) {
        stream_outputs<Bits, decltype(at_once)::value, decltype(rows)::value, WholeChunk>(a, output, apart, row);
    });
}

inline void stream(const Int4LinearArgs& a, Range outputs) {
    const bool whole = a.weight.unit_bytes() == chunk_bytes;
    switch (a.weight.bits) {
        case 8: return whole ? stream_bits<8, true>(a, outputs) : stream_bits<8, false>(a, outputs);
        case 4: return whole ? stream_bits<4, true>(a, outputs) : stream_bits<4, false>(a, outputs);
        default: return whole ? stream_bits<2, true>(a, outputs) : stream_bits<2, false>(a, outputs);
    }
}

#else

// Products of the bytes of a unit: sum of values * x.
inline int32_t dot(const uint8_t* values, const int8_t* x, int64_t count) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += int32_t(values[i]) * x[i];
    return sum;
}

inline void stream(const Int4LinearArgs& a, Range outputs) {
    const GroupWeight& w = a.weight;
    const int64_t planes = w.planes(), units = w.units(), per_chunk = w.units_per_chunk(), unit_bytes = w.unit_bytes();
    const int64_t units_per_group = w.units_per_group(), row_bytes = w.row_bytes();
    uint8_t values[4 * chunk_bytes];
    for (int64_t o = outputs.begin; o < outputs.end; o++) {
        float sums[most_streamed_rows] = {};
        for (int64_t c = 0; c < w.chunks(); c++) {
            const int64_t left = std::min(chunk_bytes, row_bytes - c * chunk_bytes);
            unpack(w, w.values + o * row_bytes + c * chunk_bytes, left, values, chunk_bytes);
            for (int64_t r = 0; r < a.x.rows; r++) {
                const int8_t* x = a.x.values + r * w.padded_inputs() + c * chunk_bytes * planes;
                for (int64_t u = 0; u < per_chunk && c * per_chunk + u < units; u++) {
                    int32_t product = 0;
                    for (int64_t p = 0; p < planes; p++)
                        product += dot(values + p * chunk_bytes + u * unit_bytes, x + p * chunk_bytes + u * unit_bytes,
                                       unit_bytes);
                    const int64_t unit = c * per_chunk + u, group = unit / units_per_group;
                    sums[r] += static_cast<float>(product) * a.x.scales[r * units + unit] *
                               w.scales[o * w.groups() + group];
                }
            }
        }
        for (int64_t r = 0; r < a.x.rows; r++) put_streamed(a, o, r, sums[r]);
    }
}

#endif

// --- many rows: blocks of 32 outputs by 32 rows ------------------------------------------------------------------------

// What a unit of one or two panels adds: sums[output][row] += (c * x_scale - zero point * correction) * scale. Zero points
// are one for all (`zeros` null, and multiplied with the corrections already) or one for each output.
struct Fold {
    const float* scales;
    int64_t scale_stride;
    const float* zeros;
    const float *x_scales, *corrections;
    int panels;
};

template <int Panels>
inline void fold(const Fold& f, const int32_t* c, float* sums) {
    constexpr int lanes = 16 * Panels;
    float x_scale[lanes], correction[lanes];
    std::memcpy(x_scale, f.x_scales, sizeof x_scale);
    std::memcpy(correction, f.corrections, sizeof correction);
    for (int64_t o = 0; o < 32; o++, c += lanes, sums += lanes) {
        const float scale = f.scales[o * f.scale_stride];
        if (f.zeros) {
            const float zero = f.zeros[o];
#pragma omp simd
            for (int r = 0; r < lanes; r++)
                sums[r] += (static_cast<float>(c[r]) * x_scale[r] - zero * correction[r]) * scale;
        } else {
#pragma omp simd
            for (int r = 0; r < lanes; r++)
                sums[r] += (static_cast<float>(c[r]) * x_scale[r] - correction[r]) * scale;
        }
    }
}

// 32 outputs of a block of panels. Weights of the next chunk are unpacked and products of the last pair of panels scaled while
// tiles are busy: each of these stores what a later one loads, and would wait for it if it came at once.
inline void multiply_block(const Int4LinearArgs& a, int64_t output, int64_t block) {
    const GroupWeight& w = a.weight;
    const int64_t planes = w.planes(), units = w.units(), per_chunk = w.units_per_chunk(), unit_bytes = w.unit_bytes();
    const int64_t units_per_group = w.units_per_group(), groups = w.groups(), row_bytes = w.row_bytes();
    const int64_t first = a.x.first_panel(block), panels = a.x.first_panel(block + 1) - first;
    const int64_t outputs = std::min(block_outputs, w.outputs - output), tile = planes * chunk_bytes * panel_rows;
    const int8_t* x = a.x.values + first * panel_rows * w.padded_inputs();
    const float* x_scales = a.x.scales + first * panel_rows * units;
    const float* corrections = a.x.corrections + first * panel_rows * units;
    alignas(64) uint8_t values[2][4 * 32 * 64];
    alignas(64) int32_t products[2][32 * 32];
    alignas(64) float sums[block_outputs * most_panels * panel_rows];
    float zeros[2][32] = {}, few_scales[2][32] = {};
    const int64_t taken = taken_from_zero_points(w);
    if (outputs < 32) std::memset(values, 0, sizeof values);
    std::memset(sums, 0, static_cast<size_t>((panels + 1) / 2 * 32 * 32) * sizeof(float));

    const auto unpack_chunk = [&](int64_t chunk) {
        const int64_t left = std::min(chunk_bytes, row_bytes - chunk * chunk_bytes);
        const uint8_t* at = w.values + output * row_bytes + chunk * chunk_bytes;
        for (int64_t o = 0; o < outputs; o++, at += row_bytes) {
            __builtin_prefetch(at + block_outputs * row_bytes, 0, 2);  // to the second level: the first is full
            unpack(w, at, left, values[chunk % 2] + o * 64, 32 * 64);
        }
    };
    Fold pending = {};
    float* pending_sums = nullptr;
    int64_t count = 0;
    const auto fold_pending = [&] {
        if (!pending_sums) return;
        const int32_t* made = products[(count + 1) % 2];
        pending.panels == 2 ? fold<2>(pending, made, pending_sums) : fold<1>(pending, made, pending_sums);
    };
    unpack_chunk(0);
    for (int64_t chunk = 0; chunk < w.chunks(); chunk++) {
        for (int64_t u = 0; u < per_chunk && chunk * per_chunk + u < units; u++) {
            const int64_t unit = chunk * per_chunk + u, group = unit / units_per_group;
            Fold next = {w.scales + output * groups + group, groups, nullptr, nullptr, nullptr, 2};
            if (outputs < 32) {
                for (int64_t o = 0; o < outputs; o++) few_scales[unit % 2][o] = next.scales[o * groups];
                next.scales = few_scales[unit % 2], next.scale_stride = 1;
            }
            if (w.zero_points) {
                for (int64_t o = 0; o < outputs; o++)
                    zeros[unit % 2][o] = zero_point_of(w, output + o, group) - static_cast<float>(taken);
                next.zeros = zeros[unit % 2];
            } else if (taken) {
                next.zeros = zeros[0];
            }
            for (int64_t p = 0; p < panels; p += 2, count++) {
                const uint8_t* of_unit = values[chunk % 2] + u * unit_bytes;
                const int8_t* of_pair = x + (chunk * panels + p) * tile + u * unit_bytes * 16;
                next.panels = p + 1 < panels ? 2 : 1;
                next.x_scales = x_scales + (unit * panels + p) * panel_rows;
                next.corrections = corrections + (unit * panels + p) * panel_rows;
                const TileRange tiles{1, planes, unit_bytes, 0, 64, 32 * 64, w.bits == 8};
                const auto nothing = [](int64_t) {};
                next.panels == 2 ? multiply<2>(tiles, of_unit, of_pair, products[count % 2], nothing)
                                 : multiply<1>(tiles, of_unit, of_pair, products[count % 2], nothing);
                if (u == 0 && p == 0 && chunk + 1 < w.chunks()) unpack_chunk(chunk + 1);
                fold_pending();
                pending = next, pending_sums = sums + p / 2 * 32 * 32;
            }
        }
    }
    fold_pending();
    put_block<2>(a, output, first, panels, sums);
}

// A block of rows stays in the cache while all weights pass.
inline void multiply_panels(const Int4LinearArgs& a, Range outputs) {
    const GroupTiles tiles(a.weight.unit_bytes());
    for (int64_t block = 0; block < a.x.blocks(); block++)
        for (int64_t output = outputs.begin; output < outputs.end; output += block_outputs)
            multiply_block(a, output, block);
}

// --- the kernel --------------------------------------------------------------------------------------------------------

inline void int4_linear(const Int4LinearArgs& a, Share share) {
    const Range outputs = range_of(a.weight.outputs, block_outputs, share);
    if (a.weight.multiples) return linear_of_multiples(a, outputs);
    a.x.in_panels ? multiply_panels(a, outputs) : stream(a, outputs);
}

}  // namespace lensc::LENSC_ISA
