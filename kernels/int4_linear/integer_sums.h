// int4_linear for weights with multiples: inputs that were rounded together are summed as integers. Included by cpu.cpp.
#pragma once
#include <algorithm>

#include "multiples.h"
#include "pairs.h"
#include "panels.h"
#include "streams.h"

namespace lensc::LENSC_ISA {

#if !defined(__AVX512VNNI__) && !defined(LENSC_BYTES)

// A sum of products of whole bytes of weights: of a unit as integers, and of all units.
class ByteSums {
  public:
    void add(const uint8_t* values, const int8_t* x, int64_t count) {
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; i++) sum += int32_t(values[i]) * x[i];
        sum_ += sum;
    }
    // Ends a unit, of which `too_much` was added.
    void end_unit(int32_t too_much, float scale) {
        total_ += static_cast<float>(sum_ - too_much) * scale;
        sum_ = 0;
    }
    float total() const { return total_; }

  private:
    int32_t sum_ = 0;
    float total_ = 0;
};

#endif

// --- few rows: weights stream past -----------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)

// `Outputs` outputs, `apart` from each other, of `Rows` rows.
template <int Bits, bool Lanes, int Outputs, int Rows>
inline void stream_apart(const Int4LinearArgs& a, const GroupsOfChunks& groups, int64_t output, int64_t apart, int64_t row) {
    constexpr int planes = 8 / Bits;
    const GroupWeight& w = a.weight;
    const int64_t row_bytes = w.row_bytes(), chunks = w.chunks(), padded = w.padded_inputs();
    const int64_t units = w.units(), per_unit = w.unit_bytes() / chunk_bytes;
    const uint8_t* values = w.values + output * row_bytes;
    const int8_t* x = a.x.values + row * padded;
    const int8_t* multiples = groups.of_output(output);
    // All loops over outputs and rows are unrolled, or the compiler keeps the sums in memory.
    __m512 sums[Outputs][Rows];
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; o++)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) sums[o][r] = _mm512_setzero_ps();
    for (int64_t u = 0, c = 0; u < units; u++) {
        __m512i products[Outputs][Rows];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            const __m128i too_much = _mm_cvtsi32_si128(-offset_of(a.x.sums[(row + r) * units + u]));
#pragma GCC unroll 8
            for (int o = 0; o < Outputs; o++) products[o][r] = _mm512_zextsi128_si512(too_much);
        }
        for (const int64_t end = std::min(c + per_unit, chunks); c < end; c++) {
            const __mmask64 held = held_of(row_bytes - c * chunk_bytes);
            __m512i weights[Outputs][planes];
#pragma GCC unroll 8
            for (int o = 0; o < Outputs; o++) {
                const uint8_t* at = values + o * apart * row_bytes + c * chunk_bytes;
                __builtin_prefetch(at + fetched_ahead);
                const __m512i packed = _mm512_maskz_loadu_epi8(held, at);
                const __m512i tables = tables_of<Bits, Lanes>(groups, multiples + o * apart * groups.groups, c);
#pragma GCC unroll 4
                for (int p = 0; p < planes; p++) weights[o][p] = multiplied<Bits>(tables, packed, p);
            }
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
                for (int p = 0; p < planes; p++) {
                    const __m512i quads = _mm512_loadu_si512(x + r * padded + (c * planes + p) * chunk_bytes);
#pragma GCC unroll 8
                    for (int o = 0; o < Outputs; o++)
                        products[o][r] = _mm512_dpbusd_epi32(products[o][r], weights[o][p], quads);
                }
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            const __m512 scale = _mm512_set1_ps(a.x.scales[(row + r) * units + u]);
#pragma GCC unroll 8
            for (int o = 0; o < Outputs; o++)
                sums[o][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[o][r]), scale, sums[o][r]);
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; o++)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) put_sum(a, output + o * apart, row + r, _mm512_reduce_add_ps(sums[o][r]));
}

#elif !defined(LENSC_PAIRS)

