"""A program on a GPU: a graph without state, and a decoder that keeps its KV cache there and replays a CUDA graph per token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lensc.export.graph import GraphSpec
from lensc.kernels.rope.reference import quantize_rows

from ._cuda_plan import FEW_ROWS, LayerCache, Plan, Run, plan
from ._cuda_weights import Source
from ._engine_cache import begin_step
from ._program import Program
from .base import (
    Array,
    Cache,
    check_capacity,
    check_feeds,
    check_fork,
    check_indices,
    check_out,
    check_reorder,
    check_restored,
    check_trim,
    writeable,
)
from .errors import ExecutionError, PromptError

GRAPHS = 8
"""Sizes of which a session keeps a CUDA graph: those that came last."""
MESSAGE = 300
"""Characters of torch's message: what to look for is in its beginning."""
ROUNDED = 256
"""Capacities of KV caches are multiples of this, so that the next conversation finds room, and graphs, to use again."""


@contextmanager
def gpu_errors() -> Iterator[None]:
    """What torch raises when the GPU fails or is full becomes ExecutionError, of one line."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ExecutionError(
            f"the GPU failed: {text if len(text) <= MESSAGE else text[: MESSAGE - 1] + '…'}"
        ) from error


class CudaSession:
    """See `Session`. `run_on_device` takes and returns tensors, and does not wait for the GPU; what it returned may change
    with the next run.
    """

    def __init__(self, spec: GraphSpec, program: Program, source: Source, dtype: torch.dtype) -> None:
        """Put the constants on `source.device`. Raises ExecutionError."""
        self.spec = spec
        self.device = source.device
        self._dtype = dtype
        self._program = program
        self._plan: Plan | None = plan(program, source, dtype)
        self._graphs: dict[object, _Graph | None] = {}
        self._pool: Any = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not as the scheme says."""
        return self._open().notes

    @gpu_errors()
    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`."""
        sizes = check_feeds(self.spec, feeds)
        given = {} if out is None else out
        outputs = writeable(self.spec, check_out(self.spec, sizes, given), given)
        made = self.run_on_device({name: self._on_device(array) for name, array in feeds.items()})
        for name, tensor in made.items():
            _fetch(tensor, outputs[name])
        return outputs

    def run_on_device(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same with tensors, which are not checked. Outputs are float32."""
        sizes: dict[str, int] = {}
        for tensor in self.spec.inputs:
            for dim, size in zip(tensor.shape, feeds[tensor.name].shape, strict=True):
                if isinstance(dim, str):
                    sizes[dim] = size
        if self.device.type != "cuda" or self.spec.states:
            return self._outputs(Run(feeds, sizes))
        return self._replayed(feeds, sizes)

    def _replayed(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """By a CUDA graph from the second time on that these sizes come: one picture has many slices of a size."""
        key = tuple(sorted(sizes.items()))
        if key not in self._graphs:
            while len(self._graphs) >= GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = None
            return self._outputs(Run(feeds, sizes))
        found = self._graphs.pop(key)
        if found is None:
            held = {name: tensor.clone() for name, tensor in feeds.items()}
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = self._outputs(Run(held, sizes))
            self._pool = graph.pool()
            found = _Graph(graph, held, outputs)
        self._graphs[key] = found  # the last that is given up
        with torch.inference_mode():
            for name, tensor in feeds.items():
                found.feeds[name].copy_(tensor)
        found.graph.replay()
        return found.outputs

    def close(self) -> None:
        """Free the device's memory."""
        self._graphs.clear()
        self._plan = None

    def _open(self) -> Plan:
        if self._plan is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        return self._plan

    def _outputs(self, run: Run) -> dict[str, torch.Tensor]:
        """Run the plan and return what the program's ports hold, in the shapes of the spec."""
        opened = self._open()
        with torch.inference_mode():
            for port in self._program.inputs:
                x = run.feeds[port.name]
                run.values[port.value] = x.reshape(-1, x.shape[-1]).contiguous()
            opened(run)
            made = {}
            for port in self._program.outputs:
                dims = self.spec.output(port.name).shape
                shape = [run.sizes[dim] if isinstance(dim, str) else dim for dim in dims]
                made[port.name] = run.value(port.value).float().view(shape)
        return made

    def _on_device(self, array: Array) -> torch.Tensor:
        held = torch.empty(array.shape, dtype=_TYPES[array.dtype.name], pin_memory=self.device.type == "cuda")
        np.copyto(held.numpy(), array)
        return held.to(self.device, non_blocking=True)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a type that numpy has, too."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


_TYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32}


def _fetch(tensor: torch.Tensor, to: Array) -> None:
    """Copy a tensor to the host, and wait for it."""
    to[...] = tensor.cpu().numpy()


@dataclass
class _Graph:
    """A run as a CUDA graph, what it reads and what it writes: it holds addresses, no tensors."""

    graph: Any
    feeds: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


@dataclass
class _Room:
    """The arrays of a KV cache and the CUDA graphs that point into them. `past`: int32[1], the tokens that they hold."""

    layers: list[LayerCache]
    past: torch.Tensor
    captured: dict[tuple[int, tuple[int, ...]], _Graph] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.layers[0].key.shape[0]

    @property
    def capacity(self) -> int:
        return self.layers[0].key.shape[2]

    @property
    def arrays(self) -> list[torch.Tensor]:
        found = [part for layer in self.layers for part in (layer.key, layer.value, layer.key_scale, layer.value_scale)]
        return [array for array in found if array is not None]


class CudaCache:
    """See `Cache`. Arrays grow to twice their size when they are full, up to the model's context."""

    def __init__(self, session: CudaDecoderSession, capacity: int, batch: int) -> None:
        self._session = session
        self.room = session._take_room(capacity, batch)
        self.length = 0
        self.room.past.zero_()

    def __del__(self) -> None:
        room = self.__dict__.pop("room", None)
        if room is not None:
            self._session._give_room(room)

    @property
    def batch(self) -> int:
        return self.room.batch

    @property
    def capacity(self) -> int:
        """How many tokens there is room for."""
        return self.room.capacity

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.room.arrays)

    @property
    def used_bytes(self) -> int:
        return self.nbytes // self.capacity * self.length

    @gpu_errors()
    def trim(self, length: int) -> None:
        check_trim(self, length)
        self._set_length(length)

    @gpu_errors()
    def fork(self, batch: int) -> CudaCache:
        check_fork(self)
        other = CudaCache(self._session, self.capacity, batch)
        for mine, theirs in zip(self.room.arrays, other.room.arrays, strict=True):
            theirs[:, :, : self.length] = mine[:, :, : self.length]
        other._set_length(self.length)
        return other

    @gpu_errors()
    def reorder(self, beams: npt.NDArray[np.int64], start: int) -> None:
        check_reorder(self, beams)
        picked = torch.from_numpy(np.ascontiguousarray(beams)).to(self.room.past.device)
        for array in self.room.arrays:
            array[:, :, start : self.length] = array[picked, :, start : self.length]

    @gpu_errors()
    def save(self) -> dict[str, Array]:
        """See `Cache.save`: by number, bfloat16 as the int16 of its bits."""
        filled = (array[:, :, : self.length] for array in self.room.arrays)
        return {str(i): _bits(array).cpu().numpy() for i, array in enumerate(filled)}

    @gpu_errors()
    def restore(self, arrays: Mapping[str, Array]) -> None:
        """See `Cache.restore`."""
        self._set_length(0)
        length = check_restored(self.save(), arrays, 2, self._session.spec.dims["past"].max)
        self.reserve(length)
        for i, array in enumerate(self.room.arrays):
            _bits(array)[:, :, :length] = torch.from_numpy(arrays[str(i)].copy()).to(array.device)
        self._set_length(length)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more. Raises PromptError if the model's context is full."""
        needed, limit = self.length + tokens, self._session.spec.dims["past"].max
        if needed > limit:
            raise PromptError(f"KV cache: {needed} tokens, the model's context has {limit}")
        if needed <= self.capacity:
            return
        larger = self._session._take_room(min(limit, max(needed, 2 * self.capacity)), self.batch)
        for old, new in zip(self.room.arrays, larger.arrays, strict=True):
            new[:, :, : self.length] = old[:, :, : self.length]
        self._session._give_room(self.room)
        self.room = larger
        self._set_length(self.length)

    def _set_length(self, length: int) -> None:
        self.length = length
        self.room.past.fill_(length)


class CudaDecoderSession(CudaSession):
    """See `CachedSession`. One to eight new tokens replay a CUDA graph, captured when they are first asked for."""

    prefill_chunk = 1024
    """Products are at their best, and values of a chunk take no more than 300 MB."""

    def __init__(
        self,
        spec: GraphSpec,
        program: Program,
        source: Source,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`kv_dtype`: of the cache, int8 with a scale per head and token; `dtype` unless given."""
        super().__init__(spec, program, source, dtype)
        self._kv_dtype = dtype if kv_dtype is None else kv_dtype
        self._free: list[_Room] = []
        self._step_spec = spec.stateless
        self._logits: torch.Tensor | None = None

    @gpu_errors()
    def new_cache(self, capacity: int, batch: int = 1) -> CudaCache:
        """See `CachedSession.new_cache`. Raises UsageError."""
        check_capacity(self.spec, capacity, batch)
        self._open()
        return CudaCache(self, capacity, batch)

    @gpu_errors()
    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """See `CachedSession.step`. Positions must continue those in the cache."""
        self._open()
        held, sizes, outputs = begin_step(self.spec, self._step_spec, feeds, cache, CudaCache, out)
        check_indices(self.spec, "logit_positions", feeds["logit_positions"], sizes["tokens"])
        embeds = self._on_device(feeds["inputs_embeds"])
        positions = tuple(int(p) for p in feeds["logit_positions"])
        logits = self.step_on_device(embeds, held, positions)
        self._fetch_logits(logits, outputs["logits"])
        return outputs

    def step_on_device(self, embeds: torch.Tensor, cache: CudaCache, logit_positions: Sequence[int]) -> torch.Tensor:
        """The same for float32[batch, tokens, width] on the device: float32[batch, positions, vocabulary] there, which the
        next step may overwrite. Does not wait for the GPU. Raises PromptError if the model's context is full.
        """
        batch, tokens, _ = embeds.shape
        cache.reserve(tokens)
        positions = tuple(logit_positions)
        with torch.inference_mode():
            if self.device.type == "cuda" and batch * tokens <= FEW_ROWS and tokens > 0 and positions:
                captured = cache.room.captured.get((tokens, positions))
                if captured is None:
                    captured = self._capture(embeds, cache, positions)
                captured.feeds["inputs_embeds"].copy_(embeds)
                captured.graph.replay()
                logits = captured.outputs["logits"]
            else:
                logits = self._advance(embeds, cache.room, torch.tensor(positions, device=self.device))
        cache.length += tokens
        return logits

    @gpu_errors()
    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`: the past is put into a new cache, the new rows are taken out of it."""
        self._open()
        given = {} if out is None else out
        sizes = check_feeds(self.spec, feeds)
        shapes = check_out(self.spec, sizes, given)
        outputs = writeable(self.spec, shapes, given)
        past, tokens = sizes["past"], sizes["tokens"]
        cache = self.new_cache(max(1, past + tokens), sizes["batch"])
        states = [(pair, side) for pair, side in zip(self.spec.states, itertools.cycle(("key", "value")), strict=False)]
        for i, (pair, side) in enumerate(states):
            _fill(cache.room.layers[i // 2], side, feeds[pair.input].transpose(1, 2, 0, 3))
        cache._set_length(past)
        stateless = {t.name: feeds[t.name] for t in self._step_spec.inputs}
        self.step(stateless, cache, {t.name: outputs[t.name] for t in self._step_spec.outputs})
        for i, (pair, side) in enumerate(states):
            rows = _rows(cache.room.layers[i // 2], side, past, past + tokens)
            _fetch(rows.permute(2, 0, 1, 3), outputs[pair.output])
        return outputs

    def close(self) -> None:
        self._free.clear()
        super().close()

    def _advance(self, embeds: torch.Tensor, room: _Room, positions: torch.Tensor) -> torch.Tensor:
        """Compute the tokens of `embeds` and append them. The only caller that changes `past`, so that a graph can hold it."""
        batch, tokens, _ = embeds.shape
        feeds = {"inputs_embeds": embeds, "logit_positions": positions}
        (rows,) = self.spec.input("logit_positions").shape
        sizes = {"batch": batch, "tokens": tokens, str(rows): len(positions)}
        made = self._outputs(Run(feeds, sizes, room.layers, room.past))
        room.past.add_(tokens)
        return made["logits"]

    def _capture(self, embeds: torch.Tensor, cache: CudaCache, positions: tuple[int, ...]) -> _Graph:
        """Run the step once, so that every kernel is compiled, and record it the second time."""
        room = cache.room
        held = embeds.clone()
        picked = torch.tensor(positions, device=self.device)
        self._advance(held, room, picked)
        room.past.fill_(cache.length)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._advance(held, room, picked)
        if self._pool is None:
            self._pool = graph.pool()
        room.past.fill_(cache.length)
        feeds = {"inputs_embeds": held, "logit_positions": picked}
        captured = room.captured[(embeds.shape[1], positions)] = _Graph(graph, feeds, {"logits": logits})
        return captured

    def _fetch_logits(self, logits: torch.Tensor, to: Array) -> None:
        """By memory that the GPU writes to itself, kept for the next step."""
        if self.device.type != "cuda":
            _fetch(logits, to)
            return
        if self._logits is None or self._logits.shape != logits.shape:
            self._logits = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
        self._logits.copy_(logits, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        np.copyto(to, self._logits.numpy())

    # --- room for caches ------------------------------------------------------------------------------------------

    def _take_room(self, capacity: int, batch: int) -> _Room:
        """The smallest that is free and large enough, or a new one."""
        fits = [room for room in self._free if room.batch == batch and room.capacity >= capacity]
        if fits:
            found = min(fits, key=lambda room: room.capacity)
            self._free.remove(found)
            return found
        self._free = [room for room in self._free if room.batch != batch]  # what is too small is not held beside it
        limit = self.spec.dims["past"].max
        size = min(limit, -(-capacity // ROUNDED) * ROUNDED)
        states = [self.spec.input(pair.input) for pair in self.spec.states]

        def array(dims: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*dims, dtype=dtype, device=self.device)

        layers = []
        for key in states[::2]:
            kv_heads, head_dim = (int(d) for d in key.shape[2:])
            rows = (batch, kv_heads, size)
            parts = [array((*rows, head_dim), self._kv_dtype) for _ in range(2)]
            if self._kv_dtype == torch.int8:
                parts += [array(rows, torch.float32) for _ in range(2)]
            layers.append(LayerCache(*parts))
        return _Room(layers, torch.zeros(1, dtype=torch.int32, device=self.device))

    def _give_room(self, room: _Room) -> None:
        if self._plan is not None:
            self._free.append(room)


def _fill(layer: LayerCache, side: str, rows: Array) -> None:
    """Hold float32[batch, kv_heads, tokens, head_dim] as the first tokens."""
    array, scales = getattr(layer, side), getattr(layer, f"{side}_scale")
    length = rows.shape[2]
    if scales is not None:
        rows, of_rows = quantize_rows(rows)
        scales[:, :, :length] = torch.from_numpy(of_rows)
    array[:, :, :length] = torch.from_numpy(rows.copy()).to(array.device, array.dtype)


def _rows(layer: LayerCache, side: str, start: int, end: int) -> torch.Tensor:
    """float32[batch, kv_heads, end - start, head_dim]"""
    array, scales = getattr(layer, side), getattr(layer, f"{side}_scale")
    found: torch.Tensor = array[:, :, start:end].float()
    return found if scales is None else found * scales[:, :, start:end, None]
