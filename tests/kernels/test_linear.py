"""The linears against their formula, on every instruction set of this machine: programs of one step, run on one number of
rows after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lensc.kernels.linear import reference

_cpu = pytest.importorskip("lensc.kernels._cpu", reason="the compiled kernels (lensc.kernels._cpu) are not built")

Array = npt.NDArray[Any]

ISAS: tuple[str, ...] = tuple(_cpu.usable_isas())
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 63, 100, 257)
EPS = 2.0**-24
ROUNDINGS = {"int8": 24, "float32": 12}
"""By how many roundings an output may be off, per type of the inputs: of a product and its scales, of the last sums over
lanes, of bias and residual. Those of the sums over units (int8) or inputs (float32) come to it. Each is half a unit in the
last place of the sum of magnitudes.
"""
NOTHING = 127 / float(np.finfo(np.float32).max)
"""Rows up to here have a reciprocal that is infinite, and count as zeros."""


@dataclass(frozen=True)
class Format:
    """Weights in groups; group 0 is all inputs. `zeros`: 'none' of signed weights, 'one' for all, or one per group.
    `multiples`: scales are whole multiples of a step per output.
    """

    outputs: int
    inputs: int
    bits: int
    group: int
    zeros: str
    multiples: bool = False

    def __str__(self) -> str:
        name = f"O{self.outputs}-K{self.inputs}-b{self.bits}-g{self.group}-{self.zeros}"
        return f"{name}-multiples" if self.multiples else name

    @property
    def unit(self) -> int:
        """The inputs that are rounded together: a group, or 64 bytes of weights; with multiples four groups, or 2048."""
        if self.multiples:
            return min(4 * self.group, 2048) if 0 < self.group < self.inputs else 2048
        return min(self.group or self.inputs, 64 * 8 // self.bits)


# Among them: rows that end within a byte of a vector, a chunk of 64 bytes or a group; groups of 4 bytes up to several chunks
# and one per output; outputs below and beyond a block of 32; widths of a few bytes.
FORMATS = (
    Format(70, 256, 4, 128, "one"),
    Format(33, 320, 4, 32, "each"),
    Format(34, 264, 4, 64, "each"),
    Format(40, 200, 4, 128, "one"),
    Format(31, 104, 4, 16, "each"),
    Format(40, 768, 4, 256, "each"),
    Format(97, 1064, 4, 0, "one"),
    Format(3, 1032, 4, 0, "each"),
    Format(2, 10, 4, 0, "one"),
    Format(64, 512, 8, 128, "none"),
    Format(45, 176, 8, 0, "none"),
    Format(37, 200, 8, 32, "each"),
    Format(33, 168, 8, 16, "one"),
    Format(5, 12, 8, 4, "each"),
    Format(65, 6, 8, 0, "each"),
    Format(1, 3, 8, 0, "none"),
    Format(40, 512, 2, 64, "each"),
    Format(39, 776, 2, 32, "one"),
    Format(40, 528, 2, 16, "each"),
    Format(35, 1288, 2, 256, "each"),
    Format(66, 1000, 2, 0, "one"),
    # groups of one, two and four lanes of 16 bytes, of two chunks and of all; rows of one and several units, and of spans
    Format(70, 256, 4, 128, "one", multiples=True),
    Format(33, 328, 4, 32, "one", multiples=True),
    Format(31, 104, 4, 64, "one", multiples=True),
    Format(40, 776, 4, 256, "one", multiples=True),
    Format(65, 2304, 4, 128, "one", multiples=True),
    Format(1, 4304, 4, 0, "one", multiples=True),
    Format(2, 10, 4, 0, "one", multiples=True),
    Format(39, 776, 2, 64, "one", multiples=True),
    Format(40, 2568, 2, 128, "one", multiples=True),
    Format(35, 1288, 2, 256, "one", multiples=True),
    Format(34, 4360, 4, 1024, "one", multiples=True),
)


@dataclass(frozen=True)
class Weight:
    values: Array  # uint8 or int8[outputs, inputs], one to a byte
    scales: Array
    zeros: Array | None
    bias: Array
    steps: Array | None = None
    multiples: Array | None = None


@cache
def weight_of(f: Format) -> Weight:
    random = np.random.default_rng([f.outputs, f.inputs, f.bits])
    groups = -(-f.inputs // (f.group or f.inputs))
    values = random.integers(0, 2**f.bits, (f.outputs, f.inputs), np.uint8)
    # sums of nothing but the largest products, where they are taken in few bits, and of the least
    values[0], values[f.outputs // 2] = 2**f.bits - 1, 128 if f.zeros == "none" else 0
    values[-1, -1] = 2**f.bits - 1  # where a tail begins too late
    # no two scales and hardly two zero points are alike, so that each stands where it belongs
    scales = random.uniform(1e-3, 1e-2, (f.outputs, groups)).astype(np.float32)
    zeros = random.integers(0, 2**f.bits, (f.outputs, groups), np.uint8)
    if f.zeros == "one":
        zeros[:] = 2 ** (f.bits - 1)
    bias = random.standard_normal(f.outputs).astype(np.float32)
    if f.multiples:
        steps = random.uniform(1e-4, 1e-3, (f.outputs, 1)).astype(np.float32)
        multiples = random.integers(1, 16, (f.outputs, groups)) * random.choice((-1, 1), (f.outputs, groups))
        multiples[0], multiples[-1] = 15, -15  # with the largest values the largest bytes, and the least
        return Weight(values, steps.astype(np.float64) * multiples, zeros, bias, steps, multiples.astype(np.int8))
    return Weight(
        values.view(np.int8) if f.zeros == "none" else values, scales, None if f.zeros == "none" else zeros, bias
    )


def pack(values: Array, bits: int) -> Array:
    """One value to a byte -> without gaps, the first in the lowest bits; every number of values."""
    flat = values.reshape(-1).view(np.uint8)
    lanes = np.pad(flat, (0, -len(flat) % (8 // bits))).reshape(-1, 8 // bits)
    packed: Array = np.bitwise_or.reduce(lanes << np.arange(0, 8, bits, dtype=np.uint8), axis=1)
    return packed


def settled(x: Array, unit: int) -> Array:
    """x with what lies between two integers, once rounded to 8 bits, moved to one of them: a tie is either's to round."""
    x = x.copy()
    step = unit or x.shape[1]
    for start in range(0, x.shape[1], step):
        part = x[:, start : start + step].astype(np.float64)
        scale = np.abs(part).max(-1, keepdims=True) / 127
        quotient = np.divide(part, scale, where=scale > 0, out=np.zeros_like(part))
        undecided = np.abs(quotient - np.floor(quotient) - 0.5) < 1e-3
        x[:, start : start + step][undecided] = (np.rint(quotient) * scale)[undecided]
    return x


