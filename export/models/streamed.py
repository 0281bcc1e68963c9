"""The reference model with one block in memory at a time: the modules of `minicpmv`, filled from the checkpoint on demand.

At full size the model has 34 GB in float32, a decoder layer 0.87 GB. So the loops are turned around: all samples go
through block 0, then all through block 1. The checkpoint is read once for all of them, and what is held besides a block
is one activation per sample. Every block computes with the code and the shapes of the model in memory, so that outputs
are the same bits, but for two cases: logits of a vocabulary that takes several pieces, and prompts of more than
`CHUNK_TOKENS`, which are fed in chunks as `lensc.runtime` feeds them.

Blocks come in this order, under these names:

    vision    vpm.embeddings, vpm.encoder.layers.<i>, vpm.post_layernorm, resampler
    decoder   llm.model.layers.<i>, llm.model.norm, llm.lm_head[<start>:<stop>] (rows of its weight)

Quantization hooks in at four places. `on_linear(name, x)` is called with the checkpoint's name of a linear's weight and
its input, float[tokens, in], for every linear of every sample, before it computes; x must be copied to be kept.
`replace(block, state)` is called once per block, after all samples were seen, with the block's weights by full name in
float32. It may overwrite them in place, which takes no second copy, or return those that it changed; the outputs of the
block, which are the inputs of the next, are then computed with them. Given both, a block computes twice.
`change_input(name, x)` is called for every linear while the outputs are computed, and returns what the linear is given
instead. `on_block(name, module, x, run)` is called once per block, filled with its weights as they are stored and after
`on_linear` has seen all samples: `run(i, y)` computes the block's output for input y in the place of sample i's, x[i].
The names that are not simply a linear's weight:

    vpm.embeddings.patch_embedding.weight   a convolution without overlap: x are the patches, in the order of
                                            weight.flatten(1)
    resampler.attn.in_proj_weight.q/.k/.v   the thirds of the rows of in_proj_weight, each with an input of its own
    resampler.proj                          computes x @ proj: its rows are the inputs, its columns the outputs
    llm.lm_head.weight                      seen once per sample, in however many pieces it is loaded
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from lensc.backends.base import Array, Session, check_feeds, check_out
from lensc.backends.errors import CheckpointError, ExecutionError, GraphError, UsageError, listed
from lensc.export.checkpoint import WeightSource
from lensc.export.graph import GraphSpec
from lensc.export.memory import shown, trim

from .config import ModelConfig
from .hooks import ChangeInput, OnLinear, observed
from .minicpmv import Decoder, Resampler, VisionTower
from .session import decoder_spec, vision_spec

Feeds = Mapping[str, Array]
Replace = Callable[[str, dict[str, Tensor]], Mapping[str, Tensor] | None]
Run = Callable[[int, Tensor], Tensor]
OnBlock = Callable[[str, nn.Module, Sequence[Tensor], Run], None]

_BLOCK = re.compile(r"vpm\.encoder\.layers\.\d+|llm\.model\.layers\.\d+|(?:vpm|llm)\.\w+|resampler")

CHUNK_TOKENS = 512
"""Most tokens that go through a decoder layer at once: attention makes three float32[heads, tokens, past + tokens], which
is 0.4 GB for 512 after 1536. The runtime's prefill has chunks of the same size, so rounding is the same, too."""

HEAD_BYTES = 256 << 20
"""Most bytes of lm_head in float32 at once; the whole has 2.1 GB."""

READ_BYTES = 16 << 20
"""Weights are converted in pieces of so many bytes of float32, so that the stored and the converted form of a block are
never held together. Small enough to come from the C library's heap, which reuses it; larger ones are mapped anew."""


@dataclass(frozen=True)
class Footprint:
    """What a run allocates, in bytes: one activation per sample, the outputs, the largest block in float32, and what the
    largest sample needs within a block. What the caller holds, such as the feeds, is not counted.
    """

    activations: int
    outputs: int
    block: int
    working: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.activations + self.outputs + self.block + self.working

    def __str__(self) -> str:
        parts = (f"{field.name} {shown(getattr(self, field.name))}" for field in dataclasses.fields(self))
        return f"{shown(self.total)} ({', '.join(parts)})"


