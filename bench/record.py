"""Results as data: `bench/results/<topic>.json`, from which the tables of README and docs are made.

A file holds a list of records, one per command; writing replaces the record of the same command. Of topics in `BESIDE`
there is one per command and processor, so that machines stand beside each other. A row whose parity failed has no speed.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lensc.backends.errors import InputError, ParityError, StorageError
from lensc.backends.files import write_text
from lensc.profiles import probe

RESULTS = Path("bench/results")
"""Relative to the root of the source tree, from which benchmarks are run."""

TOPICS = ("full_size", "native_cpu", "qnn", "gpu", "runtime", "demo_accuracy", "ladder")
BESIDE = frozenset({"native_cpu"})
"""Topics in which each processor keeps records of its own: what is measured there is code for that processor."""
HIGHER_IS_BETTER = frozenset({"tokens/s", "slices/s", "GB/s", "GOP/s", "TOPS", "%", "dB"})
LOWER_IS_BETTER = frozenset({"s", "ms", "steps", "nodes", "MB", "GB", "errors", "% errors", "millinats"})

Parity = Literal["pass", "fail", "none"]


@dataclass(frozen=True)
class Row:
    """One measurement: the median in `lensc`, smallest and largest in `spread`, both in `unit`.

    `rival` names the system measured beside it, in turn in the same run; `pair_ratio` is the median ratio of two runs that
    followed each other, which what else the machine does moves less than either median, `ratio_spread` are the smallest
    and the largest. `limit` is what the machine could reach at best or what must not be
    exceeded. `parity` says whether the same run computed the right thing; `none` where nothing is computed.
    Raises ParityError for a speed whose parity failed, InputError for a unit that has no better and worse.
    """

    what: str
    unit: str
    lensc: float | None
    spread: tuple[float, float] | None = None
    rival: str | None = None
    rival_value: float | None = None
    rival_spread: tuple[float, float] | None = None
    pair_ratio: float | None = None
    ratio_spread: tuple[float, float] | None = None
    ratio_interval: tuple[float, float] | None = None
    limit: float | None = None
    parity: Parity = "none"

    def __post_init__(self) -> None:
        if self.unit not in HIGHER_IS_BETTER | LOWER_IS_BETTER:
            known = ", ".join(sorted(HIGHER_IS_BETTER | LOWER_IS_BETTER))
            raise InputError(f"bench row {self.what!r}: unit {self.unit!r} is not one of {known}")
        if self.parity == "fail" and (self.lensc is not None or self.spread is not None):
            raise ParityError(f"bench row {self.what!r}: its parity failed, so it has no value; pass lensc=None")

    @property
    def ratio(self) -> float | None:
        """How many times better than the rival; above 1 is ahead, for times and memory too. That of pairs, if it is known."""
        return self.pair_ratio if self.pair_ratio is not None else self._better_than(self.rival_value)

    @property
    def of_limit(self) -> float | None:
        """How near to the limit; 1 is reached, for times and memory too, and a time under its limit is above 1."""
        return self._better_than(self.limit)

    def _better_than(self, other: float | None) -> float | None:
        # decibels are a logarithm: their quotient says nothing
        if not self.lensc or not other or self.unit == "dB":
            return None
        return self.lensc / other if self.unit in HIGHER_IS_BETTER else other / self.lensc

    def to_json(self) -> dict[str, Any]:
        """The row with `ratio` and `of_limit`, rounded to 4 digits, without what is not known."""
        values = dataclasses.asdict(self) | {"ratio": self.ratio, "of_limit": self.of_limit, "pair_ratio": None}
        return {name: _rounded(value) for name, value in values.items() if value is not None}


def write(
    topic: str, command: str, rows: Sequence[Row], folder: Path = RESULTS, limits: dict[str, float] | None = None
) -> Path:
    """Put `rows` into `<folder>/<topic>.json` beside this machine, versions and commit; return the file.

    `limits` are what the machine was measured to reach in the same run, e.g. `{"bandwidth_gb_s": 45.8}`.
    Raises InputError for an unknown topic or a damaged file, StorageError if it cannot be written.
    """
    path = folder / f"{topic}.json"
    made = entry(topic, command, [row.to_json() for row in rows], limits)
    if not folder.is_dir():
        raise StorageError(f"{folder} is not a folder; run from the root of the source tree or name another folder")
    put(path, made)
    return path


def shown(path: Path) -> Path | str:
    """`path` as a record's command names it: where a machine keeps its files is nobody else's concern."""
    return path.name if path.is_absolute() else path


def entry(
    topic: str, command: str, rows: Sequence[dict[str, Any]], limits: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A record of `rows` as JSON with this machine, versions and commit. Raises InputError for an unknown topic."""
    if topic not in TOPICS:
        raise InputError(f"bench topic {topic!r} is not one of {', '.join(TOPICS)}")
    return {
        "topic": topic,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": {**machine(), **(limits or {})},
        "versions": probe.versions(),
        "command": command,
        "rows": [*rows],
    }


def put(path: Path, record: Mapping[str, Any]) -> None:
    """Put a record into a file, in the place of that of the same command (and processor, see `BESIDE`). Raises InputError,
    StorageError.
    """
    records = [r for r in read(path) if _key(r) != _key(record)] if path.exists() else []
    write_text(path, json.dumps([*records, record], indent=1, ensure_ascii=False) + "\n")


def _key(record: Mapping[str, Any]) -> tuple[str, str | None]:
    """What there is one record of."""
    return record["command"], record["machine"]["cpu"] if record.get("topic") in BESIDE else None


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a results file. Raises InputError if it is not one."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(records, list) or not all(
        isinstance(r, dict) and {"command", "rows"} <= r.keys() for r in records
    ):
        raise InputError(f"{path}: expected a list of records with command and rows")
    return records


def machine() -> dict[str, Any]:
    """This machine, as it stands in a record."""
    found = probe.machine()
    return {
        "cpu": found.cpu,
        "arch": found.arch,
        "isa": list(found.isa),
        "cores": found.cores,
        "threads": found.threads,
        "memory_gib": round(found.memory_bytes / 2**30, 1) if found.memory_bytes else None,
        "system": found.system,
    }


def commit() -> str:
    """The commit of the source tree in the working folder, `-dirty` if files differ from it; `unknown` without git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    """What git answers, empty where it cannot."""
    try:
        done = subprocess.run(["git", *arguments], check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _rounded(value: object) -> object:
    if isinstance(value, tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
