"""Fit an evenly spaced grid of few levels to groups of numbers, and round to it.

The search tries a short list of clipping ranges on all groups at once. For the values that each range gives it takes the
scale of least squares, keeps the best, and rounds once more with that scale. On normal numbers in symmetric groups of 128
its root mean square error is 0.3 % (4 bits), 0.1 % (3) and 0.8 % (2) above that of the best grid; that of the plain range
from the smallest to the largest number is 21 %, 47 % and 112 % above. Groups are divided by their largest number first,
so that the list is the same for all and nothing overflows or underflows.

Scales that are whole multiples of a step for each row, so that a kernel can sum a row in integers, cost this much beside
free ones, in root mean square error on rows of 4096 numbers, and nearly double the time of the search:

    bits, group                        4, 128    4, 32    3, 32    2, 64
    normal numbers                      0.7 %    3.0 %    0.9 %   -0.1 %    (both signs are tried, once the step is found)
    times 1 to 4, another each group    1.2 %    4.3 %    1.6 %    0.0 %

Of 3.0 %, 2.9 % remain where all multiples of both signs are tried with seven steps: a free scale is chosen so well in small
groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = 2.0**-100
"""Groups of smaller numbers are stored as zeros: their scales, or products with them, could be subnormal or 0."""

SHRINK = {
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
    3: (1.0, 0.92, 0.84, 0.76, 0.68, 0.6),
    4: (1.0, 0.93, 0.86, 0.79, 0.72, 0.65),
    8: (1.0, 0.98, 0.96, 0.93, 0.9, 0.8),
}
"""Shares of a group's range that are tried, by bits."""

LARGEST_MULTIPLE = 15
"""Of the multiples of a row's step that its scales can be, either sign: the values -8 to 7 of a symmetric format of 4 bits,
times 15, are -120 to 105, and fit in an int8. 16 would make 128 of -8 where it is negative.
"""

STEPS = (1.0, 0.97, 0.94, 0.91)
"""Steps that are tried, as shares of the smallest with which the largest of a row's scales is within `LARGEST_MULTIPLE`. Twice
as many, or the step of least squares for the multiples found, gain less than 0.05 %.
"""

UPWARD = 0.7
"""What is added to scales, in steps, before they are cut to multiples that weights' errors do not choose. Clipping costs more
there than coarser levels: 0.5 makes the squared error of the outputs of the demo decoder's linears, by GPTQ, 0 % (4 bits,
groups of 128), 2.3 % (4, 32), 1.4 % (3, 32) and -0.4 % (2, 64) larger than free scales do, 0.7 makes it 0 %, 0.8 %, -0.9 % and
-1.7 %; where the error of rounding chooses, it is 2.0 %, 2.8 %, 2.5 % and 2.3 %.
"""


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor | float, low: int, high: int) -> Tensor:
    """clamp(round(x / scale) + zero, low, high), ties to even, in float32."""
    return (x / scale).round_().add_(zero).clamp_(low, high)


def fit_symmetric(x: Tensor, low: int, high: int, shrink: tuple[float, ...], share: Tensor | None) -> Tensor:
    """The scale of each group for the levels `low` to `high` around 0, where -low >= high.

    x: float32[..., size]; share, broadcast to x: the weight of each squared error. An empty `shrink` asks for the
    plain range, largest magnitude on level `high`. Returns float32[...], not 0; negative where the largest number
    is better placed on the side of `low`.
    """
    magnitude = x.abs()
    place = magnitude.argmax(-1, keepdim=True)
    largest = magnitude.gather(-1, place)
    is_zero = largest < NEGLIGIBLE
    if not shrink:
        return (largest / high).masked_fill_(is_zero, 1.0).squeeze(-1)
    is_even = -low == high
    # with an extra level, the largest number becomes -1: a positive scale puts it on the side of `low`
    unit = (largest if is_even else -x.gather(-1, place)).masked_fill_(is_zero, 1.0)
    fit = _Fit(x / unit, share)
    for part in shrink:
        fit.try_scale(part / -low, low, high)
        if not is_even:
            fit.try_scale(-part / high, low, high)
    fit.try_scale(fit.scale, low, high)
    return (fit.scale * unit).masked_fill_(is_zero, 1.0).squeeze(-1)


