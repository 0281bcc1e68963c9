"""What made a file: versions and a hash of the code, for manifests and for the keys of build stages."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path

from lensc.backends.bundle import Provenance

VERSIONS = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "numpy", "pillow", "tokenizers")
CODE = ("backends", "export", "runtime")
NOT_CODE = "demo"
"""The folder of `export` that trains a checkpoint; nothing else runs it."""


def provenance(checkpoint_sha256: str, command: str, scheme: str) -> Provenance:
    """The provenance of what is made from a checkpoint by `command` with the recipe named `scheme`, at this moment."""
    return Provenance(lensc_version(), command, checkpoint_sha256, versions(), scheme, timestamp())


def versions() -> dict[str, str]:
    """The versions of Python and of every package that shapes a graph."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def lensc_version() -> str:
    """The version of this package."""
    try:
        return importlib.metadata.version("lensc")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"


def timestamp() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@cache
def code_key() -> dict[str, str]:
    """The versions of what makes files, and a hash of lensc's own sources: other code may make other files."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for folder in CODE:
        for path in sorted((root / folder).rglob("*.py")):
            if path.parent.name == NOT_CODE:
                continue
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {**versions(), "code": digest.hexdigest()}
