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

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

from lensc.backends.codec import decode, encode
from lensc.backends.errors import InputError, UsageError

from .folders import profile_folder

Source = Literal["datasheet", "measured", "estimated"]


@dataclass(frozen=True)
class Figure:
    """A number and its source. `reference` names the document, or how it was measured or estimated."""

    value: float
    source: Source
    reference: str


@dataclass(frozen=True)
class Rates:
    """What so many threads of a CPU reach; the fields are those of `Processor`."""

    threads: int
    bandwidth_gb_s: Figure | None = None
    achieved_tops: dict[str, Figure] = field(default_factory=dict)
    achieved_gb_s: Figure | None = None
    attention_tops: Figure | None = None


@dataclass(frozen=True)
class Processor:
    """One processor of a device. What is not known is absent, never guessed.

    `arch` is what a compiler is told (`x86_64`, `hexagon-v75`), `features` its instruction sets as the operating
    system spells them. `memory_bytes` is what it can address, the most that the maker supports: a device may be sold
    with less. `peak_tops` maps a dtype to 10^12 operations per second, a multiply-add counting two.

    `achieved_tops` is what somebody's transformer reached, by the dtype of its weights, and `achieved_gb_s` what its
    decoder read: where a maker states no peak these are all there is, and where he does they say how far away it is.
    `attention_tops` is what the causal attention of a prompt reached, whose products no weight is part of.

    `soc_model` and `htp_arch` are the two numbers by which Qualcomm's compiler knows a chip and the generation of its
    NPU; they go together, and `htp_arch` is the number in `arch`. `vtcm_mb` is that NPU's memory on the chip.

    `overheads_us` is what an engine costs beside its work, by name; `by_threads` what fewer threads reach.
    """

    kind: Literal["cpu", "gpu", "npu"]
    arch: str
    dtypes: tuple[str, ...]
    features: tuple[str, ...] = ()
    cores: Figure | None = None
    memory_bytes: Figure | None = None
    bandwidth_gb_s: Figure | None = None
    peak_tops: dict[str, Figure] = field(default_factory=dict)
    achieved_tops: dict[str, Figure] = field(default_factory=dict)
    achieved_gb_s: Figure | None = None
    attention_tops: Figure | None = None
    soc_model: int | None = None
    htp_arch: int | None = None
    vtcm_mb: Figure | None = None
    overheads_us: dict[str, Figure] = field(default_factory=dict)
    by_threads: tuple[Rates, ...] = ()


@dataclass(frozen=True)
class DeviceProfile:
    """A device: the processors a model can be placed on. `title` is the name people know it by, `form` what it is built
    into, and `quirks` what else a reader should know before placing a model on it.
    """

    name: str
    title: str
    processors: tuple[Processor, ...]
    form: Literal["phone", "laptop", "desktop", "server", "board", "car"] | None = None
    quirks: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int | None:
        """The most memory that any of its processors can address; None where nobody says."""
        sizes = [int(p.memory_bytes.value) for p in self.processors if p.memory_bytes]
        return max(sizes, default=None)


def names() -> tuple[str, ...]:
    """The names of the profiles that come with lensc, sorted."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.toml")))


def get(name: str) -> DeviceProfile:
    """The profile called `name`: the user's own, which `lensc profile` writes, before those that come with lensc.

    Raises UsageError that lists the known ones, nearest first.
    """
    own = profile_folder()
    mine = {path.stem: path for path in sorted(own.glob("*.toml"))} if own else {}
    known = {shipped: Path(__file__).parent / f"{shipped}.toml" for shipped in names()} | mine
    if name not in known:
        raise UsageError(f"device profile {name!r} is not known; expected one of {', '.join(nearest(name, known))}")
    return load_profile(known[name])


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """`known` with what is spelled most like `name` first."""
    alike = {other: SequenceMatcher(a=other, b=name.lower()).ratio() for other in known}
    return sorted(alike, key=lambda other: (-alike[other], other))


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


def to_toml(profile: DeviceProfile) -> str:
    """`profile` as `load_profile` reads it."""
    document = encode(profile)
    processors = document.pop("processors")
    lines = _lines(document)
    for processor in processors:
        rates = processor.pop("by_threads")
        lines += ["", "[[processors]]", *_lines(processor)]
        for of_threads in rates:
            lines += ["", "[[processors.by_threads]]", *_lines(of_threads)]
    return "\n".join(lines) + "\n"


def _lines(document: dict[str, Any]) -> list[str]:
    """`key = value` for what is there; figures of several dtypes each in a line of their own."""
    lines = []
    for key, value in document.items():
        if isinstance(value, dict) and "source" not in value:
            lines += [f"{key}.{name} = {_value(item)}" for name, item in value.items()]
        elif value not in (None, []):
            lines.append(f"{key} = {_value(value)}")
    return lines


def _value(value: object) -> str:
    """TOML for a JSON value. JSON's strings are TOML's, but for a delete character."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


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
        problems += [f"processors[{i}].{problem}" for problem in _processor_problems(processor)]
    return problems


def _processor_problems(processor: Processor) -> list[str]:
    problems = []
    numbers = {name: value for name, value in vars(processor).items() if isinstance(value, Figure)}
    numbers |= {f"overheads_us.{name}": figure for name, figure in processor.overheads_us.items()}
    for i, rates in enumerate(processor.by_threads):
        if rates.threads < 1:
            problems.append(f"by_threads[{i}].threads: {rates.threads}, expected at least 1")
        few = [("bandwidth_gb_s", rates.bandwidth_gb_s), ("achieved_gb_s", rates.achieved_gb_s)]
        few.append(("attention_tops", rates.attention_tops))
        few += [(f"achieved_tops.{dtype}", figure) for dtype, figure in rates.achieved_tops.items()]
        numbers |= {f"by_threads[{i}].{name}": figure for name, figure in few if figure}
    for kind in ("peak_tops", "achieved_tops"):
        figures: dict[str, Figure] = getattr(processor, kind)
        numbers |= {f"{kind}.{dtype}": figure for dtype, figure in figures.items()}
        problems += [f"{kind}.{dtype}: not one of its dtypes" for dtype in figures if dtype not in processor.dtypes]
    for name, figure in numbers.items():
        if not 0 < figure.value < float("inf"):
            problems.append(f"{name}: {figure.value}, expected a positive number")
        if not figure.reference.strip():
            problems.append(f"{name}: the reference is empty")
    pairs = [(processor.achieved_gb_s, processor.bandwidth_gb_s, "achieved_gb_s", "bandwidth_gb_s")]
    pairs += [
        (figure, processor.peak_tops.get(dtype), f"achieved_tops.{dtype}", "peak")
        for dtype, figure in processor.achieved_tops.items()
    ]
    problems += [
        f"{name}: {reached.value}, more than its {limit} of {most.value}"
        for reached, most, name, limit in pairs
        if reached and most and reached.value > most.value
    ]
    if (processor.soc_model is None) != (processor.htp_arch is None):
        given, missing = ("soc_model", "htp_arch") if processor.htp_arch is None else ("htp_arch", "soc_model")
        problems.append(f"{given}: given without {missing}")
    if processor.soc_model is not None and processor.soc_model < 1:
        problems.append(f"soc_model: {processor.soc_model}, expected at least 1")
    if processor.htp_arch is not None and processor.arch != f"hexagon-v{processor.htp_arch}":
        problems.append(f"htp_arch: {processor.htp_arch}, which is not what arch {processor.arch!r} says")
    return problems
