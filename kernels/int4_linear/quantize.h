// Inputs to int8, as int4_linear reads them. Included by cpu.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "int4_linear.h"

namespace lensc::LENSC_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)

// Every second of 64 bytes, from the first and from the second on.
inline void split_in_two(const void* bytes, void* even, void* odd) {
    const __m256i low = _mm256_set1_epi16(255);
    const auto* from = static_cast<const __m256i*>(bytes);
    const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
    const __m256i evens = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
    const __m256i odds = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    _mm256_storeu_si256(static_cast<__m256i*>(even), _mm256_permute4x64_epi64(evens, 0xd8));
    _mm256_storeu_si256(static_cast<__m256i*>(odd), _mm256_permute4x64_epi64(odds, 0xd8));
}

// `bytes` bytes, a multiple of 64, as split_in_two().
inline void split_in_two(const int8_t* from, int64_t bytes, int8_t* even, int8_t* odd) {
    for (int64_t i = 0; i < bytes; i += 64) split_in_two(from + i, even + i / 2, odd + i / 2);
}

#endif

// A chunk's values, plane by plane.
inline void split_planes(const int8_t* chunk, int64_t planes, int8_t* values) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (planes == 2) return split_in_two(chunk, 2 * chunk_bytes, values, values + chunk_bytes);
    if (planes == 4) {
        int8_t halves[2][2 * chunk_bytes];
        split_in_two(chunk, 4 * chunk_bytes, halves[0], halves[1]);
        split_in_two(halves[0], 2 * chunk_bytes, values, values + 2 * chunk_bytes);
        return split_in_two(halves[1], 2 * chunk_bytes, values + chunk_bytes, values + 3 * chunk_bytes);
    }
#endif
    for (int64_t p = 0; p < planes; p++)
        for (int64_t i = 0; i < chunk_bytes; i++) values[p * chunk_bytes + i] = chunk[i * planes + p];
}

// Where a row's scales go, and with them its corrections or its sums, one of which is null; neighbours lie `stride` apart.
struct UnitsOfRow {
    float *scales, *corrections;
    int32_t* sums;
    int64_t stride;

    void set(int64_t unit, float scale, int32_t sum) const {
        scales[unit * stride] = scale;
        if (sums) sums[unit * stride] = sum;
    }
    // Several units may share a correction.
    void correct(int64_t group, float correction, bool is_first) const {
        if (!corrections) return;
        float& of_group = corrections[group * stride];
        of_group = is_first ? correction : of_group + correction;
    }
};

// One row to int8, plane by plane. A unit is a part of a chunk, or some chunks.
inline void quantize_row(const float* x, const QuantizeArgs& a, int8_t* values, const UnitsOfRow& units) {
    const int64_t chunk = chunk_bytes * a.planes;
    const int64_t inputs = a.unit < a.inputs ? a.unit : a.padded_inputs;
    const int64_t group = a.group < a.inputs ? a.group : a.padded_inputs;
    const int64_t piece = std::min(std::min(inputs, group), chunk);  // of a unit and a group
    int8_t rounded[chunk_bytes * 4];
    for (int64_t first = 0, unit = 0; first < a.padded_inputs; first += inputs, unit++) {
        const int64_t last = std::min(first + inputs, a.inputs);
        float largest = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t i = first; i < last; i++) largest = std::max(largest, std::fabs(x[i]));
        const float inverse = largest > 0 ? 127 / largest : 0;
        // of two's complement: what is no number becomes -2^31, again and again
        uint32_t sum = 0, corrected = 0;  // and how much of it has been in a correction
        for (int64_t begin = first; begin < std::min(first + inputs, a.padded_inputs); begin += piece) {
            if (begin % chunk == 0) std::memset(rounded, 0, sizeof rounded);
            int8_t* to = rounded + begin % chunk;
            // a row of denormals has an inverse that is infinite; what it adds is nothing
            if (std::isfinite(inverse)) {
#pragma omp simd reduction(+ : sum)
                for (int64_t i = begin; i < std::min(begin + piece, last); i++) {
                    const int32_t q = static_cast<int32_t>(std::nearbyint(x[i] * inverse));
                    to[i - begin] = static_cast<int8_t>(q);
                    sum += static_cast<uint32_t>(q);
                }
            }
            const int64_t end = begin + piece;
            if (end % chunk == 0) split_planes(rounded, a.planes, values + begin / chunk * chunk);
            if ((end % group == 0 || end == first + inputs || end == a.padded_inputs) && begin / group * group < a.inputs) {
                const auto of_group = static_cast<float>(static_cast<int32_t>(sum - corrected));
                units.correct(begin / group, largest / 127 * of_group * a.factor, first <= begin / group * group);
                corrected = sum;
            }
        }
        if (first < a.inputs) units.set(unit, largest / 127, static_cast<int32_t>(sum));
    }
}

