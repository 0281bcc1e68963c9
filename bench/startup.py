"""How long `import lensc` and `lensc --help` take, each in fresh processes.

    python -m lensc.bench.startup [--runs N] [--results FOLDER]

The import is timed inside the process; `--help` is the whole process, interpreter included, whose own share is
measured in turn. Bytecode is compiled before. Exit code 1 if a median is over its limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lensc.backends.errors import ExecutionError, LensError

from . import record

IMPORT = "import time; start = time.perf_counter(); import lensc; print(time.perf_counter() - start)"
IMPORT_LIMIT_S = 0.2
HELP_LIMIT_S = 0.3
WARM_UP = 2


def measure(runs: int) -> list[record.Row]:
    """Run each case `runs` times, interleaved, and return the medians in seconds."""
    cases: dict[str, tuple[Callable[[], float], float | None]] = {
        "interpreter start": (lambda: _process("-c", "pass"), None),
        "import lensc": (_import, IMPORT_LIMIT_S),
        "lensc --help": (lambda: _process("-m", "lensc", "--help"), HELP_LIMIT_S),
    }
    times: dict[str, list[float]] = {what: [] for what in cases}
    for run in range(WARM_UP + runs):
        for what, (case, _) in cases.items():
            seconds = case()
            if run >= WARM_UP:
                times[what].append(seconds)
    return [
        record.Row(what, "s", statistics.median(times[what]), (min(times[what]), max(times[what])), limit=limit)
        for what, (_, limit) in cases.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the record; 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.startup", description="Time import and --help.")
    parser.add_argument("--runs", type=int, default=15, help="processes per case (default: 15)")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: expected at least 1")
    try:
        rows = measure(options.runs)
        path = record.write("runtime", "python -m lensc.bench.startup", rows, options.results)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for row in rows:
        low, high = row.spread or (0.0, 0.0)
        limit = f"limit {1000 * row.limit:.0f}" if row.limit else ""
        print(f"{row.what:20} {1000 * (row.lensc or 0):6.1f} ms   {1000 * low:.1f} to {1000 * high:.1f}   {limit}")
    print(f"written to {path}", file=sys.stderr)
    return int(any(row.of_limit is not None and row.of_limit < 1 for row in rows))


def _run(*arguments: str) -> str:
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, *arguments], check=False, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExecutionError(f"python {' '.join(arguments)} ended with {done.returncode}: {reason}")
    return done.stdout


def _process(*arguments: str) -> float:
    start = time.perf_counter()
    _run(*arguments)
    return time.perf_counter() - start


def _import() -> float:
    return float(_run("-c", IMPORT))


if __name__ == "__main__":
    sys.exit(main())
