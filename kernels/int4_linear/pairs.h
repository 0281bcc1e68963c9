// Weights with multiples where products of bytes are summed in pairs (AVX2 without VNNI). Included by integer_sums.h.
//
// vpmaddubsw multiplies values by inputs and adds two neighbours to an int16. A group's multiple comes in where those become
// int32: vpmaddwd multiplies by it and not by 1, which costs nothing, and values stay as small as they are.
#pragma once
#include <algorithm>
#include <cstring>

#include "../cpu/half.h"
#include "multiples.h"
#include "panels.h"
#include "streams.h"

#if defined(LENSC_PAIRS)

namespace lensc::LENSC_ISA {

// Outputs whose weights are read in turns, a unit each: their inputs stay in the first-level cache meanwhile.
constexpr int64_t turn_outputs = 32;

inline __m256i load_vector(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// --- few rows: weights stream past -----------------------------------------------------------------------------------

// The multiples of a chunk, for each pair of products of its two parts (32 bytes), whose lanes are 16 bytes.
struct PartMultiples {
    __m256i low, high;
};

// Which bytes of a chunk's multiples, as int16, each byte of a part takes: groups of one lane, or of two.
struct LaneOrder {
    alignas(32) uint8_t bytes[2][2][32];

    constexpr LaneOrder() : bytes() {
        for (int shift = 0; shift < 2; shift++)
            for (int part = 0; part < 2; part++)
                for (int i = 0; i < 32; i++)
                    bytes[shift][part][i] = static_cast<uint8_t>(2 * ((2 * part + i / 16) >> shift) + i % 2);
    }
};

template <bool Lanes>
struct MultiplesOfChunks {
    explicit MultiplesOfChunks(const GroupsOfChunks& groups) : groups_(groups) {}

    PartMultiples of(const int8_t* of_output, int64_t chunk, bool) const {
        const __m256i all = _mm256_set1_epi16(groups_.of_chunk(of_output, chunk));
        return {all, all};
    }

  private:
    const GroupsOfChunks groups_;
};

template <>
struct MultiplesOfChunks<true> {
    explicit MultiplesOfChunks(const GroupsOfChunks& groups) : groups_(groups) {
        static constexpr LaneOrder order;
        low_ = load_vector(order.bytes[groups.lane_shift][0]);
        high_ = load_vector(order.bytes[groups.lane_shift][1]);
    }

    // Of a chunk that ends behind the row, there are not all.
    PartMultiples of(const int8_t* of_output, int64_t chunk, bool is_whole) const {
        int32_t bytes = 0;
        if (!is_whole) {
            for (int lane = 0; lane < 4; lane++)
                bytes |= int32_t(uint8_t(groups_.of_lane(of_output, chunk, lane))) << ((lane >> groups_.lane_shift) * 8);
        } else if (groups_.lane_shift == 0) {
            std::memcpy(&bytes, of_output + chunk * 4, 4);
        } else {
            std::memcpy(&bytes, of_output + chunk * 2, 2);
        }
        const __m256i words = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(bytes)));
        return {_mm256_shuffle_epi8(words, low_), _mm256_shuffle_epi8(words, high_)};
    }

  private:
    const GroupsOfChunks groups_;
    __m256i low_, high_;
};

// Few rows of x, and where what they are multiplied with is.
struct Streamed {
    const GroupWeight& w;
    const GroupsOfChunks groups;
    const int64_t row_bytes, chunks, padded, units, per_unit;
    const int8_t* x;
    const float *scales, *corrections;

    Streamed(const Int4LinearArgs& a, int64_t row)
        : w(a.weight), groups(w), row_bytes(w.row_bytes()), chunks(w.chunks()), padded(w.padded_inputs()), units(w.units()),
          per_unit(w.unit_bytes() / chunk_bytes), x(a.x.values + row * padded), scales(a.x.scales + row * units),
          corrections(a.x.corrections + row * w.groups()) {}
};

