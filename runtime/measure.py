"""How long a loaded model takes for a request of a given size: a picture, a number of tokens behind it, an answer of a given
length.

    with lensc.load("bundle/") as vlm:
        found = measure(vlm, Work(prompt_tokens=128, new_tokens=32, picture="receipt.png"))
        print(found.ttft_ms, found.decode_tokens_s)

What is timed is what an answer takes from the call on: the picture is opened, cut and encoded, the prompt is fed, tokens are
chosen greedily. Every run does all of it: what the run before left in caches is forgotten first. A stop id ends nothing, so
that all runs have the same length, and tokens are guessed ahead only if that is asked for. The tokens of the prompt are drawn
at random, the same in each run; the picture's own tokens come before them, and there is no chat template.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import UsageError

from .context import Context
from .options import resolve
from .picture import PictureSource, SlicePlan
from .pipeline import VLM
from .prompt import Prompt, Tokenizer, build_prompt, user_messages
from .result import Metrics

Kept = Literal["nothing", "pictures", "everything"]


@dataclass(frozen=True, eq=False)
class Work:
    """What a run is asked: so many tokens of text, behind a picture or without one, and so many tokens of answer.

    `prompt_lookup_num_tokens`: the most that are guessed ahead, as for `VLM.generate`.
    """

    prompt_tokens: int
    new_tokens: int
    picture: PictureSource | None = None
    prompt_lookup_num_tokens: int = 0


@dataclass(frozen=True)
class Values:
    """One figure in every run, in the order of the runs."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def spread(self) -> float:
        """How far the run that is furthest from the median is from it: all runs are within median ± spread."""
        return max(abs(value - self.median) for value in self.values)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.median:.3g}"
        digits = max(0, 2 - math.floor(math.log10(self.median))) if self.median > 0 else 2
        return f"{self.median:.{digits}f} ± {self.spread:.{digits}f}"


@dataclass(frozen=True)
class Measured:
    """What the runs took. `ttft_ms` is from the call to the first token, picture included; `image_ms` is the time in the
    vision graph, all slices together, None without a picture. `prefill_tokens_s` counts the tokens of picture and text;
    `decode_tokens_s` the tokens after the first, None if there are none.
    """

    slices: int
    prompt_tokens: int
    new_tokens: int
    image_ms: Values | None
    prefill_tokens_s: Values
    decode_tokens_s: Values | None
    ttft_ms: Values
    notes: tuple[str, ...]
    """What was converted, resized or cut short."""


def measure(
    vlm: VLM, work: Work, runs: int = 5, warmup: int = 1, report: Callable[[int], None] = lambda run: None
) -> Measured:
    """Do `work` so many times, after some runs that do not count. `report` hears the number of each run, from 1.

    Raises UsageError for work that the model's context has no room for, and what `VLM.generate` does.
    """
    if runs < 1 or warmup < 0:
        raise UsageError(f"runs={runs}, warmup={warmup}: expected at least 1 run, and 0 or more before it")
    found = []
    for number in range(1, warmup + runs + 1):
        report(number)
        found.append(run(vlm, work))
    return summed_up(found[warmup:])


def run(vlm: VLM, work: Work, keep: Kept = "nothing") -> Metrics:
    """Do `work` once, from nothing, or with what earlier runs left in caches: embeddings of pictures, or KV caches too."""
    if keep != "everything":
        vlm.forget(pictures=keep == "nothing")
    pictures = () if work.picture is None else (work.picture,)
    request = vlm.prepare(user_messages("", pictures))
    prompt = _behind(request.prompt, vlm.tokenizer, vlm.spec, vlm.context, work)
    options = resolve(
        vlm.spec.generation,
        max_new_tokens=work.new_tokens,
        prompt_lookup_num_tokens=work.prompt_lookup_num_tokens,
    )
    options = dataclasses.replace(options, ignore_eos=True)
    generation = vlm.begin(dataclasses.replace(request, prompt=prompt), options)
    for _ in generation.tokens():
        pass
    return generation.result("").metrics


def prompt_of(plan: SlicePlan | None, tokenizer: Tokenizer, spec: ModelSpec, work: Work) -> Prompt:
    """The prompt of `work`, whose picture is cut as `plan` says. Raises UsageError if the context has no room for it."""
    pictures = () if plan is None else (b"",)  # it is not opened
    plans = () if plan is None else (plan,)
    made = build_prompt(user_messages("", pictures), plans, tokenizer, spec.picture.query_num)
    most = spec.decoder.context_length
    return _behind(made, tokenizer, spec, Context(most, most), work)


def summed_up(runs: Sequence[Metrics]) -> Measured:
    """The figures of runs of the same work, at least one."""
    first = runs[0]
    decode = [m.decode_tokens_per_s for m in runs if m.decode_tokens_per_s is not None]
    return Measured(
        slices=len(first.image_ms),
        prompt_tokens=first.prompt_tokens,
        new_tokens=first.new_tokens,
        image_ms=Values(tuple(sum(m.image_ms) for m in runs)) if first.image_ms else None,
        prefill_tokens_s=Values(tuple(1e3 * (m.prompt_tokens - m.reused_tokens) / m.prefill_ms for m in runs)),
        decode_tokens_s=Values(tuple(decode)) if len(decode) == len(runs) else None,
        ttft_ms=Values(tuple(m.ttft_ms for m in runs)),
        notes=tuple(dict.fromkeys(note for m in runs for note in m.notes)),
    )


def _behind(made: Prompt, tokenizer: Tokenizer, spec: ModelSpec, context: Context, work: Work) -> Prompt:
    """The tokens of the picture of `made`, without the template around them, and the work's own behind them."""
    if work.prompt_tokens < 1 or work.new_tokens < 1:
        raise UsageError(
            f"{work.prompt_tokens} tokens of prompt, {work.new_tokens} of answer: expected at least 1 of each"
        )
    ids, bounds = made.ids, made.image_bounds
    seen = ids[:0]
    if len(bounds):
        begin = int(bounds[0, 0]) - 1
        seen = ids[begin : begin + int((ids[begin:] == tokenizer.special.eot).argmax())]
        bounds = bounds - begin
    total = len(seen) + work.prompt_tokens + work.new_tokens
    if total > context.tokens:
        picture = f"{len(seen)} tokens of picture, " if len(seen) else ""
        raise UsageError(
            f"{picture}{work.prompt_tokens} of prompt and {work.new_tokens} of answer are {total}, {context}; "
            "expected fewer"
        )
    text = np.random.default_rng(work.prompt_tokens).integers(0, spec.decoder.vocab_size, work.prompt_tokens)
    return Prompt(np.concatenate([seen, text]), bounds)
