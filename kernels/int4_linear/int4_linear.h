// y = x W^T for weights of 2, 4 or 8 bits with a scale per group of inputs, on inputs quantized to int8 as they come.
//
// Weights are read where they lie in the portable graph's data file: a row per output, low bits first. A *chunk* is 64
// bytes of a row. Byte i of a chunk holds `planes` = 8 / bits neighbouring inputs, so taking all low bits at once gives
// every second (or fourth) input: plane p of a chunk is inputs i * planes + p. The int8 inputs are therefore stored plane
// by plane, and no weight is ever moved.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../cpu/share.h"

namespace lensc {

constexpr int64_t chunk_bytes = 64;
constexpr int64_t panel_rows = 16, most_panels = 16;
// A block's bytes, of a second-level cache of 2 MiB that holds weights and products, too.
constexpr int64_t block_bytes = 5 << 18;
// Up to so many rows are computed one by one while weights stream past; more go in panels. A token and seven guesses: each has the
// bits that it would have alone.
constexpr int64_t most_streamed_rows = 8;
// Of whole multiples: (value - 8) * 15 just fits in an int8.
constexpr int most_multiple = 15;
// Weights with multiples: inputs of 32 outputs that are unpacked at once. Two such spans and what is multiplied with them stay
// in the second-level cache.
constexpr int64_t span_inputs = 2048;
// Groups whose inputs are rounded with one scale: of two groups sums take longer, of eight inputs are too coarse.
constexpr int64_t unit_groups = 4;

struct GroupWeight {
    const uint8_t* values;       // [outputs, inputs * bits / 8]
    const float* scales;         // [outputs, groups]; where there are multiples [outputs]: the steps
    const int8_t* multiples;     // [outputs, groups], a scale is step * multiple; null: scales are any
    const uint8_t* zero_points;  // [outputs, groups], packed like values without gaps; null: all are `zero_point`
    int64_t outputs, inputs, group;
    int bits;        // 2, 4 or 8
    int zero_point;  // what stands for 0 where zero_points is null
    bool is_signed;  // int8: values are two's complement around 0

    LENSC_INLINE int64_t planes() const { return 8 / bits; }
    LENSC_INLINE int64_t groups() const { return (inputs + group - 1) / group; }
    LENSC_INLINE int64_t row_bytes() const { return inputs * bits / 8; }
    LENSC_INLINE int64_t chunks() const { return (row_bytes() + chunk_bytes - 1) / chunk_bytes; }
    LENSC_INLINE int64_t chunk_inputs() const { return chunk_bytes * planes(); }
    // Inputs that are rounded with one scale, and summed as integers: a group or a chunk of it; with multiples four groups,
    // which are whole chunks, as far as a span holds them.
    LENSC_INLINE int64_t unit() const {
        if (multiples) return groups() > 1 && unit_groups * group < span_inputs ? unit_groups * group : span_inputs;
        return group < chunk_inputs() ? group : chunk_inputs();
    }
    LENSC_INLINE int64_t unit_bytes() const { return unit() * bits / 8; }
    LENSC_INLINE int64_t units() const { return (inputs + unit() - 1) / unit(); }
    LENSC_INLINE int64_t units_per_group() const { return (group + unit() - 1) / unit(); }
    LENSC_INLINE int64_t units_per_chunk() const { return chunk_bytes / unit_bytes(); }
    LENSC_INLINE int64_t padded_inputs() const { return chunks() * chunk_inputs(); }
};

// Inputs quantized to int8, symmetric, a scale per row and unit: either row by row, or in blocks of panels of 16 rows
// (the last one filled with zeros), in which four neighbouring bytes of 16 rows lie together. A block lies in one piece: it
// stays in the cache while all weights pass.
struct QuantizedRows {
    int8_t* values;      // [rows, chunks, planes, 64], or of each block [chunks, panels, planes, 16, 16 rows, 4]
    float* scales;       // [rows, units], or of each block [units, panels, 16]
    float* corrections;  // as scales: what a unit has too much per unit of zero point, scale * sum of values * `factor`;
                         // null for weights with multiples, which have sums; or, of few rows where the kernels of an
                         // instruction set ask for it, corrections for each group of a row
    int32_t* sums;       // as scales: the sum of the values; null where there are corrections
    int64_t rows;
    bool in_panels;
    int64_t block_panels;  // at most, of a block

    LENSC_INLINE int64_t panels() const { return (rows + panel_rows - 1) / panel_rows; }
    LENSC_INLINE int64_t blocks() const { return (panels() + block_panels - 1) / block_panels; }
    // The first panel of a block; that of the block behind the last is panels().
    LENSC_INLINE int64_t first_panel(int64_t block) const { return panels() * block / blocks(); }
};

// Panels of rows of so many bytes in a block. Where sums are kept in floats, fewer stay in the first-level cache.
LENSC_INLINE int64_t block_panels_of(int64_t padded_inputs, bool has_multiples) {
    int64_t panels = has_multiples ? most_panels : most_panels / 2;
    while (has_multiples && panels > 4 && panels * panel_rows * padded_inputs > block_bytes) panels /= 2;
    return panels;
}

struct Int4LinearArgs {
    GroupWeight weight;
    QuantizedRows x;
    const float* bias;      // [outputs] or null
    const float* residual;  // [rows, outputs] or null; may be y
    float* y;               // [rows, outputs]
};

struct QuantizeArgs {
    int64_t inputs, planes, unit, padded_inputs;
    int64_t group;  // inputs that share a correction
    float factor;  // of corrections: the weights' zero point if they have one for all, else 1
    QuantizedRows out;
};

}  // namespace lensc
