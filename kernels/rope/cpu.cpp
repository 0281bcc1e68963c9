// rope_append: one pass over the new queries, keys and values; compiled once per instruction set.
#include "rope.h"

#include <cmath>

#include "../cpu/half.h"

namespace lensc::LENSC_ISA {

namespace {

// to[0 .. dim) = from * cos + rotate_half(from) * sin; `to` may be `from`.
void rotate(const float* from, const float* cos, const float* sin, int dim, float* to) {
    const int half = dim / 2;
    int i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const vfloat first = load(from + i), second = load(from + half + i);
        const vfloat c = load(cos + i), s = load(sin + i);
        store(to + i, first * c - second * s);
        store(to + half + i, second * c + first * s);
    }
    for (; i < half; ++i) {
        const float first = from[i], second = from[half + i];
        to[i] = first * cos[i] - second * sin[i];
        to[half + i] = second * cos[i] + first * sin[i];
    }
}

void write_half(const float* from, int dim, uint16_t* to) {
    int i = 0;
    for (; i + kLanes <= dim; i += kLanes) store(to + i, load(from + i));
    for (; i < dim; ++i) to[i] = float_to_half(from[i]);
}

// Symmetric: integer * scale, scale = max |x| / 127. A row of nothing above 127 * 2**-126 is zeros with scale 0,
// because 1 / scale would overflow.
float write_int8(const float* from, int dim, int8_t* to) {
    float most = 0;
    for (int i = 0; i < dim; ++i) most = std::fabs(from[i]) > most ? std::fabs(from[i]) : most;
    const float scale = most / 127.0f;
    if (scale < 0x1p-126f) {
        std::memset(to, 0, size_t(dim));
        return 0.0f;
    }
    const float inverse = 1.0f / scale;
    // Adding 3 * 2**22 rounds to the nearest whole number, ties to even; std::nearbyint would be a call without SSE4.
    for (int i = 0; i < dim; ++i) to[i] = int8_t(int((from[i] * inverse + 12582912.0f) - 12582912.0f));
    return scale;
}

// Row `position` of kv head `head` := `row`, in the type of the cache.
void write(const KvCache& cache, void* rows, float* scales, int head, int position, const float* row) {
    const int64_t index = int64_t(head) * cache.capacity + position;
    switch (cache.type) {
        case CacheType::float32:
            std::memcpy(static_cast<float*>(rows) + index * cache.dim, row, sizeof(float) * size_t(cache.dim));
            break;
        case CacheType::float16:
            write_half(row, cache.dim, static_cast<uint16_t*>(rows) + index * cache.dim);
            break;
        case CacheType::int8:
            scales[index] = write_int8(row, cache.dim, static_cast<int8_t*>(rows) + index * cache.dim);
            break;
    }
}

constexpr int kMaxDim = 1024;

}  // namespace

void rope_table(const RopeTableArgs& args, Share share) {
    const int half = args.dim / 2;
    const int64_t begin = int64_t(args.tokens) * share.index / share.count;
    const int64_t end = int64_t(args.tokens) * (share.index + 1) / share.count;
    for (int64_t token = begin; token < end; ++token) {
        const float position = float(args.positions[token]);
        for (int i = 0; i < half; ++i) {
            const float angle = position * args.inverse_frequencies[i];
            args.cos[token * half + i] = std::cos(angle);
            args.sin[token * half + i] = std::sin(angle);
        }
    }
}

void rope_append(const RopeAppendArgs& args, Share share) {
    const KvCache& cache = args.cache;
    const int dim = cache.dim, half = dim / 2, group = args.heads / cache.kv_heads;
    const int64_t units = int64_t(args.tokens) * cache.kv_heads;
    const int64_t end = units * (share.index + 1) / share.count;
    for (int64_t unit = units * share.index / share.count; unit < end; ++unit) {
        const int token = int(unit / cache.kv_heads), kv_head = int(unit % cache.kv_heads);
        const float *cos = args.cos + int64_t(token) * half, *sin = args.sin + int64_t(token) * half;
        for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            rotate(args.query + token * args.query_stride + head * dim, cos, sin, dim,
                   args.rotated + token * args.rotated_stride + head * dim);
        }
        float rotated[kMaxDim];
        rotate(args.key + token * args.key_stride + kv_head * dim, cos, sin, dim, rotated);
        write(cache, cache.keys, cache.key_scales, kv_head, args.past + token, rotated);
        write(cache, cache.values, cache.value_scales, kv_head, args.past + token,
              args.value + token * args.value_stride + kv_head * dim);
    }
}

}  // namespace lensc::LENSC_ISA
