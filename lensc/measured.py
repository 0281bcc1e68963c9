"""A bundle in a process of its own, which is asked to do work: what `lensc bench` and `lensc compare` measure.

Its own process has its own memory, and an engine that crashes takes nobody else with it. `start` is the parent's end; the
child speaks the protocol of `lensc.contender`, a line of JSON for each of JSON: `run` does a `Work` and answers with the
`Metrics` of it, `answer` asks a question about a picture. The process is ready when the golden probes of its graphs have
passed; without that there is nothing to measure.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensc.backends import registry
from lensc.backends.errors import LensError, UnavailableError, UnsupportedError
from lensc.export import memory

from .contender import Contender

if TYPE_CHECKING:
    from lensc.runtime.picture import PictureSource
    from lensc.runtime.pipeline import VLM
    from lensc.runtime.plan import Plan

NO_PICTURE = "none"
"""What stands for the picture of a request without one."""


def start(
    name: str,
    bundle: Path,
    device: str | None,
    threads: int | None,
    tuned: bool = True,
    max_memory_bytes: int | None = None,
    environment: dict[str, str] | None = None,
) -> Contender:
    """A process that holds `bundle` on `device`. `ready` of it: where each graph is (`plan`), and `peak_bytes` until then.

    Raises what `lensc.load` does, ExecutionError if the process ends instead.
    """
    asked = {"bundle": str(bundle), "device": device, "threads": threads, "tuned": tuned}
    command = [sys.executable, "-P", "-m", "lensc.measured", json.dumps(asked | {"max_memory_bytes": max_memory_bytes})]
    return Contender(name, command, environment=environment)


def picture_of(text: str) -> PictureSource | None:
    """The picture that `text` names: a file, WIDTHxHEIGHT for noise of that size (always the same), or none."""
    import numpy as np
    from PIL import Image

    size = size_of(text)
    if size is None:
        return None if text == NO_PICTURE else text
    width, height = size
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def size_of(text: str) -> tuple[int, int] | None:
    """The width and height that `text` says; None if it says none."""
    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text, re.ASCII)
    return None if match is None else (int(match[1]), int(match[2]))


def states(plan: Plan) -> dict[str, str]:
    """By graph: `runs here`, `emulated` or `untested`."""
    found = {}
    for placement in plan.placements:
        target = placement.effective
        probes = {probe.processor: probe.state for probe in registry.get(target.backend).probe()}
        found[placement.graph] = probes.get(target.processor, "untested")
    return found


def serve(
    bundle: str, device: str | None, threads: int | None, tuned: bool, max_memory_bytes: int | None = None
) -> None:
    """Load the bundle, say so, and answer the lines of stdin."""
    import time

    from lensc.runtime.load import load

    started = time.perf_counter()
    # nothing takes the place of what fails: it would be measured in its name
    opened = load(
        bundle,
        device,
        threads=threads,
        selftest="error",
        on_failure="error",
        tuned=tuned,
        max_memory_bytes=max_memory_bytes,
    )
    with opened as vlm:
        plan = vlm.plan
        assert plan is not None
        _check_requested(plan)
        state = states(plan)
        placed = [
            {
                "graph": p.graph,
                "target": str(p.effective),
                "scheme": p.artifact.scheme,
                "state": state[p.graph],
                "reason": p.reason,
            }
            for p in plan.placements
        ]
        answer_lines(vlm, {"load_seconds": time.perf_counter() - started, "plan": placed})


def answer_lines(vlm: VLM, ready: Mapping[str, Any]) -> None:
    """Say that `vlm` is `ready`, and answer the lines of stdin."""
    _say({**ready, "peak_bytes": _peak_bytes()})
    pictures: dict[str, PictureSource | None] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        name = asked["picture"]
        if name not in pictures:
            pictures = {name: picture_of(name)}
        memory.reset_peak()
        answer = _answer if "question" in asked else _run
        _say(answer(vlm, asked, pictures[name]) | {"peak_bytes": _peak_bytes()})


def _check_requested(plan: Plan) -> None:
    """What is measured is what was asked for. Raises UnsupportedError."""
    for placement in plan.placements:
        asked, target = placement.requested, placement.effective
        if asked is not None and (asked.backend, asked.processor) != (target.backend, target.processor):
            raise UnsupportedError(f"{placement.graph}: asked for {asked}, it runs on {target}: {placement.reason}")


def _run(vlm: VLM, asked: Mapping[str, Any], picture: PictureSource | None) -> dict[str, Any]:
    from lensc.runtime.measure import Work, run

    work = Work(asked["prompt_tokens"], asked["new_tokens"], picture, asked["prompt_lookup_num_tokens"])
    return {"metrics": dataclasses.asdict(run(vlm, work, asked["keep"]))}


def _answer(vlm: VLM, asked: Mapping[str, Any], picture: PictureSource | None) -> dict[str, Any]:
    vlm.forget(pictures=True)
    pictures = [] if picture is None else [picture]
    result = vlm.generate(asked["question"], pictures, max_new_tokens=asked["max_new_tokens"])
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "metrics": dataclasses.asdict(result.metrics),
    }


def _peak_bytes() -> int | None:
    try:
        return memory.peak_bytes()
    except UnavailableError:
        return None


def say_error(error: LensError) -> None:
    """Tell the parent what it is to raise."""
    _say({"error": {"type": type(error).__name__, "message": str(error)}})


def _say(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _end_with_parent() -> None:
    """A stopped process does not see the end of its input: where the system can, it is killed when its parent ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> int:
    """Serve what the first argument says, as JSON, until the end of stdin. An error is told on stdout."""
    _end_with_parent()
    try:
        serve(**json.loads(sys.argv[1]))
    except LensError as error:
        say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
