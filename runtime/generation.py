"""One answer being made: pictures are encoded, the prompt is fed, tokens are chosen until something ends it.

look for an earlier answer's KV cache that holds the beginning → encode pictures → embed the rest of the prompt, put image
embeddings over the placeholders → prefill → decode one by one → leave the KV cache to the next
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lensc.backends.base import Cache
from lensc.backends.bundle import ModelSpec

from .beam import BeamSearch, Hypothesis
from .decoder import I64, Cancelled, Decoder, DecoderError, scatter
from .embedding import EmbeddingTable
from .events import Event
from .options import GenerationOptions
from .overlap import Pictures, piece_tokens
from .prefix_cache import Rows, rows_of, token_rows
from .prompt import Prompt
from .result import FinishReason, Metrics, Result, peak_memory_bytes
from .sampling import F32, greedy, penalize, sample
from .sequential import Turns
from .sharing import LoadedDecoder
from .speculation import PLACEHOLDER, Speculation
from .timeline import Span, Timeline
from .vision import EncodedSlice, VisionEncoder


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt ready to be fed: the slices of its pictures in order, and what was done to the pictures."""

    prompt: Prompt
    slices: tuple[npt.NDArray[np.uint8], ...]
    slices_per_picture: tuple[int, ...]
    notes: tuple[str, ...]
    prepare_ms: float
    timeline: Timeline = field(default_factory=Timeline)
    """What was done until now; the generation goes on with it."""
    ttft_estimate_ms: float | None = None
    slices_given_up: int = 0
    """For the sake of `max_ttft_ms`; see `budget`."""
    cut_note: str = ""
    """What is noted of an answer that did not end by itself."""


