"""What guessing tokens ahead gains where a text repeats itself, and what it costs where it does not or only seems to.

    python -m lensc.bench.speculation build/demo-bundle [--target native:cpu …] [--results FOLDER]

Each target is loaded twice and answers every case with guesses and without at the same time, BLOCK tokens in turn, so that what
else the machine does falls on both; the two change roles with every pair, and a first pair does not count. The figure is the
median of the pairs' ratios with two standard errors to either side. Pairs end when that interval is on one side of FLOOR, at
the latest after `--pairs`. Tokens/s are those after the first, over all pictures of a case. A case whose answers differ in a
token gets no speed.

Pictures of the demo's generator, held out from its training, for a bundle of the demo model:

    repeated lines   a page of three lines that stand there four times
    pages            pages of unrelated lines, read once: nothing to guess from
    draws            200 tokens drawn at so high a temperature that nothing repeats

Texts that are said whatever the logits are, so that every model says them; what it would have said instead is compared:

    fresh tokens     no pair occurs twice
    few tokens       drawn from four: pairs and triples recur all the time, and are followed by something else
    decoys           of eight tokens, and what follows a pair or a triple is never what followed it before
    broken repeats   what was said before is said again for 3 to 12 tokens, then something new, again and again
    repeats          a passage of 40 tokens, again and again
    first answer     the same as broken repeats, the first answer after loading: nothing is prepared, nothing was learnt
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from PIL import Image

import lensc
from lensc.backends.bundle import load_manifest
from lensc.backends.errors import LensError
from lensc.runtime.options import resolve
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import user_messages
from lensc.runtime.result import Metrics
from lensc.runtime.tune import interval_of

from . import record
from .turns import compared

QUESTION = "Read the text."
SEED = 2026
AREA = 150_000
"""Square pixels of a page of twelve lines."""
FLOOR = 0.97
"""Of the speed without guesses: what guessing must never fall below."""
TOKENS = 300
LEAST_PAIRS = 6
BLOCK = 8
"""Tokens that are said in turn: a few ms of a small model, 2 s of a large one on two cores."""
FIRST = "first answer"


@dataclass(frozen=True)
class Case:
    """What is answered, and how tokens are chosen: by `options`, or as `script` says."""

    pictures: tuple[Image.Image, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    script: tuple[int, ...] = ()
    gains: bool = False
    """Whether there is something to guess from, so that being no faster is a failure."""


def pictures() -> dict[str, Case]:
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
        "repeated lines": Case(tuple(repeated(SEED + i) for i in range(4)), gains=True),
        "pages": Case(pages),
        "draws": Case(pages[:2], drawn),
    }


def texts(vocabulary: int, tokens: int) -> dict[str, Case]:
    """Scripts of so many tokens, always the same."""
    rng = Random(SEED)
    passage = rng.sample(range(vocabulary), 40)
    found = {
        "fresh tokens": rng.sample(range(vocabulary), min(tokens, vocabulary)),
        "few tokens": rng.choices(rng.sample(range(vocabulary), 4), k=tokens),
        "decoys": decoys(rng, rng.sample(range(vocabulary), 8), tokens),
        "broken repeats": broken_repeats(rng, vocabulary, tokens),
        "repeats": (passage * (1 + tokens // len(passage)))[:tokens],
    }
    found[FIRST] = found["broken repeats"]
    return {name: Case(script=tuple(text), gains=name == "repeats") for name, text in found.items()}


def decoys(rng: Random, ids: Sequence[int], tokens: int) -> list[int]:
    """A text in which every guess from a pair or a triple is wrong."""
    text = [*ids[:3]]
    followed: dict[tuple[int, ...], int] = {}
    while len(text) < tokens:
        before = tuple(text[-2:]), tuple(text[-3:])
        wrong = {followed.get(key) for key in before}
        text.append(rng.choice([token for token in ids if token not in wrong]))
        followed |= dict.fromkeys(before, text[-1])
    return text[:tokens]


def broken_repeats(rng: Random, vocabulary: int, tokens: int) -> list[int]:
    """A text that repeats something of itself for 3 to 12 tokens, and then does not, again and again."""
    text = rng.sample(range(vocabulary), 16)
    while len(text) < tokens:
        begin = rng.randrange(len(text) - 12)
        text += text[begin : begin + rng.randint(3, 12)]
        text += rng.sample(range(vocabulary), rng.randint(1, 4))
    return text[:tokens]


@dataclass(frozen=True)
class Said:
    """What was said, or would have been, and the seconds from the first token to the last."""

    token_ids: tuple[int, ...]
    seconds: float
    metrics: Metrics


class Answer:
    """One answer, from nothing but the prompt, some tokens at a time; the first is there at once."""

    def __init__(
        self, vlm: VLM, case: Case, picture: Image.Image | None, clock: Callable[[], float], most_guessed: int | None
    ) -> None:
        vlm.forget()
        asked = case.options or {"do_sample": False}
        if case.script:
            asked = {**asked, "max_new_tokens": len(case.script)}
        options = resolve(vlm.spec.generation, prompt_lookup_num_tokens=most_guessed, **asked)
        request = vlm.prepare(user_messages(QUESTION, () if picture is None else (picture,)))
        self._generation = vlm.begin(request, dataclasses.replace(options, ignore_eos=bool(case.script)))
        self._would: list[int] = []
        if case.script:

            def choose(logits: Any, generator: object) -> int:
                self._would.append(int(logits.argmax()))
                return case.script[len(self._would) - 1]

            # the one place where an answer chooses its tokens
            self._generation._choose = choose  # type: ignore[method-assign]
        self._clock = clock
        self._tokens = self._generation.tokens()
        self._said = [next(self._tokens)]
        self._seconds = 0.0

    def go_on(self, tokens: int) -> bool:
        """Say so many more; False if that was the end."""
        started = self._clock()
        more = list(itertools.islice(self._tokens, tokens))
        self._seconds += self._clock() - started
        self._said += more
        return len(more) == tokens

    def said(self) -> Said:
        """All of it; `token_ids` of a script are what the model would have said at each place of it."""
        return Said(tuple(self._would or self._said), self._seconds, self._generation.result("").metrics)


def answers(guessing: VLM, plain: VLM, case: Case, clock: Callable[[], float]) -> tuple[list[Said], list[Said]]:
    """With guesses and without, about all pictures of the case, or its text."""
    both: tuple[list[Said], list[Said]] = [], []
    for picture in case.pictures or (None,):
        pair = [Answer(guessing, case, picture, clock, None), Answer(plain, case, picture, clock, 0)]
        going = [*pair]
        while going:
            # who comes first changes, too: the second finds the caches as the first has left them
            going = [answer for answer in reversed(going) if answer.go_on(BLOCK)]
        for said, answer in zip(both, pair, strict=True):
            said.append(answer.said())
    return both


def tokens_per_s(said: Sequence[Said]) -> float:
    """Of all tokens but the first of each answer."""
    return sum(len(s.token_ids) - 1 for s in said) / sum(s.seconds for s in said)


def measure(
    answer: Callable[[int], tuple[list[Said], list[Said]]], name: str, pairs: int, warmup: int
) -> tuple[record.Row, str]:
    """The row of a case, and in words how many guesses there were in the last run.

    `answer(number of the pair)` answers it with guesses and without.
    """
    guessed: list[float] = []
    plain: list[float] = []
    same, said = True, ""
    for run in range(warmup + pairs):
        with_guesses, without = answer(run)
        same &= all(a.token_ids == b.token_ids for a, b in zip(with_guesses, without, strict=True))
        if run >= warmup:
            guessed.append(tokens_per_s(with_guesses))
            plain.append(tokens_per_s(without))
        metrics = [s.metrics for s in with_guesses]
        drafted, accepted = sum(m.drafted_tokens for m in metrics), sum(m.accepted_tokens for m in metrics)
        said = f"{sum(m.new_tokens for m in metrics)} tokens, {drafted} guessed, {accepted} right"
        if len(guessed) >= LEAST_PAIRS:
            low, high = interval_of([a / b for a, b in zip(guessed, plain, strict=True)])
            if low >= FLOOR or high < FLOOR:
                break
    if not same:
        return record.Row(name, "tokens/s", None, parity="fail"), said
    row = compared(name, "tokens/s", guessed, plain, "without guesses")
    ratios = [a / b for a, b in zip(guessed, plain, strict=True)]
    return dataclasses.replace(row, pair_ratio=median(ratios), ratio_interval=interval_of(ratios)), said


def verdict(row: record.Row, gains: bool) -> str:
    """Empty if the row keeps the promise, else what it breaks."""
    if row.parity == "fail":
        return "guesses changed a token: no speed"
    ratio = row.ratio or 0.0
    if ratio < FLOOR:
        return f"slower than {FLOOR:g} of the speed without guesses"
    return "no faster, with so much to guess from" if gains and ratio < 1 else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for every target and case, write the record; 1 if guesses changed a token or made a case slower."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.speculation", description=str(__doc__).split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", action="append", default=[], help="default: every target of the bundle")
    parser.add_argument("--case", action="append", default=[], help="of the names above; default: all")
    parser.add_argument("--pairs", type=int, default=25, help="most pairs of every case (default 25)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of every text (default {TOKENS})")
    parser.add_argument("--threads", type=int, help="default: the physical cores")
    text = "count the time of the processor, with one thread: where others load the machine"
    parser.add_argument("--processor-time", action="store_true", help=text)
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the record here (default: do not)")
    options = parser.parse_args(arguments)
    if options.pairs < LEAST_PAIRS or options.tokens < 40:
        parser.error(f"--pairs {options.pairs} --tokens {options.tokens}: expected at least {LEAST_PAIRS} and 40")
    if options.processor_time and options.threads != 1:
        parser.error("--processor-time: threads that wait for each other take it, too; expected --threads 1")
    rows: list[record.Row] = []
    broken = 0
    try:
        manifest = load_manifest(options.bundle)
        asked = texts(manifest.model.decoder.vocab_size, options.tokens)
        if manifest.model.name == "demo":
            asked = pictures() | asked
        if unknown := set(options.case) - asked.keys():
            parser.error(f"--case {min(unknown)!r}: expected one of {', '.join(asked)}")
        for target in options.target or sorted({str(a.target) for a in manifest.artifacts}):
            for row, gains, said in of_target(options, target, asked):
                rows.append(row)
                wrong = verdict(row, gains)
                broken += bool(wrong)
                print(f"{row.what:44} {_shown(row)}   {said}   {wrong}".rstrip(), flush=True)
        if options.results:
            command = f"python -m lensc.bench.speculation {record.shown(options.bundle)}"
            command += f" --tokens {options.tokens}" if options.tokens != TOKENS else ""
            command += f" --threads {options.threads}" if options.threads else ""
            command += " --processor-time" if options.processor_time else ""
            print(f"written to {record.write('runtime', command, rows, options.results)}", file=sys.stderr)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return int(broken > 0)


def of_target(
    options: argparse.Namespace, target: str, asked: dict[str, Case]
) -> Iterator[tuple[record.Row, bool, str]]:
    """Row, whether it must gain, and words of each case in turn."""
    clock = time.process_time if options.processor_time else time.perf_counter

    def load() -> VLM:
        return lensc.load(options.bundle, target, threads=options.threads)

    def in_turn(one: VLM, other: VLM, case: Case, run: int) -> tuple[list[Said], list[Said]]:
        # of two that are loaded, the second may be faster by some percent, and stay so
        return answers(*((one, other) if run % 2 else (other, one)), case, clock)

    def first(case: Case, run: int) -> tuple[list[Said], list[Said]]:
        with load() as one, load() as other:
            return in_turn(one, other, case, run)

    names = options.case or [*asked]
    with load() as one, load() as other:
        for name in names:
            answer = partial(first, asked[name]) if name == FIRST else partial(in_turn, one, other, asked[name])
            row, said = measure(answer, f"{target}, {name}", options.pairs, 1)
            yield row, asked[name].gains, said


def _shown(row: record.Row) -> str:
    if row.lensc is None or row.ratio is None or row.ratio_interval is None:
        return "no speed"
    low, high = row.ratio_interval
    return f"{row.lensc:7.4g} {row.unit}, without {row.rival_value:7.4g}: {row.ratio:.3f} x ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    sys.exit(main())