// sums += `Outputs` outputs, `apart` from each other, times `Rows` rows of x, `x_apart` from each other: products of the chunks of
// some units, the first of which x points to.
template <int Bits, bool Lanes, int Outputs, int Rows, class Fetch>
inline void multiply_units(const Streamed& s, int64_t output, int64_t apart, const int8_t* x, int64_t x_apart, Range units,
                           Fetch fetch, vfloat (*sums)[Rows]) {
    constexpr int planes = 8 / Bits;
    typedef Products<Bits> P;
    static_assert(2 * planes <= P::most, "a chunk is summed without a stop");
    // copies: for all that the compiler knows, what is stored in between might be they
    const MultiplesOfChunks<Lanes> of_chunks(s.groups);
    const int64_t values_apart = apart * s.row_bytes, multiples_apart = apart * s.groups.groups;
    const int64_t per_unit = s.per_unit, chunks = s.chunks, all_units = s.units, whole_chunks = s.row_bytes / chunk_bytes;
    const int8_t* multiples = s.groups.of_output(output);
    const float* scales = s.scales;
    const int64_t begin = units.begin * per_unit;
    const uint8_t* values = s.w.values + output * s.row_bytes + begin * chunk_bytes;
    __m256i whole[Outputs][Rows];
    const auto multiply_chunk = [&](int64_t c, const uint8_t* at, int64_t at_apart, bool is_whole) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int o = 0; o < Outputs; o++) {
            __m256i unpacked[2][planes];
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++)
#pragma GCC unroll 4
                for (int p = 0; p < planes; p++)
                    unpacked[part][p] = plane_of_bytes<Bits>(load_bytes(at + o * at_apart + part * 32), p, 0);
            const PartMultiples m = of_chunks.of(multiples + o * multiples_apart, c, is_whole);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++) {
                const auto quads = [&](int part, int p) { return load_vector(x + r * x_apart + p * chunk_bytes + part * 32); };
                __m256i pairs = _mm256_maddubs_epi16(unpacked[0][0], quads(0, 0));
#pragma GCC unroll 4
                for (int p = 1; p < planes; p++) pairs = P::add(pairs, unpacked[0][p], quads(0, p));
                if (Lanes) {
                    whole[o][r] = _mm256_add_epi32(whole[o][r], _mm256_madd_epi16(pairs, m.low));
                    asm("" : "+x"(whole[o][r]));
                    pairs = _mm256_maddubs_epi16(unpacked[1][0], quads(1, 0));
                } else {
                    pairs = P::add(pairs, unpacked[1][0], quads(1, 0));
                }
#pragma GCC unroll 4
                for (int p = 1; p < planes; p++) pairs = P::add(pairs, unpacked[1][p], quads(1, p));
                whole[o][r] = _mm256_add_epi32(whole[o][r], _mm256_madd_epi16(pairs, m.high));
                asm("" : "+x"(whole[o][r]));  // stays in its register
            }
        }
    };
    for (int64_t u = units.begin, c = begin; u < units.end; u++) {
        const int64_t end = std::min(c + per_unit, chunks), whole_end = std::min(end, whole_chunks);
#pragma GCC unroll 8
        for (int o = 0; o < Outputs; o++)
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++) whole[o][r] = _mm256_setzero_si256();
        for (; c < whole_end; c++, values += chunk_bytes, x += planes * chunk_bytes) {
            fetch(values, c - begin);
            multiply_chunk(c, values, values_apart, true);
        }
        if (c < end) {
            uint8_t last[Outputs][chunk_bytes] = {};
            for (int o = 0; o < Outputs; o++)
                std::memcpy(last[o], values + o * values_apart, static_cast<size_t>(s.row_bytes - c * chunk_bytes));
            multiply_chunk(c, last[0], chunk_bytes, false);
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            const vfloat scale = splat(scales[r * all_units + u]);
#pragma GCC unroll 8
            for (int o = 0; o < Outputs; o++) sums[o][r] += vfloat(_mm256_cvtepi32_ps(whole[o][r])) * scale;
        }
    }
}