class StreamedModel:
    """The reference model on weights that are read when they are needed, and forgotten.

    `dtype` is what blocks compute in; bfloat16 halves the activations and serves calibration, not reference.
    `max_bytes` bounds the `Footprint` of a run. `after_block` is called with the name of each block that is done.
    """

    def __init__(
        self,
        weights: WeightSource,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        max_bytes: int | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        head_bytes: int = HEAD_BYTES,
        after_block: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.specs = {"vision": vision_spec(config), "decoder": decoder_spec(config)}
        self._weights = weights
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._chunk = chunk_tokens
        self._head_rows = min(config.vocab_size, max(1, head_bytes // (4 * config.hidden_size)))
        self._after_block = after_block or (lambda name: None)

    # --- runs ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run_vision(
        self,
        feeds: Sequence[Feeds],
        *,
        on_linear: OnLinear | None = None,
        replace: Replace | None = None,
        change_input: ChangeInput | None = None,
        on_block: OnBlock | None = None,
    ) -> list[dict[str, Array]]:
        """Run all calls `feeds` of the graph `vision`, block by block; return the outputs of each.

        Raises UsageError for feeds that do not fit, or need more memory than allowed; CheckpointError for weights that
        cannot be read or hold NaN or Inf; GraphError if `replace` returns what does not fit the block.
        """
        self._check(self.specs["vision"], feeds, self.vision_footprint)
        with torch.device("meta"):
            tower = VisionTower(dataclasses.replace(self.config.vision, num_hidden_layers=1), False)
            resampler = Resampler(self.config)
        embed, layer, norm = tower.embeddings, tower.encoder.layers[0], tower.post_layernorm
        x: list[Tensor] = [torch.empty(0)] * len(feeds)

        def given(i: int, name: str) -> Tensor:
            return self._tensor(feeds[i][name])

        through = partial(self._through, x=x, hooks=_Hooks(on_linear, replace, change_input, on_block))
        through("vpm.embeddings", embed, lambda i: embed(given(i, "patches"), given(i, "position_ids")))
        for index in range(self.config.vision.num_hidden_layers - self.config.drop_vision_last_layer):
            through(f"vpm.encoder.layers.{index}", layer, lambda i: layer(x[i], given(i, "attention_bias")))
        through("vpm.post_layernorm", norm, lambda i: norm(x[i]))
        through("resampler", resampler, lambda i: resampler(x[i], given(i, "key_bias"), given(i, "key_pos_embed")))
        return [{"image_embeds": embeds.float().numpy()} for embeds in x]

    @torch.no_grad()
    def run_decoder(
        self,
        feeds: Sequence[Feeds],
        outputs: Sequence[Collection[str]] | None = None,
        *,
        on_linear: OnLinear | None = None,
        replace: Replace | None = None,
        change_input: ChangeInput | None = None,
        on_block: OnBlock | None = None,
    ) -> list[dict[str, Array]]:
        """Run all calls `feeds` of the graph `decoder`, block by block; return the outputs of each.

        `outputs[i]` names what is wanted of call i, by default all. Where no call wants `logits`, lm_head is not read.
        Raises as `run_vision` does.
        """
        spec = self.specs["decoder"]
        wanted = self._wanted(feeds, outputs)
        self._check(spec, feeds, partial(self.decoder_footprint, outputs=wanted))
        with torch.device("meta"):
            decoder = Decoder(dataclasses.replace(self.config, num_hidden_layers=1, vocab_size=1))
        layer, norm = decoder.model.layers[0], decoder.model.norm
        # What is left is Decoder.forward around one layer; norm and head follow when all layers are done.
        decoder.model.add_module("norm", nn.Identity())
        decoder.add_module("lm_head", nn.Identity())
        results: list[dict[str, Array]] = [{} for _ in feeds]
        x = [self._tensor(feed["inputs_embeds"]) for feed in feeds]

        def compute(i: int, index: int) -> Tensor:
            past = [self._tensor(feeds[i][f"past_{kind}.{index}"]) for kind in ("key", "value")]
            y, *rows = self._run_layer(decoder, x[i], self._tensor(feeds[i]["position_ids"]), *past)
            for name, made in zip((f"key.{index}", f"value.{index}"), rows, strict=True):
                if name in wanted[i]:
                    results[i][name] = made.float().numpy()
            return y

        hooks = _Hooks(on_linear, replace, change_input, on_block)
        through = partial(self._through, hooks=hooks)
        for index in range(self.config.num_hidden_layers):
            through(f"llm.model.layers.{index}", layer, partial(compute, index=index), x=x)
        asking = [i for i, names in enumerate(wanted) if "logits" in names]
        if asking:
            x = [x[i].index_select(1, self._tensor(feeds[i]["logit_positions"])) for i in asking]
            through("llm.model.norm", norm, lambda i: norm(x[i]), x=x)
            for i, logits in zip(asking, self._head(x, hooks), strict=True):
                results[i] = {"logits": logits, **results[i]}
        return results

    def vision_footprint(self, feeds: Sequence[Feeds]) -> Footprint:
        """What `run_vision` takes for `feeds`."""
        vision, width = self.config.vision, self.config.hidden_size
        sizes = [feed["patches"].shape[:2] for feed in feeds]
        return Footprint(
            activations=sum(slices * patches * vision.hidden_size for slices, patches in sizes) * self._dtype.itemsize,
            outputs=sum(slices for slices, _ in sizes) * self.config.query_num * width * 4,
            block=self._largest_block(("vpm.", "resampler.")),
            # three of each: attention scores, inner activations of an MLP, keys of the resampler
            working=3
            * 4
            * max(
                (
                    slices * patches * max(vision.num_attention_heads * patches, vision.intermediate_size, width)
                    for slices, patches in sizes
                ),
                default=0,
            ),
        )

    def decoder_footprint(self, feeds: Sequence[Feeds], outputs: Sequence[Collection[str]] | None = None) -> Footprint:
        """What `run_decoder` takes for `feeds` and `outputs`."""
        config, size = self.config, self._dtype.itemsize
        row = config.num_key_value_heads * config.head_dim
        held = made = working = 0
        for feed, wanted in zip(feeds, self._wanted(feeds, outputs), strict=True):
            batch, tokens = feed["inputs_embeds"].shape[:2]
            chunk, keys = min(tokens, self._chunk), tokens + len(feed["past_key.0"])
            held += batch * tokens * config.hidden_size * size
            made += batch * len(feed["logit_positions"]) * config.vocab_size * 4 * ("logits" in wanted)
            made += batch * tokens * row * 4 * len(wanted - {"logits"})
            inner = batch * chunk * max(config.num_attention_heads * keys, config.intermediate_size) * 4
            working = max(working, 3 * inner + 2 * batch * keys * row * size)
        head = 4 * self._head_rows * config.hidden_size
        return Footprint(held, made, max(head, self._largest_block(("llm.model.layers.",))), working)

    # --- blocks -------------------------------------------------------------------------------------------------------

    def _through(
        self,
        name: str,
        module: nn.Module,
        compute: Callable[[int], Tensor],
        x: list[Tensor],
        hooks: _Hooks,
    ) -> None:
        """Fill `module` with the weights of block `name`, set each x[i] to compute(i), and empty `module` again.

        `compute` must not change x[i] itself: with hooks it is called more than once.
        """
        state = {f"{name}.{path}": self._read(f"{name}.{path}") for path, _ in module.named_parameters()}
        self._assign(name, module, state)
        try:
            if hooks.before:
                if hooks.on_linear is not None:
                    with observed(name, module, hooks.on_linear):
                        for i in range(len(x)):
                            compute(i)
                if hooks.on_block is not None:
                    hooks.on_block(name, module, x, partial(_instead, x, compute))
                if hooks.replace is not None:
                    state |= _replaced(name, state, hooks.replace)
                    self._assign(name, module, state)
            state.clear()
            with observed(name, module, hooks.change_input or (None if hooks.before else hooks.on_linear)):
                for i in range(len(x)):
                    x[i] = compute(i)
        finally:
            module.to("meta")
            trim()  # the 0.1 GB that a layer leaves in the heap would come on top of the next one
        self._after_block(name)

    def _run_layer(
        self, decoder: Decoder, x: Tensor, position_ids: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run a decoder of one layer and no head: its activations, new keys and new values."""

        def run(x: Tensor, position_ids: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y, (new_key,), (new_value,) = decoder(x, position_ids, torch.arange(x.shape[1]), [key], [value])
            return y, new_key, new_value

        tokens, past = x.shape[1], len(past_key)
        # Rows of an earlier chunk are visible to all of a later one, which is so only where positions increase.
        if tokens <= self._chunk or not bool((position_ids.diff() > 0).all()):
            return run(x, position_ids, past_key, past_value)
        y = torch.empty_like(x)
        key, value = (
            torch.empty((past + tokens, *rows.shape[1:]), dtype=rows.dtype) for rows in (past_key, past_value)
        )
        key[:past], value[:past] = past_key, past_value
        for start in range(0, tokens, self._chunk):
            stop = min(start + self._chunk, tokens)
            seen, new = slice(0, past + start), slice(past + start, past + stop)
            y[:, start:stop], key[new], value[new] = run(
                x[:, start:stop].contiguous(), position_ids[start:stop], key[seen], value[seen]
            )
        return y, key[past:], value[past:]

    def _head(self, x: list[Tensor], hooks: _Hooks) -> list[Array]:
        """Logits float32[batch, rows, vocab] of each x[i], some rows of lm_head after the other."""
        weight, rows = "llm.lm_head.weight", self.config.vocab_size
        logits = [torch.empty((*hidden.shape[:2], rows)) for hidden in x]
        if not any(array.numel() for array in logits):
            return [array.numpy() for array in logits]
        if hooks.on_linear is not None:
            for hidden in x:
                hooks.on_linear(weight, hidden.flatten(0, -2))
        for start in range(0, rows, self._head_rows):
            stop = min(start + self._head_rows, rows)
            name = f"llm.lm_head[{start}:{stop}]"
            state = {weight: self._read(weight, start, stop)}
            if hooks.on_block is not None:
                with torch.device("meta"):
                    head = nn.Linear(self.config.hidden_size, stop - start, bias=False)
                head.load_state_dict({"weight": state[weight].to(self._dtype)}, assign=True)
                hooks.on_block(name, head.requires_grad_(False), x, partial(_apply, head))
            if hooks.replace is not None:
                state |= _replaced(name, state, hooks.replace)
            part = state.pop(weight).to(self._dtype)
            for hidden, array in zip(x, logits, strict=True):
                given = hidden if hooks.change_input is None else hooks.change_input(weight, hidden.flatten(0, -2))
                array[..., start:stop] = nn.functional.linear(given.view_as(hidden), part)
            del part
            self._after_block(name)
        return [array.numpy() for array in logits]

    # --- weights ------------------------------------------------------------------------------------------------------

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a weight in float32. Raises CheckpointError if one holds NaN or Inf."""
        record = self._weights.tensors[name]
        rows, *row = record.shape
        stop = rows if stop is None else stop
        weight = torch.empty((stop - start, *row))
        step = max(1, READ_BYTES // (4 * prod(row)))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            whole = (first, last) == (0, rows)
            stored = self._weights.tensor(name) if whole else self._weights.rows(name, first, last)
            part = weight[first - start : last - start]
            part.copy_(stored)
            # The extremes of values with NaN are NaN; unlike isfinite, they take no memory.
            if part.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(part)):
                kept = bool(torch.isfinite(stored).all())
                what = "does not fit float32" if kept else "holds NaN or Inf"
                raise CheckpointError(f"{record.file}: tensor {name} {what}; copy the checkpoint again")
        return weight

    def _assign(self, name: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Make `state`, by full name, the weights of `module`; no copy is made unless `dtype` asks for it."""
        local = {full.removeprefix(f"{name}."): weight.to(self._dtype) for full, weight in state.items()}
        module.load_state_dict(local, assign=True)
        module.requires_grad_(False).eval()

    def _largest_block(self, prefixes: tuple[str, ...]) -> int:
        sizes: dict[str, int] = {}
        for name, record in self._weights.tensors.items():
            block = _BLOCK.match(name)
            if block is not None and name.startswith(prefixes):
                sizes[block[0]] = sizes.get(block[0], 0) + prod(record.shape)
        copies = 4 if self._dtype == torch.float32 else 4 + self._dtype.itemsize
        return max(sizes.values()) * copies

    # --- calls --------------------------------------------------------------------------------------------------------

    def _tensor(self, array: Array) -> Tensor:
        # torch warns of arrays it could write to but must not, such as memory-mapped tables
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _wanted(self, feeds: Sequence[Feeds], outputs: Sequence[Collection[str]] | None) -> list[set[str]]:
        known = [tensor.name for tensor in self.specs["decoder"].outputs]
        if outputs is None:
            return [set(known) for _ in feeds]
        unknown = sorted({name for names in outputs for name in names} - set(known))
        if unknown or len(outputs) != len(feeds):
            raise UsageError(
                f"graph decoder: outputs of {len(outputs)} calls are named for {len(feeds)}, "
                f"and {', '.join(unknown) or 'none'} of them is not known"
            )
        return [set(names) for names in outputs]

    def _check(
        self, spec: GraphSpec, feeds: Sequence[Feeds], footprint: Callable[[Sequence[Feeds]], Footprint]
    ) -> None:
        for feed in feeds:
            check_feeds(spec, feed)
        if self._max_bytes is None:
            return
        needed = footprint(feeds)
        if needed.total > self._max_bytes:
            raise UsageError(
                f"graph {spec.name}: a pass over {len(feeds)} samples needs {needed} of memory, "
                f"{shown(self._max_bytes)} is free under the limit; use fewer or shorter samples or raise --max-memory"
            )


class StreamedSession:
    """One graph of a `StreamedModel` as a Session. Each run reads all of the graph's weights: several calls are better
    given to the model together.
    """

    def __init__(self, model: StreamedModel, graph: str) -> None:
        self.spec = model.specs[graph]
        run = {"vision": model.run_vision, "decoder": model.run_decoder}[graph]
        self._run: Callable[[Sequence[Feeds]], list[dict[str, Array]]] | None = run

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run the graph once; see `Session.run`."""
        if self._run is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        check_out(self.spec, check_feeds(self.spec, feeds), out or {})
        (arrays,) = self._run([feeds])
        for name, target in (out or {}).items():
            np.copyto(target, arrays[name])
            arrays[name] = target
        return arrays

    def close(self) -> None:
        """Let go of the model."""
        self._run = None


def streamed_sessions(model: StreamedModel) -> dict[str, Session]:
    """`model` as Sessions `vision` and `decoder`, like `torch_sessions` of a model in memory."""
    return {name: StreamedSession(model, name) for name in model.specs}


# --- hooks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hooks:
    on_linear: OnLinear | None
    replace: Replace | None
    change_input: ChangeInput | None
    on_block: OnBlock | None

    @property
    def before(self) -> bool:
        """Whether something happens before the outputs are computed: then inputs are observed before it, too."""
        return self.replace is not None or self.on_block is not None or self.change_input is not None


def _apply(head: nn.Linear, _: int, hidden: Tensor) -> Tensor:
    logits: Tensor = head(hidden)
    return logits


def _instead(x: list[Tensor], compute: Callable[[int], Tensor], i: int, given: Tensor) -> Tensor:
    """What `compute` makes of `given` in the place of x[i]."""
    held, x[i] = x[i], given
    try:
        return compute(i)
    finally:
        x[i] = held


def _replaced(block: str, state: Mapping[str, Tensor], replace: Replace) -> dict[str, Tensor]:
    """What `replace` makes of the weights `state` of a block, besides what it overwrites. Raises GraphError."""
    changed = dict(replace(block, dict(state)) or {})
    problems = [
        f"{name} {list(weight.shape)} instead of {list(state[name].shape)}" if name in state else f"no weight {name}"
        for name, weight in changed.items()
        if name not in state or weight.shape != state[name].shape
    ]
    if problems:
        raise GraphError(f"block {block}: the replaced weights do not fit: {listed(problems)}")
    return {name: weight.detach().float() for name, weight in changed.items()}
