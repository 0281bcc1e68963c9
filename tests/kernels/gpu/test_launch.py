"""What a CUDA graph asks of the launches, and that the kernels compile where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'lensc[cuda]'")
pytest.importorskip("triton", reason="pip install 'lensc[cuda]'")

from lensc.kernels.attention import reference
from lensc.kernels.attention.gpu import decode_attention, decode_scratch, prefill_attention
from lensc.kernels.rope.gpu import rope_append

MOST_SHARED_BYTES = 227 * 1024
"""That a program may have on sm_90."""


class Step:
    """One token after another, of 4 heads and 2 kv heads of 16, past a cache of 64."""

    def __init__(self, device: torch.device) -> None:
        self.qkv = torch.zeros((1, 8 * 16), device=device)
        self.cache = [torch.zeros((1, 2, 64, 16), device=device) for _ in range(2)]
        self.past = torch.zeros(1, dtype=torch.int32, device=device)
        self.frequencies = torch.zeros(8, device=device)  # no rotation: what is cached is what was given
        self.scratch = decode_scratch(1, 1, 4, 2, 16, device, splits=3)

    def run(self, attend: Callable[..., torch.Tensor], *more: Any) -> torch.Tensor:
        q = rope_append(self.qkv, *self.cache, self.past, self.frequencies, 4, 1, 1)
        return attend(q, *self.cache, self.past, 0.25, 1, 1, *more)


def test_nothing_asks_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches do not wait for a value, such as the length of a cache."""
    step = Step(device)

    def asked(*_: object) -> None:
        raise AssertionError("a launch waits for the device")

    for name in ("item", "tolist", "__int__", "__index__", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    step.run(decode_attention, step.scratch)
    step.run(prefill_attention)


@pytest.mark.parametrize("decode", (True, False))
def test_a_graph_is_replayed_as_the_cache_grows(decode: bool, device: torch.device) -> None:
    """Without a GPU the step is run again instead."""
    step = Step(device)
    given = (decode_attention, step.scratch) if decode else (prefill_attention,)
    found = step.run(*given)
    if graph := torch.cuda.CUDAGraph() if device.type == "cuda" else None:
        with torch.cuda.graph(graph):
            found = step.run(*given)
    random = np.random.default_rng(0)
    for past in (0, 1, 30, 31, 32, 62, 63, 64, 69):
        x = random.standard_normal((1, 8, 16)).astype(np.float32)
        step.qkv.copy_(torch.from_numpy(x.reshape(1, -1)))
        step.past.fill_(past)
        if graph:
            graph.replay()
        else:
            found = step.run(*given)
        keys, values = (cache[0].cpu().numpy() for cache in step.cache)
        # behind the capacity nothing is written, and all of the cache seen
        y = reference.causal_attention(x[:, :4], keys, values, min(past, 63), 0.25)
        np.testing.assert_allclose(found.cpu(), y, rtol=0, atol=1e-5)
        if past < 64:
            np.testing.assert_array_equal(keys[:, past], x[0, 4:6])
            np.testing.assert_array_equal(values[:, past], x[0, 6:])


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_for_sm_90.py")
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert {name for name, *_ in lines} >= {
        *("_add_norm", "_silu_mul", "_gelu_tanh", "_rope_append", "_decode", "_prefill", "_attention")
    }
    assert [line for line in lines if int(line[1]) > MOST_SHARED_BYTES or line[2] == "True"] == []
