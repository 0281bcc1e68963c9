"""Our CPU kernels at the sizes of Llama-3-8B and SigLIP, each with the reference that it is held against.

A case runs a kernel as the executor does, as steps of a program, several times over data of its own, which together do not
fit any cache: what a decoder reads for a token has been driven out by the 4 GB it read since.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lensc.backends._program import UNIT_GROUPS
from lensc.kernels.activation.reference import gelu_tanh, silu_mul
from lensc.kernels.attention.reference import attention, causal_attention
from lensc.kernels.linear.reference import quantized_linear, unpack
from lensc.kernels.norm.reference import layer_norm, rms_norm
from lensc.kernels.rope.reference import rope, rope_table

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Limit = Literal["bandwidth", "int8", "int16", "bfloat16"]
Shown = tuple[npt.NDArray[Any], Floats]
"""What a kernel computed, and what its reference does."""

LINEARS = ((4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
"""Outputs and inputs of Llama-3-8B: query and output, gate and up, down, head."""
FORMATS = ((4, 128), (4, 32), (2, 64))
"""Bits of a weight, and weights of a group; scales are whole multiples of a step, as named schemes make them."""
ANY_SCALES = (14336, 4096), (4, 128), (1, 8, 128, 1024)
"""Outputs and inputs, format and rows of a linear whose scales are any."""
CHANNELS = ((1152, 1152), (4304, 1152), (1152, 4304))
"""Of SigLIP, in 8 bits with a scale per output."""
ROWS = (1, 2, 4, 8, 128, 1024)
STREAMED, HEAD = 8, 128256
"""Up to so many rows a linear waits for its weights. A head has no more: logits are asked for few positions."""
LAYERS, HEADS, KV_HEADS, DIM = 32, 32, 8, 128
CONTEXTS, PROMPTS = (32, 1024, 4096, 8192), (128, 1024)
PATCHES, VISION_WIDTH, VISION_HEADS = 1024, 1152, 16
SCALE, EPSILON = DIM**-0.5, 1e-5

ALLOWED = {"float32": 1e-5, "int8": 2e-3, "bfloat16": 1e-2}
"""The norm of the difference over the norm of the reference: rounding of sums; some inputs of an int8 product rounded the
other way where they lie in the middle; 8 bits of a bfloat16's mantissa."""
SAMPLED = 48
"""Outputs that are compared of a linear."""


