"""What the machine at hand reaches at best, measured: nothing that runs on it can be faster.

python -m lensc.bench.limits [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from lensc.profiles import probe
from lensc.profiles.measure import bandwidth_gb_s, best_s

GEMM = (2048, 4096, 4096)
"""Rows, inputs, outputs: a prefill's product in Llama-3-8B."""

FEW_ROWS, SLOW_S = 64, 0.25
"""What takes longer for so many rows has no fast product on this processor (torch in bfloat16 and int8 without AVX-512), and
would take minutes for all: the few say enough."""


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
            engine = _integer_product(m, k, n, threads)
            found = max(_rows_s(lambda rows: torch._int_mm(a[:rows], b)), _rows_s(engine))
        else:
            kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
            x, y = torch.randn(m, k).to(kind), torch.randn(k, n).to(kind)
            found = _rows_s(lambda rows: x[:rows] @ y)
    finally:
        torch.set_num_threads(before)
    return 2 * k * n * found / 1e9


def _rows_s(product: Callable[[int], object]) -> float:
    """Rows a second of a product of any number of rows."""
    started = time.perf_counter()
    product(FEW_ROWS)
    took = time.perf_counter() - started
    return FEW_ROWS / took if took > SLOW_S else GEMM[0] / best_s(lambda: product(GEMM[0]))


def _integer_product(m: int, k: int, n: int, threads: int) -> Callable[[int], object]:
    """MatMulInteger of some of `m` rows on ONNX Runtime, with constant weights."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = random.integers(-127, 128, (k, n), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", k])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["rows", n])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.array(128, np.uint8), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = random.integers(0, 256, (m, k), dtype=np.uint8)
    return lambda rows: session.run(None, {"x": x[:rows]})


def measure(threads: int) -> dict[str, float]:
    """All of them, as they stand in a record of `bench/results`."""
    found = {"bandwidth_gb_s": bandwidth_gb_s(threads)}
    return found | {f"{dtype}_gemm_gop_s": gemm_gop_s(dtype, threads) for dtype in ("int8", "bfloat16", "float32")}


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
