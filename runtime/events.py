"""What happened to graphs and devices: nothing is replaced, refused or measured in silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["measured", "not measured", "tuned", "refused", "self-test", "failed"]
"""Candidates were timed; they could not be, or not well, or what was known of them was unusable; a graph
runs as `lensc tune` found best, or what it kept is unusable; an engine did not load its artifact, or a
trial of it failed; a golden probe failed; a device failed in the middle of an answer.
"""


@dataclass(frozen=True)
class Event:
    """One thing that happened. `text` says it in one line, with what was done about it."""

    kind: Kind
    graph: str
    """Empty where it concerns all of them."""
    target: str
    """Where the graph was to run, or ran until then; empty where it concerns several."""
    text: str