// The sums of an output to y: less what zero points took part in.
template <int Rows>
inline void put_corrected(const Int4LinearArgs& a, const Streamed& s, int64_t output, int64_t row, const vfloat* sums) {
    const int8_t* of_output = s.groups.of_output(output);
    const int64_t groups = s.groups.groups;
    vfloat total[Rows];
    for (int r = 0; r < Rows; r++) total[r] = sums[r];
    int64_t g = 0;
    for (; g + kLanes <= groups; g += kLanes) {
        const vfloat multiples = load(of_output + g);
        for (int r = 0; r < Rows; r++) total[r] -= multiples * load(s.corrections + r * groups + g);
    }
    if (g < groups) {
        const auto left = static_cast<int>(groups - g);
        const vfloat multiples = load_first(of_output + g, left);
        for (int r = 0; r < Rows; r++) total[r] -= multiples * load_first(s.corrections + r * groups + g, left);
    }
    for (int r = 0; r < Rows; r++) put_sum(a, output, row + r, reduce_add(total[r]));
}

// One or two rows: outputs that lie far apart, so that as many streams are read.
template <int Bits, bool Lanes, int Outputs, int Rows>
inline void stream_apart(const Int4LinearArgs& a, const Streamed& s, int64_t output, int64_t apart, int64_t row) {
    vfloat sums[Outputs][Rows] = {};
    const auto fetch = [step = apart * s.row_bytes](const uint8_t* at, int64_t) {
#pragma GCC unroll 4
        for (int o = 0; o < Outputs; o++) __builtin_prefetch(at + o * step + fetched_ahead);
    };
    multiply_units<Bits, Lanes, Outputs, Rows>(s, output, apart, s.x, s.padded, {0, s.units}, fetch, sums);
    for (int o = 0; o < Outputs; o++) put_corrected<Rows>(a, s, output + o * apart, row, sums[o]);
}

// More rows: some outputs take turns, some units each, so that their inputs stay in the first-level cache. More than four rows are
// copied: where they lie a multiple of 4096 bytes apart, they would share few sets of it.
template <int Bits, bool Lanes, int Rows>
void stream_in_turns(const Int4LinearArgs& a, const Streamed& s, Range outputs, int64_t row) {
    constexpr bool copied = Rows > 4;
    constexpr int64_t turn_inputs = 16384 / Rows / chunk_bytes * chunk_bytes, most_inputs = std::max(turn_inputs, span_inputs);
    const int64_t of_turn = std::max<int64_t>(1, turn_inputs / s.w.unit()), turn_bytes = of_turn * s.per_unit * chunk_bytes;
    const int64_t x_apart = copied ? most_inputs + chunk_bytes : s.padded;
    alignas(64) int8_t copies[copied ? Rows * (most_inputs + chunk_bytes) : 1];
    vfloat sums[turn_outputs][Rows] = {};
    for (int64_t u = 0; u < s.units; u += of_turn) {
        const int8_t* x = s.x + u * s.w.unit();
        if (copied) {
            const auto count = static_cast<size_t>(std::min(of_turn * s.w.unit(), s.padded - u * s.w.unit()));
            for (int r = 0; r < Rows; r++) std::memcpy(copies + r * x_apart, x + r * s.padded, count);
            x = copies;
        }
        for (int64_t o = outputs.begin; o < outputs.end; o++) {
            // what this output's turn needs next: its next units, or the first of the output that takes its place
            const uint8_t* next = s.w.values + (u + of_turn < s.units ? o * s.row_bytes + (u / of_turn + 1) * turn_bytes
                                                                      : (o + turn_outputs) * s.row_bytes);
            const auto fetch = [next](const uint8_t*, int64_t c) { __builtin_prefetch(next + c * chunk_bytes); };
            const Range units = {u, std::min(u + of_turn, s.units)};
            multiply_units<Bits, Lanes, 1, Rows>(s, o, 0, x, x_apart, units, fetch, &sums[o - outputs.begin]);
        }
    }
    for (int64_t o = outputs.begin; o < outputs.end; o++) put_corrected<Rows>(a, s, o, row, sums[o - outputs.begin]);
}

