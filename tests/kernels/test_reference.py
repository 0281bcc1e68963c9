"""The references against values that can be seen to be right."""

from __future__ import annotations

import numpy as np
import pytest

from lensc.kernels.activation.reference import gelu_tanh, silu_mul
from lensc.kernels.linear.reference import dequantize, linear, quantize_rows, quantized_linear, unpack
from lensc.kernels.norm.reference import layer_norm, rms_norm

GENERATOR = np.random.default_rng(0)


def test_norms() -> None:
    x = np.array([[3.0, -4.0, 0.0, 5.0]])
    weight, bias = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.0, 7.0, 0.0])
    np.testing.assert_allclose(rms_norm(x, weight, 0.0), x / np.sqrt(12.5) * weight)
    normal = (x - 1) / x.std()
    np.testing.assert_allclose(layer_norm(x, weight, bias, 0.0), normal * weight + bias)
    np.testing.assert_allclose(layer_norm(x, weight, None, 0.0), normal * weight)
    assert not rms_norm(np.zeros((2, 4)), weight, 1e-6).any()


def test_activations() -> None:
    x = np.array([-600, -1.0, 0.0, 1.0, 1e4])
    np.testing.assert_allclose(silu_mul(x, np.full(5, 2.0)), 2 * x / (1 + np.exp(-x)))
    np.testing.assert_allclose(gelu_tanh(x), [0, -0.158808, 0, 0.841192, 1e4], atol=1e-6)


def test_rows_are_rounded_to_nearest_with_ties_to_even() -> None:
    x = np.array([[127, 0.5, 1.5, -2.5, 0, 0, 0, 0, 254, -254, 1, 3]], np.float32)
    values, scales = quantize_rows(x, 4)
    assert values.tolist() == [[127, 0, 2, -2, 0, 0, 0, 0, 127, -127, 0, 2]]
    assert scales.tolist() == [[1, 0, 2]]
    assert quantize_rows(x, 0)[1].tolist() == [[2]]
    tiny, steps = quantize_rows(np.array([[1e-45, -1e-38, 3e38, 0]], np.float32), 2)
    assert np.isfinite(steps).all() and tiny.tolist()[0][1:] == [-127, 127, 0]
    assert quantize_rows(np.full((1, 2), 1e-45, np.float32), 0)[0].tolist() == [[0, 0]]


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_the_first_value_is_in_the_lowest_bits(bits: int) -> None:
    values = GENERATOR.integers(0, 2**bits, 13).astype(np.uint8)
    packed = np.zeros(-(-13 * bits // 8), np.uint8)
    for i, value in enumerate(values):
        packed[i * bits // 8] |= value << i * bits % 8
    assert unpack(packed, bits, 13).tolist() == values.tolist()


@pytest.mark.parametrize("zero_points", (False, True), ids=("symmetric", "asymmetric"))
@pytest.mark.parametrize("group", (0, 4, 5, 12), ids="g{}".format)
def test_a_quantized_linear_is_that_of_the_weight_it_stands_for(group: int, zero_points: bool) -> None:
    """Also where the last group is shorter; rounded inputs are within half a step."""
    rows, inputs, outputs = 3, 12, 5
    groups = -(-inputs // (group or inputs))
    values = GENERATOR.integers(0, 16, (outputs, inputs)).astype(np.uint8)
    scales = GENERATOR.uniform(-1, 1, (outputs, groups)).astype(np.float32)
    zeros = GENERATOR.integers(0, 16, (outputs, groups)).astype(np.uint8) if zero_points else None
    x = GENERATOR.standard_normal((rows, inputs), np.float32)
    bias, residual = GENERATOR.standard_normal(outputs), GENERATOR.standard_normal((rows, outputs))
    weight = dequantize(values, scales, zeros, group)
    g = 3 // (group or inputs)
    assert weight[2, 3] == (int(values[2, 3]) - (int(zeros[2, g]) if zeros is not None else 0)) * float(scales[2, g])
    expected = x.astype(np.float64) @ weight.T + bias + residual
    np.testing.assert_allclose(linear(x, weight, bias, residual), expected)
    np.testing.assert_allclose(quantized_linear(x, values, scales, zeros, group, None, bias, residual), expected)
    rounded, steps = quantize_rows(x, group)
    spread = np.repeat(steps, group or inputs, axis=1)[:, :inputs].astype(np.float64)
    assert (np.abs(rounded * spread - x) <= spread / 2 * (1 + 1e-5)).all()
    got = quantized_linear(x, values, scales, zeros, group, group, bias, residual)
    np.testing.assert_allclose(got, rounded * spread @ weight.T + bias + residual, rtol=1e-12, atol=1e-12)
