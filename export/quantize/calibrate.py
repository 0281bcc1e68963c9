"""Quantize a model block by block on what it computes of real pictures and text.

All samples go through a block once to see the inputs of its linears, the weights are rounded to what changes the outputs
least on them (`gptq`), and the samples go through the rounded block: later blocks make up for the errors of earlier ones.
The vision graph comes first; what it makes of the pictures, rounded as it is by then, is what the decoder is shown.

Weights of eight bits are rounded to nearest: their error is 41 dB below the outputs of the demo model's vision graph, and
weighing it by the mean square of each input gains nothing.

Each block is a file (`calibrated`). An interrupted calibration goes on behind the last of them, but the samples have to
pass through the finished blocks again, which takes less than half of the time that rounding them took.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lensc.backends.base import Array
from lensc.backends.bundle import ModelSpec, PictureSpec
from lensc.backends.errors import GraphError, InputError, StorageError, listed
from lensc.export.calibration import CalibrationSet, Sample
from lensc.export.checkpoint import WeightSource
from lensc.export.memory import Limit, resident_bytes
from lensc.export.models.config import ModelConfig
from lensc.export.models.linears import LinearRows, linear_rows, linear_shapes, shared_input
from lensc.export.models.streamed import HEAD_BYTES, StreamedModel
from lensc.runtime.picture import vision_feeds

from .calibrated import SUFFIX, block_path, is_calibrated, is_complete, read_block, write_block
from .gptq import Factor, Hessian, quantize_gptq
from .recipe import EMBEDDING
from .weights import QuantizedWeight, WeightFormat, dequantize, quantize_rtn, quantize_table

HEAD = "llm.lm_head"
LOGIT_BYTES = 512 << 20
"""Of all logits together: lm_head is shown so many rows, thinned out evenly."""

_BLOCK = re.compile(r"(?:vpm\.encoder|llm\.model)\.layers\.\d+|resampler|llm\.lm_head")


@dataclass(frozen=True)
class CalibrationRecord:
    """What a model was calibrated with."""

    source: str
    pictures: int
    slices: int
    tokens: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.source}: {self.pictures} pictures, {self.slices} slices, {self.tokens} tokens"


def calibrate(
    weights: WeightSource,
    config: ModelConfig,
    spec: ModelSpec,
    data: CalibrationSet,
    formats: Mapping[str, WeightFormat],
    folder: Path,
    key: str,
    limit: Limit,
    after_block: Callable[[str], None] | None = None,
) -> tuple[CalibrationRecord, list[Path]]:
    """Write the linears named in `formats` that are calibrated into `folder`; return what was shown, and the files.

    Files made with the same `key`, which stands for all arguments, are kept. `formats` may name `EMBEDDING`: then the
    decoder is shown rows of that format. `after_block` is called with the name of each block that is done. Raises
    MemoryLimitError, before any work, if `limit` is too low; InputError for data that leave a linear without inputs;
    CheckpointError for weights that cannot be read or hold NaN or Inf.
    """

    def done(block: str) -> None:
        limit.check()
        if after_block is not None:
            after_block(block)

    model = StreamedModel(weights, config, after_block=done)
    linears = {name: format for name, format in formats.items() if name != EMBEDDING}
    for_decoder = [name for name in linears if name.startswith("llm.")]
    for_vision = [name for name in linears if name not in for_decoder]
    picture, width = spec.picture, spec.decoder.hidden_size
    slices = [SliceFeeds(pixels, sample, picture, width) for sample in data.samples for pixels in sample.slices]
    if for_vision and not slices:
        raise InputError("the calibration data have no picture, but the vision graph is to be calibrated")
    prompts = decoder_feeds(data.samples, spec)
    wanted = [["logits"] if f"{HEAD}.weight" in linears else [] for _ in prompts]
    needed = footprint(model, slices, prompts, wanted, linears, linear_shapes(weights.tensors))
    limit.require(resident_bytes() + needed, f"calibrate on {len(slices)} slices and {data.tokens} tokens")

    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"*{SUFFIX}"):
        if not is_complete(path, key):
            path.unlink()
    rounder = _Rounder(linears, folder, key)
    outputs = model.run_vision(slices, **rounder.hooks(for_vision)) if slices else []
    if for_decoder:
        embeds = iter([output["image_embeds"][0] for output in outputs])
        for sample, feeds in zip(data.samples, prompts, strict=True):
            rows = embedding_rows(weights, sample.ids, formats.get(EMBEDDING))
            for start, stop in sample.image_bounds.tolist():
                rows[start:stop] = next(embeds)
            feeds["inputs_embeds"] = rows[None]
        del outputs, embeds
        model.run_decoder(prompts, wanted, **rounder.hooks(for_decoder))
    absent = [name for name in linears if name not in rounder.rounded]
    if absent:
        raise InputError(f"the calibration data never reach {listed(absent)}; calibrate with other data")
    return CalibrationRecord(data.source, data.pictures, data.slices, data.tokens, data.sha256), rounder.files


def footprint(
    model: StreamedModel,
    slices: Sequence[Mapping[str, Array]],
    prompts: Sequence[Mapping[str, Array]],
    wanted: Sequence[Sequence[str]],
    formats: Mapping[str, WeightFormat],
    shapes: Mapping[str, tuple[int, int]],
) -> int:
    """Bytes that calibrating allocates: the model's own, and the statistics and temporaries of the largest block.

    shapes: (outputs, inputs) of every linear.
    """
    most = 0
    for is_decoder, run, feeds in (
        (True, model.decoder_footprint(prompts, wanted), prompts),
        (False, model.vision_footprint(slices) if slices else None, slices),
    ):
        if run is None:
            continue
        given = sum(feed["inputs_embeds" if is_decoder else "patches"].nbytes for feed in feeds)
        held = run.activations + run.block + given + (0 if is_decoder else run.outputs)
        most = max(most, held + run.working)
        blocks: dict[str, list[str]] = {}
        for name in formats:
            if name.startswith("llm.") == is_decoder:
                blocks.setdefault(_block_of(name), []).append(name)
        for block, names in blocks.items():
            observing, rounding = _block_bytes(names, formats, shapes)
            # logits are made behind the last layer
            made = run.outputs if block == HEAD else 0
            most = max(most, held + made + max(run.working + observing, rounding))
    return most


def _block_bytes(
    names: Sequence[str], formats: Mapping[str, WeightFormat], shapes: Mapping[str, tuple[int, int]]
) -> tuple[int, int]:
    """Bytes of a block's Hessians, and of all that is held while it is rounded."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if is_calibrated(formats[name]):
            groups.setdefault(shared_input(name), []).append(name)
    order = sorted(groups.values(), key=lambda group: shapes[group[0]][1])
    sizes = [4 * shapes[group[0]][1] ** 2 for group in order]
    made, most = 0, 0
    for i, group in enumerate(order):
        for name in group:
            outputs, inputs = shapes[name]
            if name.startswith(HEAD):
                outputs = min(outputs, HEAD_BYTES // (4 * inputs))
            # the factor beside the Hessians; errors and values while rounding, packed bytes after it
            most = max(most, sum(sizes[i:]) + sizes[i] + made + 6 * outputs * inputs)
            made += outputs * inputs
    return sum(sizes), most


# --- what is fed ---------------------------------------------------------------------------------------------------


class SliceFeeds(Mapping[str, Array]):
    """The feeds of one slice, as `runtime.vision` makes them. `key_pos_embed`, as large as all activations of a block,
    is computed when it is asked for.
    """

    def __init__(self, pixels: Array, sample: Sample, spec: PictureSpec, width: int) -> None:
        beside = max(sample.slices, key=lambda other: other.shape[0] * other.shape[1])
        is_official = spec.vision_padding == "official"
        self._slices = [pixels, beside] if is_official else [pixels]
        self._spec = spec if is_official else dataclasses.replace(spec, vision_padding="per_slice")
        self._width = width
        self._small = {name: array for name, array in self._make(4).items() if name != "key_pos_embed"}
        self._names = [*self._small, "key_pos_embed"]

    def __getitem__(self, name: str) -> Array:
        if name == "key_pos_embed":
            return self._make(self._width)[name]
        return self._small[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _make(self, width: int) -> dict[str, Array]:
        batch = vision_feeds(self._slices, self._spec, width)[0]
        return {name: array[:1].copy() for name, array in batch.feeds.items()}


def decoder_feeds(samples: Sequence[Sample], spec: ModelSpec) -> list[dict[str, Array]]:
    """One call per sample; `inputs_embeds` are zeros without memory. Logits are asked where an answer is chosen."""
    decoder = spec.decoder
    nothing = np.empty((0, 1, decoder.num_kv_heads, decoder.head_dim), np.float32)
    states = [f"past_{kind}.{layer}" for layer in range(decoder.num_layers) for kind in ("key", "value")]
    rows = sum(len(sample.ids) - sample.prompt_tokens + 1 for sample in samples)
    step = max(1, -(-rows * 4 * decoder.vocab_size // LOGIT_BYTES))
    return [
        {
            "inputs_embeds": np.broadcast_to(np.float32(0), (1, len(sample.ids), decoder.hidden_size)),
            "position_ids": np.arange(len(sample.ids)),
            "logit_positions": np.arange(sample.prompt_tokens - 1, len(sample.ids), step),
            **dict.fromkeys(states, nothing),
        }
        for sample in samples
    ]


def embedding_rows(weights: WeightSource, ids: Array, format: WeightFormat | None) -> Array:
    """float32[n, D]: rows of the embedding table as the runtime gathers them. Only these are read."""
    found, places = np.unique(ids, return_inverse=True)
    rows = torch.cat([weights.rows(EMBEDDING, i, i + 1) for i in found.tolist()]).float()
    if format is not None:
        rows = dequantize(quantize_table(rows, format))
    gathered: Array = rows.numpy()[places]
    return gathered


def _block_of(name: str) -> str:
    match = _BLOCK.match(name)
    if match is None:
        raise GraphError(f"weight {name}: belongs to no block that can be calibrated; leave it in f32")
    return match[0]


# --- rounding ------------------------------------------------------------------------------------------------------


class _Rounder:
    """What a `StreamedModel` calls: sees the inputs of all linears, and rounds a block when all samples were seen."""

    def __init__(self, formats: Mapping[str, WeightFormat], folder: Path, key: str) -> None:
        self.files: list[Path] = []
        self.rounded: set[str] = set()
        self._formats = formats
        self._folder = folder
        self._key = key
        self._finished: set[str] = set()
        self._seen: dict[str, Hessian] = {}
        self._owners: dict[str, str] = {}
        """Of an input that several linears share: which of them reports it."""
        self._head: Factor | None = None
        """What is made of the inputs of lm_head, whose rows come in pieces."""

    def hooks(self, names: Iterable[str]) -> dict[str, Any]:
        """What to pass to a run whose graph has the linears `names`; nothing is observed where nothing is calibrated,
        or all of it is finished.
        """
        names = list(names)
        if not names:
            return {}
        blocks = {_block_of(name) for name in names if is_calibrated(self._formats[name])}
        self._finished = {block for block in blocks if is_complete(block_path(self._folder, block), self._key)}
        if self._finished == blocks:
            return {"replace": self._replace}
        return {"on_linear": self._on_linear, "replace": self._replace}

    def _on_linear(self, name: str, x: Tensor) -> None:
        if name not in self._formats or not is_calibrated(self._formats[name]) or _block_of(name) in self._finished:
            return
        place = shared_input(name)
        if self._owners.setdefault(place, name) != name:
            return
        if place not in self._seen:
            self._seen[place] = Hessian(x.shape[1])
        try:
            self._seen[place].add(x)
        except InputError as error:
            raise InputError(f"weight {name}: {error}") from error

    def _replace(self, block: str, state: dict[str, Tensor]) -> None:
        linears = [rows for name, weight in state.items() for rows in linear_rows(name, weight)]
        linears = [rows for rows in linears if rows.name in self._formats]
        calibrated = [rows for rows in linears if is_calibrated(self._formats[rows.name])]
        made: dict[str, QuantizedWeight] = {}
        if calibrated:
            path = block_path(self._folder, block)
            if is_complete(path, self._key):
                made = read_block(path)
            else:
                made = self._round(calibrated)
                try:
                    write_block(path, made, self._key, _first_row(block))
                except OSError as error:
                    raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
            self.files.append(path)
        for rows in linears:
            weight = made.pop(rows.name, None) or quantize_rtn(rows.weight, self._formats[rows.name])
            rows.weight.copy_(dequantize(weight))
            self.rounded.add(rows.name)

    def _round(self, linears: Sequence[LinearRows]) -> dict[str, QuantizedWeight]:
        """Round a block's linears, small inputs first: their Hessians are gone when the largest are factored."""
        made = {}
        groups: dict[str, list[LinearRows]] = {}
        for rows in sorted(linears, key=lambda rows: rows.weight.shape[1]):
            groups.setdefault(shared_input(rows.name), []).append(rows)
        for place, group in groups.items():
            name = group[0].name
            try:
                factor = self._factor(place)
                for rows in group:
                    name = rows.name
                    made[name] = quantize_gptq(rows.weight, factor, self._formats[name])
            except InputError as error:
                raise InputError(f"weight {name}: {error}") from error
        return made

    def _factor(self, place: str) -> Factor:
        """The factored Hessian of the inputs `place`, which are forgotten, but for those of lm_head."""
        if place.startswith(HEAD) and self._head is not None:
            return self._head
        if place not in self._seen:
            raise InputError("the calibration data never reach it; calibrate with other data")
        factor = self._seen.pop(place).factor()
        if place.startswith(HEAD):
            self._head = factor
        return factor


def _first_row(block: str) -> int:
    """The first row of a piece of lm_head, `llm.lm_head[<start>:<stop>]`; 0 for all other blocks."""
    match = re.search(r"\[(\d+):", block)
    return int(match[1]) if match else 0
