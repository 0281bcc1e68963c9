"""One sequence, or one set of beams, in the decoder: embeddings go in, logits come out, the KV cache grows in place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from lensc.backends.base import Array, Cache, CachedSession, Session
from lensc.backends.bundle import DecoderSpec
from lensc.backends.errors import ExecutionError, GraphError, PromptError
from lensc.export.graph import GraphSpec

from .costs import Curve
from .embedding import EmbeddingTable
from .kv_cache import KVCache
from .timeline import Timeline

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

LEAST_PIECE = 32
"""Tokens at the end of a prompt that are worth a pass over the weights."""

PREFILL_CHUNK = 512
"""Most tokens fed in one run where the host keeps the cache. An engine without fused attention makes a float32[heads, tokens, past + tokens] per
layer: 512 MiB for 32 heads at a context of 8192, against 8 GiB if the whole prompt went in at once."""


def pieces(tokens: int, chunk: int, most: int | None = None) -> Iterator[tuple[int, int]]:
    """Where the pieces begin and end that `tokens` are fed in: each of `most`, and none of more than `chunk`.

    What is left is no piece of its own, if it is little and the last one can take it.
    """
    size, start = min(chunk, most or chunk), 0
    while start < tokens:
        end = min(start + size, tokens)
        if tokens - end < LEAST_PIECE and tokens - start <= chunk:
            end = tokens
        yield start, end
        start = end


class Cancelled(Exception):  # noqa: N818  (not an error: the caller asked for it)
    """Raised between two runs when the caller wants no more."""


class DecoderError(ExecutionError):
    """The decoder's device failed, or gave what no decoder gives: another device may go on. Its cause is the engine's error."""


SAMPLES = 16
"""Logits that are compared with those of the step before."""


class Decoder:
    """State of one generation. `prompt_length` is where generated tokens begin, which is where beams differ."""

    def __init__(
        self,
        session: Session,
        spec: DecoderSpec,
        table: EmbeddingTable,
        capacity: int,
        prefill_ms: Curve | None = None,
    ) -> None:
        """`prefill_ms` is told what feeding so many tokens of one sequence took."""
        self._prefill_ms = prefill_ms
        self._session = with_cache(session, spec)
        self._cache: Cache | None = None
        self._capacity = capacity
        self.prompt_length = 0
        self._table = table
        self._vocab_size = spec.vocab_size
        self._last = np.zeros(1, np.int64)
        self._logits: F32 | None = None
        self._rows: dict[int, F32] = {}
        self._seen: tuple[int, bytes] | None = None
        """How many tokens were fed, and some of the logits behind them."""
        tokens = session.spec.dims.get("tokens")
        chunk = self._session.prefill_chunk
        self.chunk = chunk if tokens is None else min(chunk, tokens.max)
        """Most tokens that are fed at once."""
        rows = session.spec.dims.get("rows")
        self.most_rows = min(self.chunk, self.chunk if rows is None else rows.max)
        """How many tokens can be fed at once with the logits of each."""

    @property
    def cache(self) -> Cache:
        """What was fed; made when it is first asked for."""
        if self._cache is None:
            self._cache = self._session.new_cache(self._capacity)
        return self._cache

    @property
    def length(self) -> int:
        """How many tokens were fed."""
        return 0 if self._cache is None else self._cache.length

    @property
    def used_bytes(self) -> int:
        """Bytes of the keys and values of what was fed."""
        return 0 if self._cache is None else self._cache.used_bytes

    def resume(self, cache: Cache) -> None:
        """Go on after the tokens of `cache`, of this session."""
        self._cache = cache

    def release(self) -> Cache | None:
        """Give up what was fed, if anything was: it is the caller's from now on."""
        cache, self._cache = self._cache, None
        return cache

    def prefill(
        self,
        tokens: int,
        embeds: Callable[[int, int], F32],
        should_stop: Callable[[], bool] | None = None,
        most: int | None = None,
        timeline: Timeline | None = None,
    ) -> F32:
        """Feed the prompt, or the `tokens` that are left of it; return float32[vocab], the logits of its last position.

        `embeds(start, end)` gives float32[end - start, D]; the rest as for `feed`.
        """
        logits: F32 = self.feed(tokens, lambda start, end: embeds(start, end)[None], should_stop, most, timeline)[0]
        self.prompt_length = self.cache.length
        return logits

    def feed(
        self,
        tokens: int,
        embeds: Callable[[int, int], F32],
        should_stop: Callable[[], bool] | None = None,
        most: int | None = None,
        timeline: Timeline | None = None,
    ) -> F32:
        """Feed `tokens` of each sequence, in pieces; return float32[batch, vocab], the logits of the last position.

        `embeds(start, end)` gives float32[batch, end - start, D], and is asked for one piece after another, each of the
        session's `prefill_chunk` tokens, or `most`, if that is less. Raises Cancelled between two pieces.
        """
        logits = np.empty((0, 0), np.float32)
        for start, end in pieces(tokens, self.chunk, most):
            if should_stop is not None and should_stop():
                raise Cancelled
            piece = embeds(start, end)
            started = time.perf_counter()
            logits = self.run(piece, np.array([end - start - 1]))[:, 0]
            if self._prefill_ms is not None and len(piece) == 1:
                self._prefill_ms.add(end - start, (time.perf_counter() - started) * 1e3)
            if timeline is not None:
                timeline.add("decoder", f"feed {end - start} tokens", started, first=self.length - (end - start))
        return logits

    def decode_one_token(self, tokens: I64) -> F32:
        """Feed one token per sequence, `tokens: int64[batch]`; return float32[batch, vocab].

        The result is overwritten by the next call: copy it to keep it.
        """
        embeds = self._table.gather(tokens)[:, None]
        shape = (len(tokens), 1, self._vocab_size)
        if self._logits is None or self._logits.shape != shape:
            # One buffer for all steps: at 128,256 ids a fresh one costs a page fault per 4 KiB, 125 in every step.
            self._logits = np.empty(shape, np.float32)
        return self._run(embeds, self._last, self._logits)[:, 0]

    def decode_tokens(self, tokens: I64) -> F32:
        """Feed several tokens of one sequence, `tokens: int64[n]`; return float32[n, vocab], the logits after each.

        The result is overwritten by the next call with as many.
        """
        count = len(tokens)
        if count not in self._rows:
            self._rows[count] = np.empty((1, count, self._vocab_size), np.float32)
        logits: F32 = self._run(self._table.gather(tokens)[None], np.arange(count), self._rows[count])[0]
        return logits

    def run(self, embeds: F32, logit_positions: I64) -> F32:
        """Feed `embeds: float32[batch, tokens, D]`; return float32[batch, rows, vocab].

        The rows are the logits at `logit_positions: int64[rows]`, which count from the first of these tokens.
        """
        shape = (len(embeds), len(logit_positions), self._vocab_size)
        return self._run(np.ascontiguousarray(embeds), logit_positions, np.empty(shape, np.float32))

    def fork(self, beams: int) -> None:
        """Continue as `beams` equal sequences."""
        with _blamed():
            self._cache = self.cache.fork(beams)

    def reorder(self, parents: I64) -> None:
        """Let sequence i continue sequence `parents[i]`."""
        with _blamed():
            self.cache.reorder(parents, self.prompt_length)

    def trim(self, length: int) -> None:
        """Forget what was fed from `length` on."""
        with _blamed():
            self.cache.trim(length)

    def _run(self, embeds: F32, logit_positions: I64, logits: F32) -> F32:
        """Raises DecoderError, also for logits that `_check` refuses."""
        with _blamed():
            length = self.cache.length
            self._step(length, embeds, logit_positions, logits)
            self._check(length, logits.reshape(-1, logits.shape[-1]))
        return logits

    def _step(self, length: int, embeds: F32, logit_positions: I64, logits: F32) -> None:
        logits[..., 0] = np.nan  # left there by an engine that writes nothing
        feeds: dict[str, Array] = {
            "inputs_embeds": embeds,
            "position_ids": np.arange(length, length + embeds.shape[1]),
            "logit_positions": logit_positions,
        }
        self._session.step(feeds, self.cache, {"logits": logits})

    def _check(self, length: int, logits: F32) -> None:
        """Raise ExecutionError for `logits: float32[rows, vocab]` that no decoder gives: not finite, all equal, or those of
        the step before.

        That is all that can be seen at the price of one maximum; wrong numbers that look like logits are not found.
        """
        for row in logits:
            largest = float(row.max())
            if not math.isfinite(largest):
                at = int(row.argmax())
                raise ExecutionError(f"decoder: logits hold {row[at]} at id {at}, expected finite numbers")
            if row[0] == largest == row[-1] and row.min() == largest:
                raise ExecutionError(f"decoder: all logits are {largest}, expected one for each id")
        if not len(logits):
            return
        sample = logits[-1, :: max(1, logits.shape[1] // SAMPLES)].tobytes()
        if self._seen is not None and self._seen[0] != length and self._seen[1] == sample:
            raise ExecutionError("decoder: the logits are those of the step before, expected others for another token")
        self._seen = length, sample


@contextmanager
def _blamed() -> Iterator[None]:
    """What an engine raises inside is the decoder's error."""
    try:
        yield
    except DecoderError:
        raise
    except ExecutionError as error:
        raise DecoderError(str(error)) from error


class HostCachedSession:
    """A decoder Session that is fed the past and returns new rows, with its cache in arrays of the host."""

    def __init__(self, session: Session, decoder: DecoderSpec) -> None:
        self.spec = session.spec
        self.prefill_chunk = PREFILL_CHUNK
        self._session = session
        self._decoder = decoder

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """See `CachedSession.new_cache`."""
        return KVCache(self._decoder, capacity, batch)

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """See `CachedSession.step`: the engine reads the filled rows and writes behind them."""
        assert isinstance(cache, KVCache)
        tokens = feeds["inputs_embeds"].shape[1]
        outputs = self._session.run({**feeds, **cache.past()}, {**(out or {}), **cache.slots(tokens)})
        cache.advance(tokens)
        return outputs

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`."""
        return self._session.run(feeds, out)

    def close(self) -> None:
        """See `Session.close`."""
        self._session.close()


def with_cache(session: Session, decoder: DecoderSpec) -> CachedSession:
    """`session`, or one that keeps its cache on the host if the engine keeps none."""
    return session if isinstance(session, CachedSession) else HostCachedSession(session, decoder)


def scatter(embeds: F32, image_bounds: I64, image_embeds: Sequence[F32]) -> None:
    """Write `image_embeds`, a float32[Q, D] for each slice, over the rows of `embeds` in `image_bounds: int64[slices, 2]`.

    What lies before the first row, with a negative bound, or behind the last is left out.
    """
    if len(image_bounds) != len(image_embeds):
        raise PromptError(f"prompt has {len(image_bounds)} slices, the pictures have {len(image_embeds)}")
    for (start, end), rows in zip(image_bounds.tolist(), image_embeds, strict=True):
        first, last = max(start, 0), min(end, len(embeds))
        if first < last:
            embeds[first:last] = rows[first - start : last - start]


def check_graph(graph: GraphSpec, decoder: DecoderSpec) -> None:
    """Raise GraphError if `graph` is not the decoder that `decoder` describes, naming every difference."""
    wanted = {
        "inputs_embeds": ("batch", "tokens", decoder.hidden_size),
        "position_ids": ("tokens",),
        "logit_positions": ("rows",),
        **{name: ("past", "batch", decoder.num_kv_heads, decoder.head_dim) for name in _names("past_", decoder)},
    }
    made = {
        "logits": ("batch", "rows", decoder.vocab_size),
        **{name: ("tokens", "batch", decoder.num_kv_heads, decoder.head_dim) for name in _names("", decoder)},
    }
    problems: list[str] = []
    for expected, tensors in ((wanted, graph.inputs), (made, graph.outputs)):
        found = {t.name: t for t in tensors}
        problems += [f"{name} is missing" for name in expected if name not in found]
        problems += [f"{name} is not known" for name in found if name not in expected]
        for name, shape in expected.items():
            got = found[name].shape if name in found else shape
            sizes = zip(shape, got, strict=False)
            if len(got) != len(shape) or any(isinstance(s, int) and s != g for s, g in sizes):
                problems.append(f"{found[name]}: expected [{', '.join(map(str, shape))}]")
    if problems:
        raise GraphError(f"graph {graph.name} does not fit the model: " + "; ".join(problems[:20]))


def _names(prefix: str, decoder: DecoderSpec) -> Iterator[str]:
    return (f"{prefix}{kind}.{i}" for i in range(decoder.num_layers) for kind in ("key", "value"))
