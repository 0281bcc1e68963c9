"""The model in plain torch and float32, with as many layers of the decoder as there is memory for, asked as a bundle is.

    python -m lensc.bench.ladder_torch CHECKPOINT --layers 3 [--threads 2]

It is the reference model, behind the same pipeline, and speaks the protocol of `lensc.measured`. Besides `load_seconds` it
says what a layer takes in memory (`layer_bytes`) and how many the checkpoint has (`num_layers`).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lensc import measured
from lensc.backends.errors import ExecutionError, LensError, UsageError
from lensc.profiles import probe

if TYPE_CHECKING:
    from torch import Tensor

    from lensc.export.checkpoint import Checkpoint
    from lensc.export.shards import TensorRecord
    from lensc.runtime.pipeline import VLM

LAYERS = (1, 5)
"""Sizes of which the whole is made: what four layers take is their difference."""
_LAYER = re.compile(r"llm\.model\.layers\.(\d+)\.")


class FewerLayers:
    """The weights of a checkpoint whose decoder ends after `layers`."""

    def __init__(self, checkpoint: Checkpoint, layers: int) -> None:
        self._checkpoint = checkpoint
        self._layers = layers

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Those that are left."""
        return {name: found for name, found in self._checkpoint.tensors.items() if _layer(name) < self._layers}

    @property
    def sha256(self) -> str:
        """That of the whole checkpoint."""
        return self._checkpoint.sha256

    def tensor(self, name: str) -> Tensor:
        """See `WeightSource.tensor`."""
        return self._checkpoint.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `WeightSource.rows`."""
        return self._checkpoint.rows(name, start, stop)

    def layer_bytes(self) -> int:
        """Of a layer in float32."""
        return sum(4 * math.prod(found.shape) for name, found in self._checkpoint.tensors.items() if _layer(name) == 0)


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return -1 if match is None else int(match[1])


def load(folder: Path, layers: int) -> tuple[VLM, int, int]:
    """The model, the bytes of a layer, and how many layers it should have. Raises CheckpointError, UsageError."""
    from lensc.export.checkpoint import Checkpoint, load_model
    from lensc.export.models.session import torch_sessions
    from lensc.runtime.pipeline import VLM
    from lensc.runtime.prompt import Tokenizer

    checkpoint = Checkpoint(folder)
    spec, most = checkpoint.model_spec(), checkpoint.config.num_hidden_layers
    if not 1 <= layers <= most:
        raise UsageError(f"--layers {layers}: expected 1 to {most}, the layers of {folder}")
    weights = FewerLayers(checkpoint, layers)
    config = dataclasses.replace(checkpoint.config, num_hidden_layers=layers)
    model = load_model(weights, config, str(folder))
    spec = dataclasses.replace(spec, decoder=dataclasses.replace(spec.decoder, num_layers=layers))
    table = model.llm.model.embed_tokens.weight.detach().numpy()
    vlm = VLM(spec, Tokenizer.from_file(checkpoint.tokenizer), torch_sessions(model), table)
    return vlm, weights.layer_bytes(), most


def whole(found: Mapping[int, Mapping[str, float]], layer_bytes: int, num_layers: int) -> dict[str, float]:
    """The figures of all `num_layers` layers, from those of two sizes, the smaller of which encoded no picture.

    Every layer takes as long as the others, and all else is in both sizes. Raises ExecutionError where more layers took less
    time.
    """
    (few, less), (many, more) = sorted(found.items())
    missing = num_layers - many
    waits_s = (more["first token"] - more["image"] - less["first token"]) / (many - few)
    step_s = (1 / more["decode"] - 1 / less["decode"]) / (many - few)
    if min(waits_s, step_s) <= 0:
        raise ExecutionError(
            f"{many} layers took less time than {few}: others use this machine; run the ladder again when it is idle"
        )
    return {
        "image": more["image"],
        "first token": more["first token"] + missing * waits_s,
        "decode": 1 / (1 / more["decode"] + missing * step_s),
        "memory": more["memory"] + missing * layer_bytes / 1e9,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer lines of stdin until its end."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.ladder_torch", description=str(__doc__).split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--threads", type=int, default=probe.machine().cores, help="default: the physical cores")
    options = parser.parse_args(arguments)
    try:
        import torch

        started = time.perf_counter()
        torch.set_num_threads(options.threads)
        vlm, layer_bytes, num_layers = load(options.checkpoint, options.layers)
        ready = {"load_seconds": time.perf_counter() - started, "layer_bytes": layer_bytes, "num_layers": num_layers}
        measured.answer_lines(vlm, ready)
    except LensError as error:
        measured.say_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
