"""The graphs of a model: their signatures, their torch modules, and the modules as Sessions.

The Sessions are what every engine is compared with. They compute in float32, whatever dtype the weights have.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lensc.backends.base import Array, Session, check_feeds, check_out
from lensc.backends.errors import ExecutionError
from lensc.export.graph import DimRange, GraphSpec, StatePair, TensorSpec
from lensc.runtime.picture import MAX_PATCHES

from .config import ModelConfig
from .minicpmv import Decoder, MiniCPMV

MAX_BATCH = 16
"""Largest batch a decoder graph is made for: beams of a beam search (3 by default), or parallel answers."""


def vision_spec(config: ModelConfig) -> GraphSpec:
    """The signature of the graph `vision`: slices of patches in, embeddings in the decoder's width out."""
    per_patch = ("slices", "patches")
    pixels = config.vision.num_channels * config.patch_size**2
    usual = (config.scale_resolution // config.patch_size) ** 2
    return GraphSpec(
        name="vision",
        inputs=(
            TensorSpec("patches", "float32", (*per_patch, pixels)),
            TensorSpec("position_ids", "int64", per_patch),
            TensorSpec("attention_bias", "float32", per_patch),
            TensorSpec("key_bias", "float32", per_patch),
            TensorSpec("key_pos_embed", "float32", (*per_patch, config.hidden_size)),
        ),
        outputs=(TensorSpec("image_embeds", "float32", ("slices", config.query_num, config.hidden_size)),),
        states=(),
        dims={
            "slices": DimRange(
                1, 1, max(config.max_slice_nums + 1, config.max_position_embeddings // config.query_num)
            ),
            "patches": DimRange(1, max(1, usual), max(MAX_PATCHES, usual)),
        },
    )


def decoder_spec(config: ModelConfig) -> GraphSpec:
    """The signature of the graph `decoder`: one graph for prefill, decode and verification of drafted tokens."""
    rows = (config.num_key_value_heads, config.head_dim)
    context = config.max_position_embeddings
    names = [f"{kind}.{i}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    return GraphSpec(
        name="decoder",
        inputs=(
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", config.hidden_size)),
            TensorSpec("position_ids", "int64", ("tokens",)),
            TensorSpec("logit_positions", "int64", ("rows",)),
            *(TensorSpec(f"past_{name}", "float32", ("past", "batch", *rows)) for name in names),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "rows", config.vocab_size)),
            *(TensorSpec(name, "float32", ("tokens", "batch", *rows)) for name in names),
        ),
        states=tuple(StatePair(f"past_{name}", name) for name in names),
        dims={
            "batch": DimRange(1, 1, MAX_BATCH),
            "tokens": DimRange(1, 1, context),
            "rows": DimRange(1, 1, context),
            "past": DimRange(0, context // 4, context),
        },
    )


class DecoderGraph(nn.Module):
    """`Decoder` with the flat signature of the graph: key and value of a layer stand side by side.

    The decoder is an attribute under the checkpoint's name, so that parameters keep their full keys: `llm.model.…`.
    """

    def __init__(self, llm: Decoder) -> None:
        super().__init__()
        self.llm = llm

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, logit_positions: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        logits, keys, values = self.llm(inputs_embeds, position_ids, logit_positions, past[::2], past[1::2])
        return (logits, *(row for pair in zip(keys, values, strict=True) for row in pair))


def graph_modules(model: MiniCPMV) -> dict[str, tuple[nn.Module, GraphSpec]]:
    """Each graph of `model` by name: a module that takes and returns tensors in the order of its spec.

    The modules share the model's parameters and name them as the checkpoint does.
    """
    return {
        "vision": (model.vision_encoder().eval(), vision_spec(model.config)),
        "decoder": (DecoderGraph(model.llm).eval(), decoder_spec(model.config)),
    }


def torch_sessions(model: MiniCPMV) -> dict[str, Session]:
    """The reference model as Sessions `vision` and `decoder`. `model` must hold float32 weights; it is shared."""
    return {name: TorchSession(module, spec) for name, (module, spec) in graph_modules(model).items()}


class TorchSession:
    """A module as a Session: numpy in, numpy out, no gradients."""

    def __init__(self, module: nn.Module, spec: GraphSpec) -> None:
        self.spec = spec
        self._module: nn.Module | None = module.eval()

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run the module; see `Session.run`."""
        if self._module is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        sizes = check_feeds(self.spec, feeds)
        check_out(self.spec, sizes, out or {})
        with torch.inference_mode():
            results = self._module(*(_tensor(feeds[t.name]) for t in self.spec.inputs))
        if isinstance(results, Tensor):
            results = (results,)
        arrays: dict[str, Array] = {}
        for tensor, result in zip(self.spec.outputs, results, strict=True):
            arrays[tensor.name] = result.numpy()
            if out is not None and tensor.name in out:
                np.copyto(out[tensor.name], arrays[tensor.name])
                arrays[tensor.name] = out[tensor.name]
        return arrays

    def close(self) -> None:
        """Let go of the module."""
        self._module = None


def _tensor(array: Array) -> Tensor:
    # torch warns of arrays it could write to but must not, such as memory-mapped tables
    return torch.from_numpy(array if array.flags.writeable else array.copy())
