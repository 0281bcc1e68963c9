"""The ladder: what each step from plain torch to this machine's own kernels is worth, at full size.

    python -m lensc.bench.ladder [--folder build/full] [--image 896x448] [--repeat 3] [--budget 3min]

The steps are those by which the paper brought the model to a phone, in its order, each on top of the one before. Every run of a
step is a process of its own, and all steps have run once before any runs again. A run loads the bundle, answers a short
question so that engines have prepared, and is then asked about a picture that it has never seen. Ours has passed its golden
probes when it is asked, or the benchmark ends.

Float32 takes 34 GB, which machines of this kind do not have: what four of the 32 layers take is measured as the difference
between a decoder of five and one of one, and counted as often as there are others. The step to the NPU is what `lensc plan` expects of a phone's: an estimate.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lensc import bench_run, measured, planning
from lensc.backends.bundle import load_manifest
from lensc.contender import Contender, end_with_us
from lensc.profiles import profile
from lensc.runtime.roofline import Request, predict

from . import full_size, record, turns
from .ladder_torch import LAYERS, whole

COMMAND = "python -m lensc.bench.ladder"
FLOAT_VISION, INTEGERS = ("float-vision", "int4-decoder"), ("native", "int4")
"""Bundles by folder and scheme."""
TARGETS = {"float-vision": ("onnxruntime:cpu", "native:cpu"), "native": ("native:cpu",)}
COMPILED = "vision=onnxruntime:cpu,decoder=native:cpu"
"""Our kernels are made for integers: a tower in float32 stays where it is faster."""
DEVICES = {"float-vision": COMPILED, "native": "native:cpu"}
"""What settings are searched for."""
MEMORY_BYTES = 11 << 29
"""5.5 GiB, what a phone of 8 GB leaves to an app: a tower in float32 has no room in it beside the decoder."""
PROMPT_TOKENS, NEW_TOKENS, GUESSES = 32, 32, 7
PHONE = "sm8650"

FIGURES = {"image": "s", "first token": "s", "decode": "tokens/s", "memory": "GB"}
"""What is measured of each step, and in what unit."""


@dataclass(frozen=True)
class Step:
    """A bundle on a device. `again`: what is measured is the next question about the same picture."""

    name: str
    bundle: str
    device: str
    limited: bool = True
    tuned: bool = False
    again: bool = False


PLAIN = "torch, float32"
STEPS = (
    Step("4-bit weights, ONNX Runtime", "float-vision", "onnxruntime:cpu", limited=False),
    Step("one graph in memory at a time", "float-vision", "onnxruntime:cpu"),
    Step("compiled for this CPU", "float-vision", COMPILED),
    Step("configuration search", "float-vision", COMPILED, tuned=True),
    Step("int8 vision", "native", "native:cpu", tuned=True),
    Step("caches and guessed tokens, next question", "native", "native:cpu", tuned=True, again=True),
)
ON_A_PHONE = f"NPU of {PHONE}, estimated"


def prepare(place: full_size.Place, budget: str) -> None:
    """Make what is not there yet, and search settings. Raises ExecutionError if a step fails."""
    full_size.prepare_checkpoint(place)
    for name, scheme in (FLOAT_VISION, INTEGERS):
        folder = place.folder / name
        lensc = [sys.executable, "-P", "-m", "lensc"]
        if not folder.is_dir():
            command = [*lensc, "build", str(place.checkpoint), "--scheme", scheme, "-o", str(folder)]
            for target in TARGETS[name]:
                command += ["--target", target]
            full_size.run([*command, "--max-memory", full_size.MAX_MEMORY])
        # others use this machine more often than not; what is found is of this benchmark alone
        tune = [*lensc, "tune", str(folder), "--device", DEVICES[name], "--budget", budget, "--busy"]
        full_size.run(tune, _environment(place))


def _environment(place: full_size.Place) -> dict[str, str]:
    """Settings that are found stay in the benchmark's folder, and the user's own are not used."""
    return dict(os.environ) | {"XDG_DATA_HOME": str(place.folder / "tuned")}


def run(step: Step, place: full_size.Place, picture: str) -> dict[str, float]:
    """One run of a step, by figure."""
    limit = MEMORY_BYTES if step.limited else None
    threads = None if step.tuned else place.threads
    starting = measured.start(
        step.name, place.folder / step.bundle, step.device, threads, step.tuned, limit, _environment(place)
    )
    with starting as contender:
        side = load_manifest(place.folder / step.bundle).model.picture.scale_resolution
        ask(contender, f"{side}x{side}", 8, 2)
        answer = ask(contender, picture, PROMPT_TOKENS, NEW_TOKENS)
        if step.again:
            # one token more, and none of them is the same
            answer = ask(contender, picture, PROMPT_TOKENS + 1, NEW_TOKENS, GUESSES, "everything")
        return figures_of(answer, contender.ready["peak_bytes"])


def ask(
    contender: Contender, picture: str, prompt: int, new: int, guesses: int = 0, keep: str = "nothing"
) -> dict[str, Any]:
    """What a process of `lensc.measured` answers."""
    asked = {"picture": picture, "prompt_tokens": prompt, "new_tokens": new, "prompt_lookup_num_tokens": guesses}
    return contender.ask(json.dumps(asked | {"keep": keep}))


def figures_of(answer: Mapping[str, Any], loading_bytes: int) -> dict[str, float]:
    """By name, in the units of FIGURES."""
    metrics = answer["metrics"]
    return {
        "image": sum(metrics["image_ms"]) / 1e3,
        "first token": metrics["ttft_ms"] / 1e3,
        "decode": metrics["decode_tokens_per_s"],
        "memory": max(answer["peak_bytes"], loading_bytes) / 1e9,
    }


def run_torch(place: full_size.Place, picture: str) -> dict[str, float]:
    """A run of the model in float32 as it would be with all layers: of two sizes that are small enough."""
    found = {}
    tokens = 0
    for layers in sorted(LAYERS, reverse=True):
        command = [sys.executable, "-P", "-m", "lensc.bench.ladder_torch", str(place.checkpoint)]
        command += ["--layers", str(layers), "--threads", str(place.threads)]
        with Contender(f"torch of {layers} layers", command, place.folder) as contender:
            ask(contender, measured.NO_PICTURE, 8, 2)
            answer = (
                ask(contender, measured.NO_PICTURE, tokens, NEW_TOKENS)
                if tokens  # the tower is measured once
                else ask(contender, picture, PROMPT_TOKENS, NEW_TOKENS)
            )
            tokens = answer["metrics"]["prompt_tokens"]
            ready = contender.ready
            found[layers] = figures_of(answer, ready["peak_bytes"])
    return whole(found, ready["layer_bytes"], ready["num_layers"])


def expected_image_s(place: full_size.Place, picture: str) -> float | None:
    """What `lensc plan` expects of the phone's NPU for all slices of the picture."""
    manifest = load_manifest(place.folder / INTEGERS[0])
    plan = bench_run.cut(picture, manifest)
    assert plan is not None
    patches = plan.patches(manifest.model.picture.patch_size)
    model, (stored,), _, _ = planning.model_of(planning.OFFICIAL, [INTEGERS[1]])
    (npu,) = (p for p in profile.get(PHONE).processors if p.kind == "npu")
    found = predict(model, stored, npu, Request(patches, PROMPT_TOKENS, 2048)).image_ms
    return None if found is None else found / 1e3


