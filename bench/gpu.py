"""The backend `cuda` at full size with random weights: first whether it is right, then how fast it is.

    python -m lensc.bench.gpu [--out gpu.json] [--sections kernels vision decoder-int4] [--quick]

Needs a GPU, torch and Triton, and neither a checkpoint nor a network: programs and weights are made where they are used
(`gpu_program`). What the machine reaches is measured, then a model of few layers in full width is compared with plain torch
in float32 (`gpu_parity`); what differs has no speed. Sections:

    kernels            each kernel beside torch's (gpu_kernels)
    vision             1 and 10 slices beside plain torch
    decoder-bfloat16   prefill, decode and memory beside plain torch in bfloat16 (gpu_torch)
    decoder-int4       the same with weights in 4 bits, beside the same
    whole              a picture of 1344 x 1344 in memory to the first token, and its parts
    compiled-decoder   what torch.compile makes of plain torch, beside our figures of the sections before
    compiled-vision

Each section is a process of its own with a limit of time, and is written to `--out` as soon as it ends, with the errors
that it had. The command ends with 1 if a check failed or a section had an error. `--device cpu --tiny` runs the checks alone,
on a tiny model in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lensc.backends.errors import LensError, StorageError, UnavailableError

from . import gpu_sections, record
from .gpu_sections import CHECKS, LIMITS, SECTIONS, Emit, Json, State

COMMAND = "python -m lensc.bench.gpu"
BUDGET_S = 460.0
"""For all sections together: what does not fit is left out, with an error that says so."""
LEAST_S = 20.0
LAST_LINES = 30
"""Of what a process that failed wrote to stderr."""
REPEAT, QUICK_REPEAT = 9, 5


@dataclass
class Found:
    """What a section sent."""

    rows: list[Json] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    machine: Json = field(default_factory=dict)
    reach: dict[str, float] = field(default_factory=dict)
    passed: dict[str, bool] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, found: Json) -> None:
        """Take what a section sent, and print it."""
        for key, value in found.items():
            if key == "row":
                self.rows.append(value)
                print(_shown(value), flush=True)
            elif key == "error":
                self.errors.append(value)
                print(f"error: {value}", flush=True)
            else:
                getattr(self, key).update(value)
                if key in ("machine", "reach"):
                    print(", ".join(f"{name} {_short(part)}" for name, part in value.items()), flush=True)


def _short(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _shown(row: Json) -> str:
    if "lensc" not in row:
        return f"{row['what']:56} {row['parity']}"
    text = f"{row['what']:56} {row['lensc']:9.4g} {row['unit']}"
    if "spread" in row:
        text += " ({:.4g} to {:.4g})".format(*row["spread"])
    if "rival_value" in row:
        text += f"   {row.get('ratio', 0):.2f}x of {row['rival']}: {row['rival_value']:.4g}"
    if "of_limit" in row:
        text += f"   {100 * row['of_limit']:.0f} % of the limit {row['limit']:.4g}"
    return text


def in_process(state: State, seconds: float, emit: Emit) -> None:
    """Run a section in a process of its own, which is ended with all that it started after `seconds`."""
    command = [sys.executable, "-P", "-m", "lensc.bench.gpu_sections"]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            process.stdin.write(gpu_sections.told(state))
            process.stdin.close()
            for line in process.stdout:
                # what libraries print goes the same way
                if line.startswith("{"):
                    emit(json.loads(line))
                else:
                    print(line, end="", flush=True)
            status = process.wait()
        finally:
            timer.cancel()
        said.seek(0)
        last = said.read().strip().split("\n")[-LAST_LINES:]
    if late.is_set():
        emit({"error": f"{state.section}: ended after {seconds:.0f} s"})
    elif status:
        print("\n".join(last), file=sys.stderr, flush=True)
        emit({"error": f"{state.section}: its process ended with status {status}: {last[-1]}"})


def section(state: State, seconds: float) -> Found:
    """Run a section and return what it found. On the CPU it is run here: there is nothing to lose."""
    found = Found()
    started = time.monotonic()
    print(f"\n{state.section}", flush=True)
    if seconds < LEAST_S:
        found.add({"error": f"{state.section}: left out, {BUDGET_S:.0f} s are over"})
    elif state.device == "cpu":
        gpu_sections.run(state, found.add)
    else:
        in_process(state, seconds, found.add)
    found.seconds = time.monotonic() - started
    return found


def check_device(device: str) -> None:
    """Raises UnavailableError where sections cannot run."""
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(f"{' and '.join(missing)} not installed; pip install 'lensc[cuda]'")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            f"torch {torch.__version__} finds no CUDA GPU here; run this on a machine with one, or the checks alone "
            "with --device cpu --tiny"
        )


def measure(state: State, chosen: Sequence[str], out: Path | None, budget: float) -> bool:
    """Run limits, checks and the `chosen` sections; whether nothing failed."""
    ends = time.monotonic() + budget
    machine: Json = {}
    failed = False
    parity = Found()

    def store(name: str, found: Found) -> None:
        if out is not None:
            extra = {"seconds": round(found.seconds, 1), "errors": found.errors}
            command = COMMAND if name == LIMITS else f"{COMMAND} --sections {name}"
            record.put(out, record.entry("gpu", command, found.rows, machine | state.reach) | extra)

    if state.device != "cpu":
        found = section(replace(state, section=LIMITS), gpu_sections.LIMITS_SECONDS)
        machine, state.reach, failed = found.machine, found.reach, bool(found.errors)
        store(LIMITS, found)
    needed = {check for name in chosen for check in SECTIONS[name].needs} if chosen != ["parity"] else set(CHECKS)
    if state.tiny or set(chosen) == set(SECTIONS):
        needed = set(CHECKS)
    for check in (check for check in CHECKS if check in needed):
        found = section(replace(state, section=check), min(gpu_sections.CHECK_SECONDS, ends - time.monotonic()))
        # a section that did not reach its end has not passed
        state.passed[check] = found.passed.get(check, False) and not found.errors
        failed = failed or not state.passed[check]
        parity.rows += found.rows
        parity.errors += found.errors
        parity.seconds += found.seconds
        store("parity", parity)
    for name in (name for name in chosen if name in SECTIONS):
        found = section(replace(state, section=name), min(SECTIONS[name].seconds, ends - time.monotonic()))
        state.measured |= found.measured
        failed = failed or bool(found.errors) or any(row["parity"] == "fail" for row in found.rows)
        store(name, found)
    return not failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print; write the records; 1 if a check failed or a section had an error."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the records here (default: do not)")
    names = ["parity", *SECTIONS]
    parser.add_argument("--sections", nargs="+", metavar="SECTION", help=f"{', '.join(names)} (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REPEAT} runs of each, no torch.compile")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="the checks alone, on a tiny model")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="default: %(default)g")
    options = parser.parse_args(arguments)
    chosen = list(options.sections or ["parity"] if options.tiny else options.sections or SECTIONS)
    unknown = [name for name in chosen if name not in names]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(names)}")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu: Triton's interpreter takes days for the model; add --tiny")
    if options.quick:
        chosen = [name for name in chosen if not name.startswith("compiled-")]
    repeat = QUICK_REPEAT if options.quick else REPEAT
    try:
        check_device(options.device)
        if options.out is not None and not options.out.parent.is_dir():
            raise StorageError(f"{options.out.parent} is not a folder")
        state = State("", options.device, options.tiny, repeat)
        return 0 if measure(state, chosen, options.out, options.budget) else 1
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
