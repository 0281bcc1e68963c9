"""JSON ⇄ dataclass: any value of any understood type comes back equal, of the same types."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensc.backends.base import Target
from lensc.backends.codec import decode, encode, loads

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
FLOAT = st.floats(allow_nan=False)


@dataclass(frozen=True)
class Inner:
    pair: tuple[int, float]
    mixed: dict[str, float | int | str]


@dataclass(frozen=True)
class Outer:
    name: str
    flag: bool
    target: Target
    choice: Literal["a", "b"]
    number: float | None
    shape: tuple[int | str, ...]
    inner: tuple[Inner, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    either: int | Inner | None = None


# A union with str reads "inf" as the number (module docstring), so that text is left out.
MIXED = st.dictionaries(TEXT, FLOAT | st.integers() | TEXT.filter(lambda text: text not in ("inf", "-inf")), max_size=3)
INNER = st.builds(Inner, st.tuples(st.integers(), FLOAT), MIXED)
OUTER = st.builds(
    Outer,
    name=TEXT,
    flag=st.booleans(),
    target=st.sampled_from([Target("onnxruntime", "cpu"), Target("qnn", "npu", "sm8650")]),
    choice=st.sampled_from(["a", "b"]),
    number=st.none() | FLOAT,
    shape=st.lists(st.integers() | TEXT, max_size=3).map(tuple),
    inner=st.lists(INNER, max_size=2).map(tuple),
    texts=st.dictionaries(TEXT, TEXT, max_size=3),
    either=st.none() | st.integers() | INNER,
)


@given(OUTER)
def test_round_trip(value: Outer) -> None:
    problems: list[str] = []
    assert decode(Outer, loads(json.dumps(encode(value))), problems) == value
    assert problems == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
KEYS = ("name", "flag", "target", "choice", "number", "shape", "inner", "texts", "either")


@given(JSON | st.fixed_dictionaries({key: JSON for key in KEYS}))
def test_anything_decodes_or_is_explained(value: object) -> None:
    problems: list[str] = []
    result = decode(Outer, value, problems)
    assert (result is None) == bool(problems)
    assert all(problem.isprintable() or "'" in problem for problem in problems)


def test_defaults_may_be_left_out() -> None:
    document = {"name": "x", "flag": True, "target": "a:cpu", "choice": "a", "number": 1, "shape": []}
    problems: list[str] = []
    value = decode(Outer, document, problems)
    assert value == Outer("x", True, Target("a", "cpu"), "a", 1.0, ())
    assert value is not None
    assert type(value.number) is float


def test_integer_and_float_stay_what_they_are() -> None:
    problems: list[str] = []
    inner = decode(Inner, {"pair": [1, 2], "mixed": {"a": 1, "b": 1.0, "c": "1", "d": "-inf"}}, problems)
    assert inner is not None
    assert {key: type(item) for key, item in inner.mixed.items()} == {"a": int, "b": float, "c": str, "d": float}
    assert inner.mixed["d"] == -math.inf
    assert type(inner.pair[1]) is float


@pytest.mark.parametrize(
    ("text", "reason"), [('{"a":1,"a":1}', '"a" appears twice'), ("[Infinity]", "Infinity is not")]
)
def test_loads_refuses(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        loads(text)
