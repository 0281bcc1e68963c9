"""Rotary embedding and the cache on a GPU, or in Triton's interpreter, against the reference."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'lensc[cuda]'")
pytest.importorskip("triton", reason="pip install 'lensc[cuda]'")

from lensc.kernels.rope import reference
from lensc.kernels.rope.gpu import rope_append

EPS = {
    torch.float32: 2e-6,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7,
}
"""Half a unit in the last place; the interpreter cuts bits of bfloat16 off instead of rounding."""
BEFORE = 77
"""What stands in a cache before it is written."""


def frequencies(dim: int) -> np.ndarray:
    return (500000.0 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)


def check(
    past: int,
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    batch: int,
    capacity: int,
    types: tuple,
    device: torch.device,
) -> None:
    dtype, kind = types
    num_heads, kv_heads = heads
    random = np.random.default_rng([past, tokens, dim, batch])
    x = random.standard_normal((batch, tokens, num_heads + 2 * kv_heads, dim)).astype(np.float32)
    x[..., -1] *= 50
    x[:, -1, num_heads] = 0
    x[:, -1, -1] *= np.float32(1e-38)
    qkv = torch.from_numpy(x).to(dtype)
    x = qkv.float().numpy()
    cache = [torch.full((batch, kv_heads, capacity, dim), BEFORE, dtype=kind, device=device) for _ in range(2)]
    scales = [
        torch.full((batch, kv_heads, capacity), BEFORE, dtype=torch.float32, device=device)
        if kind == torch.int8
        else None
        for _ in range(2)
    ]
    rotated = rope_append(
        qkv.reshape(batch * tokens, -1).to(device),
        *cache,
        torch.tensor([past], dtype=torch.int32, device=device),
        torch.from_numpy(frequencies(dim)).to(device),
        num_heads,
        batch,
        tokens,
        None,
        *scales,
    )
    assert rotated.dtype == dtype
    cos, sin = reference.rope_table(np.arange(past, past + tokens), frequencies(dim))
    end = min(past + tokens, capacity)
    found_q = rotated.float().cpu().numpy().reshape(batch, tokens, num_heads, dim)
    for b in range(batch):
        q, k, v = np.split(x[b], [num_heads, num_heads + kv_heads], axis=1)
        y = reference.rope(q, cos, sin)
        np.testing.assert_allclose(found_q[b], y, rtol=EPS[dtype], atol=EPS[torch.float32] * np.abs(q).max())
        for side, expected in enumerate((reference.rope(k, cos, sin), v.astype(np.float64))):
            rows = cache[side][b].float().cpu().numpy()
            assert (rows[:, :past] == BEFORE).all()
            assert (rows[:, end:] == BEFORE).all()
            got, expected = rows[:, past:end].transpose(1, 0, 2), expected[: end - past]
            scale = scales[side]
            if scale is None:
                atol = EPS[torch.float32] * np.abs(expected).max()
                np.testing.assert_allclose(got, expected, rtol=EPS[kind], atol=atol)
                continue
            column = scale[b].cpu().numpy()
            assert (column[:, :past] == BEFORE).all()
            assert (column[:, end:] == BEFORE).all()
            integers, exact = reference.quantize_rows(expected)
            np.testing.assert_allclose(column[:, past:end].T, exact, rtol=1e-5)
            # what lies between two whole numbers may go to either
            np.testing.assert_allclose(got, integers, rtol=0, atol=1)
            assert np.mean(got != integers) < 0.02


@pytest.mark.parametrize(
    "types",
    (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.int8),
        (torch.float32, torch.float16),
    ),
    ids=str,
)
@pytest.mark.parametrize(("heads", "dim"), (((4, 4), 8), ((6, 2), 64), ((8, 1), 72), ((4, 2), 128)), ids=str)
def test_append(heads: tuple[int, int], dim: int, types: tuple, device: torch.device) -> None:
    check(5, 3, heads, dim, 2, 11, types, device)


@pytest.mark.parametrize("past", (0, 1, 63, 200))
@pytest.mark.parametrize("tokens", (1, 2, 7))
def test_positions(tokens: int, past: int, device: torch.device) -> None:
    check(past, tokens, (4, 2), 64, 1, 210, (torch.float32, torch.float32), device)


@pytest.mark.parametrize("past", (1000, 8190))
def test_far_positions(past: int, device: torch.device) -> None:
    """An angle of 8000 radians is reduced exactly: nothing but its own rounding turns a row."""
    check(past, 2, (4, 2), 128, 1, 8192, (torch.float32, torch.float32), device)


@pytest.mark.parametrize("kind", (torch.float32, torch.int8), ids=str)
def test_what_is_beyond_the_capacity_is_dropped(kind: torch.dtype, device: torch.device) -> None:
    check(6, 5, (4, 2), 8, 2, 8, (torch.float32, kind), device)
