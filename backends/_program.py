"""A lowered graph, as the backends with our own kernels run it: steps over matrices, and where their constants lie.

An artifact is this program as JSON, `<target>.json`, beside the data files that it names. A *value* is float32[rows,
width] with its rows contiguous; its id is its place in `Program.values`. The inputs of the program are the first values,
and each step makes the next one, so that a step can only read what was made before it and nothing is made twice. (Whoever
plans memory may let a step write where it reads for the last time: Add, SiluMul, GeluTanh, and the residual of a Linear.)

How many rows a value has is known when it runs. It is written as a product of the graph's symbolic dimensions and of
numbers, `batch*tokens`, `slices*96`: the first factor counts what attention keeps apart (sequences, slices), the others
the rows that each of them has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

Kind = Literal["f32", "int8", "int8_tiles", "uint8", "uint4", "uint2"]
BITS: dict[Kind, int] = {"f32": 32, "int8": 8, "int8_tiles": 8, "uint8": 8, "uint4": 4, "uint2": 2}

TILE = (16, 4)
"""Outputs and inputs that lie together in `int8_tiles`, whose rows and columns are filled with zeros to whole tiles."""
TILED_OUTPUTS, TILED_INPUTS = 32, 64
CHUNK_BYTES = 64
"""Of a row of weights in groups: inputs are rounded in units of a group, or of a chunk where that is smaller."""


UNIT_GROUPS, SPAN_INPUTS = 4, 2048
"""Of weights whose scales are multiples of a step: the groups whose inputs are rounded together, and the most inputs; see
int4_linear.h."""


@dataclass(frozen=True)
class Place:
    """Where bytes lie: a file of the program, and the offset in it."""

    file: str
    offset: int


@dataclass(frozen=True)
class Constant:
    """A float32[rows, width] in a file; `name` is that of the initializer it was, or made up for what was folded."""

    name: str
    rows: int
    width: int
    place: Place

    @property
    def nbytes(self) -> int:
        return 4 * self.rows * self.width


@dataclass(frozen=True)
class WeightRecord:
    """The weight of a linear, [outputs, inputs] with its rows contiguous, quantized along the inputs.

    It stands for `(values - zero_point) * scale`. A group is `group` neighbouring inputs of one output, the last of a row
    may be shorter; 0 is one group per output. `scale` is float32[outputs, groups]. `zero_point` is [outputs, groups] in
    the type of the values, packed as they are but as one long row, so that a row of it may begin within a byte; without
    one it is 2^(bits-1), and 0 for int8, which has none. Values of few bits follow each other from the lowest bits of a
    byte to the highest, and rows of values end with whole bytes.

    With `multiples`, int8[outputs, groups] of magnitude 1 to 15, a scale is a multiple of a step, and `scale` holds the
    steps, float32[outputs]: a whole `unit` of inputs is then summed as integers.

    `int8_tiles` is int8 with one group per output, packed for the kernel: [outputs / 16, inputs / 4, 16, 4], both filled
    with zeros to whole tiles (multiples of 32 outputs and 64 inputs), then int32[outputs], the sum of each output's weights.

    `activations` int8: inputs are rounded to 8 bits, symmetric, scale max|x| / 127, with a scale per row and `unit`.
    """

    name: str
    kind: Kind
    outputs: int
    inputs: int
    group: int
    values: Place
    scale: Place | None
    zero_point: Place | None
    activations: Literal["float", "int8"]
    multiples: Place | None = None

    @property
    def groups(self) -> int:
        """Scales of one output."""
        return -(-self.inputs // self.group) if self.group else 1

    @property
    def unit(self) -> int:
        """Neighbouring inputs that are rounded to 8 bits with one scale; the last of a row may be fewer. Whoever computes may
        take smaller units.
        """
        if self.multiples is not None:
            return min(UNIT_GROUPS * self.group, SPAN_INPUTS) if self.groups > 1 else SPAN_INPUTS
        group = self.group or self.inputs
        return group if self.kind == "int8_tiles" else min(group, 8 * CHUNK_BYTES // BITS[self.kind])

    @property
    def padded(self) -> tuple[int, int]:
        """Outputs and inputs of `int8_tiles` with the zeros."""
        return -(-self.outputs // TILED_OUTPUTS) * TILED_OUTPUTS, -(-self.inputs // TILED_INPUTS) * TILED_INPUTS

    @property
    def values_bytes(self) -> int:
        if self.kind == "int8_tiles":
            outputs, inputs = self.padded
            return outputs * inputs + 4 * self.outputs
        return self.outputs * self.inputs * BITS[self.kind] // 8

    @property
    def scale_bytes(self) -> int:
        if self.scale is None:
            return 0
        return 4 * self.outputs * (1 if self.multiples is not None else self.groups)

    @property
    def zero_point_bytes(self) -> int:
        return -(-self.outputs * self.groups * BITS[self.kind] // 8) if self.zero_point is not None else 0

    @property
    def multiples_bytes(self) -> int:
        return self.outputs * self.groups if self.multiples is not None else 0


SMALLEST_MULTIPLIED_BYTES = 16
"""Of a group with a multiple: a table of 16 values is looked up by 16 lanes at once."""


def sums_multiples(inputs: int, group: int, bits: int) -> bool:
    """Whether int4_linear takes weights whose scales are whole multiples of a step; `group` 0 is all inputs."""
    nbytes = group * bits // 8
    return group in (0, inputs) or (nbytes >= SMALLEST_MULTIPLIED_BYTES and nbytes & (nbytes - 1) == 0)


@dataclass(frozen=True)
class Normalize:
    """y = x / rms(x) * weight, or (x - mean(x)) / std(x) * weight + bias, along each row."""

    step: ClassVar = "normalize"
    kind: Literal["rms", "layer"]
    x: int
    weight: Constant
    bias: Constant | None
    epsilon: float
    y: int


@dataclass(frozen=True)
class Add:
    """y = a + b. A constant of fewer rows is repeated: row i of `a` takes row i modulo its rows."""

    step: ClassVar = "add"
    a: int
    b: int | Constant
    y: int


@dataclass(frozen=True)
class GatherRows:
    """Row i of y is that row of the table which the int64 input `ids` names at i."""

    step: ClassVar = "gather_rows"
    table: Constant
    ids: str
    y: int


@dataclass(frozen=True)
class SelectRows:
    """Of the rows of every sequence of x, those at the int64 input `positions`."""

    step: ClassVar = "select_rows"
    x: int
    positions: str
    y: int


@dataclass(frozen=True)
class SiluMul:
    """y = gate * sigmoid(gate) * up."""

    step: ClassVar = "silu_mul"
    gate: int
    up: int
    y: int


@dataclass(frozen=True)
class GeluTanh:
    """y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""

    step: ClassVar = "gelu_tanh"
    x: int
    y: int


