// y = x W^T for int8 weights with one scale per output, on inputs quantized to int8 with one scale per row.
//
// Weights are packed once, when the graph is compiled: 16 outputs by four inputs lie together, which is what a tile (AMX) or
// a vector (VNNI) multiplies at once, and the sum of each output's weights is kept beside them for instruction sets that
// multiply unsigned by signed bytes only.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../cpu/share.h"

namespace lensc {

struct ChannelWeight {
    const int8_t* values;  // [padded outputs / 16, padded inputs / 4, 16 outputs, 4 inputs], zeros where there is no weight
    const float* scales;   // [outputs]
    const int32_t* sums;   // [outputs]: of all weights of an output
    int64_t outputs, inputs;

    // To whole tiles: 32 outputs, 64 inputs.
    LENSC_INLINE int64_t padded_outputs() const { return (outputs + 31) / 32 * 32; }
    LENSC_INLINE int64_t padded_inputs() const { return (inputs + 63) / 64 * 64; }
};

// Rows come in pairs of tiles; those that are missing are zeros.
constexpr int64_t channel_rows_multiple = 32;

struct ChannelRows {
    int8_t* values;  // [rows to a multiple of 32, padded inputs], in the instruction set's own order and looks
    float* scales;   // [rows to a multiple of 32]
    int64_t rows;

    LENSC_INLINE int64_t padded_rows() const {
        return (rows + channel_rows_multiple - 1) / channel_rows_multiple * channel_rows_multiple;
    }
};

struct Int8LinearArgs {
    ChannelWeight weight;
    ChannelRows x;
    const float* bias;      // [outputs] or null
    const float* residual;  // [rows, outputs] or null; may be y
    float* y;               // [rows, outputs]
    void* scratch;          // int8_linear_scratch() bytes of this share alone
};

}  // namespace lensc
