"""A decoder on an NPU: fixed forms for many tokens and for one, in parts, and a KV cache that lies as they take it.

The host keeps the cache, in the integers of the graph where it is quantized: 2 bytes a value. A call of any size is fed as
prefills of `tokens` and single tokens; each sequence of a batch goes alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lensc.export.graph import DimRange, GraphSpec

from ._engine_cache import EngineCache, begin_step
from ._qnn_form import HIDDEN, Form, is_key
from ._qnn_session import Run
from .base import Array, Cache, check_feeds, check_out, writeable
from .codec import decode, encode, loads
from .errors import ExecutionError, PromptError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

LARGEST = 32767


@dataclass(frozen=True)
class DecoderLayout:
    """What the host must know of a compiled decoder; it lies beside the binaries as JSON.

    `parts` name the ONNX wrapper of each part, prefill and decode, which share weights; `emulated` those without sharing, for
    hosts that emulate, or nothing if it would take too long. `scales` of keys and values by output; none where they are float.
    """

    context: int
    tokens: int
    rows: int
    groups: int
    inverse_frequencies: tuple[float, ...]
    scales: dict[str, float]
    parts: tuple[tuple[str, str], ...]
    emulated: tuple[tuple[str, str], ...]

    def limited(self, spec: GraphSpec) -> GraphSpec:
        """`spec` with the sizes that were compiled for."""
        dims = dict(spec.dims)
        for name, most in (("past", self.context), ("rows", self.rows)):
            size = dims[name]
            dims[name] = DimRange(size.min, min(size.opt, most), min(size.max, most))
        return GraphSpec(spec.name, spec.inputs, spec.outputs, spec.states, dims)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(encode(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> DecoderLayout:
        """Read it. Raises ExecutionError for a file that is none."""
        problems: list[str] = []
        try:
            found = decode(cls, loads(path.read_text(encoding="utf-8")), problems)
        except (OSError, ValueError) as error:
            problems.append(str(error))
        if problems or found is None:
            raise ExecutionError(f"{path}: no layout of a decoder: {'; '.join(problems)}; build the bundle again")
        return found


def positional_feeds(form: Form, past: int, frequencies: Array, groups: int) -> dict[str, Array]:
    """What a decoder is given in place of position ids, where `past` rows are filled.

    The angle is a product in float32, as in the portable graph.
    """
    tokens, context = form.sizes["tokens"], form.sizes["past"]
    positions = np.arange(past, past + tokens, dtype=np.float32)
    angles = positions[:, None, None] * np.asarray(frequencies, np.float32)
    bias = np.full((tokens, context + tokens), HIDDEN, np.float32)
    bias[:, :past] = 0
    bias[:, context:][np.tri(tokens, dtype=bool)] = 0
    return {
        "rope_cos": np.cos(angles),
        "rope_sin": np.sin(angles),
        "attention_bias": np.tile(bias, (groups, 1))[None, None],
    }


def fitted(
    spec: GraphSpec, feeds: Mapping[str, Array], form: Form, frequencies: Array, groups: int
) -> dict[str, Array]:
    """One sequence of a decoder's `feeds`, not longer than `form`, in its shapes, all in float."""
    sizes = check_feeds(spec, feeds)
    tokens, past = sizes["tokens"], sizes["past"]
    fixed = positional_feeds(form, past, frequencies, groups)
    for tensor in spec.inputs:
        given = feeds[tensor.name]
        if tensor.name == "position_ids":
            continue
        if tensor.name == "logit_positions":
            fixed[tensor.name] = np.resize(given[: form.sizes["rows"]].astype(np.int32), form.sizes["rows"])
            continue
        array = np.zeros(form.shape(tensor), np.float32)
        if tensor.name == "inputs_embeds":
            array[:, :tokens] = given
        else:
            rows_first = array.transpose(3, 0, 1, 2) if is_key(tensor.name) else array.transpose(2, 0, 1, 3)
            rows_first[:past] = given
        fixed[tensor.name] = array
    return fixed


