"""What `tune` times: a graph's part of a request, from as much of it as there is time for."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from lensc.backends.base import Array, CachedSession, Session
from lensc.backends.bundle import Manifest

from .context import Context
from .decoder import Decoder
from .embedding import EmbeddingTable
from .picture import vision_feeds
from .speculation import SIZES

PROMPT_SLICES, PROMPT_TEXT, NEW_TOKENS = 10, 32, 64
"""The request."""
LEAST_RUN_S = 0.02
"""A run that is shorter says more of the clock than of the graph."""
RUN_SHARE = 0.01
"""Of the budget: what a run may take of prefill, and again of steps. Some fifty runs fit."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 8
BLOCK = 3
"""Steps of a size in a row, of which the fastest counts: the first may have to be prepared for."""


class Work(Protocol):
    """What is timed."""

    text: str

    def run(self, session: Session, chunk: int | None) -> tuple[float, Array]:
        """Do it once: milliseconds of a request, and an output to compare."""
        ...


class VisionWork:
    """One slice of whole size."""

    def __init__(self, manifest: Manifest) -> None:
        spec = manifest.model.picture
        side = spec.scale_resolution
        pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
        self._feeds = vision_feeds([pixels], spec, manifest.model.decoder.hidden_size)[0].feeds
        self._runs = 1
        self.text = f"a slice of {side} x {side}"

    def run(self, session: Session, chunk: int | None) -> tuple[float, Array]:
        """See `Work`. Runs that are too short are repeated."""
        started = time.perf_counter()
        for _ in range(self._runs):
            made = session.run(self._feeds)["image_embeds"]
        took_s = time.perf_counter() - started
        if took_s < LEAST_RUN_S:
            self._runs = 1 + int(self._runs * LEAST_RUN_S / max(took_s, 1e-6))
        return took_s * 1e3 / self._runs, made


class DecoderWork:
    """A prefill and steps of one token, as long as the budget has room for."""

    def __init__(self, manifest: Manifest, table: EmbeddingTable, session: Session, budget_s: float) -> None:
        self._spec = manifest.model.decoder
        self._table = table
        self._context = context = Context.of(session.spec, self._spec).tokens
        request = min(PROMPT_SLICES * manifest.model.picture.query_num + PROMPT_TEXT, context - NEW_TOKENS - 1)
        self._request = max(1, request)
        drawn = np.random.default_rng(1).integers(0, self._spec.vocab_size, self._request)
        self._embeds = table.gather(drawn)
        self._prompt, self._steps = min(16, self._request), 2
        self._timed(session, None)  # engines prepare for a graph as it is first run
        while True:  # as much as there is time for
            prefill_s, step_s = self._timed(session, None)[:2]
            if 2 * prefill_s > RUN_SHARE * budget_s or self._prompt == self._request:
                break
            self._prompt = min(2 * self._prompt, self._request)
        self._steps = max(4, min(NEW_TOKENS, int(max(RUN_SHARE * budget_s, LEAST_RUN_S) / step_s)))
        self.text = (
            f"{self._request} tokens of prompt and {NEW_TOKENS} of answer, from {self._prompt} and {self._steps}"
        )

    @property
    def prompt(self) -> int:
        """How many tokens are fed: a larger chunk than that is not seen."""
        return self._prompt

    def run(self, session: Session, chunk: int | None) -> tuple[float, Array]:
        """See `Work`."""
        prefill_s, step_s, logits = self._timed(session, chunk)
        return 1e3 * (prefill_s * self._request / self._prompt + step_s * NEW_TOKENS), logits

    def step_ratios(self, session: Session, left_s: float) -> dict[int, list[float]] | None:
        """How many times as long as a step of one token those of `SIZES` take, in each of some rounds. None if the graph, its
        context or the time that is left has no room for `LEAST_ROUNDS`.
        """
        sizes = (1, *SIZES)
        state = Decoder(session, self._spec, self._table, self._context)
        rounds = min(MOST_ROUNDS, (self._context - self._prompt) // (BLOCK * sum(sizes)) - 1)
        if rounds < LEAST_ROUNDS or state.most_rows < sizes[-1]:
            return None
        started = time.monotonic()
        state.prefill(self._prompt, self._fed)
        found: dict[int, list[float]] = {size: [] for size in SIZES}
        for number in range(rounds + 1):  # the first prepares
            took = {size: min(self._stepped(state, size) for _ in range(BLOCK)) for size in sizes}
            round_s = (time.monotonic() - started) / (number + 1)
            for size in SIZES if number else ():
                found[size].append(took[size] / took[1])
            if number < LEAST_ROUNDS and round_s * (LEAST_ROUNDS - number) > left_s - (time.monotonic() - started):
                return None
            if time.monotonic() - started > left_s:
                break
        return found

    def _stepped(self, state: Decoder, tokens: int) -> float:
        started = time.perf_counter()
        state.decode_tokens(np.arange(tokens) % self._spec.vocab_size)
        return time.perf_counter() - started

    def _fed(self, start: int, end: int) -> Array:
        return self._embeds[start:end]

    def _timed(self, session: Session, chunk: int | None) -> tuple[float, float, Array]:
        chunked = session if chunk is None or not isinstance(session, CachedSession) else Chunked(session, chunk)
        state = Decoder(chunked, self._spec, self._table, self._prompt + self._steps)
        started = time.perf_counter()
        logits = state.prefill(self._prompt, self._fed).copy()
        fed = time.perf_counter()
        for i in range(self._steps):
            state.decode_one_token(np.array([i % self._spec.vocab_size]))
        return fed - started, (time.perf_counter() - fed) / self._steps, logits


class Chunked:
    """A session whose prompts are fed in other pieces."""

    def __init__(self, session: CachedSession, prefill_chunk: int) -> None:
        self.spec, self.prefill_chunk = session.spec, prefill_chunk
        self.run, self.new_cache, self.step = session.run, session.new_cache, session.step

    def close(self) -> None:
        """Nothing: the session is its owner's."""
