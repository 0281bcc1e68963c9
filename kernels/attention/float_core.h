// Attention in float32: tiles of queries times blocks of keys, accumulators in registers.
#pragma once

#include "blocks.h"

namespace lensc::LENSC_ISA {

// Accumulators of kTileRows x kTileVectors, operands and one broadcast fill the vector registers (32, 16 on AVX2).
#if defined(__AVX512F__) || defined(__ARM_NEON)
inline constexpr int kTileRows = 8, kTileVectors = 2;
#elif defined(__AVX2__)
inline constexpr int kTileRows = 4, kTileVectors = 3;
#else
inline constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// c[m][q] = (add ? c[m][q] : 0) + sum over k of a[m * a_row + k * a_step] * b[k][q], for M rows and the kQueries
// columns of b and c.
template <int M>
inline void product_rows(const float* a, int64_t a_row, int64_t a_step, const float* b, int steps, float* c, bool add) {
    constexpr int kWidth = kTileVectors * kLanes;
    vfloat sum[M][kTileVectors];
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < kTileVectors; ++v) sum[m][v] = add ? load(c + m * kWidth + v * kLanes) : splat(0.0f);
    }
    for (int k = 0; k < steps; ++k) {
        vfloat right[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) right[v] = load(b + k * kWidth + v * kLanes);
        for (int m = 0; m < M; ++m) {
            const vfloat left = splat(a[m * a_row + k * a_step]);
            for (int v = 0; v < kTileVectors; ++v) sum[m][v] += left * right[v];
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < kTileVectors; ++v) store(c + m * kWidth + v * kLanes, sum[m][v]);
    }
}

inline void product(const float* a, int64_t a_row, int64_t a_step, int rows, const float* b, int steps, float* c,
                    bool add) {
    constexpr int kWidth = kTileVectors * kLanes;
    int m = 0;
    for (; m + kTileRows <= rows; m += kTileRows) {
        product_rows<kTileRows>(a + m * a_row, a_row, a_step, b, steps, c + m * kWidth, add);
    }
    if (m + kTileRows / 2 <= rows) {
        product_rows<kTileRows / 2>(a + m * a_row, a_row, a_step, b, steps, c + m * kWidth, add);
        m += kTileRows / 2;
    }
    for (; m < rows; ++m) product_rows<1>(a + m * a_row, a_row, a_step, b, steps, c + m * kWidth, add);
}

struct FloatCore {
    static constexpr int kQueries = kTileVectors * kLanes;
    static constexpr int kKeyBlock = 128;
    static constexpr int kQueryBlock = 4 * kQueries;  // rows of queries for which a block of keys is read once

    float* queries;   // [tiles][dim][kQueries], scaled
    float* mixed;     // [tiles][dim][kQueries]
    float* logits;    // [kKeyBlock][kQueries]
    Softmax<kQueries>* softmax;  // [tiles]
    Panel panel;

    struct Block {
        const float *keys, *values;
        int64_t key_stride, value_stride;
    };

    static size_t panel_bytes(int dim) { return aligned(2 * sizeof(float) * size_t(kKeyBlock) * size_t(dim)); }

    static size_t scratch_bytes(int dim, int slots) {
        const size_t tile = aligned(sizeof(float) * size_t(dim) * kQueries);
        return kQueryBlock / kQueries * (2 * tile + aligned(sizeof *softmax)) +
               aligned(sizeof(float) * kKeyBlock * kQueries) + size_t(slots) * panel_bytes(dim);
    }

    FloatCore(void* scratch, int dim, int slots) {
        constexpr int kTiles = kQueryBlock / kQueries;
        char* at = static_cast<char*>(scratch);
        const size_t tile = aligned(sizeof(float) * size_t(dim) * kQueries);
        queries = reinterpret_cast<float*>(at), at += kTiles * tile;
        mixed = reinterpret_cast<float*>(at), at += kTiles * tile;
        softmax = reinterpret_cast<Softmax<kQueries>*>(at), at += kTiles * aligned(sizeof *softmax);
        logits = reinterpret_cast<float*>(at), at += aligned(sizeof(float) * kKeyBlock * kQueries);
        panel = Panel{at, slots};
    }

