"""A token through a whole decoder in one launch. See token.cu."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lensc.kernels import nvrtc
from lensc.kernels.linear.gpu import STEP, FloatWeight, GroupedWeight, Weight

_SOURCE = Path(__file__).with_name("token.cu")
_TILES, _WARPS, _DEPTH = 2, 16, 4
_STATIC_BYTES = 6144
"""Of shared memory, for what the kernel and the driver take beside it."""
DIM = 128
"""Dimensions of a head: the only number of them that the kernel knows."""


@dataclass(frozen=True)
class LayerWeights:
    """A layer of the decoder: query, key and value as one weight, and gate and up; norms are float32[width]."""

    attention_norm: torch.Tensor
    query_key_value: Weight
    output: Weight
    mlp_norm: torch.Tensor
    gate_up: Weight
    down: Weight

    @property
    def linears(self) -> tuple[Weight, ...]:
        return self.query_key_value, self.output, self.gate_up, self.down


@dataclass(frozen=True)
class DecoderWeights:
    """A decoder: its layers, what is behind them, and its attention. frequencies: float32[DIM / 2]."""

    layers: Sequence[LayerWeights]
    norm: torch.Tensor
    head: Weight
    epsilon: float
    heads: int
    kv_heads: int
    scale: float
    frequencies: torch.Tensor

    @property
    def linears(self) -> list[Weight]:
        return [*(weight for layer in self.layers for weight in layer.linears), self.head]


def runs(weights: DecoderWeights, head_dim: int) -> bool:
    """Whether the kernel takes a decoder on this device: heads of 128 dimensions, weights of one format, whole tiles."""
    linears = weights.linears
    device = weights.norm.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9 or head_dim != DIM:
        return False
    formats = {(w.group, w.zero is None) if isinstance(w, GroupedWeight) else (0, w.values.dtype) for w in linears}
    whole = all(w.inputs % STEP == 0 and w.outputs % (16 * _TILES) == 0 for w in linears)
    is_known = all(isinstance(w, GroupedWeight) or w.values.dtype == torch.bfloat16 for w in linears)
    limits = torch.cuda.get_device_properties(device)
    used = _shared_bytes(linears, weights.heads // weights.kv_heads) + _table_bytes(linears)
    fits = used + _STATIC_BYTES <= limits.shared_memory_per_block_optin
    enough = limits.multi_processor_count >= weights.kv_heads and weights.heads % weights.kv_heads == 0
    return len(formats) == 1 and whole and is_known and fits and enough


def _shared_bytes(linears: Sequence[Weight], shared_by: int) -> int:
    """The ring, and behind it x and the sums of the warps, or those of attention."""
    padded, first = max(w.inputs for w in linears), linears[0]
    of_slot = 1024
    staged = 2 * padded + 16
    if isinstance(first, GroupedWeight):
        spans = STEP // first.span
        of_slot += spans * (32 + 16 * (first.zero is not None))
        staged = 2 * (padded + 16) + 8 * (padded // first.span)
    sums = 2 * _WARPS * 16 * _TILES * 4
    return _WARPS * _DEPTH * _TILES * of_slot + -(-max(staged + sums, _WARPS * shared_by * (DIM + 2) * 4) // 16) * 16


def _table_bytes(linears: Sequence[Weight]) -> int:
    """Behind it: what linears and layers are."""
    return len(linears) * 56 + len(linears) // 4 * 32


class TokenKernel:
    """The kernel for one decoder, with what it works in. Launches follow one another."""

    def __init__(self, weights: DecoderWeights) -> None:
        """Compile it. Raises UnavailableError, also where NVRTC is missing."""
        self._weights = weights
        linears = weights.linears
        device = weights.norm.device
        first = linears[0]
        grouped = first if isinstance(first, GroupedWeight) else None
        definitions = {
            "BITS": 16 if grouped is None else 4,
            "GROUP": 0 if grouped is None else grouped.group,
            "SPAN": 0 if grouped is None else grouped.span,
            "ZEROS": int(grouped is not None and grouped.zero is not None),
            "MOST_ROWS": 4,
            "TILES": _TILES,
            "WARPS": _WARPS,
            "DEPTH": _DEPTH,
            "HEADS": weights.heads,
            "KV_HEADS": weights.kv_heads,
        }
        limits = torch.cuda.get_device_properties(device)
        arch = f"sm_{limits.major}{limits.minor}"
        self._kernel = nvrtc.kernel(_SOURCE, "token", tuple(definitions.items()), device.index or 0, arch)
        self._blocks = limits.multi_processor_count
        self._tables = _shared_bytes(linears, weights.heads // weights.kv_heads)
        self._shared_bytes = self._tables + _table_bytes(linears)
        self._linears = torch.tensor(
            [_described(w, i % 4 == 2 and i < len(linears) - 1) for i, w in enumerate(linears)], device=device
        )
        floats = functools.partial(torch.empty, dtype=torch.float32, device=device)
        values = functools.partial(torch.empty, dtype=torch.bfloat16, device=device)
        self._stream = floats(weights.head.inputs)
        self._query_key_value = values(weights.layers[0].query_key_value.outputs)
        self._mixed = values(weights.heads * DIM)
        self._gated = values(weights.layers[0].down.inputs)
        self._logits = floats(1, weights.head.outputs)
        parts = self._blocks // weights.kv_heads * weights.heads
        self._largest, self._total, self._parts = floats(parts), floats(parts), floats(parts, DIM)
        self._finished = torch.zeros(weights.kv_heads, dtype=torch.int32, device=device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def table(self, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """The layers with their caches, bfloat16[1, kv_heads, capacity, DIM], as the kernel reads them: int64[layers, 4]."""
        rows = [
            [layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr(), key.data_ptr(), value.data_ptr()]
            for layer, (key, value) in zip(self._weights.layers, caches, strict=True)
        ]
        return torch.tensor(rows, device=self._stream.device)

    def __call__(self, embedding: torch.Tensor, table: torch.Tensor, capacity: int, past: torch.Tensor) -> torch.Tensor:
        """Append a token, float32[width], at position `past`, int32[1] on the device. Returns the logits behind it,
        float32[1, vocabulary], which the next call overwrites.
        """
        weights = self._weights
        self._stream.copy_(embedding.reshape(-1))
        self._arrived.zero_()
        pointers = (
            *(self._linears, table, weights.norm, weights.frequencies),
            *(self._stream, self._query_key_value, self._mixed, self._gated, self._logits),
            *(self._largest, self._total, self._parts, self._finished, self._arrived),
        )
        addresses = [(tensor.data_ptr(), nvrtc.POINTER) for tensor in pointers]
        arguments = [
            *addresses[:4],
            (weights.scale, nvrtc.FLOAT),
            (past.data_ptr(), nvrtc.POINTER),
            (capacity, nvrtc.INT),
            *addresses[4:],
            (max(w.inputs for w in weights.linears), nvrtc.INT),
            (self._tables, nvrtc.INT),
            (len(weights.layers), nvrtc.INT),
            (weights.epsilon, nvrtc.FLOAT),
        ]
        stream = torch.cuda.current_stream(embedding.device).cuda_stream
        self._kernel.launch(self._blocks, 32 * _WARPS, self._shared_bytes, arguments, stream, "at once")
        return self._logits


def _described(weight: Weight, gate: bool) -> list[int]:
    """A struct Linear as int64: four addresses and five int32."""
    if isinstance(weight, FloatWeight):
        addresses, groups = [weight.values.data_ptr(), 0, 0, 0], 0
    else:
        zero = 0 if weight.zero is None else weight.zero.data_ptr()
        addresses, groups = [weight.packed.data_ptr(), weight.scale.data_ptr(), weight.factor.data_ptr(), zero], 0
        groups = weight.scale.shape[1]
    return [*addresses, groups | weight.inputs << 32, weight.inputs | weight.outputs << 32, int(gate)]
