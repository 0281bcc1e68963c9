"""The training's own Muon beside torch's."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'lensc[export]'")

from lensc.export.demo.muon import Muon, compute_dtype, orthogonal


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_its_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    own = Muon([ours], lr=0.05, weight_decay=0.1, dtype=torch.bfloat16)
    other = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient, gradient.clone()
        own.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (ours - start).abs().max() > 0.1


def test_in_float32_its_steps_are_nearly_orthogonal() -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(2))
    singular = torch.linalg.svdvals(orthogonal(matrix, torch.float32))
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    torch.testing.assert_close(
        orthogonal(matrix, torch.bfloat16).float(), orthogonal(matrix, torch.float32), rtol=0, atol=0.02
    )


@pytest.mark.parametrize(
    ("capability", "device", "dtype"),
    [
        ("AVX2", "cpu", "float32"),
        ("DEFAULT", "cpu", "float32"),
        ("AVX512", "cpu", "bfloat16"),
        ("AVX2", "cuda:0", "bfloat16"),
    ],
)
def test_products_are_in_what_the_device_is_fast_at(
    monkeypatch: pytest.MonkeyPatch, capability: str, device: str, dtype: str
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert compute_dtype(device) == getattr(torch, dtype)
