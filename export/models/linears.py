"""Which parameters of the reference model are weights of linears, under the names that these have in the graphs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lensc.export.onnx import THIRDS
from lensc.export.quantize.linears import TURNED
from lensc.export.shards import TensorRecord

NOT_LINEAR = ("embed_tokens.weight", "position_embedding.weight", "resampler.query")
"""Matrices that are looked up, not multiplied with."""


@dataclass(frozen=True, eq=False)
class LinearRows:
    """A linear's weight [outputs, inputs], a view of a parameter."""

    name: str
    weight: Tensor


def linear_rows(name: str, parameter: Tensor) -> list[LinearRows]:
    """The linears whose weights lie in the parameter `name`: none, one, or three where their rows are packed."""
    if parameter.ndim != 2 or name.endswith(NOT_LINEAR):
        return []
    if name.endswith("in_proj_weight"):
        return [LinearRows(f"{name}.{third}", part) for third, part in zip(THIRDS, parameter.chunk(3), strict=True)]
    if name in TURNED:
        return [LinearRows(name, parameter.T)]
    return [LinearRows(name, parameter)]


def linear_shapes(tensors: Mapping[str, TensorRecord]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear of a model with these parameters."""
    return {
        rows.name: (rows.weight.shape[0], rows.weight.shape[1])
        for name, record in tensors.items()
        for rows in linear_rows(name, torch.empty(record.shape, device="meta"))
    }


def shared_input(name: str) -> str:
    """A name for what the linear `name` reads, the same for all linears that read the same."""
    return re.sub(r"\.(?:[qkv]|gate|up)_proj\.weight$", _family, name)


def _family(match: re.Match[str]) -> str:
    return ".mlp input" if match[0][1] in "gu" else ".attention input"
