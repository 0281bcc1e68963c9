"""Guessed tokens change the speed of an answer and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from lensc.backends.errors import UsageError
from lensc.bench.speculation import texts
from lensc.runtime.options import resolve
from lensc.runtime.prompt import user_messages
from lensc.runtime.speculation import FIRST_GUESS, PLACEHOLDER, SIZES, Pace, Speculation

QUESTION = "one two three four five one two three four five one two three four five, what?"


class Eager(Pace):
    """Guesses whenever there is something to guess from, in steps of `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def best_size(self, chance: float, most: int, may_lose_s: float) -> int:
        return min(self.size, most)


class Certain(dict[tuple[int, int], float]):
    """Chances that no failure changes."""

    def __setitem__(self, kind: tuple[int, int], chance: float) -> None:
        super().__setitem__(kind, 1.0)


def always(vlm: Any, size: int = 8) -> Any:
    """`vlm`, guessing at every opportunity, right or wrong."""
    pace = Eager(size)
    pace.right = Certain.fromkeys(FIRST_GUESS, 1.0)
    vlm._decoder = dataclasses.replace(vlm._decoder, pace=pace)
    return vlm


def repeating(tiny: Any) -> Any:
    """A model that likes what stood two tokens before the last: answers go in circles, and leave them now and then."""
    vlm, vision, decoder = tiny.make()
    run = decoder.run

    def biased(feeds: Any, out: Any = None) -> Any:
        outputs = run(feeds, out)
        embeds = np.concatenate([feeds["past_key.0"].reshape(-1, tiny.D), feeds["inputs_embeds"][0]])
        past = len(embeds) - len(feeds["inputs_embeds"][0])
        table = tiny.TABLE.astype(np.float32)
        for row, position in enumerate(feeds["logit_positions"]):
            at = past + int(position) - 2
            if at >= 0 and at % 7:
                outputs["logits"][0, row] += 12 * table @ embeds[at] / np.square(embeds[at]).sum()
        return outputs

    decoder.run = biased
    return vlm, vision, decoder


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.05},
    "draw": {"do_sample": True, "seed": 5, "temperature": 1.0},
    "draw, all tokens": {"do_sample": True, "seed": 6, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_the_tokens_are_those_without_guesses(tiny: Any, way: str, size: int) -> None:
    """Greedy, penalized and drawn: each token is chosen from the same logits with the same random number."""
    expected = repeating(tiny)[0].generate(QUESTION, max_new_tokens=60, prompt_lookup_num_tokens=0, **WAYS[way])
    vlm, _, decoder = repeating(tiny)
    result = always(vlm, size).generate(QUESTION, max_new_tokens=60, **WAYS[way])
    assert result.token_ids == expected.token_ids and result.finish_reason == expected.finish_reason
    metrics = result.metrics
    assert 0 < metrics.accepted_tokens < metrics.drafted_tokens, "some are right and some are wrong"
    steps = len(decoder.tokens) - 1  # but the prompt's
    assert steps == len(result.token_ids) - 1 - metrics.accepted_tokens or result.finish_reason == "length"
    assert metrics.kv_cache_bytes == expected.metrics.kv_cache_bytes
    assert expected.metrics.drafted_tokens == 0


def test_draws_are_those_without_guesses_seed_by_seed(tiny: Any) -> None:
    """By construction: with a seed, each token is drawn by the same random number from the same logits as without."""
    options = {"do_sample": True, "temperature": 0.7, "top_k": 6, "top_p": 1.0, "repetition_penalty": 1.0}
    vlm = always(repeating(tiny)[0])
    answers = [vlm.generate(QUESTION, max_new_tokens=6, seed=seed, **options).token_ids for seed in range(300)]
    plain = repeating(tiny)[0]
    assert answers[:100] == [
        plain.generate(QUESTION, max_new_tokens=6, seed=seed, prompt_lookup_num_tokens=0, **options).token_ids
        for seed in range(100)
    ]
    assert len(set(answers)) > 100


def test_an_answer_that_ends_among_guesses_leaves_a_cache_without_them(tiny: Any) -> None:
    for most in range(3, 40, 5):
        vlm, _, _ = repeating(tiny)
        always(vlm)
        result = vlm.generate(QUESTION, max_new_tokens=most)
        (held,) = vlm._decoder.prefixes._held
        assert held.cache.length == len(held.rows) == result.metrics.prompt_tokens + len(result.token_ids) - 1
        again = vlm.generate(QUESTION, max_new_tokens=most)
        assert again.token_ids == result.token_ids
    vlm, _, _ = repeating(tiny)
    stream = always(vlm).generate(QUESTION, max_new_tokens=60, stream=True)
    for _ in range(9):
        next(stream)
    del stream
    (held,) = vlm._decoder.prefixes._held
    assert held.cache.length == len(held.rows)


def test_should_stop_is_asked_between_tokens(tiny: Any) -> None:
    full = repeating(tiny)[0].generate(QUESTION, max_new_tokens=30).token_ids
    for stop_at in (2, 5, 17):
        asked = itertools.count()
        vlm = always(repeating(tiny)[0])
        got = vlm.generate(QUESTION, max_new_tokens=30, should_stop=lambda a=asked, s=stop_at: next(a) >= s)
        assert got.token_ids == full[: len(got.token_ids)] and got.finish_reason == "cancelled"


def test_nothing_is_guessed_in_a_beam_search_and_saying_otherwise_is_an_error(tiny: Any) -> None:
    vlm = always(repeating(tiny)[0])
    assert vlm.generate(QUESTION, num_beams=3).metrics.drafted_tokens == 0
    with pytest.raises(UsageError, match="prompt_lookup_num_tokens=3 with num_beams=2: nothing is guessed"):
        resolve(tiny.SPEC.generation, num_beams=2, prompt_lookup_num_tokens=3)
    with pytest.raises(UsageError, match="prompt_lookup_num_tokens=8: expected an integer from 0 to 7"):
        resolve(tiny.SPEC.generation, prompt_lookup_num_tokens=8)


def test_a_graph_that_gives_one_row_of_logits_gets_no_guesses(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    generation = always(vlm).begin(vlm.prepare(user_messages(QUESTION)), resolve(tiny.SPEC.generation))
    generation.decoder.most_rows = 1
    list(generation.tokens())
    assert generation.result("").metrics.drafted_tokens == 0


# --- what is guessed ----------------------------------------------------------------------------------------------


def guesses(ids: list[int], most: int = 7) -> list[int]:
    return Speculation(Eager(8), ids, 7).draft(most)


def test_guesses_are_what_followed_the_last_tokens_before() -> None:
    assert guesses([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5, 9, 1, 2, 3], "a repetition goes on beyond its beginning"
    assert guesses([1, 2, 3, 4, 5, 9, 1, 2], 2) == [3, 4]
    assert guesses([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1) == [3], "three alike go before two that are nearer"
    assert guesses([1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1) == [4], "the nearer of two"
    assert guesses([1, 2, 3, 4]) == [] and guesses([]) == [] and guesses([1]) == []
    assert guesses([5, 5, 5]) == [5] * 7


def test_pictures_are_neither_guessed_nor_guessed_from() -> None:
    hole = [PLACEHOLDER] * 3
    assert guesses([1, 2, 3, *hole, 4, 1, 2]) == [3]
    assert guesses([*hole, 4, *hole]) == []
    assert guesses([1, *hole, 4, 9, 1, *hole, 4]) == [], "what is behind a picture alone is one token"
    assert guesses([1, 2, *hole, 5, 1, 2]) == []


# --- whether it pays ----------------------------------------------------------------------------------------------


def answer(
    pace: Pace, costs: dict[int, float], ids: list[int], prompt: list[int], rng: np.random.Generator | None = None
) -> tuple[float, float]:
    """Time with guesses and without, of an engine whose steps cost `costs` by tokens; with `rng` the clock is disturbed."""
    speculation = Speculation(pace, prompt, 7)
    spent, at = 0.0, 0
    while at < len(ids):
        speculation.push(ids[at])
        at += 1
        draft = speculation.draft(max(0, len(ids) - at - 1))
        right = 0
        while right < len(draft) and at < len(ids) and draft[right] == ids[at]:
            speculation.push(ids[at])
            right += 1
            at += 1
        spent += costs[1 + len(draft)]
        disturbed = 1 if rng is None else (10 if rng.random() < 0.02 else np.exp(0.1 * rng.standard_normal()))
        speculation.stepped(1 + len(draft), 1 + right, costs[1 + len(draft)] * disturbed)
    return spent, len(ids) * costs[1]


CHEAP = {n: 0.1 * (1 + 0.02 * (n - 1)) for n in range(1, 9)}
DEAR = {n: 0.1 * n for n in range(1, 9)}
STEP = {1: 0.1, **{n: 0.35 for n in range(2, 9)}}
"""Dear with two, and no dearer with eight."""


MEASURED = {
    "native, f32": (1.10, 1.27, 1.52),
    "onnxruntime, f32": (1.38, 1.59, 2.01),
    "openvino, f32": (2.24, 2.15, 2.58),
    "native, int4": (1.88, 3.04, 5.13),
    "onnxruntime, int4": (2.52, 3.58, 4.50),
    "openvino, int4": (3.59, 4.06, 4.14),
}
"""Steps of 2, 4 and 8 tokens beside one of one, with what they cost the step behind: the demo model on an AMD EPYC with AVX2."""


@pytest.mark.parametrize("engine", MEASURED)
@pytest.mark.parametrize("text", ["fresh tokens", "few tokens", "decoys", "broken repeats", "repeats"])
def test_no_text_is_slower_on_any_engine_that_was_measured(engine: str, text: str) -> None:
    """Nor a first answer; of the clock, every fiftieth step is interrupted for ten times as long."""
    two, four, eight = (0.1 * ratio for ratio in MEASURED[engine])
    costs = {1: 0.1, 2: two, **dict.fromkeys(range(3, 5), four), **dict.fromkeys(range(5, 9), eight)}
    said = [*texts(560, 300)[text].script]
    pace, rng = Pace(), np.random.default_rng(3)
    spent, plain = zip(*(answer(pace, costs, said, [], rng) for _ in range(6)), strict=True)
    assert all(a <= b / 0.97 for a, b in zip(spent, plain, strict=True))
    if text == "repeats" and costs[8] < 0.3:
        assert sum(plain) > 1.3 * sum(spent)


@pytest.mark.parametrize("costs", [CHEAP, DEAR, STEP], ids=["cheap", "dear", "step"])
def test_an_answer_never_loses_more_than_it_may(costs: dict[int, float]) -> None:
    """Few tokens, so that much repeats by chance and then does not; long answers and short ones, one after another."""
    rng = np.random.default_rng(1)
    pace = Pace()
    for length in (5, 20, 100, 1000, 5, 30, 50) * 3:
        spent, plain = answer(pace, costs, rng.integers(0, 12, length).tolist(), rng.integers(0, 12, 50).tolist())
        assert spent <= 1.03 * plain


def test_a_document_that_repeats_itself_is_faster() -> None:
    rng = np.random.default_rng(2)
    document = rng.integers(0, 5000, 300).tolist()
    for costs, least in ((CHEAP, 3.0), (STEP, 1.2)):
        pace = Pace()
        answer(pace, costs, rng.integers(0, 5000, 100).tolist(), [])
        for _ in range(3):
            spent, plain = answer(pace, costs, document, document)
        assert plain / spent > least
    pace = Pace()
    spent, plain = answer(pace, DEAR, document, document)
    assert spent <= 1.03 * plain


def test_a_step_that_slows_the_next_is_charged_with_it() -> None:
    pace = Pace()
    speculation = Speculation(pace, [], 7)
    for _ in range(10):
        speculation.stepped(1, 1, 0.1)
    for _ in range(3):
        speculation.stepped(2, 2, 0.12)
        speculation.stepped(1, 1, 0.5)
    assert pace.plain_s == pytest.approx(0.1)
    assert pace.ratio(2) == pytest.approx(5.2)
