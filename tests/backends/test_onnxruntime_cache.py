"""The decoder session of ONNX Runtime: whose cache a step reads and writes, and what its weights cost."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="pip install 'lensc[export]'")
pytest.importorskip("onnxruntime", reason="pip install lensc")

from lensc.backends._onnxruntime_cache import OrtCache, OrtDecoderSession
from lensc.backends.base import Array, Artifact, Target
from lensc.backends.errors import ExecutionError
from lensc.backends.onnxruntime import backend

TARGET = Target("onnxruntime", "cpu")


@pytest.fixture
def small(small_decoder: Callable[[int], Any]) -> Any:
    return small_decoder(4)


@pytest.fixture
def artifact(small: Any, tmp_path: Path) -> Artifact:
    (tmp_path / TARGET.slug).mkdir()
    graph = dataclasses.replace(small.graph, scheme=f"w4a32-g{small.group}")
    return backend.compile(graph, TARGET, tmp_path / TARGET.slug)


@pytest.fixture
def session(small: Any, artifact: Artifact, tmp_path: Path) -> OrtDecoderSession:
    loaded = backend.load(artifact, small.spec, tmp_path, threads=2)
    assert isinstance(loaded, OrtDecoderSession)
    return loaded


def step(session: OrtDecoderSession, cache: OrtCache, embeds: Array) -> Array:
    """The logits of all of `embeds: float32[batch, tokens, width]`."""
    tokens = embeds.shape[1]
    feeds = {"inputs_embeds": embeds, "position_ids": np.arange(cache.length, cache.length + tokens)}
    return session.step({**feeds, "logit_positions": np.arange(tokens)}, cache)["logits"]


def test_caches_do_not_mix(session: OrtDecoderSession, small: Any) -> None:
    """Two sequences in turn, one of which moves to larger arrays on the way, while a third comes and goes."""
    embeds = [small.embeddings(1, 12) for _ in range(2)]
    embeds[1] = embeds[1][:, ::-1].copy()
    expected = [small.logits(e) for e in embeds]
    caches = [session.new_cache(12), session.new_cache(2)]
    for i in range(12):
        for cache, sequence, logits in zip(caches, embeds, expected, strict=True):
            got = step(session, cache, sequence[:, i : i + 1].copy())
            np.testing.assert_allclose(got[:, 0], logits[:, i], rtol=1e-4, atol=1e-5)
        step(session, session.new_cache(1 + i), small.embeddings(1, 1 + i))
    assert [cache.growths for cache in caches] == [0, 3]


def test_a_cache_is_bound_once(session: OrtDecoderSession, small: Any) -> None:
    cache = session.new_cache(3)
    bound = []
    for _ in range(4):
        step(session, cache, small.embeddings(1, 1))
        bound.append(session._bound[cache])
    assert bound[0] is bound[1] is bound[2] is not bound[3]


def test_nothing_keeps_a_cache_alive(session: OrtDecoderSession, small: Any) -> None:
    step(session, session.new_cache(3), small.embeddings(1, 2))
    gc.collect()
    assert len(session._bound) == 0


def test_a_closed_session_is_not_run_by_a_cache_that_outlives_it(session: OrtDecoderSession, small: Any) -> None:
    cache = session.new_cache(3)
    step(session, cache, small.embeddings(1, 2))
    session.close()
    assert cache.length == 2
    with pytest.raises(ExecutionError, match="the session is closed"):
        step(session, cache, small.embeddings(1, 1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_packed_weights_are_held_once(
    session: OrtDecoderSession, artifact: Artifact, small: Any, tmp_path: Path
) -> None:
    """The engine has weights of its own; the pages it packed them from are given back, and read again if needed."""
    data = str((tmp_path / artifact.files[1].path).resolve())
    sizes: dict[str, int] = {}
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        ours = line.endswith(data) if not first.endswith(":") else ours
        if ours and rest[1:] == ["kB"]:
            sizes[first] = sizes.get(first, 0) + (int(rest[0]) << 10)
    assert sizes["Size:"] >= artifact.files[1].bytes
    assert sizes["Rss:"] == 0
    embeds = small.embeddings(1, 3)
    np.testing.assert_allclose(step(session, session.new_cache(3), embeds), small.logits(embeds), rtol=1e-4, atol=1e-5)


def test_weights_that_are_gone_are_named(artifact: Artifact, small: Any, tmp_path: Path) -> None:
    data = tmp_path / artifact.files[1].path
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ExecutionError, match="onnxruntime failed"):
        backend.load(artifact, small.spec, tmp_path)
    data.write_bytes(b"")
    with pytest.raises(ExecutionError, match=r"decoder\.onnx\.data: cannot be read: it is empty; build the bundle"):
        backend.load(artifact, small.spec, tmp_path)
    data.unlink()
    with pytest.raises(ExecutionError, match=r"decoder\.onnx\.data: cannot be read: No such file"):
        backend.load(artifact, small.spec, tmp_path)
