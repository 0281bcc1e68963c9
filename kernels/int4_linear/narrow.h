// stream() and multiply() on vectors of 16 or 32 bytes: the structure of those on 64 bytes, included by cpu.cpp.
#pragma once
#include <algorithm>
#include <cstring>

#include "../cpu/bytes.h"
#include "streams.h"
#include "weights.h"

#if defined(LENSC_BYTES)

namespace lensc::LENSC_ISA {

// `Outputs` outputs, `apart` from each other, of `Rows` rows. WholeChunk: a chunk is one unit, and is summed as integers throughout.
template <int Bits, int Outputs, int Rows, bool WholeChunk>
inline void stream_outputs(const Int4LinearArgs& a, int64_t output, int64_t apart, int64_t row) {
    constexpr int planes = 8 / Bits, parts = chunk_bytes / vector_bytes;
    typedef Products<Bits> P;
    static_assert(planes * parts <= P::most, "a chunk is summed without a stop");
    const GroupWeight& w = a.weight;
    const int64_t row_bytes = w.row_bytes(), chunks = w.chunks(), groups = w.groups(), units = w.units();
    const int64_t padded = w.padded_inputs(), per_chunk = w.units_per_chunk(), unit_bytes = w.unit_bytes();
    const int64_t units_per_group = w.units_per_group();
    const uint8_t* values = w.values + output * row_bytes;
    const float* scales = w.scales + output * groups;
    const uint8_t flip = w.is_signed != bytes_are_signed ? 0x80 : 0;
    int shift = 0;
    while ((4 << shift) < unit_bytes) shift++;
    vfloat sums[Outputs][Rows] = {};
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t left = row_bytes - c * chunk_bytes;
        vbytes unpacked[Outputs][planes][parts];
        for (int o = 0; o < Outputs; o++) {
            const uint8_t* at = values + o * apart * row_bytes + c * chunk_bytes;
            __builtin_prefetch(at + fetched_ahead);
            uint8_t last[chunk_bytes];
            if (left < chunk_bytes) {
                std::memset(last, 0, sizeof last);
                std::memcpy(last, at, static_cast<size_t>(left));
                at = last;
            }
            for (int part = 0; part < parts; part++) {
                const vbytes packed = load_bytes(at + part * vector_bytes);
                for (int p = 0; p < planes; p++) unpacked[o][p][part] = plane_of_bytes<Bits>(packed, p, flip);
            }
        }
        const int8_t* x = a.x.values + row * padded + c * chunk_bytes * planes;
        const float* x_scales = a.x.scales + row * units;
        if (WholeChunk) {
            for (int r = 0; r < Rows; r++)
                for (int o = 0; o < Outputs; o++) {
                    typename P::Sum product = P::zero();
                    for (int p = 0; p < planes; p++)
                        for (int part = 0; part < parts; part++)
                            product = P::add(product, unpacked[o][p][part],
                                             load_bytes(x + r * padded + p * chunk_bytes + part * vector_bytes));
                    const float scale = x_scales[r * units + c] * scales[o * apart * groups + c / units_per_group];
                    sums[o][r] += to_floats(P::whole(product)) * scale;
                }
            continue;
        }
        for (int part = 0; part < parts; part++) {
            // units of a group each, or the only one there is
            const int64_t unit = std::min(c * per_chunk + part * vector_bytes / unit_bytes, units - 1);
            const auto of_lanes = [&](const float* first) {
                return unit_bytes >= vector_bytes ? splat(first[unit]) : lane_scales(first + unit, units - unit, shift);
            };
            vfloat scale[Outputs];
            for (int o = 0; o < Outputs; o++) scale[o] = of_lanes(scales + o * apart * groups);
            for (int r = 0; r < Rows; r++) {
                const vfloat x_scale = of_lanes(x_scales + r * units);
                for (int o = 0; o < Outputs; o++) {
                    typename P::Sum product = P::zero();
                    for (int p = 0; p < planes; p++)
                        product = P::add(product, unpacked[o][p][part],
                                         load_bytes(x + r * padded + p * chunk_bytes + part * vector_bytes));
                    sums[o][r] += to_floats(P::whole(product)) * (x_scale * scale[o]);
                }
            }
        }
    }
    for (int o = 0; o < Outputs; o++)
        for (int r = 0; r < Rows; r++) put_streamed(a, output + o * apart, row + r, reduce_add(sums[o][r]));
}

// c[32][Panels * 16], see multiply() in panels.h; values are of `Bits` bits at most.
template <int Bits, int Panels>
inline void multiply_bytes(const TileRange& t, const uint8_t* values, const int8_t* x, int32_t* c) {
    typedef Products<Bits> P;
    constexpr bool at_once = P::most >= 1 << 16;  // else sums are taken over before they overflow, to as many more
    constexpr int vectors = 64 / vector_bytes * Panels, together = vectors <= 4 && at_once ? 2 : 1;
    const int64_t most = std::min(P::most, 16) * 4;
    for (int64_t o = 0; o < 32; o += together) {
        vint whole[together][vectors] = {};
        typename P::Sum sums[together][vectors];
        const auto clear = [&] {
            for (auto& of_output : sums)
                for (auto& sum : of_output) sum = P::zero();
        };
        const auto take = [&] {
            for (int i = 0; i < together; i++)
                for (int v = 0; v < vectors; v++) whole[i][v] += P::whole(sums[i][v]);
        };
        clear();
        for (int64_t tile = 0; tile < t.chunks * t.planes; tile++) {
            const int8_t* of_x = x + tile / t.planes * t.x_apart + tile % t.planes * 1024;
            for (int64_t begin = 0; begin < t.bytes; begin += most) {
                for (int64_t b = begin; b < std::min(begin + most, t.bytes); b += 4) {
                    vbytes quads[vectors];
                    for (int v = 0; v < vectors; v++)
                        quads[v] = load_bytes(of_x + v * vector_bytes / 64 * t.planes * 1024 + b * 16 + v * vector_bytes % 64);
                    for (int i = 0; i < together; i++) {
                        const vbytes weight = repeat_quad(values + tile * t.tile_bytes + (o + i) * t.row_bytes + b);
                        for (int v = 0; v < vectors; v++) sums[i][v] = P::add(sums[i][v], weight, quads[v]);
                    }
                }
                if (!at_once) take(), clear();
            }
        }
        if (at_once) take();
        for (int i = 0; i < together; i++) std::memcpy(c + (o + i) * Panels * 16, whole[i], sizeof whole[i]);
    }
}

// A sum of products of whole bytes of weights: of a unit as integers, and of all units.
class ByteSums {
  public:
    void add(const uint8_t* values, const int8_t* x, int64_t count) {
        for (int64_t i = 0; i < count; i += vector_bytes) sum_ = Products<8>::add(sum_, load_bytes(values + i), load_bytes(x + i));
    }
    // Ends a unit, of which `too_much` was added.
    void end_unit(int32_t too_much, float scale) {
        vint lanes = Products<8>::whole(sum_);
        lanes[0] -= too_much;
        total_ += to_floats(lanes) * splat(scale);
        sum_ = Products<8>::zero();
    }
    float total() const { return reduce_add(total_); }

  private:
    Products<8>::Sum sum_ = Products<8>::zero();
    vfloat total_ = {};
};

}  // namespace lensc::LENSC_ISA

#endif