class QnnCache(EngineCache):
    """See `Cache`. As many rows as were compiled for; keys lie [head_dim, rows], which `arrays` show the other way round."""

    def __init__(self, spec: GraphSpec, capacity: int, batch: int, dtype: npt.DTypeLike, scaled: bool = False) -> None:
        super().__init__(spec, capacity, batch, dtype, scaled)
        rows = self.limit
        self.arrays = [self._empty(rows, *row) for row in self._rows]
        for i, name in enumerate(self.names):
            if is_key(name):
                kept = self.arrays[i]
                self.arrays[i] = kept.reshape(*kept.shape[:2], kept.shape[3], rows).swapaxes(2, 3)

    def _empty(self, capacity: int, row: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        # rows that are hidden are multiplied by 0, so they must be finite
        return np.zeros((self.batch, self._heads, capacity, *row), dtype)

    def fixed(self, i: int, sequence: int) -> Array:
        """Array i of one sequence as the graph takes it."""
        array = self.arrays[i][sequence : sequence + 1]
        return array.swapaxes(2, 3) if is_key(self.names[i]) else array


class QnnDecoder:
    """See `CachedSession`."""

    caches_outlive_session = True

    def __init__(
        self,
        spec: GraphSpec,
        layout: DecoderLayout,
        interfaces: Sequence[tuple[Sequence[str], Sequence[str]]],
        run: Run,
        close: Callable[[], None],
    ) -> None:
        """`interfaces`: inputs and outputs of each graph, prefill and decode of each part in turn."""
        self.spec = layout.limited(spec)
        self.prefill_chunk = layout.tokens
        self._step_spec = self.spec.stateless
        self._layout = layout
        self._interfaces = interfaces
        self._run: Run | None = run
        self._close = close
        self._frequencies = np.array(layout.inverse_frequencies, np.float32)
        one = {"batch": 1, "past": layout.context}
        self._forms = (
            Form("prefill", {**one, "tokens": layout.tokens, "rows": layout.rows}),
            Form("decode", {**one, "tokens": 1, "rows": 1}),
        )

    def new_cache(self, capacity: int, batch: int = 1) -> QnnCache:
        """See `CachedSession.new_cache`; as many tokens as were compiled for, whatever `capacity` is."""
        return QnnCache(self.spec, capacity, batch, np.int16 if self._layout.scales else np.float32)

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """See `CachedSession.step`. Positions must continue those in the cache."""
        held, sizes, outputs = begin_step(self.spec, self._step_spec, feeds, cache, QnnCache, out)
        end = held.length + sizes["tokens"]
        if end > self._layout.context:
            raise PromptError(
                f"{end} tokens do not fit: the decoder was compiled for a context of {self._layout.context}; shorten the "
                "prompt, use fewer pictures, or compile it again with --context"
            )
        embeds, positions = feeds["inputs_embeds"], feeds["logit_positions"]
        for sequence in range(sizes["batch"]):
            for start in range(0, sizes["tokens"], self._layout.tokens):
                piece = embeds[sequence : sequence + 1, start : start + self._layout.tokens]
                wanted = np.flatnonzero((positions >= start) & (positions < start + piece.shape[1]))
                logits = self._feed(piece, positions[wanted] - start, held, sequence, held.length + start)
                outputs["logits"][sequence, wanted] = logits
        held.length = end
        return outputs

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`: the past is put into a new cache, the new rows are taken out of it."""
        sizes = check_feeds(self.spec, feeds)
        given = {} if out is None else out
        shapes = check_out(self.spec, sizes, given)
        past = sizes["past"]
        cache = self.new_cache(max(1, past), sizes["batch"])
        for i, name in enumerate(cache.names):
            rows = feeds[name].transpose(1, 2, 0, 3)
            cache.arrays[i][:, :, :past] = self._stored(rows, name)
        cache.length = past
        stateless = {t.name: feeds[t.name] for t in self._step_spec.inputs}
        outputs = self.step(
            stateless, cache, {t.name: given[t.name] for t in self._step_spec.outputs if t.name in given}
        )
        news = writeable(self.spec, {pair.output: shapes[pair.output] for pair in self.spec.states}, given)
        for i, pair in enumerate(self.spec.states):
            made = cache.arrays[i][:, :, past : cache.length].transpose(2, 0, 1, 3)
            news[pair.output][:] = made * np.float32(self._layout.scales.get(pair.output, 1.0))
        outputs |= news
        return {t.name: outputs[t.name] for t in self.spec.outputs}

    def close(self) -> None:
        """Free what the engine holds, or end the process that emulates."""
        self._run = None
        self._close()

    def _stored(self, rows: Array, name: str) -> Array:
        """Float rows of the state `name` as the cache holds them."""
        scale = self._layout.scales.get(name.removeprefix("past_"))
        if scale is None:
            return rows
        return np.clip(np.rint(rows / np.float32(scale)), -LARGEST, LARGEST).astype(np.int16)

    def _feed(self, embeds: F32, rows: I64, cache: QnnCache, sequence: int, past: int) -> F32:
        """Run tokens that fit one form behind `past` rows of a sequence, and write theirs; return the logits at `rows`."""
        most = self._layout.rows
        logits = [
            self._pass(embeds, rows[i : i + most], cache, sequence, past) for i in range(0, max(1, len(rows)), most)
        ]
        return np.concatenate(logits)

    def _pass(self, embeds: F32, rows: I64, cache: QnnCache, sequence: int, past: int) -> F32:
        if self._run is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        count = embeds.shape[1]
        index = 1 if count == 1 else 0
        form = self._forms[index]
        values = positional_feeds(form, past, self._frequencies, self._layout.groups)
        values["inputs_embeds"] = np.zeros((1, form.sizes["tokens"], embeds.shape[2]), np.float32)
        values["inputs_embeds"][:, :count] = embeds
        values["logit_positions"] = np.zeros(form.sizes["rows"], np.int32)
        values["logit_positions"][: len(rows)] = rows
        values |= {name: cache.fixed(i, sequence) for i, name in enumerate(cache.names)}
        for part in range(len(self._interfaces) // 2):
            inputs, _ = self._interfaces[2 * part + index]
            values |= self._run(2 * part + index, {name: values[name] for name in inputs})
        for i, pair in enumerate(self.spec.states):
            new = values[pair.output]
            made = new.swapaxes(2, 3) if is_key(pair.output) else new
            cache.arrays[i][sequence, :, past : past + count] = made[0, :, :count]
        logits: F32 = values["logits"][0, : len(rows)]
        return logits
