// Activation functions of one row.
#pragma once
#include "../cpu/vmath.h"

namespace lensc::LENSC_ISA {

// x / (1 + e^-slope), for any slope.
inline vfloat gated(vfloat x, vfloat slope) {
    // beyond +-87 the sigmoid is 0 or 1 in float32, and e^x would leave its range
    const vfloat bounded = max(slope, splat(-87.0f));
    return x / (splat(1.0f) + exp(-bounded));
}

// y = function(i) over [0, width); the last few values go through a buffer.
template <class Function>
inline void map_row(int64_t width, float* y, Function function) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(y + i, function(i, kLanes));
    if (i < width) {
        const vfloat rest = function(i, static_cast<int>(width - i));
        std::memcpy(y + i, &rest, static_cast<size_t>(width - i) * sizeof(float));
    }
}

inline vfloat load_up_to(const float* from, int count) {
    if (count == kLanes) return load(from);
    vfloat x = {};
    std::memcpy(&x, from, static_cast<size_t>(count) * sizeof(float));
    return x;
}

// gate * sigmoid(gate) * up
inline void silu_mul(const float* gate, const float* up, int64_t width, float* y) {
    map_row(width, y, [=](int64_t i, int count) {
        const vfloat g = load_up_to(gate + i, count);
        return gated(g, g) * load_up_to(up + i, count);
    });
}

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), which is x * sigmoid of twice what the tanh is of
inline void gelu_tanh(const float* x, int64_t width, float* y) {
    map_row(width, y, [=](int64_t i, int count) {
        const vfloat v = load_up_to(x + i, count);
        return gated(v, 1.5957691216057308f * (v + 0.044715f * v * v * v));
    });
}

}  // namespace lensc::LENSC_ISA
