"""Pictures and words in, words out: the public face of the runtime.

A `VLM` holds a model's sessions, tokenizer and embedding table. It knows no engine: the sessions may be any backend's,
or the reference model's. Calls from several threads are safe; their runs take turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from lensc.backends.base import Array, Session
from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import ExecutionError, GraphError, InputError, LensError, UsageError
from lensc.export.graph import GraphSpec

from . import conversation, decoder, vision
from .budget import Cuts, Fitted, Fitting, Graphs
from .context import Context, check_policy
from .conversation import NOBODY, Identity, Restored
from .decoder import DecoderError
from .embedding import EmbeddingTable
from .events import Event
from .generation import Generation, Request
from .loader import Loader
from .options import GenerationOptions, Parameters, resolve
from .overlap import Overlap, decide, piece_tokens
from .picture import PictureSlices, PictureSource, open_picture, slice_picture
from .picture_cache import PictureCache
from .plan import Plan
from .prefix_cache import PREFIX_BYTES, Held, PrefixCache, rows_of
from .prompt import Message, Prompt, Tokenizer, build_prompt, parse_messages, pictures_of, user_messages
from .result import Metrics, Result
from .sequential import Turns, one_in_turn
from .sharing import CLOSED, LoadedDecoder, SharedSession, shared
from .speculation import MOST_DRAFTED, Pace
from .stream import Stream
from .timeline import Timeline
from .vision import VisionEncoder

__all__ = ["VLM", "Metrics", "Result", "Stream"]


class VLM:
    """A loaded model. Close it, or use it as a context manager, to free what its engines hold.

    `embed_table: float16 or float32[vocab, D]`, or an `EmbeddingTable`, may be memory-mapped. `plan` says where the graphs
    run, if known, `identity` whose saved conversations can be gone on with. `prefix_cache_bytes` of KV caches are kept for prompts that begin like an earlier one; 0 keeps none. `picture_cache`: where embeddings are kept on disk.
    `turns`: that the sessions take, if only one graph is loaded at a time. A peak above `max_memory_bytes` is a note.
    `overlap`: whether pictures are encoded beside the prompt, None for the rule of `overlap.decide`.
    `loader` loads a graph elsewhere when its device fails in the middle of an answer; without one that is an error.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        sessions: Mapping[str, Session],
        embed_table: Array | EmbeddingTable,
        plan: Plan | None = None,
        prefix_cache_bytes: int = PREFIX_BYTES,
        identity: Identity = NOBODY,
        picture_cache: PictureCache | None = None,
        turns: Turns | None = None,
        max_memory_bytes: int | None = None,
        loader: Loader | None = None,
        overlap: bool | None = None,
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.plan = plan
        self._loader = loader
        self._events: list[Event] = [] if loader is None else loader.events
        self._pictures = picture_cache
        self._replanning = threading.Lock()
        missing = [name for name in ("vision", "decoder") if name not in sessions]
        if missing:
            raise GraphError(f"model {spec.name}: no graph {', '.join(missing)}; expected vision and decoder")
        self._closed = False
        self._vision_session = shared(sessions["vision"])
        self._table = EmbeddingTable.of(embed_table)
        width = spec.decoder.hidden_size
        vision.check_graph(sessions["vision"].spec, spec.picture, width)
        decoder.check_graph(sessions["decoder"].spec, spec.decoder)
        self._table.check(spec.decoder)
        self._vision = VisionEncoder(
            self._vision_session,
            spec.picture,
            width,
            picture_cache,
            getattr(sessions["vision"], "ready", None),
            self._replan_vision,
        )
        self._cuts = Cuts()
        self._prefix_cache_bytes = prefix_cache_bytes
        self._decoder = self._loaded(sessions["decoder"])
        self._identity = identity
        self._turns = turns
        self._max_memory_bytes = max_memory_bytes
        self._overlap = overlap
        if turns is not None:
            turns.on_release = self._released

    @property
    def overlap(self) -> Overlap:
        """Whether pictures are encoded while the prompt before them is fed, and why, or why not."""
        return decide(self.plan, self._turns is not None, self._overlap)

    @overload
    def generate(
        self,
        prompt: str,
        images: Sequence[PictureSource] = ...,
        *,
        system_prompt: str = ...,
        stream: Literal[False] = ...,
        strip_pad: bool | None = ...,
        should_stop: Callable[[], bool] | None = ...,
        **parameters: Unpack[Parameters],
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: str,
        images: Sequence[PictureSource] = ...,
        *,
        system_prompt: str = ...,
        stream: Literal[True],
        strip_pad: bool | None = ...,
        should_stop: Callable[[], bool] | None = ...,
        **parameters: Unpack[Parameters],
    ) -> Stream: ...

    def generate(
        self,
        prompt: str,
        images: Sequence[PictureSource] = (),
        *,
        system_prompt: str = "",
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
        strip_pad: bool | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Result | Stream:
        """Answer one question about `images` (paths, bytes or PIL images), which stand before the text.

        Greedy if nothing is given. `do_sample=True` draws with the model's temperature, top-k, top-p and penalty
        (officially 0.7, 100, 0.8, 1.05) where they are not given; `num_beams=3` is what the official code runs without
        sampling, with penalty 1.2. `seed` makes draws repeatable; `max_new_tokens` defaults to the model's 1024.
        `prompt_lookup_num_tokens`: the most tokens that are guessed ahead where that pays, 0 to 7 (the default); it
        changes the speed and no token, and nothing is guessed in a beam search.
        `max_ttft_ms`: pictures are cut into as few slices as it takes for the first token to come within so many
        milliseconds, by what this device took before; notes say what was given up, and if it cannot be kept.

        `stream=True` returns a `Stream` of pieces. `strip_pad` removes id 0, which is `!`, from the answer: by default,
        as officially, the whole answer has it removed and a stream keeps it. `should_stop` is asked between steps.

        Raises UsageError, PictureError, or PromptError if the prompt does not fit the context.
        """
        if not isinstance(prompt, str):
            raise UsageError(f"prompt: got {type(prompt).__name__}; expected a string")
        options = resolve(
            self.spec.generation,
            do_sample=do_sample,
            num_beams=num_beams,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            max_new_tokens=max_new_tokens,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            max_ttft_ms=max_ttft_ms,
            stream=stream,
            most_drafted=self._most_drafted,
        )
        messages = user_messages(prompt, images, system_prompt)
        return self._answer(messages, options, stream, strip_pad, should_stop)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[PictureSource] = ...,
        *,
        stream: Literal[False] = ...,
        strip_pad: bool | None = ...,
        should_stop: Callable[[], bool] | None = ...,
        when_full: str = ...,
        **parameters: Unpack[Parameters],
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[PictureSource] = ...,
        *,
        stream: Literal[True],
        strip_pad: bool | None = ...,
        should_stop: Callable[[], bool] | None = ...,
        when_full: str = ...,
        **parameters: Unpack[Parameters],
    ) -> Stream: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[PictureSource] = (),
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
        strip_pad: bool | None = None,
        should_stop: Callable[[], bool] | None = None,
        when_full: str = "error",
    ) -> Result | Stream:
        """Answer a conversation: a list of `{"role", "content"}`, see `parse_messages`; the rest as for `generate`.

        `images` are the pictures of those `{"type": "image"}` parts that name none. Pictures seen in an earlier call
        are not encoded again, and what the conversation has in common with an earlier call is not fed again.
        `when_full="drop_oldest"`: of a conversation longer than the context the oldest turns are left out; see `context`.
        """
        check_policy(when_full)
        options = resolve(
            self.spec.generation,
            do_sample=do_sample,
            num_beams=num_beams,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            max_new_tokens=max_new_tokens,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            max_ttft_ms=max_ttft_ms,
            stream=stream,
            most_drafted=self._most_drafted,
        )
        said = parse_messages(messages, images)
        return self._answer(said, options, stream, strip_pad, should_stop, when_full == "drop_oldest")

    @property
    def context(self) -> Context:
        """How many tokens prompt and answer may have together."""
        return Context.of(self._decoder.session.spec, self.spec.decoder)

    def prepare(
        self, messages: Sequence[Message], max_ttft_ms: float | None = None, keep_room_for: int | None = None
    ) -> Request:
        """Open and slice the pictures of `messages` and make the prompt. Nothing runs on an engine, unless there is a
        `max_ttft_ms` and nothing was measured yet. `keep_room_for` tokens of answer the oldest turns are left out.
        """
        started, timeline = time.perf_counter(), Timeline()
        timeline.titles = {p.graph: f"{p.graph} on {p.effective}" for p in (self.plan.placements if self.plan else ())}
        sliced, fitted, dropped = [], None, None
        if max_ttft_ms is None or keep_room_for is not None:
            for i, part in enumerate(pictures_of(messages), 1):
                with timeline.span("host", f"open and cut picture {i}"):
                    sliced.append(slice_picture(part.source, self.spec.picture))
        if keep_room_for is not None:
            with timeline.span("host", "choose what fits the context"):
                whole = self._prompt(messages, sliced)
                header = self.tokenizer.special.start_header
                messages, dropped = self.context.kept(messages, whole, header, keep_room_for)
                sliced = sliced[len(sliced) - len(pictures_of(messages)) :]
        if max_ttft_ms is not None:
            fitted = self._fitted(messages, max_ttft_ms, started, timeline)
            sliced = fitted.sliced
        with timeline.span("host", "make the prompt"):
            prompt = self._prompt(messages, sliced)
        self.context.check_fits(prompt, self.spec, messages)
        notes = [dropped] if dropped else []
        notes += [f"picture {i}: {note}" for i, s in enumerate(sliced, 1) for note in s.notes]
        slices = tuple(pixels for s in sliced for pixels in s.pixels)
        counts = tuple(len(s.pixels) for s in sliced)
        request = Request(prompt, slices, counts, tuple(notes), (time.perf_counter() - started) * 1e3, timeline)
        if fitted is None:
            return request
        notes += fitted.notes
        estimate_ms, given_up = fitted.estimate_ms, fitted.slices_given_up
        return dataclasses.replace(request, notes=tuple(notes), ttft_estimate_ms=estimate_ms, slices_given_up=given_up)

    def _prompt(self, messages: Sequence[Message], sliced: Sequence[PictureSlices]) -> Prompt:
        return build_prompt(messages, [s.plan for s in sliced], self.tokenizer, self.spec.picture.query_num)

    def _fitted(self, messages: Sequence[Message], budget_ms: float, started_s: float, timeline: Timeline) -> Fitted:
        """The pictures of `messages`, cut for a budget; see `budget`."""
        decoding = decoder.Decoder(self._decoder.session, self.spec.decoder, self._table, 1)
        piece = piece_tokens(self.spec.picture.query_num)
        graphs = Graphs(self._vision, self._decoder, decoding.chunk, piece, self.overlap.on, self._turns)
        with timeline.span("host", "open and cut pictures"):
            pictures = [open_picture(part.source) for part in pictures_of(messages)]
            fitting = Fitting(self.spec.picture, self.tokenizer, graphs, self._cuts, messages, pictures, started_s)
        if fitting.undecided:
            # What every cut begins with is encoded and fed, and found by the answer among earlier ones.
            end = int(fitting.prompt.image_bounds[0, 1])
            beginning = Prompt(fitting.prompt.ids[:end], fitting.prompt.image_bounds[:1])
            request = Request(beginning, tuple(fitting.slices[:1]), (1,), (), 0.0, timeline)
            for _ in self.begin(request, resolve(self.spec.generation, max_new_tokens=1)).tokens():
                pass
        with timeline.span("host", "choose how finely to cut"):
            return fitting.fit(budget_ms)

    def begin(
        self, request: Request, options: GenerationOptions, should_stop: Callable[[], bool] | None = None
    ) -> Generation:
        """Set up the generation of an answer to `request`, of as many tokens as the context leaves."""
        beams = self._decoder.session.spec.dims.get("batch")
        if beams is not None and options.num_beams > beams.max:
            raise UsageError(f"num_beams={options.num_beams}: this bundle's decoder was made for at most {beams.max}")
        most, cut_note = self.context.limit(options, len(request.prompt.ids))
        request = dataclasses.replace(request, cut_note=cut_note)
        options = dataclasses.replace(options, max_new_tokens=most)
        overlap = self.overlap
        if self._overlap and not overlap.on and request.slices:
            note = f"pictures are not encoded beside the prompt: {overlap.reason}"
            request = dataclasses.replace(request, notes=(*request.notes, note))
        return Generation(
            request,
            options,
            self.spec,
            self._vision,
            self._decoder,
            self._table,
            self._replan_decoder,
            self._events,
            self._turns,
            self._max_memory_bytes,
            should_stop,
            overlap.on,
        )

    def save(self, path: str | Path, messages: Sequence[Mapping[str, Any]]) -> int:
        """Write a conversation to a file, with its pictures and what the KV cache holds of it; return how many tokens that
        are. A file that was there is replaced, if it is a conversation.

        Raises StorageError if it cannot be written, UsageError for messages that `chat` would not take.
        """
        parsed = parse_messages(messages)
        sliced = [slice_picture(part.source, self.spec.picture) for part in pictures_of(parsed)]
        prompt = self._prompt(parsed, sliced)
        rows = rows_of(prompt, self._vision.keys([pixels for s in sliced for pixels in s.pixels]))
        prefixes = self._decoder.prefixes
        cache = prefixes.take(rows)
        held = None if cache is None else Held(rows[: cache.length], cache)
        try:
            conversation.write(Path(path), parsed, self.spec.name, self._identity, held)
        finally:
            if held is not None:
                prefixes.give(held.rows, held.cache)
        return 0 if held is None else len(held.rows)

    def restore(self, path: str | Path) -> Restored:
        """Read what `save` wrote: messages to go on with. Where the same graphs run on the same target, what the KV cache
        held is not fed again.

        Raises InputError for a file that is no conversation, is damaged, or belongs to another model.
        """
        found = conversation.read(Path(path), self.spec.name, self._identity)
        if found.rows is None:
            return Restored(found.messages, 0, found.notes)
        loaded = self._decoder
        try:
            cache = decoder.with_cache(loaded.session, self.spec.decoder).new_cache(max(1, len(found.rows)))
            cache.restore(found.arrays)
        except UsageError as error:
            raise InputError(f"{path}: {error}") from error
        if cache.length != len(found.rows):
            raise InputError(f"{path}: {len(found.rows)} rows of a prompt and {cache.length} tokens in its KV cache")
        loaded.prefixes.give(found.rows, cache)
        return Restored(found.messages, cache.length, found.notes)

    def forget(self, pictures: bool = False) -> None:
        """Let go of the KV caches that earlier answers left, and of the embeddings of pictures in memory, too."""
        self._decoder.prefixes.clear()
        if pictures:
            self._vision.forget()

    def _released(self, session: Session) -> None:
        """A graph is closed to make room: KV caches of an engine that holds them itself are given up."""
        if self._turns is not None and not self._turns.caches_outlive_decoder and session.spec.name == "decoder":
            self._decoder.prefixes.clear()

    def close(self) -> None:
        """Free what the engines hold. Generating afterwards is an error; closing again is not."""
        self._closed = True
        self._decoder.prefixes.clear(for_good=True)
        self._vision_session.close()
        self._decoder.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def events(self) -> tuple[Event, ...]:
        """What happened to graphs and devices since the model was loaded, and while it was."""
        return tuple(self._events)

    @property
    def _most_drafted(self) -> int:
        """How many tokens are guessed at most where a call does not say."""
        found = None if self._loader is None else self._loader.settings(self._loader.plan["decoder"]).drafted
        return MOST_DRAFTED if found is None else found

    def _loaded(self, session: Session) -> LoadedDecoder:
        return LoadedDecoder(shared(session), PrefixCache(self._prefix_cache_bytes), Pace())

    def _replan_decoder(self, failed: LoadedDecoder, error: DecoderError) -> LoadedDecoder:
        """The decoder to go on with when one has failed. Raises what it failed of if there is none."""
        with self._replanning:
            if self._decoder is failed:
                cause = error.__cause__
                session = self._replaced(failed.session, cause if isinstance(cause, ExecutionError) else error)
                failed.prefixes.clear(for_good=True)
                self._decoder = self._loaded(session)
            return self._decoder

    def _replan_vision(self, failed: Session, error: ExecutionError) -> Session:
        """The same for the vision graph."""
        with self._replanning:
            if self._vision_session is failed:
                self._vision_session = shared(self._replaced(self._vision_session, error))
                if self._pictures is not None and self._loader is not None and not self._loader.trusted("vision"):
                    self._pictures.only_read(f"vision was not judged on {self._loader.plan['vision'].effective}")
            return self._vision_session

    def _replaced(self, failed: SharedSession, error: ExecutionError) -> Session:
        """A graph loaded elsewhere. Raises `error` where it may not be, or cannot."""
        if self._loader is None or self._closed:
            raise error
        name = failed.spec.name
        session = failed.give_up(self._loader.give_up(name, error))
        try:
            made = self._opened_elsewhere(failed.spec, session, self._loader)
        except LensError as nothing:
            failed.give_up(f"{name} has failed and nothing takes its place: {nothing}; load the bundle again")
            raise
        self.plan, self._identity = self._loader.plan, self._loader.identity()
        return made

    def _opened_elsewhere(self, spec: GraphSpec, session: Session | None, loader: Loader) -> Session:
        """A graph where it is planned now, after the session that has failed was closed."""
        if self._turns is not None:
            with self._turns.lock:
                self._turns.release()
                return one_in_turn(self._turns, spec)
        if session is not None:
            with contextlib.suppress(LensError):  # it has failed already
                session.close()
        return loader.open(spec.name)

    def _answer(
        self,
        messages: Sequence[Message],
        options: GenerationOptions,
        stream: bool,
        strip_pad: bool | None,
        should_stop: Callable[[], bool] | None,
        drops_oldest: bool = False,
    ) -> Result | Stream:
        if self._closed:
            raise UsageError(CLOSED)
        room = options.max_new_tokens if drops_oldest else None
        generation = self.begin(self.prepare(messages, options.max_ttft_ms, room), options, should_stop)
        if stream:
            return Stream(generation, self.tokenizer.decode_stream(strip_pad or False))
        for _ in generation.tokens():
            pass
        strip = True if strip_pad is None else strip_pad
        return generation.result(self.tokenizer.decode_answer(generation.token_ids, strip))
