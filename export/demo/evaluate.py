"""Score answers on held-out pictures: exact match, and character error rate where there is text to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from PIL import Image

from .samples import Sample

Answer = Callable[[Image.Image, str], str]
"""A picture and a question -> the answer."""


@dataclass(frozen=True)
class Outcome:
    """One picture's answer beside the right one."""

    sample: Sample
    answer: str

    @property
    def exact(self) -> bool:
        return self.answer == self.sample.answer

    @property
    def edits(self) -> int:
        return edit_distance(self.answer, self.sample.answer)


@dataclass(frozen=True)
class Score:
    """Of one task: `exact` and `cer` are shares (0 to 1); `cer` is edits over characters, summed over all pictures."""

    task: str
    pictures: int
    exact: float
    cer: float
    by_kind: dict[str, float]
    """Exact match for each kind of content."""


def evaluate(samples: Iterable[Sample], answer: Answer) -> list[Outcome]:
    """Ask `answer` about every sample."""
    return [Outcome(sample, answer(sample.image, sample.question)) for sample in samples]


def score(outcomes: list[Outcome]) -> Score:
    """Sum up the outcomes of one task (at least one)."""
    kinds: dict[str, list[bool]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.sample.kind, []).append(outcome.exact)
    return Score(
        task=outcomes[0].sample.task,
        pictures=len(outcomes),
        exact=sum(o.exact for o in outcomes) / len(outcomes),
        cer=sum(o.edits for o in outcomes) / sum(len(o.sample.answer) for o in outcomes),
        by_kind={kind: sum(hits) / len(hits) for kind, hits in sorted(kinds.items())},
    )


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (char != other))
    return row[-1]