def rows_of(runs: Mapping[str, Sequence[Mapping[str, float]]], expected_s: float | None) -> list[record.Row]:
    """A row for each figure of each step, beside the step before it."""
    rows = []
    before: str | None = None
    for step, of in runs.items():
        for figure, unit in FIGURES.items():
            values = [run[figure] for run in of]
            what = f"{step}: {figure}"
            if before is None or not all(values):
                rows.append(record.Row(what, unit, median(values), (min(values), max(values)), parity="pass"))
            else:
                rows.append(turns.compared(what, unit, values, [run[figure] for run in runs[before]], before))
        before = step
    if expected_s is not None:
        rows.append(record.Row(f"{ON_A_PHONE}: image", FIGURES["image"], expected_s))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the steps, print them, write the record."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/full"), help="default: %(default)s")
    parser.add_argument("--image", default="896x448", help="WIDTHxHEIGHT of the picture (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each step (default 3)")
    parser.add_argument("--threads", type=int, default=full_size.THREADS, help="default: the physical cores")
    parser.add_argument("--budget", default="3min", help="of the search for settings (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the record here (default: do not)")
    options = parser.parse_args(arguments)
    for name in ("repeat", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    if measured.size_of(options.image) is None:
        parser.error(f"--image {options.image}: expected WIDTHxHEIGHT, e.g. 1344x1344")
    place = full_size.Place(options.folder.resolve(), options.threads, options.repeat)
    end_with_us()
    with turns.told_errors():
        prepare(place, options.budget)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in (PLAIN, *(step.name for step in STEPS))}
        for number in range(place.repeat):
            runs[PLAIN].append(run_torch(place, options.image))
            _say(number, PLAIN, runs[PLAIN][-1])
            for step in STEPS:
                runs[step.name].append(run(step, place, options.image))
                _say(number, step.name, runs[step.name][-1])
        rows = rows_of(runs, expected_image_s(place, options.image))
        turns.show("ladder", rows, {})
        if options.results:
            record.write("ladder", f"{COMMAND} --image {options.image}", rows, options.results)
    return 0


def _say(number: int, name: str, found: Mapping[str, float]) -> None:
    shown = ", ".join(f"{figure} {value:.4g} {FIGURES[figure]}" for figure, value in found.items())
    print(f"run {number + 1}, {name}: {shown}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
