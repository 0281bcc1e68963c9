// See float_linear.h. Compiled once per instruction set, included by cpu/table.cpp.
#include <algorithm>

#include "../cpu/vmath.h"
#include "float_linear.h"

namespace lensc::LENSC_ISA {

// Sums of so many outputs and rows, a weight of each and an input are all the registers there are.
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int64_t float_outputs = 3, float_rows = 4;
#else
constexpr int64_t float_outputs = 4, float_rows = 4;
#endif

// Inputs at a time. A piece of a block of rows stays in the second-level cache while all outputs pass.
constexpr int64_t float_piece = 1024, float_block = 64;

// Inputs [begin, begin + count) of an output as float32. `begin` is a multiple of 1024, so it begins a byte and a chunk.
inline void dequantize(const GroupWeight& w, int64_t output, int64_t begin, int64_t count, float* values) {
    const uint8_t* bytes = w.values + output * w.row_bytes() + begin * w.bits / 8;
    const int mask = (1 << w.bits) - 1;
    for (int64_t i = 0; i < count;) {
        const int64_t group = (begin + i) / w.group, end = std::min(count, (group + 1) * w.group - begin);
        const float scale = w.scales[output * w.groups() + group];
        const float zero = w.is_signed        ? 0
                           : w.zero_points ? zero_point_of(w, output, group)
                                           : static_cast<float>(w.zero_point);
        if (w.is_signed)
            for (; i < end; i++) values[i] = scale * static_cast<float>(static_cast<int8_t>(bytes[i]));
        else
            for (; i < end; i++) {
                const int64_t bit = i * w.bits;
                values[i] = scale * (static_cast<float>((bytes[bit / 8] >> (bit % 8)) & mask) - zero);
            }
    }
}

// sums[Rows][Outputs] += x w^T over `count` inputs.
template <int Rows, int Outputs>
inline void dot_floats(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t count, float* sums) {
    vfloat parts[Rows][Outputs] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        vfloat weights[Outputs];
        for (int o = 0; o < Outputs; o++) weights[o] = load(w + o * w_stride + i);
        for (int r = 0; r < Rows; r++) {
            const vfloat value = load(x + r * x_stride + i);
            for (int o = 0; o < Outputs; o++) parts[r][o] += value * weights[o];
        }
    }
    for (int r = 0; r < Rows; r++)
        for (int o = 0; o < Outputs; o++) {
            float sum = reduce_add(parts[r][o]);
            for (int64_t j = i; j < count; j++) sum += x[r * x_stride + j] * w[o * w_stride + j];
            sums[r * Outputs + o] += sum;
        }
}

// `Outputs` outputs of the rows of a block, over inputs [begin, begin + count).
template <int Outputs>
inline void multiply_floats(const FloatLinearArgs& a, int64_t output, Range rows, int64_t begin, int64_t count) {
    const GroupWeight& w = a.weight;
    alignas(64) float dequantized[Outputs * float_piece];
    const float* weights = a.floats ? a.floats + output * w.inputs + begin : dequantized;
    const int64_t stride = a.floats ? w.inputs : float_piece;
    if (!a.floats)
        for (int o = 0; o < Outputs; o++) dequantize(w, output + o, begin, count, dequantized + o * float_piece);
    for (int64_t row = rows.begin; row < rows.end;) {
        const int64_t together = row + float_rows <= rows.end ? float_rows : 1;
        float sums[float_rows * Outputs] = {};
        const float* x = a.x + row * w.inputs + begin;
        together == 1 ? dot_floats<1, Outputs>(x, w.inputs, weights, stride, count, sums)
                      : dot_floats<float_rows, Outputs>(x, w.inputs, weights, stride, count, sums);
        for (int64_t r = 0; r < together; r++, row++)
            for (int o = 0; o < Outputs; o++) {
                const int64_t at = row * w.outputs + output + o;
                float before = begin ? a.y[at] : 0;
                if (!begin && a.bias) before += a.bias[output + o];
                if (!begin && a.residual) before += a.residual[at];
                a.y[at] = before + sums[r * Outputs + o];
            }
    }
}

inline void float_linear(const FloatLinearArgs& a, Share share) {
    const Range outputs = range_of(a.weight.outputs, float_outputs, share);
    const int64_t block = a.floats ? float_block : 4 * float_block;  // what is dequantized should be used more often
    for (Range rows{0, 0}; rows.begin < a.rows; rows.begin = rows.end) {
        rows.end = std::min(rows.begin + block, a.rows);
        for (int64_t begin = 0; begin < a.weight.inputs; begin += float_piece) {
            const int64_t count = std::min(float_piece, a.weight.inputs - begin);
            int64_t o = outputs.begin;
            for (; o + float_outputs <= outputs.end; o += float_outputs)
                multiply_floats<float_outputs>(a, o, rows, begin, count);
            for (; o < outputs.end; o++) multiply_floats<1>(a, o, rows, begin, count);
        }
    }
}

}  // namespace lensc::LENSC_ISA
