"""Weights as few-bit integers with one scale per group of inputs: the format, rounding to it, and its bytes.

A weight `w: float32[out, in]` is stored as `values[out, in]`, `scales: float32[out, groups]` and zero points, and stands
for `(values - zero_point) * scale`. A group is `group_size` neighbouring inputs of one output; the last group of a row
may be shorter. Below 8 bits values are unsigned, and a symmetric format has the zero point 2^(bits-1); 8 symmetric bits
are signed, -127 to 127, without a zero point.

A scale may be negative. A symmetric format of 4 bits reaches from -8 to 7 scales, and the sign chooses which side has
the extra level. For an engine that takes positive scales only, `15 - value` with zero point 7 and `-scale` are the same
numbers.

With `scale_bits` the scales of a row are whole multiples of one step, of magnitude 1 to `LARGEST_MULTIPLE`, stored as the
float32 that they are: a file looks as it does without. (value - zero point) * multiple is then an int8, and an engine that
recognizes it (`lensc.backends._multiples`) sums a row in integers.

In a file, 3 and 4 bits take half a byte, 2 bits a quarter: they follow each other along the inputs, the first in the
lowest bits. Where rows end with whole bytes that is ONNX's UINT4 and UINT2, OpenVINO's u4 (it reads no UINT2) and, where
groups divide the inputs, what the operator MatMulNBits of ONNX Runtime takes. Of that operator ONNX Runtime 1.32 has on
x86 CPUs:

    bits              2, 4, 8; 3 is refused
    block_size        a power of two, at least 16; for 2 bits at most 256
    short last group  B is padded to a whole block, its values never read
    zero points       packed like the values, each row padded to whole bytes; without them 2^(bits-1)
    float zero points taken for 2 and 4 bits, refused for 8; accuracy_level is then ignored: computed in float32
    accuracy_level 4  int8 products for 4 and 8 bits with every block size, for 2 bits with 32, 64 and 128 only
                      (with 16 and 256 it is ignored)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from lensc.backends.errors import InputError, UsageError

from .grid import SHRINK, fit_asymmetric, fit_multiples, fit_symmetric, round_to_grid
from .parallel import for_each

BITS = (2, 3, 4, 8)
SMALLEST_GROUP = 16
"""No engine takes smaller groups, and their scales would cost more than the bits they save."""

CHUNK = 1 << 17
"""Weights that a thread works on at once: temporaries of half a MiB stay in its cache, which is faster than memory."""

SCALE_BITS = 4
"""Of a multiple's magnitude."""