def normal_rows(rows: int, inputs: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, rows, inputs]).standard_normal((rows, inputs)).astype(np.float32)


class Linear:
    """A program with two linears of the same input: a bare one, and one with bias and residual."""

    def __init__(self, isa: str, threads: int, inputs: int, outputs: int) -> None:
        self.program = _cpu.Program(isa, threads)
        self.inputs, self.outputs = inputs, outputs
        self.x = self.program.value(0, inputs)
        self.residual, self.bare, self.ended = (self.program.value(0, outputs) for _ in range(3))
        self.constants: list[Array | None] = []

    def group(self, f: Format, int8_inputs: bool) -> Linear:
        w = weight_of(f)
        packed, zeros = pack(w.values, f.bits), None
        if f.zeros == "each" and w.zeros is not None:
            zeros = pack(w.zeros, f.bits)
        scales = w.scales if w.steps is None else w.steps
        self.constants = [packed, zeros, scales, w.multiples, w.bias]
        for bias, residual, y in ((None, -1, self.bare), (w.bias, self.residual, self.ended)):
            self.program.group_linear(
                self.x,
                packed,
                scales,
                zeros,
                f.bits,
                f.zeros == "none",
                f.group or f.inputs,
                int8_inputs,
                bias,
                residual,
                y,
                w.multiples,
            )
        return self._finished()

    def channel(self, values: Array, scales: Array, bias: Array) -> Linear:
        """values: int8[outputs, inputs]"""
        padded = np.pad(values, ((0, -self.outputs % 32), (0, -self.inputs % 64)))
        tiles = padded.reshape(len(padded) // 16, 16, -1, 4).transpose(0, 2, 1, 3)
        packed = np.ascontiguousarray(tiles).reshape(-1).view(np.uint8)
        sums = values.sum(1, dtype=np.int32)
        self.constants = [packed, scales, sums, bias]
        self.program.channel_linear(self.x, packed, scales, sums, None, -1, self.bare)
        self.program.channel_linear(self.x, packed, scales, sums, bias, self.residual, self.ended)
        return self._finished()

    def floats(self, weight: Array, bias: Array) -> Linear:
        self.constants = [weight, bias]
        self.program.float_linear(self.x, weight, None, -1, self.bare)
        self.program.float_linear(self.x, weight, bias, self.residual, self.ended)
        return self._finished()

    def _finished(self) -> Linear:
        self.program.output(self.bare)
        self.program.output(self.ended)
        self.program.finish()
        return self

    def run(self, x: Array, residual: Array) -> tuple[Array, Array]:
        """Also: nothing is written behind the last row."""
        rows = len(x)
        guarded = [np.full((rows + 1, self.outputs), 7e7, np.float32) for _ in range(2)]
        bare, ended = (array[:rows] for array in guarded)
        x = np.ascontiguousarray(x)
        bound = [(self.x, x), (self.residual, residual[:rows]), (self.bare, bare), (self.ended, ended)]
        self.program.run([rows], bound, [], None, 0, 0, 0)
        assert all((array[rows] == 7e7).all() for array in guarded)
        return bare, ended


@dataclass(frozen=True)
class Expected:
    y: Array
    bound: Array

    def check(self, got: Array) -> None:
        assert got.shape == self.y[: len(got)].shape
        assert got.dtype == np.float32
        wrong = ~(np.abs(got - self.y[: len(got)]) <= self.bound[: len(got)])
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{wrong.sum()} of {wrong.size} outputs are off, the first at {first}: {got[first]:.9g}, "
                f"expected {self.y[first]:.9g} within {self.bound[first]:.2g}"
            )