// One output of `rows` rows.
template <int Bits, bool Lanes>
inline void stream_output(const Int4LinearArgs& a, const GroupsOfChunks& groups, int64_t output, int64_t row, int64_t rows) {
    constexpr int64_t bytes = 8 / Bits * chunk_bytes;
    const GroupWeight& w = a.weight;
    const int64_t chunks = w.chunks(), units = w.units(), per_unit = w.unit_bytes() / chunk_bytes;
    const uint8_t* at = w.values + output * w.row_bytes();
    alignas(64) uint8_t values[bytes];
    ByteSums sums[most_streamed_rows];
    for (int64_t u = 0, c = 0; u < units; u++) {
        for (const int64_t end = std::min(c + per_unit, chunks); c < end; c++, at += chunk_bytes) {
            unpack_multiplied<Bits, Lanes>(groups, output, c, 1, at, w.row_bytes() - c * chunk_bytes, values);
            for (int64_t r = 0; r < rows; r++)
                sums[r].add(values, a.x.values + (row + r) * w.padded_inputs() + c * bytes, bytes);
        }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t unit = (row + r) * units + u;
            sums[r].end_unit(offset_of(a.x.sums[unit]), a.x.scales[unit]);
        }
    }
    for (int64_t r = 0; r < rows; r++) put_sum(a, output, row + r, sums[r].total());
}

#endif

template <int Bits, bool Lanes>
void stream_multiples(const Int4LinearArgs& a, Range outputs) {
#if defined(LENSC_PAIRS)
    stream_by_rows(a.x.rows, [&](auto rows, int64_t row) { stream_pairs<Bits, Lanes, decltype(rows)::value>(a, outputs, row); });
#elif defined(__AVX512VNNI__)
    const GroupsOfChunks groups(a.weight);
    stream_past(a.x.rows, outputs, [&](auto at_once, auto rows, int64_t output, int64_t apart, int64_t row) {
        stream_apart<Bits, Lanes, decltype(at_once)::value, decltype(rows)::value>(a, groups, output, apart, row);
    });
#else
    const GroupsOfChunks groups(a.weight);
    for (int64_t row = 0; row < a.x.rows; row += most_streamed_rows)
        for (int64_t o = outputs.begin; o < outputs.end; o++)
            stream_output<Bits, Lanes>(a, groups, o, row, std::min(most_streamed_rows, a.x.rows - row));
#endif
}

// --- many rows: panels ------------------------------------------------------------------------------------------------

#if defined(LENSC_PAIRS)

template <int Bits, bool Lanes>
void multiply_multiples(const Int4LinearArgs& a, Range outputs, int64_t block) {
    for (int64_t output = outputs.begin; output < outputs.end; output += block_outputs)
        multiply_pairs<Bits, Lanes>(a, output, block);
}

#else

// Products of a unit and a pair of panels (or the last alone) on their way to sums: sums += (products - too much) * scale.
struct PendingUnit {
    const int32_t* products = nullptr;  // [32][lanes]
    float* sums = nullptr;              // as products
    int64_t lanes = 0;
    bool is_first = false;  // sums are made, not added to
    int64_t next = block_outputs;
    alignas(64) float scales[32];
    int32_t too_much[32];

    // What belongs to unit `unit` and panel `panel` of a block of `panels`, whose scales and sums begin at `block`.
    void begin(const int32_t* made, float* to, int64_t pair, const QuantizedRows& x, int64_t block, int64_t panels, int64_t unit,
               int64_t panel) {
        products = made, sums = to, lanes = pair * panel_rows, is_first = unit == 0, next = 0;
        const int64_t at = block + (unit * panels + panel) * panel_rows;
        std::memcpy(scales, x.scales + at, static_cast<size_t>(lanes) * sizeof(float));
        for (int64_t r = 0; r < lanes; r++) too_much[r] = offset_of(x.sums[at + r]);
    }

    void add_up_to(int64_t output) {
        for (int64_t lane = 0; lane < lanes; lane += panel_rows) {
            int32_t taken[16];  // of a panel, as its scales in registers
            float scale[16];
            std::memcpy(taken, too_much + lane, sizeof taken);
            std::memcpy(scale, scales + lane, sizeof scale);
            for (int64_t o = next; o < output; o++) {
                const int32_t* from = products + o * lanes + lane;
                float* to = sums + o * lanes + lane;
#pragma omp simd
                for (int r = 0; r < 16; r++)
                    to[r] = (is_first ? 0.0f : to[r]) + static_cast<float>(from[r] - taken[r]) * scale[r];
            }
        }
        next = std::max(next, output);
    }
};

