// causal_attention and attention: how the work is split and which way it goes; compiled once per instruction set.
#include "attention.h"

#include "amx_core.h"
#include "float_core.h"
#include "stream.h"
#include "word_core.h"

namespace lensc::LENSC_ISA {

namespace {

#if defined(__AMX_BF16__)
using FastCore = AmxCore;
#else
using FastCore = FloatCore;
#endif

// Where no query comes behind a key: the scales of a block of values are of all its keys.
#if defined(LENSC_WORDS)
using FullCore = WordCore;
#else
using FullCore = FastCore;
#endif

// A token and guesses behind it: each has the bits that it would have alone, so that guesses change none that is chosen.
constexpr int kStreamTokens = 8;

Rows rows_of(const KvCache& cache, const void* data, const float* scales, int head) {
    const int64_t row = int64_t(head) * cache.capacity;
    const int64_t bytes = cache.type == CacheType::float32 ? 4 : cache.type == CacheType::float16 ? 2 : 1;
    return {static_cast<const char*>(data) + row * cache.dim * bytes,
            cache.type == CacheType::int8 ? scales + row : nullptr, cache.type, cache.dim};
}

Problem problem_of(const CausalAttentionArgs& args, int kv_head) {
    const KvCache& cache = args.cache;
    const int group = args.heads / cache.kv_heads;
    const int64_t column = int64_t(kv_head) * group * cache.dim;
    return {args.query + column,
            args.query_stride,
            args.output + column,
            args.output_stride,
            rows_of(cache, cache.keys, cache.key_scales, kv_head),
            rows_of(cache, cache.values, cache.value_scales, kv_head),
            nullptr,
            cache.dim,
            group,
            args.tokens,
            args.past + args.tokens,
            args.past,
            args.scale};
}

Problem problem_of(const AttentionArgs& args, int slice, int head) {
    const int64_t column = int64_t(head) * args.dim;
    const int64_t keys = int64_t(slice) * args.keys, queries = int64_t(slice) * args.queries;
    return {args.query + queries * args.query_stride + column,
            args.query_stride,
            args.output + queries * args.output_stride + column,
            args.output_stride,
            {args.key + keys * args.key_stride + column, nullptr, CacheType::float32, args.key_stride},
            {args.value + keys * args.value_stride + column, nullptr, CacheType::float32, args.value_stride},
            args.bias ? args.bias + keys : nullptr,
            args.dim,
            1,
            args.queries,
            args.keys,
            -1,
            args.scale};
}

int blocks_of(int rows, int block) { return (rows + block - 1) / block; }

// Converted blocks of keys are kept where a second block of queries reads them.
template <class Core>
int panel_slots(int rows, int keys) {
    return blocks_of(rows, Core::kQueryBlock) > 1 ? blocks_of(keys, Core::kKeyBlock) : 1;
}

bool streams(const CausalAttentionArgs& args) {
    return args.tokens <= kStreamTokens && args.tokens * (args.heads / args.cache.kv_heads) <= Stream::kMaxRows;
}

template <class Core>
size_t causal_scratch(const CausalAttentionArgs& args) {
    const int rows = args.tokens * (args.heads / args.cache.kv_heads);
    return Core::scratch_bytes(args.cache.dim, panel_slots<Core>(rows, args.past + args.tokens));
}

// Units are blocks of queries of one kv head after the other; a share takes consecutive ones of about equal work.
template <class Core>
void causal(const CausalAttentionArgs& args, Share share) {
    const int rows = args.tokens * (args.heads / args.cache.kv_heads);
    const int blocks = blocks_of(rows, Core::kQueryBlock);
    Core core(args.scratch, args.cache.dim, panel_slots<Core>(rows, args.past + args.tokens));
    const auto work = [&](int first_row, int count) {
        // The logits of rows [first_row, first_row + count), as if group were 1.
        const double group = args.heads / args.cache.kv_heads;
        return count * (args.past + 1 + (first_row + 0.5 * count) / group);
    };
    const double total = args.cache.kv_heads * work(0, rows);
    for (int head = 0; head < args.cache.kv_heads; ++head) {
        const Problem problem = problem_of(args, head);
        for (int block = 0; block < blocks; ++block) {
            const int row = block * Core::kQueryBlock, count = least(Core::kQueryBlock, rows - row);
            const double middle = head * work(0, rows) + work(0, row) + 0.5 * work(row, count);
            if (least(int(middle / total * share.count), share.count - 1) == share.index) {
                attend(problem, row, count, core);
            }
        }
    }
}

template <class Core>
void full(const AttentionArgs& args, Share share) {
    const int blocks = blocks_of(args.queries, Core::kQueryBlock);
    const int64_t units = int64_t(args.slices) * args.heads * blocks;
    const int64_t end = units * (share.index + 1) / share.count;
    Core core(args.scratch, args.dim, panel_slots<Core>(args.queries, args.keys));
    for (int64_t unit = units * share.index / share.count; unit < end; ++unit) {
        const int head = int(unit / blocks % args.heads), slice = int(unit / blocks / args.heads);
        const int row = int(unit % blocks) * Core::kQueryBlock;
        attend(problem_of(args, slice, head), row, least(Core::kQueryBlock, args.queries - row), core);
    }
}

}  // namespace

size_t causal_attention_scratch(const CausalAttentionArgs& args) {
    if (streams(args)) return Stream::scratch_bytes(args.cache.dim);
    return args.cache.type == CacheType::float32 ? causal_scratch<FloatCore>(args) : causal_scratch<FastCore>(args);
}

void causal_attention(const CausalAttentionArgs& args, Share share) {
    const NoDenormals fast;
    if (streams(args)) {
        const int64_t heads = args.cache.kv_heads;
        const int end = int(heads * (share.index + 1) / share.count);
        for (int head = int(heads * share.index / share.count); head < end; ++head) {
            Stream::attend(problem_of(args, head), args.scratch);
        }
    } else if (args.cache.type == CacheType::float32) {
        causal<FloatCore>(args, share);
    } else {
        causal<FastCore>(args, share);
    }
}

size_t attention_scratch(const AttentionArgs& args) {
    return args.exact ? FloatCore::scratch_bytes(args.dim, panel_slots<FloatCore>(args.queries, args.keys))
                      : FullCore::scratch_bytes(args.dim, panel_slots<FullCore>(args.queries, args.keys));
}

void attention(const AttentionArgs& args, Share share) {
    const NoDenormals fast;
    if (args.exact) {
        full<FloatCore>(args, share);
    } else {
        full<FullCore>(args, share);
    }
}

}  // namespace lensc::LENSC_ISA
