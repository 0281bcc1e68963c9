"""Eight-bit activations: what rounding them costs, and moving their outliers into the weights beforehand.

Activations are rounded at run time with one scale for a whole tensor or for a token, weights with one for each output.
A channel that is far larger than the others makes the step too coarse for all of them. Dividing it by a factor, and
multiplying the weights that read it by the same, changes nothing in float arithmetic and shares the difficulty between
the two (SmoothQuant, Xiao et al., arXiv 2211.10438). The division costs nothing where it goes into what comes before:

    a norm               weight and bias are divided               LayerNorm, RMSNorm -> q, k, v; fc1; gate, up
    a linear, directly   rows and bias are divided                 v -> out: attention mixes tokens, not channels
    through a product    the factor that is linear is divided      up -> down: silu(gate) * up

and nowhere else: GELU between fc1 and fc2 does not commute with it. Where heads share values (grouped queries), the
channels that read the same row of v need the same factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lensc.backends.errors import InputError

from .weights import WeightFormat, dequantize, quantize_rtn

Scope = Literal["tensor", "token"]
"""What shares a scale: all activations of a run (uint8 with a zero point), or those of one token (int8)."""

ALPHAS = tuple(i / 10 for i in range(1, 10))
"""Shares of the activations' outliers that are moved into the weights."""

INT8 = WeightFormat(8)

STEEPEST = 1e4
"""Largest ratio of a factor to the median factor, so that no channel leaves the range of half precision."""


@dataclass(frozen=True, eq=False)
class Smoothing:
    """factors: float32[in], all 1 where `alpha` is None; `error` and, without the factors, `error_before` of the outputs
    in 8 bits, as shares of the outputs (root mean square)."""

    factors: Tensor
    alpha: float | None
    error: float
    error_before: float


def smoothing_factors(absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """What to divide each channel by: absmax^alpha / (largest weight)^(1 - alpha), scaled to the median 1.

    absmax: float[in], the largest magnitude of each channel over the calibration data; weights: float[out, in] each, all
    that read these channels. Channels that are always 0, and those that nothing reads, have factor 1. Raises InputError
    for NaN, Inf, negative magnitudes or other widths.
    """
    reach = torch.stack([_column_absmax(weight, absmax) for weight in weights]).amax(0).double()
    size = absmax.double()
    if not bool(torch.isfinite(size).all()) or float(size.min()) < 0 or not bool(torch.isfinite(reach).all()):
        raise InputError("smoothing: expected finite magnitudes of at least 0, and finite weights")
    alive = (size > 0) & (reach > 0)
    if not bool(alive.any()):
        return torch.ones(size.shape)
    # logarithms, as powers of extreme numbers overflow
    logs = alpha * size.clamp_min(1e-300).log() - (1 - alpha) * reach.clamp_min(1e-300).log()
    logs -= logs[alive].median()
    factors = logs.exp().clamp(1 / STEEPEST, STEEPEST).float()
    return torch.where(alive, factors, 1.0)


def best_smoothing(
    activations: Sequence[Tensor],
    weights: Sequence[Tensor],
    scope: Scope,
    absmax: Tensor | None = None,
    alphas: Iterable[float] = ALPHAS,
    format: WeightFormat = INT8,
) -> Smoothing:
    """The factors that bring the outputs in 8 bits nearest to those in float on sample activations.

    activations: float[..., in], one tensor for each run of the graph; weights as in `smoothing_factors`; `absmax` from
    more data than the sample, if there is any. Never worse than no smoothing on the sample: then all factors are 1.
    """
    if absmax is None:
        absmax = torch.stack([x.reshape(-1, x.shape[-1]).abs().amax(0) for x in activations]).amax(0)
    none = torch.ones(absmax.shape)
    before = int8_error(activations, weights, scope, none, format)
    best = Smoothing(none, None, before, before)
    for alpha in alphas:
        factors = smoothing_factors(absmax, weights, alpha)
        error = int8_error(activations, weights, scope, factors, format)
        if error < best.error:
            best = Smoothing(factors, alpha, error, before)
    return best


def int8_error(
    activations: Sequence[Tensor], weights: Sequence[Tensor], scope: Scope, factors: Tensor, format: WeightFormat = INT8
) -> float:
    """Root mean square error of all outputs with activations in 8 bits and weights in `format`, as a share of theirs."""
    wrong = total = 0.0
    rounded = [dequantize(quantize_rtn(smooth_input(weight, factors), format)) for weight in weights]
    for x in activations:
        x = x.float()
        coarse = round_activations(x / factors, scope)
        for weight, narrow in zip(weights, rounded, strict=True):
            exact = x @ weight.float().mT
            total += float(exact.square().sum(dtype=torch.float64))
            wrong += float((coarse @ narrow.mT - exact).square_().sum(dtype=torch.float64))
    return (wrong / total) ** 0.5 if total else 0.0


def round_activations(x: Tensor, scope: Scope) -> Tensor:
    """`x: float[..., in]` rounded to 8 bits as engines do at run time, as floats.

    "tensor": uint8 over the range of all of x and 0, as ONNX's DynamicQuantizeLinear; "token": int8 from -127 to 127,
    by the largest magnitude of each row.
    """
    x = x.float()
    if scope == "token":
        largest = x.abs().amax(-1, keepdim=True)
        scale = torch.where(largest > 0, largest / 127, 1.0)
        return (x / scale).round_().mul_(scale)
    low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
    scale = torch.where(high > low, (high - low) / 255, 1.0)
    zero = (-low / scale).round_().clamp_(0, 255)
    return (x / scale).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(scale)


def smooth_norm(weight: Tensor, bias: Tensor | None, factors: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight and bias [in] of the LayerNorm or RMSNorm whose outputs are divided by `factors`."""
    return weight / factors, None if bias is None else bias / factors


def smooth_output(weight: Tensor, bias: Tensor | None, factors: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight [out, in] and bias [out] of the linear whose outputs are divided by `factors: float[out]`."""
    return weight / factors[:, None], None if bias is None else bias / factors


def smooth_input(weight: Tensor, factors: Tensor) -> Tensor:
    """The weight [out, in] that reads channels divided by `factors: float[in]`."""
    return weight.float() * factors


def _column_absmax(weight: Tensor, absmax: Tensor) -> Tensor:
    if weight.dim() != 2 or weight.shape[1:] != absmax.shape:
        raise InputError(f"smoothing: weight {list(weight.shape)} does not read {list(absmax.shape)} channels")
    return weight.abs().amax(0)
