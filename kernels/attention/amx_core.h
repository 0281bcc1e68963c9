// Attention with products on bfloat16 tiles (AMX), sums and softmax in float32.
//
// Logits are computed transposed, keys times queries: the rows of keys are the left operand as they lie in the cache,
// and two rows of weights, interleaved, are a row of the right operand of the second product, values transposed times
// weights. Only values are transposed, once per block. int8 rows are whole numbers, exact in bfloat16: their scales
// are applied to logits and weights.
//
// Outputs are off by 3e-3 to 6e-3 of their root mean square. Queries in two parts (high and low bfloat16) would make it
// 3e-3 to 5e-3, because keys are rounded as well, for twice the work of the first product; they are not.
#pragma once

#if defined(__AMX_BF16__)

#include "../cpu/tiles.h"
#include "blocks.h"

namespace lensc::LENSC_ISA {

// In place: x[i][j] := x[j][i], of 32-bit values.
inline void transpose(__m512i x[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // x[4 * i + j] has column j + 4 * l of rows 4 * i .. 4 * i + 3 in its lane l of 128 bits.
    for (int j = 0; j < 4; ++j) {
        const __m512i low01 = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x44);
        const __m512i high01 = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x44);
        const __m512i high23 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xee);
        t[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        t[8 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
    for (int i = 0; i < 16; ++i) x[i] = t[i];
}

// low[0] low[1] .. low[15] high[0] .. high[15] in bfloat16.
inline __m512i to_bfloat(vfloat low, vfloat high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// low[0] high[0] low[1] high[1] .. in bfloat16.
inline __m512i to_bfloat_pairs(vfloat low, vfloat high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, to_bfloat(low, high));
}

// The eight tiles, 16 rows of 64 bytes each, for as long as it lives.
struct Tiles {
    Tiles() {
        TileShapes shapes;
        for (int tile = 0; tile < 8; ++tile) shapes.set(tile, 16, 64);
        shapes.load();
    }
    ~Tiles() { TileShapes::release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// What is to be brought to the second-level cache, a few lines of 64 bytes at a time.
struct Lines {
    const char *at[2] = {}, *end[2] = {};

    void add(int side, const Rows& rows, int first, int count, int dim) {
        const int bytes = rows.type == CacheType::float32 ? 4 : rows.type == CacheType::float16 ? 2 : 1;
        at[side] = end[side] = static_cast<const char*>(rows.data) + first * rows.stride * bytes;
        // Rows with gaps between them come from a matrix that was just computed, not from a cache.
        if (rows.stride == dim) end[side] += int64_t(count) * dim * bytes;
    }

    void bring(int count) {
        for (; count > 0 && at[0] < end[0]; --count, at[0] += 64) __builtin_prefetch(at[0], 0, 2);
        for (; count > 0 && at[1] < end[1]; --count, at[1] += 64) __builtin_prefetch(at[1], 0, 2);
    }
};

struct AmxCore {
    static constexpr int kQueries = 32;
    static constexpr int kKeyBlock = 256;
    static constexpr int kQueryBlock = 4 * kQueries;
    static constexpr int kTile = 512;  // bfloat16 values of a tile

    uint16_t* queries;  // [tiles][k tiles][2][kTile]: pairs of dims of 16 queries, scaled
    float* mixed;       // [tiles][d tiles][16][kQueries]
    float* logits;      // [kKeyBlock][kQueries]
    uint16_t* weights;  // [kKeyBlock / 32][2][kTile]: pairs of keys of 16 queries
    Softmax<kQueries>* softmax;  // [tiles]
    Panel panel;
    Tiles tiles;

    // What the next block will read of the cache, where it is read only once. So that memory is never idle, every part
    // of the work asks for as many lines as come while it lasts: 8 for every key, together, in float16 of dim 128.
    Lines next;

    struct Block {
        const uint16_t* keys;    // [kKeyBlock / 16][k tiles][16 keys][32 dims]
        const uint16_t* values;  // [kKeyBlock / 32][d tiles][16 dims][32 keys]
    };

    static int key_tiles(int dim) { return (dim + 31) / 32; }     // of a row of keys
    static int value_tiles(int dim) { return (dim + 15) / 16; }   // of a row of values
    static size_t query_bytes(int dim) { return size_t(key_tiles(dim)) * 2 * 2 * kTile; }
    static size_t mixed_bytes(int dim) { return size_t(value_tiles(dim)) * 16 * sizeof(float) * kQueries; }
    static size_t key_bytes(int dim) { return size_t(kKeyBlock / 16 * key_tiles(dim)) * 2 * kTile; }
    static size_t panel_bytes(int dim) {
        return key_bytes(dim) + size_t(kKeyBlock / 32 * value_tiles(dim)) * 2 * kTile;
    }

    static size_t scratch_bytes(int dim, int slots) {
        return kQueryBlock / kQueries * (query_bytes(dim) + mixed_bytes(dim) + aligned(sizeof *softmax)) +
               (sizeof(float) + sizeof(uint16_t)) * kKeyBlock * kQueries + size_t(slots) * panel_bytes(dim);
    }

    AmxCore(void* scratch, int dim, int slots) {
        constexpr int kTiles = kQueryBlock / kQueries;
        char* at = static_cast<char*>(scratch);
        queries = reinterpret_cast<uint16_t*>(at), at += kTiles * query_bytes(dim);
        mixed = reinterpret_cast<float*>(at), at += kTiles * mixed_bytes(dim);
        softmax = reinterpret_cast<Softmax<kQueries>*>(at), at += kTiles * aligned(sizeof *softmax);
        logits = reinterpret_cast<float*>(at), at += sizeof(float) * kKeyBlock * kQueries;
        weights = reinterpret_cast<uint16_t*>(at), at += sizeof(uint16_t) * kKeyBlock * kQueries;
        panel = Panel{at, slots};
    }

    void take_queries(const Problem& problem, int tile, int row, int valid) {
        softmax[tile].clear();
        const int steps = key_tiles(problem.dim);
        uint16_t* to = queries + tile * (query_bytes(problem.dim) / 2);
        const vfloat factor = splat(problem.scale * kLog2E);
        for (int half = 0; half < 2; ++half) {
            for (int step = 0; step < steps; ++step) {
                __m512i pairs[16];
                for (int q = 0; q < 16; ++q) {
                    // A row that is not there repeats the last one, whose logits are finite.
                    const float* from = problem.query_row(row + least(half * 16 + q, valid - 1));
                    pairs[q] = to_bfloat(load_row(from, step * 32, problem.dim) * factor,
                                         load_row(from, step * 32 + 16, problem.dim) * factor);
                }
                transpose(pairs);
                for (int d = 0; d < 16; ++d) _mm512_store_si512(to + (step * 2 + half) * kTile + d * 32, pairs[d]);
            }
        }
    }

    Block keys(const Problem& problem, int first) {
        const char* at = panel.block(problem.keys.data, first / kKeyBlock, panel_bytes(problem.dim), [&](char* place) {
            const int count = least(kKeyBlock, problem.count - first);
            if (panel.slots == 1) {
                const int after = first + count, coming = least(kKeyBlock, problem.count - after);
                next.add(0, problem.keys, after, coming, problem.dim);
                next.add(1, problem.values, after, coming, problem.dim);
            }
            take_keys(problem, first, count, reinterpret_cast<uint16_t*>(place));
            take_values(problem, first, count, reinterpret_cast<uint16_t*>(place + key_bytes(problem.dim)));
        });
        return {reinterpret_cast<const uint16_t*>(at),
                reinterpret_cast<const uint16_t*>(at + key_bytes(problem.dim))};
    }

    void add(const Problem& problem, const Block& block, int tile, int row, int valid, int first, int count) {
        const int chunks = (count + 31) / 32;
        multiply_keys(problem.dim, block.keys, queries + tile * (query_bytes(problem.dim) / 2), chunks);
        float* sums = mixed + tile * (mixed_bytes(problem.dim) / sizeof(float));
        Softmax<kQueries>& state = softmax[tile];
        state.take(problem, row, valid, first, count, logits, sums);
        for (int k = count; k < chunks * 32; ++k) {
            for (int v = 0; v < 2; ++v) store(logits + k * kQueries + v * 16, splat(-__builtin_inff()));
        }
        if (problem.values.scales) {
            weigh<true>(state, problem.values.scales + first, count, chunks);
        } else {
            weigh<false>(state, nullptr, count, chunks);
        }
        multiply_values(problem.dim, block.values, sums, chunks, first > 0);
    }

    void finish(const Problem& problem, int tile, int row, int valid) {
        for (int half = 0; half * 16 < valid; ++half) {
            const float* sums = mixed + tile * (mixed_bytes(problem.dim) / sizeof(float)) + half * 16;
            const vfloat inverse = 1.0f / load(softmax[tile].sum + half * 16);
            for (int d = 0; d < problem.dim; d += 16) {
                __m512i rows[16];
                for (int i = 0; i < 16; ++i) {
                    rows[i] = _mm512_castps_si512(load(sums + int64_t(d + i) * kQueries) * inverse);
                }
                transpose(rows);
                const int width = least(16, problem.dim - d);
                const __mmask16 mask = __mmask16((1u << width) - 1);
                for (int q = 0; q < least(16, valid - half * 16); ++q) {
                    _mm512_mask_storeu_epi32(problem.output_row(row + half * 16 + q) + d, mask, rows[q]);
                }
            }
        }
    }

  private:
    void take_keys(const Problem& problem, int first, int count, uint16_t* to) {
        const int steps = key_tiles(problem.dim);
        with_type(problem.keys.type, [&](auto* null) {
            auto* from = static_cast<decltype(null)>(problem.keys.data) + first * problem.keys.stride;
            for (int k = 0; k < round_up(count, 32); ++k) {
                next.bring(2);
                uint16_t* row = to + (k / 16 * steps * 16 + k % 16) * 32;
                for (int step = 0; step < steps; ++step) {
                    __m512i dims = _mm512_setzero_si512();
                    if (k < count) {
                        dims = to_bfloat(load_row(from, step * 32, problem.dim),
                                         load_row(from, step * 32 + 16, problem.dim));
                    }
                    _mm512_store_si512(row + step * kTile, dims);
                }
                if (k + 1 < count) from += problem.keys.stride;
            }
        });
    }

    void take_values(const Problem& problem, int first, int count, uint16_t* to) {
        const int tiles_of_dims = value_tiles(problem.dim);
        with_type(problem.values.type, [&](auto* null) {
            const int64_t stride = problem.values.stride;
            auto* from = static_cast<decltype(null)>(problem.values.data) + first * stride;
            for (int chunk = 0; chunk < (count + 31) / 32; ++chunk) {
                for (int d = 0; d < tiles_of_dims; ++d, to += kTile) {
                    next.bring(14);
                    __m512i pairs[16];
                    for (int i = 0; i < 16; ++i) {
                        const int k = chunk * 32 + 2 * i;
                        const vfloat none = splat(0.0f);
                        pairs[i] = to_bfloat_pairs(
                            k < count ? load_row(from + k * stride, d * 16, problem.dim) : none,
                            k + 1 < count ? load_row(from + (k + 1) * stride, d * 16, problem.dim) : none);
                    }
                    transpose(pairs);
                    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, pairs[i]);
                }
            }
        });
    }

    // logits := keys * queries, of 32 * chunks keys.
    void multiply_keys(int dim, const uint16_t* keys, const uint16_t* of_tile, int chunks) {
        const int steps = key_tiles(dim);
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const uint16_t* low = keys + chunk * 2 * steps * kTile;
            const uint16_t* high = low + steps * kTile;
            LENSC_TILE_ZERO(0);
            LENSC_TILE_ZERO(1);
            LENSC_TILE_ZERO(2);
            LENSC_TILE_ZERO(3);
            for (int step = 0; step < steps; ++step) {
                next.bring(8);
                LENSC_TILE_LOAD(4, low + step * kTile, 64);
                LENSC_TILE_LOAD(6, of_tile + step * 2 * kTile, 64);
                LENSC_TILE_LOAD(7, of_tile + (step * 2 + 1) * kTile, 64);
                LENSC_TILE_LOAD(5, high + step * kTile, 64);
                LENSC_TILE_BF16(0, 4, 6);
                LENSC_TILE_BF16(1, 4, 7);
                LENSC_TILE_BF16(2, 5, 6);
                LENSC_TILE_BF16(3, 5, 7);
            }
            float* to = logits + chunk * 32 * kQueries;
            LENSC_TILE_STORE(0, to, 4 * kQueries);
            LENSC_TILE_STORE(1, to + 16, 4 * kQueries);
            LENSC_TILE_STORE(2, to + 16 * kQueries, 4 * kQueries);
            LENSC_TILE_STORE(3, to + 16 * kQueries + 16, 4 * kQueries);
        }
    }

    // weights := 2**(logits - most), their sums into the state; with scales of values, if any, multiplied in.
    template <bool kScaled>
    void weigh(Softmax<kQueries>& state, const float* scales, int count, int chunks) {
        vfloat sum[2] = {load(state.sum), load(state.sum + 16)};
        const vfloat most[2] = {load(state.most), load(state.most + 16)};
        for (int pair = 0; pair < chunks * 16; ++pair) {
            next.bring(2);
            uint16_t* to = weights + pair / 16 * 2 * kTile + pair % 16 * 32;
            for (int v = 0; v < 2; ++v) {
                const float* at = logits + pair * 2 * kQueries + v * 16;
                vfloat even = exp2_coarse(load(at) - most[v]);
                vfloat odd = exp2_coarse(load(at + kQueries) - most[v]);
                sum[v] += even + odd;
                if (kScaled) {
                    even = even * (2 * pair < count ? scales[2 * pair] : 0.0f);
                    odd = odd * (2 * pair + 1 < count ? scales[2 * pair + 1] : 0.0f);
                }
                _mm512_store_si512(to + v * kTile, to_bfloat_pairs(even, odd));
            }
        }
        store(state.sum, sum[0]);
        store(state.sum + 16, sum[1]);
    }

    // sums (+)= transposed values * weights, of 32 * chunks keys.
    void multiply_values(int dim, const uint16_t* values, float* sums, int chunks, bool add) {
        const int tiles_of_dims = value_tiles(dim);
        for (int d = 0; d < tiles_of_dims; d += 2) {
            const bool two = d + 1 < tiles_of_dims;
            float* to = sums + d * 16 * kQueries;
            if (add) {
                LENSC_TILE_LOAD(0, to, 4 * kQueries);
                LENSC_TILE_LOAD(1, to + 16, 4 * kQueries);
                if (two) {
                    LENSC_TILE_LOAD(2, to + 16 * kQueries, 4 * kQueries);
                    LENSC_TILE_LOAD(3, to + 16 * kQueries + 16, 4 * kQueries);
                }
            } else {
                LENSC_TILE_ZERO(0);
                LENSC_TILE_ZERO(1);
                LENSC_TILE_ZERO(2);
                LENSC_TILE_ZERO(3);
            }
            for (int chunk = 0; chunk < chunks; ++chunk) {
                const uint16_t* left = values + (chunk * tiles_of_dims + d) * kTile;
                const uint16_t* right = weights + chunk * 2 * kTile;
                next.bring(10);
                LENSC_TILE_LOAD(4, left, 64);
                LENSC_TILE_LOAD(6, right, 64);
                LENSC_TILE_LOAD(7, right + kTile, 64);
                LENSC_TILE_BF16(0, 4, 6);
                LENSC_TILE_BF16(1, 4, 7);
                if (two) {
                    LENSC_TILE_LOAD(5, left + kTile, 64);
                    LENSC_TILE_BF16(2, 5, 6);
                    LENSC_TILE_BF16(3, 5, 7);
                }
            }
            LENSC_TILE_STORE(0, to, 4 * kQueries);
            LENSC_TILE_STORE(1, to + 16, 4 * kQueries);
            if (two) {
                LENSC_TILE_STORE(2, to + 16 * kQueries, 4 * kQueries);
                LENSC_TILE_STORE(3, to + 16 * kQueries + 16, 4 * kQueries);
            }
        }
    }
};

}  // namespace lensc::LENSC_ISA

#endif
