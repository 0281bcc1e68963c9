"""What is computed row by row against its formula, on every instruction set of this machine: norms, activations, and the
rounding to 8 bits that is one pass with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lensc.kernels.activation.reference import gelu_tanh, silu_mul
from lensc.kernels.norm.reference import layer_norm, rms_norm

_cpu = pytest.importorskip("lensc.kernels._cpu", reason="the compiled kernels (lensc.kernels._cpu) are not built")

Array = npt.NDArray[Any]

ISAS: tuple[str, ...] = tuple(_cpu.usable_isas())
WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 100, 588, 1000)
ROWS = (1, 2, 7, 63, 100)
EPS = 2.0**-24
EPSILON = 1e-6
LEAST = 2e-38
"""A sigmoid does not get smaller: e^-87, about the smallest normal float32."""


def random_rows(rows: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, rows, width]).standard_normal((rows, width)).astype(np.float32)


def extreme_rows(width: int) -> Array:
    x = random_rows(max(ROWS), width)
    x[1] = 0
    x[2, width // 2] = 1e6  # a column of outliers
    x[3] *= 1e-40
    x[4] *= 1e17  # whose squares are still numbers
    x[5] += 1e4  # a mean that is far from 0
    x[6] = -0.0
    return x


def run(isa: str, inputs: list[Array], width: int, step: Callable[[Any, list[int], int], None]) -> Array:
    """What the step makes of the inputs, each float32[rows, width]; nothing is written behind the last row."""
    program, rows = _cpu.Program(isa, 2), len(inputs[0])
    ids, y = [program.value(0, width) for _ in inputs], program.value(0, width)
    step(program, ids, y)
    program.output(y)
    program.finish()
    guarded = np.full((rows + 1, width), 7e7, np.float32)
    bound = [*zip(ids, (np.ascontiguousarray(x) for x in inputs), strict=True), (y, guarded[:rows])]
    program.run([rows], bound, [], None, 0, 0, 0)
    assert (guarded[rows] == 7e7).all()
    return guarded[:rows]


def check(got: Array, expected: Array, bound: Array) -> None:
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    wrong = np.argwhere(~(np.abs(got - expected) <= bound))
    assert not len(wrong), (wrong[0], got[tuple(wrong[0])], expected[tuple(wrong[0])], bound[tuple(wrong[0])])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int, isa: str) -> None:
    """A sum of width squares in at least four lanes moves by an eighth of width roundings under the root."""
    x, weight = extreme_rows(width), random_rows(1, width, 1)[0]
    expected = rms_norm(x, weight, EPSILON)
    for rows in ROWS:
        got = run(isa, [x[:rows]], width, lambda p, ids, y: p.rms_norm(ids[0], weight, EPSILON, y))
        check(got, expected[:rows], EPS * (width / 8 + 8) * np.abs(expected[:rows]) + LEAST)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("biased", (True, False), ids=("bias", "bare"))
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width: int, biased: bool, isa: str) -> None:
    """The mean moves by width / 4 roundings of magnitudes, and every value by as much before it is scaled."""
    x, weight = extreme_rows(width), random_rows(1, width, 1)[0]
    bias = random_rows(1, width, 2)[0] if biased else None
    expected = layer_norm(x, weight, bias, EPSILON)
    wide = x.astype(np.float64)
    mean_moves = EPS * (width / 4 + 4) * np.abs(wide).mean(-1, keepdims=True)
    deviation = np.sqrt(wide.var(-1, keepdims=True) + EPSILON)
    scale = np.abs(weight) / deviation
    values = np.abs(wide - wide.mean(-1, keepdims=True)) * scale
    # moving the mean by m adds m^2 to the variance
    bound = 2 * scale * (mean_moves + EPS * np.abs(wide)) + values * (mean_moves / deviation) ** 2
    bound += EPS * (width / 8 + 8) * (values + np.abs(0 if bias is None else bias)) + LEAST
    for rows in ROWS:
        got = run(isa, [x[:rows]], width, lambda p, ids, y: p.layer_norm(ids[0], weight, bias, EPSILON, y))
        check(got, expected[:rows], bound[:rows])


def activation_bound(y: Array, slope: Array, factor: Array) -> Array:
    """A relative error of exp below 3e-7, of its argument a few roundings, which e^slope magnifies by slope."""
    return np.abs(y) * (4e-7 + EPS * (8 + 4 * np.minimum(np.abs(slope), 90))) + LEAST * (np.abs(factor) + 1)


def awkward(rows: int, width: int) -> Array:
    """Slopes of every size: the whole range in which a sigmoid is neither 0 nor 1, and far beyond it."""
    x = random_rows(rows, width) * 4
    x.reshape(-1)[: min(x.size, 12)] = (0, -0.0, 1e-40, -1e-40, 1, 86.9, 87.1, -86.9, -87.1, 1e5, -1e30, 1e30)[: x.size]
    x[-1] = np.linspace(-100, 100, width)
    return x


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(width: int, isa: str) -> None:
    gate, up = awkward(63, width), random_rows(63, width, 1)
    for rows in (63, 1):
        got = run(isa, [gate[:rows], up[:rows]], width, lambda p, ids, y: p.silu_mul(*ids, y))
        expected = silu_mul(gate[:rows], up[:rows])
        check(got, expected, activation_bound(expected, gate[:rows], gate[:rows].astype(np.float64) * up[:rows]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", WIDTHS)
def test_gelu_tanh(width: int, isa: str) -> None:
    x = awkward(63, width)
    for rows in (63, 1):
        got = run(isa, [x[:rows]], width, lambda p, ids, y: p.gelu_tanh(ids[0], y))
        wide = x[:rows].astype(np.float64)
        # where its formula loses all digits to 1 - 1, twice the tanh's argument as the slope of a sigmoid does not
        slope = np.sqrt(8 / np.pi) * (wide + 0.044715 * wide**3)
        expected = wide * np.exp(-np.logaddexp(0, -slope))
        np.testing.assert_allclose(expected, gelu_tanh(wide), rtol=1e-9, atol=1e-13 * np.abs(wide).max())
        check(got, expected, activation_bound(expected, slope, wide))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ("rms_norm", "layer_norm", "silu_mul", "gelu_tanh"))
def test_what_is_not_finite_spoils_its_own_row_only(name: str, isa: str) -> None:
    width = 37
    x, up, weight = random_rows(5, width), random_rows(5, width, 1), random_rows(1, width, 2)[0]
    steps: dict[str, Callable[[Any, list[int], int], None]] = {
        "rms_norm": lambda p, ids, y: p.rms_norm(ids[0], weight, EPSILON, y),
        "layer_norm": lambda p, ids, y: p.layer_norm(ids[0], weight, None, EPSILON, y),
        "silu_mul": lambda p, ids, y: p.silu_mul(*ids, y),
        "gelu_tanh": lambda p, ids, y: p.gelu_tanh(ids[0], y),
    }
    inputs = [x, up] if name == "silu_mul" else [x]
    before = run(isa, inputs, width, steps[name])
    x[1, 3], x[3, 36], x[4] = np.inf, np.nan, -np.inf
    after = run(isa, inputs, width, steps[name])
    assert np.array_equal(after[[0, 2]], before[[0, 2]])
    assert not np.isfinite(after[3, 36])


# --- rounding to 8 bits -----------------------------------------------------------------------------------------------------


class Rounded:
    """A program that shows what rows are rounded to: the linears have the identity as weight.

    `group` 0: with a scale per row, as channel_linear rounds. `norm`: an rms_norm stands before it, and is read as it is,
    too: the row is made twice, once in float32 and once in the pass that rounds it.
    """

    def __init__(self, isa: str, width: int, group: int, bits: int = 8, norm: Array | None = None) -> None:
        self.program = p = _cpu.Program(isa, 2)
        self.x, self.made, self.y = (p.value(0, width) for _ in range(3))
        self.width, self.norm, ones = width, norm, np.ones((width, -(-width // (group or width))), np.float32)
        self.bias = np.zeros(width, np.float32)
        if norm is not None:
            p.rms_norm(self.x, norm, EPSILON, self.made)
        read = self.x if norm is None else self.made
        if group:
            lanes = np.eye(width, dtype=np.uint8).reshape(-1, 8 // bits)
            packed = np.bitwise_or.reduce(lanes << np.arange(0, 8, bits, dtype=np.uint8), axis=1)
            zeros = np.zeros(-(-ones.size * bits // 8), np.uint8)
            self.constants = [packed, ones, zeros]
            p.group_linear(read, packed, ones, zeros, bits, False, group, True, None, -1, self.y)
        else:
            padded = np.pad(np.eye(width, dtype=np.int8), ((0, -width % 32), (0, -width % 64)))
            tiles = padded.reshape(len(padded) // 16, 16, -1, 4).transpose(0, 2, 1, 3)
            self.constants = [
                np.ascontiguousarray(tiles).reshape(-1).view(np.uint8),
                ones[:, 0],
                np.ones(width, np.int32),
            ]
            p.channel_linear(read, *self.constants, None, -1, self.y)
        if norm is not None:
            p.output(self.made)
        p.output(self.y)
        p.finish()

    def run(self, x: Array) -> tuple[Array, Array]:
        """The float32 rows, and what they were rounded to."""
        made, y = np.empty_like(x), np.empty_like(x)
        bound = [(self.x, x), (self.y, y)] + ([(self.made, made)] if self.norm is not None else [])
        self.program.run([len(x)], bound, [], None, 0, 0, 0)
        return x if self.norm is None else made, y


# not of whole bytes, which some instruction sets take 128 off: an identity would be a difference of two sums
FORMATS = (
    (16, 4, 8),
    (64, 4, 16),
    (264, 4, 32),
    (256, 4, 128),
    (200, 4, 200),
    (528, 2, 16),
    (512, 2, 64),
    (64, 8, 0),
    (100, 8, 0),
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fused", (True, False), ids=("rms_norm", "copy"))
@pytest.mark.parametrize(("width", "bits", "group"), FORMATS, ids=lambda value: str(value))
def test_rows_are_rounded_to_the_nearest_of_255_steps(width: int, bits: int, group: int, fused: bool, isa: str) -> None:
    unit = min(group or width, width if not group else 512 // bits)
    rounded = Rounded(isa, width, group, bits, random_rows(1, width, 3)[0] + 2 if fused else None)
    x = extreme_rows(width)
    for rows in (*ROWS, 9, 33, 257):
        exact, got = rounded.run(np.resize(x, (rows, width)))
        for start in range(0, width, unit):
            part, steps = (
                exact[:, start : start + unit].astype(np.float64),
                got[:, start : start + unit].astype(np.float64),
            )
            step = np.abs(part).max(-1, keepdims=True) / 127
            assert (np.abs(steps - part) <= step * (0.5 + 1e-5) + 1e-36).all(), (rows, start)
            held = step[:, 0] > 1e-30
            counts = steps[held] / step[held]
            assert (np.abs(counts - np.rint(counts)) <= 1e-4).all()
            assert (np.rint(np.abs(counts).max(-1, initial=0)) == 127).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", (1, 40))
@pytest.mark.parametrize("group", (16, 0), ids=("group", "channel"))
def test_ties_go_to_the_even_step(group: int, rows: int, isa: str) -> None:
    x = np.tile(np.array([127, 0.5, 1.5, -2.5, -0.5, 3.5, 0.25, -126.5] * 2, np.float32), (rows, 1))
    _, got = Rounded(isa, 16, group).run(x)
    assert got[-1, :8].tolist() == [127, 0, 2, -2, 0, 4, 0, -126]
