"""The executor: whole programs have the bits of their steps run one by one, whatever shares memory and however many threads
there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lensc.kernels.attention.reference import causal_attention
from lensc.kernels.rope.reference import rope, rope_table

_cpu = pytest.importorskip("lensc.kernels._cpu", reason="the compiled kernels (lensc.kernels._cpu) are not built")

Array = npt.NDArray[Any]

ISAS: tuple[str, ...] = tuple(_cpu.usable_isas())


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@dataclass
class Graph:
    """Values and steps, to be run as one program or as one program for each step. Row classes: 0, and 1 of chosen rows."""

    values: list[tuple[int, int]] = field(default_factory=list)  # row class, width
    inputs: list[int] = field(default_factory=list)
    steps: list[tuple[int, list[int], Callable[[Any, list[int], int], None]]] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    constants: list[Array] = field(default_factory=list)

    def value(self, row_class: int, width: int) -> int:
        self.values.append((row_class, width))
        return len(self.values) - 1

    def input(self, row_class: int, width: int) -> int:
        self.inputs.append(self.value(row_class, width))
        return self.inputs[-1]

    def step(self, row_class: int, width: int, reads: list[int], add: Callable[[Any, list[int], int], None]) -> int:
        """`add(program, ids of what it reads, id of what it makes)` adds the step to a program."""
        y = self.value(row_class, width)
        self.steps.append((y, reads, add))
        return y

    def constant(self, array: Array) -> Array:
        self.constants.append(array)
        return array

    # --- running it

    def whole(self, isa: str, threads: int) -> Any:
        program = _cpu.Program(isa, threads)
        for row_class, width in self.values:
            program.value(row_class, width)
        for y, reads, add in self.steps:
            add(program, reads, y)
        for value in self.outputs:
            program.output(value)
        program.finish()
        return program

    def run(self, program: Any, counts: list[int], given: dict[int, Array], indices: list[Array]) -> dict[int, Array]:
        made = {v: np.full((counts[self.values[v][0]], self.values[v][1]), np.nan, np.float32) for v in self.outputs}
        program.run(counts, [*given.items(), *made.items()], indices, None, 0, 0, 0)
        return made

    def step_by_step(
        self, isa: str, counts: list[int], given: dict[int, Array], indices: list[Array]
    ) -> dict[int, Array]:
        known = dict(given)
        for y, reads, add in self.steps:
            program = _cpu.Program(isa, 1)
            ids = [program.value(*self.values[value]) for value in reads]
            made = program.value(*self.values[y])
            add(program, ids, made)
            program.output(made)
            program.finish()
            known[y] = np.full((counts[self.values[y][0]], self.values[y][1]), np.nan, np.float32)
            bound = {**{i: known[value] for i, value in zip(ids, reads, strict=True)}, made: known[y]}
            program.run(counts, list(bound.items()), indices, None, 0, 0, 0)
        return known


def group_weight(graph: Graph, outputs: int, inputs: int, seed: int) -> tuple[Array, Array]:
    values = np.random.default_rng(seed).integers(0, 256, outputs * inputs // 2, np.uint8)
    return graph.constant(values), graph.constant(floats(outputs, inputs // 32, seed=seed) / 64)


def channel_weight(graph: Graph, outputs: int, inputs: int, seed: int) -> tuple[Array, Array, Array]:
    values = np.random.default_rng(seed).integers(-127, 128, (outputs, inputs)).astype(np.int8)
    padded = np.pad(values, ((0, -outputs % 32), (0, -inputs % 64)))
    tiles = np.ascontiguousarray(padded.reshape(len(padded) // 16, 16, -1, 4).transpose(0, 2, 1, 3))
    scales = np.abs(floats(outputs, seed=seed)) / 999
    return (
        graph.constant(tiles.reshape(-1).view(np.uint8)),
        graph.constant(scales),
        graph.constant(values.sum(1, dtype=np.int32)),
    )


def random_graph(seed: int) -> Graph:
    """Steps of all kinds that read what was made long ago or just now, once or many times; some are never read."""
    random, graph = np.random.default_rng(seed), Graph()
    widths = (32, 64, 96)
    for width in widths:
        graph.input(0, width)
    table = graph.constant(floats(50, 64, seed=seed))
    graph.step(0, 64, [], lambda p, _, y: p.gather_rows(table, 0, y))

    def some(row_class: int, width: int | None = None) -> int | None:
        found = [i for i, (c, w) in enumerate(graph.values) if c == row_class and width in (None, w)]
        # mostly what is recent, so that others die early
        return None if not found else int(found[-1 - min(int(random.geometric(0.3)) - 1, len(found) - 1)])

    for number in range(40):
        row_class = int(random.random() < 0.25 and some(1) is not None)
        x = some(row_class)
        assert x is not None
        width, outputs = graph.values[x][1], int(random.choice(widths))
        kind = str(
            random.choice(["norm", "layer", "silu", "gelu", "add", "constant", "select", "floats", "group", "channel"])
        )
        weight, bias = graph.constant(floats(width, seed=number)), graph.constant(floats(outputs, seed=number))
        other, residual = some(row_class, width), some(row_class, outputs) if random.random() < 0.5 else None
        reads = [x] if residual is None else [x, residual]
        # closures are made by functions: each keeps its own constants
        if kind == "norm":
            graph.step(row_class, width, [x], lambda p, i, y, w=weight: p.rms_norm(i[0], w, 1e-6, y))  # type: ignore[misc]
        elif kind == "layer":
            graph.step(row_class, width, [x], lambda p, i, y, w=weight: p.layer_norm(i[0], w, w, 1e-6, y))  # type: ignore[misc]
        elif kind == "silu" and other is not None:
            graph.step(row_class, width, [x, other], lambda p, i, y: p.silu_mul(i[0], i[1], y))
        elif kind == "gelu":
            graph.step(row_class, width, [x], lambda p, i, y: p.gelu_tanh(i[0], y))
        elif kind == "add" and other is not None:
            graph.step(row_class, width, [x, other], lambda p, i, y: p.add(i[0], i[1], y))
        elif kind == "constant":
            rows = graph.constant(floats(3, width, seed=number))
            graph.step(row_class, width, [x], lambda p, i, y, c=rows: p.add_constant(i[0], c, y))  # type: ignore[misc]
        elif kind == "select" and row_class == 0:
            graph.step(1, width, [x], lambda p, i, y: p.select_rows(i[0], 1, 2, y))
        elif kind == "floats":
            matrix = graph.constant(floats(outputs, width, seed=number) / 8)

            def add_floats(p: Any, i: list[int], y: int, m: Array = matrix, b: Array = bias) -> None:
                p.float_linear(i[0], m, b, i[1] if len(i) > 1 else -1, y)

            graph.step(row_class, outputs, reads, add_floats)
        elif kind == "group":
            values, scales = group_weight(graph, outputs, width, number)

            def add_group(
                p: Any,
                i: list[int],
                y: int,
                v: Array = values,
                s: Array = scales,
                int8: bool = bool(random.random() < 0.7),
            ) -> None:
                p.group_linear(i[0], v, s, None, 4, False, 32, int8, None, i[1] if len(i) > 1 else -1, y)

            graph.step(row_class, outputs, reads, add_group)
        elif kind == "channel":
            parts = channel_weight(graph, outputs, width, number)

            def add_channel(p: Any, i: list[int], y: int, c: tuple[Array, ...] = parts, b: Array = bias) -> None:
                p.channel_linear(i[0], *c, b, i[1] if len(i) > 1 else -1, y)

            graph.step(row_class, outputs, reads, add_channel)
    made = [y for y, _, _ in graph.steps]
    graph.outputs = sorted({made[-1], *(int(y) for y in random.choice(made, 3))})
    return graph


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(12))
def test_a_program_has_the_bits_of_its_steps(seed: int, isa: str) -> None:
    """No two values share memory while both are needed; the plan is made anew for each number of rows."""
    graph = random_graph(seed)
    programs = [graph.whole(isa, threads) for threads in (1, 2, 3)]
    for rows in (1, 5, 40, 5):
        parts, chosen = (2, rows) if rows % 2 == 0 else (1, 1)
        counts = [rows, chosen, parts]
        given = {value: floats(rows, graph.values[value][1], seed=rows) for value in graph.inputs}
        ids = np.random.default_rng(rows).integers(0, 50, rows)
        indices = [ids, ids[: chosen // parts] % (rows // parts)]
        expected = graph.step_by_step(isa, counts, given, indices)
        for program in programs:
            got = graph.run(program, counts, given, indices)
            for value, array in got.items():
                assert np.array_equal(array, expected[value], equal_nan=True), (rows, program.threads, value)


@pytest.mark.parametrize("isa", ISAS)
def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    graph = random_graph(100)
    for rows in (1, 3, 17, 100):
        given = {value: floats(rows, graph.values[value][1], seed=rows) for value in graph.inputs}
        ids = np.arange(rows) % 50
        made = [graph.run(graph.whole(isa, threads), [rows, 1, 1], given, [ids, ids[:1]]) for threads in (1, 2, 3, 4)]
        for other in made[1:]:
            assert all(np.array_equal(other[value], made[0][value], equal_nan=True) for value in graph.outputs)


def test_many_numbers_of_rows_one_after_the_other() -> None:
    """More than there are plans kept, small ones after large ones."""
    graph = random_graph(7)
    program = graph.whole("", 2)
    for rows in [*range(60, 20, -1), 60, 1]:
        given = {value: floats(rows, graph.values[value][1], seed=rows) for value in graph.inputs}
        ids = np.arange(rows) % 50
        got = graph.run(program, [rows, 1, 1], given, [ids, ids[:1]])
        alone = graph.run(graph.whole("", 1), [rows, 1, 1], given, [ids, ids[:1]])
        assert all(np.array_equal(got[value], alone[value], equal_nan=True) for value in graph.outputs)


def test_memory_is_shared_by_what_is_never_needed_at_once() -> None:
    """A chain of 30 steps holds two values at a time."""
    graph = Graph()
    x = graph.input(0, 256)
    for _ in range(30):
        x = graph.step(0, 256, [x], lambda p, i, y: p.gelu_tanh(i[0], y))
    graph.outputs = [x]
    program = graph.whole("", 1)
    graph.run(program, [100], {0: floats(100, 256)}, [])
    assert 100 * 256 * 4 <= program.memory_bytes <= 2 * 100 * 256 * 4 + 4096


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", (1, 2, 9, 40))
def test_a_value_is_read_as_float_and_in_every_format_of_int8(rows: int, isa: str) -> None:
    graph, width = Graph(), 96
    x = graph.input(0, width)
    weight = floats(width, seed=3)
    made = graph.step(0, width, [x], lambda p, i, y: p.rms_norm(i[0], weight, 1e-6, y))
    matrix, group, channel = floats(33, width), group_weight(graph, 33, width, 1), channel_weight(graph, 33, width, 2)
    eight = np.random.default_rng(5).integers(0, 256, 33 * width, np.uint8)
    eight_scales = floats(33, width // 32, seed=6)
    graph.outputs = [
        graph.step(0, 33, [made], lambda p, i, y: p.float_linear(i[0], matrix, None, -1, y)),
        graph.step(0, 33, [made], lambda p, i, y: p.group_linear(i[0], *group, None, 4, False, 32, True, None, -1, y)),
        graph.step(0, 33, [made], lambda p, i, y: p.group_linear(i[0], *group, None, 4, False, 32, False, None, -1, y)),
        graph.step(0, 33, [made], lambda p, i, y: p.channel_linear(i[0], *channel, None, -1, y)),
        graph.step(
            0,
            33,
            [made],
            lambda p, i, y: p.group_linear(i[0], eight, eight_scales, None, 8, True, 32, True, None, -1, y),
        ),
        graph.step(0, width, [made, x], lambda p, i, y: p.add(i[0], i[1], y)),
    ]
    given = {x: floats(rows, width, seed=rows)}
    got = graph.run(graph.whole(isa, 2), [rows], given, [])
    expected = graph.step_by_step(isa, [rows], given, [])
    for value in graph.outputs:
        assert np.array_equal(got[value], expected[value]), value


def test_what_nobody_reads_is_not_made_and_disturbs_nobody() -> None:
    """A linear that is never read leaves no rounded rows behind, either."""
    graph, width = Graph(), 64
    x = graph.input(0, width)
    weight = channel_weight(graph, 64, width, 1)
    made = graph.step(0, width, [x], lambda p, i, y: p.gelu_tanh(i[0], y))
    graph.step(0, 64, [made], lambda p, i, y: p.channel_linear(i[0], *weight, None, -1, y))
    graph.outputs = [graph.step(0, width, [made], lambda p, i, y: p.gelu_tanh(i[0], y))]
    alone = Graph(graph.values, graph.inputs, [graph.steps[0], graph.steps[2]], graph.outputs)
    x_rows = {x: floats(64, width)}
    programs = [part.whole("", 1) for part in (graph, alone)]
    made_by = [graph.run(program, [64], x_rows, []) for program in programs]
    assert np.array_equal(made_by[0][graph.outputs[0]], made_by[1][graph.outputs[0]])
    assert programs[0].memory_bytes == programs[1].memory_bytes


# --- rows of several sequences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ("float32", "float16", "int8"))
@pytest.mark.parametrize("tokens", (1, 5, 33))
def test_sequences_of_a_batch_do_not_see_each_other(tokens: int, dtype: str, isa: str) -> None:
    heads, kv_heads, dim, capacity, past, sequences = 4, 2, 16, 48, 7, 3
    frequencies = (10000.0 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)
    q, k, v = (floats(sequences * tokens, n * dim, seed=n) for n in (heads, kv_heads, kv_heads))

    def run(s: slice, threads: int) -> tuple[Array, list[Array]]:
        count = s.stop - s.start
        caches = [np.zeros((count, kv_heads, capacity, dim), dtype) for _ in range(2)]
        caches[0][:, :, :past], caches[1][:, :, :past] = 1, 2
        scales = [np.full((count, kv_heads, capacity), 0.5, np.float32) for _ in range(2)] if dtype == "int8" else []
        program = _cpu.Program(isa, threads)
        ids = [program.value(0, width * dim) for width in (heads, kv_heads, kv_heads, heads)]
        program.causal_attention(*ids, 1, 0, heads, dim**-0.5, frequencies)
        program.output(ids[-1])
        program.finish()
        y = np.full((count * tokens, heads * dim), np.nan, np.float32)
        parts = [np.ascontiguousarray(x[s.start * tokens : s.stop * tokens]) for x in (q, k, v)]
        held = (
            _cpu.Caches([caches[0]], [caches[1]], *([part] for part in scales))
            if scales
            else _cpu.Caches([caches[0]], [caches[1]], [], [])
        )
        program.run([count * tokens, count], list(zip(ids, [*parts, y], strict=True)), [], held, past, count, tokens)
        return y, caches

    together, caches = run(slice(0, sequences), 2)
    for s in range(sequences):
        alone, own = run(slice(s, s + 1), 1)
        assert np.array_equal(together[s * tokens : (s + 1) * tokens], alone)
        assert all(np.array_equal(one[s], other[0]) for one, other in zip(caches, own, strict=True))
    if dtype == "float32":
        cos, sin = rope_table(np.arange(past, past + tokens), frequencies)
        for s in range(sequences):
            rows = slice(s * tokens, (s + 1) * tokens)
            rotated, keys = (rope(x[rows].reshape(tokens, -1, dim), cos, sin) for x in (q, k))
            whole = [np.zeros((kv_heads, capacity, dim)) for _ in range(2)]
            whole[0][:, :past], whole[1][:, :past] = 1, 2
            whole[0][:, past : past + tokens] = keys.transpose(1, 0, 2)
            whole[1][:, past : past + tokens] = v[rows].reshape(tokens, kv_heads, dim).transpose(1, 0, 2)
            expected = causal_attention(rotated, whole[0], whole[1], past, dim**-0.5)
            np.testing.assert_allclose(together[rows], expected, atol=2e-2 if isa == "amx" else 1e-5)


@pytest.mark.parametrize("threads", (1, 3))
def test_rows_are_selected_from_each_sequence(threads: int) -> None:
    program = _cpu.Program("", threads)
    x, y = program.value(0, 5), program.value(1, 5)
    program.select_rows(x, 0, 2, y)
    program.output(y)
    program.finish()
    rows, positions = floats(12, 5), np.array([3, 0], np.int64)
    made = np.empty((6, 5), np.float32)
    program.run([12, 6, 3], [(x, rows), (y, made)], [positions], None, 0, 0, 0)
    assert np.array_equal(made, rows.reshape(3, 4, 5)[:, positions].reshape(6, 5))


# --- what is refused --------------------------------------------------------------------------------------------------------

W = 64
BYTES = np.zeros(W * W, np.uint8)
ONES = np.ones((W, 1), np.float32)
ROW = np.ones(W, np.float32)
SUMS = np.ones(W, np.int32)
MULTIPLES = np.ones((W, 2), np.int8)


def _of_multiples(program: Any, **changed: Any) -> None:
    """A linear that is refused for what is changed: groups of 32 of 64 inputs in 4 bits."""
    given: dict[str, Any] = {
        "x": 0,
        "values": BYTES[: W * W // 2],
        "scales": ONES,
        "zero_points": None,
        "bits": 4,
        "is_signed": False,
        "group": 32,
        "int8_inputs": True,
        "bias": None,
        "residual": -1,
        "y": 1,
        "multiples": MULTIPLES,
    }
    given |= changed
    if given["bits"] == 8:
        given["values"] = BYTES
    if given["group"] == 16:
        given["multiples"] = np.ones((W, 4), np.int8)
    program.group_linear(**given)


def test_multiples_are_taken() -> None:
    program = _cpu.Program("", 1)
    for _ in range(2):
        program.value(0, W)
    _of_multiples(program)


REFUSED: tuple[tuple[str, str, Callable[[Any], object]], ...] = (
    ("width", "needs a row class and a width", lambda p: p.value(0, 0)),
    ("row class", "needs a row class and a width", lambda p: p.value(-1, 4)),
    ("made twice", "made twice", lambda p: (p.gelu_tanh(0, 1), p.gelu_tanh(0, 1))),
    ("no such value", "", lambda p: p.gelu_tanh(0, 99)),
    ("reads no such value", "that there is not", lambda p: p.gelu_tanh(99, 1)),
    ("reads a negative value", "that there is not", lambda p: p.add(0, -1, 1)),
    ("norm weight", "weight: of the width", lambda p: p.rms_norm(0, ROW[1:], 1e-6, 1)),
    ("norm bias", "another width", lambda p: p.layer_norm(0, ROW, ROW[1:], 1e-6, 1)),
    ("constant", "period, width", lambda p: p.add_constant(0, ONES, 1)),
    ("table", "table: of the width", lambda p: p.gather_rows(ONES, 0, 1)),
    ("matrix", "outputs, inputs", lambda p: p.float_linear(0, ONES, None, -1, 1)),
    ("bits", "bits: 2, 4 or 8", lambda p: p.group_linear(0, BYTES, ONES, None, 3, False, W, True, None, -1, 1)),
    (
        "values",
        "not outputs times inputs",
        lambda p: p.group_linear(0, BYTES, ONES, None, 4, False, W, True, None, -1, 1),
    ),
    ("group", "no kernel sums groups", lambda p: p.group_linear(0, BYTES, ONES, None, 8, True, 24, True, None, -1, 1)),
    ("scales", "scales", lambda p: p.group_linear(0, BYTES, ONES, None, 8, True, 32, True, None, -1, 1)),
    (
        "zero points",
        "not one for each",
        lambda p: p.group_linear(0, BYTES, ONES, SUMS[:9].view(np.uint8), 8, False, W, True, None, -1, 1),
    ),
    ("signed", "not of signed", lambda p: p.group_linear(0, BYTES, ONES, BYTES[:W], 8, True, W, True, None, -1, 1)),
    *(
        (f"multiples, {problem}", text, partial(_of_multiples, **changed))
        for problem, text, changed in (
            ("no steps", "of multiples [outputs, 1]", {"scales": np.ones((W, 2), np.float32)}),
            ("of other groups", "multiples: [outputs, groups]", {"multiples": MULTIPLES[:, 1:]}),
            ("of bytes", "of 2 or 4 bits", {"bits": 8}),
            ("of few inputs", "groups of 16 bytes", {"group": 16}),
            ("of floats", "for inputs in int8", {"int8_inputs": False}),
        )
    ),
    ("bias", "another width", lambda p: p.group_linear(0, BYTES, ONES, None, 8, True, W, True, ROW[1:], -1, 1)),
    ("channels", "padded outputs", lambda p: p.channel_linear(0, BYTES[:-1], ROW, SUMS, None, -1, 1)),
    ("sums", "outputs", lambda p: p.channel_linear(0, BYTES, ROW, SUMS[1:], None, -1, 1)),
    ("frequencies", "inverse_frequencies", lambda p: p.causal_attention(0, 2, 3, 1, 1, 0, 2, 1.0, ROW)),
    ("heads", "no multiple of the heads", lambda p: p.attention(0, None, 2, 3, 1, 1, -1, 5, 1.0, False)),
)


@pytest.mark.parametrize(("message", "call"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_when_it_is_made(message: str, call: Callable[[Any], object]) -> None:
    program = _cpu.Program("", 1)
    for _ in range(4):
        program.value(0, W)
    with pytest.raises((ValueError, IndexError)) as refused:
        call(program)
    assert message in str(refused.value)


def test_refused_instruction_sets_and_threads() -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"no such set is not usable here; expected one of {', '.join(ISAS)}")
    ):
        _cpu.Program("no such set", 1)
    for threads in (0, -1):
        with pytest.raises(ValueError, match="threads: at least 1"):
            _cpu.Program("", threads)
    assert _cpu.Program("", 1).isa == ISAS[0]
    assert ISAS[-1] == "generic"


def test_refused_when_it_runs() -> None:
    program = _cpu.Program("", 1)
    x, y = program.value(0, W), program.value(1, W)
    program.select_rows(x, 0, 1, y)
    program.output(y)
    program.finish()
    rows, made, zero = floats(4, W), np.empty((1, W), np.float32), np.zeros(1, np.int64)
    cases: dict[str, tuple[list[int], list[tuple[int, Array]], list[Array | None]]] = {
        "an input of the program was not given": ([4, 1], [(y, made)], [zero]),
        "an output of the program was not given": ([4, 1], [(x, rows)], [zero]),
        "counts: of every row class": ([4], [(x, rows)], [zero]),
        "counts: at least 1": ([4, 0], [(x, rows), (y, made[:0])], [zero]),
        f"value {x}: float32[4, {W}] is needed": ([4, 1], [(x, rows[1:]), (y, made)], [zero]),
        f"value {y}: float32[1, {W}] is needed": ([4, 1], [(x, rows), (y, made.astype(np.float64))], [zero]),
        "values: there is none with the number 9": ([4, 1], [(x, rows), (y, made), (9, made)], [zero]),
        "arrays: of every slot": ([4, 1], [(x, rows), (y, made)], []),
    }
    for message, (counts, values, arrays) in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            program.run(counts, values, arrays, None, 0, 0, 0)
    program.run([4, 1], [(x, rows), (y, made)], [zero], None, 0, 0, 0)
    assert np.array_equal(made[0], rows[0])
