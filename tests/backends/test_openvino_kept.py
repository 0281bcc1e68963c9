"""Compiled graphs that are kept in the user's cache: when they are used, and what happens when they cannot be."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino", reason="pip install 'lensc[openvino]'")
pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install 'lensc[export]'")

from lensc.backends import _openvino_kept as kept
from lensc.backends import openvino as module
from lensc.backends.base import Array, Artifact, Target
from lensc.backends.load_options import LoadOptions
from lensc.backends.openvino import backend
from lensc.export.graph import Graph, GraphSpec
from lensc.profiles import probe

TARGET = Target("openvino", "cpu")
Mlp = Any
"""The `SmallMlp` of conftest.py."""


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="moves the cache by XDG_CACHE_HOME, Linux's variable")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # only what computes in int8 is kept, whatever comes of it on this machine
    monkeypatch.setattr(probe.Machine, "saturates_bytes", False)
    return tmp_path / "cache" / "lensc" / "openvino"


@pytest.fixture
def artifact(small_mlp: Mlp, cache: Path, tmp_path: Path) -> Artifact:
    (tmp_path / "bundle" / "vision").mkdir(parents=True)
    graph = Graph(small_mlp.spec, small_mlp.path, "w8a8", "0" * 64)
    return backend.compile(graph, TARGET, tmp_path / "bundle" / "vision")


def run(artifact: Artifact, spec: GraphSpec, tmp_path: Path, threads: int = 1) -> Array:
    session = backend.load(artifact, spec, tmp_path / "bundle", LoadOptions(threads))
    patches = np.random.default_rng(1).standard_normal((1, 5, int(spec.inputs[0].shape[2])), np.float32)
    made: Array = session.run({"patches": patches})["made"]
    session.close()
    return made


def refuse(*_: object) -> Any:
    raise AssertionError("the graph is read again")


def test_a_graph_is_converted_and_compiled_once(
    artifact: Artifact, small_mlp: Mlp, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(artifact, small_mlp.spec, tmp_path)
    (blob,) = cache.iterdir()
    monkeypatch.setattr(module, "read", refuse)
    np.testing.assert_array_equal(run(artifact, small_mlp.spec, tmp_path), first)
    assert list(cache.iterdir()) == [blob]


@pytest.mark.parametrize("what", ["threads", "options", "files", "version"])
def test_what_was_compiled_otherwise_is_not_used(
    what: str, artifact: Artifact, small_mlp: Mlp, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(artifact, small_mlp.spec, tmp_path)
    if what == "options":
        artifact = dataclasses.replace(artifact, options=artifact.options | {"INFERENCE_PRECISION_HINT": "f32"})
    if what == "files":
        other = dataclasses.replace(artifact.files[0], sha256="1" * 64)
        artifact = dataclasses.replace(artifact, files=(other, *artifact.files[1:]))
    if what == "version":
        monkeypatch.setattr("openvino.__version__", f"{module._version(module.engine())}-99999")
    run(artifact, small_mlp.spec, tmp_path, threads=2 if what == "threads" else 1)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "foreign"])
def test_a_damaged_file_is_made_anew(
    damage: str,
    artifact: Artifact,
    small_mlp: Mlp,
    cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run(artifact, small_mlp.spec, tmp_path)
    (blob,) = cache.iterdir()
    whole = blob.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    foreign = b"another compiler's file"
    damaged = {"cut": whole[:-1], "changed": bytes(changed), "empty": b"",
               "foreign": hashlib.sha256(foreign).digest() + foreign}  # fmt: skip
    blob.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING, "lensc"):
        np.testing.assert_array_equal(run(artifact, small_mlp.spec, tmp_path), first)
    (message,) = caplog.messages
    assert str(blob) in message and message.endswith("the graph is compiled again")
    assert ("openvino refused it" in message) == (damage == "foreign")
    monkeypatch.setattr(module, "read", refuse)
    np.testing.assert_array_equal(run(artifact, small_mlp.spec, tmp_path), first)


def test_without_a_place_graphs_are_compiled_each_time(
    artifact: Artifact, small_mlp: Mlp, cache: Path, tmp_path: Path
) -> None:
    first = run(artifact, small_mlp.spec, tmp_path)
    for path in cache.iterdir():
        path.unlink()
    cache.rmdir()
    cache.write_text("not a folder")
    np.testing.assert_array_equal(run(artifact, small_mlp.spec, tmp_path), first)
    assert cache.read_text() == "not a folder"


@pytest.mark.parametrize("limit", ("FILES", "MOST_BYTES"))
def test_only_so_many_are_kept(
    artifact: Artifact, small_mlp: Mlp, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(kept, limit, 1)
    run(artifact, small_mlp.spec, tmp_path, threads=1)
    (before,) = cache.iterdir()
    run(artifact, small_mlp.spec, tmp_path, threads=2)
    (after,) = cache.iterdir()
    assert before != after
