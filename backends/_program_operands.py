"""What the nodes of a portable graph make, while they become steps of a program.

A `Dynamic` is a value of the program. The others stand for something that a later node takes as a whole: a constant, an
input that is no matrix, half of a SiLU.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._program_weights import Tensor

Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Dynamic:
    """A value of the program, by the order in which values were asked for."""

    id: int
    dims: Dims


@dataclass(frozen=True)
class GraphInput:
    """An input of the graph, which may become a value."""

    name: str
    dtype: str
    dims: Dims


@dataclass(frozen=True)
class Const:
    """A constant; `turned` if it is the transpose of what lies in `tensor`."""

    tensor: Tensor
    turned: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.turned else self.tensor.shape


@dataclass(frozen=True)
class Quantized:
    """(values - zero_point) * scale; `turned` if it is the transpose of that. `group` neighbours along `axis` of the values
    share a scale; 0: all others have one for each place along `axis`.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    axis: int
    group: int
    turned: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        return self.values.shape[::-1] if self.turned else self.values.shape


@dataclass(frozen=True)
class Sigmoid:
    of: Dynamic


@dataclass(frozen=True)
class Silu:
    of: Dynamic


Operand = Dynamic | GraphInput | Const | Quantized | Sigmoid | Silu


def shown(operand: Operand | None) -> str:
    match operand:
        case Dynamic():
            return f"a value [{', '.join(map(str, operand.dims))}]"
        case GraphInput():
            return f"the input {operand.name} {operand.dtype}[{', '.join(map(str, operand.dims))}]"
        case Const():
            return f"the constant {operand.tensor.name} {operand.tensor.type}{list(operand.dims)}"
        case Quantized():
            return f"the constant {operand.values.name} {operand.values.type}{list(operand.dims)}"
        case Sigmoid() | Silu():
            return f"half of a SiLU [{', '.join(map(str, operand.of.dims))}]"
        case None:
            return "nothing"
