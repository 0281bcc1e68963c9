"""What `lensc bench` measured, as data: `lensc bench --output FILE` writes it, `lensc bench --verify FILE` reads it again.

A record is one JSON object, a `Record` field by field; the dataclasses are its schema. Two records are compared figure by figure:

    a figure has moved if every run of the new record is on the same side of every run of the old one, and the medians are
    further apart than a tolerance (5 % unless told otherwise)

Both spreads are in that rule, and it assumes nothing about how they come about: if nothing has changed, all of five runs are
above all of five others in one case of 252, and below in another; with four runs each it is one of 70, with three one of 20,
which is too many, so fewer than four are not judged. The tolerance is for what a machine does differently from one hour to the
next, which no run within a record shows. Memory, one number, has moved if it differs by twice the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lensc.backends.codec import decode, encode, loads
from lensc.backends.errors import InputError
from lensc.backends.files import write_text
from lensc.profiles.probe import Machine
from lensc.profiles.profile import Figure as Known
from lensc.runtime.measure import Values

FORMAT = 1
RECORD_BYTES = 64 << 20
"""A row is about 2 kB; anything near this limit is no record."""
TOLERANCE = 0.05
LEAST_RUNS = 4

HIGHER_IS_BETTER = frozenset({"prefill_tokens_s", "decode_tokens_s"})
NAMES: dict[str, str] = {
    "image_ms": "image",
    "prefill_tokens_s": "prefill",
    "decode_tokens_s": "decode",
    "ttft_ms": "first token",
    "peak_memory_bytes": "peak memory",
}

TUNED = "; tuned: "
"""How the reason of a placement goes on that runs with what `lensc tune` has kept."""

Moved = Literal["same", "better", "worse", "not judged"]


@dataclass(frozen=True)
class Figure(Values):
    """A figure in every run; `limit` is what the machine cannot pass, `predicted` what its profile says, if they are known."""

    limit: float | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class Placed:
    """A graph and where it ran; `state` is `runs here`, `emulated` or `untested`."""

    graph: str
    target: str
    scheme: str
    state: str
    reason: str


@dataclass(frozen=True)
class Image:
    """A picture as it was named: a file with its hash, a size (WIDTHxHEIGHT) of noise, or `none`."""

    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class BundleId:
    """Which bundle: its folder, and hashes of the checkpoint it was made of and of its manifest, which lists all files."""

    folder: str
    model: str
    scheme: str
    checkpoint_sha256: str
    manifest_sha256: str


@dataclass(frozen=True)
class Settings:
    """What was asked for. `devices` are as they were named, none for the plan's choice; `threads` is None for one per physical
    core, or what `lensc tune` has kept, which is used if `tuned`; `profile` is empty for none.
    """

    images: tuple[Image, ...]
    prompt_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]
    repetitions: int
    warmup: int
    threads: int | None
    tuned: bool
    prompt_lookup_num_tokens: int
    devices: tuple[str, ...]
    profile: str


@dataclass(frozen=True)
class Row:
    """One request on one placement. `prompt_tokens` are those of the picture and the text together; `text_tokens` the latter.

    `figures` by name: image_ms (in the vision graph, all slices), prefill_tokens_s, decode_tokens_s, ttft_ms (picture
    included), peak_memory_bytes (of the process, from its start on). `failed` says why there are none, and `skipped` that
    this is no fault: the target cannot run here, and was not asked for by name. What ran by emulation has no times, and what
    depends on it has none either.
    """

    device: str
    plan: tuple[Placed, ...]
    image: str
    slices: int
    prompt_tokens: int
    text_tokens: int
    new_tokens: int
    load_ms: float | None
    figures: dict[str, Figure]
    failed: str
    skipped: bool
    notes: tuple[str, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a row of another record the same request."""
        return self.where, self.image, self.text_tokens, self.new_tokens

    @property
    def emulated(self) -> tuple[str, ...]:
        """The graphs that ran by emulation."""
        return tuple(p.graph for p in self.plan if p.state == "emulated")

    @property
    def where(self) -> str:
        """The target, or each graph's where they differ."""
        targets = {p.graph: p.target for p in self.plan}
        if len(set(targets.values())) == 1:
            return next(iter(targets.values()))
        return ",".join(f"{graph}={target}" for graph, target in targets.items()) or self.device or "the plan's choice"

    @property
    def scheme(self) -> str:
        """How the artifacts store their weights: one for both graphs, or vision / decoder."""
        return " / ".join(dict.fromkeys(p.scheme for p in self.plan))


@dataclass(frozen=True)
class Record:
    """All of a run. `limits` are what percentages of the roofline are of, by name; `probed` what the machine reached before
    and after: a record whose machine was slower is slower.
    """

    lensc_bench: int
    command: str
    created: str
    machine: Machine
    versions: dict[str, str]
    bundle: BundleId
    settings: Settings
    in_turn: bool
    limits: dict[str, Known]
    probed: dict[str, tuple[float, float]]
    rows: tuple[Row, ...]


