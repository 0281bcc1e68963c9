"""What each scheme costs: accuracy on the demo model's three tasks, size, and speed on this machine.

    python -m lensc.bench.schemes [--scheme int4 --scheme …] [--pictures 500] [--target onnxruntime:cpu]

The demo model is built once for every scheme, `f32` first, and reads the same held-out pictures. Losses are in points of
exact match (of character errors for pages) against f32, on the same pictures. Speeds are medians over all pictures; they
say how the schemes compare on a model of 7 million parameters, not how fast a large one is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import lensc
from lensc.backends.errors import LensError
from lensc.export.demo.evaluate import Outcome, evaluate, score
from lensc.export.demo.samples import TASKS, held_out_samples
from lensc.runtime.result import Metrics

from . import record
from .demo_accuracy import GOALS, MAX_NEW_TOKENS, wilson

BASELINE = "f32"


@dataclass(frozen=True)
class Measured:
    """One scheme on all pictures."""

    scheme: str
    outcomes: dict[str, list[Outcome]]
    metrics: tuple[Metrics, ...]
    bundle_bytes: int

    def figure(self, task: str) -> float:
        """Percent of exact answers, or of character errors for the task that is judged by them."""
        result = score(self.outcomes[task])
        return 100 * (result.exact if GOALS[task][0] == "exact match" else result.cer)

    def loss(self, task: str, baseline: Measured) -> float:
        """Points lost against `baseline`; negative if it is better."""
        difference = self.figure(task) - baseline.figure(task)
        return -difference if GOALS[task][0] == "exact match" else difference


def measure(scheme: str, target: str, pictures: int, folder: Path) -> Measured:
    """Build the demo model by `scheme` into `folder`, and ask it all questions."""
    from lensc.backends.base import Target
    from lensc.export.build import build

    bundle = folder / scheme.replace("/", "_")
    manifest = build("demo", [Target.parse(target)], bundle, scheme=scheme)
    metrics: list[Metrics] = []
    with lensc.load(bundle) as vlm:

        def answer(image: Image.Image, question: str) -> str:
            result = vlm.generate(question, [image], max_new_tokens=MAX_NEW_TOKENS)
            metrics.append(result.metrics)
            return result.text

        outcomes = {task: evaluate(held_out_samples(task, pictures), answer) for task in TASKS}
    return Measured(scheme, outcomes, tuple(metrics), sum(file.bytes for file in manifest.files))


def rows_of(measured: Sequence[Measured]) -> list[record.Row]:
    """Six rows per scheme; the first scheme is the one that the others are compared with."""
    rows = []
    for one in measured:
        baseline = None if one is measured[0] else measured[0]
        for task in TASKS:
            exact = GOALS[task][0] == "exact match"
            hits = sum(o.exact for o in one.outcomes[task])
            rows.append(
                record.Row(
                    f"{one.scheme}: {task}",
                    "%" if exact else "% errors",
                    one.figure(task),
                    wilson(hits, len(one.outcomes[task])) if exact else None,
                    rival=baseline.scheme if baseline else None,
                    rival_value=baseline.figure(task) if baseline else None,
                )
            )
        speeds = [m.decode_tokens_per_s for m in one.metrics if m.decode_tokens_per_s]
        firsts = [m.ttft_ms for m in one.metrics]
        rows.append(record.Row(f"{one.scheme}: size", "MB", one.bundle_bytes / 1e6))
        rows.append(record.Row(f"{one.scheme}: decode", "tokens/s", statistics.median(speeds)))
        rows.append(record.Row(f"{one.scheme}: first token", "ms", statistics.median(firsts)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record."""
    from lensc.export.quantize.recipe import PRESETS

    parser = argparse.ArgumentParser(prog="python -m lensc.bench.schemes", description=__doc__.split("\n")[0])
    parser.add_argument("--scheme", action="append", default=[], help="default: every scheme with a name")
    parser.add_argument("--target", default="onnxruntime:cpu", help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=500, help="held-out pictures per task (default 500)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the record here (default: do not)")
    options = parser.parse_args(arguments)
    if options.pictures < 1:
        parser.error(f"--pictures {options.pictures}: expected at least 1")
    names = dict.fromkeys([BASELINE, *(options.scheme or PRESETS)])
    measured: list[Measured] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                measured.append(measure(name, options.target, options.pictures, Path(folder)))
                _print(measured[-1], measured[0])
        if options.results:
            command = f"python -m lensc.bench.schemes --target {options.target}"
            path = record.write("demo_accuracy", command, rows_of(measured), options.results)
            print(f"written to {path}", file=sys.stderr)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _print(one: Measured, baseline: Measured) -> None:
    if one is baseline:
        print(f"{'scheme':14} " + " ".join(f"{task + ' ' + GOALS[task][0]:>34}" for task in TASKS), end="")
        print(f" {'size':>9} {'decode':>12} {'first token':>12}")
    cells = []
    for task in TASKS:
        loss = "" if one is baseline else f" (loses {one.loss(task, baseline):+.1f})"
        cells.append(f"{one.figure(task):.1f} %{loss}")
    speed = statistics.median(m.decode_tokens_per_s for m in one.metrics if m.decode_tokens_per_s)
    first = statistics.median(m.ttft_ms for m in one.metrics)
    print(f"{one.scheme:14} " + " ".join(f"{cell:>34}" for cell in cells), end="")
    print(f" {one.bundle_bytes / 1e6:6.2f} MB {speed:6.0f} tok/s {first:9.1f} ms", flush=True)


if __name__ == "__main__":
    sys.exit(main())
