// Arguments of the attention kernels. All pointers are the caller's; strides count float32 values.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../cpu/kv_cache.h"
#include "../cpu/share.h"

namespace lensc {

// Row t of `tokens` attends to the positions 0 .. past + t of the cache, which hold its own key and value already.
// Query head h reads kv head h / (heads / kv_heads).
struct CausalAttentionArgs {
    const float* query;    // [tokens, heads, dim], rotated, not scaled; a token's heads are contiguous
    int64_t query_stride;  // from one token to the next
    KvCache cache;         // past + tokens <= capacity; heads is a multiple of kv_heads
    int past, tokens, heads;
    float scale;           // of the logits
    float* output;         // [tokens, heads * dim]; not the query
    int64_t output_stride;
    void* scratch;         // causal_attention_scratch() bytes of this share alone, 64-byte aligned
};

// Every query of a slice attends to all keys of the slice, head by head.
struct AttentionArgs {
    const float* query;  // [slices, queries, heads, dim]; rows may be columns of a wider matrix
    const float* key;    // [slices, keys, heads, dim]
    const float* value;  // [slices, keys, heads, dim]
    int64_t query_stride, key_stride, value_stride;  // from one row to the next; slices follow each other
    const float* bias;   // [slices, keys], added to the scaled logits, -inf allowed; or null
    int slices, queries, keys, heads, dim;
    float scale;
    bool exact;          // float32 products even where bfloat16 tiles are faster
    float* output;       // [slices, queries, heads * dim]
    int64_t output_stride;
    void* scratch;       // attention_scratch() bytes of this share alone, 64-byte aligned
};

}  // namespace lensc
