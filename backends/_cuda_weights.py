"""The constants of a program on a GPU: read from their files, and linears' weights as the kernels take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from lensc.kernels.linear.gpu import FloatWeight, Weight, can_pack, pack

from ._program import BITS, Constant, Place, WeightRecord
from .files import give_back, map_file


class Source(Protocol):
    """Where the constants of a program come from. Every tensor is on `device`."""

    device: torch.device

    def constant(self, constant: Constant) -> torch.Tensor:
        """float32[rows, width]"""
        ...

    def values(self, weight: WeightRecord) -> torch.Tensor:
        """Of kind f32 float[outputs, inputs]; uint4 and uint2 uint8[outputs, inputs * bits / 8]; uint8 and int8 [outputs,
        inputs] of that type.
        """
        ...

    def scale(self, weight: WeightRecord) -> torch.Tensor:
        """float32[outputs, groups]"""
        ...

    def zero_point(self, weight: WeightRecord) -> torch.Tensor | None:
        """uint8[outputs, groups], not packed; None is 2^(bits-1), and 0 for int8."""
        ...


class FileSource:
    """The data files of a program in `folder`. See `Source`."""

    def __init__(self, folder: Path, files: Sequence[str], device: torch.device) -> None:
        """Map the files. Raises ExecutionError."""
        self.device = device
        self._files = {name: map_file(folder / name) for name in files}

    def constant(self, constant: Constant) -> torch.Tensor:
        data = self._bytes(constant.place, constant.nbytes)
        return data.view(torch.float32).view(constant.rows, constant.width)

    def values(self, weight: WeightRecord) -> torch.Tensor:
        data = self._bytes(weight.values, weight.values_bytes)
        if weight.kind == "f32":
            data = data.view(torch.float32)
        elif weight.kind == "int8":
            data = data.view(torch.int8)
        return data.view(weight.outputs, -1)

    def scale(self, weight: WeightRecord) -> torch.Tensor:
        assert weight.scale is not None, f"{weight.name} has no scales"
        return self._bytes(weight.scale, weight.scale_bytes).view(torch.float32).view(weight.outputs, weight.groups)

    def zero_point(self, weight: WeightRecord) -> torch.Tensor | None:
        if weight.zero_point is None:
            return None
        packed = self._bytes(weight.zero_point, weight.zero_point_bytes)
        return unpacked_bits(packed, BITS[weight.kind], weight.outputs * weight.groups).view(weight.outputs, -1)

    def close(self) -> None:
        """Give the pages of the files back."""
        for mapped in self._files.values():
            give_back(mapped)

    def _bytes(self, place: Place, nbytes: int) -> torch.Tensor:
        found = np.frombuffer(self._files[place.file], np.uint8, nbytes, place.offset)
        held = torch.empty(nbytes, dtype=torch.uint8)
        held.numpy()[:] = found  # torch takes no array that cannot be written to
        return held.to(self.device)


def unpacked_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8[count] from values of few bits that follow each other from the lowest bits of a byte to the highest."""
    if bits == 8:
        return packed.flatten()[:count]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    values: torch.Tensor = (packed.flatten()[:, None] >> shifts) & (2**bits - 1)
    return values.flatten()[:count]


def format_of(weight: WeightRecord) -> tuple[object, ...]:
    """Weights that are alike in this can be one weight with the outputs of all."""
    return weight.kind, weight.group or weight.inputs, weight.inputs, weight.zero_point is None


def stays_packed(weight: WeightRecord) -> bool:
    """Whether the GPU holds a weight in its few bits; every other becomes floats as it is loaded."""
    return weight.kind == "uint4" and (weight.group == 0 or can_pack(weight.group))


def weight_on_device(source: Source, members: Sequence[WeightRecord], dtype: torch.dtype) -> Weight:
    """One weight with the outputs of `members`, which have the same format, one behind the other."""
    first = members[0]
    if first.kind == "f32":
        return FloatWeight(torch.cat([source.values(member).to(dtype) for member in members]))
    if not stays_packed(first):
        return FloatWeight(torch.cat([_floats(source, member).to(dtype) for member in members]))
    zeros = [source.zero_point(member) for member in members]
    return pack(
        torch.cat([source.values(member) for member in members]),
        torch.cat([source.scale(member) for member in members]),
        None if zeros[0] is None else torch.cat([zero for zero in zeros if zero is not None]),
        first.group or math.ceil(first.inputs / 128) * 128,
        first.inputs,
    )


def device_bytes(members: Sequence[WeightRecord], dtype: torch.dtype) -> int:
    """What `weight_on_device` takes of the device's memory, but for rows that are filled up."""
    if stays_packed(members[0]):
        return sum(
            m.values_bytes + m.outputs * (4 + m.groups * (3 if m.zero_point is not None else 2)) for m in members
        )
    return sum(m.outputs * m.inputs * dtype.itemsize for m in members)


def _floats(source: Source, weight: WeightRecord) -> torch.Tensor:
    """float32[outputs, inputs]: (values - zero point) * scale."""
    bits = BITS[weight.kind]
    values = source.values(weight)
    if bits < 8:
        values = unpacked_bits(values, bits, weight.outputs * weight.inputs).view(weight.outputs, weight.inputs)
    group = weight.group or weight.inputs
    scale, zero = source.scale(weight), source.zero_point(weight)
    if zero is None:
        zero = torch.full_like(scale, 0 if weight.kind == "int8" else 2 ** (bits - 1))
    by, less = (part.float().repeat_interleave(group, dim=1)[:, : weight.inputs] for part in (scale, zero))
    return (values.float() - less) * by
