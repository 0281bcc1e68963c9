"""Norms on a GPU, or in Triton's interpreter, against the reference."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'lensc[cuda]'")
pytest.importorskip("triton", reason="pip install 'lensc[cuda]'")

from lensc.kernels.norm import reference
from lensc.kernels.norm.gpu import add_norm

BFLOAT16_EPS = 2.0**-8 if torch.cuda.is_available() else 2.0**-7
"""Half a unit in the last place; the interpreter cuts bits off instead of rounding."""


def floats(*shape: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def expected(stream: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, kind: str) -> np.ndarray:
    if kind == "layer":
        return reference.layer_norm(stream, weight, bias, 1e-6)
    return reference.rms_norm(stream, weight, 1e-6) + (0 if bias is None else bias)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", ("rms", "layer"))
@pytest.mark.parametrize(("rows", "width"), ((1, 4096), (2, 588), (7, 1152), (63, 8)))
def test_add_norm(rows: int, width: int, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    x = floats(rows, width, seed=1).to(dtype)
    residual, bias = 3 * floats(rows, width, seed=2) + 20, floats(width, seed=3)
    weight, norm_bias = floats(width, seed=4), floats(width, seed=5)
    residual[-1] = 0
    residual[:, 1] *= 100
    variants = ((residual, bias, norm_bias), (residual, None, None), (None, bias, norm_bias))
    for given in variants if rows < 63 else variants[:1]:
        on_device = [None if part is None else part.to(device) for part in given]
        stream, normalized = add_norm(x.to(device), *on_device[:2], weight.to(device), on_device[2], 1e-6, kind, dtype)
        exact = sum(np.asarray(part, np.float64) for part in (x.float(), *given[:2]) if part is not None)
        assert stream.dtype == torch.float32
        np.testing.assert_allclose(stream.cpu(), exact, rtol=2.0**-22, atol=1e-5)
        assert normalized.dtype == dtype
        # what float32 rounded in the sum, seen through the norm, is part of what is compared
        y = expected(
            stream.cpu().double().numpy(), weight.numpy(), None if given[2] is None else norm_bias.numpy(), kind
        )
        eps = 2e-6 if dtype == torch.float32 else BFLOAT16_EPS
        np.testing.assert_allclose(normalized.float().cpu(), y, rtol=eps, atol=eps * np.abs(y).max() / 8)


def test_what_needs_no_sum_is_returned_as_it_came(device: torch.device) -> None:
    x, weight = floats(3, 24, seed=0).to(device), torch.ones(24, device=device)
    for given in ((None, x), (x, None)):
        stream, normalized = add_norm(*given, None, weight, None, 1e-6, "rms", torch.float32)
        assert stream is x
        y = reference.rms_norm(x.cpu().numpy(), np.ones(24), 1e-6)
        np.testing.assert_allclose(normalized.cpu(), y, rtol=1e-5, atol=1e-6)


def test_the_stream_is_updated_in_place(device: torch.device) -> None:
    x, residual, weight = (
        floats(3, 24, seed=0).to(device),
        floats(3, 24, seed=1).to(device),
        torch.ones(24, device=device),
    )
    total = x + residual
    stream, _ = add_norm(x, residual, None, weight, None, 1e-6, "rms", torch.float32, out_residual=residual)
    assert stream is residual
    torch.testing.assert_close(residual, total)


def test_layer_norm_of_a_large_mean(device: torch.device) -> None:
    """Its variance is lost if it is a difference of squares."""
    x = (floats(2, 1152, seed=0) + 4096).to(device)
    weight = torch.ones(1152, device=device)
    _, normalized = add_norm(x, None, None, weight, None, 1e-6, "layer", torch.float32)
    y = reference.layer_norm(x.cpu().numpy(), np.ones(1152), None, 1e-6)
    np.testing.assert_allclose(normalized.cpu(), y, rtol=0, atol=2e-3)


def test_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="both None"):
        add_norm(None, None, None, torch.ones(8), None, 1e-6, "rms", torch.float32)
