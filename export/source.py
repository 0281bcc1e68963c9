"""A checkpoint and a recipe: everything that the stages of a build ask of them."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lensc.backends.base import Session
from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import TokenizerError, UsageError
from lensc.runtime.prompt import Tokenizer

from . import demo
from .adapter import MergedCheckpoint
from .calibration import CalibrationSet, calibration_set
from .checkpoint import Checkpoint, WeightSource
from .graph import GraphSpec
from .memory import available_bytes, resident_bytes
from .models.linears import NOT_LINEAR, linear_rows, linear_shapes
from .models.minicpmv import MiniCPMV
from .models.session import decoder_spec, graph_modules, torch_sessions, vision_spec
from .models.streamed import StreamedModel
from .onnx import THIRDS
from .provenance import code_key
from .quantize.calibrate import CalibrationRecord
from .quantize.calibrated import is_calibrated
from .quantize.linears import TURNED
from .quantize.recipe import EMBEDDING, Recipe
from .quantize.weights import WeightFormat, dequantize
from .smoothed import SmoothedCheckpoint, SmoothingRecord
from .verify import probe_feeds
from .writer import Quantize, round_to_nearest

HELD_BYTES = 1 << 30
"""What a build takes besides the reference model: torch, an engine, activations."""

WORK_BYTES = 128 << 20
"""Pieces of weights, read, rounded and packed."""


class Source:
    """A checkpoint, and what is made from it once, when the first stage needs it."""

    def __init__(
        self,
        checkpoint: Checkpoint | MergedCheckpoint,
        recipe: Recipe,
        max_memory: int | None = None,
        calibration: Path | None = None,
        measures_ranges: bool = False,
    ) -> None:
        """Check what can be checked without reading weights. Raises CheckpointError, TokenizerError, UsageError, and
        InputError or PictureError for calibration pictures that do not do.

        `max_memory` bytes decide, and without them the memory that is free, whether the reference model is held in
        memory or streamed from its files. `calibration` is a folder of pictures, for a recipe that is calibrated.
        """
        self.unsmoothed = checkpoint
        self.checkpoint: Checkpoint | MergedCheckpoint | SmoothedCheckpoint = checkpoint
        """What weights are read from: smoothed, once the stage of that has run."""
        self.recipe = recipe
        self.quantize: Quantize = round_to_nearest
        """How weights are rounded. Where the recipe asks for calibration, its stage sets this."""
        self.calibration: CalibrationRecord | None = None
        """What the weights were calibrated with, once they are."""
        self.smoothing: SmoothingRecord | None = None
        """What smoothing was expected to gain, once `checkpoint` is smoothed."""
        self._calibration_folder = calibration
        if calibration is not None and not (recipe.needs_data or measures_ranges):
            raise UsageError(
                f"--calibration {calibration}: the recipe {recipe.name} rounds to the nearest and looks at no pictures; "
                "leave it out, or choose a recipe with method gptq, e.g. int4-gptq, or with smooth = true"
            )
        self._max_memory = max_memory
        self.spec: ModelSpec = checkpoint.model_spec()
        self.tokenizer = Tokenizer.from_file(checkpoint.tokenizer)
        rows = self.spec.decoder.vocab_size
        if self.tokenizer.vocab_size > rows:
            raise TokenizerError(
                f"{checkpoint.tokenizer}: has {self.tokenizer.vocab_size} tokens, the embedding table has {rows} rows; "
                "take both from the same checkpoint"
            )
        table, width = recipe.format_of(EMBEDDING), self.spec.decoder.hidden_size
        if table is not None and table.bits < 8 and (width % 2 or width % table.group_of(width)):
            raise UsageError(f"recipe {recipe.name}: {EMBEDDING} is {table}: its groups do not divide a row of {width}")
        if recipe.needs_data or measures_ranges:
            _ = self.calibration_data  # pictures that cannot be read are known before any work

    @property
    def graph_bytes(self) -> int:
        """Bytes of both graphs, at most: weights that are no linears stay float32."""
        return sum(self._bytes_of(r.name, r.shape) for r in self.checkpoint.tensors.values() if r.name != EMBEDDING)

    @property
    def table_bytes(self) -> int:
        """Bytes of the embedding table, which is in none of the graphs, at most."""
        return self._bytes_of(EMBEDDING, self.checkpoint.tensors[EMBEDDING].shape)

    @cached_property
    def key(self) -> dict[str, str]:
        """What every stage depends on."""
        key = {"checkpoint": self.checkpoint.sha256, "recipe": self.recipe.to_toml(), **code_key()}
        return key | {"calibration": self.calibration_data.sha256} if self.recipe.needs_data else key

    @cached_property
    def calibration_data(self) -> CalibrationSet:
        """What a recipe that is calibrated is shown."""
        is_demo = self.checkpoint.folder.resolve() == demo.CHECKPOINT.resolve()
        return calibration_set(self.spec, self.tokenizer, self._calibration_folder, is_demo=is_demo)

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of every linear of the model, by the name it has in its graph."""
        return linear_shapes(self.checkpoint.tensors)

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """The formats of all linears and of the embedding table, as far as they are quantized."""
        return self.recipe.formats([*self.linears, EMBEDDING])

    @property
    def calibrated_bytes(self) -> int:
        """Bytes of the calibrated weights, which are held in files of their own until the graphs are written."""
        if not self.recipe.is_calibrated:
            return 0
        kept = {n: format for n, format in self.formats.items() if n != EMBEDDING and is_calibrated(format)}
        return sum(format.bytes_for(self.linears[n]) for n, format in kept.items())

    @cached_property
    def is_streamed(self) -> bool:
        """Whether the reference model is too large to be held twice, as it is and with the recipe's weights."""
        room = available_bytes() // 2 if self._max_memory is None else self._max_memory
        return HELD_BYTES + (1 if self.recipe.is_float else 2) * self._held_bytes > room

    @property
    def _held_bytes(self) -> int:
        """Bytes of the reference model in memory."""
        return 4 * sum(prod(record.shape) for record in self.checkpoint.tensors.values())

    @property
    def memory_bytes(self) -> int:
        """What a build takes at least: this process, a piece of work, and the reference model or its largest block."""
        if not self.is_streamed:
            return resident_bytes() + WORK_BYTES + (1 if self.recipe.is_float else 2) * self._held_bytes
        model = StreamedModel(self.checkpoint, self.checkpoint.config)
        passes = (model.vision_footprint, model.decoder_footprint)
        feeds = (probe_feeds(self.specs[name]) for name in ("vision", "decoder"))
        return resident_bytes() + WORK_BYTES + max(of([feed]).total for of, feed in zip(passes, feeds, strict=True))

    def streamed(self, weights: WeightSource) -> StreamedModel:
        """The reference model on `weights`, a block at a time."""
        room = None if self._max_memory is None else max(1, self._max_memory - resident_bytes())
        return StreamedModel(weights, self.checkpoint.config, max_bytes=room)

    @cached_property
    def reference(self) -> dict[str, Session]:
        """The reference model's sessions; loads all weights."""
        return torch_sessions(self.checkpoint.load_model())

    @cached_property
    def quantized_reference(self) -> dict[str, Session]:
        """The reference model with the weights that the recipe's values stand for: what the graphs must compute."""
        if self.recipe.is_float:
            return self.reference
        model = self.checkpoint.load_model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                for rows in linear_rows(name, parameter):
                    format = self.recipe.format_of(rows.name)
                    if format is not None:
                        rows.weight.copy_(dequantize(self.quantize(rows.name, rows.weight.contiguous(), format, 0)))
        return torch_sessions(model)

    def rounded(self, name: str, rows: Tensor, start: int) -> Tensor | None:
        """What the recipe makes of `rows: float32` of a parameter from row `start` on; None if rows do not decide it."""
        if name in TURNED and self.recipe.format_of(name) is not None:
            return None  # its columns are the outputs
        third = self.checkpoint.tensors[name].shape[0] // len(THIRDS)
        letter = THIRDS[start // third] if name.endswith("in_proj_weight") else None
        within = start % third if letter else start
        is_linear = rows.ndim == 2 and not name.endswith(NOT_LINEAR)
        linear = f"{name}.{letter}" if letter else name
        format = self.recipe.format_of(linear) if is_linear else None
        return rows if format is None else dequantize(self.quantize(linear, rows, format, within))

    @cached_property
    def specs(self) -> dict[str, GraphSpec]:
        """The signatures of the graphs."""
        config = self.checkpoint.config
        return {"vision": vision_spec(config), "decoder": decoder_spec(config)}

    @property
    def schemes(self) -> dict[str, str]:
        """The scheme of each graph."""
        return {graph: str(self.recipe.scheme(graph, names)) for graph, names in self._graph_linears.items()}

    def required_schemes(self, recipe: Recipe) -> dict[str, dict[str, set[int]]]:
        """The schemes that an engine must be able to run for `recipe`, by graph: that of each format in it, with the inputs
        of the linears that have it.
        """
        return {
            graph: {
                scheme: {self.linears[name][1] for name in same}
                for scheme, same in recipe.schemes(graph, names).items()
            }
            for graph, names in self._graph_linears.items()
        }

    @cached_property
    def _graph_linears(self) -> dict[str, list[str]]:
        """The names of each graph's linears."""
        with torch.device("meta"):
            model = MiniCPMV(self.checkpoint.config)
        return {
            graph: [r.name for n, p in module.state_dict().items() for r in linear_rows(n, p)]
            for graph, (module, _) in graph_modules(model).items()
        }

    def _bytes_of(self, name: str, shape: tuple[int, ...]) -> int:
        is_weight = len(shape) == 2 and (name == EMBEDDING or not name.endswith(NOT_LINEAR))
        format = self.recipe.format_of(name) if is_weight else None
        if name == EMBEDDING and format is not None:  # tables take 4 or 8 bits a value
            format = dataclasses.replace(format, bits=max(4, format.bits))
        return 4 * prod(shape) if format is None else format.bytes_for((shape[0], shape[1]))