def expected_group(f: Format, x: Array, int8_inputs: bool, bias: Array | None, residual: Array | None) -> Expected:
    w = weight_of(f)
    unit = f.unit if int8_inputs else None
    y = reference.quantized_linear(x, w.values, w.scales, w.zeros, f.group, unit, bias, residual)
    # sums are of unsigned values, and those of the zero point are taken from them
    unsigned = w.values.astype(np.int64) + 128 * (f.zeros == "none")
    zeros = np.full_like(w.scales, 128, np.int64) if w.zeros is None else w.zeros.astype(np.int64)
    magnitudes = unsigned + np.repeat(zeros, f.group or f.inputs, axis=1)[:, : f.inputs]
    ends = [None if part is None else np.abs(part) for part in (bias, residual)]
    magnitude = reference.quantized_linear(np.abs(x), magnitudes, np.abs(w.scales), None, f.group, unit, *ends)
    count = f.inputs / 4 + ROUNDINGS["float32"] if unit is None else -(-f.inputs // unit) + ROUNDINGS["int8"]
    nothing = NOTHING * reference.linear(np.ones_like(x[:1]), magnitudes * float(np.abs(w.scales).max()))
    return Expected(y, EPS * count * magnitude + nothing)


@cache
def group_case(f: Format, int8_inputs: bool) -> tuple[Array, Array, Expected, Expected]:
    """x, residual, and what is expected without and with bias and residual."""
    x = normal_rows(max(ROWS), f.inputs)
    x[1], x[2] = 3, -3
    x, residual = settled(x, f.unit), normal_rows(max(ROWS), f.outputs, 1)
    bare = expected_group(f, x, int8_inputs, None, None)
    return x, residual, bare, expected_group(f, x, int8_inputs, weight_of(f).bias, residual)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("form", "int8_inputs"),
    [
        pytest.param(form, int8, id=f"{form}-{'int8' if int8 else 'float32'}")
        for form in FORMATS
        for int8 in (True, False)
        if int8 or not form.multiples  # which are for inputs in int8
    ],
)
def test_group_linear(form: Format, int8_inputs: bool, isa: str) -> None:
    x, residual, *expected = group_case(form, int8_inputs)
    linear = Linear(isa, 2, form.inputs, form.outputs).group(form, int8_inputs)
    for rows in ROWS:
        for got, wanted in zip(linear.run(x[:rows], residual), expected, strict=True):
            wanted.check(got)


CHANNEL_SHAPES = ((1, 1), (33, 3), (31, 64), (32, 63), (70, 100), (64, 588), (100, 1000))


