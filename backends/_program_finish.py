"""The last passes over the steps of a lowered graph: adds become parts of linears, values are numbered, constants placed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ._program import Add, Constant, Linear, Place, Program, Step, reads
from ._program_weights import Blobs

T = TypeVar("T")


def fused(steps: Sequence[Step], outputs: Sequence[int]) -> list[Step]:
    """The steps with each Add behind a Linear that nobody else reads as its bias or residual."""
    counts: dict[int, int] = {}
    for value in [*outputs, *(value for step in steps for value in reads(step))]:
        counts[value] = counts.get(value, 0) + 1
    made: dict[int, Step] = {}
    for step in steps:
        if isinstance(step, Add):
            # of two linears the later one, whose inputs are fresh
            pair = sorted([(step.b, step.a), (step.a, step.b)], key=lambda p: p[0] if isinstance(p[0], int) else -1)
            for produced, other in reversed(pair):
                before = made.get(produced) if isinstance(produced, int) else None
                if not isinstance(before, Linear) or counts[before.y] != 1:
                    continue
                if isinstance(other, int) and before.residual is None:
                    step = replace(before, residual=other, y=step.y)
                elif isinstance(other, Constant) and other.rows == 1 and before.bias is None:
                    step = replace(before, bias=other, y=step.y)
                else:
                    continue
                del made[before.y]
                break
        made[step.y] = step
    return list(made.values())


def renumbered(step: Step, order: Mapping[int, int]) -> Step:
    """The step with the ids of values replaced."""
    ids = ("x", "y", "a", "b", "q", "k", "v", "gate", "up", "residual")
    found = {name: value for name, value in vars(step).items() if name in ids and isinstance(value, int)}
    changed: dict[str, Any] = {name: order[value] for name, value in found.items()}
    return replace(step, **changed)


def placed(program: Program, blobs: Blobs, own: Path) -> Program:
    """The program with its constants in files, of which `own` is written if it is needed. Raises GraphError, StorageError."""
    packed = [_tiled(step, blobs) if isinstance(step, Linear) else step for step in program.steps]
    used = list(dict.fromkeys(place.offset for step in packed for place in _places(step)))
    places = blobs.settle(used, own)
    steps = tuple(_swapped(step, lambda place: places[place.offset]) for step in packed)
    return replace(program, steps=steps, files=tuple(dict.fromkeys(places[i].file for i in used)))


def _tiled(step: Linear, blobs: Blobs) -> Linear:
    """The step with its weight in tiles, if it is one that the kernel multiplies so."""
    weight = step.weight
    if (weight.kind, weight.group, weight.activations) != ("int8", 0, "int8"):
        return step
    blob = blobs.items[weight.values.offset]
    values = blobs.add(blob.tensor, blob.turned, tiled=True)
    return replace(step, weight=replace(weight, kind="int8_tiles", values=values))


def _places(item: Any) -> Iterator[Place]:
    """Every place in a dataclass, in the order of its fields."""
    if isinstance(item, Place):
        yield item
    elif is_dataclass(item):
        for field in fields(item):
            yield from _places(getattr(item, field.name))


def _swapped(item: T, new: Callable[[Place], Place]) -> T:
    """A copy of a dataclass with every place in it replaced."""
    if isinstance(item, Place):
        return new(item)  # type: ignore[return-value]  # T is Place
    if not is_dataclass(item):
        return item
    changed = {field.name: _swapped(getattr(item, field.name), new) for field in fields(item)}
    return replace(item, **changed)  # type: ignore[type-var]  # is_dataclass does not narrow T
