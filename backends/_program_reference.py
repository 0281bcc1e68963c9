"""A program run step by step in numpy, from the kernels' references.

It is what the compiled executor is held against, and what answers where that cannot run. Weights are dequantized while
they are read, some outputs at a time, so it takes as little memory as the compiled one, and far more time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lensc.export.graph import GraphSpec
from lensc.kernels.activation.reference import gelu_tanh, silu_mul
from lensc.kernels.attention.reference import attention, causal_attention
from lensc.kernels.linear.reference import linear, quantized_linear, unpack
from lensc.kernels.norm.reference import layer_norm, rms_norm
from lensc.kernels.rope.reference import rope, rope_table

from ._multiples import scales_of
from ._program import (
    BITS,
    TILE,
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
    count,
    last_reads,
    reads,
    split,
)
from ._program_file import check_spec
from .base import Array, check_feeds, check_indices, check_out
from .errors import ExecutionError, UsageError

BLOCK = 1 << 22
"""Weights that are dequantized at once: 32 MiB of float64."""


class NumpySession:
    """A program that `read` gave, whose data files lie in `folder`. See `Session`."""

    def __init__(self, spec: GraphSpec, program: Program, folder: Path) -> None:
        """Map the data files. Raises GraphError for the program of another graph, OSError."""
        check_spec(program, spec)
        self.spec = spec
        self._program = program
        self._files: dict[str, Array] = {
            name: np.memmap(folder / name, np.uint8, "r") for name in program.files
        }  # fmt: skip
        self._closed = False

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once; see `Session.run`. New keys and values are outputs, as in the portable graph.

        Raises UsageError, also for an index outside its table and for position ids that do not follow the past.
        """
        if self._closed:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        given = {} if out is None else out
        sizes = check_feeds(self.spec, feeds)
        shapes = check_out(self.spec, sizes, given)
        made: dict[str, Array] = {}
        values: dict[int, Array] = {}
        for port in self._program.inputs:
            values[port.value] = feeds[port.name].reshape(-1, self._program.values[port.value].width)
        last = last_reads(self._program)
        # overflow is a value in IEEE arithmetic, not an event
        with np.errstate(all="ignore"):
            for i, step in enumerate(self._program.steps):
                values[step.y] = np.asarray(self._made(step, values, feeds, sizes, made), np.float32)
                for value in set(reads(step)):
                    if last[value] == i:
                        del values[value]
        made |= {port.name: values[port.value] for port in self._program.outputs}
        outputs: dict[str, Array] = {}
        for tensor in self.spec.outputs:
            result = np.ascontiguousarray(made[tensor.name], tensor.dtype).reshape(shapes[tensor.name])
            outputs[tensor.name] = given.get(tensor.name, result)
            if tensor.name in given:
                np.copyto(outputs[tensor.name], result)
        return outputs

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()
        self._closed = True

    def _made(
        self,
        step: Step,
        values: Mapping[int, Array],
        feeds: Mapping[str, Array],
        sizes: Mapping[str, int],
        made: dict[str, Array],
    ) -> Array:
        """The value that a step makes: float[rows, width]. New keys and values are put into `made`."""
        rows = self._program.values[step.y].rows
        match step:
            case Normalize():
                x, weight = values[step.x], self._constant(step.weight)
                if step.kind == "rms":
                    return rms_norm(x, weight, step.epsilon)
                bias = None if step.bias is None else self._constant(step.bias)
                return layer_norm(x, weight, bias, step.epsilon)
            case Add():
                a = values[step.a]
                b = values[step.b] if isinstance(step.b, int) else self._constant(step.b)
                total: Array = (a.reshape(-1, *b.shape) + b).reshape(a.shape)
                return total
            case GatherRows():
                ids = self._indices(step.ids, feeds, step.table.rows)
                return self._constant(step.table)[ids.reshape(-1)]
            case SelectRows():
                x = values[step.x]
                x = x.reshape(sizes[split(rows)[0]], -1, x.shape[1])
                picked: Array = x[:, self._indices(step.positions, feeds, x.shape[1])]
                return picked.reshape(-1, x.shape[2])
            case SiluMul():
                return silu_mul(values[step.gate], values[step.up])
            case GeluTanh():
                return gelu_tanh(values[step.x])
            case Linear():
                y = self._product(values[step.x], step.weight)
                y = y if step.bias is None else y + self._constant(step.bias)
                return y if step.residual is None else y + values[step.residual]
            case CausalAttention():
                return self._causal_attention(step, values, feeds, sizes, made)
            case Attention():
                slices = count(split(rows)[0], sizes)
                key, value = (_apart(values[i], slices) for i in (step.k, step.v))
                q = values[step.q] if isinstance(step.q, int) else np.tile(self._constant(step.q), (slices, 1))
                bias = None if step.bias is None else feeds[step.bias]
                mixed = attention(_apart(q, slices), key, value, bias, step.num_heads, step.scale)
                return mixed.reshape(-1, mixed.shape[2])

    def _causal_attention(
        self,
        step: CausalAttention,
        values: Mapping[int, Array],
        feeds: Mapping[str, Array],
        sizes: Mapping[str, int],
        made: dict[str, Array],
    ) -> Array:
        batch, tokens = (count(part, sizes) for part in split(self._program.values[step.y].rows))
        states = self.spec.states[2 * step.layer : 2 * step.layer + 2]
        past_key, past_value = (feeds[state.input].transpose(1, 2, 0, 3) for state in states)
        past = past_key.shape[2]
        self._check_positions(feeds, past, tokens)
        table = rope_table(np.arange(past, past + tokens), self._constant(step.inverse_frequencies)[0])
        q, k, v = (
            _apart(values[i], batch).reshape(batch, tokens, heads, step.head_dim)
            for i, heads in ((step.q, step.num_heads), (step.k, step.kv_num_heads), (step.v, step.kv_num_heads))
        )
        query, key = (np.stack([rope(x, *table) for x in some]) for some in (q, k))
        for state, new in zip(states, (key, v), strict=True):
            made[state.output] = np.asarray(new, np.float32).swapaxes(0, 1)
        keys, held = (
            np.concatenate([old, new.swapaxes(1, 2)], axis=2) for old, new in ((past_key, key), (past_value, v))
        )
        return np.concatenate([causal_attention(query[i], keys[i], held[i], past, step.scale) for i in range(batch)])

    def _check_positions(self, feeds: Mapping[str, Array], past: int, tokens: int) -> None:
        positions = feeds.get("position_ids")
        if positions is not None and not np.array_equal(positions, np.arange(past, past + tokens)):
            raise UsageError(
                f"graph {self.spec.name}: position_ids are {positions.tolist()[:8]}…, expected {past} to "
                f"{past + tokens - 1}, which follow the cache"
            )

    def _indices(self, name: str, feeds: Mapping[str, Array], rows: int) -> Array:
        """An input of row numbers, which are below `rows`. Raises UsageError."""
        check_indices(self.spec, name, feeds[name], rows)
        return feeds[name]

    # --- constants ------------------------------------------------------------------------------------------------

    def _bytes(self, place: Place, start: int, size: int) -> Array:
        first = place.offset + start
        return self._files[place.file][first : first + size]

    def _constant(self, constant: Constant) -> Array:
        data = self._bytes(constant.place, 0, constant.nbytes)
        return np.frombuffer(data, "<f4").reshape(constant.rows, constant.width)

    def _product(self, x: Array, weight: WeightRecord) -> Array:
        """x W^T: float64[rows, outputs]."""
        parts = [
            linear(x, values)
            if scales is None
            else quantized_linear(
                x, values, scales, zeros, weight.group, weight.unit if weight.activations == "int8" else None
            )
            for values, scales, zeros in self._blocks(weight)
        ]
        return np.concatenate(parts, axis=1)

    def _blocks(self, weight: WeightRecord) -> Iterator[tuple[Array, Array | None, Array | None]]:
        """Values, scales and zero points of some outputs at a time, as the references take them."""
        bits = BITS[weight.kind]
        row_bytes = weight.inputs * bits // 8
        step = max(1, BLOCK // weight.inputs // TILE[0]) * TILE[0]
        zeros = self._zero_points(weight)
        for start in range(0, weight.outputs, step):
            n = min(step, weight.outputs - start)
            if weight.kind == "int8_tiles":
                assert weight.scale is not None
                scales = np.frombuffer(self._bytes(weight.scale, 4 * start, 4 * n), "<f4")
                yield self._untiled(weight, start, n), scales.reshape(n, 1), None
                continue
            data = self._bytes(weight.values, start * row_bytes, n * row_bytes)
            if weight.scale is None:
                yield np.frombuffer(data, "<f4").reshape(n, weight.inputs), None, None
                continue
            scales = self._scales(weight, start, n)
            values = np.frombuffer(data, np.int8) if bits == 8 else unpack(data, bits, n * weight.inputs)
            values = values.view(np.uint8) if weight.kind == "uint8" else values
            part = None if zeros is None else zeros[start : start + n]
            yield values.reshape(n, weight.inputs), scales, part

    def _scales(self, weight: WeightRecord, start: int, n: int) -> Array:
        """Of outputs start to start + n: float[n, groups]."""
        assert weight.scale is not None
        groups = weight.groups
        if weight.multiples is None:
            return np.frombuffer(self._bytes(weight.scale, 4 * start * groups, 4 * n * groups), "<f4").reshape(
                n, groups
            )
        steps = np.frombuffer(self._bytes(weight.scale, 4 * start, 4 * n), "<f4")
        multiples = np.frombuffer(self._bytes(weight.multiples, start * groups, n * groups), np.int8)
        return scales_of(steps, multiples.reshape(n, groups))

    def _untiled(self, weight: WeightRecord, start: int, n: int) -> Array:
        """Outputs start to start + n of `int8_tiles`: int8[n, inputs]. `start` begins a tile."""
        inputs = weight.padded[1]
        rows = -(-n // TILE[0]) * TILE[0]
        tiles = np.frombuffer(self._bytes(weight.values, start * inputs, rows * inputs), np.int8)
        whole = tiles.reshape(rows // TILE[0], inputs // TILE[1], *TILE).transpose(0, 2, 1, 3).reshape(rows, inputs)
        values: Array = whole[:n, : weight.inputs]
        return values

    def _zero_points(self, weight: WeightRecord) -> Array | None:
        """uint8[outputs, groups], None for int8."""
        if weight.kind in ("f32", "int8", "int8_tiles"):
            return None
        bits, shape = BITS[weight.kind], (weight.outputs, weight.groups)
        if weight.zero_point is None:
            return np.full(shape, 2 ** (bits - 1), np.uint8)
        packed = self._bytes(weight.zero_point, 0, weight.zero_point_bytes)
        return unpack(packed, bits, math.prod(shape)).reshape(shape)


def _apart(x: Array, parts: int) -> Array:
    """[parts * rows, width] -> [parts, rows, width]."""
    return x.reshape(parts, -1, x.shape[1])
