"""One section of `lensc.bench.gpu`, in a process of its own: its state comes as JSON on stdin, what it finds goes to stdout.

A kernel that reads outside its memory ends all work of its process on the GPU, and one that waits for ever its section: so
no section can take another one's results with it. Each line of stdout is a JSON object with one of the keys of `Found`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from lensc.backends.errors import LensError

from . import record

Json = dict[str, Any]
Emit = Callable[[Json], None]


@dataclass
class State:
    """What a section is told: how to run, and what the sections before it found."""

    section: str
    device: str = "cuda"
    tiny: bool = False
    repeat: int = 9
    reach: dict[str, float] = field(default_factory=dict)
    passed: dict[str, bool] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)


CHECKS = (
    "decoder float32", "decoder bfloat16", "decoder int4 in float32", "decoder int4", "vision float32", "vision bfloat16",
)  # fmt: skip
"""Of `gpu_parity`."""
LIMITS = "limits"


@dataclass(frozen=True)
class Section:
    """`needs` are the checks without which it measures nothing; it is ended after `seconds`."""

    needs: tuple[str, ...]
    seconds: float


SECTIONS = {
    "kernels": Section((), 150),
    "vision": Section(("vision bfloat16",), 60),
    "decoder-bfloat16": Section(("decoder bfloat16",), 90),
    "decoder-int4": Section(("decoder int4",), 90),
    "whole": Section(("decoder bfloat16", "decoder int4", "vision bfloat16"), 90),
    "compiled-decoder": Section((), 150),
    "compiled-vision": Section((), 90),
}
CHECK_SECONDS, LIMITS_SECONDS = 60.0, 60.0


def failures() -> tuple[type[Exception], ...]:
    """What a kernel that is wrong, or that this machine has no room for, may raise: torch's errors are RuntimeErrors."""
    import triton

    ours = (LensError, RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError)
    return (*ours, triton.TritonError)


def interpret() -> None:
    """Let Triton compute on the CPU, if nobody has imported it yet."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        # triton 3.6 takes bounds of loops by int(array of one), which numpy 2.4 refuses
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def run(state: State, emit: Emit) -> None:
    """Run a section, which may end with an error: what it found before is kept."""
    if state.device == "cpu":
        interpret()
    import torch

    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            _run(state, emit)
    except failures() as error:
        emit({"error": _said(error)})


def _said(error: Exception) -> str:
    """The error, and where in our code it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "lensc" in frame.filename]
    at = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{at}: {' '.join(str(error).split())[:600]}"


def _run(state: State, emit: Emit) -> None:
    if state.section in CHECKS:
        _check(state, emit)
    elif state.section == LIMITS:
        from . import gpu_clock

        emit({"machine": gpu_clock.machine()})
        emit({"reach": gpu_clock.reach()})
    elif state.section == "kernels":
        _kernels(state, emit)
    else:
        _model(state, emit)


def _check(state: State, emit: Emit) -> None:
    import torch

    from . import gpu_parity, gpu_program

    config, sizes = (gpu_program.TINY, gpu_parity.SMALL) if state.tiny else (gpu_program.FULL, gpu_parity.LARGE)
    check, precision = next((check, how) for name, check, how in gpu_parity.CHECKS if name == state.section)
    passed = True
    for finding in check(config, torch.device(state.device), sizes, precision):
        passed = passed and finding.passed
        db = max(finding.db, -999.0)  # JSON has no infinity
        if finding.passed:
            emit({"row": record.Row(finding.what, "dB", db, parity="pass").to_json()})
        else:
            emit({"row": record.Row(finding.what, "dB", None, parity="fail").to_json()})
            emit({"error": f"{finding.what}: {db:.1f} dB, expected at least {finding.least:.0f}"})
    emit({"passed": {state.section: passed}})


def _kernels(state: State, emit: Emit) -> None:
    import torch

    from . import gpu_kernels

    for case in gpu_kernels.cases():
        try:
            emit({"row": gpu_kernels.measure(case, state.repeat, state.reach).to_json()})
        except failures() as error:
            emit({"error": f"{case.what}: {_said(error)}"})
        torch.cuda.empty_cache()


def _model(state: State, emit: Emit) -> None:
    from . import gpu_model
    from .gpu_program import FULL

    bench = gpu_model.Bench(FULL, state.repeat, state.reach, state.passed, state.measured)
    if state.section.startswith("compiled-"):
        what = state.section.removeprefix("compiled-")
        for name, values in gpu_model.compiled("vision" if what == "vision" else "decoder", FULL, state.repeat):
            for row in gpu_model.beside_compiled(bench, name, values):
                emit({"row": row.to_json()})
        return
    rows: dict[str, list[Callable[[], Iterator[record.Row]]]] = {
        "vision": [partial(gpu_model.vision, bench)],
        "decoder-bfloat16": [partial(gpu_model.decoder, bench, "f32")],
        "decoder-int4": [partial(gpu_model.decoder, bench, "uint4")],
        "whole": [partial(gpu_model.whole, bench, "f32"), partial(gpu_model.whole, bench, "uint4")],
    }
    for part in rows[state.section]:
        try:
            for row in part():
                emit({"row": row.to_json()})
        except failures() as error:
            emit({"error": _said(error)})
    emit({"measured": bench.measured})


def told(state: State) -> str:
    """The state as the process of a section reads it."""
    return json.dumps(asdict(state))


def main() -> int:
    """Run the section that stdin tells of."""
    given: Mapping[str, Any] = json.load(sys.stdin)
    run(State(**given), lambda found: print(json.dumps(found), flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
