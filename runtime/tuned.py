"""What `lensc tune` found for an artifact on this machine, kept with the user's profiles; later loads begin with it.

    <profiles>/tuned/<hash of the key>.json      a `Tuned`: its key, the settings, what they were measured to bring

The key is all that the figures depend on: the artifact's files and how it was compiled, the engine as its probe names it, the
processor and what of it the process may use. So what was tuned for another bundle, machine or version of an engine is not
found, and not deleted either. A file that is damaged, or is not of the key that its name says, is left alone and said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lensc.backends import registry
from lensc.backends.base import Artifact, Probe, TunableBackend
from lensc.backends.codec import decode, encode, loads
from lensc.backends.errors import StorageError, UsageError
from lensc.backends.files import reason, replacing
from lensc.backends.load_options import PREFILL_CHUNK, Choices, LoadOptions, settings_of
from lensc.profiles import probe
from lensc.profiles.folders import profile_folder

from .speculation import MOST_DRAFTED

FORMAT = 1
FOLDER = "tuned"
MOST_BYTES = 1 << 16
"""A file of this kind has about 1 kB."""


@dataclass(frozen=True)
class Settings:
    """How a graph runs. None, and what is not in `engine`, is as without tuning.

    `drafted`: the most tokens that are guessed ahead, where a request does not say.
    """

    threads: int | None = None
    engine: dict[str, str] = field(default_factory=dict)
    drafted: int | None = None

    def __str__(self) -> str:
        named = {"threads": self.threads, **self.engine, "draft": self.drafted}
        told = [f"{SHOWN.get(name, name)} {value}" for name, value in named.items() if value is not None]
        return ", ".join(told) or "defaults"

    @property
    def options(self) -> LoadOptions:
        """What the engine is told."""
        return LoadOptions(self.threads, self.engine)


SHOWN = {PREFILL_CHUNK: "chunk"}
"""Names of settings as they are printed."""


@dataclass(frozen=True)
class Tuned:
    """Settings, with how many times as fast they were as the defaults: median and interval over `pairs` of runs in turn."""

    format: int
    key: dict[str, str]
    settings: Settings
    times: float
    interval: tuple[float, float]
    pairs: int
    default_ms: float
    """Of the work that was timed, with the defaults."""
    created: str


def key_of(artifact: Artifact, engine: str) -> dict[str, str]:
    """What a figure of `artifact` depends on; `engine` is the reason of its probe, which names the version."""
    machine = probe.machine()
    files = "".join(record.sha256 for record in artifact.files)
    options = json.dumps([artifact.options, artifact.scheme], sort_keys=True)
    return {
        "graph": artifact.graph,
        "target": str(artifact.target),
        "artifact": hashlib.sha256((files + options).encode()).hexdigest(),
        "engine": engine,
        "machine": f"{machine} {' '.join(machine.isa)}",
    }


def folder() -> Path | None:
    """Where the files lie; None without a home."""
    profiles = profile_folder()
    return None if profiles is None else profiles / FOLDER


def path_of(key: Mapping[str, str]) -> Path | None:
    """The file of a key."""
    place = folder()
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:32]
    return None if place is None else place / f"{name}.json"


def find(key: Mapping[str, str], choices: Choices) -> tuple[Tuned | None, str]:
    """What was found for `key`, if it was tuned; else why a file that is there cannot be used, or nothing.

    `choices` are the engine's settings, which those of the file must be among.
    """
    path = path_of(key)
    if path is None or not path.exists():
        return None, ""
    problem = ""
    try:
        if path.stat().st_size > MOST_BYTES:
            problem = f"more than {MOST_BYTES} bytes"
        else:
            problems: list[str] = []
            found = decode(Tuned, loads(path.read_text(encoding="utf-8")), problems)
            problem = "; ".join(problems[:3]) if found is None or problems else _unfit(found, key, choices)
            if not problem:
                return found, ""
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        problem = f"not JSON: {error}"
    return None, f"{path}: {problem}; the defaults are used, lensc tune writes it again"


def _unfit(found: Tuned, key: Mapping[str, str], choices: Choices) -> str:
    """Why a file that can be read is none of `key` here."""
    if found.format != FORMAT:
        return f"format {found.format}, expected {FORMAT}"
    foreign = [name for name in key if found.key.get(name) != key[name]]
    if foreign or len(found.key) != len(key):
        return f"is of another {' and '.join(foreign) or 'kind'}"
    threads, drafted = found.settings.threads, found.settings.drafted
    most = probe.machine().threads
    if threads is not None and not 1 <= threads <= most:
        return f"threads {threads}, expected 1 to {most}"
    if drafted is not None and not 0 <= drafted <= MOST_DRAFTED:
        return f"draft {drafted}, expected 0 to {MOST_DRAFTED}"
    try:
        settings_of(found.settings.options, choices, key["target"])
    except UsageError as error:
        return str(error)
    return ""


def keep(found: Tuned) -> Path:
    """Write `found`, whole or not at all; return where. Raises StorageError."""
    path = path_of(found.key)
    if path is None:
        raise StorageError("there is no home folder to keep what was found in; set XDG_DATA_HOME")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write((json.dumps(encode(found), indent=1) + "\n").encode())
    except OSError as error:
        raise StorageError(f"{path}: not written: {reason(error)}; set XDG_DATA_HOME to another folder") from error
    return path


def drop(key: Mapping[str, str]) -> bool:
    """Forget what was found for `key`: the defaults are as good. Returns whether there was anything. Raises StorageError."""
    path = path_of(key)
    if path is None:
        return False
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"{path}: not removed: {error.strerror or error}") from error
    return True


def settings_for(artifact: Artifact, probe_: Probe | None) -> tuple[Settings, str]:
    """What was found for an artifact whose engine answers `probe_`, the defaults if nothing was; and why not, if something is
    there that cannot be used.
    """
    place = folder()
    if probe_ is None or place is None or not place.is_dir():  # most users never tuned anything
        return Settings(), ""
    key = key_of(artifact, probe_.reason)
    path = path_of(key)
    if path is None or not path.exists():
        return Settings(), ""
    backend = registry.get(artifact.target.backend)
    found, problem = find(key, backend.choices(artifact) if isinstance(backend, TunableBackend) else {})
    return Settings() if found is None else found.settings, problem
