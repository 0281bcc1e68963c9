// See int8_linear.h. Compiled once per instruction set, included by cpu/table.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../cpu/bytes.h"
#include "../cpu/tiles.h"
#include "int8_linear.h"
#if defined(LENSC_PAIRS)
#include "tamed.h"
#endif

namespace lensc::LENSC_ISA {

// vpdpbusd multiplies unsigned by signed: inputs are stored 128 too large, and the outputs' sums take it off again
#if defined(__AMX_INT8__) || (defined(LENSC_BYTES) && !defined(__AVX2__))
constexpr int8_t channel_offset = 0;
#else
constexpr int8_t channel_offset = -128;
#endif

constexpr int64_t channel_block = 64;  // inputs of a row that are put in their place at once

inline void put_channel_block(int8_t* values, int64_t padded, int64_t row, int64_t input, const int8_t* block) {
#if defined(LENSC_PAIRS)
    int8_t* to = values + row / 32 * 32 * padded + input * 32 + row % 32 * 4;
    for (int64_t i = 0; i < channel_block; i += 4) std::memcpy(to + i * 32, block + i, 4);
#else
    std::memcpy(values + row * padded + input, block, channel_block);
#endif
}

// One row that `row(r)` gives as float32 to int8, symmetric: scale = max |x| / 127.
template <class Row>
void quantize_channel_rows(const ChannelRows& out, int64_t inputs, int64_t padded, Row row, Share share) {
    const Range rows = range_of(out.padded_rows(), 32, share);
    for (int64_t r = rows.begin; r < rows.end; r++) {
        const float* x = r < out.rows ? row(r) : nullptr;
        float largest = 0;
        if (x) {
#pragma omp simd reduction(max : largest)
            for (int64_t i = 0; i < inputs; i++) largest = std::max(largest, std::fabs(x[i]));
        }
        // a row of denormals has an inverse that is infinite; what it adds is nothing
        const float inverse = largest > 0 && std::isfinite(127 / largest) ? 127 / largest : 0;
        out.scales[r] = largest / 127;
        for (int64_t begin = 0; begin < padded; begin += channel_block) {
            int8_t block[channel_block] = {};
            const int64_t count = x ? std::min(inputs - begin, channel_block) : 0;
#pragma omp simd
            for (int64_t i = 0; i < count; i++)
                block[i] = static_cast<int8_t>(
                    static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(x[begin + i] * inverse))) ^ channel_offset);
            put_channel_block(out.values, padded, r, begin, block);
        }
    }
}

// multiply_channels: c[32][32] = x [32 rows] times two tiles of 16 outputs, over all inputs; lanes are outputs.
#if !defined(LENSC_PAIRS)

// What multiply_channels takes of the weights of 32 outputs.
typedef const int8_t* ChannelTile;

inline ChannelTile channel_tile(const int8_t* weights, int64_t, void*) { return weights; }

inline size_t tile_scratch_bytes(int64_t) { return 0; }

#endif

#if defined(__AMX_INT8__)

struct ChannelTiles {
    ChannelTiles() {
        TileShapes shapes;
        for (int i = 0; i < 8; i++) shapes.set(i, 16, 64);
        shapes.load();
    }
    ~ChannelTiles() { TileShapes::release(); }
};

inline void multiply_channels(const int8_t* x, const int8_t* weights, int64_t padded, int32_t* c) {
    LENSC_TILE_ZERO(0);
    LENSC_TILE_ZERO(1);
    LENSC_TILE_ZERO(2);
    LENSC_TILE_ZERO(3);
    for (int64_t k = 0; k < padded; k += 64) {
        LENSC_TILE_LOAD(4, x + k, padded);
        LENSC_TILE_LOAD(6, weights + k * 16, 64);
        LENSC_TILE_S8S8(0, 4, 6);
        LENSC_TILE_LOAD(7, weights + (padded + k) * 16, 64);
        LENSC_TILE_S8S8(1, 4, 7);
        LENSC_TILE_LOAD(5, x + 16 * padded + k, padded);
        LENSC_TILE_S8S8(2, 5, 6);
        LENSC_TILE_S8S8(3, 5, 7);
    }
    LENSC_TILE_STORE(0, c, 128);
    LENSC_TILE_STORE(1, c + 16, 128);
    LENSC_TILE_STORE(2, c + 16 * 32, 128);
    LENSC_TILE_STORE(3, c + 16 * 32 + 16, 128);
}

#else

struct ChannelTiles {
    ChannelTiles() {}
};

#if !defined(LENSC_PAIRS)

