"""What guessing tokens ahead gains where documents repeat themselves, and what it costs where they do not.

    python -m lensc.bench.speculation build/demo-bundle [--target native:cpu …] [--runs 9] [--results FOLDER]

Each target answers every case with guesses and without, in turn, after a round that does not count. A case whose two answers
differ in a token gets no speed. The pictures are drawn by the demo's generator and held out from its training:

    repeated lines   a page of three lines that stand there four times
    pages            pages of unrelated lines, read once: nothing to guess from
    draws            200 tokens drawn at so high a temperature that nothing repeats

Tokens/s are those after the first, over all pictures of a case.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

import lensc
from lensc.backends.bundle import load_manifest
from lensc.backends.errors import LensError
from lensc.runtime.pipeline import VLM, Result

from . import record
from .turns import compared

QUESTION = "Read the text."
SEED = 2026
AREA = 150_000
"""Square pixels of a page of twelve lines."""


@dataclass(frozen=True)
class Case:
    """Pictures that are read, and how tokens are chosen."""

    pictures: tuple[Image.Image, ...]
    options: dict[str, Any] = field(default_factory=dict)


def cases() -> dict[str, Case]:
    """Drawn anew, always the same."""
    from lensc.export.demo.content import Page, note
    from lensc.export.demo.draw import draw_page
    from lensc.export.demo.samples import held_out_samples

    def repeated(seed: int) -> Image.Image:
        rng = Random(seed)
        return draw_page(rng, Page(note(rng, True, 3, 10).lines * 4), AREA).image

    pages = tuple(sample.drawing.image for sample in held_out_samples("page", 6, SEED))
    drawn = {"do_sample": True, "temperature": 8.0, "top_k": 0, "top_p": 1.0, "seed": SEED, "max_new_tokens": 200}
    return {
        "repeated lines": Case(tuple(repeated(SEED + i) for i in range(4))),
        "pages": Case(pages),
        "draws": Case(pages[:2], drawn),
    }


def answers(vlm: VLM, case: Case, most_guessed: int | None) -> list[Result]:
    """Of all pictures of the case, from nothing but the prompt."""
    found = []
    for picture in case.pictures:
        vlm.forget()
        found.append(vlm.generate(QUESTION, [picture], prompt_lookup_num_tokens=most_guessed, **case.options))
    return found


def tokens_per_s(results: Sequence[Result]) -> float:
    """Of all tokens but the first of each answer."""
    timed = [r.metrics for r in results if r.metrics.decode_tokens_per_s]
    seconds = sum((m.new_tokens - 1) / (m.decode_tokens_per_s or 1.0) for m in timed)
    return sum(m.new_tokens - 1 for m in timed) / seconds


def measure(vlm: VLM, name: str, case: Case, runs: int) -> tuple[record.Row, str]:
    """The row of a case, and in words how many guesses there were in the last run."""
    guessed: list[float] = []
    plain: list[float] = []
    same, said = True, ""
    for run in range(runs + 1):
        # in turn, and who comes first in turn, too
        ways = [None, 0] if run % 2 else [0, None]
        found = {way: answers(vlm, case, way) for way in ways}
        same &= all(a.token_ids == b.token_ids for a, b in zip(found[None], found[0], strict=True))
        if run:
            guessed.append(tokens_per_s(found[None]))
            plain.append(tokens_per_s(found[0]))
        metrics = [r.metrics for r in found[None]]
        drafted, accepted = sum(m.drafted_tokens for m in metrics), sum(m.accepted_tokens for m in metrics)
        said = f"{sum(m.new_tokens for m in metrics)} tokens, {drafted} guessed, {accepted} right"
    if not same:
        return record.Row(name, "tokens/s", None, parity="fail"), said
    return compared(name, "tokens/s", guessed, plain, "without guesses"), said


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for every target and case, write the record; 1 if guesses changed a token."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.speculation", description=str(__doc__).split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", action="append", default=[], help="default: every target of the bundle")
    parser.add_argument("--runs", type=int, default=9, help="counted runs of every case (default 9)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the record here (default: do not)")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: expected at least 1")
    rows: list[record.Row] = []
    try:
        asked = cases()
        for target in options.target or sorted({str(a.target) for a in load_manifest(options.bundle).artifacts}):
            with lensc.load(options.bundle, target) as vlm:
                for name, case in asked.items():
                    row, said = measure(vlm, f"{target}, {name}: decode", case, options.runs)
                    rows.append(row)
                    print(f"{row.what:44} {_shown(row)}   {said}", flush=True)
        if options.results:
            path = record.write("runtime", f"python -m lensc.bench.speculation {options.bundle}", rows, options.results)
            print(f"written to {path}", file=sys.stderr)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return int(any(row.parity == "fail" for row in rows))


def _shown(row: record.Row) -> str:
    if row.lensc is None or row.ratio is None or row.ratio_spread is None:
        return "another answer: no speed" if row.lensc is None else f"{row.lensc:.0f} {row.unit}"
    low, high = row.ratio_spread
    return f"{row.lensc:7.0f} {row.unit}, without {row.rival_value:6.0f}: {row.ratio:.2f} x ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
