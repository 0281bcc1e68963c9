"""Scales that are whole multiples of a step for each row: they are found exactly, and no others are taken for such."""

from __future__ import annotations

import numpy as np
import pytest

from lensc.backends import _multiples
from lensc.backends._multiples import CLOSE, LARGEST, multiples
from lensc.backends.base import Array


def made(outputs: int, groups: int, largest: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Multiples int8, each row with one of `largest`; steps from 1e-30 to 1e30; float32 scales."""
    rng = np.random.default_rng(seed)
    wanted = (rng.integers(1, largest + 1, (outputs, groups)) * rng.choice((-1, 1), (outputs, groups))).astype(np.int8)
    wanted[:, rng.integers(groups)] = -largest
    steps = (10 ** rng.uniform(-30, 30, outputs)).astype(np.float32)
    return wanted, steps, wanted.astype(np.float32) * steps[:, None]


@pytest.mark.parametrize("largest", (8, 11, 13, 15))
def test_multiples_are_found(largest: int) -> None:
    wanted, steps, scales = made(100, 32, largest)
    found = multiples(scales)
    assert found is not None
    assert found[0].dtype == np.int8 and found[1].dtype == np.float32
    assert np.array_equal(found[0], wanted)
    assert np.allclose(found[1], steps, rtol=2e-7, atol=0)


@pytest.mark.parametrize("largest", range(1, LARGEST + 1))
def test_step_and_multiples_make_the_scales(largest: int) -> None:
    _, _, scales = made(50, 7, largest, seed=1)
    found = multiples(scales)
    assert found is not None
    assert np.abs(found[0]).max() <= LARGEST and (found[0] != 0).all() and (found[1] > 0).all()
    assert np.allclose(found[0].astype(np.float64) * found[1][:, None], scales, rtol=CLOSE, atol=0)


def test_smallest_step_is_taken() -> None:
    found = multiples(np.array([[1.5, -1.5], [3, 1], [2, 7]], np.float32))
    assert found is not None
    assert found[0].tolist() == [[15, -15], [15, 5], [4, 14]]
    assert found[1] == pytest.approx([0.1, 0.2, 0.5])


@pytest.mark.parametrize(
    "row",
    ([16, 1], [15, 14.999], [15, 0.5], [15, 1e-9], [15, 0], [0, 0], [np.nan, 1], [np.inf, 1], [31, 16]),
    ids=str,
)
def test_another_row_is_refused(row: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, scales = made(20, 2, 15)
    scales[17] = row
    assert multiples(scales) is None
    monkeypatch.setattr(_multiples, "PIECE", 8)
    assert multiples(scales) is None


def test_free_scales_are_refused() -> None:
    assert multiples(np.random.default_rng(0).uniform(0.5, 1, (1, 8)).astype(np.float32)) is None


def test_pieces_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, scales = made(101, 5, 15)
    whole = multiples(scales)
    monkeypatch.setattr(_multiples, "PIECE", 12)
    pieces = multiples(scales)
    assert whole is not None and pieces is not None
    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))
