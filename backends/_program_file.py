"""A program as a file: written, read, and held against the rules before anything runs it.

Whoever reads a program gets one that is safe to run: every step fits what it reads, and every constant lies within its
file. Kernels check nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensc.export.graph import GraphSpec, TensorSpec

from . import codec
from ._program import (
    BITS,
    STEPS,
    Add,
    Attention,
    CausalAttention,
    Constant,
    GatherRows,
    GeluTanh,
    Linear,
    Normalize,
    Place,
    Port,
    Program,
    SelectRows,
    SiluMul,
    Step,
    Value,
    WeightRecord,
    product,
    reads,
    split,
    sums_multiples,
)
from .errors import GraphError

FORMAT = 2

PROGRAM_BYTES = 16 << 20
"""The program of the full-size decoder has 450 steps in 350 KB."""

SHOWN = 4
"""Problems that one message lists."""

LARGEST = 1 << 31
"""Sizes are below this, so that kernels can hold one in an int."""

_ROWS = re.compile(r"(?:[A-Za-z_]\w{0,63}|[1-9]\d{0,8})(?:\*(?:[A-Za-z_]\w{0,63}|[1-9]\d{0,8})){0,3}", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}", re.ASCII)


def write(program: Program, path: Path) -> None:
    """Write `program` to `path`, whole or not at all. The same program is the same bytes. Raises OSError."""
    document = codec.encode(
        _Header(FORMAT, program.graph, program.files, program.values, program.inputs, program.outputs)
    )
    document["steps"] = [{"step": step.step, **codec.encode(step)} for step in program.steps]
    lines = ",\n".join(
        f"{json.dumps(key)}: {_lines(value) if isinstance(value, list) else json.dumps(value)}"
        for key, value in document.items()
    )
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8", newline="\n")
    os.replace(partial, path)


def _lines(items: Sequence[object]) -> str:
    """A list with one item to a line, so that programs can be read and compared."""
    return "[" + ",".join(f"\n {json.dumps(item)}" for item in items) + "]"


@dataclass(frozen=True)
class _Header:
    """All of a program but its steps, which say of which kind they are."""

    format: int
    graph: str
    files: tuple[str, ...]
    values: tuple[Value, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def read(path: Path) -> Program:
    """The program at `path`, whose data files lie beside it. Raises GraphError for a file that is no program, or one that
    names bytes its data files do not have.
    """
    try:
        if path.stat().st_size > PROGRAM_BYTES:
            raise GraphError(f"{path}: {path.stat().st_size} bytes, a program has at most {PROGRAM_BYTES}")
        document = codec.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GraphError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise GraphError(f"{path}: not JSON: {' '.join(str(error).split())[:200]}; compile it again") from None
    problems: list[str] = []
    program = _decoded(document, problems)
    if program is not None:
        found: dict[str, int] = {}
        for name in program.files:
            if not _FILE.fullmatch(name):
                problems.append(f"files: {codec.shown(name)} is no plain file name")
            elif not (path.parent / name).is_file():
                problems.append(f"files: {name} is missing")
            else:
                found[name] = (path.parent / name).stat().st_size
        problems = problems or list(_problems(program, found))
    if program is None or problems:
        raise GraphError(f"{path}: {_listed(problems)}; compile it again")
    return program


def _decoded(document: Any, problems: list[str]) -> Program | None:
    if not isinstance(document, dict) or not isinstance(document.get("steps"), list):
        problems.append("no program: expected an object with a list of steps")
        return None
    if document.get("format") != FORMAT or type(document.get("format")) is not int:
        problems.append(f"format is {codec.shown(document.get('format'))}, expected {FORMAT}")
        return None
    header = codec.decode(_Header, {key: value for key, value in document.items() if key != "steps"}, problems)
    steps: list[Step] = []
    for i, item in enumerate(document["steps"]):
        kind = item.get("step") if isinstance(item, dict) else None
        if not isinstance(kind, str) or kind not in STEPS:
            problems.append(f"steps[{i}]: {codec.shown(kind)} is no step")
            continue
        body = {key: value for key, value in item.items() if key != "step"}
        step = codec.decode(STEPS[kind], body, problems, f"steps[{i}]")
        if step is not None:
            steps.append(step)
    if header is None or problems:
        return None
    return Program(header.graph, header.files, header.values, header.inputs, tuple(steps), header.outputs)


def _listed(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


# --- rules --------------------------------------------------------------------------------------------------------


def check(program: Program, sizes: Mapping[str, int]) -> None:
    """Check that every step fits what it reads, and every constant its file, of which `sizes` says how long it is.

    Raises GraphError that lists what is wrong.
    """
    if problems := list(_problems(program, sizes)):
        raise GraphError(f"program {program.graph}: {_listed(problems)}")


def check_spec(program: Program, spec: GraphSpec) -> None:
    """Check that `program` has the inputs and outputs of `spec`, and no row that it has no dimension for.

    Raises GraphError that lists what is wrong.
    """
    if problems := list(_spec_problems(program, spec)):
        raise GraphError(f"the program of graph {spec.name} is another's: {_listed(problems)}; compile it again")


def _spec_problems(program: Program, spec: GraphSpec) -> Iterator[str]:
    if program.graph != spec.name:
        yield f"its graph is {codec.shown(program.graph)}"
    inputs, outputs = ({tensor.name: tensor for tensor in tensors} for tensors in (spec.inputs, spec.outputs))
    for value in program.values:
        unknown = [d for d in value.rows.split("*") if not d.isdigit() and d not in spec.dims]
        if unknown:
            yield f"no dimension {unknown[0]}"
            return

    def port(kind: str, tensors: Mapping[str, TensorSpec], found: Port) -> Iterator[str]:
        value, tensor = program.values[found.value], tensors.get(found.name)
        if tensor is None or tensor.dtype != "float32" or not tensor.shape:
            yield f"no {kind} {codec.shown(found.name)} of float32"
        elif (product(tensor.shape[:-1]), tensor.shape[-1]) != (value.rows, value.width):
            yield f"expected {kind} {tensor}, found {_shown(value)}"

    def array(name: str, dtype: str, rows: str) -> Iterator[str]:
        tensor = inputs.get(name)
        if tensor is None or tensor.dtype != dtype or product(tensor.shape) != rows:
            yield f"no input {codec.shown(name)} {dtype}[{rows}]"

    for found in program.inputs:
        yield from port("input", inputs, found)
    for found in program.outputs:
        yield from port("output", outputs, found)
    layers = 0
    for step in program.steps:
        match step:
            case GatherRows():
                yield from array(step.ids, "int64", program.values[step.y].rows)
            case SelectRows():
                yield from array(step.positions, "int64", split(program.values[step.y].rows)[1])
            case Attention() if step.bias is not None:
                yield from array(step.bias, "float32", program.values[step.k].rows)
            case CausalAttention():
                layers += 1
                rows = (step.kv_num_heads, step.head_dim)
                states = spec.states[2 * step.layer : 2 * step.layer + 2]
                if len(states) != 2 or any(spec.input(state.input).shape[2:] != rows for state in states):
                    yield f"no states of layer {step.layer} with {rows[0]} heads of {rows[1]}"
    if 2 * layers != len(spec.states):
        yield f"{layers} layers with a cache, expected {len(spec.states) / 2:g}"
    made = {found.name for found in program.outputs} | {state.output for state in spec.states}
    yield from (f"no output {name}" for name in outputs if name not in made)


def _problems(program: Program, sizes: Mapping[str, int]) -> Iterator[str]:
    values = program.values
    if len(set(program.files)) != len(program.files):
        yield "files: a name appears twice"
    for i, value in enumerate(values):
        if not _ROWS.fullmatch(value.rows):
            yield f"values[{i}]: {codec.shown(value.rows)} is no number of rows"
        if not 0 < value.width < LARGEST:
            yield f"values[{i}]: width {value.width}"
    if [port.value for port in program.inputs] != list(range(len(program.inputs))):
        yield "inputs: expected the first values, in order"
    if len(values) != len(program.inputs) + len(program.steps):
        yield f"{len(values)} values, expected one for each of {len(program.inputs)} inputs and {len(program.steps)} steps"
        return
    for port in program.outputs:
        if not 0 <= port.value < len(values):
            yield f"output {codec.shown(port.name)}: there is no value {port.value}"
    for kind, ports in (("input", program.inputs), ("output", program.outputs)):
        if len({port.name for port in ports}) != len(ports):
            yield f"two {kind}s have one name"
    layers = [step.layer for step in program.steps if isinstance(step, CausalAttention)]
    if sorted(layers) != list(range(len(layers))):
        yield f"layers of causal attention are not 0 to {len(layers) - 1}, each once"
    for i, step in enumerate(program.steps):
        y = len(program.inputs) + i
        outside = [value for value in reads(step) if not 0 <= value < y]
        if step.y != y:
            yield f"steps[{i}]: makes value {step.y}, expected {y}"
        elif outside:
            yield f"steps[{i}]: reads value {outside[0]}, which is not made before it"
        else:
            rules = (*_step_problems(step, values), *_place_problems(step, sizes, program.files))
            yield from (f"steps[{i}] ({step.step}): {problem}" for problem in rules)


def _step_problems(step: Step, values: Sequence[Value]) -> Iterator[str]:
    """Whether what a step reads and makes fits together. The ids are good."""
    y = values[step.y]
    match step:
        case Normalize():
            yield from _same(y, values[step.x], "x")
            yield from _vector(step.weight, y.width, "weight")
            if step.bias is not None:
                yield from _vector(step.bias, y.width, "bias")
            if not 0 <= step.epsilon < math.inf:
                yield f"epsilon {step.epsilon:g}"
        case Add():
            yield from _same(y, values[step.a], "a")
            if isinstance(step.b, int):
                yield from _same(y, values[step.b], "b")
            else:
                known = math.prod(int(d) for d in y.rows.split("*") if d.isdigit())
                if step.b.width != y.width or step.b.rows < 1 or known % step.b.rows:
                    yield f"b is [{step.b.rows}, {step.b.width}], which does not repeat over {_shown(y)}"
        case GatherRows():
            if step.table.width != y.width:
                yield f"rows of {step.table.width} in the table, expected {y.width}"
        case SelectRows():
            x = values[step.x]
            if x.width != y.width or split(x.rows)[0] != split(y.rows)[0]:
                yield f"selects rows of {_shown(x)}, which does not make {_shown(y)}"
        case SiluMul():
            yield from _same(y, values[step.gate], "gate")
            yield from _same(y, values[step.up], "up")
        case GeluTanh():
            yield from _same(y, values[step.x], "x")
        case Linear():
            yield from _linear_problems(step, values)
        case CausalAttention():
            heads, kv_heads, dim = step.num_heads, step.kv_num_heads, step.head_dim
            if not (0 < heads < LARGEST and 0 < kv_heads < LARGEST and 0 < dim < LARGEST):
                yield f"{heads} heads, {kv_heads} key heads of {dim}"
                return
            if heads % kv_heads or dim % 2:
                yield f"{heads} heads do not share {kv_heads} key heads of {dim}"
            yield from _same(Value(y.rows, heads * dim), y, "y")
            yield from _same(Value(y.rows, heads * dim), values[step.q], "q")
            for name, value in (("k", step.k), ("v", step.v)):
                yield from _same(Value(y.rows, kv_heads * dim), values[value], name)
            yield from _vector(step.inverse_frequencies, dim // 2, "inverse_frequencies")
            yield from _finite(step.scale)
        case Attention():
            k = values[step.k]
            yield from _same(k, values[step.v], "v")
            slices = split(k.rows)[0]
            if isinstance(step.q, int):
                yield from _same(y, values[step.q], "q")
            elif step.q.width != y.width or y.rows != product((slices, step.q.rows)):
                yield f"q is [{step.q.rows}, {step.q.width}], which does not make {_shown(y)}"
            if split(y.rows)[0] != slices or y.width != k.width:
                yield f"k is {_shown(k)}, which does not make {_shown(y)}"
            if not 0 < step.num_heads < LARGEST or y.width % step.num_heads:
                yield f"{step.num_heads} heads in a width of {y.width}"
            yield from _finite(step.scale)


def _linear_problems(step: Linear, values: Sequence[Value]) -> Iterator[str]:
    x, y, weight = values[step.x], values[step.y], step.weight
    if not (0 < weight.outputs < LARGEST and 0 < weight.inputs < LARGEST and 0 <= weight.group <= weight.inputs):
        yield f"weight [{weight.outputs}, {weight.inputs}] in groups of {weight.group}"
        return
    yield from _same(Value(y.rows, weight.inputs), x, "x")
    yield from _same(Value(x.rows, weight.outputs), y, "y")
    if step.bias is not None:
        yield from _vector(step.bias, weight.outputs, "bias")
    if step.residual is not None:
        yield from _same(y, values[step.residual], "residual")
    if weight.inputs * BITS[weight.kind] % 8:
        yield f"rows of {weight.inputs} values in {weight.kind} do not end with whole bytes"
    is_float = weight.kind == "f32"
    if is_float and (weight.group or weight.scale or weight.zero_point or weight.activations != "float"):
        yield "a weight in float32 has no group, scale, zero point or inputs in int8"
    if not is_float and weight.scale is None:
        yield f"a weight in {weight.kind} has no scale"
    if weight.kind in ("int8", "int8_tiles") and weight.zero_point is not None:
        yield f"a weight in {weight.kind} has a zero point"
    if weight.multiples is not None:
        yield from _multiples_problems(weight)
    if weight.kind == "int8_tiles" and (weight.group or weight.activations != "int8"):
        yield "a weight in int8_tiles has groups or inputs that are not int8"


def _multiples_problems(weight: WeightRecord) -> Iterator[str]:
    """Whether there are kernels for such a weight; see int4_linear.h."""
    if weight.kind not in ("uint4", "uint2") or weight.zero_point is not None or weight.activations != "int8":
        yield "multiples are for weights in uint4 or uint2 without a zero point, and inputs in int8"
    elif not sums_multiples(weight.inputs, weight.group, BITS[weight.kind]):
        yield f"no kernel sums {weight.inputs} inputs in groups of {weight.group} with multiples"


def _same(expected: Value, found: Value, name: str) -> Iterator[str]:
    if expected != found:
        yield f"{name} is {_shown(found)}, expected {_shown(expected)}"


def _vector(constant: Constant, width: int, name: str) -> Iterator[str]:
    if (constant.rows, constant.width) != (1, width):
        yield f"{name} is [{constant.rows}, {constant.width}], expected [1, {width}]"


def _finite(scale: float) -> Iterator[str]:
    if not math.isfinite(scale):
        yield f"scale {scale}"


def _shown(value: Value) -> str:
    rows = value.rows if _ROWS.fullmatch(value.rows) else codec.shown(value.rows)
    return f"[{rows}, {value.width}]"


def _place_problems(step: Step, sizes: Mapping[str, int], files: Sequence[str]) -> Iterator[str]:
    """Whether the constants of a step lie within their files, and floats on a multiple of 4 bytes."""
    places: list[tuple[str, Place, int, int]] = []
    for item in vars(step).values():
        if isinstance(item, Constant):
            if not (0 < item.rows < LARGEST and 0 < item.width < LARGEST):
                yield f"{codec.shown(item.name)} is [{item.rows}, {item.width}]"
            places.append((item.name, item.place, item.nbytes, 4))
        elif isinstance(item, WeightRecord):
            places.append((item.name, item.values, item.values_bytes, 4 if item.kind == "f32" else 1))
            if item.scale is not None:
                places.append((f"{item.name}.scale", item.scale, item.scale_bytes, 4))
            if item.multiples is not None:
                places.append((f"{item.name}.multiples", item.multiples, item.multiples_bytes, 1))
            if item.zero_point is not None:
                places.append((f"{item.name}.zero_point", item.zero_point, item.zero_point_bytes, 1))
    for name, place, nbytes, alignment in places:
        if place.file not in files:
            yield f"{codec.shown(name)} lies in {codec.shown(place.file)}, which is not one of the files"
        elif not 0 <= place.offset <= sizes.get(place.file, 0) - nbytes:
            yield (
                f"{codec.shown(name)} is {nbytes} bytes at {place.offset} of {place.file}, which has "
                f"{sizes.get(place.file, 0)}"
            )
        elif place.offset % alignment:
            yield f"{codec.shown(name)} lies at {place.offset}, expected a multiple of {alignment}"


def interface(program: Program, spec: GraphSpec) -> tuple[set[str], set[str]]:
    """Names of the inputs and outputs of the graph that a program computes."""
    inputs = {port.name for port in program.inputs}
    outputs = {port.name for port in program.outputs}
    for step in program.steps:
        if isinstance(step, GatherRows):
            inputs.add(step.ids)
        elif isinstance(step, SelectRows):
            inputs.add(step.positions)
        elif isinstance(step, Attention) and step.bias is not None:
            inputs.add(step.bias)
        elif isinstance(step, CausalAttention):
            states = spec.states[2 * step.layer : 2 * step.layer + 2]
            inputs |= {"position_ids", *(state.input for state in states)}
            outputs |= {state.output for state in states}
    return inputs, outputs
