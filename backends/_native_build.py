"""A program as read from its file -> the compiled executor's, its constants where the files are mapped."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._multiples import scales_of
from ._program import (
    BITS,
    Add,
    Attention,
    CausalAttention,
    Constant,
    GatherRows,
    GeluTanh,
    Linear,
    Normalize,
    Place,
    Program,
    SelectRows,
    SiluMul,
    Step,
    WeightRecord,
    split,
)
from .base import Array

SUM_MULTIPLES = ("amx", "avx512", "avx2")
"""Instruction sets that look up 64 weights at once, or multiply sums of pairs by a multiple for nothing. On others multiples become
scales again when a program is built: products of whole bytes take more instructions there than products of 4 bits with a scale
for every group."""


@dataclass(frozen=True)
class Built:
    """A program ready to run, and what it asks for. `constants` are what it points to."""

    program: Any
    row_classes: tuple[str, ...]
    arrays: tuple[str, ...]
    """The inputs that are no values, by slot: indices and biases."""
    limits: Mapping[str, int | str]
    """Of those that are indices: how many rows there are to choose from, or the dimension that says so."""
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    constants: tuple[Array, ...]


def build(program: Program, files: Mapping[str, mmap.mmap], kernels: Any, isa: str, threads: int, exact: bool) -> Built:
    """Make `program` for an instruction set. `exact`: attention in float32 even where bfloat16 is faster."""
    return _Building(program, files, kernels.Program(isa, threads), exact, isa in SUM_MULTIPLES).built()


class _Building:
    def __init__(
        self, program: Program, files: Mapping[str, mmap.mmap], made: Any, exact: bool, sums_multiples: bool
    ) -> None:
        self._program, self._files, self._made, self._exact = program, files, made, exact
        self._sums_multiples = sums_multiples
        self._row_classes: dict[str, int] = {}
        self._arrays: dict[str, int] = {}
        self._limits: dict[str, int | str] = {}
        self._constants: list[Array] = []

    def built(self) -> Built:
        for value in self._program.values:
            self._made.value(self._row_class(value.rows), value.width)
        for step in self._program.steps:
            self._add(step)
        for port in self._program.outputs:
            self._made.output(port.value)
        self._made.finish()
        return Built(
            self._made,
            tuple(self._row_classes),
            tuple(self._arrays),
            self._limits,
            {port.name: port.value for port in self._program.inputs},
            {port.name: port.value for port in self._program.outputs},
            tuple(self._constants),
        )

    def _add(self, step: Step) -> None:
        made = self._made
        rows = self._program.values[step.y].rows
        match step:
            case Normalize(kind="rms"):
                made.rms_norm(step.x, self._row(step.weight), step.epsilon, step.y)
            case Normalize():
                made.layer_norm(step.x, self._row(step.weight), self._optional(step.bias), step.epsilon, step.y)
            case Add():
                if isinstance(step.b, int):
                    made.add(step.a, step.b, step.y)
                else:
                    made.add_constant(step.a, self._matrix(step.b), step.y)
            case GatherRows():
                self._limits[step.ids] = step.table.rows
                made.gather_rows(self._matrix(step.table), self._array(step.ids), step.y)
            case SelectRows():
                parts, of_each = split(self._program.values[step.x].rows)
                self._limits[step.positions] = int(of_each) if of_each.isdigit() else of_each
                made.select_rows(step.x, self._array(step.positions), self._row_class(parts), step.y)
            case SiluMul():
                made.silu_mul(step.gate, step.up, step.y)
            case GeluTanh():
                made.gelu_tanh(step.x, step.y)
            case Linear():
                self._linear(step)
            case CausalAttention():
                frequencies = self._row(step.inverse_frequencies)
                apart = self._row_class(split(rows)[0])
                made.causal_attention(
                    step.q, step.k, step.v, step.y, apart, step.layer, step.num_heads, step.scale, frequencies
                )
            case Attention():
                constant = self._matrix(step.q) if isinstance(step.q, Constant) else None
                q = -1 if isinstance(step.q, Constant) else step.q
                apart = self._row_class(split(rows)[0])
                bias = -1 if step.bias is None else self._array(step.bias)
                made.attention(
                    q, constant, step.k, step.v, step.y, apart, bias, step.num_heads, step.scale, self._exact
                )

    def _linear(self, step: Linear) -> None:
        weight, bias = step.weight, self._optional(step.bias)
        residual = -1 if step.residual is None else step.residual
        if weight.kind == "f32":
            values = self._bytes(weight.values, weight.values_bytes).view(np.float32)
            matrix = values.reshape(weight.outputs, weight.inputs)
            self._made.float_linear(step.x, matrix, bias, residual, step.y)
            return
        assert weight.scale is not None
        scales = self._bytes(weight.scale, weight.scale_bytes).view(np.float32)
        if weight.kind == "int8_tiles":
            sums_bytes = 4 * weight.outputs
            tiles = self._bytes(weight.values, weight.values_bytes - sums_bytes)
            behind = Place(weight.values.file, weight.values.offset + len(tiles))
            sums = self._bytes(behind, sums_bytes).view(np.int32)
            self._made.channel_linear(step.x, tiles, scales, sums, bias, residual, step.y)
            return
        multiples = self._multiples(weight)
        if multiples is not None and not self._sums_multiples:
            scales, multiples = scales_of(scales, multiples).astype(np.float32), None
            self._constants.append(scales)
        self._made.group_linear(
            step.x,
            self._bytes(weight.values, weight.values_bytes),
            scales.reshape(weight.outputs, -1),
            self._zero_points(weight),
            BITS[weight.kind],
            weight.kind == "int8",
            weight.group or weight.inputs,
            weight.activations == "int8",
            bias,
            residual,
            step.y,
            multiples,
        )

    def _zero_points(self, weight: WeightRecord) -> Array | None:
        return None if weight.zero_point is None else self._bytes(weight.zero_point, weight.zero_point_bytes)

    def _multiples(self, weight: WeightRecord) -> Array | None:
        if weight.multiples is None:
            return None
        return (
            self._bytes(weight.multiples, weight.multiples_bytes).view(np.int8).reshape(weight.outputs, weight.groups)
        )

    def _row_class(self, rows: str) -> int:
        return self._row_classes.setdefault(rows, len(self._row_classes))

    def _array(self, name: str) -> int:
        return self._arrays.setdefault(name, len(self._arrays))

    def _bytes(self, place: Place, nbytes: int) -> Array:
        """Bytes of a file where they are mapped, kept for as long as the program is."""
        found = np.frombuffer(self._files[place.file], np.uint8, nbytes, place.offset)
        self._constants.append(found)
        return found

    def _matrix(self, constant: Constant) -> Array:
        floats = self._bytes(constant.place, constant.nbytes).view(np.float32)
        return floats.reshape(constant.rows, constant.width)

    def _row(self, constant: Constant) -> Array:
        return self._matrix(constant).reshape(-1)

    def _optional(self, constant: Constant | None) -> Array | None:
        return None if constant is None else self._row(constant)
