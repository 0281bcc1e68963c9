// Arguments of the rotary position embedding. All pointers are the caller's; strides count float32 values.
#pragma once

#include <cstdint>

#include "../cpu/kv_cache.h"
#include "../cpu/share.h"

namespace lensc {

// cos and sin of position * inverse_frequencies[i], the product in float32: once a step, for all layers.
struct RopeTableArgs {
    const int64_t* positions;          // [tokens]
    const float* inverse_frequencies;  // [dim / 2]
    int tokens, dim;
    float* cos;  // [tokens, dim / 2]
    float* sin;  // [tokens, dim / 2]
};

// Rotates queries and keys and writes keys and values into the cache at the positions past .. past + tokens - 1.
struct RopeAppendArgs {
    const float* query;  // [tokens, heads, dim]; a token's heads are contiguous
    const float* key;    // [tokens, kv_heads, dim]
    const float* value;  // [tokens, kv_heads, dim]
    int64_t query_stride, key_stride, value_stride;  // from one token to the next
    const float* cos;    // [tokens, dim / 2], of rope_table
    const float* sin;
    int tokens, heads;   // heads is a multiple of cache.kv_heads
    float* rotated;      // [tokens, heads, dim]; may be the query
    int64_t rotated_stride;
    KvCache cache;       // dim is even
    int past;            // past + tokens <= capacity
};

}  // namespace lensc
