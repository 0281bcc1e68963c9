"""The golden probe of a graph that is loaded: whole the first time, then its first tokens.

    <cache>/answered/<key>.json      an artifact answered all that was recorded, on this machine

What the first answer shows beyond the others is that kernels for many tokens, which another processor may never have run, are
right. It is asked for again as soon as anything changes that an answer depends on (`circumstances`), and wherever nothing can be
kept. A file that is damaged counts as none. It may be deleted at any time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lensc.backends.base import Artifact, Probe, Session
from lensc.backends.bundle import Manifest
from lensc.backends.files import reason, replacing
from lensc.backends.load_options import LoadOptions
from lensc.profiles.folders import cache_folder

from . import selftest
from .circumstances import key_of
from .plan import probe_of

FOLDER = "answered"
FORMAT = 1
FIRST_TOKENS = 2
"""Of two sequences: the second token sees the past, the first token and itself."""


def check_probe(
    folder: Path,
    manifest: Manifest,
    artifact: Artifact,
    session: Session,
    probes: Sequence[Probe],
    options: LoadOptions,
    limit_s: float | None = None,
) -> str:
    """Have a session of `artifact`, loaded with `options`, answer its golden probe; return what is to be said about that.

    Raises ParityError for a wrong answer, and what `selftest.run_selftest` raises.
    """
    graph, target = artifact.graph, artifact.target
    known = None
    if "tokens" in session.spec.dims:
        known = _Record.of(artifact, probe_of(target, probes), options)
    tokens = FIRST_TOKENS if known is not None and known.exists() else None
    tolerances = selftest.tolerances_of(artifact)
    results = selftest.run_selftest(manifest.probes, {graph: session}, folder, tolerances, limit_s, tokens)
    selftest.check(results, {graph: str(target)})
    if tokens is not None:
        return f"of its golden probe {tokens} tokens, the whole was right here before"
    return known.keep() if known is not None and results else ""


class _Record:
    """That an artifact answered the whole probe."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    @classmethod
    def of(cls, artifact: Artifact, probe: Probe | None, options: LoadOptions) -> _Record | None:
        """None where there is no folder to keep it in."""
        folder, key = cache_folder(), key_of(FORMAT, [artifact], [probe], [options])
        return None if folder is None else cls(folder / FOLDER / f"{key}.json", key)

    def exists(self) -> bool:
        try:
            return bool(json.loads(self._path.read_bytes()) == {"format": FORMAT, "key": self._key})
        except (OSError, ValueError, RecursionError):
            return False

    def keep(self) -> str:
        """Write it, or return why not."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as file:
                file.write(json.dumps({"format": FORMAT, "key": self._key}).encode())
        except OSError as error:
            return f"{self._path} was not written: {reason(error)}; the next load asks for the whole golden probe again"
        return ""
