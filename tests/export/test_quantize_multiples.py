"""Scales that are whole multiples of a step for each row: exactly so, near the best, and what zeros and pieces do to them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lensc.backends import _multiples
from lensc.backends._multiples import multiples
from lensc.backends.base import Array
from lensc.export.quantize import grid, weights
from lensc.export.quantize.weights import QuantizedWeight, WeightFormat, dequantize, quantize_rtn

FORMATS = ("w4-g128-s4", "w4-g32-s4", "w3-g32-s4", "w2-g64-s4")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def free(text: str) -> WeightFormat:
    """The same format without multiples."""
    return WeightFormat.parse(text.removesuffix("-s4"))


def found(quantized: QuantizedWeight) -> tuple[Array, Array]:
    pair = multiples(quantized.scales.numpy())
    assert pair is not None
    return pair


def error(weight: Tensor, quantized: QuantizedWeight, importance: Tensor | float = 1.0) -> float:
    return float(((dequantize(quantized) - weight).double() ** 2 * importance).sum().sqrt())


def test_the_largest_multiple_is_the_one_that_backends_look_for() -> None:
    assert grid.LARGEST_MULTIPLE == _multiples.LARGEST == 2**weights.SCALE_BITS - 1
    for sign in (1, -1):
        levels = sign * grid.LARGEST_MULTIPLE * np.arange(-8, 8)
        assert levels.tolist() == levels.astype(np.int8).tolist()


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("inputs", [512, 300])
def test_scales_are_multiples(text: str, search: bool, inputs: int) -> None:
    """Also where the last group of a row is shorter."""
    weight = normal(64, inputs) * torch.logspace(-20, 20, 64)[:, None]
    quantized = quantize_rtn(weight, WeightFormat.parse(text), search)
    whole, steps = found(quantized)
    exact = torch.from_numpy(whole).float() * torch.from_numpy(steps)[:, None]
    torch.testing.assert_close(quantized.scales, exact, rtol=3e-7, atol=0)
    assert multiples(quantize_rtn(weight, free(text), search).scales.numpy()) is None


@pytest.mark.parametrize("text", FORMATS)
def test_weights_that_lie_on_such_grids_are_found_again(text: str) -> None:
    """Whatever the row's step, the multiples and their signs."""
    format = WeightFormat.parse(text)
    generator = torch.Generator().manual_seed(3)
    size = format.group_of(1024)
    whole = torch.randint(1, 16, (20, 1024 // size), generator=generator)
    whole[:, 2] = 15
    whole *= 2 * torch.randint(0, 2, whole.shape, generator=generator) - 1
    values = torch.randint(0, format.highest + 1, (20, 1024 // size, size), generator=generator) - format.zero_point
    # a group that does not reach both ends has other scales that are as good
    values[..., 0], values[..., 1] = -format.zero_point, format.highest - format.zero_point
    steps = torch.logspace(-6, 6, 20)
    quantized = quantize_rtn((values * whole[..., None]).flatten(1) * steps[:, None], format)
    assert found(quantized)[0].tolist() == whole.tolist()
    assert torch.equal(quantized.values.long() - format.zero_point, values.flatten(1))


@pytest.mark.parametrize(
    ("text", "spread", "within"),
    [
        ("w4-g128-s4", 1, 0.01),
        ("w4-g32-s4", 1, 0.034),
        ("w3-g32-s4", 1, 0.012),
        ("w2-g64-s4", 1, 0.0),
        ("w4-g128-s4", 4, 0.016),
        ("w4-g32-s4", 4, 0.048),
        ("w2-g64-s4", 4, 0.003),
    ],
)
def test_the_error_is_near_that_of_free_scales(text: str, spread: float, within: float) -> None:
    """Normal numbers, and those whose groups are up to `spread` times as large as others; see `grid`."""
    format = WeightFormat.parse(text)
    size = format.group_of(4096)
    larger = spread ** torch.rand(64, 4096 // size, 1, generator=torch.Generator().manual_seed(1))
    weight = (normal(64, 4096).view(64, -1, size) * larger).flatten(1)
    beside = error(weight, quantize_rtn(weight, free(text)))
    assert 0.98 * beside < error(weight, quantize_rtn(weight, format)) < (1 + within) * beside


def test_the_choice_comes_near_an_exhaustive_one() -> None:
    """4 bits, rows of 4 groups of 16: the best of 200 steps and of all multiples of either sign."""
    x = normal(12, 4, 16).double()
    best = torch.full((12,), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.4, 1.2, 200).tolist():
        step = share * x.abs().amax((1, 2)) / 7.5 / 15
        errors = torch.full((12, 4), torch.inf, dtype=torch.float64)
        for multiple, sign in itertools.product(range(1, 16), (1, -1)):
            scale = (multiple * sign * step)[:, None, None]
            rounded = (x / scale).round().clamp(-8, 7) * scale
            errors = torch.minimum(errors, (rounded - x).square().sum(-1))
        best = torch.minimum(best, errors.sum(1))
    weight = x.flatten(1).float()
    made = error(weight, quantize_rtn(weight, WeightFormat.parse("w4-g16-s4")))
    assert made**2 < 1.10 * float(best.sum())


def test_importance_chooses_multiples() -> None:
    """Against the same scales chosen without it: only multiples and steps differ."""
    weight, importance = normal(64, 1024), torch.rand(1024, generator=torch.Generator().manual_seed(1)) ** 6
    format = WeightFormat.parse("w4-g32-s4")
    weighed, plain = (quantize_rtn(weight, format, importance=i) for i in (importance, None))
    assert error(weight, weighed, importance) < 0.9 * error(weight, plain, importance)
    scales = weights.fit_scales(weight, free("w4-g32-s4"), grid.SHRINK[4], importance)[0]
    x, share = weight.view(64, 32, 32), (importance / importance.mean()).view(32, 32)
    chosen = [grid.fit_multiples(x, scales, -8, 7, s)[..., None] for s in (share, None)]
    errors = [((x - (x / s).round().clamp(-8, 7) * s) ** 2 * share).sum() for s in chosen]
    assert errors[0] < 0.98 * errors[1]


@pytest.mark.parametrize("text", FORMATS)
def test_groups_of_zeros_do_not_spoil_their_row(text: str) -> None:
    """They take the row's step, and all else is as if they were not there; rows of zeros have the scale 1."""
    format = WeightFormat.parse(text)
    size = format.group_of(1024)
    weight = 1e-3 * normal(4, 1024)
    weight[1, size : 2 * size] = 0
    weight[2, -size:] = 1e-40
    weight[3] = 0
    quantized = quantize_rtn(weight, format)
    whole, steps = found(quantized)
    scales = quantized.scales
    assert whole[1, 1] == 1 and whole[2, -1] == 1 and steps[1] < 1e-3 and steps[2] < 1e-3
    assert bool((scales[3] == 1).all())
    without = quantize_rtn(torch.cat((weight[1:2, :size], weight[1:2, 2 * size :]), 1), format)
    assert torch.equal(torch.cat((scales[1:2, :1], scales[1:2, 2:]), 1), without.scales)
    made = dequantize(quantized)
    assert bool((made[1, size : 2 * size] == 0).all() and (made[2, -size:] == 0).all() and (made[3] == 0).all())


def test_a_group_far_below_the_others_takes_the_step() -> None:
    weight = normal(1, 64)
    weight[0, :32] *= 1e-9
    quantized = quantize_rtn(weight, WeightFormat.parse("w4-g32-s4"))
    assert abs(found(quantized)[0]).tolist() == [[1, 15]]
    assert bool((dequantize(quantized)[0, :32] == 0).all())


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("weighed", [False, True])
def test_pieces_give_the_same_as_the_whole(text: str, weighed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, format = normal(37, 1040), WeightFormat.parse(text)
    importance = normal(1040, seed=1).square() if weighed else None
    whole = quantize_rtn(weight, format, importance=importance)
    rows = quantize_rtn(weight[5:9], format, importance=importance)
    for chunk in (1, 5000):
        monkeypatch.setattr(weights, "CHUNK", chunk)
        pieces = quantize_rtn(weight, format, importance=importance)
        assert torch.equal(whole.values, pieces.values) and torch.equal(whole.scales, pieces.scales)
    assert torch.equal(whole.values[5:9], rows.values) and torch.equal(whole.scales[5:9], rows.scales)
