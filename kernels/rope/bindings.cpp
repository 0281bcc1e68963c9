// The rotary kernels as functions of numpy arrays, for tests and benchmarks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <utility>

#include "../cpu/arrays.h"
#include "../cpu/table.h"
#include "rope.h"

namespace lensc {

namespace {

using namespace nanobind::literals;
using FloatArray = nb::ndarray<nb::numpy, float>;
using Positions = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::pair<FloatArray, FloatArray> rope_table(const Positions& positions, const Floats<1>& inverse_frequencies,
                                             const std::string& isa, int threads) {
    const Table& kernels = table(isa);
    const size_t tokens = positions.shape(0), half = inverse_frequencies.shape(0);
    auto cos = new_floats({tokens, half}), sin = new_floats({tokens, half});
    const RopeTableArgs args{positions.data(), inverse_frequencies.data(), int(tokens), int(2 * half),
                             cos.data(),       sin.data()};
    run_shares(threads, [&](Share share) { kernels.rope_table(args, share); });
    return {cos, sin};
}

FloatArray rope_append(const Floats<3>& query, const Floats<3>& key, const Floats<3>& value, const Floats<2>& cos,
                       const Floats<2>& sin, const CacheArray& keys, const CacheArray& values,
                       const std::optional<ScaleArray>& key_scales, const std::optional<ScaleArray>& value_scales,
                       int past, const std::string& isa, int threads) {
    const Table& kernels = table(isa);
    const size_t tokens = query.shape(0), heads = query.shape(1), dim = query.shape(2), kv_heads = keys.shape(0);
    require(dim == keys.shape(2) && dim % 2 == 0, "query: of the head dim of the cache, an even number");
    require(heads % kv_heads == 0, "query: heads a multiple of the cache's");
    for (const auto* rows : {&key, &value}) {
        require(rows->shape(0) == tokens && rows->shape(1) == kv_heads && rows->shape(2) == dim,
                "key, value: [tokens, kv_heads, dim]");
    }
    for (const auto* rows : {&cos, &sin}) {
        require(rows->shape(0) == tokens && rows->shape(1) == dim / 2, "cos, sin: [tokens, dim / 2]");
    }
    require(past >= 0 && size_t(past) + tokens <= keys.shape(1), "past + tokens: at most the cache's capacity");
    auto rotated = new_floats({tokens, heads, dim});
    RopeAppendArgs args{};
    args.query = query.data();
    args.key = key.data();
    args.value = value.data();
    args.query_stride = args.rotated_stride = int64_t(heads * dim);
    args.key_stride = args.value_stride = int64_t(kv_heads * dim);
    args.cos = cos.data();
    args.sin = sin.data();
    args.tokens = int(tokens);
    args.heads = int(heads);
    args.rotated = rotated.data();
    args.cache = cache_of(keys, values, key_scales, value_scales);
    args.past = past;
    run_shares(threads, [&](Share share) { kernels.rope_append(args, share); });
    return rotated;
}

}  // namespace

void bind_rope(nb::module_& module) {
    module.def("rope_table", rope_table, "positions"_a, "inverse_frequencies"_a, "isa"_a = "", "threads"_a = 1,
               "cos and sin of position * inverse frequency, each float32[tokens, dim / 2].\n\n"
               "positions: int64[tokens]; inverse_frequencies: float32[dim / 2]. The product is taken in float32.");
    module.def("rope_append", rope_append, "query"_a, "key"_a, "value"_a, "cos"_a, "sin"_a, "keys"_a, "values"_a,
               "key_scales"_a.none() = nb::none(), "value_scales"_a.none() = nb::none(), "past"_a, "isa"_a = "",
               "threads"_a = 1,
               "Rotate queries and keys; write keys and values into the cache from position `past` on.\n\n"
               "query: float32[tokens, heads, dim]; key, value: float32[tokens, kv_heads, dim]; cos, sin: "
               "float32[tokens,\ndim / 2]; keys, values: float32, float16 or int8[kv_heads, capacity, dim], written; "
               "key_scales, value_scales:\nfloat32[kv_heads, capacity], of int8 only, written. Returns the rotated "
               "queries, float32[tokens, heads, dim].\nRaises ValueError where shapes do not fit.");
}

}  // namespace lensc