// 64 values of 16 rows, `stride` apart, to [16, 16, 4]: four values of each row in turn.
inline void interleave(const int8_t* rows, int64_t stride, int8_t* tile) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    for (int64_t r = 0; r < panel_rows; r += 8)
        for (int64_t i = 0; i < 64; i += 32) {
            __m256 part[8];
            for (int64_t j = 0; j < 8; j++) std::memcpy(&part[j], rows + (r + j) * stride + i, sizeof part[j]);
            turn_8x8(part);
            for (int64_t j = 0; j < 8; j++) std::memcpy(tile + (i / 4 + j) * 64 + r * 4, &part[j], sizeof part[j]);
        }
#else
    for (int64_t r = 0; r < panel_rows; r++) {
        int32_t quads[16];
        std::memcpy(quads, rows + r * stride, sizeof quads);
        for (int64_t i = 0; i < 16; i++) std::memcpy(tile + i * 64 + r * 4, &quads[i], 4);
    }
#endif
}

// Quantize the rows of a panel, which `row(r)` gives as float32.
template <class Row>
void quantize_panel(const QuantizeArgs& a, int64_t block, int64_t panel, Row row, int8_t* scratch) {
    const int64_t units = (a.inputs + a.unit - 1) / a.unit, chunk = chunk_bytes * a.planes;
    const int64_t first = a.out.first_panel(block), panels = a.out.first_panel(block + 1) - first;
    const int64_t stride = panels * panel_rows, lane = (panel - first) * panel_rows;
    const int64_t of_block = first * panel_rows * units + lane;
    const auto of_row = [&](int64_t r) {
        return UnitsOfRow{a.out.scales + of_block + r, a.out.corrections ? a.out.corrections + of_block + r : nullptr,
                          a.out.sums ? a.out.sums + of_block + r : nullptr, stride};
    };
    for (int64_t r = 0; r < panel_rows; r++) {
        int8_t* values = scratch + r * a.padded_inputs;
        if (panel * panel_rows + r < a.out.rows) {
            quantize_row(row(panel * panel_rows + r), a, values, of_row(r));
        } else {
            std::memset(values, 0, static_cast<size_t>(a.padded_inputs));
            for (int64_t u = 0; u < units; u++) {
                of_row(r).set(u, 0, 0);
                of_row(r).correct(u, 0, true);
            }
        }
    }
    int8_t* tiles = a.out.values + first * panel_rows * a.padded_inputs + (panel - first) * panel_rows * chunk;
    for (int64_t c = 0; c * chunk < a.padded_inputs; c++)
        for (int64_t p = 0; p < a.planes; p++)
            interleave(scratch + c * chunk + p * chunk_bytes, a.padded_inputs,
                       tiles + c * panels * panel_rows * chunk + p * panel_rows * chunk_bytes);
}

inline size_t quantize_scratch_bytes(const QuantizeArgs& a) {
    return a.out.in_panels ? static_cast<size_t>(panel_rows * a.padded_inputs) : 0;
}

// Quantize rows that `row(r)` gives as float32[inputs].
template <class Row>
void quantize_with(const QuantizeArgs& a, Row row, int8_t* scratch, Share share) {
    const int64_t units = (a.inputs + a.unit - 1) / a.unit, groups = (a.inputs + a.group - 1) / a.group;
    if (a.out.in_panels) {
        const Range panels = range_of(a.out.panels(), 1, share);
        for (int64_t p = panels.begin, block = 0; p < panels.end; p++) {
            while (a.out.first_panel(block + 1) <= p) block++;
            quantize_panel(a, block, p, row, scratch);
        }
    } else {
        const Range rows = range_of(a.out.rows, 1, share);
        for (int64_t r = rows.begin; r < rows.end; r++)
            quantize_row(row(r), a, a.out.values + r * a.padded_inputs,
                         {a.out.scales + r * units, a.out.corrections ? a.out.corrections + r * groups : nullptr,
                          a.out.sums ? a.out.sums + r * units : nullptr, 1});
    }
}

}  // namespace lensc::LENSC_ISA
