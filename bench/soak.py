"""Many generations of every kind in one process: does memory stay flat, and does any answer change?

    python -m lensc.bench.soak build/demo-bundle [--target onnxruntime:cpu …] [--generations 1000] [--results FOLDER]

Each target that the bundle was built for has a process of its own. It goes through the same round of requests again and
again: the shipped pictures at three sizes, text alone, a conversation whose picture is remembered, beam search, draws with
a seed, streams that are cancelled or dropped halfway, and requests that are refused. The first round's answers are the
ones that all later rounds must give, token by token.

Warm-up are the first two rounds and all until a tenth of the generations is done: until then the C library and the engine
keep what the largest request takes, and the remembered pictures (made to hold 12 slices, so that encoding goes on) fill
up. From then on, at the end of each round, the anonymous memory of the process may be at most 2 % away from what it was
after the warm-up. Freed memory that the C library keeps for the next request is given back before it is measured: it
comes and goes by some MB, which would hide a leak. So do pages of mapped files, which the system takes away when memory is
short elsewhere; they do not count.

Exit code 1 if an answer changed, or memory did.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import lensc
from lensc.backends.bundle import load_manifest
from lensc.backends.errors import InputError, LensError, PromptError
from lensc.export.demo import PICTURES
from lensc.export.memory import anonymous_bytes, resident_bytes, trim
from lensc.runtime import vision
from lensc.runtime.pipeline import VLM

from . import record
from .demo import QUESTIONS

ALLOWED = 0.02
"""Share of the memory after the warm-up."""
WARM_UP_ROUNDS = 2
SCALES = (1.0, 0.5, 1.7)
"""Of the shipped pictures: other numbers of slices, other sizes of each."""
TOKENS = 48
REMEMBERED_SLICES = 12

Request = Callable[[VLM], tuple[Any, ...]]


@dataclass(frozen=True)
class Soaked:
    """What one target did. `held` are bytes of anonymous memory: after the warm-up, then at the end of each round."""

    target: str
    generations: int
    changed: tuple[str, ...]
    held: tuple[int, ...]
    seconds: float

    @property
    def drift(self) -> float:
        """The largest change since the warm-up, as a share of it."""
        return max((abs(size / self.held[0] - 1) for size in self.held), default=0.0)

    @property
    def passed(self) -> bool:
        return not self.changed and self.drift <= ALLOWED and len(self.held) > 1


def requests() -> dict[str, Request]:
    """One round: requests by name, each a generation whose outcome is always the same."""
    found: dict[str, Request] = {
        "text alone": lambda vlm: _ids(vlm.generate("What can you see?", max_new_tokens=TOKENS))
    }
    for name, question in QUESTIONS.items():
        for scale in SCALES:
            found[f"{name} x {scale}"] = _asked(_picture(name, scale), question)
    receipt, line, note = (_picture(name, 1.0) for name in ("receipt.png", "line.png", "note.png"))
    found["beam search"] = _asked(receipt, "What is the total?", num_beams=3)
    found["two pictures"] = lambda vlm: _ids(vlm.generate("Read the text.", [line, note], max_new_tokens=TOKENS))
    for seed in (1, 2):
        found[f"draw {seed}"] = _asked(note, "Read the text.", do_sample=True, temperature=1.5, seed=seed)
    found |= {"turn 1": _turn(receipt, 1), "turn 2": _turn(receipt, 2), "turn 3": _turn(receipt, 3)}
    found["cancelled stream"] = lambda vlm: _cancelled(vlm, note)
    found["cancelled beams"] = lambda vlm: _ids(vlm.generate("Read.", [line], num_beams=3, should_stop=_after(4)))
    found["dropped stream"] = lambda vlm: _dropped(vlm, note)
    found["refused prompt"] = _refused
    return found


def soak(bundle: Path, target: str, generations: int, report: Callable[[str], None]) -> Soaked:
    """Load `bundle` on `target` and answer at least `generations` requests in whole rounds, three rounds at least.

    Raises what `lensc.load` does. `report` is given a line now and then.
    """
    round_ = requests()
    rounds = max(WARM_UP_ROUNDS + 1, -(-generations // len(round_)))
    warm_up = max(WARM_UP_ROUNDS, -(-rounds // 10))
    expected: dict[str, tuple[Any, ...]] = {}
    changed: list[str] = []
    held: list[int] = []
    started = time.perf_counter()
    with lensc.load(bundle, target=target) as vlm, _small_cache(vlm):
        for number in range(1, rounds + 1):
            for name, request in round_.items():
                outcome = request(vlm)
                if outcome != expected.setdefault(name, outcome):
                    changed.append(f"{target}: round {number}: {name} gave {outcome}, before {expected[name]}")
            if number >= warm_up:
                resident = resident_bytes()
                trim()
                held.append(anonymous_bytes())
                if number in (warm_up, rounds) or number % max(1, rounds // 10) == 0:
                    change = held[-1] / held[0] - 1
                    report(
                        f"{target}: {number * len(round_):5} generations, {held[-1] / 1e6:.1f} MB held "
                        f"({change:+.2%} since warm-up), {resident / 1e6:.1f} MB resident, "
                        f"{len(changed)} answers changed"
                    )
    seconds = time.perf_counter() - started
    return Soaked(target, rounds * len(round_), tuple(changed), tuple(held), seconds)


# --- requests -----------------------------------------------------------------------------------------------------


def _picture(name: str, scale: float) -> Image.Image:
    picture = Image.open(PICTURES / name).convert("RGB")
    return picture.resize((round(picture.width * scale), round(picture.height * scale)))


def _ids(result: Any) -> tuple[Any, ...]:
    return (*result.token_ids, result.finish_reason)


def _asked(picture: Image.Image, question: str, **options: Any) -> Request:
    return lambda vlm: _ids(vlm.generate(question, [picture], max_new_tokens=TOKENS, **options))


def _turn(picture: Image.Image, turns: int) -> Request:
    """The last of `turns` questions about one picture, the answers before it being made up. From the second on its slices
    are remembered, which is part of the outcome.
    """
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Read the text."}]}
    ]
    for _ in range(turns - 1):
        messages += [{"role": "assistant", "content": "173.20"}, {"role": "user", "content": "What is the total?"}]

    def ask(vlm: VLM) -> tuple[Any, ...]:
        result = vlm.chat(messages, max_new_tokens=TOKENS)
        return (*_ids(result), result.metrics.slices_from_cache if turns > 1 else None)

    return ask


def _cancelled(vlm: VLM, picture: Image.Image) -> tuple[Any, ...]:
    stream = vlm.generate("Read the text.", [picture], max_new_tokens=TOKENS, stream=True)
    said = next(stream, "")
    stream.cancel()
    return (said, stream.result.text, stream.result.finish_reason)


def _dropped(vlm: VLM, picture: Image.Image) -> tuple[Any, ...]:
    return (next(vlm.generate("Read the text.", [picture], max_new_tokens=TOKENS, stream=True), ""),)


def _after(steps: int) -> Callable[[], bool]:
    """A `should_stop` that says so when it is asked for the `steps`-th time."""
    left = iter(range(steps))
    return lambda: next(left, None) is None


def _refused(vlm: VLM) -> tuple[Any, ...]:
    try:
        vlm.generate("word " * vlm.spec.decoder.context_length)
    except PromptError as error:
        return (str(error),)
    raise InputError("a prompt that is longer than the context was answered")


@contextlib.contextmanager
def _small_cache(vlm: VLM) -> Iterator[None]:
    """Let the encoder remember few slices, so that others are encoded again in every round."""
    before = vision.CACHE_BYTES
    vision.CACHE_BYTES = REMEMBERED_SLICES * 4 * vlm.spec.picture.query_num * vlm.spec.decoder.hidden_size
    try:
        yield
    finally:
        vision.CACHE_BYTES = before


# --- the command --------------------------------------------------------------------------------------------------


def rows_of(soaked: Soaked) -> list[record.Row]:
    """What is recorded of a target; its sizes only if no answer changed."""
    ok = not soaked.changed
    what = f"{soaked.target}, {soaked.generations} generations"
    sizes = [size / 1e6 for size in soaked.held]
    last, spread = (sizes[-1], (min(sizes), max(sizes))) if ok else (None, None)
    return [
        record.Row(f"{what}: memory at the end", "MB", last, spread, "after warm-up", sizes[0],
                   parity="pass" if ok else "fail"),
        record.Row(f"{what}: changed answers", "errors", len(soaked.changed)),
    ]  # fmt: skip


def _in_a_process(bundle: Path, target: str, generations: int) -> Soaked:
    return soak(bundle, target, generations, lambda line: print(line, flush=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak every target in a process of its own, print what happened, write the record."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.soak", description=str(__doc__).split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", action="append", default=[], help="default: every target of the bundle")
    parser.add_argument("--generations", type=int, default=1000, help="at least, per target (default 1000)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the record here (default: do not)")
    options = parser.parse_args(arguments)
    if options.generations < 1:
        parser.error(f"--generations {options.generations}: expected at least 1")
    rows: list[record.Row] = []
    passed = True
    try:
        targets = options.target or sorted({str(a.target) for a in load_manifest(options.bundle).artifacts})
        for target in targets:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                soaked = pool.submit(_in_a_process, options.bundle, target, options.generations).result()
            rows += rows_of(soaked)
            passed &= soaked.passed
            verdict = "passed" if soaked.passed else "FAILED"
            print(
                f"{target}: {soaked.generations} generations in {soaked.seconds:.0f} s, {len(soaked.changed)} answers "
                f"changed, memory within {soaked.drift:.2%} of {soaked.held[0] / 1e6:.1f} MB: {verdict}"
            )
            print(*soaked.changed[:20], sep="\n", end="\n" if soaked.changed else "")
        if options.results:
            path = record.write("runtime", f"python -m lensc.bench.soak {options.bundle}", rows, options.results)
            print(f"written to {path}", file=sys.stderr)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
