"""Which of several candidates is fastest here: measured when a bundle is first loaded on a machine, and remembered.

    <cache>/placement/<key>.json      what each candidate took, or why it is out

The key is of all that the figures depend on (`circumstances`). A file that is damaged or says something else than it should is
a note, and is written anew; processes may share the folder: a file appears whole. It may be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lensc.backends.base import Artifact, Probe, Target
from lensc.backends.bundle import Manifest
from lensc.backends.errors import ExecutionError
from lensc.backends.files import reason, replacing
from lensc.backends.load_options import LoadOptions
from lensc.profiles.folders import cache_folder

from . import trial
from .circumstances import key_of
from .events import Event
from .plan import Timing, contenders, probe_of
from .trial import Refusal
from .tuned import settings_for

FOLDER = "placement"
FORMAT = 1
BUSY = 1.5
"""A spread from which on the figures may be of something else than the candidates; 1.0 to 1.2 on a quiet machine."""

Outcomes = dict[tuple[str, Target], Timing | Refusal]


@dataclass
class Found:
    """What is known of the candidates between which only a measurement can decide; nothing, where there are none."""

    outcomes: Outcomes = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)


def measured(
    folder: Path,
    manifest: Manifest,
    probes: Sequence[Probe],
    requested: Mapping[str, Target] | None = None,
    threads: int | None = None,
    tuned: bool = True,
) -> Found:
    """What each of several candidates takes, from what was kept or by a trial of one after the other; each as it will be
    loaded, with so many threads and, if they are wanted, the settings that `lensc tune` found best for it.

    Where no process can be started to try them in, nothing is known, and an event says why. That a candidate is out is an
    event each time.
    """
    found = Found()
    rivals = [artifact for several in contenders(manifest, probes, requested).values() for artifact in several]
    if not rivals:
        return found
    options = [_options(artifact, probes, threads, tuned) for artifact in rivals]
    key = key_of(FORMAT, rivals, [probe_of(artifact.target, probes) for artifact in rivals], options)
    path = _path(key)
    kept = None if path is None else _kept(path, key, rivals, found.events)
    if kept is None:
        started = time.perf_counter()
        try:
            kept = _tried(folder, rivals, probes, options)
        except ExecutionError as error:
            text = f"candidates were not timed: {error}; they are taken by rank"
            found.events.append(Event("not measured", "", "", text))
            return found
        seconds = time.perf_counter() - started
        found.events += _told(kept, seconds, path)
        if path is not None:
            _keep(path, key, kept, found.events)
    found.outcomes = kept
    for (graph, target), outcome in kept.items():
        if isinstance(outcome, Refusal):
            text = f"{graph} on {target} is out: {outcome.text}" + (f" (kept in {path})" if path is not None else "")
            found.events.append(Event(outcome.kind, graph, str(target), text))
    return found


def _options(artifact: Artifact, probes: Sequence[Probe], threads: int | None, tuned: bool) -> LoadOptions:
    found = settings_for(artifact, probe_of(artifact.target, probes))[0].options if tuned else LoadOptions()
    return found if threads is None else dataclasses.replace(found, threads=threads)


def _tried(
    folder: Path, rivals: Sequence[Artifact], probes: Sequence[Probe], options: Sequence[LoadOptions]
) -> Outcomes:
    outcomes: Outcomes = {}
    for artifact, told in zip(
        rivals, options, strict=True
    ):  # one at a time: each takes the memory and processor there are
        probe = probe_of(artifact.target, probes)
        state = "" if probe is None else probe.state
        outcomes[artifact.graph, artifact.target] = trial.tried(folder, artifact, state, told)
    return outcomes


def _told(outcomes: Outcomes, seconds: float, path: Path | None) -> list[Event]:
    """One event for each graph."""
    events = []
    for graph in dict.fromkeys(graph for graph, _ in outcomes):
        each = [f"{t} {o.text}" for (g, t), o in outcomes.items() if g == graph and isinstance(o, Timing)]
        text = f"{graph} was timed on this machine: {', '.join(each) or 'no candidate works'}"
        events.append(Event("measured", graph, "", text))
    last = events[-1]
    events[-1] = dataclasses.replace(last, text=f"{last.text}; all in {seconds:.1f} s, and remembered")
    spread = max((o.spread for o in outcomes.values() if isinstance(o, Timing)), default=1.0)
    if spread > BUSY:
        text = f"the machine was busy when candidates were timed: runs took up to {spread:.1f} times as long as the fastest"
        events.append(
            Event("not measured", "", "", text + ("" if path is None else f"; delete {path} to time them again"))
        )
    return events


# --- what is kept -------------------------------------------------------------------------------------------------


def _path(key: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / FOLDER / f"{key}.json"


def _kept(path: Path, key: str, rivals: Sequence[Artifact], events: list[Event]) -> Outcomes | None:
    """What an earlier load found, if it can be used."""
    try:
        return _parsed(json.loads(path.read_bytes()), key, rivals)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged, or no file of lensc"
        events.append(Event("not measured", "", "", f"{path} cannot be used: {reason}; candidates are timed again"))
        return None


def _parsed(document: Any, key: str, rivals: Sequence[Artifact]) -> Outcomes:
    """Raises ValueError, KeyError or TypeError for what `_keep` does not write."""
    if document["format"] != FORMAT or document["key"] != key:
        raise ValueError("another file")
    outcomes: Outcomes = {}
    for artifact in rivals:
        entry = document["candidates"][artifact.graph][str(artifact.target)]
        if not isinstance(entry["text"], str):
            raise TypeError("text")
        if "ms" in entry:
            if type(entry["ms"]) is not float or not 0 < entry["ms"] < math.inf:
                raise ValueError("ms")
            if type(entry["spread"]) is not float:
                raise TypeError("spread")
            outcomes[artifact.graph, artifact.target] = Timing(entry["ms"], entry["text"], entry["spread"])
        elif entry["kind"] in ("self-test", "refused"):
            outcomes[artifact.graph, artifact.target] = Refusal(entry["kind"], entry["text"])
        else:
            raise ValueError("kind")
    return outcomes


def _keep(path: Path, key: str, outcomes: Outcomes, events: list[Event]) -> None:
    """Write a file whole, or say why not: what was found holds for this time all the same."""
    candidates: dict[str, dict[str, Any]] = {}
    for (graph, target), outcome in outcomes.items():
        candidates.setdefault(graph, {})[str(target)] = dataclasses.asdict(outcome)
    document = {"format": FORMAT, "key": key, "candidates": candidates}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(document, indent=1).encode())
    except OSError as error:
        text = f"{path} was not written: {reason(error)}; candidates are timed again at the next load"
        events.append(Event("not measured", "", "", text))
