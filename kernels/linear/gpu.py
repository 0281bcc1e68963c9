"""y = x W^T on a GPU: weights in floats, or in 4 bits with groups, for one row of x or for thousands.

One to eight rows are a matter of memory: `few_rows` reads the weights as they are stored, by `few_rows.cu` where NVRTC and the
shapes allow, else by the Triton kernel here, which computes the same from the same bytes. More rows are a matter of
arithmetic: the weight becomes floats (`unpacked`) for the length of the call, and the vendor's library multiplies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from lensc.kernels import nvrtc

jit: Callable[[Any], Any] = triton.jit

STEP = 128
"""Inputs of a 4-bit weight that a warp takes at a time; rows are filled up to a multiple with weights of 0."""
MOST_ROWS = 8
_SOURCE = Path(__file__).with_name("few_rows.cu")
_TILE, _WARPS, _DEPTH = 16, 16, 8
_LEAST_BYTES = 116 << 10
"""Of shared memory for a block: more than half, so that no multiprocessor has two blocks of a kernel and another none."""
_STATIC_BYTES = 2048
"""Of shared memory, for what the kernel and the driver take beside x."""


class Ending(IntEnum):
    """What becomes of the sums; the numbers are those of few_rows.cu."""

    STORE = 0
    """y in the type of the weight's activations."""
    LOGITS = 1
    """y in float32."""
    RESIDUAL = 2
    """float32: a residual stream plus y."""
    SILU = 3
    """silu(gate) * up, where the first half of the outputs is gate and the second up."""


@dataclass(frozen=True)
class FloatWeight:
    """values: float[outputs, inputs], in the type that is computed in."""

    values: torch.Tensor

    @property
    def outputs(self) -> int:
        return self.values.shape[0]

    @property
    def inputs(self) -> int:
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


