// Attention of all queries to all keys with products of int16, two of them summed to an int32, softmax in float32: AVX2 does 1.5
// times as many of these as of float32.
//
// A row of queries or of keys has a scale, and so has each dimension of the values of a block of keys. Their whole numbers are as
// large as it takes that no sum leaves an int32, whatever the inputs are: 13 bits with the sign, for values 12. A weight is a
// multiple of 2**-14, and the sum that is divided by is that of the multiples. A scale that is no finite number makes what it is
// a part of none.
#pragma once

#if defined(__AVX2__) && !defined(__AVX512F__)
#define LENSC_WORDS

#include <algorithm>
#include <cmath>

#include "blocks.h"

namespace lensc::LENSC_ISA {

// Two int16 that are neighbours in the dimension (queries, keys) or in the order of keys (weights, values).
typedef int32_t WordPair;

inline void add_word_products(__m256i& sum, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
    sum = _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    // as an instruction: the compilers copy sums from one register to another and back
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)));
#endif
}

// sums[4][16] = a [4 rows, a_row pairs apart] times b [pairs][16]. Not inlined: in a longer function the sums would not stay in
// the registers.
__attribute__((noinline)) inline void word_product(const WordPair* a, int64_t a_row, const WordPair* b, int pairs, int32_t* to) {
    __m256i sums[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    const __m256i* right = reinterpret_cast<const __m256i*>(b);
    for (int p = 0; p < pairs; ++p, right += 2) {
        const __m256i first = _mm256_load_si256(right), second = _mm256_load_si256(right + 1);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            const __m256i left = _mm256_set1_epi32(a[r * a_row + p]);
            add_word_products(sums[r][0], left, first);
            add_word_products(sums[r][1], left, second);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
        for (int v = 0; v < 2; ++v) _mm256_store_si256(reinterpret_cast<__m256i*>(to) + 2 * r + v, sums[r][v]);
}

struct WordCore {
    static constexpr int kQueries = 2 * kLanes;
    static constexpr int kKeyBlock = 64;
    static constexpr int kQueryBlock = 8 * kQueries;  // rows of queries for which a block of keys is read once
    static constexpr int kWeightBits = 14;
    static constexpr float kMostValue = float((1u << 31) / (unsigned(kKeyBlock) << kWeightBits) - 1);
    static constexpr int kAhead = 8;  // rows that are asked for before their turn: they lie far apart

    // 64 keys and their values.
    struct Block {
        WordPair* keys;       // [kKeyBlock][padded dim / 2]
        float* key_scales;    // [kKeyBlock]
        WordPair* values;     // [padded dim][kKeyBlock / 2]
        float* value_scales;  // [padded dim]
    };

    int dim, padded;      // the second a multiple of 16, as rows are written two vectors at a time
    float most;           // the largest whole number of a row of queries or keys
    WordPair* queries;    // [tiles][padded / 2][kQueries]
    float* query_scales;  // [tiles][kQueries], of logits in base 2
    float* mixed;         // [tiles][padded][kQueries]
    float* logits;        // [kKeyBlock][kQueries]
    WordPair* weights;    // [kKeyBlock / 2][kQueries]
    Softmax<kQueries>* softmax;  // [tiles]
    Panel panel;

    static int padded_of(int dim) { return round_up(dim, 2 * kLanes); }

    static size_t block_bytes(int dim) {
        return size_t(padded_of(dim)) * (2 * kKeyBlock * sizeof(int16_t) + sizeof(float)) + sizeof(float) * kKeyBlock;
    }

    static size_t scratch_bytes(int dim, int slots) {
        const size_t of_query = size_t(padded_of(dim)) * (sizeof(int16_t) + sizeof(float)) + sizeof(float);
        return kQueryBlock / kQueries * (kQueries * of_query + aligned(sizeof *softmax)) +
               kKeyBlock * kQueries * (sizeof(float) + sizeof(int16_t)) + size_t(slots) * block_bytes(dim);
    }

    WordCore(void* scratch, int dim, int slots)
        : dim(dim), padded(padded_of(dim)), most(float(least(32767, int(std::sqrt(2147483647.0 / dim))))) {
        constexpr int tiles = kQueryBlock / kQueries;
        char* at = static_cast<char*>(scratch);
        queries = reinterpret_cast<WordPair*>(at), at += sizeof(int16_t) * size_t(kQueryBlock * padded);
        query_scales = reinterpret_cast<float*>(at), at += sizeof(float) * kQueryBlock;
        mixed = reinterpret_cast<float*>(at), at += sizeof(float) * size_t(kQueryBlock * padded);
        softmax = reinterpret_cast<Softmax<kQueries>*>(at), at += tiles * aligned(sizeof *softmax);
        logits = reinterpret_cast<float*>(at), at += sizeof(float) * kKeyBlock * kQueries;
        weights = reinterpret_cast<WordPair*>(at), at += sizeof(int16_t) * kKeyBlock * kQueries;
        panel = Panel{at, slots};
    }

    void take_queries(const Problem& problem, int tile, int row, int valid) {
        softmax[tile].clear();
        WordPair* to = queries + int64_t(tile) * (padded / 2) * kQueries;
        // a row of whole numbers for each lane, where there is room for them until sums begin
        float* words = mixed + int64_t(tile) * padded * kQueries;
        for (int q = 0; q < kQueries; q += kLanes) {
            for (int lane = 0; lane < kLanes; ++lane) {
                // A row that is not there repeats the last one, whose logits are finite.
                const float* from = problem.query_row(row + least(q + lane, valid - 1));
                prefetch_row(problem.query_row(row + least(q + lane + kAhead, valid - 1)), dim);
                const float scale = quantize(from, reinterpret_cast<WordPair*>(words + lane * (padded / 2)));
                query_scales[tile * kQueries + q + lane] = scale * problem.scale * kLog2E;
            }
            for (int p = 0; p < padded / 2; p += kLanes) {
                __m256 turned[kLanes];
                for (int lane = 0; lane < kLanes; ++lane) turned[lane] = load(words + lane * (padded / 2) + p);
                turn_8x8(turned);
                for (int i = 0; i < kLanes; ++i) {
                    store(reinterpret_cast<float*>(to + (p + i) * kQueries + q), turned[i]);
                }
            }
        }
        std::memset(words, 0, sizeof(float) * size_t(padded) * kQueries);
    }

    Block keys(const Problem& problem, int first) {
        const auto at = [&](char* place) {
            const int64_t words = int64_t(kKeyBlock) * padded / 2;
            WordPair* of_keys = reinterpret_cast<WordPair*>(place);
            float* scales = reinterpret_cast<float*>(of_keys + 2 * words);
            return Block{of_keys, scales, of_keys + words, scales + kKeyBlock};
        };
        const int count = least(kKeyBlock, problem.count - first);
        return at(panel.block(problem.keys.data, first / kKeyBlock, block_bytes(dim), [&](char* place) {
            take_keys(problem, first, count, at(place));
            take_values(problem, first, count, at(place));
        }));
    }

    void add(const Problem& problem, const Block& block, int tile, int row, int valid, int first, int count) {
        float* sums = mixed + int64_t(tile) * padded * kQueries;
        alignas(32) int32_t products[4][kQueries];
        const vfloat query_scale[2] = {load(query_scales + tile * kQueries), load(query_scales + tile * kQueries + kLanes)};
        for (int k = 0; k < count; k += 4) {
            word_product(block.keys + k * (padded / 2), padded / 2, queries + int64_t(tile) * (padded / 2) * kQueries,
                         (dim + 1) / 2, products[0]);
            for (int r = 0; r < 4; ++r) {
                const vfloat key_scale = splat(block.key_scales[k + r]);
                for (int v = 0; v < 2; ++v) {
                    store(logits + (k + r) * kQueries + v * kLanes,
                          to_floats(products[r] + v * kLanes) * (query_scale[v] * key_scale));
                }
            }
        }
        Softmax<kQueries>& state = softmax[tile];
        state.take(problem, row, valid, first, count, logits, sums);
        weigh(state, count);
        for (int d = 0; d < dim; d += 4) {
            word_product(block.values + d * (kKeyBlock / 2), kKeyBlock / 2, weights, (count + 1) / 2, products[0]);
            for (int r = 0; r < 4; ++r) {
                const vfloat scale = splat(block.value_scales[d + r]);
                for (int v = 0; v < 2; ++v) {
                    float* sum = sums + (d + r) * kQueries + v * kLanes;
                    store(sum, load(sum) + to_floats(products[r] + v * kLanes) * scale);
                }
            }
        }
    }

    void finish(const Problem& problem, int tile, int row, int valid) {
        const float* sums = mixed + int64_t(tile) * padded * kQueries;
        for (int q = 0; q < valid; q += kLanes) {
            const vfloat inverse = 1.0f / load(softmax[tile].sum + q);
            for (int d = 0; d < dim; d += kLanes) {
                __m256 turned[kLanes];
                for (int i = 0; i < kLanes; ++i) turned[i] = load(sums + (d + i) * kQueries + q) * inverse;
                turn_8x8(turned);
                for (int i = 0; i < least(kLanes, valid - q); ++i) {
                    float* to = problem.output_row(row + q + i) + d;
                    if (d + kLanes <= dim) {
                        store(to, turned[i]);
                    } else {
                        std::memcpy(to, &turned[i], sizeof(float) * size_t(dim - d));
                    }
                }
            }
        }
    }

  private:
    static vfloat to_floats(const int32_t* integers) {
        return _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(integers)));
    }

    static __m256i magnitude(vfloat x) {
        return _mm256_and_si256(reinterpret_cast<__m256i>(x), _mm256_set1_epi32(0x7fffffff));
    }

    // Of the largest magnitude; as whole numbers, infinity is above all numbers, and what is no number above that.
    static float inverse_of(float largest, float most) {
        const float inverse = most / largest;
        return inverse < __builtin_inff() ? inverse : 0.0f;  // of 0, or denormal: whole numbers of 0
    }

    // The nearest whole numbers of 16 values times their factors, in order.
    static __m256i to_words(vfloat low, vfloat high) {
        const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
        return _mm256_permute4x64_epi64(words, 0xd8);
    }

    // A row of `dim` values to `padded` whole numbers; returns what these are to be multiplied with.
    float quantize(const float* row, WordPair* to) const {
        __m256i largest = _mm256_setzero_si256();
        for (int d = 0; d < dim; d += kLanes) largest = _mm256_max_epi32(largest, magnitude(load_row(row, d, dim)));
        alignas(32) float of_lanes[kLanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(of_lanes), largest);
        int32_t bits = 0;
        for (float lane : of_lanes) bits = std::max(bits, int32_t(float_bits(lane)));
        const float size = bits_float(uint32_t(bits));
        const vfloat inverse = splat(inverse_of(size, most));
        for (int d = 0; d < padded; d += 2 * kLanes) {
            const __m256i words = to_words(load_row(row, d, dim) * inverse, load_row(row, d + kLanes, dim) * inverse);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d / 2), words);
        }
        return size / most;
    }

    void take_keys(const Problem& problem, int first, int count, Block block) const {
        const float* row = static_cast<const float*>(problem.keys.data) + int64_t(first) * problem.keys.stride;
        for (int k = 0; k < count; ++k, row += problem.keys.stride) {
            if (k + kAhead < count) prefetch_row(row + kAhead * problem.keys.stride, dim);
            prefetch_row(static_cast<const float*>(problem.values.data) + (first + k) * problem.values.stride, dim);
            block.key_scales[k] = quantize(row, block.keys + int64_t(k) * (padded / 2));
        }
        for (int k = count; k % 4; ++k) {
            block.key_scales[k] = 0;
            std::memset(block.keys + int64_t(k) * (padded / 2), 0, sizeof(int16_t) * size_t(padded));
        }
    }

    // Values are turned: a dimension's whole numbers of all keys lie together.
    void take_values(const Problem& problem, int first, int count, Block block) const {
        const float* rows = static_cast<const float*>(problem.values.data) + int64_t(first) * problem.values.stride;
        const int64_t stride = problem.values.stride;
        int16_t* words = reinterpret_cast<int16_t*>(block.values);
        for (int d = 0; d < padded; d += kLanes) {
            __m256i largest = _mm256_setzero_si256();
            for (int k = 0; k < count; ++k) largest = _mm256_max_epi32(largest, magnitude(load_row(rows + k * stride, d, dim)));
            alignas(32) float of_lanes[kLanes], inverse[kLanes];
            _mm256_store_si256(reinterpret_cast<__m256i*>(of_lanes), largest);
            for (int lane = 0; lane < kLanes; ++lane) inverse[lane] = inverse_of(of_lanes[lane], kMostValue);
            store(block.value_scales + d, reinterpret_cast<vfloat>(largest) * (1 / kMostValue));
            for (int k = 0; k < kKeyBlock; k += kLanes) {
                __m256 turned[kLanes];
                for (int i = 0; i < kLanes; ++i) {
                    turned[i] = k + i < count ? load_row(rows + (k + i) * stride, d, dim) : splat(0.0f);
                }
                turn_8x8(turned);
                for (int i = 0; i < kLanes; ++i) {
                    const __m256i whole = _mm256_cvtps_epi32(turned[i] * splat(inverse[i]));
                    const __m128i of_keys = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(words + int64_t(d + i) * kKeyBlock + k), of_keys);
                }
            }
        }
    }

    // 2**(x + kWeightBits) as a whole number, for x <= 0: where it is below 1/2, it is 0. Relative error below 1e-4, of 2**14.
    static __m256i weight(vfloat x) {
        const vfloat bounded = max(x + float(kWeightBits), splat(-20.0f));
        // Adding 3 * 2**22 leaves the floor in the low bits of the mantissa.
        const vfloat shifted = (bounded - 0.5f) + 12582912.0f;
        const vfloat fraction = bounded - (shifted - 12582912.0f);
        return _mm256_cvtps_epi32(as_float(as_int(coarse_power(fraction)) + (as_int(shifted) << 23)));
    }

    // weights := those of `count` logits, two keys together, and 0 for a key behind them; adds them up.
    void weigh(Softmax<kQueries>& state, int count) {
        for (int v = 0; v < 2; ++v) {
            const vfloat most = load(state.most + v * kLanes);
            const float* from = logits + v * kLanes;
            __m256i sum = _mm256_setzero_si256();
            for (int k = 0; k < count; k += 2, from += 2 * kQueries) {
                const __m256i even = weight(load(from) - most);
                const __m256i odd = k + 1 < count ? weight(load(from + kQueries) - most) : _mm256_setzero_si256();
                sum = _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
                _mm256_store_si256(reinterpret_cast<__m256i*>(weights + k / 2 * kQueries + v * kLanes),
                                   _mm256_or_si256(even, _mm256_slli_epi32(odd, 16)));
            }
            float* total = state.sum + v * kLanes;
            store(total, load(total) + _mm256_cvtepi32_ps(sum));
        }
    }
};

}  // namespace lensc::LENSC_ISA

#endif