def as_json(record: Record) -> Any:
    """The record as it stands in a file."""
    return encode(record)


def write(path: Path, record: Record) -> None:
    """Write a record, all of it or nothing. Raises StorageError."""
    write_text(path, json.dumps(encode(record), indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> Record:
    """The record in a file. Raises InputError if it is none."""
    try:
        if path.stat().st_size > RECORD_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes; a record of lensc bench has at most {RECORD_BYTES}")
        document = loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("lensc_bench"), int):
        raise InputError(f"{path}: no record of lensc bench; expected what lensc bench BUNDLE --output FILE wrote")
    if document["lensc_bench"] > FORMAT:
        found = document["lensc_bench"]
        raise InputError(f"{path}: record format {found} is newer than this package reads ({FORMAT}); upgrade lensc")
    problems: list[str] = []
    record = decode(Record, document, problems)
    if record is None or (problems := problems + list(_problems(record))):
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InputError(f"{path}: a damaged record of lensc bench: {shown}")
    return record


def _problems(record: Record) -> Iterator[str]:
    """What a record says that the types allow and that cannot be."""
    settings = record.settings
    if not record.rows or not settings.images or not settings.prompt_tokens or not settings.new_tokens:
        yield "it holds no measurement"
    if min((*settings.prompt_tokens, *settings.new_tokens, settings.repetitions, settings.threads or 1)) < 1:
        yield "settings: expected counts of at least 1"
    if settings.warmup < 0 or settings.prompt_lookup_num_tokens < 0:
        yield "settings: expected warmup and prompt_lookup_num_tokens of at least 0"
    for i, row in enumerate(record.rows):
        for name, figure in row.figures.items():
            if name not in NAMES:
                yield f"rows[{i}].figures: {name[:40]!r} is not one of {', '.join(NAMES)}"
            if not figure.values or not all(0 < value < float("inf") for value in figure.values):
                yield f"rows[{i}].figures.{name[:40]}: expected positive numbers"


def of_limit(name: str, figure: Figure) -> float | None:
    """The share of its limit that a figure called `name` reaches, of a time or of a speed; None without a limit."""
    if figure.limit is None:
        return None
    return figure.median / figure.limit if name in HIGHER_IS_BETTER else figure.limit / figure.median


def moved(name: str, old: Sequence[float], new: Sequence[float], tolerance: float = TOLERANCE) -> Moved:
    """How a figure called `name` has moved from `old` to `new` runs, by the rule above."""
    before, after = Values(tuple(old)).median, Values(tuple(new)).median
    up = after > before
    better = up == (name in HIGHER_IS_BETTER)
    if name == "peak_memory_bytes":
        apart, allowed = True, 2 * tolerance
    elif min(len(old), len(new)) < LEAST_RUNS:
        return "not judged"
    else:
        apart, allowed = (min(new) > max(old)) if up else (max(new) < min(old)), tolerance
    if not apart or max(after / before, before / after) - 1 <= allowed:
        return "same"
    return "better" if better else "worse"


def differences(old: Record, new: Record) -> list[str]:
    """What is not the same besides the figures: the machine, versions, the bundle, pictures, what the machine reached."""
    parts: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("machine", _plain(old.machine), _plain(new.machine)),
        ("version of", old.versions, new.versions),
        ("bundle", _plain(old.bundle), _plain(new.bundle)),
        ("picture", _hashes(old), _hashes(new)),
        ("placement", _placements(old), _placements(new)),
    ]
    found = [
        f"{part} {name}: {_shown(before.get(name))} -> {_shown(after.get(name))}"
        for part, before, after in parts
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    for name in dict.fromkeys([*old.probed, *new.probed]):
        if name in old.probed and name in new.probed:
            before, after = max(old.probed[name]), max(new.probed[name])
            if abs(after / before - 1) > TOLERANCE:
                found.append(f"the machine reached {name}: {before:.4g} -> {after:.4g} ({after / before - 1:+.0%})")
    return found


def _plain(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _hashes(record: Record) -> dict[str, str]:
    return {image.name: image.sha256 for image in record.settings.images if image.sha256 is not None}


def _placements(record: Record) -> dict[str, str]:
    """By graph and target: how weights are stored, whether it is the real thing, and the settings that `lensc tune` kept."""
    return {
        f"{p.graph} on {p.target}": ", ".join([p.scheme, p.state, *p.reason.split(TUNED)[1:]])
        for row in record.rows
        for p in row.plan
    }


def _shown(value: object) -> str:
    if value is None:
        return "none"
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text[:12]}…" if is_hash else text
