"""OpenVINO's cache, which lives in the engine: steps, beams, trimming, fewer bits, full contexts, failures."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino", reason="pip install 'lensc[openvino]'")
onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install 'lensc[export]'")

from lensc.backends._openvino_cache import OpenVINOCache, OpenVINODecoderSession
from lensc.backends.base import Array, Artifact, Target
from lensc.backends.errors import (
    ExecutionError,
    PromptError,
    UsageError,
)
from lensc.backends.load_options import LoadOptions
from lensc.backends.openvino import backend
from lensc.export.graph import Graph
from lensc.profiles import probe

TARGET = Target("openvino", "cpu")

Decoder = Any
"""The `SmallDecoder` of conftest.py."""


@pytest.fixture(scope="module")
def float_decoder(small_decoder: Callable[[int], Decoder]) -> Decoder:
    return small_decoder(32)


@pytest.fixture(scope="module")
def int4_decoder(small_decoder: Callable[[int], Decoder]) -> Decoder:
    return small_decoder(4)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / TARGET.slug).mkdir()
    return tmp_path


def compile_graph(graph: Graph, bundle: Path, target: Target = TARGET) -> Artifact:
    (bundle / target.slug).mkdir(exist_ok=True)
    return backend.compile(graph, target, bundle / target.slug)


def open_graph(graph: Graph, bundle: Path) -> OpenVINODecoderSession:
    session = backend.load(compile_graph(graph, bundle), graph.spec, bundle, LoadOptions(threads=1))
    assert isinstance(session, OpenVINODecoderSession)
    return session


def step(session: OpenVINODecoderSession, cache: OpenVINOCache, embeds: Array) -> Array:
    """Feed `embeds: float32[batch, tokens, width]`; return the logits of all its positions."""
    tokens = embeds.shape[1]
    feeds = {
        "inputs_embeds": embeds,
        "position_ids": np.arange(cache.length, cache.length + tokens),
        "logit_positions": np.arange(tokens),
    }
    return session.step(feeds, cache)["logits"]


@pytest.fixture(scope="module")
def session(float_decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> OpenVINODecoderSession:
    return open_graph(float_decoder.graph, tmp_path_factory.mktemp("bundle"))


@pytest.mark.parametrize("batch", (1, 3), ids=lambda b: f"B{b}")
def test_steps(session: OpenVINODecoderSession, float_decoder: Decoder, batch: int) -> None:
    embeds = float_decoder.embeddings(batch, 30)
    cache = session.new_cache(1, batch)
    pieces = [step(session, cache, embeds[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 9), (9, 29), (29, 30))]
    expected = float_decoder.logits(embeds)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=2e-5, rtol=1e-5)
    assert (cache.length, cache.batch) == (30, batch)


def test_beams(session: OpenVINODecoderSession, float_decoder: Decoder) -> None:
    """Fork, reorder twice without a step between, trim below and above the fork."""
    prompt, steps = float_decoder.embeddings(1, 9), float_decoder.embeddings(3, 4, seed=2)
    root = session.new_cache(16)
    step(session, root, prompt)
    cache = root.fork(3)
    history = np.repeat(prompt, 3, axis=0)

    def feed(i: int) -> None:
        nonlocal history
        history = np.concatenate([history, steps[:, i : i + 1]], axis=1)
        got = step(session, cache, steps[:, i : i + 1])
        np.testing.assert_allclose(got, float_decoder.logits(history)[:, -1:], atol=2e-5, rtol=1e-5)

    feed(0)
    for beams in (np.array([2, 0, 1]), np.array([1, 1, 0])):
        cache.reorder(beams, 9)
        history = history[beams]
    feed(1)
    cache.reorder(np.array([2, 2, 0]), 9)
    cache.trim(10)
    history = history[[2, 2, 0], :10]
    feed(2)
    # the sequence they come from is still there
    more = np.concatenate([prompt, steps[:1, 3:]], axis=1)
    got = step(session, root, steps[:1, 3:])
    np.testing.assert_allclose(got, float_decoder.logits(more)[:, -1:], atol=2e-5, rtol=1e-5)


def test_trim_to_nothing_begins_anew(session: OpenVINODecoderSession, float_decoder: Decoder) -> None:
    cache = session.new_cache(8, 2)
    step(session, cache, float_decoder.embeddings(2, 8, seed=5))
    cache.reorder(np.array([1, 1]), 0)
    cache.trim(0)
    embeds = float_decoder.embeddings(2, 6)
    got = step(session, cache, embeds)
    np.testing.assert_allclose(got, float_decoder.logits(embeds), atol=2e-5, rtol=1e-5)


def test_caches_of_one_session_do_not_mix(session: OpenVINODecoderSession, float_decoder: Decoder) -> None:
    both = [float_decoder.embeddings(1, 10, seed) for seed in (3, 4)]
    caches = [session.new_cache(10) for _ in both]
    got: list[list[Array]] = [[], []]
    for i in range(10):
        for j, cache in enumerate(caches):
            got[j].append(step(session, cache, both[j][:, i : i + 1]))
    for j in range(2):
        expected = float_decoder.logits(both[j])
        np.testing.assert_allclose(np.concatenate(got[j], axis=1), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "row_bytes", "atol"),
    [("w4a16-g32", 2 * 16, 3e-3), ("w4a16-g32-kv8", 16 + 8, 3e-2), ("w4a8-g32", 2 * 16, 1e-1)],
    ids=str,
)
def test_cache_in_fewer_bits(int4_decoder: Decoder, bundle: Path, scheme: str, row_bytes: int, atol: float) -> None:
    session = open_graph(dataclasses.replace(int4_decoder.graph, scheme=scheme), bundle)
    embeds = int4_decoder.embeddings(1, 30)
    expected = int4_decoder.logits(embeds)
    cache = session.new_cache(30)
    step(session, cache, embeds[:, :20])
    got = np.concatenate([step(session, cache, embeds[:, i : i + 1]) for i in range(20, 30)], axis=1)
    np.testing.assert_allclose(got, expected[:, 20:], atol=atol)
    # on a CPU without VNNI it computes products of 8 bits, and what is beside them, in float32
    in_float = scheme == "w4a8-g32" and probe.machine().saturates_bytes
    assert np.abs(got - expected[:, 20:]).max() > 1e-5 or in_float, "nothing was rounded"
    assert cache.used_bytes == 30 * 2 * int4_decoder.layers * int4_decoder.kv_heads * row_bytes
    assert cache.used_bytes <= cache.nbytes <= 4 * cache.used_bytes


def test_what_is_put_into_a_state_is_the_engines_own(session: OpenVINODecoderSession, float_decoder: Decoder) -> None:
    """The past of `run` may be freed or written again as soon as it is in."""
    embeds = float_decoder.embeddings(1, 8)
    cache = session.new_cache(8)
    step(session, cache, embeds[:, :5])
    arrays = {name: array.copy() for name, array in cache.take().items()}
    cache.put(arrays)
    for array in arrays.values():
        array[:] = np.nan
    got = step(session, cache, embeds[:, 5:])
    np.testing.assert_allclose(got, float_decoder.logits(embeds)[:, 5:], atol=2e-5, rtol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone is told")
def test_pages_of_the_weights_are_given_back_once(
    float_decoder: Decoder, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first run, which packs them; what is computed afterwards is the same."""
    advised: list[tuple[int, int, int]] = []
    real = ctypes.CDLL(None).madvise

    class Libc:
        def __init__(self, name: None) -> None:
            pass

        def madvise(self, start: ctypes.c_void_p, length: ctypes.c_size_t, advice: int) -> int:
            advised.append((start.value or 0, length.value, advice))
            return int(real(start, length, advice))

    monkeypatch.setattr(ctypes, "CDLL", Libc)
    session = open_graph(float_decoder.graph, bundle)
    embeds = float_decoder.embeddings(1, 6)
    cache = session.new_cache(6)
    got = [step(session, cache, embeds[:, i : i + 2]) for i in range(0, 6, 2)]
    np.testing.assert_allclose(np.concatenate(got, axis=1), float_decoder.logits(embeds), atol=2e-5, rtol=1e-5)
    ((start, length, advice),) = advised
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    (mapping,) = (line.split() for line in maps if line.endswith(f"{bundle}/{TARGET.slug}/decoder.onnx.data"))
    assert mapping[0] == f"{start:x}-{start + length:x}" and mapping[1].startswith("r-")
    assert (length, advice) == (-(-float_decoder.graph.path.with_suffix(".onnx.data").stat().st_size // 4096) * 4096, 4)


def test_full_context_is_a_prompt_error(session: OpenVINODecoderSession, float_decoder: Decoder) -> None:
    cache = session.new_cache(float_decoder.limit)
    step(session, cache, float_decoder.embeddings(1, float_decoder.limit))
    with pytest.raises(
        PromptError, match=f"{float_decoder.limit + 1} tokens do not fit: context_length is {float_decoder.limit}"
    ):
        step(session, cache, float_decoder.embeddings(1, 1))
    assert cache.length == float_decoder.limit
    with pytest.raises(UsageError, match=f"capacity {float_decoder.limit + 1}"):
        session.new_cache(float_decoder.limit + 1)
    with pytest.raises(UsageError, match="batch 5"):
        session.new_cache(1, 5)


def test_a_cache_of_another_engine_or_batch_is_refused(session: OpenVINODecoderSession, float_decoder: Decoder) -> None:
    with pytest.raises(UsageError, match="object is not a cache of this session"):
        step(session, type("object", (), {"length": 0})(), float_decoder.embeddings(1, 1))
    with pytest.raises(UsageError, match="2 sequences fed, the cache has 1"):
        step(session, session.new_cache(1), float_decoder.embeddings(2, 1))


def test_a_run_that_failed_half_way_spoils_the_cache(session: OpenVINODecoderSession, float_decoder: Decoder) -> None:
    class Failing:
        def set_tensor(self, *_: object) -> None:
            pass

        def infer(self) -> None:
            raise RuntimeError(
                "Exception from src/inference/src/cpp/infer_request.cpp:225:\nout of\nmemory" + "!" * 999
            )

    cache = session.new_cache(4)
    step(session, cache, float_decoder.embeddings(1, 2))
    good, cache.request = cache.request, Failing()
    with pytest.raises(ExecutionError, match="graph decoder: openvino failed: out of memory!!") as caught:
        step(session, cache, float_decoder.embeddings(1, 1))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    cache.request = good
    with pytest.raises(ExecutionError, match="incomplete"):
        step(session, cache, float_decoder.embeddings(1, 1))
