"""Finds backends by file name: `backends/<name>.py` with a module attribute `backend` is the backend `<name>`.

Adding an engine is adding a file. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import cast

from .base import Backend, Probe
from .errors import UsageError

NOT_BACKENDS = frozenset({"base", "bundle", "codec", "compiling", "errors", "files", "load_options", "registry"})
"""The modules of this folder that are the contract, not an engine."""


@functools.cache
def names() -> tuple[str, ...]:
    """The names of all backends, sorted. Imports none of them. Modules that begin with `_` are parts of another."""
    package = importlib.import_module(__package__)
    found = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return tuple(sorted(name for name in found - NOT_BACKENDS if not name.startswith("_")))


def get(name: str) -> Backend:
    """The backend called `name`, imported on demand. Raises UsageError that lists the known ones."""
    if name not in names():
        raise UsageError(f"backend {name!r} is not known; expected one of {', '.join(names())}")
    return cast(Backend, importlib.import_module(f"{__package__}.{name}").backend)


def probes() -> tuple[Probe, ...]:
    """What every backend says of every processor it knows, on this machine."""
    return tuple(probe for name in names() for probe in get(name).probe())
