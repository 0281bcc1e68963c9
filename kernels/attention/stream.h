// Attention of a few rows of queries in float32: keys and values go by once, as dot products and sums of rows.
#pragma once

#include "blocks.h"

namespace lensc::LENSC_ISA {

// result[i] := sum of x[i], for kLanes vectors; destroys x.
inline vfloat sums_of(vfloat* x) {
#if defined(__AVX512F__)
    // Each step halves what is left of each sum and puts two side by side; pairs are such that the end is in order.
    __m512 y[8], z[4];
    for (int i = 0; i < 8; ++i) {
        const int first = i < 4 ? i : i + 4;
        y[i] = _mm512_shuffle_f32x4(x[first], x[first + 4], 0x44) + _mm512_shuffle_f32x4(x[first], x[first + 4], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        z[i] = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x88) + _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd);
    }
    for (int i = 0; i < 2; ++i) {
        y[i] = _mm512_shuffle_ps(z[2 * i], z[2 * i + 1], 0x44) + _mm512_shuffle_ps(z[2 * i], z[2 * i + 1], 0xee);
    }
    return _mm512_shuffle_ps(y[0], y[1], 0x88) + _mm512_shuffle_ps(y[0], y[1], 0xdd);
#elif defined(__AVX2__)
    __m256 y[4];
    for (int i = 0; i < 4; ++i) y[i] = _mm256_hadd_ps(x[2 * i], x[2 * i + 1]);
    const __m256 low = _mm256_hadd_ps(y[0], y[1]), high = _mm256_hadd_ps(y[2], y[3]);
    return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
#else
    vfloat result;
    for (int i = 0; i < kLanes; ++i) result[i] = reduce_add(x[i]);
    return result;
#endif
}

class Stream {
  public:
    static constexpr int kMaxRows = 64;
    static constexpr int kKeyBlock = 64;  // the most keys taken at once

    static size_t scratch_bytes(int dim) {
        return 2 * aligned(sizeof(float) * kMaxRows * size_t(dim)) + sizeof(float) * kMaxRows * kKeyBlock;
    }

    // Computes all rows of the problem, at most kMaxRows.
    static void attend(const Problem& problem, void* scratch) {
        with_type(problem.keys.type, [&](auto* null) { Stream(problem, scratch).run(null); });
    }

  private:
    // Keys taken at once. On AVX2 float16 is read 1.2 times as fast by 16 as by 64, as the next ones are asked for in shorter
    // bursts; int8 0.9 times. Elsewhere 16 were never measured.
    template <class Type>
#if defined(__AVX2__) && !defined(__AVX512F__)
    static constexpr int kBlock = sizeof(Type) == 1 ? kKeyBlock : 16;
#else
    static constexpr int kBlock = kKeyBlock;
#endif

    // Rows of queries taken together, and vectors of their mixtures: what fits the registers.
#if defined(__AVX512F__) || defined(__ARM_NEON)
    static constexpr int kRows = 4, kVectors = 4;
#elif defined(__AVX2__)
    static constexpr int kRows = 4, kVectors = 2;
#else
    static constexpr int kRows = 2, kVectors = 2;
#endif

    const Problem& problem_;
    const int dim_, rows_;
    float* queries_;  // [rows][dim], scaled
    float* mixed_;    // [rows][dim]
    float* logits_;   // [rows][kKeyBlock]
    float most_[kMaxRows], sum_[kMaxRows];
    float fade_[kMaxRows];  // what mixtures up to here are to be multiplied with

    Stream(const Problem& problem, void* scratch)
        : problem_(problem), dim_(problem.dim), rows_(problem.tokens * problem.group) {
        char* at = static_cast<char*>(scratch);
        const size_t bytes = aligned(sizeof(float) * kMaxRows * size_t(dim_));
        queries_ = reinterpret_cast<float*>(at);
        mixed_ = reinterpret_cast<float*>(at + bytes);
        logits_ = reinterpret_cast<float*>(at + 2 * bytes);
        const float factor = problem.scale * kLog2E;
        for (int row = 0; row < rows_; ++row) {
            const float* from = problem.query_row(row);
            for (int d = 0; d < dim_; ++d) {
                queries_[row * dim_ + d] = from[d] * factor;
                mixed_[row * dim_ + d] = 0;
            }
            most_[row] = -__builtin_inff();
            sum_[row] = 0;
        }
    }

