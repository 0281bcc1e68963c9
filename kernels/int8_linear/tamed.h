// int8_linear by vpmaddubsw (AVX2 without VNNI), which sums two products in an int16 and saturates.
//
// Inputs are stored 128 too large, so at most 255: a pair of weights is safe where |w0 + w1| <= 128. Where it is not, w1 leaves
// its tile, which is then tame, and what it adds is computed apart, for 32 rows at a time. Of weights with a normal distribution
// 1.5 % of the pairs are such, of those of real models fewer: outliers make the scale large, and all others small. The sums are
// exact, as on every other instruction set.
//
// 32 rows of inputs lie together, [padded inputs / 4, 32 rows, 4 inputs].
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../cpu/bytes.h"

namespace lensc::LENSC_ISA {

// Four inputs' weights of one output, those that stayed in the tile as zeros.
struct Removed {
    int32_t input, quad;
};

// 32 outputs.
struct ChannelTile {
    const int8_t* values;  // as they were packed, without those that were removed
    const Removed* removed;  // [32][padded / 4]
    int counts[32];
};

inline size_t tile_scratch_bytes(int64_t padded) {
    return static_cast<size_t>(32 * padded) + static_cast<size_t>(32 * padded / 4) * sizeof(Removed);
}

inline ChannelTile channel_tile(const int8_t* weights, int64_t padded, void* scratch) {
    int8_t* values = static_cast<int8_t*>(scratch);
    Removed* removed = reinterpret_cast<Removed*>(values + 32 * padded);
    ChannelTile tile = {values, removed, {}};
    const __m256i ones = _mm256_set1_epi8(1), most = _mm256_set1_epi16(128), of_pairs = _mm256_set1_epi16(-256);
    for (int vector = 0; vector < 4; vector++) {
        const int64_t at = vector / 2 * padded * 16 + vector % 2 * vector_bytes;
        for (int64_t k = 0; k < padded; k += 4) {
            const vbytes quads = load_bytes(weights + at + k * 16);
            const __m256i over = _mm256_cmpgt_epi16(_mm256_abs_epi16(_mm256_maddubs_epi16(ones, quads)), most);
            const vbytes out = _mm256_and_si256(_mm256_and_si256(over, of_pairs), quads);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + at + k * 16), _mm256_xor_si256(quads, out));
            const __m256i kept = _mm256_cmpeq_epi32(out, _mm256_setzero_si256());
            unsigned lanes = ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(kept))) & 255;
            if (!lanes) continue;
            int32_t of_lanes[8];
            std::memcpy(of_lanes, &out, sizeof of_lanes);
            for (; lanes; lanes &= lanes - 1) {
                const int lane = __builtin_ctz(lanes), output = vector * 8 + lane;
                removed[output * (padded / 4) + tile.counts[output]++] = {static_cast<int32_t>(k), of_lanes[lane]};
            }
        }
    }
    return tile;
}

inline __m256i add_products(__m256i sum, vbytes x, vbytes weights) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, weights), _mm256_set1_epi16(1)));
}

// c[4][16] of 32 outputs = or += the products of `quads` times four inputs. Not inlined: in a longer function the sums would not
// stay in the registers.
__attribute__((noinline)) inline void multiply_quads(const uint8_t* x, const int8_t* weights, int64_t quads, int32_t* c, bool add) {
    constexpr int together = 4;
    __m256i sums[together][2];
#pragma GCC unroll 4
    for (int r = 0; r < together; r++) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < quads; k++, weights += 2 * vector_bytes, x += 32 * 4) {
        const vbytes first = load_bytes(weights), second = load_bytes(weights + vector_bytes);
#pragma GCC unroll 4
        for (int r = 0; r < together; r++) {
            const vbytes value = repeat_quad(x + r * 4);
            sums[r][0] = add_products(sums[r][0], value, first);
            sums[r][1] = add_products(sums[r][1], value, second);
            asm("" : "+x"(sums[r][0]), "+x"(sums[r][1]));  // stay in their registers
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < together; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            __m256i* to = reinterpret_cast<__m256i*>(c + r * 32 + v * 8);
            _mm256_storeu_si256(to, add ? _mm256_add_epi32(sums[r][v], _mm256_loadu_si256(to)) : sums[r][v]);
        }
}

// c[8 rows][8 of 32 outputs] += sums[8 outputs][8 of 32 rows].
inline void add_transposed(const int32_t* sums, int32_t* c) {
    __m256i pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
        const __m256i even = load_bytes(sums + i * 32), odd = load_bytes(sums + (i + 1) * 32);
        pairs[i] = _mm256_unpacklo_epi32(even, odd), pairs[i + 1] = _mm256_unpackhi_epi32(even, odd);
    }
    for (int i = 0; i < 8; i += 4)
        for (int half = 0; half < 2; half++) {
            quads[i + 2 * half] = _mm256_unpacklo_epi64(pairs[i + half], pairs[i + 2 + half]);
            quads[i + 2 * half + 1] = _mm256_unpackhi_epi64(pairs[i + half], pairs[i + 2 + half]);
        }
    for (int r = 0; r < 4; r++) {
        __m256i* low = reinterpret_cast<__m256i*>(c + r * 32);
        __m256i* high = reinterpret_cast<__m256i*>(c + (r + 4) * 32);
        const __m256i first = _mm256_permute2x128_si256(quads[r], quads[r + 4], 0x20);
        const __m256i second = _mm256_permute2x128_si256(quads[r], quads[r + 4], 0x31);
        _mm256_storeu_si256(low, _mm256_add_epi32(_mm256_loadu_si256(low), first));
        _mm256_storeu_si256(high, _mm256_add_epi32(_mm256_loadu_si256(high), second));
    }
}

// c[32 rows][32 outputs] += what the removed weights add.
__attribute__((noinline)) inline void add_removed(const uint8_t* x, const ChannelTile& tile, int64_t padded, int32_t* c) {
    alignas(64) int32_t made[32][32];
    for (int output = 0; output < 32; output++) {
        __m256i sums[4] = {};
        const Removed* removed = tile.removed + output * (padded / 4);
        for (int i = 0; i < tile.counts[output]; i++) {
            const vbytes quad = _mm256_set1_epi32(removed[i].quad);
            const uint8_t* at = x + int64_t(removed[i].input) * 32;
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) sums[v] = add_products(sums[v], load_bytes(at + v * vector_bytes), quad);
        }
        std::memcpy(made[output], sums, sizeof sums);
    }
    for (int output = 0; output < 32; output += 8)
        for (int row = 0; row < 32; row += 8) add_transposed(&made[output][row], c + row * 32 + output);
}

inline void multiply_channels(const int8_t* values, const ChannelTile& tile, int64_t padded, int32_t* c) {
    constexpr int64_t block_inputs = 512;  // of 32 rows and 16 outputs stay in the first-level cache
    const uint8_t* x = reinterpret_cast<const uint8_t*>(values);
    for (int64_t k = 0; k < padded; k += block_inputs)
        for (int64_t half = 0; half < 2; half++)
            for (int64_t r = 0; r < 32; r += 4)
                multiply_quads(x + k * 32 + r * 4, tile.values + (half * padded + k) * 16,
                               std::min(padded - k, block_inputs) / 4, c + r * 32 + half * 16, k > 0);
    if (std::any_of(tile.counts, tile.counts + 32, [](int count) { return count > 0; })) add_removed(x, tile, padded, c);
}

}  // namespace lensc::LENSC_ISA
