"""How long work on a GPU takes, and what the GPU reaches at best."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# torch's are untyped
_EVENT: Any = torch.cuda.Event
_STREAM: Any = torch.cuda.Stream

Work = Callable[[], object]
Times = dict[str, list[float]]
"""Milliseconds by who was measured."""

COPY_BYTES = 2 << 30
"""40 times the largest second-level cache."""
MATMUL = 8192


def on_device(work: Work) -> float:
    """Milliseconds between two events around what `work` puts into the stream: device time, with the gaps in it."""
    start, end = (_EVENT(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def at_the_caller(work: Work) -> float:
    """Milliseconds until `work` returns and the device has nothing left to do."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def in_turn(works: Mapping[str, Work], repeat: int, clock: Callable[[Work], float] = on_device, warm: int = 2) -> Times:
    """Each `repeat` times in turn, after `warm` runs of each that are not counted."""
    for work in works.values():
        for _ in range(warm):
            work()
    took: Times = {who: [] for who in works}
    for _ in range(repeat):
        for who, work in works.items():
            took[who].append(clock(work))
    return took


def graphed(calls: Sequence[Work]) -> Work:
    """All calls behind each other as one CUDA graph: short kernels are measured without the time to launch them."""
    side = _STREAM()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in [*calls[:2], calls[0]]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def reach(repeat: int = 7) -> dict[str, float]:
    """Copies and reads in GB/s (a copy counts what it reads and what it writes), products in bfloat16 in TOPS."""
    source = torch.ones(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def products() -> None:
        for _ in range(8):
            torch.mm(a, b, out=out)

    works: dict[str, Work] = {
        "copy": lambda: target.copy_(source),
        "sum": lambda: source.sum(),
        "largest": lambda: source.amax(),
        "products": products,
    }
    took = {who: min(times) for who, times in in_turn(works, repeat).items()}
    return {
        "copy_gb_s": 2 * COPY_BYTES / took["copy"] / 1e6,
        "read_gb_s": COPY_BYTES / min(took["sum"], took["largest"]) / 1e6,
        "bfloat16_tops": 8 * 2 * MATMUL**3 / took["products"] / 1e9,
    }


def machine() -> dict[str, str | float]:
    """The GPU and its driver."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        said = "unknown"
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "driver, largest clock, power limit": said,
        "cuda": str(torch.version.cuda),
    }


def sqnr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to noise in decibels; minus infinity where anything is no number or has another shape."""
    if found.shape != expected.shape:
        return -math.inf
    truth = expected.double()
    noise = float((found.double() - truth).square().sum())
    signal = float(truth.square().sum())
    if not (math.isfinite(noise) and math.isfinite(signal) and signal > 0):
        return -math.inf
    return 10 * math.log10(signal / max(noise, signal * 1e-30))
