"""Compiled graphs, kept in the user's cache: loading one again neither converts nor compiles it.

    <cache>/openvino/<key>.blob      what OpenVINO exports of a compiled graph without its weights, behind a hash of it

The key is everything that decides what is compiled: the artifact's files, options and threads, the build of OpenVINO, the
processor, and our own lowering. The weights stay in the bundle and are mapped from there. A file that is damaged, or that
OpenVINO refuses, is made anew, and a warning in the log says so; a cache that cannot be written costs time and nothing
else. Ten files and 256 MiB at most are kept, the latest used (9 MB for a full-size vision tower); $XDG_CACHE_HOME moves the
folder, and it may be deleted at any time.

Only graphs whose products are in 8 bits are kept. Of a decoder with weights in groups OpenVINO 2026.4 exports the weights
as well: 4 GB, which takes longer to read than compiling.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lensc.profiles import probe
from lensc.profiles.folders import cache_folder

from . import _openvino_lower
from ._openvino_session import one_line
from .base import Artifact
from .files import reason, replacing

FOLDER = "openvino"
SUFFIX = ".blob"
FILES = 10
MOST_BYTES = 256 << 20

WITHOUT_WEIGHTS = {"CACHE_MODE": "OPTIMIZE_SIZE"}
HASH_BYTES = 32

_log = logging.getLogger("lensc")


class KeptGraph:
    """Where the compiled graph of an artifact lies, if it has been kept."""

    def __init__(self, artifact: Artifact, bundle: Path, version: str, options: Mapping[str, str]) -> None:
        """`options` are those that the graph is compiled with. Only artifacts with one file of weights can be kept."""
        machine = probe.machine()
        key = {
            "files": [record.sha256 for record in artifact.files],
            "options": {**artifact.options, **options},
            "openvino": version,
            "cpu": [machine.cpu, *machine.isa],
            "lowering": hashlib.sha256(Path(_openvino_lower.__file__).read_bytes()).hexdigest(),
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        folder = cache_folder()
        self._path = None if folder is None else folder / FOLDER / (name + SUFFIX)
        self._options = {**options, **WITHOUT_WEIGHTS}
        self._weights = bundle / artifact.files[1].path

    def compiled(self, core: Any, compile_graph: Callable[[dict[str, str]], Any]) -> Any:
        """The compiled model that is kept, else that of `compile_graph`, called with the options, which then is."""
        kept = self._load(core)
        if kept is None:
            kept = compile_graph(self._options)
            self._save(kept)
        return kept

    def _load(self, core: Any) -> Any:
        """The compiled model, or None if there is none that can be used."""
        if self._path is None:
            return None
        try:
            data = self._path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data[HASH_BYTES:]).digest() != data[:HASH_BYTES]:
            _log.warning("%s is damaged; the graph is compiled again", self._path)
            return None
        options = {**self._options, "WEIGHTS_PATH": str(self._weights)}
        try:
            model = core.import_model(io.BytesIO(data[HASH_BYTES:]), "CPU", options)
        except RuntimeError as error:
            _log.warning("%s: openvino refused it: %s; the graph is compiled again", self._path, one_line(error))
            return None
        with contextlib.suppress(OSError):
            os.utime(self._path)
        return model

    def _save(self, compiled: Any) -> None:
        if self._path is None:
            return
        stream = io.BytesIO()
        compiled.export_model(stream)
        data = stream.getvalue()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as file:
                file.write(hashlib.sha256(data).digest() + data)
            _remove_oldest(self._path.parent)
        except OSError as error:
            _log.info("%s: not kept: %s", self._path, reason(error))


def _remove_oldest(folder: Path) -> None:
    """Keep the latest used files, as many as are allowed; the latest of all whatever its size. Raises OSError."""
    total = 0
    states = [(path.stat(), path) for path in folder.glob(f"*{SUFFIX}")]
    for i, (state, path) in enumerate(sorted(states, key=lambda entry: entry[0].st_mtime_ns, reverse=True)):
        total += state.st_size
        if i and (i >= FILES or total > MOST_BYTES):
            path.unlink(missing_ok=True)
