"""Compile the kernels that are launched by a decoder and a vision tower, for a GPU of sm_90 that need not be there.

Triton's interpreter runs what its compiler refuses; test_launch.py runs this in a process of its own, without the
interpreter. Prints a line for each kernel: its name, the bytes of shared memory, and whether it took an approximate sine.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lensc.kernels.activation.gpu import gelu_tanh, silu_mul
from lensc.kernels.attention.gpu import attention, decode_attention, decode_scratch, prefill_attention
from lensc.kernels.norm.gpu import add_norm
from lensc.kernels.rope.gpu import rope_append

CPU = torch.device("cpu")
launch = JITFunction.run


class Absent:
    """A driver of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    made = launch(kernel, *given, grid=grid, warmup=True, **options)
    approximate = any(f"{name}.approx" in made.asm["ptx"] for name in ("sin", "cos"))
    print(kernel.__name__, made.metadata.shared, approximate, flush=True)
    return made


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def main() -> None:
    driver.set_active(Absent())
    JITFunction.run = compile_only
    stream, weight = empty(1, 4096, dtype=torch.float32), empty(4096, dtype=torch.float32)
    add_norm(empty(1, 4096), stream, None, weight, None, 1e-5, "rms", torch.bfloat16)
    stream, weight = empty(2, 1152, dtype=torch.float32), empty(1152, dtype=torch.float32)
    add_norm(empty(2, 1152), stream, weight, weight, weight, 1e-5, "layer", torch.bfloat16)
    silu_mul(empty(1, 28672))
    gelu_tanh(empty(2, 4304), empty(4304, dtype=torch.float32))
    past, frequencies = empty(1, dtype=torch.int32), empty(64, dtype=torch.float32)
    for dtype, kind in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.int8), (torch.float32, torch.float32)):
        cache = empty(1, 8, 512, 128, dtype=kind)
        scales = empty(1, 8, 512, dtype=torch.float32) if kind == torch.int8 else None
        rope_append(empty(1, 6144, dtype=dtype), cache, cache, past, frequencies, 32, 1, 1, None, scales, scales)
        q, scratch = empty(1, 32, 128, dtype=dtype), decode_scratch(1, 1, 32, 8, 128, CPU)
        decode_attention(q, cache, cache, past, 0.1, 1, 1, scratch, scales, scales)
        prefill_attention(empty(200, 32, 128, dtype=dtype), cache, cache, past, 0.1, 1, 200, scales, scales)
    for keys in (1024, 1000):
        attention(*empty(2, keys, 3456).chunk(3, -1), empty(2, keys, dtype=torch.float32), 16, 0.1)


main()
