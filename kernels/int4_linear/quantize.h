// Inputs to int8, as int4_linear reads them. Included by cpu.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "int4_linear.h"

namespace lensc::LENSC_ISA {

// A chunk's values, plane by plane.
inline void split_planes(const int8_t* chunk, int64_t planes, int8_t* values) {
    for (int64_t p = 0; p < planes; p++)
        for (int64_t i = 0; i < chunk_bytes; i++) values[p * chunk_bytes + i] = chunk[i * planes + p];
}

// Where a row's scales go, and with them its corrections or its sums, one of which is null; neighbours lie `stride` apart.
struct UnitsOfRow {
    float *scales, *corrections;
    int32_t* sums;
    int64_t stride;

    void set(int64_t unit, float scale, int32_t sum, float factor) const {
        scales[unit * stride] = scale;
        if (sums) sums[unit * stride] = sum;
        if (corrections) corrections[unit * stride] = scale * static_cast<float>(sum) * factor;
    }
};

// One row to int8, plane by plane. A unit is a part of a chunk, or some chunks.
inline void quantize_row(const float* x, const QuantizeArgs& a, int8_t* values, const UnitsOfRow& units) {
    const int64_t chunk = chunk_bytes * a.planes;
    const int64_t inputs = a.unit < a.inputs ? a.unit : a.padded_inputs, piece = std::min(inputs, chunk);  // of a unit
    int8_t rounded[chunk_bytes * 4];
    for (int64_t first = 0, unit = 0; first < a.padded_inputs; first += inputs, unit++) {
        const int64_t last = std::min(first + inputs, a.inputs);
        float largest = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t i = first; i < last; i++) largest = std::max(largest, std::fabs(x[i]));
        const float inverse = largest > 0 ? 127 / largest : 0;
        uint32_t sum = 0;  // of two's complement: what is no number becomes -2^31, again and again
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
            if ((begin + piece) % chunk == 0) split_planes(rounded, a.planes, values + begin / chunk * chunk);
        }
        if (first < a.inputs) units.set(unit, largest / 127, static_cast<int32_t>(sum), a.factor);
    }
}

// 64 values of 16 rows, `stride` apart, to [16, 16, 4]: four values of each row in turn.
inline void interleave(const int8_t* rows, int64_t stride, int8_t* tile) {
    for (int64_t r = 0; r < panel_rows; r++) {
        int32_t quads[16];
        std::memcpy(quads, rows + r * stride, sizeof quads);
        for (int64_t i = 0; i < 16; i++) std::memcpy(tile + i * 64 + r * 4, &quads[i], 4);
    }
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
            for (int64_t u = 0; u < units; u++) of_row(r).set(u, 0, 0, 0);
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
    const int64_t units = (a.inputs + a.unit - 1) / a.unit;
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
                         {a.out.scales + r * units, a.out.corrections ? a.out.corrections + r * units : nullptr,
                          a.out.sums ? a.out.sums + r * units : nullptr, 1});
    }
}

}  // namespace lensc::LENSC_ISA
