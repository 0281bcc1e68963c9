"""What quantization costs: how far a model's choices are from the float model's, both fed the same answers.

Both are teacher-forced: each sees the prompt and the given answer, so that every position is compared with the same
history. Three figures, from fine to coarse:

    kl        Kullback-Leibler divergence of the next token's distribution from the float model's, in nats: the mean over
              all positions of the answers. It separates recipes long before an answer changes
    changed   share of the positions at which another token is the most likely one
    lost      share of the answers that the float model gives exactly as they stand, token for token and its end too, and
              the other one does not. A greedy answer is right if and only if all its positions are: this is what greedy
              decoding would lose
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensc.backends.base import Array, Session
from lensc.backends.bundle import ModelSpec
from lensc.export.calibration import Sample
from lensc.runtime.embedding import EmbeddingTable
from lensc.runtime.vision import VisionEncoder

from .parallel import pieces

NUMBERS = 1 << 20
"""Logits that are compared at once: each becomes several float64."""


class Divergence:
    """Of a candidate's logits from a reference's, for `rows` positions, seen some columns of the vocabulary at a time."""

    def __init__(self, rows: int) -> None:
        self._top = [torch.full((rows,), -torch.inf, dtype=torch.float64) for _ in range(2)]
        self._total = [torch.zeros(rows, dtype=torch.float64) for _ in range(2)]
        self._choice = [torch.zeros(rows, dtype=torch.int64) for _ in range(2)]
        self._gap = torch.zeros(rows, dtype=torch.float64)

    def add(self, reference: Tensor, candidate: Tensor, start: int = 0) -> None:
        """Count logits float[rows, n] of the ids from `start` on."""
        for rows in pieces(len(reference), NUMBERS // reference.shape[1]):
            self._add(rows, reference[rows].double(), candidate[rows].double(), start)

    def _add(self, rows: slice, reference: Tensor, candidate: Tensor, start: int) -> None:
        for side, logits in enumerate((reference, candidate)):
            most, place = logits.max(-1)
            before = self._top[side][rows]
            top = torch.maximum(before, most)
            shift = (before - top).exp()
            shares = (logits - top[:, None]).exp_()
            self._choice[side][rows] = torch.where(most > before, place + start, self._choice[side][rows])
            self._total[side][rows] = self._total[side][rows] * shift + shares.sum(-1)
            if side == 0:
                self._gap[rows] = self._gap[rows] * shift + shares.mul_(reference - candidate).sum(-1)
            self._top[side][rows] = top

    @property
    def kl(self) -> Tensor:
        """float64[rows], in nats, at least 0."""
        ours, theirs = (top + total.log() for top, total in zip(self._top, self._total, strict=True))
        return (self._gap / self._total[0] - ours + theirs).clamp_min(0)

    @property
    def choices(self) -> tuple[Tensor, Tensor]:
        """int64[rows] of the reference, and of the candidate: the most likely id, the first of equals."""
        return self._choice[0], self._choice[1]


@dataclass(frozen=True)
class Loss:
    """Sums over all positions and answers; see the module."""

    kl: float
    tokens: int
    changed: int
    answers: int
    right: int
    """Answers that the reference gives as they stand."""
    lost: int

    @property
    def mean_kl(self) -> float:
        """In nats per token."""
        return self.kl / max(1, self.tokens)

    @property
    def changed_percent(self) -> float:
        """Of 100 tokens."""
        return 100 * self.changed / max(1, self.tokens)

    @property
    def lost_percent(self) -> float:
        """Of 100 answers: points of exact match."""
        return 100 * self.lost / max(1, self.answers)


def sum_up(divergences: Iterable[Divergence], samples: Iterable[Sample], stops: Collection[int]) -> Loss:
    """The loss over `samples`, whose rows are those of `wanted_positions`. A sample without answer counts its one
    position, and no answer.
    """
    kl, counts = 0.0, np.zeros(5, np.int64)
    for divergence, sample in zip(divergences, samples, strict=True):
        answer = torch.from_numpy(sample.ids[sample.prompt_tokens :])
        kl += float(divergence.kl.sum())
        right, kept = (
            bool((choices[:-1] == answer).all()) and int(choices[-1]) in stops for choices in divergence.choices
        )
        ours, theirs = divergence.choices
        changed = int((ours != theirs).sum())
        is_answer = len(answer) > 0
        counts += [len(ours), changed, is_answer, is_answer and right, is_answer and right and not kept]
    return Loss(kl, *counts.tolist())


def wanted_positions(sample: Sample) -> Array:
    """int64[rows]: where the logits choose a token of the answer, or its end."""
    return np.arange(sample.prompt_tokens - 1, len(sample.ids))


def forced_feeds(sample: Sample, image_embeds: Sequence[Array], words: Array, spec: ModelSpec) -> dict[str, Array]:
    """One decoder call over prompt and answer, that asks for the logits at `wanted_positions`.

    words: float32[tokens, D], the table's rows of the sample's ids, which are written over where its slices stand;
    image_embeds: float32[Q, D] of each of these.
    """
    decoder = spec.decoder
    for (start, stop), rows in zip(sample.image_bounds.tolist(), image_embeds, strict=True):
        words[start:stop] = rows
    nothing = np.empty((0, 1, decoder.num_kv_heads, decoder.head_dim), np.float32)
    return {
        "inputs_embeds": words[None],
        "position_ids": np.arange(len(sample.ids)),
        "logit_positions": wanted_positions(sample),
        **{f"past_{kind}.{layer}": nothing for layer in range(decoder.num_layers) for kind in ("key", "value")},
    }


def forced_logits(
    sessions: Mapping[str, Session], table: EmbeddingTable, spec: ModelSpec, samples: Iterable[Sample]
) -> list[Array]:
    """float32[rows, vocab] of each sample, end to end: its own pictures, its own table."""
    encoder = VisionEncoder(sessions["vision"], spec.picture, spec.decoder.hidden_size)
    logits = []
    for sample in samples:
        feeds = forced_feeds(sample, list(encoder.encode(sample.slices).embeds), table.gather(sample.ids), spec)
        logits.append(sessions["decoder"].run(feeds)["logits"][0])
    return logits


def compare_logits(
    reference: Sequence[Array], candidate: Sequence[Array], samples: Sequence[Sample], stops: Collection[int]
) -> Loss:
    """The loss of a candidate whose logits, as the reference's, are those of `forced_logits`."""
    found = []
    for ours, theirs in zip(reference, candidate, strict=True):
        divergence = Divergence(len(ours))
        divergence.add(torch.from_numpy(ours), torch.from_numpy(theirs))
        found.append(divergence)
    return sum_up(found, samples, stops)
