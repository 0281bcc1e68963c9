// How weights stream past few rows: outputs that lie far apart are computed at once. Included by cpu.cpp.
#pragma once
#include <type_traits>

#include "int4_linear.h"

namespace lensc::LENSC_ISA {

template <int N>
using Constant = std::integral_constant<int, N>;

// Bytes from what is multiplied to what is fetched.
constexpr int64_t fetched_ahead = 2048;

// Outputs at once, of so many rows, whose sums are all in registers.
#if defined(__AVX512VNNI__)
constexpr int outputs_at_once(int rows) { return rows == 1 ? 8 : rows == 2 ? 6 : rows <= 4 ? 4 : rows == 5 ? 3 : 2; }
#else
constexpr int outputs_at_once(int rows) { return rows <= 2 ? 4 : 2; }
#endif

// compute(outputs at once, rows, first output, outputs from one to the next, first row), the first two as `Constant`s. Far
// apart, each output is a stream of its own from memory: one stream alone does not fill the lines that a core can wait for.
template <int Rows, class Compute>
inline void stream_rows(Range outputs, int64_t row, Compute compute) {
    constexpr int streams = outputs_at_once(Rows);
    const int64_t apart = (outputs.end - outputs.begin) / streams;
    int64_t o = outputs.begin;
    for (; o < outputs.begin + apart; o++) compute(Constant<streams>(), Constant<Rows>(), o, apart, row);
    for (o += (streams - 1) * apart; o < outputs.end; o++) compute(Constant<1>(), Constant<Rows>(), o, 0, row);
}

// compute(rows, first row), the first as a `Constant`, for any number of rows.
template <class Compute>
inline void stream_by_rows(int64_t rows, Compute compute) {
    int64_t row = 0;
    for (; row + most_streamed_rows <= rows; row += most_streamed_rows) compute(Constant<most_streamed_rows>(), row);
    switch (rows - row) {
        case 1: return compute(Constant<1>(), row);
        case 2: return compute(Constant<2>(), row);
        case 3: return compute(Constant<3>(), row);
        case 4: return compute(Constant<4>(), row);
        case 5: return compute(Constant<5>(), row);
        case 6: return compute(Constant<6>(), row);
        case 7: return compute(Constant<7>(), row);
        default: return;
    }
}

// As stream_rows, for any number of rows.
template <class Compute>
inline void stream_past(int64_t rows, Range outputs, Compute compute) {
    stream_by_rows(rows, [&](auto at_once, int64_t row) { stream_rows<decltype(at_once)::value>(outputs, row, compute); });
}

}  // namespace lensc::LENSC_ISA
