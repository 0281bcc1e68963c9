"""Linears on a GPU, or in Triton's interpreter, against the reference; and that CUDA compiles where there is no card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'lensc[cuda]'")
pytest.importorskip("triton", reason="pip install 'lensc[cuda]'")

from lensc.backends.errors import UnavailableError
from lensc.kernels import nvrtc
from lensc.kernels.activation.reference import silu_mul
from lensc.kernels.linear import gpu
from lensc.kernels.linear.reference import dequantize, linear, unpack
from lensc.kernels.norm.reference import rms_norm

SOURCE = Path(gpu.__file__).with_name("few_rows.cu")
SHAPES = [(1, 128, 32), (7, 160, 48), (8, 416, 20)]
"""Rows, inputs, outputs: some that few_rows.cu takes on a GPU, some that it leaves to Triton."""


def random_weight(inputs: int, outputs: int, group: int, asymmetric: bool, device: torch.device, seed: int = 0):
    """A packed weight and the floats that it stands for."""
    numbers = np.random.default_rng(seed)
    groups = -(-inputs // group)
    values = numbers.integers(0, 256, (outputs, inputs // 2), np.uint8)
    scale = numbers.uniform(0.2, 1, (outputs, groups)).astype(np.float32) * numbers.uniform(1e-7, 3, (outputs, 1))
    scale = (scale / 10).astype(np.float32)
    zero = numbers.integers(0, 16, (outputs, groups), np.uint8) if asymmetric else None
    floats = dequantize(
        unpack(values.reshape(-1), 4, outputs * inputs).reshape(outputs, inputs),
        scale,
        np.full((outputs, groups), 8, np.uint8) if zero is None else zero,
        group,
    )
    given = [None if array is None else torch.from_numpy(array).to(device) for array in (values, scale, zero)]
    return gpu.pack(*given, group, inputs), floats


def close(found: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    """Within the rounding of products of `dtype`, beside the size of what is summed."""
    error = np.abs(found.float().cpu().numpy() - expected)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert error.max() <= limit * max(np.abs(expected).max(), 1e-30), error.max() / np.abs(expected).max()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_packed_weight_is_what_it_was(group: int, asymmetric: bool, device: torch.device) -> None:
    for inputs, outputs in ((128, 32), (416, 20), (1024, 7)):
        weight, floats = random_weight(inputs, outputs, group, asymmetric, device)
        assert weight.padded % gpu.STEP == 0
        close(gpu.unpacked(weight, torch.float32), floats, torch.bfloat16)
        # a scale is half a float beside the largest of its output: 11 bits
        difference = np.abs(gpu.unpacked(weight, torch.float32).cpu().numpy() - floats)
        assert (difference <= 2.0**-11 * np.abs(floats) + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("kind", ["float", "32", "64-asym", "128"])
def test_few_rows(kind: str, rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> None:
    numbers = np.random.default_rng(rows)
    if kind == "float":
        floats = numbers.standard_normal((outputs, inputs)).astype(np.float32)
        weight: gpu.Weight = gpu.FloatWeight(torch.from_numpy(floats).to(device, dtype))
        floats = weight.values.float().cpu().numpy()
    else:
        group, _, asymmetric = kind.partition("-")
        weight, _ = random_weight(inputs, outputs, int(group), bool(asymmetric), device)
        floats = gpu.unpacked(weight, torch.float32).cpu().numpy()
    x = numbers.standard_normal((rows, inputs)).astype(np.float32)
    x[:, 3] *= 20  # an outlier column
    stream = torch.from_numpy(x).to(device)
    given = stream.to(dtype)
    norm = numbers.uniform(0.5, 2, inputs).astype(np.float32)
    normed = (torch.from_numpy(norm).to(device), 1e-5)
    residual = torch.from_numpy(numbers.standard_normal((rows, outputs)).astype(np.float32)).to(device)
    y = linear(given.float().cpu().numpy(), floats)
    of_normed = linear(rms_norm(x, norm, 1e-5), floats)

    close(gpu.few_rows(given, weight, dtype=dtype), y, dtype)
    made = gpu.few_rows(given, weight, gpu.Ending.LOGITS, dtype=dtype)
    assert made.dtype == torch.float32
    close(made, y, dtype)
    close(gpu.few_rows(stream, weight, gpu.Ending.LOGITS, normed, dtype=dtype), of_normed, dtype)
    gated = silu_mul(of_normed[:, : outputs // 2], of_normed[:, outputs // 2 :])
    close(gpu.few_rows(stream, weight, gpu.Ending.SILU, normed, dtype=dtype), gated, dtype)
    expected = residual.cpu().numpy() + y
    in_place = gpu.few_rows(given, weight, gpu.Ending.RESIDUAL, residual=residual, out=residual, dtype=dtype)
    assert in_place is residual
    close(residual, expected, dtype)


def test_cuda_compiles_without_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every format and every ending; what is kept is found again."""
    pytest.importorskip("cuda.bindings", reason="pip install 'lensc[cuda]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cases = [
        ("sm_90", 16, 0, 0, 1, gpu.Ending.LOGITS),
        ("sm_90", 4, 128, 0, 1, gpu.Ending.SILU),
        ("sm_90", 4, 64, 0, 1, gpu.Ending.STORE),
        ("sm_90", 4, 32, 1, 0, gpu.Ending.RESIDUAL),
        ("sm_100", 16, 0, 0, 0, gpu.Ending.RESIDUAL),
    ]
    for arch, bits, span, zeros, norm, ending in cases:
        definitions = {"BITS": bits, "SPAN": span, "ZEROS": zeros, "NORM": norm, "ENDING": int(ending)}
        definitions |= {"GROUP": span, "MOST_ROWS": 8, "TILES": 2, "WARPS": 16, "DEPTH": 4}
        assert nvrtc.binary(SOURCE, definitions, arch)[:4] == b"\x7fELF"
    kept = list(tmp_path.rglob("*.cubin"))
    assert len(kept) == len(cases)
    assert nvrtc.binary(SOURCE, definitions, arch) in [path.read_bytes() for path in kept]


def test_what_nvrtc_refuses_is_said_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings", reason="pip install 'lensc[cuda]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cu"
    source.write_text("int f( {}")
    with pytest.raises(UnavailableError, match=r"broken.cu for sm_90: NVRTC .* refuses it: .*error"):
        nvrtc.binary(source, {}, "sm_90")
    assert not list(tmp_path.rglob("*.cubin"))
