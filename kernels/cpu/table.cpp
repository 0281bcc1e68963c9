// All kernels for one instruction set, LENSC_ISA: compiled once for each, with its flags.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "table.h"

#include "../attention/cpu.cpp"
#include "../int4_linear/cpu.cpp"
#include "../int8_linear/cpu.cpp"
#include "../float_linear/cpu.cpp"
#include "../rope/cpu.cpp"
#include "../rows/cpu.cpp"
#include "peak.cpp"

#define LENSC_TEXT_OF(name) #name
#define LENSC_TEXT(name) LENSC_TEXT_OF(name)

namespace lensc::LENSC_ISA {

extern const Table kernels;
const Table kernels = {
    LENSC_TEXT(LENSC_ISA),
#if defined(LENSC_PAIRS)
    true,
#else
    false,
#endif
    rows,
    rows_scratch,
    float_linear,
    int4_linear,
    int8_linear,
    int8_linear_scratch,
    rope_table,
    rope_append,
    causal_attention,
    causal_attention_scratch,
    attention,
    attention_scratch,
    multiply,
    read,
};

}  // namespace lensc::LENSC_ISA
