"""The attention kernels against their formulas, on every instruction set of this machine."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from lensc.kernels.attention import reference
from lensc.kernels.rope.reference import quantize_rows

_cpu = pytest.importorskip("lensc.kernels._cpu", reason="the native kernels are not built")

Array = npt.NDArray[Any]
Type = Literal["float32", "float16", "int8"]

ISAS: tuple[str, ...] = tuple(_cpu.usable_isas())
TYPES: tuple[Type, ...] = ("float32", "float16", "int8")
EPS = 2.0**-24
EPS_TILE = 2.0**-9
"""Half a unit in the last place of a float32 and of a bfloat16: what one rounding may move a value by. Of the int16 of AVX2 it is
as much beside a row's largest value, for up to 128 dimensions."""
ROUNDED = {"amx": 5e-3, "avx2": 1e-3, "avxvnni": 1e-3}
"""Of the instruction sets whose attention is not in float32: how far the root of the mean square may be off."""


class Cache:
    """A cache of a type, filled up to `length`; what lies behind is no number, and must not be read."""

    def __init__(self, keys: Array, values: Array, kind: Type, spare: int = 3) -> None:
        """keys, values: float32[kv_heads, length, dim]."""
        self.kind = kind
        behind = ((0, 0), (0, spare), (0, 0))
        self.scales: tuple[Array | None, Array | None] = (None, None)
        self.rows: tuple[Array, Array]
        self.exact: tuple[Array, Array]
        if kind == "int8":
            (k, k_scales), (v, v_scales) = quantize_rows(keys), quantize_rows(values)
            self.rows = np.pad(k, behind, constant_values=-128), np.pad(v, behind, constant_values=-128)
            self.scales = (
                np.pad(k_scales, behind[:2], constant_values=np.nan),
                np.pad(v_scales, behind[:2], constant_values=np.nan),
            )
            self.exact = k * k_scales[..., None].astype(np.float64), v * v_scales[..., None].astype(np.float64)
        else:
            k, v = keys.astype(kind), values.astype(kind)
            self.rows = np.pad(k, behind, constant_values=np.nan), np.pad(v, behind, constant_values=np.nan)
            self.exact = k.astype(np.float64), v.astype(np.float64)

    def run(self, query: Array, past: int, scale: float, isa: str, threads: int = 1) -> Array:
        result: Array = _cpu.causal_attention(query, *self.rows, *self.scales, past, scale, isa, threads)
        return result


def tolerance(query: Array, keys: Array, values: Array, scale: float, tiles: bool) -> float:
    """What roundings may move an output by.

    A logit moves by two roundings of its operands (tiles), or by those of dim sums (float32: by far not all in one
    direction, 16 are allowed for) and of the logit itself; an output by twice the logits' shift, which moves weights
    and their sum, and by roundings of weights and values.
    """
    eps = EPS_TILE if tiles else EPS
    norms = np.linalg.norm(query, axis=-1).max() * np.linalg.norm(keys, axis=-1).max() * scale
    shift = norms * (2 * eps + 16 * EPS) + 8 * EPS
    return float(np.abs(values).max() * (min(2 * shift, 2.0) + 8 * eps)) + 1e-30


def causal_case(tokens: int, past: int, heads: int, kv_heads: int, dim: int) -> tuple[Array, Array, Array]:
    random = np.random.default_rng([tokens, past, heads, dim])
    query = random.standard_normal((tokens, heads, dim)).astype(np.float32)
    keys, values = (random.standard_normal((kv_heads, past + tokens, dim)).astype(np.float32) for _ in range(2))
    return query, keys, values


def check_causal(query: Array, keys: Array, values: Array, kind: Type, isa: str, scale: float | None = None) -> None:
    past = keys.shape[1] - query.shape[0]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    cache = Cache(keys, values, kind)
    got = cache.run(query, past, scale, isa)
    expected = reference.causal_attention(query, *cache.exact, past, scale)
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    tiles = isa == "amx" and kind != "float32"
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(query, *cache.exact, scale, tiles))


