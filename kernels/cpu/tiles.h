// AMX tile instructions. The compiler's own wrappers (gcc 12) do not tell it that they read memory, so it may keep in
// registers what a tile is about to load.
#pragma once
#if defined(__AMX_TILE__) && !defined(LENSC_EMULATED)
#include <cstdint>

namespace lensc {

// The shapes of the eight tiles while it lives: the state belongs to the thread, so a kernel brings its own.
class TileShapes {
  public:
    TileShapes& set(int tile, int64_t rows, int64_t row_bytes) {
        config_.rows[tile] = static_cast<uint8_t>(rows);
        config_.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
        return *this;
    }
    void load() const { asm volatile("ldtilecfg %0" ::"m"(config_)); }
    static void release() { asm volatile("tilerelease" ::: "memory"); }

  private:
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config_;
};

}  // namespace lensc

#define LENSC_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
#define LENSC_TILE_LOAD(tile, from, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(static_cast<const void*>(from)), "r"(int64_t(stride)) : "memory")
#define LENSC_TILE_STORE(tile, to, stride) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(static_cast<void*>(to)), "r"(int64_t(stride)) : "memory")
// sums += a * b: bytes (unsigned by signed, signed by signed) and bfloat16
#define LENSC_TILE_U8S8(sums, a, b) asm volatile("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::)
#define LENSC_TILE_S8S8(sums, a, b) asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::)
#define LENSC_TILE_BF16(sums, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::)

#endif
