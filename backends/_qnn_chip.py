"""Qualcomm's chips by name, and what a context binary says of the one it was made for."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from lensc.profiles import profile

from .errors import CompatibilityError, ExecutionError, UsageError

_INFO = re.compile(
    rb"ep_compatibility_info\.QNNExecutionProvider\x12.v2:\d+:(?P<qairt>[0-9.]+):[0-9.]+:(?P<arch>\d+):(?P<soc>\d+):",
    re.DOTALL,
)
"""The provider's own note in the ONNX file around a context binary; its length stands between key and value."""


@dataclass(frozen=True)
class Chip:
    """A chip as the compiler knows it: the two numbers stand in `profiles/<name>.toml`, and nobody may choose them apart."""

    name: str
    soc_model: int
    htp_arch: int

    @property
    def provider_options(self) -> dict[str, str]:
        """What the execution provider is told."""
        return {"soc_model": str(self.soc_model), "htp_arch": str(self.htp_arch)}


@functools.cache
def chips() -> dict[str, Chip]:
    """All chips that have a profile."""
    found = {}
    for name in profile.names():
        for processor in profile.get(name).processors:
            if processor.soc_model is not None and processor.htp_arch is not None:
                found[name] = Chip(name, processor.soc_model, processor.htp_arch)
    return found


def unknown_chip(name: str) -> str | None:
    """Why `name` is no chip, with those that are, the nearest first; None if it is one."""
    if name in chips():
        return None
    known = ", ".join(profile.nearest(name, chips()))
    return (
        f"chip {name!r} is not known; expected one of {known}"
        if name
        else f"a chip is missing; expected one of {known}"
    )


def chip(name: str) -> Chip:
    """The chip called `name`. Raises UsageError."""
    problem = unknown_chip(name)
    if problem:
        raise UsageError(problem)
    return chips()[name]


@dataclass(frozen=True)
class ContextInfo:
    """What the file around a context binary says: QAIRT's version, and the numbers of the chip."""

    qairt: str
    soc_model: int
    htp_arch: int


def context_info(path: Path) -> ContextInfo:
    """Read it from the ONNX file that the engine wrote, without onnx, which a device need not have. Raises ExecutionError."""
    try:
        match = _INFO.search(path.read_bytes())
    except OSError as error:
        raise ExecutionError(f"{path}: cannot be read: {error.strerror}; build the bundle again") from error
    if match is None:
        raise ExecutionError(f"{path}: not the wrapper of a QNN context binary; build the bundle again")
    return ContextInfo(match["qairt"].decode(), int(match["soc"]), int(match["arch"]))


def check_context(path: Path, wanted: Chip, qairt: str) -> None:
    """Check the file around a context binary against the chip it is loaded for and the QAIRT that loads it.

    Raises CompatibilityError that names each field that differs, and the command that builds it anew. The SDK itself loads
    another chip's binary without a word.
    """
    found = context_info(path)
    names = {(c.soc_model, c.htp_arch): c.name for c in chips().values()}
    problems = []
    if (found.soc_model, found.htp_arch) != (wanted.soc_model, wanted.htp_arch):
        made_for = names.get((found.soc_model, found.htp_arch), "no chip that is known")
        problems.append(
            f"chip: it was made for soc_model {found.soc_model}, htp_arch {found.htp_arch} ({made_for}), "
            f"{wanted.name} has {wanted.soc_model} and {wanted.htp_arch}"
        )
    if found.qairt != qairt:
        problems.append(f"qairt: it was made by {found.qairt}, here is {qairt}")
    if problems:
        raise CompatibilityError(
            f"{path}: {'; '.join(problems)}; rebuild: lensc compile GRAPHS --target qnn:npu:{wanted.name} -o BUNDLE"
        )
