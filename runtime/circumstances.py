"""What a finding about artifacts depends on: where it is the same again, the finding holds."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from lensc.backends.base import Artifact, Probe
from lensc.backends.load_options import LoadOptions
from lensc.profiles import probe as machine


def key_of(
    format: int, artifacts: Sequence[Artifact], probes: Sequence[Probe | None], options: Sequence[LoadOptions]
) -> str:
    """A SHA-256 of the machine, the versions of engines and of lensc, what the drivers say, the artifacts with the hashes of their
    files, threads and settings. `probes` are those of the artifacts' targets; `format` is that of the finding.
    """
    here = machine.machine()
    parts = {
        "format": format,
        "machine": [str(here), here.system, *here.isa],
        "lensc": [machine.version("lensc"), *_kernels()],
        "drivers": machine.gpu_driver(),
        "probes": sorted({f"{p.backend}:{p.processor} {p.reason}" for p in probes if p is not None}),
        "artifacts": [dataclasses.asdict(artifact) for artifact in artifacts],
        "options": [[told.threads, sorted(told.engine.items())] for told in options],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _kernels() -> tuple[int, int]:
    """Size and time of our own kernels, which may be built again under the same version; zeros without them."""
    found = importlib.util.find_spec("lensc.kernels._cpu")
    if found is None or found.origin is None:
        return 0, 0
    status = Path(found.origin).stat()
    return status.st_size, status.st_mtime_ns
