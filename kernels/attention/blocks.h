// What both ways to compute attention in blocks share: one head's problem, its rows of keys, its softmax.
//
// Blocks of logits are stored transposed, [keys][kQueries]: a query is a column, so that maxima and sums over keys are
// operations between vectors, no row of keys has to be transposed for the product, and weights come out in the order
// in which the product with the values takes them.
#pragma once

#include "../cpu/half.h"
#include "attention.h"

namespace lensc::LENSC_ISA {

inline constexpr float kLog2E = 1.44269504088896f;

// Stands for -inf where a difference of two must be 0: a row that is masked entirely is the mean of all values.
inline constexpr float kMasked = -1e30f;

struct Rows {
    const void* data;      // rows of `dim` values of `type`, `stride` values apart
    const float* scales;   // [rows], of int8 only
    CacheType type;
    int64_t stride;
};

// One kv head with the query heads that read it. Query row r is head r % group of token r / group.
struct Problem {
    const float* query;
    int64_t query_stride;  // from one token to the next
    float* output;
    int64_t output_stride;
    Rows keys, values;
    const float* bias;     // [count] or null
    int dim, group, tokens, count;
    int past;              // token t sees past + t + 1 keys; -1: all `count`
    float scale;

    const float* query_row(int row) const { return query + row / group * query_stride + row % group * dim; }
    float* output_row(int row) const { return output + row / group * output_stride + row % group * dim; }
    int visible(int row) const { return past < 0 ? count : past + row / group + 1; }
};

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }
inline int least(int a, int b) { return a < b ? a : b; }

template <int kQueries>
struct Softmax {
    static constexpr int kVectors = kQueries / kLanes;

    alignas(64) float most[kQueries];  // of the logits so far, in base 2
    alignas(64) float sum[kQueries];   // of 2**(logit - most)

    void clear() {
        for (int q = 0; q < kQueries; ++q) {
            most[q] = -__builtin_inff();
            sum[q] = 0;
        }
    }

    // Scales, biases and masks the logits of `count` keys from `first` on, [count][kQueries], and takes their maxima
    // in: what was summed up to here fades to them, `mixed`, [dim][kQueries], too (not read before the first block).
    void take(const Problem& problem, int first_row, int rows, int first, int count, float* logits, float* mixed) {
        if (problem.keys.scales) scale(problem.keys.scales + first, count, logits);
        if (problem.bias) add_bias(problem.bias + first, count, logits);
        // Rows of a tile are in the order of their tokens: the first row sees the fewest keys.
        const int seen_by_all = problem.visible(first_row) - first;
        if (seen_by_all < count) mask(problem, first_row, rows, first, seen_by_all, count, logits);
        vfloat high[kVectors];
        for (int v = 0; v < kVectors; ++v) high[v] = load(most + v * kLanes);
        for (int k = 0; k < count; ++k) {
            for (int v = 0; v < kVectors; ++v) high[v] = max(high[v], load(logits + k * kQueries + v * kLanes));
        }
        bool fades = false;
        vfloat fade[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            fade[v] = exp2(load(most + v * kLanes) - high[v]);
            store(most + v * kLanes, high[v]);
            store(sum + v * kLanes, load(sum + v * kLanes) * fade[v]);
            for (int i = 0; i < kLanes; ++i) fades |= fade[v][i] != 1.0f;
        }
        if (!fades || first == 0) return;
        for (int d = 0; d < problem.dim; ++d, mixed += kQueries) {
            for (int v = 0; v < kVectors; ++v) store(mixed + v * kLanes, load(mixed + v * kLanes) * fade[v]);
        }
    }

  private:
    static void scale(const float* scales, int count, float* logits) {
        for (int k = 0; k < count; ++k) {
            for (int q = 0; q < kQueries; ++q) logits[k * kQueries + q] *= scales[k];
        }
    }

