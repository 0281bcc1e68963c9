"""The texts that guessing is judged by are what they are called, and a row that breaks the promise is told."""

from __future__ import annotations

import itertools

import pytest

from lensc.bench import record, speculation
from lensc.runtime.speculation import Pace, Speculation

TOKENS = 300


class Eager(Pace):
    """Guesses whenever there is something to guess from."""

    def best_size(self, chance: float, most: int, may_lose_s: float) -> int:
        return min(2, most)


def looked_up(text: tuple[int, ...]) -> tuple[int, int]:
    """How many tokens of `text` could be guessed, and how many of these guesses would be right."""
    guesses = Speculation(Eager(plain_s=1.0), [], 7)
    guessed = right = 0
    for token, following in itertools.pairwise(text):
        guesses.push(token)
        guesses._pace.right = dict.fromkeys(guesses._pace.right, 1.0)
        drafted = guesses.draft(1)
        guessed += bool(drafted)
        right += drafted[:1] == [following]
    return guessed, right


@pytest.mark.parametrize(
    ("name", "guessed", "right"),
    [
        ("fresh tokens", (0, 0), (0, 0)),
        ("few tokens", (250, 299), (40, 120)),
        ("decoys", (200, 299), (0, 0)),
        ("broken repeats", (150, 299), (100, 200)),
        ("repeats", (250, 299), (250, 299)),
    ],
)
def test_texts_are_what_they_are_called(name: str, guessed: tuple[int, int], right: tuple[int, int]) -> None:
    text = speculation.texts(560, TOKENS)[name].script
    assert len(text) == TOKENS and all(0 <= token < 560 for token in text)
    found = looked_up(text)
    assert guessed[0] <= found[0] <= guessed[1] and right[0] <= found[1] <= right[1], found


@pytest.mark.parametrize(
    ("row", "gains", "wrong"),
    [
        (record.Row("a", "tokens/s", None, parity="fail"), False, "changed a token"),
        (record.Row("a", "tokens/s", 96.0, pair_ratio=0.96, parity="pass"), False, "slower than 0.97"),
        (record.Row("a", "tokens/s", 98.0, pair_ratio=0.98, parity="pass"), False, ""),
        (record.Row("a", "tokens/s", 98.0, pair_ratio=0.98, parity="pass"), True, "no faster"),
        (record.Row("a", "tokens/s", 120.0, pair_ratio=1.2, parity="pass"), True, ""),
    ],
)
def test_a_broken_promise_is_told(row: record.Row, gains: bool, wrong: str) -> None:
    assert (wrong in speculation.verdict(row, gains)) and bool(wrong) == bool(speculation.verdict(row, gains))
