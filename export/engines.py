"""Asking engines, by their registry, what they can do here; what cannot run here is a reason, not an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lensc.backends import registry
from lensc.backends.base import Artifact, Session, Target
from lensc.backends.errors import CompatibilityError, UnavailableError

from .graph import GraphSpec
from .memory import shown


def usable(target: Target) -> tuple[bool, str]:
    """Whether the target's processor can be used on this machine, and why or why not."""
    for probe in registry.get(target.backend).probe():
        if probe.processor == target.processor:
            return probe.usable, probe.reason
    return False, f"backend {target.backend} knows no {target.processor}"


def place_of(target: Target) -> str:
    """`emulated` if the target's processor is emulated here, else empty: see `ParityRecord.where`."""
    states = {p.processor: p.state for p in registry.get(target.backend).probe()}
    return "emulated" if states.get(target.processor) == "emulated" else ""


LOADED = 1.2
"""Times the bytes of an artifact's files: what a session takes, weights packed for the CPU and buffers included."""


def load_if_usable(artifact: Artifact, spec: GraphSpec, folder: Path, room: int | None = None) -> Session | str:
    """A session, or the reason why there is none: what is compiled for another device cannot run here, and what would
    take more than `room` bytes of memory may not.
    """
    here, reason = usable(artifact.target)
    if not here:
        return reason
    needed = int(LOADED * sum(file.bytes for file in artifact.files))
    if room is not None and needed > room:
        return f"running it takes about {shown(needed)}, --max-memory leaves {shown(room)}"
    try:
        return registry.get(artifact.target.backend).load(artifact, spec, folder)
    except (CompatibilityError, UnavailableError) as error:
        return str(error)


def close(sessions: Mapping[str, Session]) -> None:
    """Close all sessions."""
    for session in sessions.values():
        session.close()


def engine_key(target: Target) -> dict[str, str]:
    """What a build stage that uses the target's engine depends on: its version stands in the reason."""
    return {"engine": usable(target)[1]}