template <int Bits, bool Lanes, int Rows>
void stream_pairs(const Int4LinearArgs& a, Range outputs, int64_t row) {
    const Streamed s(a, row);
    if (Rows <= 2)
        return stream_rows<Rows>(outputs, row, [&](auto at_once, auto, int64_t output, int64_t apart, int64_t) {
            stream_apart<Bits, Lanes, decltype(at_once)::value, Rows>(a, s, output, apart, row);
        });
    for (int64_t o = outputs.begin; o < outputs.end; o += turn_outputs)
        stream_in_turns<Bits, Lanes, Rows>(a, s, {o, std::min(o + turn_outputs, outputs.end)}, row);
}

// --- many rows: panels ------------------------------------------------------------------------------------------------

// Bytes of each plane whose products are summed as pairs: (value - zero point) * x of 64 inputs just fits in an int16, and what
// a sum begins with takes the zero points off. It may leave its range in between.
template <int Bits, bool Lanes>
constexpr int64_t piece_bytes = Bits == 4 && !Lanes ? 32 : 16;

// What sums of pairs begin with: all products with the zero point, of a piece and `Vectors` times eight rows.
template <int Bits, int64_t Piece, int Vectors>
inline void begin_pairs(const int8_t* x, __m256i* sums) {
    constexpr int planes = 8 / Bits;
    const __m256i zero_point = _mm256_set1_epi8(1 << (Bits - 1));
    for (int v = 0; v < Vectors; v++) {
        __m256i sum = _mm256_setzero_si256();
        for (int p = 0; p < planes; p++)
            for (int64_t b = 0; b < Piece; b += 4)
                sum = _mm256_sub_epi16(
                    sum, _mm256_maddubs_epi16(zero_point, load_vector(x + (v / 2 * planes + p) * 1024 + b * 16 + v % 2 * 32)));
        sums[v] = sum;
    }
}

// What an output and a piece of `Vectors` times eight rows make: products with its multiple as int32, added to `whole` or in its
// place.
template <int Bits, int64_t Piece, int Vectors>
inline void multiply_piece(const uint8_t* values, int16_t multiple, const int8_t* x, const __m256i* begun, bool is_first,
                           __m256i* whole) {
    constexpr int planes = 8 / Bits;
    typedef Products<Bits> P;
    asm("" : "+r"(x));  // read where it lies: what is the same for each output is not copied ahead of them
    __m256i sums[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++) sums[v] = begun[v];
#pragma GCC unroll 4
    for (int p = 0; p < planes; p++)
#pragma GCC unroll 8
        for (int64_t b = 0; b < Piece; b += 4) {
            const __m256i weight = repeat_quad(values + p * chunk_bytes + b);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; v++)
                sums[v] = P::add(sums[v], weight, load_vector(x + (v / 2 * planes + p) * 1024 + b * 16 + v % 2 * 32));
        }
    const __m256i multiples = _mm256_set1_epi16(multiple);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++) {
        const __m256i made = _mm256_madd_epi16(sums[v], multiples);
        whole[v] = is_first ? made : _mm256_add_epi32(whole[v], made);
    }
}

// A unit of 32 outputs, unpacked, and of each output the multiples of its pieces.
template <int64_t Pieces>
struct UnpackedUnit {
    alignas(64) uint8_t values[block_outputs][unpacked_bytes];
    int16_t multiples[block_outputs][Pieces];
};

