"""Beam search against recordings of transformers 4.40's scorer and against hand-made situations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lensc.backends.errors import ExecutionError
from lensc.runtime.beam import BeamSearch, Hypothesis

RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "beam_transformers_4_40.json").read_text())


def made_up_logits(
    history: tuple[int, ...], vocabulary: int, seed: int, eos: int, eos_bias: float
) -> np.ndarray[Any, Any]:
    """Deterministic logits of a history, by an integer hash; ids below `eos` are stop ids."""
    state = seed * 7919 + 17
    for token in history:
        state = (state * 1103515245 + token * 12345 + 12345) % 2147483647
    values = [(state * (i + 3) * 48271 + i * 40692) % 2147483399 for i in range(vocabulary)]
    logits = np.array(values, np.float64) / 2147483399 * 12 - 6
    logits[:eos] += eos_bias
    return logits.astype(np.float32)


def search(case: dict[str, Any]) -> tuple[BeamSearch, list[Hypothesis]]:
    eos = tuple(range(case["eos"]))
    beams = BeamSearch(case["num_beams"], eos, case["penalty"])
    histories: list[tuple[int, ...]] = [()] * case["num_beams"]
    while not beams.done and beams.length < case["max_new_tokens"]:
        logits = [made_up_logits(h, case["vocabulary"], case["seed"], len(eos), case["eos_bias"]) for h in histories]
        tokens, parents = beams.advance(np.stack(logits))
        histories = [(*histories[p], int(t)) for t, p in zip(tokens, parents, strict=True)]
    return beams, beams.hypotheses()


@pytest.mark.parametrize(
    "case", RECORDED, ids=lambda c: "seed{seed}-beams{num_beams}-V{vocabulary}-eos{eos}".format(**c)
)
def test_equals_transformers_4_40(case: dict[str, Any]) -> None:
    beams, hypotheses = search(case)
    assert beams.length == case["steps"]
    assert [list(h.token_ids) for h in hypotheses] == case["token_ids"]
    np.testing.assert_allclose([h.score for h in hypotheses], case["scores"], rtol=0, atol=2e-6)


def test_recordings_cover_early_ends_and_the_limit() -> None:
    assert any(c["steps"] < c["max_new_tokens"] for c in RECORDED)
    assert any(c["steps"] == c["max_new_tokens"] for c in RECORDED)


def one_hot(*probabilities: list[float]) -> np.ndarray[Any, Any]:
    return np.log(np.array(probabilities, np.float32))


def test_scores_are_divided_by_the_length_with_the_stop_id() -> None:
    beams = BeamSearch(2, (0,))
    beams.advance(one_hot([0.1, 0.6, 0.3], [0.1, 0.6, 0.3]))
    beams.advance(one_hot([0.8, 0.1, 0.1], [0.8, 0.1, 0.1]))
    best, second = beams.hypotheses()
    assert (best.token_ids, second.token_ids) == ((1, 0), (2, 0))
    assert best.stopped and second.stopped
    assert best.score == pytest.approx(np.log(0.6 * 0.8) / 2, abs=1e-6)


def test_a_stop_id_outside_the_best_beams_is_not_a_hypothesis() -> None:
    # Ranked: 2, then the stop ids 0 and 1, then the rest. Stop id 1 has rank 2 of 2 beams, so it does not count,
    # although it would be second in the end: all ways on from 2 are unlikely.
    first = [0.3, 0.2, 0.4, *[0.1 / 97] * 97]
    even = [1e-6, 1e-6, *[0.01] * 98]
    beams = BeamSearch(2, (0, 1))
    beams.advance(one_hot(first, first))
    beams.advance(one_hot(even, even))
    assert [(h.token_ids[0], h.stopped) for h in beams.hypotheses()] == [(0, True), (2, False)]


def test_any_stop_id_ends_a_beam_and_the_first_is_written() -> None:
    beams = BeamSearch(2, (5, 0))
    beams.advance(one_hot([0.9, 0.05, 0.03, 0.01, 0.005, 0.005], [0.9, 0.05, 0.03, 0.01, 0.005, 0.005]))
    assert beams.hypotheses()[0] == Hypothesis(pytest.approx(np.log(0.9), abs=1e-6), (5,), True)


def test_broken_logits_are_refused() -> None:
    with pytest.raises(ExecutionError, match="finite"):
        BeamSearch(2, (0,)).advance(np.full((2, 9), np.nan, np.float32))