    static void add_bias(const float* bias, int count, float* logits) {
        for (int k = 0; k < count; ++k) {
            if (bias[k] == 0.0f) continue;
            const float added = bias[k] * kLog2E > kMasked ? bias[k] * kLog2E : kMasked;
            for (int q = 0; q < kQueries; ++q) logits[k * kQueries + q] += added;
        }
    }

    static void mask(const Problem& problem, int first_row, int rows, int first, int from, int count, float* logits) {
        alignas(64) float limit[kQueries];
        for (int q = 0; q < kQueries; ++q) {
            limit[q] = float(problem.visible(first_row + (q < rows ? q : rows - 1)) - first);
        }
        for (int k = from < 0 ? 0 : from; k < count; ++k) {
            for (int v = 0; v < kVectors; ++v) {
                float* at = logits + k * kQueries + v * kLanes;
                store(at, load(limit + v * kLanes) > splat(float(k)) ? load(at) : splat(-__builtin_inff()));
            }
        }
    }
};

// A core gives: kQueries, a tile's rows of queries; kKeyBlock, the keys taken at once; the sizes of its scratch; and
// the functions used here. Computes rows [first_row, first_row + rows) of the problem.
template <class Core>
void attend(const Problem& problem, int first_row, int rows, Core& core) {
    const int tiles = (rows + Core::kQueries - 1) / Core::kQueries;
    const int end = problem.visible(first_row + rows - 1);
    for (int tile = 0; tile < tiles; ++tile) {
        const int row = first_row + tile * Core::kQueries;
        core.take_queries(problem, tile, row, least(Core::kQueries, first_row + rows - row));
    }
    for (int first = 0; first < end; first += Core::kKeyBlock) {
        const auto block = core.keys(problem, first);
        for (int tile = 0; tile < tiles; ++tile) {
            const int row = first_row + tile * Core::kQueries;
            const int valid = least(Core::kQueries, first_row + rows - row);
            const int count = least(Core::kKeyBlock, problem.visible(row + valid - 1) - first);
            if (count > 0) core.add(problem, block, tile, row, valid, first, count);
        }
    }
    for (int tile = 0; tile < tiles; ++tile) {
        const int row = first_row + tile * Core::kQueries;
        core.finish(problem, tile, row, least(Core::kQueries, first_row + rows - row));
    }
}

// Where the blocks of converted keys and values of one problem lie: all of them where several blocks of queries come
// back to them, else one after the other in the same place.
struct Panel {
    char* data;
    int slots;
    int filled = 0;  // blocks of the present problem
    const void* owner = nullptr;  // its keys

    // The place of a block; `fill` is called where it has to be made. Blocks of a problem are first asked for in order.
    template <class Fill>
    char* block(const void* keys, int index, size_t bytes, Fill fill) {
        if (owner != keys) filled = 0;
        owner = keys;
        char* at = data + size_t(index % slots) * bytes;
        if (slots == 1 || index >= filled) {
            fill(at);
            filled = index + 1;
        }
        return at;
    }
};

// Brings a row to the second-level cache.
template <class Type>
inline void prefetch_row(const Type* row, int dim) {
    const char* bytes = reinterpret_cast<const char*>(row);
    for (size_t at = 0; at < sizeof(Type) * size_t(dim); at += 64) __builtin_prefetch(bytes + at, 0, 2);
}

// Calls with a null pointer of the type in which rows are stored.
template <class Call>
void with_type(CacheType type, Call call) {
    switch (type) {
        case CacheType::float32: call(static_cast<const float*>(nullptr)); break;
        case CacheType::float16: call(static_cast<const uint16_t*>(nullptr)); break;
        case CacheType::int8: call(static_cast<const int8_t*>(nullptr)); break;
    }
}

// Values [at, at + kLanes) of a row of `dim`, zeros beyond it.
template <class Type>
inline vfloat load_row(const Type* row, int at, int dim) {
    if (at + kLanes <= dim) return load(row + at);
    return at < dim ? load_first(row + at, dim - at) : splat(0.0f);
}

}  // namespace lensc::LENSC_ISA
