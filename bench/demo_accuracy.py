"""How well a demo bundle reads held-out pictures, and whether it answers as the reference model does.

    python -m lensc.bench.demo_accuracy build/demo-bundle [--pictures 500] [--agreement 200] [--results FOLDER]

Three tasks of `--pictures` held-out pictures each (`lensc.export.demo.samples`), answered greedily. Then `--agreement`
pictures, spread over the tasks, are answered by the torch reference model too, and all token ids are compared. Exit
code 1 if a token differs. The record goes to bench/results/demo_accuracy.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

import lensc
from lensc.backends.errors import LensError
from lensc.compare_text import wilson
from lensc.export.demo.evaluate import Outcome, evaluate, score
from lensc.export.demo.samples import TASKS, Sample, held_out_samples
from lensc.runtime.pipeline import VLM

from . import record
from .reference import reference_vlm

GOALS = {"line": ("exact match", 95.0), "page": ("character error rate", 5.0), "question": ("exact match", 95.0)}
"""Exact match should be at least, the character error rate at most this many percent."""

MAX_NEW_TOKENS = 256


def rows_of(outcomes: list[Outcome]) -> list[record.Row]:
    """The rows of one task: its goal's measure first, then exact match of every kind of content."""
    task = outcomes[0].sample.task
    result = score(outcomes)
    measure, goal = GOALS[task]
    hits = sum(o.exact for o in outcomes)
    exact = record.Row(f"{task}: exact match", "%", 100 * result.exact, wilson(hits, len(outcomes)))
    if measure == "exact match":
        rows = [dataclasses.replace(exact, limit=goal)]
    else:
        rows = [record.Row(f"{task}: {measure}", "% errors", 100 * result.cer, limit=goal), exact]
    if len(result.by_kind) > 1:
        rows += [record.Row(f"{task}, {kind}: exact match", "%", 100 * v) for kind, v in result.by_kind.items()]
    return rows


def disagreements(vlm: VLM, reference: Callable[[Sample], tuple[int, ...]], samples: list[Sample]) -> list[str]:
    """Descriptions of the pictures on which the token ids of `vlm` are not those of `reference`."""
    found = []
    for i, sample in enumerate(samples):
        ids = vlm.generate(sample.question, [sample.image], max_new_tokens=MAX_NEW_TOKENS).token_ids
        wanted = reference(sample)
        if ids != wanted:
            step = next((n for n, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), len(ids))
            found.append(f"picture {i} ({sample.task}, {sample.kind}): token {step} differs")
    return found


def reference_answers(checkpoint: Path) -> Callable[[Sample], tuple[int, ...]]:
    """Greedy token ids by the torch reference model of `checkpoint`, in float32."""
    vlm = reference_vlm(checkpoint)

    def answer(sample: Sample) -> tuple[int, ...]:
        return vlm.generate(sample.question, [sample.image], max_new_tokens=MAX_NEW_TOKENS).token_ids

    return answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the disagreements, write the record."""
    from lensc.export.demo import CHECKPOINT

    parser = argparse.ArgumentParser(prog="python -m lensc.bench.demo_accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="reference (default: the shipped model)")
    parser.add_argument("--pictures", type=int, default=500, help="held-out pictures per task (default 500)")
    parser.add_argument("--agreement", type=int, default=200, help="pictures to compare token by token (default 200)")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N wrong answers of each task")
    options = parser.parse_args(arguments)
    try:
        return _measure(options)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _measure(options: argparse.Namespace) -> int:
    rows: list[record.Row] = []
    samples = {task: held_out_samples(task, options.pictures) for task in TASKS}
    with lensc.load(options.bundle) as vlm:

        def answer(image: Image.Image, question: str) -> str:
            return vlm.generate(question, [image], max_new_tokens=MAX_NEW_TOKENS).text

        for task in TASKS:
            outcomes = evaluate(samples[task], answer)
            rows += rows_of(outcomes)
            for outcome in [o for o in outcomes if not o.exact][: options.show]:
                print(f"{task}: {outcome.sample.question} {outcome.sample.answer!r}, answered {outcome.answer!r}")
        compared = [s for trio in zip(*samples.values(), strict=True) for s in trio][: options.agreement]
        found = disagreements(vlm, reference_answers(options.checkpoint), compared)
    rows.append(
        record.Row(
            f"same tokens as the reference, {len(compared)} pictures", "%", 100 * (1 - len(found) / len(compared))
        )
    )
    command = f"python -m lensc.bench.demo_accuracy {options.bundle}"
    path = record.write("demo_accuracy", command, rows, options.results)
    for row in rows:
        low, high = row.spread or (math.nan, math.nan)
        interval = f"{low:5.1f} to {high:5.1f}" if row.spread else ""
        goal = f"goal {row.limit:g}" if row.limit else ""
        print(f"{row.what:48} {row.lensc:6.2f} {row.unit:9} {interval:15} {goal}")
    print(*found, sep="\n")
    print(f"written to {path}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
