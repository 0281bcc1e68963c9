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

// As stream_rows, for any number of rows.
template <class Compute>
inline void stream_past(int64_t rows, Range outputs, Compute compute) {
    int64_t row = 0;
    for (; row + most_streamed_rows <= rows; row += most_streamed_rows)
        stream_rows<most_streamed_rows>(outputs, row, compute);
    switch (rows - row) {
        case 1: return stream_rows<1>(outputs, row, compute);
        case 2: return stream_rows<2>(outputs, row, compute);
        case 3: return stream_rows<3>(outputs, row, compute);
        case 4: return stream_rows<4>(outputs, row, compute);
        case 5: return stream_rows<5>(outputs, row, compute);
        case 6: return stream_rows<6>(outputs, row, compute);
        case 7: return stream_rows<7>(outputs, row, compute);
        default: return;
    }
}

}  // namespace lensc::LENSC_ISA
