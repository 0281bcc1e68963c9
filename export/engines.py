"""Asking engines, by their registry, what they can do here; what cannot run here is a reason, not an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lensc.backends import registry
from lensc.backends.base import Artifact, Session, Target
from lensc.backends.errors import CompatibilityError, UnavailableError

from .graph import GraphSpec


def usable(target: Target) -> tuple[bool, str]:
    """Whether the target's processor can be used on this machine, and why or why not."""
    for probe in registry.get(target.backend).probe():
        if probe.processor == target.processor:
            return probe.usable, probe.reason
    return False, f"backend {target.backend} knows no {target.processor}"


def load_if_usable(artifact: Artifact, spec: GraphSpec, folder: Path) -> Session | str:
    """A session, or the reason why this machine has none: what is compiled for another device cannot run here."""
    here, reason = usable(artifact.target)
    if not here:
        return reason
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
