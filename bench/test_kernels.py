"""Our CPU kernels, each held against its reference before it is timed; `lensc.bench.kernels` puts them beside the limits."""

from __future__ import annotations

from typing import Any

import pytest

from lensc.bench.kernel_cases import ALLOWED, Case, Machine, cases
from lensc.bench.kernels import error_of


@pytest.mark.parametrize("case", [*cases()], ids=lambda case: case.what)
def test_kernel(benchmark: Any, machine: Machine, case: Case) -> None:
    ready = case.make(machine)
    ready.run()
    error = error_of(ready)
    assert error <= ALLOWED[ready.arithmetic], f"{case.what} differs from its reference by {error:.2g} of its norm"
    benchmark.group = case.what.split(":")[0]
    benchmark(ready.run)
    benchmark.extra_info[ready.unit] = ready.amount / benchmark.stats.stats.median / 1e9 if benchmark.enabled else None
