"""SiLU and GELU on a GPU, or in Triton's interpreter, against the reference."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'lensc[cuda]'")
pytest.importorskip("triton", reason="pip install 'lensc[cuda]'")

from lensc.kernels.activation import reference
from lensc.kernels.activation.gpu import gelu_tanh, silu_mul

EPS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7}
"""Half a unit in the last place; the interpreter cuts bits off instead of rounding."""
EXTREMES = (0, -0.0, 1e-30, -1e-30, 88, -88, 1e4, -1e4)


def values(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = 4 * np.random.default_rng([rows, width, seed]).standard_normal((rows, width))
    x[-1, : len(EXTREMES)] = EXTREMES[:width]
    return torch.from_numpy(x.astype(np.float32)).to(dtype)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize(("rows", "width"), ((1, 1100), (2, 1023), (7, 72), (63, 8)))
def test_silu_mul(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate, up = values(rows, width, dtype), values(rows, width, dtype, seed=1)
    y = reference.silu_mul(gate.float().numpy(), up.float().numpy())
    both = torch.cat([gate, up], 1).to(device)
    out = torch.empty((rows, width), dtype=dtype, device=device)
    assert silu_mul(both, out) is out
    for found in (out, silu_mul(both)):
        assert found.dtype == dtype
        np.testing.assert_allclose(found.float().cpu(), y, rtol=EPS[dtype], atol=1e-30)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize(("rows", "width"), ((1, 1100), (2, 1023), (7, 72), (63, 8)))
def test_gelu_tanh(rows: int, width: int, biased: bool, dtype: torch.dtype, device: torch.device) -> None:
    x = values(rows, width, dtype)
    bias = values(1, width, torch.float32, seed=1)[0] / 1000 if biased else None
    found = gelu_tanh(x.to(device), None if bias is None else bias.to(device))
    assert found.dtype == dtype
    y = reference.gelu_tanh(x.float().numpy() + (0 if bias is None else bias.numpy()))
    # 1 + tanh(u) near u = -9 is what is left of two numbers near 1, in float64 too
    np.testing.assert_allclose(found.float().cpu(), y, rtol=EPS[dtype], atol=1e-6)
