"""A checkpoint whose vision tower is easier to compute in 8 bits, and the same in float arithmetic.

Where a channel of what a LayerNorm gives is far larger than the others, it is divided by a factor: in the norm's own
weight and bias, so that the graph stays as it is. The linears that read it are multiplied by the same (`quantize.smooth`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import InputError

from .adapter import MergedCheckpoint
from .calibration import CalibrationSet
from .checkpoint import AlteredCheckpoint, Checkpoint, load_model
from .models.minicpmv import MiniCPMV
from .models.streamed import Run, StreamedModel
from .quantize.calibrate import SliceFeeds
from .quantize.smooth import Smoothing, best_smoothing, smooth_input, smooth_norm
from .shards import TensorRecord

READERS = {"layer_norm1": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "layer_norm2": ("mlp.fc1",)}
"""Which linears of a vision layer read which of its norms."""

KEPT_RUNS = 4
"""Slices on whose activations factors are tried, for each norm; the magnitudes are those of all slices."""


@dataclass(frozen=True)
class SmoothingRecord:
    """What smoothing is expected to gain: the worst error of the linears behind a norm, as a share of their outputs."""

    norms: int
    smoothed: int
    error_before: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.smoothed} of {self.norms} norms; error of the products behind the worst, in 8 bits, "
            f"{self.error_before:.4f} before, {self.error:.4f} after"
        )


def find_smoothing(
    checkpoint: Checkpoint | MergedCheckpoint,
    spec: ModelSpec,
    data: CalibrationSet,
    path: Path,
    check: Callable[[], None],
) -> SmoothingRecord:
    """Write the factors of all norms of the vision tower to `path`, as `data` ask for them.

    `check` is called after each block. Raises InputError for data without a picture, CheckpointError for weights that
    cannot be read.
    """
    width = spec.decoder.hidden_size
    slices = [SliceFeeds(pixels, sample, spec.picture, width) for sample in data.samples for pixels in sample.slices]
    if not slices:
        raise InputError("the calibration data have no picture, but the vision graph is to be smoothed")
    seeing = _Seeing(max(1, len(slices) // KEPT_RUNS))
    model = StreamedModel(checkpoint, checkpoint.config, after_block=lambda name: check())
    model.run_vision(slices, on_linear=seeing.on_linear, on_block=seeing.on_block)
    found = seeing.found
    save_file({norm: smoothing.factors.contiguous() for norm, smoothing in found.items()}, path)
    return SmoothingRecord(
        len(found),
        sum(smoothing.alpha is not None for smoothing in found.values()),
        max(smoothing.error_before for smoothing in found.values()),
        max(smoothing.error for smoothing in found.values()),
    )


class _Seeing:
    """What a `StreamedModel` calls."""

    def __init__(self, stride: int) -> None:
        self.found: dict[str, Smoothing] = {}
        self._stride = stride
        self._runs: dict[str, int] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._absmax: dict[str, Tensor] = {}

    def on_linear(self, name: str, x: Tensor) -> None:
        """Note magnitudes, and some of the activations, of what the first reader of each norm is given."""
        if not name.endswith(tuple(f"{readers[0]}.weight" for readers in READERS.values())):
            return
        largest, run = x.abs().amax(0), self._runs.get(name, 0)
        self._absmax[name] = torch.maximum(self._absmax[name], largest) if run else largest
        self._runs[name] = run + 1
        if run % self._stride == 0:
            self._kept.setdefault(name, []).append(x.clone())

    def on_block(self, block: str, module: nn.Module, x: Sequence[Tensor], run: Run) -> None:
        """Choose the factors of a layer's norms."""
        weights = dict(module.named_parameters())
        for norm, readers in READERS.items():
            first = f"{block}.{readers[0]}.weight"
            if first in self._kept:
                tried = [weights[f"{reader}.weight"].data for reader in readers]
                self.found[f"{block}.{norm}"] = best_smoothing(
                    self._kept.pop(first), tried, "tensor", self._absmax.pop(first)
                )


class SmoothedCheckpoint(AlteredCheckpoint):
    """A checkpoint with the factors of `find_smoothing` in its weights: a `WeightSource`, and what else an export asks of
    a `Checkpoint`. Weights that change are read in float32. `sha256` is the checkpoint's: the factors follow from it.
    """

    checkpoint: Checkpoint | MergedCheckpoint

    def __init__(self, checkpoint: Checkpoint | MergedCheckpoint, path: Path) -> None:
        super().__init__(checkpoint)
        self._divided: dict[str, Tensor] = {}
        self._multiplied: dict[str, Tensor] = {}
        for norm, factors in load_file(path).items():
            layer, _, kind = norm.rpartition(".")
            self._divided |= {f"{norm}.weight": factors, f"{norm}.bias": factors}
            self._multiplied |= {f"{layer}.{reader}.weight": factors for reader in READERS[kind]}
        changed = self._divided.keys() | self._multiplied.keys()
        self.tensors: Mapping[str, TensorRecord] = {
            name: dataclasses.replace(record, dtype="F32") if name in changed else record
            for name, record in checkpoint.tensors.items()
        }

    @property
    def sha256(self) -> str:
        return self.checkpoint.sha256

    def load_model(self, dtype: torch.dtype = torch.float32) -> MiniCPMV:
        """The reference model with all weights, smoothed, in `dtype`. Raises CheckpointError."""
        return load_model(self, self.config, f"{self.folder}, smoothed", dtype)

    def tensor(self, name: str) -> Tensor:
        """See `WeightSource.tensor`."""
        return self._changed(name, self.checkpoint.tensor(name), slice(None))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `WeightSource.rows`."""
        return self._changed(name, self.checkpoint.rows(name, start, stop), slice(start, stop))

    def _changed(self, name: str, stored: Tensor, rows: slice) -> Tensor:
        if name in self._divided:
            return smooth_norm(stored.float(), None, self._divided[name][rows])[0]
        return smooth_input(stored, self._multiplied[name]) if name in self._multiplied else stored