// A pair of panels (or the last alone), of which its 16 x 16 parts are turned and put one by one once sums are complete.
struct FinishedPair {
    const Int4LinearArgs& a;
    const float* sums = nullptr;  // [32][16 * panels]
    int64_t output = 0, panel = 0, panels = 0;
    int64_t next = 0;  // part: outputs first

    bool is_left() const { return sums && next < 2 * panels; }

    void put_next() {
        const int64_t o = next / panels * 16, p = next % panels, lanes = 16 * panels;
        next++;
        if (output + o >= a.weight.outputs) return;
        put_panel(a, Ending(a, output + o), sums + o * lanes + p * 16, lanes, output + o, panel + p);
    }

    // The lines of y that a row of the pair will be put to.
    void fetch(int64_t row) const {
        const int64_t at = panel * panel_rows + row;
        if (at >= a.x.rows) return;
        __builtin_prefetch(a.y + at * a.weight.outputs + output, 1);
        __builtin_prefetch(a.y + at * a.weight.outputs + output + 16, 1);
    }

    void become(const FinishedPair& other) {
        while (is_left()) put_next();
        sums = other.sums, output = other.output, panel = other.panel, panels = other.panels, next = 0;
    }
};

// All outputs of a share with a block of panels. While tiles are busy, the vector units do what comes before and after: the
// next span is unpacked and the one behind it fetched, the last unit is added to its sums, and finished sums are put.
template <int Bits, bool Lanes>
void multiply_multiples(const Int4LinearArgs& a, Range outputs, int64_t block) {
    constexpr int64_t planes = 8 / Bits, per_span = span_inputs / (planes * chunk_bytes);
    const GroupWeight& w = a.weight;
    const GroupsOfChunks groups(w);
    const int64_t chunks = w.chunks(), spans = (chunks + per_span - 1) / per_span, row_bytes = w.row_bytes();
    const int64_t per_unit = w.unit_bytes() / chunk_bytes, units = w.units();
    const int64_t first = a.x.first_panel(block), panels = a.x.first_panel(block + 1) - first;
    const int8_t* x = a.x.values + first * panel_rows * w.padded_inputs();
    alignas(64) uint8_t values[2][block_outputs * unpacked_bytes];
    alignas(64) int32_t products[2][32 * 32];
    alignas(64) float sums[2][most_panels / 2][32 * 32];  // of the outputs that are summed, and of those before them
    if (w.outputs % block_outputs) std::memset(values, 0, sizeof values);

    struct At {
        int64_t output, span;
    };
    const auto next_of = [&](At at) {
        return at.span + 1 < spans ? At{at.output, at.span + 1} : At{at.output + block_outputs, 0};
    };
    const auto chunks_of = [&](At at) { return std::min(per_span, chunks - at.span * per_span); };
    // Up to `count` chunks of an output of a span, from its chunk c on.
    const auto unpack = [&](At at, int64_t o, int64_t c, int64_t count, uint8_t* to) {
        const int64_t chunk = at.span * per_span + c, from = (at.output + o) * row_bytes + chunk * chunk_bytes;
        unpack_multiplied<Bits, Lanes>(groups, at.output + o, chunk, std::min(count, chunks_of(at) - c), w.values + from,
                                       row_bytes - chunk * chunk_bytes, to + o * unpacked_bytes + c * planes * chunk_bytes);
    };

    At now{outputs.begin, 0};
    for (int64_t o = 0; o < std::min(block_outputs, w.outputs - now.output); o++) unpack(now, o, 0, per_span, values[0]);
    // What lies 32 outputs ahead is fetched in the order in which it lies, which the hardware goes on with by itself.
    const uint8_t* fetched = w.values + (now.output + block_outputs) * row_bytes;
    const uint8_t* const end = w.values + outputs.end * row_bytes;
    const int64_t block_tiles = chunks * planes * ((panels + 1) / 2);
    const int64_t fetched_at_once = (block_outputs * row_bytes + block_tiles * 64 - 1) / (block_tiles * 64) * 64;
    PendingUnit pending;
    FinishedPair pending_pair{a}, finished{a};  // the first has sums once the pending unit is its last
    const auto end_pending = [&] {
        pending.add_up_to(block_outputs);
        if (!pending_pair.sums) return;
        finished.become(pending_pair);
        pending_pair.sums = nullptr;
    };
    int64_t filled = 0, made = 0, summed = 0;  // the buffers in use
    for (; now.output < outputs.end; filled ^= 1) {
        const At next = next_of(now);
        const int64_t here = chunks_of(now), tiles = here * planes, steps = tiles * ((panels + 1) / 2);
        const bool is_last = next.span == 0;
        // A few chunks beside each tile: more at once, and tiles would wait for them.
        const int64_t to_unpack = next.output < outputs.end ? std::min(block_outputs, w.outputs - next.output) : 0;
        const int64_t pauses = std::max<int64_t>(1, steps / block_outputs);  // of tiles, for an output
        const int64_t at_once = (chunks_of(next) + pauses - 1) / pauses;
        int64_t o = 0, c = 0;
        for (int64_t p = 0; p < panels; p += 2) {
            const FinishedPair pair{a, sums[summed][p / 2], now.output, first + p, std::min<int64_t>(2, panels - p)};
            for (int64_t from = 0; from < here; from += per_unit, made ^= 1) {
                const TileRange range{std::min(per_unit, here - from), planes,      64, panels * planes * 1024,
                                      unpacked_bytes,                  chunk_bytes, true};
                const int64_t of_unit = range.chunks * planes;
                const auto beside = [&](int64_t of_tile) {
                    const int64_t tile = from * planes + of_tile;
                    for (int64_t i = 0; i < fetched_at_once && fetched < end; i += 64, fetched += 64)
                        __builtin_prefetch(fetched, 0, 2);  // to the second level: the first is full
                    if (o < to_unpack) {
                        unpack(next, o, c, at_once, values[filled ^ 1]);
                        if ((c += at_once) >= chunks_of(next)) c = 0, o++;
                    }
                    if (is_last)
                        for (int64_t row = tile * 32 / tiles; row < (tile + 1) * 32 / tiles; row++) pair.fetch(row);
                    pending.add_up_to((of_tile + 1) * block_outputs / of_unit);
                    if (finished.is_left() && tile * 4 >= finished.next * tiles) finished.put_next();
                };
                const uint8_t* of_values = values[filled] + from * planes * chunk_bytes;
                const int8_t* of_x = x + ((now.span * per_span + from) * panels + p) * planes * 1024;
                pair.panels == 2 ? multiply<2>(range, of_values, of_x, products[made], beside)
                                 : multiply<1>(range, of_values, of_x, products[made], beside);
                end_pending();
                pending.begin(products[made], sums[summed][p / 2], pair.panels, a.x, first * panel_rows * units, panels,
                              (now.span * per_span + from) / per_unit, p);
            }
            if (is_last) pending_pair.become(pair);
        }
        for (; o < to_unpack; o++, c = 0) unpack(next, o, c, per_span, values[filled ^ 1]);
        if (is_last) summed ^= 1;
        now = next;
    }
    end_pending();
    while (finished.is_left()) finished.put_next();
}

#endif

template <int Bits, bool Lanes>
void multiply_blocks(const Int4LinearArgs& a, Range outputs) {
    if (outputs.begin == outputs.end) return;
    const GroupTiles tiles(chunk_bytes);
    for (int64_t block = 0; block < a.x.blocks(); block++) multiply_multiples<Bits, Lanes>(a, outputs, block);
}

inline void linear_of_multiples(const Int4LinearArgs& a, Range outputs) {
    const bool lanes = has_lanes(a.weight);
    const auto compute = [&](auto bits) {
        constexpr int b = decltype(bits)::value;
        if (a.x.in_panels) return lanes ? multiply_blocks<b, true>(a, outputs) : multiply_blocks<b, false>(a, outputs);
        return lanes ? stream_multiples<b, true>(a, outputs) : stream_multiples<b, false>(a, outputs);
    };
    a.weight.bits == 4 ? compute(Constant<4>()) : compute(Constant<2>());
}

}  // namespace lensc::LENSC_ISA