// sums[32][8 * Vectors] += 32 outputs times `Vectors` times eight rows of x, of a unit of `chunks` chunks.
template <int Bits, int64_t Piece, int Vectors, class Unit>
void multiply_pieces(const Unit& unit, int64_t chunks, const int8_t* x, int64_t x_apart, const float* x_scales, bool is_first,
                     float* sums) {
    constexpr int planes = 8 / Bits;
    constexpr int64_t per_chunk = chunk_bytes / Piece, lines = Vectors * planes * Piece / 8;  // of a cache, of a piece of x
    __m256i whole[block_outputs][Vectors], begun[Vectors];
    for (int64_t c = 0; c < chunks; c++)
        for (int64_t i = 0; i < per_chunk; i++) {
            const int8_t* of_piece = x + c * x_apart + i * Piece * 16;
            const int8_t* next = x + (i + 1 < per_chunk ? c * x_apart + (i + 1) * Piece * 16
                                      : c + 1 < chunks  ? (c + 1) * x_apart
                                                        : Vectors / 2 * planes * 1024);
            begin_pairs<Bits, Piece, Vectors>(of_piece, begun);
            for (int64_t o = 0; o < block_outputs; o++) {
                for (int64_t line = o * lines / block_outputs; line < (o + 1) * lines / block_outputs; line++)
                    __builtin_prefetch(next + line / (Piece / 4) * 1024 + line % (Piece / 4) * 64);
                multiply_piece<Bits, Piece, Vectors>(unit.values[o] + c * planes * chunk_bytes + i * Piece,
                                                     unit.multiples[o][c * per_chunk + i], of_piece, begun, c + i == 0, whole[o]);
            }
        }
    for (int64_t o = 0; o < block_outputs; o++)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; v++, sums += kLanes) {
            const vfloat made = _mm256_cvtepi32_ps(whole[o][v]) * load(x_scales + v * kLanes);
            store(sums, is_first ? made : load(sums) + made);
        }
}

// Panels that are multiplied at once.
constexpr int64_t panels_at_once = 4;

// 32 outputs of a block of panels.
template <int Bits, bool Lanes>
void multiply_pairs(const Int4LinearArgs& a, int64_t output, int64_t block) {
    constexpr int64_t planes = 8 / Bits, piece = piece_bytes<Bits, Lanes>, per_chunk = chunk_bytes / piece;
    constexpr int64_t most = span_inputs / (planes * piece), lanes = panels_at_once * panel_rows;
    const GroupWeight& w = a.weight;
    const GroupsOfChunks groups(w);
    const int64_t chunks = w.chunks(), units = w.units(), per_unit = w.unit_bytes() / chunk_bytes, row_bytes = w.row_bytes();
    const int64_t first = a.x.first_panel(block), panels = a.x.first_panel(block + 1) - first;
    const int64_t outputs = std::min(block_outputs, w.outputs - output);
    const int8_t* x = a.x.values + first * panel_rows * w.padded_inputs();
    const float* x_scales = a.x.scales + first * panel_rows * units;
    UnpackedUnit<most> unit;
    alignas(64) float sums[most_panels / panels_at_once][block_outputs * lanes];
    if (outputs < block_outputs) std::memset(&unit, 0, sizeof unit);
    for (int64_t u = 0; u < units; u++) {
        const int64_t begin = u * per_unit, count = std::min(per_unit, chunks - begin);
        for (int64_t o = 0; o < outputs; o++) {
            const uint8_t* at = w.values + (output + o) * row_bytes + begin * chunk_bytes;
            const int8_t* of_output = groups.of_output(output + o);
            for (int64_t c = 0; c < count; c++, at += chunk_bytes) {
                __builtin_prefetch(at + block_outputs * row_bytes, 0, 2);  // to the second level: the first is full
                unpack(w, at, std::min(chunk_bytes, row_bytes - (begin + c) * chunk_bytes),
                       unit.values[o] + c * planes * chunk_bytes, chunk_bytes);
                for (int64_t i = 0; i < per_chunk; i++)
                    unit.multiples[o][c * per_chunk + i] =
                        Lanes ? groups.of_lane(of_output, begin + c, static_cast<int>(i * piece / 16))
                              : groups.of_chunk(of_output, begin + c);
            }
        }
        for (int64_t p = 0; p < panels; p += panels_at_once) {
            const auto multiply = [&](auto at_once) {
                multiply_pieces<Bits, piece, 2 * decltype(at_once)::value>(
                    unit, count, x + (begin * panels + p) * planes * 1024, panels * planes * 1024,
                    x_scales + (u * panels + p) * panel_rows, u == 0, sums[p / panels_at_once]);
            };
            switch (std::min(panels_at_once, panels - p)) {
                case 1: multiply(Constant<1>()); break;
                case 2: multiply(Constant<2>()); break;
                case 3: multiply(Constant<3>()); break;
                default: multiply(Constant<4>()); break;
            }
        }
    }
    put_block<panels_at_once>(a, output, first, panels, sums[0]);
}

}  // namespace lensc::LENSC_ISA

#endif
