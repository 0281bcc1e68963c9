"""How an artifact is run where its engine leaves a choice: it changes the speed, and nothing that was promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .errors import UsageError

Choices = Mapping[str, Sequence[str]]
"""The settings that an engine has for an artifact on this machine: name to values, the default first."""


@dataclass(frozen=True)
class LoadOptions:
    """What `Backend.load` is told. What is not given is the engine's default.

    `threads=None`: one for each physical core that the process may use. `engine`: settings of `TunableBackend.choices`.
    """

    threads: int | None = None
    engine: Mapping[str, str] = field(default_factory=dict)


DEFAULTS = LoadOptions()

PREFILL_CHUNK = "prefill_chunk"
"""The setting of an engine that keeps the KV cache: `CachedSession.prefill_chunk`."""


def chunks(usual: int, *others: int) -> tuple[str, ...]:
    """The values of `PREFILL_CHUNK`."""
    return tuple(map(str, (usual, *others)))


def settings_of(options: LoadOptions, choices: Choices, backend: str) -> dict[str, str]:
    """Every setting of `choices` with its value. Raises UsageError for one that there is not, with those that there are."""
    for name, value in options.engine.items():
        if name not in choices:
            known = ", ".join(choices) or "none"
            raise UsageError(f"backend {backend}: setting {name!r} is not known; expected one of {known}")
        if value not in choices[name]:
            raise UsageError(f"backend {backend}: {name}={value!r}: expected one of {', '.join(choices[name])}")
    return {name: options.engine.get(name, values[0]) for name, values in choices.items()}
