"""Each of our CPU kernels beside what the machine could reach: memory read, or products in registers.

    python -m lensc.bench.kernels [--only int4_linear] [--isa avx512] [--threads 2]

A kernel runs at the sizes of Llama-3-8B and SigLIP (`kernel_cases`), and what it computed is compared with its reference; one
that differs has no speed, and the command ends with 1. What streams is given in GB/s, what computes in GOP/s, two operations
for a multiplication with its addition. Its limit is measured right before and after it, as a machine that others use changes
its speed within seconds, and the larger counts: bandwidth by a loop that only reads, in several places at once; products by a
loop that only multiplies. The best of all and the rate of the best engine's product of matrices, which has to fetch them, are
those of the machine in the record.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from lensc.backends.errors import LensError, UnavailableError, UsageError
from lensc.profiles import probe
from lensc.profiles.measure import STREAMS, product_gop_s, read_gb_s

from . import limits, record
from .kernel_cases import ALLOWED, Case, Limit, Machine, Pool, Ready, cases

COMMAND = "python -m lensc.bench.kernels"
POOL_BYTES = 640 << 20
"""Of weights and caches: more than twice the largest cache of today's servers."""
LEAST_RUNS, MOST_RUNS = 5, 50


def machine_of(isa: str | None, threads: int, pool_bytes: int = POOL_BYTES) -> Machine:
    """The kernels for `isa`, by default the best instruction set of this CPU. Raises UnavailableError, UsageError."""
    try:
        from lensc.kernels import _cpu
    except ImportError as error:
        raise UnavailableError(f"the compiled kernels are missing ({error}); install lensc with a compiler") from error
    usable = _cpu.usable_isas()
    if isa is not None and isa not in usable:
        raise UsageError(f"--isa {isa} is not one of {', '.join(usable)}")
    return Machine(_cpu, isa or usable[0], threads, Pool.make(pool_bytes))


def reach(machine: Machine, kind: Limit) -> float | None:
    """What the machine does at best now, in GB/s or GOP/s. None for products that the instruction set lacks, but for
    bfloat16, whose kernels compute in float32 then.
    """
    if kind == "bandwidth":
        data = machine.pool.values.view(np.int64)
        return max(read_gb_s(data, machine.threads, streams) for streams in STREAMS)
    found = product_gop_s(kind, machine.threads, machine.isa)
    return product_gop_s("float32", machine.threads, machine.isa) if found is None and kind == "bfloat16" else found


def error_of(ready: Ready) -> float:
    """The norm of the difference from the reference over the norm of the reference; infinite where there are NaN."""
    found, expected = ready.shown()
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return error if np.isfinite(error) else float("inf")


def speeds(ready: Ready, seconds: float) -> list[float]:
    """In `ready.unit`, of at least 5 runs, and more if there is time."""
    found: list[float] = []
    ends = time.perf_counter() + seconds
    while len(found) < LEAST_RUNS or (len(found) < MOST_RUNS and time.perf_counter() < ends):
        started = time.perf_counter()
        ready.run()
        found.append(ready.amount / (time.perf_counter() - started) / 1e9)
    return found


def measure(case: Case, machine: Machine, seconds: float) -> tuple[record.Row, Limit]:
    """The row of a case, and which limit it has. It has no speed if its error is too large."""
    ready = case.make(machine)
    ready.run()
    error = error_of(ready)
    if error > ALLOWED[ready.arithmetic]:
        print(f"{case.what}: error {error:.2g}, allowed are {ALLOWED[ready.arithmetic]:g}", file=sys.stderr)
        return record.Row(case.what, ready.unit, None, parity="fail"), ready.limit
    before = reach(machine, ready.limit)
    found = speeds(ready, seconds)
    after = reach(machine, ready.limit)
    limit = max(before, after) if before and after else None
    return record.Row(
        case.what, ready.unit, median(found), (min(found), max(found)), limit=limit, parity="pass"
    ), ready.limit


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write the record; 1 if a kernel differs from its reference."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="TEXT", help="cases that have this in their name, which the list shows")
    parser.add_argument("--isa", help="instruction set (default: the best of this CPU)")
    parser.add_argument("--threads", type=int, default=probe.machine().cores, help="default: the physical cores")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each case (default %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the record here (default: do not)")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: expected at least 1")
    chosen = [case for case in cases() if options.only is None or options.only in case.what]
    if not chosen:
        parser.error(f"--only {options.only}: no case has this in its name")
    try:
        machine = machine_of(options.isa, options.threads)
        rows, reached = [], dict[Limit, float]()
        for case in chosen:
            row, kind = measure(case, machine, options.seconds)
            rows.append(row)
            _print(row)
            if row.limit is not None:
                reached[kind] = max(row.limit, reached.get(kind, 0.0))
        stored = _stored(reached, options.threads)
        shown = ", ".join(f"{name} {value:.0f}" for name, value in stored.items())
        print(f"{machine.isa}, {machine.threads} threads; the machine reached {shown}")
        if options.results:
            record.write("native_cpu", _command(options), rows, options.results, stored)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return int(any(row.parity == "fail" for row in rows))


def _command(options: argparse.Namespace) -> str:
    """What reproduces the record: a machine that is measured in part, or with other instructions, has one of its own."""
    parts = [COMMAND]
    parts += [f"--{name} {getattr(options, name)}" for name in ("only", "isa") if getattr(options, name)]
    return " ".join(parts)


def _stored(reached: Mapping[Limit, float], threads: int) -> dict[str, float]:
    """As it stands in the record of a machine, with the rates of the best engines' products."""
    found = {
        f"{kind}_gb_s" if kind == "bandwidth" else f"{kind}_product_gop_s": value for kind, value in reached.items()
    }
    found |= {f"{dtype}_gemm_gop_s": limits.gemm_gop_s(dtype, threads) for dtype in ("int8", "bfloat16")}
    return {name: round(value, 1) for name, value in found.items()}


def _print(row: record.Row) -> None:
    if row.lensc is None or row.spread is None:
        print(f"{row.what:68} differs from the reference", flush=True)
        return
    text = f"{row.what:68} {row.lensc:9.1f} {row.unit} ({row.spread[0]:.1f} to {row.spread[1]:.1f})"
    if row.of_limit is not None:
        text += f"   {row.of_limit:.2f} of {row.limit:.0f}"
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
