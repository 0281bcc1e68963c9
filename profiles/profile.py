"""What a device can do, as data: every number carries where it comes from.

A profile is a TOML file of this folder; adding a device is adding a file.

    name = "zen5-2core"
    title = "2 cores of AMD Zen 5"

    [[processors]]
    kind = "cpu"
    arch = "x86_64"
    features = ["avx2"]
    dtypes = ["float32", "int8"]
    bandwidth_gb_s = { value = 46.0, source = "measured", reference = "how, or the document it stands in" }
    peak_tops.int8 = { value = 2.078, source = "datasheet", reference = "…" }
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lensc.backends.codec import decode
from lensc.backends.errors import InputError, UsageError

Source = Literal["datasheet", "measured", "estimated"]


@dataclass(frozen=True)
class Figure:
    """A number and its source. `reference` names the document, or how it was measured or estimated."""

    value: float
    source: Source
    reference: str


@dataclass(frozen=True)
class Processor:
    """One processor of a device. What is not known is absent, never guessed.

    `arch` is what a compiler is told (`x86_64`, `hexagon-v75`), `features` its instruction sets as the operating
    system spells them. `memory_bytes` is what it can address, `peak_tops` maps a dtype to 10^12 operations per
    second, a multiply-add counting two.
    """

    kind: Literal["cpu", "gpu", "npu"]
    arch: str
    dtypes: tuple[str, ...]
    features: tuple[str, ...] = ()
    cores: Figure | None = None
    memory_bytes: Figure | None = None
    bandwidth_gb_s: Figure | None = None
    peak_tops: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceProfile:
    """A device: the processors a model can be placed on. `title` is the name people know it by."""

    name: str
    title: str
    processors: tuple[Processor, ...]


def names() -> tuple[str, ...]:
    """The names of the profiles that come with lensc, sorted."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.toml")))


def get(name: str) -> DeviceProfile:
    """The profile called `name`. Raises UsageError that lists the known ones."""
    if name not in names():
        raise UsageError(f"device profile {name!r} is not known; expected one of {', '.join(names())}")
    return load_profile(Path(__file__).parent / f"{name}.toml")


def load_profile(path: Path) -> DeviceProfile:
    """Read a profile. Raises InputError that lists every problem of the file."""
    try:
        document = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    problems: list[str] = []
    profile = decode(DeviceProfile, _lists(document), problems)
    if profile is not None:
        problems += _problems(path, profile)
    if profile is None or problems:
        raise InputError(f"{path}: " + "; ".join(problems))
    return profile


def _lists(value: object) -> object:
    """TOML's dates as text, so that they are refused as a wrong type and not by accident."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_lists(item) for item in value]
    return value if isinstance(value, str | int | float | bool) else str(value)


def _problems(path: Path, profile: DeviceProfile) -> list[str]:
    problems = [] if profile.name == path.stem else [f"name: {profile.name!r} differs from the file's"]
    if not profile.processors:
        problems.append("processors: empty, expected at least one")
    for i, processor in enumerate(profile.processors):
        numbers = {name: value for name, value in vars(processor).items() if isinstance(value, Figure)}
        numbers |= {f"peak_tops.{dtype}": figure for dtype, figure in processor.peak_tops.items()}
        for name, figure in numbers.items():
            if not 0 < figure.value < float("inf"):
                problems.append(f"processors[{i}].{name}: {figure.value}, expected a positive number")
            if not figure.reference.strip():
                problems.append(f"processors[{i}].{name}: the reference is empty")
        problems += [
            f"processors[{i}].peak_tops.{dtype}: not one of its dtypes"
            for dtype in processor.peak_tops
            if dtype not in processor.dtypes
        ]
    return problems