inline void multiply_channels(const int8_t* x, const int8_t* weights, int64_t padded, int32_t* c) {
#if defined(LENSC_BYTES)
    constexpr int64_t together = 4, vectors = 64 / vector_bytes;
    typedef Products<8> P;
    for (int64_t r = 0; r < 32; r += together)
        for (int64_t half = 0; half < 2; half++) {
            typename P::Sum sums[together][vectors];
            for (auto& of_row : sums)
                for (auto& sum : of_row) sum = P::zero();
            for (int64_t k = 0; k < padded; k += 4) {
                const int8_t* tile = weights + (half * padded + k) * 16;
                vbytes quads[vectors];
                for (int64_t v = 0; v < vectors; v++) quads[v] = load_bytes(tile + v * vector_bytes);
                for (int64_t i = 0; i < together; i++) {
                    const vbytes value = repeat_quad(x + (r + i) * padded + k);
                    for (int64_t v = 0; v < vectors; v++) sums[i][v] = P::add(sums[i][v], value, quads[v]);
                }
            }
            for (int64_t i = 0; i < together; i++)
                for (int64_t v = 0; v < vectors; v++) {
                    const vint whole = P::whole(sums[i][v]);
                    std::memcpy(c + (r + i) * 32 + half * 16 + v * kLanes, &whole, sizeof whole);
                }
        }
#elif defined(__AVX512VNNI__)
    for (int64_t r = 0; r < 32; r += 8) {
        __m512i sums[8][2];
        for (auto& of_row : sums) of_row[0] = of_row[1] = _mm512_setzero_si512();
        for (int64_t k = 0; k < padded; k += 4) {
            const __m512i first = _mm512_loadu_si512(weights + k * 16);
            const __m512i second = _mm512_loadu_si512(weights + (padded + k) * 16);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                int32_t quad;
                std::memcpy(&quad, x + (r + i) * padded + k, 4);
                const __m512i value = _mm512_set1_epi32(quad);
                sums[i][0] = _mm512_dpbusd_epi32(sums[i][0], value, first);
                sums[i][1] = _mm512_dpbusd_epi32(sums[i][1], value, second);
            }
        }
        for (int i = 0; i < 8; i++) {
            _mm512_storeu_si512(c + (r + i) * 32, sums[i][0]);
            _mm512_storeu_si512(c + (r + i) * 32 + 16, sums[i][1]);
        }
    }
#else
    for (int64_t r = 0; r < 32; r++)
        for (int64_t half = 0; half < 2; half++) {
            int32_t sums[16] = {};
            for (int64_t k = 0; k < padded; k += 4) {
                const int8_t* quads = weights + (half * padded + k) * 16;
                const int8_t* values = x + r * padded + k;
#pragma omp simd
                for (int o = 0; o < 16; o++)
                    for (int i = 0; i < 4; i++) sums[o] += int32_t(static_cast<uint8_t>(values[i])) * quads[o * 4 + i];
            }
            std::memcpy(c + r * 32 + half * 16, sums, sizeof sums);
        }
#endif
}

#endif
#endif

// y = c * x_scale * scale + bias + residual for 32 rows and outputs.
inline void put_channels(const Int8LinearArgs& a, const int32_t* c, int64_t row, int64_t output) {
    const int64_t outputs = std::min<int64_t>(32, a.weight.outputs - output), rows = std::min<int64_t>(32, a.x.rows - row);
    float scale[32] = {}, bias[32] = {};
    int32_t offset[32] = {};
    for (int64_t o = 0; o < outputs; o++) {
        scale[o] = a.weight.scales[output + o];
        if (a.bias) bias[o] = a.bias[output + o];
        offset[o] = -int32_t(channel_offset) * a.weight.sums[output + o];
    }
    for (int64_t r = 0; r < rows; r++, c += 32) {
        const float x_scale = a.x.scales[row + r];
        const int64_t at = (row + r) * a.weight.outputs + output;
        float* y = a.y + at;
        float made[32];
#pragma omp simd
        for (int o = 0; o < 32; o++) made[o] = static_cast<float>(c[o] - offset[o]) * x_scale * scale[o] + bias[o];
        if (a.residual)
            for (int64_t o = 0; o < outputs; o++) made[o] += a.residual[at + o];
        if (outputs == 32)
            std::memcpy(y, made, sizeof made);
        else
            std::memcpy(y, made, static_cast<size_t>(outputs) * sizeof(float));
    }
}

inline size_t int8_linear_scratch(const Int8LinearArgs& a) { return tile_scratch_bytes(a.weight.padded_inputs()); }

inline void int8_linear(const Int8LinearArgs& a, Share share) {
#if defined(LENSC_PAIRS)
    constexpr int64_t block_rows = 1024;  // for which a tile of weights is made once
#else
    constexpr int64_t block_rows = 256;  // stay in the cache while all weights pass
#endif
    const Range outputs = range_of(a.weight.outputs, 32, share);
    const int64_t padded = a.weight.padded_inputs();
    alignas(64) int32_t products[2][32 * 32];
    const ChannelTiles tiles;
    for (int64_t begin = 0; begin < a.x.rows; begin += block_rows)
        for (int64_t output = outputs.begin; output < outputs.end; output += 32) {
            const int64_t end = std::min(begin + block_rows, a.x.rows);
            const ChannelTile tile = channel_tile(a.weight.values + output * padded, padded, a.scratch);
            int64_t count = 0;
            for (int64_t row = begin; row < end; row += 32, count++) {
                multiply_channels(a.x.values + row * padded, tile, padded, products[count % 2]);
                // the tiles just stored are read a turn later: at once, each load would wait for its store
                if (count) put_channels(a, products[(count + 1) % 2], row - 32, output);
            }
            put_channels(a, products[(count + 1) % 2], begin + (count - 1) * 32, output);
        }
}

}  // namespace lensc::LENSC_ISA
