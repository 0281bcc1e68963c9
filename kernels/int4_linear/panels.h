// Products of 32 outputs and one or two panels, and their sums turned to rows. Included by cpu.cpp.
#pragma once
#include <algorithm>
#include <cstring>

#include "../cpu/tiles.h"
#include "int4_linear.h"
#include "narrow.h"
#include "weights.h"

namespace lensc::LENSC_ISA {

// Products of 32 outputs and one or two panels: c[32][Panels * 16], lanes are rows of x. `values` lie as the
// range says, x is [chunks][panels][planes][16][16][4]. beside(i) is called for tile i, to be done meanwhile.
#if defined(__AMX_INT8__)

struct GroupTiles {
    explicit GroupTiles(int64_t unit_bytes) {
        const int64_t bytes = (unit_bytes + 3) / 4 * 4;  // tiles multiply four at once: zeros follow a shorter row
        TileShapes shapes;
        for (int i = 0; i < 4; i++) shapes.set(i, 16, 64);         // products
        for (int i = 4; i < 6; i++) shapes.set(i, 16, bytes);      // weights
        for (int i = 6; i < 8; i++) shapes.set(i, bytes / 4, 64);  // x
        shapes.load();
    }
    ~GroupTiles() { TileShapes::release(); }
};

template <int Panels, class Beside>
inline void multiply(const TileRange& t, const uint8_t* values, const int8_t* x, int32_t* c, Beside beside) {
    LENSC_TILE_ZERO(0);
    LENSC_TILE_ZERO(2);
    if (Panels == 2) {
        LENSC_TILE_ZERO(1);
        LENSC_TILE_ZERO(3);
    }
    int64_t i = 0;
    for (int64_t chunk = 0; chunk < t.chunks; chunk++, x += t.x_apart)
        for (int64_t p = 0; p < t.planes; p++, i++, values += t.tile_bytes) {
            LENSC_TILE_LOAD(4, values, t.row_bytes);
            LENSC_TILE_LOAD(6, x + p * 1024, 64);
            LENSC_TILE_U8S8(0, 4, 6);
            LENSC_TILE_LOAD(5, values + 16 * t.row_bytes, t.row_bytes);
            LENSC_TILE_U8S8(2, 5, 6);
            if (Panels == 2) {
                LENSC_TILE_LOAD(7, x + (t.planes + p) * 1024, 64);
                LENSC_TILE_U8S8(1, 4, 7);
                LENSC_TILE_U8S8(3, 5, 7);
            }
            beside(i);
        }
    LENSC_TILE_STORE(0, c, 64 * Panels);
    LENSC_TILE_STORE(2, c + 256 * Panels, 64 * Panels);
    if (Panels == 2) {
        LENSC_TILE_STORE(1, c + 16, 128);
        LENSC_TILE_STORE(3, c + 16 * 32 + 16, 128);
    }
}

#else

struct GroupTiles {
    explicit GroupTiles(int64_t) {}
};

template <int Panels, class Beside>
inline void multiply(const TileRange& t, const uint8_t* values, const int8_t* x, int32_t* c, Beside beside) {
    for (int64_t i = 0; i < t.chunks * t.planes; i++) beside(i);
#if defined(__AVX512VNNI__)
    constexpr int together = 16 / Panels;
    for (int64_t o = 0; o < 32; o += together) {
        __m512i sums[together][Panels];
        for (int k = 0; k < together; k++)
            for (int j = 0; j < Panels; j++) sums[k][j] = _mm512_setzero_si512();
        for (int64_t i = 0; i < t.chunks * t.planes; i++) {
            const int8_t* tile = x + i / t.planes * t.x_apart + i % t.planes * 1024;
            const uint8_t* of_tile = values + i * t.tile_bytes + o * t.row_bytes;
            for (int64_t b = 0; b < t.bytes; b += 4) {
                __m512i quads[Panels];
                for (int j = 0; j < Panels; j++) quads[j] = _mm512_loadu_si512(tile + j * t.planes * 1024 + b * 16);
#pragma GCC unroll 16
                for (int k = 0; k < together; k++) {
                    int32_t quad;
                    std::memcpy(&quad, of_tile + k * t.row_bytes + b, 4);
                    const __m512i weight = _mm512_set1_epi32(quad);
                    for (int j = 0; j < Panels; j++) sums[k][j] = _mm512_dpbusd_epi32(sums[k][j], weight, quads[j]);
                }
            }
        }
        for (int k = 0; k < together; k++)
            for (int j = 0; j < Panels; j++) _mm512_storeu_si512(c + ((o + k) * Panels + j) * 16, sums[k][j]);
    }
#elif defined(LENSC_BYTES)
    t.whole_bytes ? multiply_bytes<8, Panels>(t, values, x, c) : multiply_bytes<4, Panels>(t, values, x, c);
#else
    for (int64_t o = 0; o < 32; o++)
        for (int64_t j = 0; j < Panels; j++) {
            int32_t sums[16] = {};
            for (int64_t i = 0; i < t.chunks * t.planes; i++)
                for (int64_t b = 0; b < t.bytes; b += 4) {
                    const uint8_t* v = values + i * t.tile_bytes + o * t.row_bytes + b;
                    const int8_t* quads = x + i / t.planes * t.x_apart + (j * t.planes + i % t.planes) * 1024 + b * 16;
#pragma omp simd
                    for (int64_t r = 0; r < 16; r++)
                        for (int64_t k = 0; k < 4; k++) sums[r] += int32_t(v[k]) * quads[r * 4 + k];
                }
            std::memcpy(c + (o * Panels + j) * 16, sums, sizeof sums);
        }
#endif
}

#endif

// 16 x 16 of sums, turned: y[row][output].
inline void turn(const float* sums, int64_t sums_stride, float* turned) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(sums + i * sums_stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm512_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_ps(turned + i * 16, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_ps(turned + (i + 8) * 16, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
    }
#elif defined(__AVX2__)
    for (int64_t o = 0; o < 16; o += 8)
        for (int64_t r = 0; r < 16; r += 8) {
            __m256 part[8];
            for (int64_t i = 0; i < 8; i++) part[i] = load(sums + (o + i) * sums_stride + r);
            turn_8x8(part);
            for (int64_t i = 0; i < 8; i++) store(turned + (r + i) * 16 + o, part[i]);
        }
#else
    for (int64_t r = 0; r < 16; r++)
        for (int64_t o = 0; o < 16; o++) turned[r * 16 + o] = sums[o * sums_stride + r];
#endif
}

// What ends the sums of up to 16 outputs.
struct Ending {
    alignas(64) float steps[16], bias[16];
    int64_t outputs;

    Ending(const Int4LinearArgs& a, int64_t output) : outputs(std::min<int64_t>(16, a.weight.outputs - output)) {
        for (int64_t i = 0; i < outputs; i++) {
            steps[i] = a.weight.multiples ? a.weight.scales[output + i] : 1;
            bias[i] = a.bias ? a.bias[output + i] : 0;
        }
    }

    // A row of sums to y: times the steps, and with bias and residual.
    inline void put(const float* sums, const float* residual, float* y) const {
        if (outputs < 16) {
            for (int64_t i = 0; i < outputs; i++) y[i] = sums[i] * steps[i] + bias[i] + (residual ? residual[i] : 0.0f);
        } else if (residual) {
#pragma omp simd
            for (int i = 0; i < 16; i++) y[i] = sums[i] * steps[i] + bias[i] + residual[i];
        } else {
#pragma omp simd
            for (int i = 0; i < 16; i++) y[i] = sums[i] * steps[i] + bias[i];
        }
    }
};

// Sums of 16 outputs and the rows of a panel to y.
inline void put_panel(const Int4LinearArgs& a, const Ending& ending, const float* sums, int64_t stride, int64_t output,
                      int64_t panel) {
    alignas(64) float turned[16 * 16];
    turn(sums, stride, turned);
    const int64_t rows = std::min(panel_rows, a.x.rows - panel * panel_rows);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = (panel * panel_rows + r) * a.weight.outputs + output;
        ending.put(turned + r * 16, a.residual ? a.residual + at : nullptr, a.y + at);
    }
}

// Sums of 32 outputs and a block of `panels` panels from `first` on to y: [32][16 * AtOnce], again and again; the last has as many
// lanes as there are panels.
template <int64_t AtOnce>
void put_block(const Int4LinearArgs& a, int64_t output, int64_t first, int64_t panels, const float* sums) {
    for (int64_t o = 0; o < 32 && output + o < a.weight.outputs; o += 16) {
        const Ending ending(a, output + o);
        for (int64_t p = 0; p < panels; p++) {
            const int64_t begin = p / AtOnce * AtOnce, lanes = std::min(AtOnce, panels - begin) * panel_rows;
            const float* of_panel = sums + (begin * 32 + p % AtOnce) * panel_rows + o * lanes;
            put_panel(a, ending, of_panel, lanes, output + o, first + p);
        }
    }
}

}  // namespace lensc::LENSC_ISA
