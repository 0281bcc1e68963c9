"""Frozen dataclasses to JSON and back, strictly. The dataclass is the schema; there is no second description of it.

Understood types: str, int, float, bool, None, `Literal`, unions (of which one member may be a dataclass), `tuple[T, ...]`,
`tuple[A, B]`, `dict[str, T]`, dataclasses, and types with a `parse` classmethod, which are written as `str(value)`. JSON
has no infinity: an infinite float is written as the string "inf" or "-inf"; NaN is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, TypeVar, cast

from .errors import UsageError

T = TypeVar("T")

_INFINITE = {"inf": math.inf, "-inf": -math.inf}


def encode(value: object, where: str = "") -> Any:
    """The JSON value of a dataclass. Raises TypeError for a type or number that JSON cannot hold."""
    if hasattr(type(value), "parse"):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        if not all(type(key) is str for key in value):
            raise TypeError(f"{where.lstrip('.')}: a key is not a string")
        return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float):
        if math.isnan(value):
            raise TypeError(f"{where.lstrip('.')}: NaN cannot be written")
        return str(float(value)) if math.isinf(value) else float(value)
    if value is None or type(value) in (str, int, bool):
        return value
    raise TypeError(f"{where.lstrip('.')}: {type(value).__name__} cannot be written, expected a plain Python value")


def decode(cls: type[T], value: object, problems: list[str], where: str = "") -> T | None:
    """Build a `cls` from a JSON value, or append every reason why not to `problems` and return None."""
    before = len(problems)
    result = _decode(cls, value, problems, where)
    return cast(T, result) if len(problems) == before else None


def loads(text: str) -> Any:
    """Parse JSON, refusing duplicate keys, NaN and Infinity. Raises ValueError with the reason."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shown(key)} appears twice")
            seen.add(key)
    return result


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def shown(value: object) -> str:
    """`value` as it appears in a message: its JSON, cut to one short line."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """Name → (type, required) of a dataclass."""
    hints = typing.get_type_hints(cls)
    missing = dataclasses.MISSING
    return {
        f.name: (hints[f.name], f.default is missing and f.default_factory is missing) for f in dataclasses.fields(cls)
    }


def _decode(kind: Any, value: object, problems: list[str], where: str) -> Any:
    at = where or "top level"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if type(value) not in {type(a) for a in args} or value not in args:
            problems.append(f"{at}: {shown(value)} is not one of {', '.join(map(str, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, value, problems, at)
    if origin is tuple:
        return _decode_tuple(args, value, problems, at)
    if origin is dict:
        if not isinstance(value, dict):
            return _mismatch("an object", value, problems, at)
        return {key: _decode(args[1], item, problems, _key(at, key, problems)) for key, item in value.items()}
    if kind is float:
        return _decode_float(value, problems, at)
    if kind is str:
        if not isinstance(value, str):
            return _mismatch("a string", value, problems, at)
        return _text(value, problems, at)
    if kind is int or kind is bool:
        if type(value) is not kind:
            return _mismatch("an integer" if kind is int else "true or false", value, problems, at)
        return value
    if hasattr(kind, "parse"):
        if not isinstance(value, str):
            return _mismatch("a string", value, problems, at)
        try:
            return kind.parse(_text(value, problems, at))
        except UsageError as error:
            problems.append(f"{at}: {error}")
            return None
    return _decode_dataclass(kind, value, problems, where)


def _decode_dataclass(cls: type, value: object, problems: list[str], where: str) -> Any:
    if not isinstance(value, dict):
        return _mismatch("an object", value, problems, where or "top level")
    fields, before = _fields(cls), len(problems)
    prefix = f"{where}." if where else ""
    problems += [f"{prefix}{_name(key)}: unknown key" for key in value if key not in fields]
    problems += [f"{prefix}{name}: missing" for name, (_, needed) in fields.items() if needed and name not in value]
    found = {n: _decode(kind, value[n], problems, prefix + n) for n, (kind, _) in fields.items() if n in value}
    return cls(**found) if len(problems) == before else None


def _decode_tuple(args: tuple[Any, ...], value: object, problems: list[str], at: str) -> Any:
    if not isinstance(value, list):
        return _mismatch("a list", value, problems, at)
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(kinds) != len(value):
        problems.append(f"{at}: expected {len(kinds)} values, got {len(value)}")
        return None
    return tuple(
        _decode(kind, item, problems, f"{at}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _decode_union(args: tuple[Any, ...], value: object, problems: list[str], at: str) -> Any:
    if value is None and types.NoneType in args:
        return None
    if float in args and isinstance(value, str) and value in _INFINITE:
        return _INFINITE[value]
    kinds = [a for a in args if a is not types.NoneType]
    records = [a for a in kinds if dataclasses.is_dataclass(a)]
    if isinstance(value, dict) and len(records) == 1:
        return _decode_dataclass(cast(type, records[0]), value, problems, at)
    exact = type(value) if type(value) in kinds else None
    if exact is None and len(kinds) > 1 and not (type(value) is int and float in kinds):
        return _mismatch(" or ".join(a.__name__ for a in kinds), value, problems, at)
    return _decode(exact or (float if len(kinds) > 1 else kinds[0]), value, problems, at)


def _decode_float(value: object, problems: list[str], at: str) -> float | None:
    if isinstance(value, str) and value in _INFINITE:
        return _INFINITE[value]
    if type(value) not in (int, float):
        _mismatch("a number", value, problems, at)
        return None
    try:
        number = float(cast(float, value))
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        problems.append(f"{at}: the number does not fit a float64")
    return number


def _text(value: str, problems: list[str], at: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        problems.append(f"{at}: {shown(value)} holds a lone surrogate")
    return value


def _key(at: str, key: str, problems: list[str]) -> str:
    _text(key, problems, at)
    return f"{at}.{_name(key)}"


def _name(key: str) -> str:
    return key if key.isprintable() and len(key) <= 60 else shown(key)


def _mismatch(expected: str, value: object, problems: list[str], at: str) -> None:
    problems.append(f"{at}: expected {expected}, got {shown(value)}")
