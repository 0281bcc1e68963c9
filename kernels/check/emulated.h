// AVX-512 and AMX as functions, for a processor that has neither (`make check-avx512`): SIMDe's portable intrinsics, what it
// does not have, and tiles. Included before everything else; the kernels below it see the macros of those instruction sets.
// What this cannot show: speed, and what a compiler makes of the real instructions.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

namespace lensc {

inline __m256i emulated_cvtps_ph(__m512 x) {
    __m256 halves[2];
    std::memcpy(halves, &x, sizeof x);
    return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT));
}

// What is left above the floor; nothing of an infinity.
inline __m512 emulated_reduce(__m512 x) {
    for (int i = 0; i < 16; i++) x[i] = std::isinf(x[i]) ? 0 : x[i] - std::floor(x[i]);
    return x;
}

inline __m512i emulated_zext(__m128i x) {
    __m512i wide = {};
    std::memcpy(&wide, &x, sizeof x);
    return wide;
}

inline float emulated_float(uint16_t bfloat) {
    const uint32_t bits = static_cast<uint32_t>(bfloat) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// To the nearest bfloat16, ties to even; denormals become 0, as the instruction has it.
inline __m512i emulated_cvtne2ps(__m512 high, __m512 low) {
    uint16_t made[32];
    for (int i = 0; i < 32; i++) {
        const float x = i < 16 ? low[i] : high[i - 16];
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        if (std::isnan(x)) bits |= 0x400000;
        else if (!std::isnormal(x) && !std::isinf(x)) bits &= 0x80000000;
        else bits += 0x7fff + (bits >> 16 & 1);
        made[i] = static_cast<uint16_t>(bits >> 16);
    }
    __m512i all;
    std::memcpy(&all, made, sizeof all);
    return all;
}

struct EmulatedTile {
    uint8_t bytes[16][64];
    int64_t rows, row_bytes;
};
inline thread_local EmulatedTile emulated_tiles[8];

// As TileShapes of cpu/tiles.h.
class TileShapes {
  public:
    TileShapes& set(int tile, int64_t rows, int64_t row_bytes) {
        tiles_[tile] = {{}, rows, row_bytes};
        return *this;
    }
    void load() const { std::memcpy(emulated_tiles, tiles_, sizeof tiles_); }
    static void release() {
        for (EmulatedTile& tile : emulated_tiles) tile.rows = 0;
    }

  private:
    EmulatedTile tiles_[8] = {};
};

inline void emulated_zero(EmulatedTile& tile) { std::memset(tile.bytes, 0, sizeof tile.bytes); }
inline void emulated_load(EmulatedTile& tile, const void* from, int64_t stride) {
    emulated_zero(tile);
    for (int64_t r = 0; r < tile.rows; r++)
        std::memcpy(tile.bytes[r], static_cast<const uint8_t*>(from) + r * stride, static_cast<size_t>(tile.row_bytes));
}
inline void emulated_store(const EmulatedTile& tile, void* to, int64_t stride) {
    for (int64_t r = 0; r < tile.rows; r++)
        std::memcpy(static_cast<uint8_t*>(to) + r * stride, tile.bytes[r], static_cast<size_t>(tile.row_bytes));
}

// sums[m][n] += the sum over k of a[m][k] * b[k / 4][4 n + k % 4], of `A` and `B`; bfloat16: by two, and as float32.
template <class A, class B, class Sum>
void emulated_products(EmulatedTile& sums, const EmulatedTile& a, const EmulatedTile& b) {
    constexpr int64_t together = 4 / sizeof(A);
    const auto value = [](auto x) {
        if constexpr (sizeof x == 2) return emulated_float(x);
        else return static_cast<int32_t>(x);
    };
    for (int64_t m = 0; m < sums.rows; m++)
        for (int64_t n = 0; n < sums.row_bytes / 4; n++) {
            Sum sum;
            std::memcpy(&sum, sums.bytes[m] + n * 4, 4);
            for (int64_t k = 0; k < a.row_bytes / 4; k++)
                for (int64_t i = 0; i < together; i++) {
                    A left;
                    B right;
                    std::memcpy(&left, a.bytes[m] + (k * together + i) * static_cast<int64_t>(sizeof left), sizeof left);
                    std::memcpy(&right, b.bytes[k] + (n * together + i) * static_cast<int64_t>(sizeof right), sizeof right);
                    sum += value(left) * value(right);
                }
            std::memcpy(sums.bytes[m] + n * 4, &sum, 4);
        }
}

}  // namespace lensc

#undef _mm512_cvtps_ph
#undef _mm512_reduce_ps
#undef _mm512_zextsi128_si512
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtps_ph(x, rounding) lensc::emulated_cvtps_ph(x)
#define _mm512_reduce_ps(x, flags) lensc::emulated_reduce(x)
#define _mm512_zextsi128_si512(x) lensc::emulated_zext(x)
#define _mm512_cvtne2ps_pbh(high, low) lensc::emulated_cvtne2ps(high, low)

#define LENSC_TILE(tile) lensc::emulated_tiles[tile]
#define LENSC_TILE_ZERO(tile) lensc::emulated_zero(LENSC_TILE(tile))
#define LENSC_TILE_LOAD(tile, from, stride) lensc::emulated_load(LENSC_TILE(tile), from, stride)
#define LENSC_TILE_STORE(tile, to, stride) lensc::emulated_store(LENSC_TILE(tile), to, stride)
#define LENSC_TILE_U8S8(sums, a, b) \
    lensc::emulated_products<uint8_t, int8_t, int32_t>(LENSC_TILE(sums), LENSC_TILE(a), LENSC_TILE(b))
#define LENSC_TILE_S8S8(sums, a, b) \
    lensc::emulated_products<int8_t, int8_t, int32_t>(LENSC_TILE(sums), LENSC_TILE(a), LENSC_TILE(b))
#define LENSC_TILE_BF16(sums, a, b) \
    lensc::emulated_products<uint16_t, uint16_t, float>(LENSC_TILE(sums), LENSC_TILE(a), LENSC_TILE(b))

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512CD__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1
#define __AVX512VBMI__ 1
#if defined(LENSC_EMULATED_TILES)
#define __AVX512BF16__ 1
#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1
#endif