    // Contiguous float32 rows are read where they lie; rows far apart would share few sets of the cache.
    static bool in_place(const Rows& rows, int dim) { return rows.type == CacheType::float32 && rows.stride == dim; }

    void take_queries(const Problem& problem, int tile, int row, int valid) {
        softmax[tile].clear();
        float* to = queries + int64_t(tile) * problem.dim * kQueries;
        const float factor = problem.scale * kLog2E;
        for (int q = 0; q < kQueries; ++q) {
            // A row that is not there repeats the last one, whose logits are finite.
            const float* from = problem.query_row(row + least(q, valid - 1));
            for (int d = 0; d < problem.dim; ++d) to[d * kQueries + q] = from[d] * factor;
        }
    }

    Block keys(const Problem& problem, int first) {
        const int dim = problem.dim;
        if (in_place(problem.keys, dim) && in_place(problem.values, dim)) {
            return {static_cast<const float*>(problem.keys.data) + int64_t(first) * dim,
                    static_cast<const float*>(problem.values.data) + int64_t(first) * dim, dim, dim};
        }
        const int count = least(kKeyBlock, problem.count - first);
        float* at = reinterpret_cast<float*>(
            panel.block(problem.keys.data, first / kKeyBlock, panel_bytes(dim), [&](char* place) {
                float* to = reinterpret_cast<float*>(place);
                convert(problem.keys, first, count, dim, nullptr, to);
                convert(problem.values, first, count, dim, problem.values.scales, to + kKeyBlock * dim);
            }));
        return {at, at + kKeyBlock * dim, dim, dim};
    }

    void add(const Problem& problem, const Block& block, int tile, int row, int valid, int first, int count) {
        const int dim = problem.dim;
        float* sums = mixed + int64_t(tile) * dim * kQueries;
        product(block.keys, block.key_stride, 1, count, queries + int64_t(tile) * dim * kQueries, dim, logits, false);
        Softmax<kQueries>& state = softmax[tile];
        state.take(problem, row, valid, first, count, logits, sums);
        vfloat sum[kTileVectors], most[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) {
            sum[v] = load(state.sum + v * kLanes);
            most[v] = load(state.most + v * kLanes);
        }
        for (int k = 0; k < count; ++k) {
            for (int v = 0; v < kTileVectors; ++v) {
                float* at = logits + k * kQueries + v * kLanes;
                const vfloat weight = exp2(load(at) - most[v]);
                sum[v] += weight;
                store(at, weight);
            }
        }
        for (int v = 0; v < kTileVectors; ++v) store(state.sum + v * kLanes, sum[v]);
        product(block.values, 1, block.value_stride, dim, logits, count, sums, first > 0);
    }

    void finish(const Problem& problem, int tile, int row, int valid) {
        const float* sums = mixed + int64_t(tile) * problem.dim * kQueries;
        for (int q = 0; q < valid; ++q) {
            const float inverse = 1.0f / softmax[tile].sum[q];
            float* to = problem.output_row(row + q);
            for (int d = 0; d < problem.dim; ++d) to[d] = sums[d * kQueries + q] * inverse;
        }
    }

  private:
    static void convert(const Rows& rows, int first, int count, int dim, const float* scales, float* to) {
        with_type(rows.type, [&](auto* null) {
            auto* from = static_cast<decltype(null)>(rows.data) + first * rows.stride;
            for (int k = 0; k < count; ++k, from += rows.stride, to += dim) {
                const vfloat factor = splat(scales ? scales[first + k] : 1.0f);
                int d = 0;
                for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d) * factor);
                if (d < dim) {
                    const vfloat rest = load_first(from + d, dim - d) * factor;
                    std::memcpy(to + d, &rest, sizeof(float) * size_t(dim - d));
                }
            }
        });
    }
};

}  // namespace lensc::LENSC_ISA
