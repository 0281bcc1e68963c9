// What is computed row by row: norms, activations, quantization. One pass makes a row and quantizes it while it is in the
// first-level cache, so that a linear's input is written once, as the linear reads it.
#pragma once
#include "../int4_linear/int4_linear.h"
#include "../int8_linear/int8_linear.h"

namespace lensc {

enum class RowKind { copy, rms_norm, layer_norm, silu_mul, gelu_tanh };

struct RowsArgs {
    RowKind kind;
    const float* x;       // [rows, width]
    const float* up;      // [rows, width], of silu_mul
    const float* weight;  // [width], of norms
    const float* bias;    // [width] or null, of layer_norm
    float epsilon;
    int64_t rows, width;
    float* y;                    // [rows, width] or null
    const QuantizeArgs* groups;  // where to quantize to for int4_linear, or null
    const ChannelRows* channels; // where to quantize to for int8_linear, or null
    int64_t channel_width;       // of a row of `channels`, with its padding
    void* scratch;               // rows_scratch() bytes of this share alone
};

}  // namespace lensc
