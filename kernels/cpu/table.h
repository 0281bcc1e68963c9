// The kernels of one instruction set.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "../attention/attention.h"
#include "../float_linear/float_linear.h"
#include "../int4_linear/int4_linear.h"
#include "../int8_linear/int8_linear.h"
#include "../rope/rope.h"
#include "../rows/rows.h"
#include "peak.h"

namespace lensc {

struct Table {
    const char* isa;
    bool corrects_multiples;  // few rows for weights with multiples have a correction for each group, and no sums
    void (*rows)(const RowsArgs&, Share);
    size_t (*rows_scratch)(const RowsArgs&);
    void (*float_linear)(const FloatLinearArgs&, Share);
    void (*int4_linear)(const Int4LinearArgs&, Share);
    void (*int8_linear)(const Int8LinearArgs&, Share);
    size_t (*int8_linear_scratch)(const Int8LinearArgs&);
    void (*rope_table)(const RopeTableArgs&, Share);
    void (*rope_append)(const RopeAppendArgs&, Share);
    void (*causal_attention)(const CausalAttentionArgs&, Share);
    size_t (*causal_attention_scratch)(const CausalAttentionArgs&);
    void (*attention)(const AttentionArgs&, Share);
    size_t (*attention_scratch)(const AttentionArgs&);
    int64_t (*multiply)(Product, int64_t rounds);
    uint64_t (*read)(const uint8_t* data, int64_t bytes, int streams, Share);
};

// The instruction sets that were compiled and that this processor has, the best first.
std::vector<std::string> usable_isas();

// The kernels of `isa`, or of the best there is if it is empty. std::invalid_argument for one that is not usable here.
const Table& table(std::string_view isa = {});

}  // namespace lensc