    template <class Type>
    void run(const Type*) {
        const Type* keys = static_cast<const Type*>(problem_.keys.data);
        const Type* values = static_cast<const Type*>(problem_.values.data);
        const int end = problem_.visible(rows_ - 1);
        for (int first = 0; first < end; first += kBlock<Type>) {
            const int count = least(kBlock<Type>, end - first);
            const Type* block_keys = keys + first * problem_.keys.stride;
            const Type* block_values = values + first * problem_.values.stride;
            in_groups([&](auto group, int row) { multiply_keys<group.value>(block_keys, block_values, row, count); });
            for (int row = 0; row < rows_; ++row) weigh(row, first, count);
            const Type* next = first + kBlock<Type> < end ? block_keys + kBlock<Type> * problem_.keys.stride : nullptr;
            in_groups([&](auto group, int row) { multiply_values<group.value>(block_values, next, row, count); });
        }
        for (int row = 0; row < rows_; ++row) {
            const float inverse = 1.0f / sum_[row];
            float* to = problem_.output_row(row);
            for (int d = 0; d < dim_; ++d) to[d] = mixed_[row * dim_ + d] * inverse;
        }
    }

    template <int kValue>
    struct Number {
        static constexpr int value = kValue;
    };

    // Calls with every row once: kRows at a time, then the rest one by one.
    template <class Call>
    void in_groups(Call call) const {
        int row = 0;
        for (; row + kRows <= rows_; row += kRows) call(Number<kRows>{}, row);
        for (; row < rows_; ++row) call(Number<1>{}, row);
    }

    // Blocks of keys and of values come in turns, and the hardware's prefetcher would start anew with each: so rows of
    // the next block are asked for while those of this one are read. Neither loop is inlined, and what is in them is unrolled:
    // in a longer function the compiler keeps the sums in memory (float16 0.73 times as fast on AVX2, int8 0.65 times).

    // logits[row ..][k] := queries * keys[k], kGroup rows.
    template <int kGroup, class Type>
    __attribute__((noinline)) void multiply_keys(const Type* keys, const Type* values, int row, int count) {
        // As many dot products as a vector has sums; four keys where vectors are short.
        constexpr int kKeys = kLanes > kGroup ? kLanes / kGroup : 4;
        const float* left = queries_ + row * dim_;
        for (int k = 0; k < count; k += kKeys) {
            const Type* right[kKeys];
#pragma GCC unroll 16
            for (int j = 0; j < kKeys; ++j) {
                const int key = least(k + j, count - 1);
                right[j] = keys + key * problem_.keys.stride;
                if (row == 0) prefetch_row(values + key * problem_.values.stride, dim_);
            }
            vfloat sum[kGroup * kKeys];
#pragma GCC unroll 16
            for (int i = 0; i < kGroup * kKeys; ++i) sum[i] = splat(0.0f);
            int d = 0;
            for (; d + kLanes <= dim_; d += kLanes) {
                vfloat query[kGroup];
#pragma GCC unroll 16
                for (int i = 0; i < kGroup; ++i) query[i] = load(left + i * dim_ + d);
#pragma GCC unroll 16
                for (int j = 0; j < kKeys; ++j) {
                    const vfloat key = load(right[j] + d);
#pragma GCC unroll 16
                    for (int i = 0; i < kGroup; ++i) sum[i * kKeys + j] += query[i] * key;
                }
            }
            if (d < dim_) {
#pragma GCC unroll 16
                for (int j = 0; j < kKeys; ++j) {
                    const vfloat key = load_first(right[j] + d, dim_ - d);
#pragma GCC unroll 16
                    for (int i = 0; i < kGroup; ++i) {
                        sum[i * kKeys + j] += load_first(left + i * dim_ + d, dim_ - d) * key;
                    }
                }
            }
            alignas(64) float sums[kGroup * kKeys];
#pragma GCC unroll 16
            for (int i = 0; i < kGroup * kKeys; i += kLanes) store(sums + i, sums_of(sum + i));
#pragma GCC unroll 16
            for (int i = 0; i < kGroup; ++i) {
                std::memcpy(logits_ + (row + i) * kKeyBlock + k, sums + i * kKeys, sizeof(float) * kKeys);
            }
        }
    }