SHAPES = (
    *((tokens, past, 4, 2, 64) for tokens in (1, 2, 7, 8, 9, 63, 100) for past in (0, 1, 63)),
    *((tokens, past, 32, 8, 128) for tokens, past in ((1, 0), (1, 1000), (2, 63), (8, 1000), (9, 63), (63, 1))),
    *((tokens, past, 4, 4, dim) for dim in (8, 72, 80) for tokens, past in ((1, 0), (1, 63), (7, 63), (100, 1))),
    (257, 1, 4, 2, 128),
    (257, 63, 6, 2, 24),
    (1, 1000, 7, 1, 8),
    (5, 300, 5, 1, 22),
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-P{}-H{}-K{}-D{}".format(*s))
def test_causal(shape: tuple[int, int, int, int, int], kind: Type, isa: str) -> None:
    check_causal(*causal_case(*shape), kind, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", (1, 8, 63))
@pytest.mark.parametrize("extreme", ("large logits", "denormals", "zeros", "outlier column", "one key far ahead"))
def test_causal_extremes(extreme: str, tokens: int, kind: Type, isa: str) -> None:
    query, keys, values = causal_case(tokens, 200, 4, 2, 64)
    if extreme == "large logits":
        query *= 100
    elif extreme == "denormals":
        query *= np.float32(1e-41)
        values *= np.float32(1e-41)
    elif extreme == "zeros":
        keys[:] = values[:] = 0
    elif extreme == "outlier column":
        keys[..., 5] *= 300
        values[..., 7] *= 1000
    else:
        keys[:, 17] = 30 * query[0, 0]
    check_causal(query, keys, values, kind, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", (1, 4, 8, 100))
def test_causal_is_close_on_average(tokens: int, kind: Type, isa: str) -> None:
    """Where the tolerance has to allow for the worst, the root of the mean square says more."""
    query, keys, values = causal_case(tokens, 500, 8, 2, 128)
    cache = Cache(keys, values, kind)
    got = cache.run(query, 500, 128**-0.5, isa)
    expected = reference.causal_attention(query, *cache.exact, 500, 128**-0.5)
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert error < (5e-3 if isa == "amx" and kind != "float32" else 1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("heads", (2, 4, 8, 16), ids=lambda heads: f"{heads // 2} of a head")
def test_a_token_and_seven_guesses_have_the_bits_of_one_by_one(heads: int, kind: Type, isa: str) -> None:
    past = 100
    query, keys, values = causal_case(8, past, heads, 2, 128)
    alone = []
    for i in range(8):
        seen = Cache(keys[:, : past + i + 1], values[:, : past + i + 1], kind)
        alone.append(seen.run(query[i : i + 1], past + i, 0.1, isa)[0])
    for tokens in range(2, 9):
        end = past + tokens
        together = Cache(keys[:, :end], values[:, :end], kind).run(query[:tokens], past, 0.1, isa)
        np.testing.assert_array_equal(together, alone[:tokens])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", (1, 7, 100))
def test_causal_has_the_same_bits_for_every_count_of_threads(tokens: int, kind: Type, isa: str) -> None:
    query, keys, values = causal_case(tokens, 300, 12, 3, 64)
    cache = Cache(keys, values, kind)
    one = cache.run(query, 300, 0.125, isa)
    for threads in (2, 3, 4):
        np.testing.assert_array_equal(cache.run(query, 300, 0.125, isa, threads), one)


def full_case(slices: int, queries: int, keys: int, heads: int, dim: int) -> tuple[Array, Array, Array, Array]:
    random = np.random.default_rng([slices, queries, keys, heads, dim])
    query = random.standard_normal((slices, queries, heads * dim)).astype(np.float32)
    key, value = (random.standard_normal((slices, keys, heads * dim)).astype(np.float32) for _ in range(2))
    bias = np.where(random.random((slices, keys)) < 0.3, np.float32(-10000), np.float32(0))
    bias[:, 0] = 0
    return query, key, value, bias


def check_full(query: Array, key: Array, value: Array, bias: Array | None, heads: int, exact: bool, isa: str) -> None:
    dim = query.shape[-1] // heads
    got = _cpu.attention(query, key, value, bias, heads, dim**-0.5, exact, isa, 1)
    expected = reference.attention(query, key, value, bias, heads, dim**-0.5)
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    q, k = (x.reshape(*x.shape[:2], heads, dim) for x in (query, key))
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=tolerance(q, k, value, dim**-0.5, tiles=isa in ROUNDED and not exact)
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", (False, True), ids=("fast", "exact"))
@pytest.mark.parametrize("masked", (False, True), ids=("free", "masked"))
@pytest.mark.parametrize("shape", ((1, 1, 1), (2, 7, 2), (1, 63, 100), (2, 100, 63), (1, 257, 300)), ids=str)
@pytest.mark.parametrize("dim", (8, 64, 72, 80, 128))
def test_full(dim: int, shape: tuple[int, int, int], masked: bool, exact: bool, isa: str) -> None:
    query, key, value, bias = full_case(*shape, heads=2, dim=dim)
    check_full(query, key, value, bias if masked else None, 2, exact, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", (False, True), ids=("fast", "exact"))
@pytest.mark.parametrize("mask", (-np.inf, np.finfo(np.float32).min, -10000.0))
def test_full_with_masked_rows(mask: float, exact: bool, isa: str) -> None:
    """The first 270 keys, more than a block; then all of a slice, which leaves the softmax over equal biases."""
    query, key, value, bias = full_case(2, 40, 300, heads=2, dim=72)
    bias[:] = 0
    bias[0, :270] = mask
    check_full(query, key, value, bias, 2, exact, isa)
    bias[1, :] = mask
    got = _cpu.attention(query, key, value, bias, 2, 72**-0.5, exact, isa, 1)
    # Beside -10000 a logit of float32 is rounded to 2**-11, or twice that in base 2.
    q, k = (x.reshape(*x.shape[:2], 2, 72) for x in (query, key))
    atol = tolerance(q, k, value, 72**-0.5, tiles=isa in ROUNDED and not exact)
    expected = reference.attention(query, key, value, bias, 2, 72**-0.5)
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol + 2**-9)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", (False, True), ids=("fast", "exact"))
@pytest.mark.parametrize("extreme", ("large logits", "denormals", "zeros", "outlier column", "one key far ahead"))
def test_full_extremes(extreme: str, exact: bool, isa: str) -> None:
    query, key, value, _ = full_case(1, 70, 200, heads=2, dim=72)
    if extreme == "large logits":
        query *= 100
    elif extreme == "denormals":
        query *= np.float32(1e-41)
        value *= np.float32(1e-41)
    elif extreme == "zeros":
        key[:] = value[:] = 0
    elif extreme == "outlier column":
        key[..., 5] *= 300
        value[..., 7] *= 1000
    else:
        key[:, 17, :72] = 30 * query[0, 0, :72]
    check_full(query, key, value, None, 2, exact, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", (False, True), ids=("fast", "exact"))
@pytest.mark.parametrize("dim", (64, 72, 128, 200, 700))
@pytest.mark.parametrize("sign", (1, -1))
def test_full_of_the_largest_sums(sign: float, dim: int, exact: bool, isa: str) -> None:
    """All of a row as large as its largest value: every weight is 1, and all products have one sign."""
    query = np.full((1, 16, dim), 1e15, np.float32)
    large = 2.0**100  # bfloat16 has it exactly
    key, value = (np.full((1, 200, dim), sign * size, np.float32) for size in (1e15, large))
    got = _cpu.attention(query, key, value, None, 1, dim**-0.5, exact, isa, 1)
    np.testing.assert_allclose(got, sign * large, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", (False, True), ids=("fast", "exact"))
@pytest.mark.parametrize("dim", (64, 72, 128))
def test_full_is_close_on_average(dim: int, exact: bool, isa: str) -> None:
    """Where weights are nearly equal, and so each is small beside the largest, and where one is far above the others."""
    for factor in (0.3, 1.0, 4.0):
        query, key, value, _ = full_case(1, 100, 1000, heads=2, dim=dim)
        query *= np.float32(factor)
        got = _cpu.attention(query, key, value, None, 2, dim**-0.5, exact, isa, 1)
        expected = reference.attention(query, key, value, None, 2, dim**-0.5)
        error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
        assert error < max(1, factor) * (1e-6 if exact else ROUNDED.get(isa, 1e-6))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", (False, True), ids=("fast", "exact"))
@pytest.mark.parametrize("what", ("query", "value"))
@pytest.mark.parametrize("bad", (np.nan, np.inf), ids=("nan", "inf"))
def test_what_is_no_number_shows(bad: float, what: str, exact: bool, isa: str) -> None:
    query, key, value, _ = full_case(1, 40, 100, heads=2, dim=72)
    {"query": query, "value": value}[what][0, 3, 5] = bad
    got = _cpu.attention(query, key, value, None, 2, 72**-0.5, exact, isa, 1)
    seen = got[0, 3, :72] if what == "query" else got[0, :, 5]
    assert not np.isfinite(seen).any()
    assert np.isfinite(got[..., 72:]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", (False, True), ids=("fast", "exact"))
def test_full_has_the_same_bits_for_every_count_of_threads(exact: bool, isa: str) -> None:
    query, key, value, bias = full_case(2, 300, 300, heads=3, dim=72)
    one = _cpu.attention(query, key, value, bias, 3, 0.1, exact, isa, 1)
    for threads in (2, 3, 4):
        np.testing.assert_array_equal(_cpu.attention(query, key, value, bias, 3, 0.1, exact, isa, threads), one)