def fit_asymmetric(x: Tensor, high: int, shrink: tuple[float, ...], share: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scale (positive) and the zero point (0 to `high`) of each group for the levels 0 to `high`.

    Otherwise like `fit_symmetric`; the plain range reaches from the smallest to the largest number and includes 0.
    """
    least, most = x.amin(-1, keepdim=True).clamp_max_(0), x.amax(-1, keepdim=True).clamp_min_(0)
    # halves, because the difference of two float32 numbers can overflow
    span = most / 2 - least / 2
    is_zero = span < NEGLIGIBLE
    span.masked_fill_(is_zero, 1.0)
    # numbers now lie between -2 and 2, and reach over a length of 2
    least, most = least / span, most / span
    scale = torch.full_like(span, 2 / high)
    zero = (-least / scale).round_().clamp_(0, high)
    if shrink:
        fit = _Fit(x / span, share)
        fit.try_scale(scale, -zero, high - zero)
        for part in shrink[1:]:
            narrow = part * 2 / high
            middle = (high / 2 - (least + most) / (2 * narrow)).round_().clamp_(0, high)
            fit.try_scale(narrow, -middle, high - middle)
        for step in (-1, 1, 0):
            beside = (step - fit.low).clamp_(0, high)
            fit.try_scale(fit.scale, -beside, high - beside)
        scale, zero = fit.scale, -fit.low
    return (scale * span).masked_fill_(is_zero, 1.0).squeeze(-1), zero.masked_fill_(is_zero, 0.0).squeeze(-1)


def fit_multiples(
    x: Tensor, scales: Tensor, low: int, high: int, share: Tensor | None, are_rounded: bool = True
) -> Tensor:
    """Scales near `scales` that are whole multiples, `LARGEST_MULTIPLE` or less and none 0, of one step for each row.

    x: float32[rows, groups, size]; scales: float32[rows, groups], as `fit_symmetric` makes them; share, broadcast to x: the
    weight of each squared error. For every step each group takes the neighbouring multiple, above or below its scale, with
    which its numbers, rounded once more, have the smaller error; the step is that of the smallest error of the row. With
    that step, both neighbours are tried on the other side of 0. Where numbers are not `are_rounded` to the nearest but carry
    the errors of others, none of this holds: each scale is rounded, more often up than down, in the smallest step that
    reaches the largest. Groups of zeros take the step itself, rows of zeros 1. Returns float32[rows, groups], each the
    float32 nearest to multiple * step for a float32 step.
    """
    magnitude = x.abs().amax(-1, keepdim=True)
    unit = magnitude.amax(1, keepdim=True)
    is_zero = unit < NEGLIGIBLE
    unit.masked_fill_(is_zero, 1.0)
    free = (scales[..., None] / unit).masked_fill_(magnitude < NEGLIGIBLE, 0.0)
    size, sign = free.abs(), torch.where(free < 0, -1.0, 1.0)
    step = size.amax(1, keepdim=True).masked_fill_(is_zero, 1.0) / LARGEST_MULTIPLE
    if are_rounded:
        multiple, step = _least_error(_Levels(x / unit, share, low, high), size, sign, step)
    else:
        multiple = (size / step + UPWARD).floor_().clamp_(1, LARGEST_MULTIPLE) * sign
    return (multiple * (step * unit)).masked_fill_(is_zero, 1.0).squeeze(-1)


def _least_error(levels: _Levels, size: Tensor, sign: Tensor, smallest: Tensor) -> tuple[Tensor, Tensor]:
    """The multiple of each group, [rows, groups, 1], and the step of each row, [rows, 1, 1], as `fit_multiples` chooses them.

    size, sign: of the free scales; smallest: the step in which the largest of a row is `LARGEST_MULTIPLE`.
    """
    step, total = smallest, torch.full_like(smallest, -torch.inf)
    multiple, gain = sign, torch.zeros_like(size)
    for part in STEPS:
        tried = part * smallest
        found, gained = levels.better_neighbour(size / tried, sign, tried)
        whole = gained.sum(1, keepdim=True)
        better = whole > total
        step, total = torch.where(better, tried, step), torch.where(better, whole, total)
        multiple, gain = torch.where(better, found, multiple), torch.where(better, gained, gain)
    found, gained = levels.better_neighbour(size / step, -sign, step)
    return torch.where(gained > gain, found, multiple), step


class _Levels:
    """Groups of numbers, and what is gained by rounding them to levels of a given scale."""

    def __init__(self, t: Tensor, share: Tensor | None, low: int, high: int) -> None:
        """t: float32[rows, groups, size], none beyond 1."""
        self._t = t
        self._share = share
        self._weighted = t if share is None else t * share
        self._low, self._high = low, high

    def better_neighbour(self, wanted: Tensor, sign: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The better of the whole multiples of `step` beside `wanted`, times `sign`, and its gain: [rows, groups, 1] each."""
        below = wanted.floor().clamp_(1, LARGEST_MULTIPLE) * sign
        above = (wanted.floor() + 1).clamp_(1, LARGEST_MULTIPLE) * sign
        of_below, of_above = self._gain(below * step), self._gain(above * step)
        return torch.where(of_above > of_below, above, below), torch.maximum(of_below, of_above)

    def _gain(self, scale: Tensor) -> Tensor:
        """By how much sum h (t - s q)^2, of the nearest levels q, is smaller than sum h t^2."""
        q = (self._t / scale).round_().clamp_(self._low, self._high)
        product = (q * self._weighted).sum(-1, keepdim=True)
        square = (q.square_() if self._share is None else q.square_().mul_(self._share)).sum(-1, keepdim=True)
        return scale * (2 * product - scale * square)


class _Fit:
    """The best scale (and lowest level) of each group so far."""

    def __init__(self, t: Tensor, share: Tensor | None) -> None:
        """t: float32[..., size], none far from 1."""
        self._t = t
        self._share = share
        self._weighted = t if share is None else t * share
        self._gain = torch.full_like(t[..., :1], -torch.inf)
        self.scale = torch.ones_like(self._gain)
        self.low = torch.zeros_like(self._gain)

    def try_scale(self, scale: Tensor | float, low: Tensor | float, high: Tensor | float) -> None:
        """Round to levels `low` to `high`; take the scale that suits the result best where that beats the best.

        With values q fixed, sum h (t - s q)^2 is least for s = sum h t q / sum h q^2, and then smaller than sum h t^2
        by (sum h t q)^2 / sum h q^2: the gain.
        """
        q = self._t / scale if isinstance(scale, Tensor) else self._t * (1 / scale)
        q.round_().clamp_(low, high)  # type: ignore[arg-type]  # both may be numbers, or both tensors
        product = (q * self._weighted).sum(-1, keepdim=True)
        square = (q.square_() if self._share is None else q.square_().mul_(self._share)).sum(-1, keepdim=True)
        found = product / square
        gain = product * found
        # q may be 0 throughout (0 / 0 is not a gain)
        better = gain > self._gain
        self._gain = torch.where(better, gain, self._gain)
        self.scale = torch.where(better, found, self.scale)
        if isinstance(low, Tensor):
            self.low = torch.where(better, low, self.low)
