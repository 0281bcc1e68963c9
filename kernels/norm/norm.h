// RMSNorm and LayerNorm of one row.
#pragma once
#include <cmath>
#include <cstdint>

namespace lensc::LENSC_ISA {

inline void rms_norm(const float* x, const float* weight, float epsilon, int64_t width, float* y) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += x[i] * x[i];
    const float inverse = 1 / std::sqrt(squares / static_cast<float>(width) + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * inverse * weight[i];
}

// `bias` may be null.
inline void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int64_t width, float* y) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += x[i];
    const float mean = sum / static_cast<float>(width);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1 / std::sqrt(squares / static_cast<float>(width) + epsilon);
    if (bias) {
#pragma omp simd
        for (int64_t i = 0; i < width; i++) y[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < width; i++) y[i] = (x[i] - mean) * inverse * weight[i];
    }
}

}  // namespace lensc::LENSC_ISA
