"""The compiled module: `bindings.cpp` says what everything is."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]
Any: TypeAlias = npt.NDArray[np.generic]

def usable_isas() -> list[str]: ...

class Caches:
    def __init__(
        self, keys: Sequence[Any], values: Sequence[Any], key_scales: Sequence[F32], value_scales: Sequence[F32]
    ) -> None: ...

class Program:
    def __init__(self, isa: str, threads: int) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    def value(self, row_class: int, width: int) -> int: ...
    def output(self, value: int) -> None: ...
    def finish(self) -> None: ...
    def rms_norm(self, x: int, weight: F32, epsilon: float, y: int) -> None: ...
    def layer_norm(self, x: int, weight: F32, bias: F32 | None, epsilon: float, y: int) -> None: ...
    def silu_mul(self, gate: int, up: int, y: int) -> None: ...
    def gelu_tanh(self, x: int, y: int) -> None: ...
    def add(self, a: int, b: int, y: int) -> None: ...
    def add_constant(self, a: int, constant: F32, y: int) -> None: ...
    def gather_rows(self, table: F32, ids: int, y: int) -> None: ...
    def select_rows(self, x: int, positions: int, apart: int, y: int) -> None: ...
    def float_linear(self, x: int, weight: F32, bias: F32 | None, residual: int, y: int) -> None: ...
    def group_linear(
        self,
        x: int,
        values: U8,
        scales: F32,
        zero_points: U8 | None,
        bits: int,
        is_signed: bool,
        group: int,
        int8_inputs: bool,
        bias: F32 | None,
        residual: int,
        y: int,
        multiples: npt.NDArray[np.int8] | None = None,
    ) -> None: ...
    def channel_linear(
        self, x: int, values: U8, scales: F32, sums: npt.NDArray[np.int32], bias: F32 | None, residual: int, y: int
    ) -> None: ...
    def causal_attention(
        self,
        q: int,
        k: int,
        v: int,
        y: int,
        apart: int,
        layer: int,
        heads: int,
        scale: float,
        inverse_frequencies: F32,
    ) -> None: ...
    def attention(
        self,
        q: int,
        constant_q: F32 | None,
        k: int,
        v: int,
        y: int,
        apart: int,
        bias: int,
        heads: int,
        scale: float,
        exact: bool,
    ) -> None: ...
    def run(
        self,
        counts: Sequence[int],
        values: Sequence[tuple[int, Any]],
        arrays: Sequence[Any | None],
        caches: Caches | None,
        past: int,
        sequences: int,
        tokens: int,
    ) -> None: ...

def multiply(product: str, rounds: int, isa: str = "", threads: int = 1) -> int: ...
def read(data: U8, streams: int, isa: str = "", threads: int = 1) -> int: ...
def rope_table(
    positions: npt.NDArray[np.int64], inverse_frequencies: F32, isa: str = "", threads: int = 1
) -> tuple[F32, F32]: ...
