// The attention kernels as functions of numpy arrays, for tests and benchmarks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "../cpu/arrays.h"
#include "../cpu/table.h"
#include "attention.h"

namespace lensc {

namespace {

using namespace nanobind::literals;

nb::ndarray<nb::numpy, float> causal_attention(const Floats<3>& query, const CacheArray& keys, const CacheArray& values,
                                               const std::optional<ScaleArray>& key_scales,
                                               const std::optional<ScaleArray>& value_scales, int past, float scale,
                                               const std::string& isa, int threads) {
    const Table& kernels = table(isa);
    const size_t tokens = query.shape(0), heads = query.shape(1), dim = query.shape(2);
    CausalAttentionArgs args{};
    args.query = query.data();
    args.query_stride = args.output_stride = int64_t(heads * dim);
    args.cache = cache_of(keys, values, key_scales, value_scales);
    args.past = past;
    args.tokens = int(tokens);
    args.heads = int(heads);
    args.scale = scale;
    require(dim == keys.shape(2), "query: of the head dim of the cache");
    require(heads % keys.shape(0) == 0, "query: heads a multiple of the cache's");
    require(past >= 0 && size_t(past) + tokens <= keys.shape(1), "past + tokens: at most the cache's capacity");
    auto output = new_floats({tokens, heads * dim});
    args.output = output.data();
    if (tokens == 0) return output;
    run_shares(threads, [&](Share share) {
        const Buffer scratch(kernels.causal_attention_scratch(args));
        CausalAttentionArgs own = args;
        own.scratch = scratch.data();
        kernels.causal_attention(own, share);
    });
    return output;
}

nb::ndarray<nb::numpy, float> attention(const Floats<3>& query, const Floats<3>& key, const Floats<3>& value,
                                        const std::optional<Floats<2>>& bias, int heads, float scale, bool exact,
                                        const std::string& isa, int threads) {
    const Table& kernels = table(isa);
    const size_t slices = query.shape(0), queries = query.shape(1), width = query.shape(2), keys = key.shape(1);
    require(heads > 0 && width % size_t(heads) == 0, "query: width a multiple of heads");
    require(key.shape(0) == slices && value.shape(0) == slices, "key, value: of as many slices as the query");
    require(keys > 0 && value.shape(1) == keys, "key, value: of as many rows, at least 1");
    require(key.shape(2) == width && value.shape(2) == width, "key, value: of the width of the query");
    require(!bias || (bias->shape(0) == slices && bias->shape(1) == keys), "bias: [slices, keys]");
    AttentionArgs args{};
    args.query = query.data();
    args.key = key.data();
    args.value = value.data();
    args.query_stride = args.key_stride = args.value_stride = args.output_stride = int64_t(width);
    args.bias = bias ? bias->data() : nullptr;
    args.slices = int(slices);
    args.queries = int(queries);
    args.keys = int(keys);
    args.heads = heads;
    args.dim = int(width) / heads;
    args.scale = scale;
    args.exact = exact;
    auto output = new_floats({slices, queries, width});
    args.output = output.data();
    if (queries == 0) return output;
    run_shares(threads, [&](Share share) {
        const Buffer scratch(kernels.attention_scratch(args));
        AttentionArgs own = args;
        own.scratch = scratch.data();
        kernels.attention(own, share);
    });
    return output;
}

}  // namespace

void bind_attention(nb::module_& module) {
    module.def("causal_attention", causal_attention, "query"_a, "keys"_a, "values"_a, "key_scales"_a.none() = nb::none(),
               "value_scales"_a.none() = nb::none(), "past"_a, "scale"_a, "isa"_a = "", "threads"_a = 1,
               "Attention of new tokens over a KV cache that holds their own keys and values already.\n\n"
               "query: float32[tokens, heads, dim]; keys, values: float32, float16 or int8[kv_heads, capacity, dim];\n"
               "key_scales, value_scales: float32[kv_heads, capacity], of int8 only. Returns float32[tokens, heads * "
               "dim].\nRaises ValueError where shapes do not fit or the processor lacks the instruction set.");
    module.def("attention", attention, "query"_a, "key"_a, "value"_a, "bias"_a.none() = nb::none(), "heads"_a, "scale"_a,
               "exact"_a = false, "isa"_a = "", "threads"_a = 1,
               "Attention of every query to all keys of its slice.\n\n"
               "query: float32[slices, queries, heads * dim]; key, value: float32[slices, keys, heads * dim]; bias:\n"
               "float32[slices, keys], added to the scaled logits. exact: products in float32. Returns\n"
               "float32[slices, queries, heads * dim]. Raises ValueError where shapes do not fit or the processor lacks "
               "the\ninstruction set.");
}

}  // namespace lensc