@cache
def channel_case(outputs: int, inputs: int) -> tuple[Array, ...]:
    """values, scales, bias, x, residual: weights include -128, and outputs of nothing but the largest."""
    random = np.random.default_rng([outputs, inputs])
    values = random.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    values[0] = -128
    values[-1] = 127
    scales = random.uniform(1e-3, 1e-2, outputs).astype(np.float32)
    bias = random.standard_normal(outputs).astype(np.float32)
    x = normal_rows(max(ROWS), inputs)
    x[1] = 3
    x[2] = -3
    return values, scales, bias, settled(x, 0), normal_rows(max(ROWS), outputs, 1)


def expected_channel(values: Array, scales: Array, x: Array, bias: Array | None, residual: Array | None) -> Expected:
    y = reference.quantized_linear(x, values, scales[:, None], None, 0, 0, bias, residual)
    ends = [None if part is None else np.abs(part) for part in (bias, residual)]
    magnitudes = np.abs(values.astype(np.int64))
    magnitude = reference.quantized_linear(np.abs(x), magnitudes, scales[:, None], None, 0, 0, *ends)
    # sums are of integers, and exact
    return Expected(
        y, EPS * 6 * magnitude + NOTHING * reference.linear(np.ones_like(x[:1]), magnitudes * scales[:, None])
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("outputs", "inputs"), CHANNEL_SHAPES, ids=lambda size: str(size))
def test_channel_linear(outputs: int, inputs: int, isa: str) -> None:
    values, scales, bias, x, residual = channel_case(outputs, inputs)
    linear = Linear(isa, 2, inputs, outputs).channel(values, scales, bias)
    bare = expected_channel(values, scales, x, None, None)
    ended = expected_channel(values, scales, x, bias, residual)
    for rows in ROWS:
        for got, wanted in zip(linear.run(x[:rows], residual), (bare, ended), strict=True):
            wanted.check(got)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("outputs", "inputs"), ((1, 1), (3, 7), (6, 63), (31, 100), (5, 1100), (4, 1024)), ids=str)
def test_float_linear(outputs: int, inputs: int, isa: str) -> None:
    weight, x = normal_rows(outputs, inputs, 2), normal_rows(max(ROWS), inputs)
    bias, residual = normal_rows(1, outputs, 3)[0], normal_rows(max(ROWS), outputs, 4)
    linear = Linear(isa, 2, inputs, outputs).floats(weight, bias)
    for rows in ROWS:
        for got, ends in zip(linear.run(x[:rows], residual), ((None, None), (bias, residual[:rows])), strict=True):
            magnitude = reference.linear(
                np.abs(x[:rows]), np.abs(weight), *(None if e is None else np.abs(e) for e in ends)
            )
            count = inputs / 4 + ROUNDINGS["float32"]
            Expected(reference.linear(x[:rows], weight, *ends), EPS * count * magnitude).check(got)


@pytest.mark.parametrize("isa", ISAS)
def test_a_thousand_rows(isa: str) -> None:
    form = Format(70, 264, 4, 32, "each")
    x, residual = settled(normal_rows(1000, form.inputs), form.unit), normal_rows(1000, form.outputs, 1)
    bias = weight_of(form).bias
    got = Linear(isa, 2, form.inputs, form.outputs).group(form, True).run(x, residual)
    expected_group(form, x, True, bias, residual).check(got[1])
    values, scales, channel_bias, *_ = channel_case(70, 100)
    rows = settled(normal_rows(1000, 100), 0)
    got = Linear(isa, 2, 100, 70).channel(values, scales, channel_bias).run(rows, residual)
    expected_channel(values, scales, rows, channel_bias, residual).check(got[1])