@dataclass(frozen=True)
class Pool:
    """Where data lie, in one piece: pieces of it follow each other and begin anew at its end."""

    values: U8
    """Random. As float16 they are numbers below 2."""
    floats: F32
    """0.01 to 1."""

    @staticmethod
    def make(size: int) -> Pool:
        """Of `size` bytes of values and half of that of floats."""
        random = np.random.default_rng(0)
        # a part that repeats: random numbers take longer than all that is measured
        part = random.integers(0, 1 << 16, (1 << 24) + 77, np.uint16) & np.uint16(0xBFFF)
        floats = random.uniform(0.01, 1, (1 << 22) + 77).astype(np.float32)
        return Pool(np.resize(part, size // 2).view(np.uint8), np.resize(floats, size // 8))

    def pieces(self, size: int) -> Iterator[U8]:
        """Without end, `uint8[size]` each, 64-byte aligned in the pool."""
        return self._pieces(self.values, size, 64)

    def float_pieces(self, count: int) -> Iterator[F32]:
        """Without end, `float32[count]` each."""
        return self._pieces(self.floats, count, 16)

    @staticmethod
    def _pieces(of: npt.NDArray[Any], count: int, step: int) -> Iterator[npt.NDArray[Any]]:
        if count > len(of):
            raise ValueError(f"a piece of {count} of a pool of {len(of)}")
        taken = -(-count // step) * step
        for i in itertools.count():
            begin = i % max(1, len(of) // taken) * taken
            yield of[begin : begin + count]


@dataclass(frozen=True)
class Machine:
    """The compiled kernels for an instruction set, and what they run on."""

    kernels: Any
    isa: str
    threads: int
    pool: Pool

    def program(self) -> Any:
        return self.kernels.Program(self.isa, self.threads)

    def copies(self, size: int, operations: float = 0) -> int:
        """How often to run a step that reads `size` bytes, so that all do not fit a cache or keep us for long."""
        by_work = int(MOST_OPERATIONS / operations) if operations else MOST_COPIES
        return max(1, min(len(self.pool.values) // size, by_work, MOST_COPIES))


MOST_COPIES, MOST_OPERATIONS = 200, 5e10


@dataclass(frozen=True)
class Ready:
    """A kernel that can be run. `amount`: what a run reads and writes, in bytes, or its operations."""

    unit: Literal["GB/s", "GOP/s"]
    amount: float
    limit: Limit
    run: Callable[[], None]
    shown: Callable[[], Shown]
    """After a run."""
    arithmetic: str = "float32"
    """Of `ALLOWED`."""
    holds: object = None
    """What the program points to, beside what `run` and `shown` hold."""


@dataclass(frozen=True)
class Case:
    """A kernel at a size: `what` is `<kernel>: <size>`."""

    what: str
    make: Callable[[Machine], Ready]


def cases() -> Iterator[Case]:
    """All of them."""
    for bits, group in FORMATS:
        for outputs, inputs in LINEARS:
            for rows in (r for r in ROWS if outputs != HEAD or r <= STREAMED):
                yield _case(
                    f"int4_linear: {outputs} x {inputs}, {bits} bits, groups of {group}, {_count(rows, 'row')}",
                    _group_linear, outputs, inputs, bits, group, rows,
                )  # fmt: skip
    (outputs, inputs), (bits, group), of_rows = ANY_SCALES
    for rows in of_rows:
        size = f"{outputs} x {inputs}, {bits} bits, groups of {group} with any scales"
        yield _case(
            f"int4_linear: {size}, {_count(rows, 'row')}", _group_linear, outputs, inputs, bits, group, rows, True
        )
    for outputs, inputs in CHANNELS:
        size = f"{outputs} x {inputs}, {PATCHES} rows"
        yield _case(f"int8_linear: {size}", _channel_linear, outputs, inputs, PATCHES)
    for held in ("float16", "int8"):
        for context in CONTEXTS:
            what = f"causal_attention: decode, context {context}, {held} cache"
            yield _case(what, _causal, context - 1, 1, np.dtype(held))
    for tokens in PROMPTS:
        yield _case(f"causal_attention: prefill {tokens}", _causal, 0, tokens, np.dtype(np.float16))
    yield _case(f"attention: {PATCHES} rows, {VISION_HEADS} heads of {VISION_WIDTH // VISION_HEADS}", _vision)
    yield _case(f"rope: {PROMPTS[-1]} tokens into a float16 cache", _rope, PROMPTS[-1])
    for name, width in (("rms_norm", 4096), ("layer_norm", 1152), ("silu_mul", 14336), ("gelu_tanh", 4304)):
        yield _case(f"{name}: 1024 x {width}", _rows, name, width)


def _case(what: str, make: Callable[..., Ready], *sizes: Any) -> Case:
    return Case(what, lambda machine: make(machine, *sizes))


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


# --- linears ------------------------------------------------------------------------------------------------------


def _group_linear(
    machine: Machine, outputs: int, inputs: int, bits: int, group: int, rows: int, any_scales: bool = False
) -> Ready:
    size, groups = outputs * inputs * bits // 8, inputs // group
    operations = 2 * rows * outputs * inputs
    copies = machine.copies(size, operations if rows > STREAMED else 0)
    values, scales = machine.pool.pieces(size), machine.pool.float_pieces(outputs * (groups if any_scales else 1))
    weights = [(next(values), next(scales).reshape(outputs, -1)) for _ in range(copies)]
    multiples = None if any_scales else np.random.default_rng(1).integers(1, 16, (outputs, groups), np.int8)
    zero = np.full((SAMPLED, groups), 1 << (bits - 1), np.uint8)
    chosen = np.linspace(0, outputs - 1, SAMPLED).astype(int)

    def add(program: Any, x: int, y: int, i: int) -> None:
        program.group_linear(x, *weights[i], None, bits, False, group, True, None, -1, y, multiples)

    def expect(x: F32) -> Floats:
        packed = weights[-1][0].reshape(outputs, -1)[chosen]
        unpacked = unpack(packed, bits, SAMPLED * inputs).reshape(SAMPLED, inputs)
        unit, of_groups = min(group, 64 * 8 // bits), weights[-1][1][chosen]
        if multiples is not None:
            unit, of_groups = UNIT_GROUPS * group, of_groups.astype(np.float64) * multiples[chosen]
        return quantized_linear(x, unpacked, of_groups, zero, group, unit)

    read = copies * (size + (4 * outputs * groups if any_scales else outputs * (4 + groups)))
    return _linear(machine, (outputs, inputs, rows), copies, add, chosen, expect, read)


def _channel_linear(machine: Machine, outputs: int, inputs: int, rows: int) -> Ready:
    filled = (-(-outputs // 32) * 32, -(-inputs // 64) * 64)
    random = np.random.default_rng(1)
    weight = np.zeros(filled, np.int8)
    # as weights are: how many are large decides what AVX2 has to do
    floats = random.standard_normal((outputs, inputs), np.float32)
    weight[:outputs, :inputs] = np.rint(floats * (127 / np.abs(floats).max(1, keepdims=True)))
    tiles = weight.reshape(filled[0] // 16, 16, -1, 4).transpose(0, 2, 1, 3).reshape(-1).view(np.uint8)
    sums = weight[:outputs].sum(1, dtype=np.int32)
    scales = random.uniform(0.01, 1, outputs).astype(np.float32)
    copies = machine.copies(weight.nbytes, 2 * rows * outputs * inputs)
    packed = [tiles.copy() for _ in range(copies)]
    chosen = np.linspace(0, outputs - 1, SAMPLED).astype(int)

    def add(program: Any, x: int, y: int, i: int) -> None:
        program.channel_linear(x, packed[i], scales, sums, None, -1, y)

    def expect(x: F32) -> Floats:
        return quantized_linear(x, weight[chosen, :inputs], scales[chosen, None], None, 0, inputs)

    return _linear(machine, (outputs, inputs, rows), copies, add, chosen, expect, copies * weight.nbytes)


def _linear(
    machine: Machine,
    size: tuple[int, int, int],
    copies: int,
    add: Callable[[Any, int, int, int], None],
    chosen: npt.NDArray[np.int_],
    expect: Callable[[F32], Floats],
    read: int,
) -> Ready:
    """`copies` linears after each other; `expect` gives the outputs `chosen` of the last one."""
    outputs, inputs, rows = size
    program = machine.program()
    # inputs of their own, so that each quantizes; the same array is all of them
    xs, ys = ([program.value(0, width) for _ in range(copies)] for width in (inputs, outputs))
    for i in range(copies):
        add(program, xs[i], ys[i], i)
        program.output(ys[i])
    program.finish()
    x = np.random.default_rng(2).standard_normal((rows, inputs), np.float32)
    y = np.empty((copies, rows, outputs), np.float32)
    bound = [*((value, x) for value in xs), *zip(ys, y, strict=True)]

    def shown() -> Shown:
        few = [0, rows // 2, rows - 1]
        return y[-1][few][:, chosen], expect(x[few])

    def run() -> None:
        program.run([rows], bound, [], None, 0, 0, 0)

    if rows <= STREAMED:
        return Ready("GB/s", read, "bandwidth", run, shown, "int8", add)
    return Ready("GOP/s", copies * 2 * rows * outputs * inputs, "int8", run, shown, "int8", add)


# --- attention ----------------------------------------------------------------------------------------------------


def _causal(machine: Machine, past: int, tokens: int, held: np.dtype[Any]) -> Ready:
    """All layers of a token, in turn over caches that do not fit together; or few layers of a prompt."""
    context = past + tokens
    layers = LAYERS if tokens == 1 else 4
    size = KV_HEADS * context * DIM * held.itemsize
    sets = max(1, len(machine.pool.values) // (2 * layers * size)) if tokens == 1 else 1
    pieces, scale_pieces = machine.pool.pieces(size), machine.pool.float_pieces(KV_HEADS * context)
    shape = (1, KV_HEADS, context, DIM)

    def arrays() -> list[npt.NDArray[Any]]:
        return [next(pieces).view(held).reshape(shape) for _ in range(layers)]

    def scales() -> list[F32]:
        return [next(scale_pieces).reshape(shape[:3]) for _ in range(layers if held == np.int8 else 0)]

    stored = [(arrays(), arrays(), scales(), scales()) for _ in range(sets)]
    caches = [machine.kernels.Caches(*one) for one in stored]
    frequencies = (500_000.0 ** -(np.arange(0, DIM, 2) / DIM)).astype(np.float32)

    program = machine.program()
    widths = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)
    q, k, v = (program.value(0, width) for width in widths)
    ys = [program.value(0, HEADS * DIM) for _ in range(layers)]
    for layer, y in enumerate(ys):
        program.causal_attention(q, k, v, y, 1, layer, HEADS, SCALE, frequencies)
        program.output(y)
    program.finish()
    random = np.random.default_rng(3)
    new = [random.standard_normal((tokens, width), np.float32) for width in widths]
    made = np.empty((layers, tokens, HEADS * DIM), np.float32)
    bound = [*zip((q, k, v), new, strict=True), *zip(ys, made, strict=True)]

    def run() -> None:
        for cache in caches:
            program.run([tokens, 1], bound, [], cache, past, 1, tokens)

    def shown() -> Shown:
        last, few = stored[-1], min(tokens, 4)
        cos, sin = rope_table(np.arange(past, context), frequencies)
        query, key, value = (array.reshape(tokens, -1, DIM) for array in new)
        keys, values = (kept.astype(np.float64) for kept in (last[0][-1][0], last[1][-1][0]))
        if held == np.int8:
            keys *= last[2][-1][0, :, :, None]
            values *= last[3][-1][0, :, :, None]
        keys[:, past:], values[:, past:] = rope(key, cos, sin).transpose(1, 0, 2), value.transpose(1, 0, 2)
        rotated = rope(query, cos, sin)[-few:]
        return made[-1][-few:], causal_attention(rotated, keys, values, context - few, SCALE)

    if tokens == 1:
        read = size + (4 * KV_HEADS * context if held == np.int8 else 0)
        return Ready("GB/s", 2 * sets * layers * read, "bandwidth", run, shown, "bfloat16")
    operations = 4 * layers * HEADS * DIM * tokens * (tokens + 1) / 2
    return Ready("GOP/s", operations, "bfloat16", run, shown, "bfloat16")


def _vision(machine: Machine) -> Ready:
    copies, dim = 8, VISION_WIDTH // VISION_HEADS
    program = machine.program()
    inputs = [[program.value(0, VISION_WIDTH) for _ in range(3)] for _ in range(copies)]
    ys = [program.value(0, VISION_WIDTH) for _ in range(copies)]
    for (q, k, v), y in zip(inputs, ys, strict=True):
        program.attention(q, None, k, v, y, 1, -1, VISION_HEADS, dim**-0.5, False)
        program.output(y)
    program.finish()
    random = np.random.default_rng(4)
    given = random.standard_normal((copies, 3, PATCHES, VISION_WIDTH), np.float32)
    made = np.empty((copies, PATCHES, VISION_WIDTH), np.float32)
    bound = [
        (value, array)
        for of, arrays in zip(inputs, given, strict=True)
        for value, array in zip(of, arrays, strict=True)
    ]
    bound += zip(ys, made, strict=True)

    def shown() -> Shown:
        q, k, v = given[-1][:, None]
        return made[-1][-4:], attention(q[:, -4:], k, v, None, VISION_HEADS, dim**-0.5)[0]

    def run() -> None:
        program.run([PATCHES, 1], bound, [], None, 0, 0, 0)

    limit: Limit = "int16" if machine.kernels.multiply("int16", 1, machine.isa) else "bfloat16"
    return Ready("GOP/s", copies * 4 * PATCHES**2 * VISION_WIDTH, limit, run, shown, "bfloat16")


def _rope(machine: Machine, tokens: int) -> Ready:
    random = np.random.default_rng(5)
    query, key, value = (random.standard_normal((tokens, n, DIM), np.float32) for n in (HEADS, KV_HEADS, KV_HEADS))
    keys, values = np.zeros((2, KV_HEADS, tokens, DIM), np.float16)
    frequencies = (500_000.0 ** -(np.arange(0, DIM, 2) / DIM)).astype(np.float32)
    cos, sin = machine.kernels.rope_table(np.arange(tokens), frequencies)
    made: list[F32] = []

    def run() -> None:
        made[:] = [
            machine.kernels.rope_append(
                query, key, value, cos, sin, keys, values, past=0, isa=machine.isa, threads=machine.threads
            )
        ]

    def shown() -> Shown:
        return made[0][-4:], rope(query[-4:], *rope_table(np.arange(tokens - 4, tokens), frequencies))

    moved = 2 * query.nbytes + key.nbytes + value.nbytes + keys.nbytes + values.nbytes
    return Ready("GB/s", moved, "bandwidth", run, shown)


# --- row by row ---------------------------------------------------------------------------------------------------


def _rows(machine: Machine, name: str, width: int) -> Ready:
    rows = 1024
    pieces = machine.pool.float_pieces(rows * width)
    reads = 2 if name == "silu_mul" else 1
    copies = max(1, len(machine.pool.floats) // (reads * rows * width))
    given = [[next(pieces).reshape(rows, width) for _ in range(reads)] for _ in range(copies)]
    made = np.empty((copies, rows, width), np.float32)
    random = np.random.default_rng(6)
    weight, bias = random.standard_normal((2, width), np.float32)

    program = machine.program()
    xs = [[program.value(0, width) for _ in range(reads)] for _ in range(copies)]
    ys = [program.value(0, width) for _ in range(copies)]
    for x, y in zip(xs, ys, strict=True):
        if name == "rms_norm":
            program.rms_norm(*x, weight, EPSILON, y)
        elif name == "layer_norm":
            program.layer_norm(*x, weight, bias, EPSILON, y)
        else:
            getattr(program, name)(*x, y)
        program.output(y)
    program.finish()
    bound = [
        (value, array) for of, arrays in zip(xs, given, strict=True) for value, array in zip(of, arrays, strict=True)
    ]
    bound += zip(ys, made, strict=True)
    reference: dict[str, Callable[..., Floats]] = {
        "rms_norm": lambda x: rms_norm(x, weight, EPSILON),
        "layer_norm": lambda x: layer_norm(x, weight, bias, EPSILON),
        "silu_mul": silu_mul,
        "gelu_tanh": gelu_tanh,
    }

    def shown() -> Shown:
        return made[-1][-4:], reference[name](*(array[-4:] for array in given[-1]))

    def run() -> None:
        program.run([rows], bound, [], None, 0, 0, 0)

    return Ready("GB/s", copies * (reads + 1) * 4 * rows * width, "bandwidth", run, shown)