_SPELLING = re.compile(
    r"w(?P<bits>[1-9][0-9]?)(?:-g(?P<group>[1-9][0-9]{0,6}))?(?:-s(?P<scale>[1-9][0-9]?))?(?P<asym>-asym)?", re.ASCII
)


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is stored: `w8`, `w4-g128-s4`, `w4-g32-asym`. Raises UsageError for what means nothing.

    `group_size=None` is one group per output; `scale_bits=None` leaves each scale free.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_bits: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.bits not in BITS:
            problems.append(f"{self.bits} bits is not one of {', '.join(map(str, BITS))}")
        if self.group_size is not None and self.group_size < SMALLEST_GROUP:
            problems.append(f"group size {self.group_size}, expected at least {SMALLEST_GROUP}")
        if self.scale_bits is not None:
            if self.scale_bits != SCALE_BITS:
                problems.append(f"scales of {self.scale_bits} bits, expected {SCALE_BITS}")
            if self.bits >= 8:
                problems.append(f"scales of {self.scale_bits} bits are for weights below 8 bits")
            if not self.symmetric:
                problems.append(f"scales of {self.scale_bits} bits are for weights without a zero point")
            if self.group_size is None:
                problems.append(f"scales of {self.scale_bits} bits are for weights in groups")
        if problems:
            raise UsageError(f"weight format {str(self)!r}: " + "; ".join(problems))

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """The format spelled `text`. Raises UsageError that names what is wrong."""
        match = _SPELLING.fullmatch(text)
        if match is None:
            raise UsageError(f"weight format {text!r}: expected like w4-g128-s4, w4-g32-asym or w8")
        group, scale = (int(match[part]) if match[part] else None for part in ("group", "scale"))
        return cls(int(match["bits"]), group, match["asym"] is None, scale)

    def __str__(self) -> str:
        group = "" if self.group_size is None else f"-g{self.group_size}"
        scale = "" if self.scale_bits is None else f"-s{self.scale_bits}"
        return f"w{self.bits}{group}{scale}{'' if self.symmetric else '-asym'}"

    @property
    def is_signed(self) -> bool:
        """Whether values are int8; all others are uint8."""
        return self.bits == 8 and self.symmetric

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `QuantizedWeight.values`."""
        return torch.int8 if self.is_signed else torch.uint8

    @property
    def container_bits(self) -> int:
        """Bits that one value takes in a file."""
        return 4 if self.bits == 3 else self.bits

    @property
    def lowest(self) -> int:
        return -127 if self.is_signed else 0

    @property
    def highest(self) -> int:
        return 127 if self.is_signed else 2**self.bits - 1

    @property
    def zero_point(self) -> int:
        """The zero point of a symmetric format."""
        return 0 if self.is_signed else 2 ** (self.bits - 1)

    def group_of(self, inputs: int) -> int:
        """How many of `inputs` inputs share a scale: the DequantizeLinear's block_size."""
        return min(self.group_size or inputs, inputs)

    def groups(self, inputs: int) -> int:
        return -(-inputs // self.group_of(inputs))

    def is_turned(self, inputs: int) -> bool:
        """Whether a weight lies [inputs, outputs] in a file, as integer products with a scale per output take it."""
        return self.is_signed and self.groups(inputs) == 1

    def bytes_for(self, shape: tuple[int, int]) -> int:
        """Bytes of values, scales and zero points of a weight [out, in], each tensor packed as `pack` does."""
        outputs, inputs = shape
        groups = self.groups(inputs)
        values = outputs * -(-inputs * self.container_bits // 8)
        zero_points = 0 if self.is_signed else -(-outputs * groups * self.container_bits // 8)
        return values + 4 * outputs * groups + zero_points


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [out, in] in `format`.

    values: uint8[out, in], or int8 where `format.is_signed`; scales: float32[out, groups], none of them 0, finite;
    zero_points: uint8[out, groups], None for a symmetric format.
    """

    values: Tensor
    scales: Tensor
    zero_points: Tensor | None
    format: WeightFormat

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]


def quantize_rtn(
    weight: Tensor, format: WeightFormat, search: bool = True, importance: Tensor | None = None
) -> QuantizedWeight:
    """Round `weight: float[out, in]` to the nearest values of `format`.

    With `search` each group's scale (and zero point) minimises the squared error over a small grid, never worse than
    the plain range; without, it covers the range from the smallest to the largest weight. Where
    scales are multiples of a step, they are those near these with the smallest error. `importance: float[in]`, at
    least 0, weighs the errors; with the mean square of each input (`Hessian.diagonal`) the error counted is that of the
    output, as far as inputs are uncorrelated. Rows are independent: pieces give the same as the whole. Works in pieces
    of `CHUNK` weights whatever the size. Raises InputError for NaN or Inf.
    """
    scales, zero_points = fit_scales(weight, format, SHRINK[format.bits] if search else (), importance)
    values = torch.empty(weight.shape, dtype=format.dtype)

    def round_rows(rows: slice) -> None:
        zeros = None if zero_points is None else zero_points[rows]
        values[rows] = round_to_format(weight[rows], scales[rows], zeros, format)

    for_each(round_rows, weight.shape[0], CHUNK // weight.shape[1])
    return QuantizedWeight(values, scales, zero_points, format)


def fit_scales(
    weight: Tensor,
    format: WeightFormat,
    shrink: tuple[float, ...],
    importance: Tensor | None = None,
    are_rounded: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """scales: float32[out, groups] and zero points: uint8[out, groups] or None, as `quantize_rtn` uses them.

    `shrink`: the shares of each group's range that are tried, from 1.0 down; empty for the plain range. Without
    `are_rounded`, values will not be the nearest, but make up for the errors of others (see `fit_multiples`).
    """
    check_weight(weight)
    outputs, inputs = weight.shape
    size, groups = format.group_of(inputs), format.groups(inputs)
    share = _shares(importance, inputs)
    scales = torch.empty(outputs, groups)
    zeros = None if format.symmetric else torch.empty(outputs, groups, dtype=torch.uint8)

    low, high = format.lowest - format.zero_point, format.highest - format.zero_point
    missing = groups * size - inputs
    # what a short last group lacks counts for nothing, with zeros there
    padded = share if share is None or not missing else pad(share, (0, missing))

    def fit_rows(rows: slice) -> None:
        x = weight[rows].float()
        # whole groups in one piece, then the short one
        for first, last, width in ((0, inputs // size, size), (inputs // size, groups, inputs % size)):
            if first == last:
                continue
            columns = slice(first * size, first * size + (last - first) * width)
            grouped = x[:, columns].reshape(-1, last - first, width)
            part = None if share is None else share[columns].reshape(-1, width)
            if zeros is None:
                scales[rows, first:last] = fit_symmetric(grouped, low, high, shrink, part)
            else:
                scales[rows, first:last], zero = fit_asymmetric(grouped, format.highest, shrink, part)
                zeros[rows, first:last] = zero.to(torch.uint8)
        if format.scale_bits is not None:
            whole = (pad(x, (0, missing)) if missing else x).view(-1, groups, size)
            part = None if padded is None else padded.view(groups, size)
            scales[rows] = fit_multiples(whole, scales[rows], low, high, part, are_rounded)

    for_each(fit_rows, outputs, CHUNK // inputs)
    return scales, zeros


def round_to_format(x: Tensor, scales: Tensor, zero_points: Tensor | None, format: WeightFormat) -> Tensor:
    """The nearest values of `format` for x: float[out, in], with given scales and zero points: uint8 or int8[out, in]."""
    spread = _spread(scales, x.shape[1], format)
    zero = float(format.zero_point) if zero_points is None else _spread(zero_points, x.shape[1], format).float()
    return round_to_grid(x.float(), spread, zero, format.lowest, format.highest).to(format.dtype)


def dequantize(quantized: QuantizedWeight) -> Tensor:
    """The weight that `quantized` stands for: float32[out, in]."""
    format, inputs = quantized.format, quantized.shape[1]
    weight = torch.empty(quantized.shape)

    def fill_rows(rows: slice) -> None:
        values = quantized.values[rows].float()
        if quantized.zero_points is None:
            values -= format.zero_point
        else:
            values -= _spread(quantized.zero_points[rows], inputs, format).float()
        weight[rows] = values * _spread(quantized.scales[rows], inputs, format)

    for_each(fill_rows, quantized.shape[0], CHUNK // inputs)
    return weight


def pack(quantized: QuantizedWeight) -> npt.NDArray[np.uint8]:
    """The bytes of the values: uint8[out, in] for 8 bits (int8 as two's complement), else uint8[out, ceil(in * bits / 8)].

    A row that ends within a byte is filled up with the zero point.
    """
    values: npt.NDArray[np.uint8] = quantized.values.contiguous().numpy().view(np.uint8)
    bits = quantized.format.container_bits
    if bits == 8:
        return values
    missing = -values.shape[1] % (8 // bits)
    if missing:
        zeros = np.repeat(_explicit_zero_points(quantized)[:, -1:].numpy(), missing, axis=1)
        values = np.concatenate((values, zeros), axis=1)
    return pack_bits(values, bits)


def pack_zero_points(quantized: QuantizedWeight) -> npt.NDArray[np.uint8] | None:
    """The bytes of the zero points [out, groups], symmetric ones written out; None for int8, which has none.

    8 bits: uint8[out, groups]. Below: uint8[ceil(out * groups * bits / 8)] without a gap between rows, as ONNX packs any
    tensor of such a type; what is left of the last byte is 0.
    """
    if quantized.format.is_signed:
        return None
    zeros: npt.NDArray[np.uint8] = _explicit_zero_points(quantized).contiguous().numpy()
    bits = quantized.format.container_bits
    if bits == 8:
        return zeros
    flat = zeros.reshape(-1)
    return pack_bits(np.append(flat, np.zeros(-flat.size % (8 // bits), np.uint8)), bits)


def unpack(
    packed: npt.NDArray[np.uint8], scales: Tensor, zero_points: Tensor | None, inputs: int, format: WeightFormat
) -> QuantizedWeight:
    """The inverse of `pack`: `packed` as it returned it, `inputs` the number of columns."""
    if format.container_bits == 8:
        values = torch.from_numpy(packed.copy())
        return QuantizedWeight(values.view(format.dtype), scales, zero_points, format)
    values = torch.from_numpy(unpack_bits(packed, format.container_bits))
    return QuantizedWeight(values[:, :inputs].contiguous(), scales, zero_points, format)


def pack_bits(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """uint8[..., n] of `bits` bits each, 2 or 4 -> uint8[..., n * bits / 8], the first value in the lowest bits."""
    per_byte = 8 // bits
    packed: npt.NDArray[np.uint8] = values[..., ::per_byte].copy()
    for i in range(1, per_byte):
        packed |= values[..., i::per_byte] << np.uint8(bits * i)
    return packed


def unpack_bits(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of `pack_bits`."""
    per_byte = 8 // bits
    values = np.empty((*packed.shape[:-1], per_byte * packed.shape[-1]), np.uint8)
    for i in range(per_byte):
        values[..., i::per_byte] = packed >> np.uint8(bits * i) & np.uint8(2**bits - 1)
    return values


def quantize_table(rows: Tensor, format: WeightFormat) -> QuantizedWeight:
    """Rows of an embedding table, which are looked up: eight bits cover each row's range, fewer are fitted to it.

    Raises InputError for NaN or Inf, and for groups that do not divide a row of fewer than eight bits.
    """
    width = rows.shape[1]
    if format.bits < 8 and (width % 2 or width % format.group_of(width)):
        raise InputError(f"embedding table {list(rows.shape)}: {format} needs an even width that its groups divide")
    return quantize_rtn(rows, format, search=format.bits < 8)


def packed_table(table: QuantizedWeight) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.float32]]:
    """Values and scales as `lensc.runtime.embedding` reads them: int8[rows, in] and float32[rows], or uint8[rows, in / 2]
    and float32[rows, groups], where zero stands at 8 whatever the bits, and each takes 4.
    """
    if table.format.bits == 8:
        return table.values.numpy(), table.scales[:, 0].contiguous().numpy()
    return pack_bits((table.values + (8 - table.format.zero_point)).numpy(), 4), table.scales.numpy()


def check_weight(weight: Tensor) -> None:
    """Raise InputError unless `weight` is a matrix with finite numbers in it."""
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise InputError(f"expected a matrix of floats to quantize, got {dtype}{list(weight.shape)}")

    def check_rows(rows: slice) -> None:
        finite = torch.isfinite(weight[rows])
        if not bool(finite.all()):
            row, column = (~finite).nonzero()[0].tolist()
            value = float(weight[rows][row, column])
            raise InputError(
                f"weight {list(weight.shape)}: {value} at [{rows.start + row}, {column}], expected finite numbers"
            )

    for_each(check_rows, weight.shape[0], CHUNK // weight.shape[1])


def _explicit_zero_points(quantized: QuantizedWeight) -> Tensor:
    if quantized.zero_points is not None:
        return quantized.zero_points
    return torch.full(quantized.scales.shape, quantized.format.zero_point, dtype=torch.uint8)


def _spread(per_group: Tensor, inputs: int, format: WeightFormat) -> Tensor:
    """[out, groups] -> [out, in], or [out, 1] where all inputs share it."""
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(format.group_of(inputs), dim=1)[:, :inputs]


def _shares(importance: Tensor | None, inputs: int) -> Tensor | None:
    """Importances with mean 1. Inputs that were never seen keep a little, so that their weights stay near the truth."""
    if importance is None:
        return None
    if importance.shape != (inputs,) or not bool(torch.isfinite(importance).all()) or float(importance.min()) < 0:
        raise InputError(
            f"importance: expected {inputs} finite numbers of at least 0, got {list(importance.shape)} "
            f"from {float(importance.min())} to {float(importance.max())}"
        )
    mean = importance.double().mean()
    if float(mean) == 0:
        return None
    return (importance.double() / mean).clamp_min(1e-4).float()
