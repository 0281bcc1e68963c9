// The keys and values of one layer and one sequence, as the kernels see them.
#pragma once

namespace lensc {

enum class CacheType { float32, float16, int8 };

struct KvCache {
    CacheType type;
    int kv_heads, capacity, dim;
    void* keys;           // [kv_heads, capacity, dim] of `type`; rotated
    void* values;         // [kv_heads, capacity, dim] of `type`
    float* key_scales;    // [kv_heads, capacity], of int8 only: key = integer * scale
    float* value_scales;  // [kv_heads, capacity], of int8 only
};

}  // namespace lensc