    // logits[row] := 2**(logits - most), with the sum up to here faded to the new maximum.
    void weigh(int row, int first, int count) {
        float* logits = logits_ + row * kKeyBlock;
        if (const float* scales = problem_.keys.scales) {
            for (int k = 0; k < count; ++k) logits[k] *= scales[first + k];
        }
        const int seen = least(count, problem_.visible(row) - first);
        for (int k = seen < 0 ? 0 : seen; k < round_up(count, kLanes); ++k) logits[k] = -__builtin_inff();
        vfloat high = splat(most_[row]);
        for (int k = 0; k < count; k += kLanes) high = max(high, load(logits + k));
        const float most = reduce_max(high);
        const float fade = exp2(splat(most_[row] - most))[0];
        most_[row] = most;
        vfloat sum = {};
        for (int k = 0; k < count; k += kLanes) {
            const vfloat weight = exp2(load(logits + k) - most);
            sum += weight;
            store(logits + k, weight);
        }
        sum_[row] = sum_[row] * fade + reduce_add(sum);
        if (const float* scales = problem_.values.scales) {
            for (int k = 0; k < count; ++k) logits[k] *= scales[first + k];
        }
        fade_[row] = fade;
    }

    template <int kGroup, class Type>
    void multiply_values(const Type* values, const Type* next_keys, int row, int count) {
        int d = 0;
        for (; d + kVectors * kLanes <= dim_; d += kVectors * kLanes) {
            const bool ahead = row == 0 && d == 0 && next_keys;
            add_values<kGroup, kVectors>(values + d, ahead ? next_keys : nullptr, row, d, count);
        }
        for (; d + kLanes <= dim_; d += kLanes) add_values<kGroup, 1>(values + d, (const Type*)nullptr, row, d, count);
        if (d == dim_) return;
        for (int i = row; i < row + kGroup; ++i) {
            float* to = mixed_ + i * dim_ + d;
            vfloat sum = load_first(static_cast<const float*>(to), dim_ - d) * fade_[i];
            for (int k = 0; k < count; ++k) {
                sum += logits_[i * kKeyBlock + k] * load_first(values + k * problem_.values.stride + d, dim_ - d);
            }
            std::memcpy(to, &sum, sizeof(float) * size_t(dim_ - d));
        }
    }

    // mixed[row ..][d ..] := mixed * fade + weights * values, kGroup rows of kWide vectors.
    template <int kGroup, int kWide, class Type>
    __attribute__((noinline)) void add_values(const Type* values, const Type* next_keys, int row, int d, int count) {
        vfloat sum[kGroup][kWide];
#pragma GCC unroll 16
        for (int i = 0; i < kGroup; ++i) {
#pragma GCC unroll 16
            for (int v = 0; v < kWide; ++v) sum[i][v] = load(mixed_ + (row + i) * dim_ + d + v * kLanes) * fade_[row + i];
        }
        const float* weights = logits_ + row * kKeyBlock;
        for (int k = 0; k < count; ++k) {
            const Type* from = values + k * problem_.values.stride;
            if (next_keys) prefetch_row(next_keys + k * problem_.keys.stride, dim_);
#pragma GCC unroll 16
            for (int v = 0; v < kWide; ++v) {
                const vfloat value = load(from + v * kLanes);
#pragma GCC unroll 16
                for (int i = 0; i < kGroup; ++i) sum[i][v] += weights[i * kKeyBlock + k] * value;
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < kGroup; ++i) {
#pragma GCC unroll 16
            for (int v = 0; v < kWide; ++v) store(mixed_ + (row + i) * dim_ + d + v * kLanes, sum[i][v]);
        }
    }
};

}  // namespace lensc::LENSC_ISA
