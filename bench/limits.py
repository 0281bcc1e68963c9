"""What the machine at hand reaches at best, measured: nothing that runs on it can be faster.

python -m lensc.bench.limits [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from lensc.profiles import probe

READ_BYTES = 1 << 30
"""Read by every thread, several times what the largest cache of a server's share holds."""

GEMM = (2048, 4096, 4096)
"""Rows, inputs, outputs: a prefill's product in Llama-3-8B."""
STREAMS = (1, 2, 4, 8)
"""Places at which a thread reads at once: more than one keeps more of the memory's pages open."""
PRODUCT_ROUNDS = 300_000
"""Of a dozen instructions each: 4 to 20 ms."""
TRIES = 5


def bandwidth_gb_s(threads: int, read_bytes: int = READ_BYTES) -> float:
    """DRAM read bandwidth: the best of some sums over random data, of `read_bytes` by every thread at once. By numpy, and
    where there are compiled kernels by one that reads in several places at once.
    """
    data = np.random.default_rng(0).integers(0, 1 << 60, threads * read_bytes // 8, dtype=np.int64)
    return max(read_gb_s(data, threads, streams) for streams in (0, *(STREAMS if _kernels() else ())))


def read_gb_s(data: npt.NDArray[np.int64], threads: int, streams: int) -> float:
    """How fast every thread reads a share of `data` in so many places at once; 0: by numpy, in one."""
    if streams:
        kernels, shown = _kernels(), data.view(np.uint8)
        return data.nbytes / _best(lambda: kernels.read(shown, streams, threads=threads)) / 1e9
    with ThreadPoolExecutor(threads) as pool:
        shares = np.array_split(data, threads)
        return data.nbytes / _best(lambda: list(pool.map(np.bitwise_xor.reduce, shares))) / 1e9


def product_gop_s(product: str, threads: int, isa: str = "") -> float | None:
    """Operations of multiplications with additions in registers, 10^9 per second, by the fastest instruction of `isa` (the
    best there is if it is empty) for int8, bfloat16 or float32. None without compiled kernels or such an instruction.
    """
    kernels = _kernels()
    operations = kernels.multiply(product, PRODUCT_ROUNDS, isa, threads) if kernels else 0
    if not operations:
        return None
    return operations / _best(lambda: kernels.multiply(product, PRODUCT_ROUNDS, isa, threads)) / 1e9


def gemm_gop_s(dtype: str, threads: int) -> float:
    """Operations of a matrix product in `dtype` (float32, bfloat16, int8), 10^9 per second: two for each multiplication
    with its addition. By torch; in int8 by torch or ONNX Runtime, whoever is faster here.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    m, k, n = GEMM
    try:
        if dtype == "int8":
            a = torch.randint(-127, 128, (m, k), dtype=torch.int8)
            b = torch.randint(-127, 128, (k, n), dtype=torch.int8)
            seconds = min(_best(lambda: torch._int_mm(a, b)), _best(_integer_product(m, k, n, threads)))
        else:
            kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
            x, y = torch.randn(m, k).to(kind), torch.randn(k, n).to(kind)
            seconds = _best(lambda: x @ y)
    finally:
        torch.set_num_threads(before)
    return 2 * m * k * n / seconds / 1e9


def _integer_product(m: int, k: int, n: int, threads: int) -> Callable[[], object]:
    """MatMulInteger on ONNX Runtime, with constant weights."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = random.integers(-127, 128, (k, n), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [m, n])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.array(128, np.uint8), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": random.integers(0, 256, (m, k), dtype=np.uint8)}
    return lambda: session.run(None, feeds)


def measure(threads: int) -> dict[str, float]:
    """All of them, as they stand in a record of `bench/results`."""
    found = {"bandwidth_gb_s": bandwidth_gb_s(threads)}
    return found | {f"{dtype}_gemm_gop_s": gemm_gop_s(dtype, threads) for dtype in ("int8", "bfloat16", "float32")}


def _kernels() -> Any:
    """The compiled kernels; None where they are not."""
    try:
        from lensc.kernels import _cpu
    except ImportError:
        return None
    return _cpu


def _best(work: Callable[[], object]) -> float:
    """The shortest time of some tries, in seconds."""
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the limits as JSON."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.limits", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=probe.machine().cores, help="default: the physical cores")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: expected at least 1")
    print(json.dumps({name: round(value, 1) for name, value in measure(options.threads).items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