def extreme_rows(inputs: int) -> Array:
    x = normal_rows(12, inputs, 5)
    x[1] = 0
    x[2, inputs // 2] *= 1e5  # as a column of outliers does
    x[3] *= 1e-42
    x[4] *= 1e30
    x[5] *= 1e-30
    x[6] = 0
    x[6, -1] = 1
    x[7] *= np.logspace(-38, 28, inputs, dtype=np.float32)
    x[8] = -0.0
    x[9] = np.finfo(np.float32).max / 1e8  # the sum of a row times weights, not yet scaled, is still a float32
    x[10] = 1e-38
    return x.astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", (1, 12), ids=("alone", "together"))
@pytest.mark.parametrize("kind", ("int4", "multiples", "int8", "channel", "float32"))
def test_extreme_inputs(kind: str, rows: int, isa: str) -> None:
    form = Format(34, 264, 4, 64, "each") if kind == "int4" else Format(64, 512, 8, 128, "none")
    form = Format(70, 256, 4, 128, "one", multiples=True) if kind == "multiples" else form
    outputs, inputs = (70, 100) if kind == "channel" else (form.outputs, form.inputs)
    residual = np.zeros((12, outputs), np.float32)
    x = settled(extreme_rows(inputs), 0 if kind == "channel" else form.unit)
    if kind == "channel":
        values, scales, bias, *_ = channel_case(outputs, inputs)
        linear = Linear(isa, 1, inputs, outputs).channel(values, scales, bias)
        wanted = expected_channel(values, scales, x, None, None)
    else:
        linear = Linear(isa, 1, inputs, outputs).group(form, kind != "float32")
        wanted = expected_group(form, x, kind != "float32", None, None)
    for first in range(0, 12, rows):
        got, _ = linear.run(x[first : first + rows], residual)
        Expected(wanted.y[first : first + rows], wanted.bound[first : first + rows]).check(got)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", (3, 40))
@pytest.mark.parametrize("kind", ("group", "multiples", "channel", "float32"))
def test_what_is_not_finite_spoils_its_own_row_only(kind: str, rows: int, isa: str) -> None:
    form = Format(33, 328, 4, 32, "one", multiples=True) if kind == "multiples" else Format(34, 264, 4, 64, "each")
    outputs, inputs = (70, 100) if kind == "channel" else (form.outputs, form.inputs)
    linear = Linear(isa, 2, inputs, outputs)
    if kind == "channel":
        linear.channel(*channel_case(outputs, inputs)[:3])
    else:
        linear.group(form, kind != "float32")
    x, residual = normal_rows(rows, inputs), np.zeros((rows, outputs), np.float32)
    before = linear.run(x, residual)[0].copy()
    for row, value in ((1, np.inf), (rows - 1, -np.inf)):
        x[row, inputs // 2] = value
    after = linear.run(x, residual)[0]
    assert not np.isfinite(after[[1, rows - 1]]).any()
    x[[1, rows - 1], inputs // 2] = np.nan
    with_nan = linear.run(x, residual)[0]
    others = np.delete(np.arange(rows), [1, rows - 1])
    for made in (after, with_nan):
        assert np.array_equal(made[others], before[others])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", (1, 5, 63, 100))
@pytest.mark.parametrize("kind", ("int8", "multiples", "float32", "channel"))
def test_any_number_of_threads_gives_the_same_bits(kind: str, rows: int, isa: str) -> None:
    form = Format(137, 264, 4, 64, "one" if kind == "multiples" else "each", multiples=kind == "multiples")
    made = []
    for threads in (1, 2, 3, 4):
        linear = Linear(isa, threads, 264, 137)
        if kind == "channel":
            linear.channel(*channel_case(137, 264)[:3])
        else:
            linear.group(form, kind != "float32")
        made.append(linear.run(normal_rows(rows, 264), normal_rows(rows, 137, 1)))
    for other in made[1:]:
        assert np.array_equal(np.stack(other), np.stack(made[0]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("inputs", (264, 2048), ids="{} inputs".format)
@pytest.mark.parametrize("kind", ("int8", "multiples", "float32", "channel"))
def test_a_token_and_seven_guesses_have_the_bits_of_one_by_one(kind: str, inputs: int, isa: str) -> None:
    form = Format(137, inputs, 4, 64, "one" if kind == "multiples" else "each", multiples=kind == "multiples")
    linear = Linear(isa, 2, inputs, 137)
    if kind == "channel":
        linear.channel(*channel_case(137, inputs)[:3])
    else:
        linear.group(form, kind != "float32")
    x, residual = normal_rows(8, inputs), normal_rows(8, 137, 1)
    alone = [np.stack(linear.run(x[i : i + 1], residual[i : i + 1])).copy() for i in range(8)]
    for rows in range(2, 9):
        together = np.stack(linear.run(x[:rows], residual))
        assert np.array_equal(together, np.concatenate(alone[:rows], axis=1))
