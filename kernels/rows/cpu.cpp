// See rows.h. Compiled once per instruction set, included by cpu/table.cpp.
#include "../activation/activation.h"
#include "../norm/norm.h"
#include "rows.h"

namespace lensc::LENSC_ISA {

inline void make_row(const RowsArgs& a, int64_t row, float* y) {
    const float* x = a.x + row * a.width;
    switch (a.kind) {
        case RowKind::copy: std::memcpy(y, x, static_cast<size_t>(a.width) * sizeof(float)); return;
        case RowKind::rms_norm: return rms_norm(x, a.weight, a.epsilon, a.width, y);
        case RowKind::layer_norm: return layer_norm(x, a.weight, a.bias, a.epsilon, a.width, y);
        case RowKind::silu_mul: return silu_mul(x, a.up + row * a.width, a.width, y);
        case RowKind::gelu_tanh: return gelu_tanh(x, a.width, y);
    }
}

inline size_t row_bytes_of(const RowsArgs& a) { return (static_cast<size_t>(a.width) * sizeof(float) + 63) / 64 * 64; }

inline size_t rows_scratch(const RowsArgs& a) {
    return row_bytes_of(a) + (a.groups ? quantize_scratch_bytes(*a.groups) : 0);
}

inline void rows(const RowsArgs& a, Share share) {
    float* made = static_cast<float*>(a.scratch);
    const auto row = [&](int64_t r) -> const float* {
        if (a.kind == RowKind::copy) return a.x + r * a.width;
        make_row(a, r, made);
        return made;
    };
    if (a.groups)
        quantize_with(*a.groups, row, static_cast<int8_t*>(a.scratch) + row_bytes_of(a), share);
    else if (a.channels)
        quantize_channel_rows(*a.channels, a.width, a.channel_width, row, share);
    else {
        const Range range = range_of(a.rows, 1, share);
        for (int64_t r = range.begin; r < range.end; r++) make_row(a, r, a.y + r * a.width);
    }
}

}  // namespace lensc::LENSC_ISA
