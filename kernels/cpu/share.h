// A kernel is a function of its arguments and of the share of the work that it does.
#pragma once
#include <cstdint>

// A function of a header that every instruction set compiles: were it a symbol, the linker would keep one copy for all, and a
// processor could meet instructions that it lacks.
#define LENSC_INLINE inline __attribute__((always_inline))

namespace lensc {

// Part `index` of `count`. The parts need no barrier between them, and their sum has the same bits whatever `count` is.
struct Share {
    int index, count;
    int member = 0;  // of the team, who computes it: whose scratch memory may be used
};

// The items [begin, end) of `items` that belong to a share, in steps of `step`.
struct Range {
    int64_t begin, end;
};

LENSC_INLINE Range range_of(int64_t items, int64_t step, Share share) {
    const int64_t blocks = (items + step - 1) / step;
    const int64_t first = blocks * share.index / share.count, last = blocks * (share.index + 1) / share.count;
    const int64_t end = last * step;
    return {first * step, end < items ? end : items};
}

}  // namespace lensc