@dataclass(frozen=True)
class GroupedWeight:
    """(value - zero) * scale * factor, 4 bits each. See `pack`.

    packed: uint8[outputs, padded / 2]; scale: float16[outputs / 16, groups, 16], the largest of an output is 1; factor:
    float32[outputs]; zero: uint8 in the shape of scale, None is 8. `group` inputs share a scale, a multiple of `span`.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    factor: torch.Tensor
    zero: torch.Tensor | None
    group: int
    inputs: int

    @property
    def outputs(self) -> int:
        return self.packed.shape[0]

    @property
    def padded(self) -> int:
        """Inputs with those that rows were filled up with."""
        return 2 * self.packed.shape[1]

    @property
    def span(self) -> int:
        """Inputs that are summed before they are scaled."""
        return next(span for span in (128, 64, 32) if self.group % span == 0)

    @property
    def nbytes(self) -> int:
        parts = (self.packed, self.scale, self.factor, self.zero)
        return sum(part.nbytes for part in parts if part is not None)


Weight = FloatWeight | GroupedWeight


def can_pack(group: int) -> bool:
    """Whether groups of `group` inputs can be packed."""
    return group in (32, 64) or group % STEP == 0


def pack(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: int, inputs: int
) -> GroupedWeight:
    """Weights as they lie in a portable graph, in the order in which `few_rows.cu` takes them.

    values: uint8[outputs, inputs / 2], neighbouring inputs in a byte, the lower bits first; scale: float32[outputs, groups];
    zero: uint8[outputs, groups] or None for 8. Of 128 inputs the words of 8 are turned from 4 x 4 [i, t] to [t, i].
    """
    outputs = values.shape[0]
    short = -inputs % STEP
    if short:
        middle = torch.full((outputs, short // 2), 0x88, dtype=torch.uint8, device=values.device)
        values = torch.cat([values, middle], dim=1)
    packed = values.reshape(outputs, -1, 4, 4, 4).transpose(2, 3).reshape(outputs, -1).contiguous()
    factor = scale.abs().amax(dim=1)
    ratio = (scale / torch.where(factor == 0, 1, factor)[:, None]).to(torch.float16)
    groups = -(-(inputs + short) // group)
    return GroupedWeight(
        packed, _in_tiles(ratio, groups), factor, None if zero is None else _in_tiles(zero, groups), group, inputs
    )


def _in_tiles(of_groups: torch.Tensor, groups: int) -> torch.Tensor:
    """[outputs, fewer groups] -> [outputs / 16, groups, 16], filled up with zeros."""
    outputs, given = of_groups.shape
    filled = torch.nn.functional.pad(of_groups, (0, groups - given, 0, -outputs % _TILE))
    return filled.reshape(-1, _TILE, groups).transpose(1, 2).contiguous()


def unpacked(weight: GroupedWeight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight in floats: [outputs, inputs]. `out` is a flat buffer to write into."""
    size = weight.outputs * weight.inputs
    made = torch.empty(size, dtype=dtype, device=weight.packed.device) if out is None else out[:size]
    made = made.view(weight.outputs, weight.inputs)
    words = min(256, weight.padded // 8)
    grid = (triton.cdiv(weight.outputs, _TILE), triton.cdiv(weight.padded // 8, words))
    zero = weight.packed if weight.zero is None else weight.zero
    _unpack[grid](
        weight.packed.view(torch.int32), weight.scale, weight.factor, zero, made, weight.outputs, weight.inputs,
        weight.padded // 8, weight.group, weight.scale.shape[1], HAS_ZERO=weight.zero is not None, ROWS=_TILE,
        WORDS=words,
    )  # fmt: skip
    return made


@jit
def _nibbles(packed, rows, k, row_bytes, mask):  # type: ignore[no-untyped-def]
    """Values 0 to 15 at [rows, k] of a packed weight."""
    word, within = k // 8, k % 8
    # words of 128 inputs lie [t, i], inputs are 32 i + 8 t
    place = (word // 16) * 64 + (word % 4) * 16 + (word // 4 % 4) * 4 + within // 2
    byte = tl.load(packed + rows[:, None].to(tl.int64) * row_bytes + place[None, :], mask=mask, other=0)
    return (byte >> (4 * (within % 2))[None, :].to(tl.uint8)) & 15


@jit
def _place_of_scale(rows, group, groups):  # type: ignore[no-untyped-def]
    return ((rows // 16).to(tl.int64) * groups + group) * 16 + rows % 16


@jit
def _unpack(  # type: ignore[no-untyped-def]
    packed, scale, factor, zero, out, outputs, inputs, row_words, group, groups,
    HAS_ZERO: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One row after another, a word of 8 inputs at a time."""
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    nibble = tl.arange(0, 8)
    first = (
        word // 16 * 128 + word % 4 * 32 + word // 4 % 4 * 8
    )  # words of 128 inputs lie [t, i], inputs are 32 i + 8 t
    k = first[:, None] + nibble[None, :]
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        inside = (word < row_words) & (row < outputs)
        eight = tl.load(packed + row.to(tl.int64) * row_words + word, inside, 0)
        value = ((eight[:, None] >> (4 * nibble)[None, :]) & 15).to(tl.float32)
        place = _place_of_scale(row, first // group, groups)
        by = tl.load(scale + place, inside, 0.0).to(tl.float32) * tl.load(factor + row, row < outputs, 0.0)
        less = tl.load(zero + place, inside, 0).to(tl.float32)[:, None] if HAS_ZERO else 8.0
        y = (value - less) * by[:, None]
        mask = inside[:, None] & (k < inputs)
        tl.store(out + row.to(tl.int64) * inputs + k, y.to(out.dtype.element_ty), mask=mask)


def few_rows(
    x: torch.Tensor,
    weight: Weight,
    ending: Ending = Ending.STORE,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """One to eight rows of x times a weight.

    x: `dtype`[rows, inputs], or with `norm`, a float32[inputs] and an epsilon, float32 that is RMS-normalized first. residual:
    float32[rows, outputs], for that ending; `out` may be the same. Returns [rows, outputs], with SILU half as wide, in
    float32 for LOGITS and RESIDUAL and else in `dtype`.
    """
    rows = x.shape[0]
    width = weight.outputs // 2 if ending == Ending.SILU else weight.outputs
    if out is None:
        kind = torch.float32 if ending in (Ending.LOGITS, Ending.RESIDUAL) else dtype
        out = torch.empty(rows, width, dtype=kind, device=x.device)
    shape = None
    if x.is_cuda and dtype == torch.bfloat16 and weight.inputs % 8 == 0:
        form = (16, 0, False) if isinstance(weight, FloatWeight) else (4, weight.span, weight.zero is not None)
        shape = _shape(form, _padded(weight), weight.outputs, rows, ending == Ending.SILU, x.device.index or 0)
    if shape is None:
        _launch_triton(x, weight, ending, norm, residual, out, exact=dtype == torch.float32)
        return out
    for start in range(0, rows, shape.rows):
        part = slice(start, start + shape.rows)
        _launch_cuda(x[part], weight, shape, ending, norm, None if residual is None else residual[part], out[part])
    return out


# --- CUDA ---------------------------------------------------------------------------------------------------------


def _padded(weight: Weight) -> int:
    return weight.inputs if isinstance(weight, FloatWeight) else weight.padded


@dataclass(frozen=True)
class _Shape:
    """How few_rows.cu runs: how many rows of x at once, its definitions, and what shared memory it asks for."""

    rows: int
    tiles: int
    warps: int
    depth: int
    shared_bytes: int


@functools.cache
def _shape(
    weight_format: tuple[int, int, bool], padded: int, outputs: int, rows: int, silu: bool, device: int
) -> _Shape | None:
    """The largest that fits the device, for a weight of (bits, span, has zeros); None where it cannot run."""
    limits: Any = torch.cuda.get_device_properties(device)
    bits, span, has_zero = weight_format
    if limits.major < 9 or padded % STEP or outputs % (2 * _TILE):
        return None
    room = limits.shared_memory_per_block_optin - _STATIC_BYTES
    tiles = 2 if silu or bits == 4 else 1
    for most in range(min(rows, MOST_ROWS), 0, -1):
        for depth in (_DEPTH // tiles, 4, 3, 2):
            of_scales = 0 if bits == 16 else STEP // span * (32 + 16 * has_zero)
            ring = _WARPS * depth * tiles * (1024 + of_scales)
            staged = most * (2 * padded + (16 if bits == 16 else 32 + 8 * (padded // span)))
            size = ring + staged + 2 * _WARPS * most * _TILE * tiles * 4
            if size <= room:
                passes = -(-rows // most)
                return _Shape(-(-rows // passes), tiles, _WARPS, depth, max(size, min(room, _LEAST_BYTES)))
    return None


def _launch_cuda(
    x: torch.Tensor,
    weight: Weight,
    shape: _Shape,
    ending: Ending,
    norm: tuple[torch.Tensor, float] | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    grouped, rows = weight if isinstance(weight, GroupedWeight) else None, x.shape[0]
    definitions = {
        "BITS": 16 if grouped is None else 4,
        "GROUP": 0 if grouped is None else grouped.group,
        "SPAN": 0 if grouped is None else grouped.span,
        "ZEROS": int(grouped is not None and grouped.zero is not None),
        "NORM": int(norm is not None),
        "ENDING": int(ending),
        "MOST_ROWS": 4 if rows <= 4 else MOST_ROWS,
        "TILES": shape.tiles,
        "WARPS": shape.warps,
        "DEPTH": shape.depth,
    }
    device = x.device.index or 0
    major, minor = torch.cuda.get_device_capability(device)
    kernel = nvrtc.kernel(_SOURCE, "few_rows", tuple(definitions.items()), device, f"sm_{major}{minor}")
    tiles = -(-weight.outputs // (_TILE * shape.tiles))
    blocks = min(tiles, torch.cuda.get_device_properties(device).multi_processor_count)
    first = weight.values if isinstance(weight, FloatWeight) else weight.packed
    groups = 0 if grouped is None else grouped.scale.shape[1]

    def address(tensor: torch.Tensor | None) -> tuple[int, Any]:
        return (0 if tensor is None else tensor.data_ptr(), nvrtc.POINTER)

    arguments = [
        address(x),
        address(None if norm is None else norm[0]),
        (0.0 if norm is None else norm[1], nvrtc.FLOAT),
        address(first),
        address(None if grouped is None else grouped.scale),
        address(None if grouped is None else grouped.factor),
        address(None if grouped is None else grouped.zero),
        (groups, nvrtc.INT),
        address(residual),
        address(out),
        (rows, nvrtc.INT),
        (weight.inputs, nvrtc.INT),
        (_padded(weight), nvrtc.INT),
        (weight.outputs, nvrtc.INT),
    ]
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernel.launch(blocks, 32 * shape.warps, shape.shared_bytes, arguments, stream)


# --- Triton -------------------------------------------------------------------------------------------------------


def _launch_triton(
    x: torch.Tensor,
    weight: Weight,
    ending: Ending,
    norm: tuple[torch.Tensor, float] | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    exact: bool,
) -> None:
    rows, outputs = out.shape
    grouped = weight if isinstance(weight, GroupedWeight) else None
    # the interpreter takes as long for a large block as for a small one
    block = grouped.span if grouped is not None else 64 if x.is_cuda else 256
    values = weight.values if isinstance(weight, FloatWeight) else weight.packed
    block_outputs = 16 if x.is_cuda else 128
    _few_rows[(triton.cdiv(outputs, block_outputs),)](
        x, x if norm is None else norm[0], 0.0 if norm is None else norm[1], values,
        values if grouped is None else grouped.scale, values if grouped is None else grouped.factor,
        values if grouped is None or grouped.zero is None else grouped.zero, out if residual is None else residual, out,
        rows, weight.inputs, outputs, values.shape[1], 1 if grouped is None else grouped.group,
        1 if grouped is None else grouped.scale.shape[1],
        GROUPED=grouped is not None, HAS_ZERO=grouped is not None and grouped.zero is not None, NORM=norm is not None,
        ENDING=int(ending), EXACT=exact, INTERPRETED=not x.is_cuda, ROWS=triton.next_power_of_2(max(16, rows)), OUTPUTS=block_outputs, BLOCK=block,
    )  # fmt: skip


@jit
def _few_rows(  # type: ignore[no-untyped-def]
    x, norm, epsilon, values, scale, factor, zero, residual, y, rows, inputs, outputs, row_size, group, groups,
    GROUPED: tl.constexpr, HAS_ZERO: tl.constexpr, NORM: tl.constexpr, ENDING: tl.constexpr, EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, ROWS)
    here = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inverse = tl.full((ROWS,), 1.0, tl.float32)
    if NORM:
        squares = tl.zeros((ROWS,), tl.float32)
        for start in range(0, inputs, BLOCK):
            k = start + tl.arange(0, BLOCK)
            part = tl.load(x + n[:, None] * inputs + k[None, :], (n < rows)[:, None] & (k < inputs)[None, :], 0.0)
            squares += tl.sum(part * part, axis=1)
        inverse = 1.0 / tl.sqrt(squares / inputs + epsilon)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    upper = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, BLOCK):
        k = start + tl.arange(0, BLOCK)
        part = tl.load(x + n[:, None] * inputs + k[None, :], (n < rows)[:, None] & (k < inputs)[None, :], 0.0)
        if NORM:
            part = part * inverse[:, None] * tl.load(norm + k, k < inputs, 0.0)[None, :]
        total += _part(
            part, here, k, values, scale, factor, zero, inputs, outputs, row_size, group, groups, GROUPED,
            HAS_ZERO, EXACT, INTERPRETED,
        )  # fmt: skip
        if ENDING == 3:
            upper += _part(
                part, here + outputs, k, values, scale, factor, zero, inputs, 2 * outputs, row_size, group, groups,
                GROUPED, HAS_ZERO, EXACT, INTERPRETED,
            )  # fmt: skip
    mask = (n < rows)[:, None] & (here < outputs)[None, :]
    place = n[:, None] * outputs + here[None, :]
    if ENDING == 2:
        total += tl.load(residual + place, mask, 0.0)
    if ENDING == 3:
        small = tl.exp(-tl.abs(total))  # does not overflow
        total = total * tl.where(total < 0, small, 1.0) / (1.0 + small) * upper
    tl.store(y + place, total.to(y.dtype.element_ty), mask)


@jit
def _part(  # type: ignore[no-untyped-def]
    part, here, k, values, scale, factor, zero, inputs, outputs, row_size, group, groups,
    GROUPED: tl.constexpr, HAS_ZERO: tl.constexpr, EXACT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Products of [ROWS, BLOCK] with BLOCK inputs of the outputs `here`: float32[ROWS, OUTPUTS]."""
    mask = (here < outputs)[:, None] & (k < inputs)[None, :]
    if GROUPED:
        weight = _nibbles(values, here, k, row_size, mask).to(tl.float32)
        place = _place_of_scale(here, tl.min(k) // group, groups)
        weight -= tl.load(zero + place, here < outputs, 0).to(tl.float32)[:, None] if HAS_ZERO else 8.0
        by = tl.load(scale + place, here < outputs, 0.0).to(tl.float32) * tl.load(factor + here, here < outputs, 0.0)
        weight = tl.where(mask, weight, 0.0)
    else:
        weight = tl.load(values + here[:, None].to(tl.int64) * row_size + k[None, :], mask, 0.0)
        by = tl.full(here.shape, 1.0, tl.float32)
    if not EXACT:
        part, weight = part.to(tl.bfloat16), weight.to(tl.bfloat16)
    if EXACT or INTERPRETED:  # which has no products of bfloat16
        made = tl.dot(part.to(tl.float32), tl.trans(weight.to(tl.float32)), input_precision="ieee")
    else:
        made = tl.dot(part, tl.trans(weight))
    return made * by[None, :]
