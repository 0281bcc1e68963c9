// See peak.h. Compiled once per instruction set, included by cpu/table.cpp.
#include "peak.h"
#include "tiles.h"
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace lensc::LENSC_ISA {

// Sums enough of their own that none waits for the one before: units x latency, at most 2 x 5.
constexpr int independent_sums = 12;

// Calls add(sum) for every sum, `rounds` times, and keeps the sums in registers. The empty instruction reads and writes each of
// them, so that no round can be left out.
template <class Vector, class Add>
void repeat(int64_t rounds, Add add) {
    Vector sums[independent_sums] = {};
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (Vector& sum : sums) {
            sum = add(sum);
#if defined(LENSC_EMULATED)
            asm volatile("" : "+m"(sum));
#elif defined(__x86_64__)
            asm volatile("" : "+x"(sum));
#else
            asm volatile("" : "+w"(sum));
#endif
        }
    }
}

#if defined(__AMX_INT8__)

// `Multiply` does four products of tiles, which use all eight.
template <class Multiply>
int64_t multiply_tiles(int64_t rounds, int64_t inputs, Multiply multiply) {
    TileShapes shapes;
    for (int tile = 0; tile < 8; tile++) shapes.set(tile, 16, 64);
    shapes.load();  // which makes them zero
    for (int64_t round = 0; round < rounds; round++) multiply();
    TileShapes::release();
    return rounds * 4 * 2 * 16 * 16 * inputs;
}

#endif

// Operations of `rounds` rounds, two for a multiplication with its addition, by what multiplies fastest here: the work is done
// when it returns. 0: there is no instruction for such products.
int64_t multiply(Product product, [[maybe_unused]] int64_t rounds) {
    switch (product) {
        case Product::int8:
#if defined(__AMX_INT8__)
            return multiply_tiles(rounds, 64, [] {
                LENSC_TILE_S8S8(0, 4, 6);
                LENSC_TILE_S8S8(1, 4, 7);
                LENSC_TILE_S8S8(2, 5, 6);
                LENSC_TILE_S8S8(3, 5, 7);
            });
#elif defined(__AVX512VNNI__)
            repeat<__m512i>(rounds, [ones = _mm512_set1_epi8(1)](__m512i sum) {
                return _mm512_dpbusd_epi32(sum, ones, ones);
            });
            return rounds * independent_sums * 2 * 64;
#elif defined(__AVX2__)
            repeat<__m256i>(rounds, [bytes = _mm256_set1_epi8(1), words = _mm256_set1_epi16(1)](__m256i sum) {
                // of the sum's own bytes, so that the product is made anew each time
                const __m256i pairs = _mm256_maddubs_epi16(sum, bytes);
                return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, words));
            });
            return rounds * independent_sums * 2 * 32;
#elif defined(__ARM_FEATURE_DOTPROD)
            repeat<int32x4_t>(rounds, [ones = vdupq_n_s8(1)](int32x4_t sum) { return vdotq_s32(sum, ones, ones); });
            return rounds * independent_sums * 2 * 16;
#else
            return 0;
#endif
        case Product::int16:
#if defined(LENSC_WORDS)
            repeat<__m256i>(rounds, [ones = _mm256_set1_epi16(1)](__m256i sum) {
                // of the sum's own words, so that the product is made anew each time
                add_word_products(sum, sum, ones);
                return sum;
            });
            return rounds * independent_sums * 2 * 16;
#else
            return 0;
#endif
        case Product::bfloat16:
#if defined(__AMX_BF16__)
            return multiply_tiles(rounds, 32, [] {
                LENSC_TILE_BF16(0, 4, 6);
                LENSC_TILE_BF16(1, 4, 7);
                LENSC_TILE_BF16(2, 5, 6);
                LENSC_TILE_BF16(3, 5, 7);
            });
#else
            return 0;
#endif
        case Product::float32:
#if defined(__AVX512F__)
            repeat<__m512>(rounds, [half = _mm512_set1_ps(0.5F)](__m512 sum) { return _mm512_fmadd_ps(sum, half, half); });
            return rounds * independent_sums * 2 * 16;
#elif defined(__FMA__)
            repeat<__m256>(rounds, [half = _mm256_set1_ps(0.5F)](__m256 sum) { return _mm256_fmadd_ps(sum, half, half); });
            return rounds * independent_sums * 2 * 8;
#elif defined(__ARM_NEON)
            repeat<float32x4_t>(rounds, [half = vdupq_n_f32(0.5F)](float32x4_t sum) { return vfmaq_f32(half, sum, half); });
            return rounds * independent_sums * 2 * 4;
#else
            return 0;
#endif
    }
    return 0;
}

// Reads a share of `bytes` bytes in `streams` places at once; returns what depends on all of them. Nothing that lies behind
// the last whole line of 64 bytes is read.
uint64_t read(const uint8_t* data, int64_t bytes, int streams, Share share) {
    constexpr int64_t line = 64, ahead = 32 * line;
    const Range lines = range_of(bytes / line, 1, share);
    const int64_t of_each = (lines.end - lines.begin) / streams;
    const uint8_t* begin = data + lines.begin * line;
    uint64_t sums[8] = {};
    for (int64_t i = 0; i < of_each; i++) {
        for (int64_t s = 0; s < streams; s++) {
            const uint8_t* at = begin + (s * of_each + i) * line;
            __builtin_prefetch(at + ahead);
            const auto* words = reinterpret_cast<const uint64_t*>(at);
            for (int j = 0; j < 8; j++) sums[j] ^= words[j];
        }
    }
    uint64_t all = 0;
    for (const uint64_t sum : sums) all ^= sum;
    return all;
}

}  // namespace lensc::LENSC_ISA
