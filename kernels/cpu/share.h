// A kernel is a function of its arguments and of the share of the work that it does.
#pragma once
#include <cstdint>

namespace lensc {

// Part `index` of `count`. The parts need no barrier between them, and their sum has the same bits whatever `count` is.
struct Share {
    int index, count;
};

// The items [begin, end) of `items` that belong to a share, in steps of `step`.
struct Range {
    int64_t begin, end;
};

inline Range range_of(int64_t items, int64_t step, Share share) {
    const int64_t blocks = (items + step - 1) / step;
    const int64_t first = blocks * share.index / share.count, last = blocks * (share.index + 1) / share.count;
    const int64_t end = last * step;
    return {first * step, end < items ? end : items};
}

}  // namespace lensc
