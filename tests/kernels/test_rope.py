"""The rotary kernels against their formulas, on every instruction set of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lensc.kernels.rope import reference

_cpu = pytest.importorskip("lensc.kernels._cpu", reason="the native kernels are not built")

Array = npt.NDArray[Any]
ISAS: tuple[str, ...] = tuple(_cpu.usable_isas())
EPS = 2.0**-23


def empty_cache(kv_heads: int, capacity: int, dim: int, kind: str) -> tuple[Array, ...]:
    rows = tuple(np.full((kv_heads, capacity, dim), 77, kind) for _ in range(2))
    scales = tuple(np.full((kv_heads, capacity), 77, np.float32) for _ in range(2)) if kind == "int8" else ()
    return rows + scales


def frequencies(dim: int) -> Array:
    return (500000.0 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
def test_table(isa: str) -> None:
    positions = np.array([0, 1, 63, 1000, 8191], np.int64)
    cos, sin = _cpu.rope_table(positions, frequencies(128), isa, 1)
    expected = reference.rope_table(positions, frequencies(128))
    np.testing.assert_allclose(cos, expected[0], rtol=0, atol=EPS)
    np.testing.assert_allclose(sin, expected[1], rtol=0, atol=EPS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ("float32", "float16", "int8"))
@pytest.mark.parametrize("heads", ((4, 4), (4, 2), (32, 8)), ids=str)
@pytest.mark.parametrize("dim", (2, 8, 64, 72, 80, 128))
@pytest.mark.parametrize("tokens", (1, 2, 7, 63))
def test_append(tokens: int, dim: int, heads: tuple[int, int], kind: str, isa: str) -> None:
    random = np.random.default_rng([tokens, dim, *heads])
    query = random.standard_normal((tokens, heads[0], dim)).astype(np.float32)
    key, value = (random.standard_normal((tokens, heads[1], dim)).astype(np.float32) for _ in range(2))
    key[-1] = 0
    value[-1] *= np.float32(1e-38)
    value[..., -1] *= 50
    past = 5
    cos, sin = (x.astype(np.float32) for x in reference.rope_table(np.arange(past, past + tokens), frequencies(dim)))
    cache = empty_cache(heads[1], past + tokens + 2, dim, kind)
    rotated = _cpu.rope_append(query, key, value, cos, sin, *cache, past=past, isa=isa, threads=1)
    np.testing.assert_allclose(rotated, reference.rope(query, cos, sin), rtol=0, atol=4 * EPS * np.abs(query).max())

    for side, expected in enumerate((reference.rope(key, cos, sin), value.astype(np.float64))):
        rows = cache[side]
        assert (rows[:, :past] == 77).all()
        assert (rows[:, past + tokens :] == 77).all()
        got = rows[:, past : past + tokens].transpose(1, 0, 2)
        if kind == "int8":
            scales = cache[2 + side]
            assert (scales[:, :past] == 77).all()
            assert (scales[:, past + tokens :] == 77).all()
            scale = scales[:, past : past + tokens].T
            integers, exact = reference.quantize_rows(expected)
            np.testing.assert_allclose(scale, exact, rtol=4 * EPS)
            # What lies between two whole numbers may go to either.
            np.testing.assert_allclose(got.astype(int), integers, rtol=0, atol=1)
            error = np.abs(got * scale[..., None].astype(np.float64) - expected)
            assert (error <= scale[..., None] * (0.5 + 1e-4) + 128 * np.finfo(np.float32).tiny).all()
        elif kind == "float16":
            # Half a unit of float16, denormal below 2**-14, around what rotating rounded.
            np.testing.assert_allclose(got, expected, rtol=2.0**-11 + 4 * EPS, atol=2.0**-25 + 8 * EPS)
            np.testing.assert_array_equal(cache[1][:, past : past + tokens], value.transpose(1, 0, 2).astype(kind))
        else:
            np.testing.assert_allclose(got, expected, rtol=0, atol=4 * EPS * np.abs(expected).max())
            np.testing.assert_array_equal(cache[1][:, past : past + tokens], value.transpose(1, 0, 2))


@pytest.mark.parametrize("isa", ISAS)
def test_float16_rounds_like_numpy(isa: str) -> None:
    """Ties, denormals, the largest, and what is beyond it."""
    halves = np.arange(0, 0x7C00, 37, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    special = np.array([0, -0.0, 65504, 65519, 65520, 1e6, -1e6, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 1e-30], np.float32)
    values = np.concatenate([halves, ties, -ties, special])
    values = np.resize(values, (len(values) // 30 + 1, 1, 30))
    cache = empty_cache(1, len(values), 30, "float16")
    turn = np.ones((len(values), 15), np.float32)
    _cpu.rope_append(values, values, values, turn, 0 * turn, *cache, past=0, isa=isa, threads=1)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(cache[1][0], values[:, 0].astype(np.float16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ("float32", "float16", "int8"))
def test_append_has_the_same_bits_for_every_count_of_threads(kind: str, isa: str) -> None:
    random = np.random.default_rng(0)
    query = random.standard_normal((7, 12, 64)).astype(np.float32)
    key, value = (random.standard_normal((7, 3, 64)).astype(np.float32) for _ in range(2))
    cos, sin = _cpu.rope_table(np.arange(7), frequencies(64), isa, 1)
    results = []
    for threads in (1, 2, 3, 4):
        cache = empty_cache(3, 9, 64, kind)
        results.append(
            (_cpu.rope_append(query, key, value, cos, sin, *cache, past=1, isa=isa, threads=threads), *cache)
        )
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
