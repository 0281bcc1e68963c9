"""Parameters of one generation: named as in transformers, checked once, defaults of the model filled in."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, TypedDict

from lensc.backends.bundle import GenerationSpec
from lensc.backends.errors import UsageError

from .speculation import MOST_DRAFTED

MAX_BEAMS = 64
"""Each beam holds its own copy of the KV cache, and a step feeds every beam."""


class Parameters(TypedDict, total=False):
    """What `VLM.generate` and `chat` take by name; None is as if it were left out."""

    do_sample: bool | None
    num_beams: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    max_new_tokens: int | None
    seed: int | None
    prompt_lookup_num_tokens: int | None
    max_ttft_ms: float | None


@dataclass(frozen=True)
class GenerationOptions:
    """What `resolve` made of the arguments; every field has its effective value."""

    do_sample: bool
    num_beams: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    max_new_tokens: int
    seed: int | None
    prompt_lookup_num_tokens: int = 0
    max_ttft_ms: float | None = None
    ignore_eos: bool = False
    """Go on behind a stop id: for measuring, where an answer has the length that was asked for."""


def resolve(
    spec: GenerationSpec,
    *,
    do_sample: bool | None = None,
    num_beams: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    prompt_lookup_num_tokens: int | None = None,
    max_ttft_ms: float | None = None,
    stream: bool = False,
    most_drafted: int = MOST_DRAFTED,
) -> GenerationOptions:
    """Check the arguments and fill in what was left out (None).

    Nothing given: greedy, one beam, no penalty. With `do_sample=True` the rest comes from the model (officially
    temperature 0.7, top-k 100, top-p 0.8, penalty 1.05); with `num_beams > 1` the penalty does (officially 1.2). `most_drafted`
    tokens are guessed where nothing is said. Raises UsageError that lists every problem.
    """
    problems = [
        *_flag("do_sample", do_sample),
        *_flag("stream", stream),
        *_integer("num_beams", num_beams, 1, MAX_BEAMS),
        *_number("temperature", temperature, 0, math.inf, "for the most likely token leave do_sample out"),
        *_integer("top_k", top_k, 0, None, "0 keeps all tokens"),
        *_number("top_p", top_p, 0, 1),
        *_number("repetition_penalty", repetition_penalty, 0, math.inf, "1.0 is none"),
        *_integer("max_new_tokens", max_new_tokens, 1, None),
        *_integer("seed", seed, 0, None),
        *_number("max_ttft_ms", max_ttft_ms, 0, math.inf),
        *_integer("prompt_lookup_num_tokens", prompt_lookup_num_tokens, 0, MOST_DRAFTED, "0 guesses no tokens"),
    ]
    if not problems:
        beams = num_beams is not None and num_beams > 1
        if do_sample and beams:
            problems.append(f"do_sample=True with num_beams={num_beams}: choose one, beam search does not sample")
        if stream and beams:
            problems.append(f"stream=True with num_beams={num_beams}: beams have no text before the end")
        if prompt_lookup_num_tokens and beams:
            problems.append(
                f"prompt_lookup_num_tokens={prompt_lookup_num_tokens} with num_beams={num_beams}: nothing is guessed in a "
                "beam search, leave it out"
            )
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        for name, value in given.items():
            if value is not None and not do_sample:
                problems.append(f"{name}={value} has no effect without do_sample=True; add it or leave {name} out")
    if problems:
        raise UsageError("; ".join(problems))

    penalty = 1.0
    if do_sample:
        penalty = spec.repetition_penalty
    elif (num_beams or 1) > 1:
        penalty = spec.beam_repetition_penalty
    return GenerationOptions(
        do_sample=bool(do_sample),
        num_beams=int(_or(num_beams, 1)),
        temperature=float(_or(temperature, spec.temperature)),
        top_k=int(_or(top_k, spec.top_k)),
        top_p=float(_or(top_p, spec.top_p)),
        repetition_penalty=float(_or(repetition_penalty, penalty)),
        max_new_tokens=int(_or(max_new_tokens, spec.max_new_tokens)),
        seed=None if seed is None else int(seed),
        prompt_lookup_num_tokens=0 if (num_beams or 1) > 1 else int(_or(prompt_lookup_num_tokens, most_drafted)),
        max_ttft_ms=None if max_ttft_ms is None else float(max_ttft_ms),
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _flag(name: str, value: Any) -> list[str]:
    return [] if value is None or isinstance(value, bool) else [f"{name}={value!r}: expected True or False"]


def _integer(name: str, value: Any, least: int, most: int | None, hint: str = "") -> list[str]:
    if value is None:
        return []
    fits = isinstance(value, numbers.Integral) and least <= int(value) <= (math.inf if most is None else most)
    if fits and not isinstance(value, bool):
        return []
    wanted = f"an integer from {least} to {most}" if most is not None else f"an integer of at least {least}"
    return [f"{name}={value!r}: expected {wanted}" + (f" ({hint})" if hint else "")]


def _number(name: str, value: Any, above: float, most: float, hint: str = "") -> list[str]:
    if value is None:
        return []
    fits = isinstance(value, numbers.Real) and above < float(value) <= most and float(value) < math.inf
    if fits and not isinstance(value, bool):
        return []
    wanted = f"a number above {above}" + (f" and at most {most}" if most < math.inf else "")
    return [f"{name}={value!r}: expected {wanted}" + (f" ({hint})" if hint else "")]
