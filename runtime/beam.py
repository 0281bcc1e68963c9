"""Beam search as transformers 4.40 does it by default, which is what the official code runs without sampling.

Early stopping off, length penalty 1.0, prompt not counted. The engine is not known here: a caller feeds the logits of
every beam and is told which token continues which beam, so the same search serves any cache layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lensc.backends.errors import ExecutionError

from .sampling import F32, log_softmax, penalize

FIRST_STEP_SCORE = np.float32(-1e9)
"""Score of all beams but one before the first step: they are equal there, so only one may be expanded."""


@dataclass(frozen=True)
class Hypothesis:
    """A finished beam. `score` is the sum of log-probabilities divided by the tokens it covers."""

    score: float
    token_ids: tuple[int, ...]
    """Ends in the first of the stop ids if `stopped`, whichever stop id was predicted, as in transformers."""
    stopped: bool


class BeamSearch:
    """The state of one search: open beams, finished hypotheses."""

    def __init__(self, num_beams: int, eos_token_ids: tuple[int, ...], repetition_penalty: float = 1.0) -> None:
        self.num_beams = num_beams
        self.done = False
        self._eos = eos_token_ids
        self._penalty = repetition_penalty
        self._tokens: list[tuple[int, ...]] = [()] * num_beams
        self._scores = np.full(num_beams, FIRST_STEP_SCORE)
        self._scores[0] = 0
        self._finished: list[tuple[float, tuple[int, ...], bool]] = []
        self._worst = 1e9

    @property
    def length(self) -> int:
        """How many tokens each open beam has."""
        return len(self._tokens[0])

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        """Of each open beam."""
        return self._tokens

    def advance(self, logits: F32) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Take `logits: float32[beams, vocab]`; return `(tokens, parents)`, both int64[beams].

        New beam i is old beam `parents[i]` followed by `tokens[i]`: reorder the cache by `parents`, then feed `tokens`.
        """
        if not np.isfinite(logits.max()):
            raise ExecutionError(f"decoder: logits hold {logits.max()}, expected finite numbers")
        scores = log_softmax(logits)
        scores = np.stack([penalize(s, t, self._penalty) for s, t in zip(scores, self._tokens, strict=True)])
        scores += self._scores[:, None]
        ranked = self._best(scores.reshape(-1))
        vocabulary = logits.shape[-1]

        length = self.length + 1
        parents, tokens, sums = [], [], []
        for rank, (index, score) in enumerate(ranked):
            parent, token = divmod(index, vocabulary)
            if token not in self._eos:
                parents.append(parent)
                tokens.append(token)
                sums.append(score)
            elif rank < self.num_beams:
                self._finish(score / length, self._tokens[parent], stopped=True)
            if len(tokens) == self.num_beams:
                break
        self.done = len(self._finished) >= self.num_beams and self._worst >= ranked[0][1] / length
        self._tokens = [(*self._tokens[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        self._scores = np.array(sums, np.float32)
        return np.array(tokens, np.int64), np.array(parents, np.int64)

    def hypotheses(self) -> list[Hypothesis]:
        """The best `num_beams` hypotheses, best first. Ends the search: open beams count as they stand."""
        if not self.done and self.length:
            for score, tokens in zip(self._scores.tolist(), self._tokens, strict=True):
                self._finish(score / self.length, tokens, stopped=False)
        self.done = True
        return [
            Hypothesis(score, (*tokens, self._eos[0]) if stopped else tokens, stopped)
            for score, tokens, stopped in sorted(self._finished, key=lambda h: h[0])[::-1]
        ]

    def _best(self, scores: F32) -> list[tuple[int, float]]:
        """The best flat indices and their scores, best first: enough that `num_beams` of them are no stop ids."""
        count = min(len(scores), max(2, 1 + len(self._eos)) * self.num_beams)
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        top = np.flatnonzero(scores >= least)
        top = top[np.argsort(-scores[top], kind="stable")][:count]
        return [(int(i), float(scores[i])) for i in top]

    def _finish(self, score: float, tokens: tuple[int, ...], stopped: bool) -> None:
        if len(self._finished) >= self.num_beams and score <= self._worst:
            return
        self._finished.append((score, tokens, stopped))
        if len(self._finished) > self.num_beams:
            self._finished.remove(min(self._finished, key=lambda h: h[0]))
        self._worst = min(h[0] for h in self._finished)