class Generation:
    """State of one answer. `tokens()` may be run once; `result` describes what it gave until then."""

    def __init__(
        self,
        request: Request,
        options: GenerationOptions,
        spec: ModelSpec,
        vision: VisionEncoder,
        decoder: LoadedDecoder,
        table: EmbeddingTable,
        replan: Callable[[LoadedDecoder, DecoderError], LoadedDecoder],
        events: Sequence[Event] = (),
        turns: Turns | None = None,
        max_memory_bytes: int | None = None,
        should_stop: Callable[[], bool] | None = None,
        overlap: bool = False,
    ) -> None:
        self.token_ids: list[int] = []
        self.hypotheses: list[Hypothesis] = []
        """What a beam search ended with, best first."""
        self.finish_reason: FinishReason | None = None
        self.timeline = request.timeline
        self._request = request
        self._options = options
        self._eos = () if options.ignore_eos else spec.generation.eos_token_ids
        self._vision = vision
        self._table = table
        self._spec = spec.decoder
        self._loaded = decoder
        # The last token is never fed, so it needs no row.
        self._capacity = len(request.prompt.ids) + options.max_new_tokens - 1
        self.decoder = self._begun()
        self._replan = replan
        self._events = events
        self._events_before = len(events)
        self._turns = turns
        self._load_ms = 0.0
        self._max_memory_bytes = max_memory_bytes
        self._should_stop = should_stop
        self._overlap = overlap
        self._piece = piece_tokens(spec.picture.query_num)
        self._cancelled = False
        self._notes = list(request.notes)
        self._encoded: list[EncodedSlice] = []
        """What became of the slices, each when it was first needed."""
        self._rows: Rows = token_rows([])
        self._prompt_cache: Cache | None = None
        self._reused_tokens = 0
        self._fed = 0
        """How many of the rows in the cache are the prompt's, or tokens that were chosen."""
        self._kv_cache_bytes = 0
        self._drafted = 0
        self._accepted = 0
        self._prefill_ms = 0.0
        self._steps = 0
        self._busy = 0.0
        self._first_token_at: float | None = None
        self._resumed = 0.0

    def cancel(self) -> None:
        """End after the run in progress. Safe to call from another thread."""
        self._cancelled = True

    def tokens(self) -> Iterator[int]:
        """Make the answer, one id at a time (all at once at the end of a beam search)."""
        self._resumed = time.perf_counter()
        intact = False
        try:
            try:
                logits = self.prefill()
            except DecoderError as error:
                logits = self._elsewhere(error, [[]])[0]
            yield from self._beams(logits) if self._options.num_beams > 1 else self._one_by_one(logits)
            intact = True
        except Cancelled:
            self.finish_reason = "cancelled"
            intact = True
        except GeneratorExit:  # a stream that is not read to its end
            intact = True
            raise
        finally:
            if intact:
                self._leave_cache()

    def prefill(self) -> F32:
        """Encode the pictures and feed the prompt; return float32[vocab], the logits of its last position.

        What an earlier answer's cache holds of it is neither encoded nor fed.
        """
        with self.timeline.span("host", "look for earlier answers"):
            keys = self._vision.keys(self._request.slices)
            self._rows = rows_of(self._request.prompt, keys)
            cache = self._loaded.prefixes.take(self._rows)
            if self._turns is not None and not self._turns.caches_outlive_decoder and not self._vision.knows(keys):
                cache = None  # it goes with the decoder, which makes room for vision
            if cache is not None:
                self.decoder.resume(cache)
                self._reused_tokens = self._fed = cache.length
        return self._feed_prompt(keys)

    def _feed_prompt(self, keys: Sequence[bytes]) -> F32:
        """Encode the pictures and feed what is left of the prompt; `keys` are those of its slices."""
        prompt, slices, timeline = self._request.prompt, self._request.slices, self.timeline
        reused = self._reused_tokens
        known = int((prompt.image_bounds[:, 1] <= reused).sum())
        bounds, tokens = prompt.image_bounds[known:] - reused, len(prompt.ids) - reused
        ahead = self._overlap and self._worth_a_thread(bounds, keys[known:], tokens)

        def encode(should_stop: Callable[[], bool]) -> Iterator[EncodedSlice]:
            return self._vision.each(slices, keys, known, should_stop, timeline)

        def embeds(start: int, end: int) -> F32:
            count = int((bounds[:, 0] < end).sum())
            pictures.wait(known + count, self._stop)
            rows = self._table.gather(prompt.ids[reused + start : reused + end])
            made = [one.embeds for one in pictures.encoded[known : known + count]]
            scatter(rows, bounds[:count] - start, [features for features in made if features is not None])
            return rows

        with Pictures(encode, ahead, timeline) as pictures:
            if not ahead:
                pictures.wait(len(slices), self._stop)
            if self._turns is not None:
                self._load(self._turns)
            started, waited_s = time.perf_counter(), pictures.waited_s
            try:
                logits = self.decoder.prefill(tokens, embeds, self._stop, self._piece if ahead else None, timeline)
            finally:
                self._fed = self.decoder.length
                self._prefill_ms = (time.perf_counter() - started - (pictures.waited_s - waited_s)) * 1e3
                self._encoded += pictures.encoded[len(self._encoded) :]
        return logits

    def _worth_a_thread(self, bounds: I64, keys: Sequence[bytes], tokens: int) -> bool:
        """Whether a piece of the prompt can be fed before the last slice that is not known is encoded."""
        new = [start for (start, _), key in zip(bounds.tolist(), keys, strict=True) if not self._vision.knows([key])]
        return bool(new) and min(self._piece, self.decoder.chunk, tokens) <= new[-1]

    def _load(self, turns: Turns) -> None:
        """Load the decoder in the place of vision, and say what had to be loaded for this answer."""
        with turns.lock:
            turns.opened("decoder")
        loads = turns.loads()
        self._load_ms = sum(load.ms for load in loads)
        self._notes += [f"{load.graph} was loaded in {load.ms:.0f} ms, to save memory" for load in loads]
        for load in loads:
            self.timeline.note(Span("host", f"load {load.graph}", load.start_s, load.end_s))

    def _note_reused(self) -> None:
        """Which slices were not encoded, and what the cache on disk has to say."""
        start = 0
        for i, count in enumerate(self._request.slices_per_picture, 1):
            reused = sum(one.from_cache for one in self._encoded[start : start + count])
            if reused:
                self._notes.append(f"picture {i}: {reused} of {count} slices reused from the cache")
            start += count
        self._notes += self._vision.notes()

    def _leave_cache(self) -> None:
        """To the next prompt that begins like this one. A beam search leaves what its beams have in common."""
        cache = self.decoder.release()
        if cache is not None:
            if cache.length > self._fed:  # guesses that nobody chose
                cache.trim(self._fed)
            self._kv_cache_bytes = cache.used_bytes
        if self._prompt_cache is not None:
            cache, self._prompt_cache = self._prompt_cache, None
        if cache is not None:
            self._loaded.prefixes.give(np.concatenate([self._rows, token_rows(self.token_ids)]), cache)

    def result(self, text: str) -> Result:
        """The answer with its metrics, once `tokens()` has ended."""
        assert self.finish_reason is not None
        decode_s = self._busy - (self._first_token_at or 0.0)
        first = self._busy if self._first_token_at is None or self.hypotheses else self._first_token_at
        self._note_reused()
        if self.finish_reason == "length" and not self._options.ignore_eos:
            self._notes.append(self._request.cut_note)
        peak, limit = peak_memory_bytes(), self._max_memory_bytes
        if limit is not None and peak is not None and peak > limit:
            self._notes.append(
                f"peak memory was {peak / 1e9:.2f} GB, {limit / 1e9:.2f} GB are allowed: an engine took more than its files"
            )
        events = tuple(self._events[self._events_before :])
        self._notes += [event.text for event in events]
        metrics = Metrics(
            prepare_ms=self._request.prepare_ms,
            load_ms=self._load_ms,
            image_ms=tuple(one.ms for one in self._encoded),
            slices_from_cache=sum(one.from_cache for one in self._encoded),
            prefill_ms=self._prefill_ms,
            overlap_ms=self.timeline.both_ms("vision", "decoder"),
            ttft_ms=self._request.prepare_ms + first * 1e3,
            decode_tokens_per_s=(self._steps - 1) / decode_s if self._steps > 1 and decode_s > 0 else None,
            ttft_estimate_ms=self._request.ttft_estimate_ms,
            slices_given_up=self._request.slices_given_up,
            prompt_tokens=len(self._request.prompt.ids),
            reused_tokens=self._reused_tokens,
            new_tokens=len(self.token_ids),
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            kv_cache_bytes=self._kv_cache_bytes,
            peak_memory_bytes=peak,
            notes=tuple(self._notes),
            events=events,
        )
        return Result(text, tuple(self.token_ids), self.finish_reason, metrics, self.timeline)

    def _one_by_one(self, logits: F32) -> Iterator[int]:
        options, ids = self._options, self.token_ids
        generator = np.random.default_rng(options.seed) if options.do_sample else None
        guesses = self._speculation()
        draft: list[int] = []
        at = 0
        rows = logits[None]
        step_s = 0.0
        timeline = self.timeline
        started = time.perf_counter()
        while True:
            token = self._choose(logits, generator)
            ids.append(token)
            self._chosen()
            timeline.add("host", "choose", started)
            if token in self._eos:
                self.finish_reason = "stop"
            elif len(ids) >= options.max_new_tokens:
                self.finish_reason = "length"
            left = time.perf_counter()
            self._busy += left - self._resumed
            yield token
            self._resumed = timeline.add("host", "reader", left)
            if self.finish_reason is not None:
                return
            if self._stop():
                raise Cancelled
            if guesses is not None:
                guesses.push(token)
            if at < len(draft) and token == draft[at]:
                at += 1
                self._fed += 1
                self._accepted += 1
                logits = rows[at]
                started = time.perf_counter()
                continue
            started = time.perf_counter()
            try:
                if at < len(draft):
                    self.decoder.trim(self._fed)
                if guesses is not None and step_s:
                    guesses.stepped(1 + len(draft), 1 + at, step_s + time.perf_counter() - started)
                draft, at = [] if guesses is None else guesses.draft(options.max_new_tokens - len(ids) - 1), 0
                self._drafted += len(draft)
                started = time.perf_counter()
                if draft:
                    rows = self.decoder.decode_tokens(np.array([token, *draft]))
                    logits = rows[0]
                else:
                    logits = self.decoder.decode_one_token(np.array([token]))[0]
                name = f"verify {len(draft)} guesses" if draft else "step"
                ended = timeline.add("decoder", name, started, token=len(ids))
                step_s, started = ended - started, ended
                self._fed += 1
            except DecoderError as error:
                logits = self._elsewhere(error, [ids])[0]
                draft, at, step_s, started = [], 0, 0.0, time.perf_counter()
                guesses = self._speculation()

    def _begun(self) -> Decoder:
        loaded = self._loaded
        return Decoder(loaded.session, self._spec, self._table, self._capacity, loaded.prefill_ms)

    def _elsewhere(self, error: DecoderError, said: Sequence[Sequence[int]]) -> F32:
        """Go on with the decoder that is loaded in the place of one that failed; raise what it failed of if none is.

        `said`: what was chosen so far, of each beam. It is fed again after the prompt, whose pictures are encoded again only
        if they are not remembered. Returns float32[beams, vocab], the logits behind it.
        """
        while True:
            self.decoder.release()
            self._prompt_cache, self._reused_tokens, self._fed = None, 0, 0
            self._loaded = self._replan(self._loaded, error)
            self.decoder = self._begun()
            try:
                return self._feed_again(np.array(said, np.int64))
            except DecoderError as another:
                error = another

    def _feed_again(self, said: npt.NDArray[np.int64]) -> F32:
        logits = self._feed_prompt(self._vision.keys(self._request.slices))[None]
        if len(said) > 1:
            self._prompt_cache = self.decoder.cache
            self.decoder.fork(len(said))

        def embeds(start: int, end: int) -> F32:
            part = said[:, start:end]
            return self._table.gather(part.reshape(-1)).reshape(*part.shape, -1)

        try:
            if said.size:
                logits = self.decoder.feed(said.shape[1], embeds, self._stop, timeline=self.timeline)
        finally:
            self._fed = self.decoder.length
        return logits

    def _speculation(self) -> Speculation | None:
        """Guesses for this answer, if they are wanted."""
        most = min(self._options.prompt_lookup_num_tokens, self.decoder.most_rows - 1)
        if most < 1 or self._options.max_new_tokens < 3:
            return None
        ids = self._request.prompt.ids.copy()
        for start, end in self._request.prompt.image_bounds.tolist():
            ids[start:end] = PLACEHOLDER
        return Speculation(self._loaded.pace, [*ids.tolist(), *self.token_ids], most)

    def _choose(self, logits: F32, generator: np.random.Generator | None) -> int:
        options = self._options
        if generator is None:
            return greedy(penalize(logits, self.token_ids, options.repetition_penalty))
        return sample(
            logits,
            self.token_ids,
            generator,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
        )

    def _beams(self, logits: F32) -> Iterator[int]:
        options = self._options
        search = BeamSearch(options.num_beams, self._eos, options.repetition_penalty)
        all_logits = np.repeat(logits[None], options.num_beams, axis=0)
        cancelled = False
        started = time.perf_counter()
        while True:
            tokens, parents = search.advance(all_logits)
            self._chosen()
            if search.done or search.length >= options.max_new_tokens:
                break
            if self._stop():
                cancelled = True
                break
            try:
                if search.length == 1:
                    # All beams come from the prompt, so there is nothing to reorder, and no copies if it ends here.
                    self._prompt_cache = self.decoder.cache
                    self.decoder.fork(options.num_beams)
                else:
                    self.decoder.reorder(parents)
                moved = self.timeline.add("host", "choose for all beams", started)
                all_logits = self.decoder.decode_one_token(tokens)
                started = self.timeline.add("decoder", f"step of {options.num_beams} beams", moved, token=search.length)
            except DecoderError as error:
                all_logits = self._elsewhere(error, search.tokens)
                started = time.perf_counter()
        self.hypotheses = search.hypotheses()
        best = self.hypotheses[0]
        self.token_ids += best.token_ids
        self.finish_reason = "cancelled" if cancelled else "stop" if best.stopped else "length"
        self._busy += time.perf_counter() - self._resumed
        yield from best.token_ids

    def _chosen(self) -> None:
        self._steps += 1
        if self._first_token_at is None:
            self._first_token_at = self._busy + time.perf_counter() - self._resumed

    def _stop(self) -> bool:
        return self._cancelled or (self._should_stop is not None and self._should_stop())