@dataclass(frozen=True)
class Linear:
    """y = x W^T + bias + residual. Linears that read the same value in the same format follow each other."""

    step: ClassVar = "linear"
    x: int
    weight: WeightRecord
    bias: Constant | None
    residual: int | None
    y: int


@dataclass(frozen=True)
class CausalAttention:
    """Grouped-query attention with rotary embedding over the KV cache of `layer`, to which it appends.

    Rows of q, k, v are [batch, tokens]; the tokens stand at the positions that follow those in the cache. Keys are
    stored rotated. inverse_frequencies: float32[1, head_dim / 2].
    """

    step: ClassVar = "causal_attention"
    q: int
    k: int
    v: int
    y: int
    layer: int
    num_heads: int
    kv_num_heads: int
    head_dim: int
    scale: float
    inverse_frequencies: Constant


@dataclass(frozen=True)
class Attention:
    """Attention of each slice's queries over all of its keys. `bias` is an input float32[slices, keys], added to the
    logits of a key. A constant q is the same for every slice; q may have another number of rows per slice than k and v.
    """

    step: ClassVar = "attention"
    q: int | Constant
    k: int
    v: int
    bias: str | None
    y: int
    num_heads: int
    scale: float


Step = Normalize | Add | GatherRows | SelectRows | SiluMul | GeluTanh | Linear | CausalAttention | Attention
STEPS: dict[str, type[Any]] = {
    kind.step: kind
    for kind in (Normalize, Add, GatherRows, SelectRows, SiluMul, GeluTanh, Linear, CausalAttention, Attention)
}


@dataclass(frozen=True)
class Value:
    """A float32[rows, width]."""

    rows: str
    width: int


@dataclass(frozen=True)
class Port:
    """An input or output of the graph that is a value."""

    name: str
    value: int


@dataclass(frozen=True)
class Program:
    """See the module. `files` are the names of the data files, which lie beside the program."""

    graph: str
    files: tuple[str, ...]
    values: tuple[Value, ...]
    inputs: tuple[Port, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Port, ...]


# --- rows ---------------------------------------------------------------------------------------------------------


def product(dims: Sequence[int | str]) -> str:
    """The spelling of a number of rows: `("slices", 96)` is `slices*96`."""
    return "*".join(map(str, dims)) or "1"


def split(rows: str) -> tuple[str, str]:
    """What attention keeps apart, and the rows that each of them has: `batch*tokens` is ("batch", "tokens")."""
    first, _, rest = rows.partition("*")
    return first, rest or "1"


def count(rows: str, sizes: Mapping[str, int]) -> int:
    """How many rows are meant where symbolic dimensions have `sizes`. KeyError for one that has none."""
    return math.prod(int(factor) if factor.isdigit() else sizes[factor] for factor in rows.split("*"))


# --- reading ------------------------------------------------------------------------------------------------------

_READS: dict[str, tuple[str, ...]] = {
    name: tuple(f.name for f in fields(kind) if f.name in ("x", "a", "b", "gate", "up", "residual", "q", "k", "v"))
    for name, kind in STEPS.items()
}
"""The fields of each step that may be the id of a value it reads."""


def reads(step: Step) -> list[int]:
    """The values that a step reads, each as often as it does."""
    return [value for name in _READS[step.step] if type(value := getattr(step, name)) is int]


def last_reads(program: Program) -> dict[int, int]:
    """The number of the step that reads a value last, by value; for outputs the number of steps. Values that nobody reads
    are absent.
    """
    last = {value: i for i, step in enumerate(program.steps) for value in reads(step)}
    return last | {port.value: len(program.steps) for port in program.outputs}
