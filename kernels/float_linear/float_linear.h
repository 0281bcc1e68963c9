// y = x W^T on float32 inputs, for float32 weights or weights of 2, 4 or 8 bits in groups, which are dequantized as they pass.
#pragma once
#include "../int4_linear/int4_linear.h"

namespace lensc {

struct FloatLinearArgs {
    const float* floats;   // [outputs, inputs]; null: `weight` holds the values
    GroupWeight weight;    // outputs and inputs are set in either case
    const float* x;        // [rows, inputs]
    int64_t rows;
    const float* bias;      // [outputs] or null
    const float* residual;  // [rows, outputs] or null; may be y
    float* y;               // [rows, outputs]; must not be x
};

}  // namespace lensc
