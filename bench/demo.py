"""What the demo bundle answers about the shipped pictures, and how long each part takes beside torch.

    python -m lensc.bench.demo build/demo-bundle [--runs N] [--results FOLDER]

Every picture is asked by lensc and by the torch reference model (eager, float32, the same pipeline around it), in turn,
`--runs` times after a warm-up, its colours changed a little each time so that no encoding is reused. A picture on which the two
answers differ gets no speed. The limit for decoding is the decoder's bytes over this machine's measured bandwidth; for a
model that fits into the cache it is a lower bound only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import lensc
from lensc.backends.bundle import load_manifest
from lensc.backends.errors import InputError, LensError
from lensc.profiles.measure import bandwidth_gb_s
from lensc.runtime.pipeline import VLM, Result

from . import record
from .reference import reference_vlm

QUESTIONS = {
    "line.png": "Read the text.",
    "receipt.png": "What is the total?",
    "note.png": "Read the text.",
    "shapes.png": "What colour is the square?",
}
"""Asked about the pictures in export/demo/pictures."""

READ_BYTES = 256 << 20
"""Read to measure the bandwidth."""


@dataclass(frozen=True)
class Case:
    """One picture's answers: `ours` by the bundle, `theirs` by torch, a `Result` per run."""

    picture: str
    size: tuple[int, int]
    question: str
    ours: list[Result]
    theirs: list[Result]

    @property
    def same(self) -> bool:
        return all(a.token_ids == b.token_ids for a, b in zip(self.ours, self.theirs, strict=True))


def _ask(vlm: VLM, picture: Image.Image, question: str, run: int) -> Result:
    """Ask with the red of every pixel changed by a few levels, so that no slice of it was seen before."""
    pixels = np.array(picture)
    pixels[..., 0] ^= run + 1
    return vlm.generate(question, [Image.fromarray(pixels)], max_new_tokens=256)


def measure(bundle: Path, checkpoint: Path, pictures: Path, runs: int) -> list[Case]:
    """Ask every question `runs` times of both, interleaved, after one warm-up."""
    cases = []
    with lensc.load(bundle) as ours, reference_vlm(checkpoint) as theirs:
        for name, question in QUESTIONS.items():
            if not (pictures / name).is_file():
                raise InputError(f"{pictures / name} is missing; it is part of the source tree")
            picture = Image.open(pictures / name).convert("RGB")
            case = Case(name, picture.size, question, [], [])
            for run in range(runs + 1):
                pair = (_ask(ours, picture, question, run), _ask(theirs, picture, question, run))
                if run:
                    case.ours.append(pair[0])
                    case.theirs.append(pair[1])
            cases.append(case)
    return cases


def decoder_bytes(bundle: Path) -> int:
    """What is read for a token: the files of the bundle's first artifact of the decoder."""
    artifact = next(a for a in load_manifest(bundle).artifacts if a.graph == "decoder")
    return sum(file.bytes for file in artifact.files)


def rows_of(cases: list[Case], limit_tokens_per_s: float) -> list[record.Row]:
    """Time to first token and decode speed of every picture, beside torch's."""
    rows = []
    for case in cases:
        parity: record.Parity = "pass" if case.same else "fail"
        for what, unit, limit in (("first token", "ms", None), ("decode", "tokens/s", limit_tokens_per_s)):
            a, b = ([_value(r, unit) for r in results] for results in (case.ours, case.theirs))
            rows.append(
                record.Row(
                    f"{case.picture}: {what}",
                    unit,
                    statistics.median(a) if case.same else None,
                    (min(a), max(a)) if case.same else None,
                    rival="torch eager float32",
                    rival_value=statistics.median(b),
                    limit=limit,
                    parity=parity,
                )
            )
    return rows


def _value(result: Result, unit: str) -> float:
    return result.metrics.ttft_ms if unit == "ms" else result.metrics.decode_tokens_per_s or 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the answers and the table, write the record; 1 if an answer differs from torch's."""
    from lensc.export.demo import CHECKPOINT, PICTURES

    parser = argparse.ArgumentParser(prog="python -m lensc.bench.demo", description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="torch's (default: the shipped model)")
    parser.add_argument("--pictures", type=Path, default=PICTURES, metavar="FOLDER", help="default: the shipped ones")
    parser.add_argument("--runs", type=int, default=5, help="counted runs per picture (default 5)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the record here (default: do not)")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: expected at least 1")
    try:
        cases = measure(options.bundle, options.checkpoint, options.pictures, options.runs)
        gb_s = bandwidth_gb_s(1, READ_BYTES)
        rows = rows_of(cases, gb_s * 1e9 / decoder_bytes(options.bundle))
        if options.results:
            command = f"python -m lensc.bench.demo {options.bundle}"
            record.write("runtime", command, rows, options.results, {"bandwidth_1_thread_gb_s": gb_s})
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for case in cases:
        answer = case.ours[0].text.replace("\n", "\n    ")
        print(f"{case.picture} ({case.size[0]}x{case.size[1]}): {case.question}\n    {answer}\n")
    _print_table(cases)
    return int(not all(case.same for case in cases))


def _print_table(cases: list[Case]) -> None:
    print(
        f"{'picture':12} {'slices':>6} {'vision':>8} {'prefill':>8} {'first token':>12} {'decode':>13}   beside torch"
    )
    for case in cases:
        if not case.same:
            print(f"{case.picture:12} the answer differs from torch's: no speed")
            continue
        metrics = [r.metrics for r in case.ours]
        first = statistics.median(m.ttft_ms for m in metrics)
        speed = statistics.median(m.decode_tokens_per_s or 0.0 for m in metrics)
        ratios = [b.metrics.ttft_ms / a.metrics.ttft_ms for a, b in zip(case.ours, case.theirs, strict=True)]
        vision, prefill = (
            statistics.median(v) for v in zip(*((sum(m.image_ms), m.prefill_ms) for m in metrics), strict=True)
        )
        print(
            f"{case.picture:12} {len(metrics[0].image_ms):6} {vision:5.1f} ms {prefill:5.1f} ms {first:9.1f} ms "
            f"{speed:6.0f} tok/s   first token {statistics.median(ratios):.2f}x faster "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    sys.exit(main())
