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

from lensc.backends import _engine_cache as module
from lensc.backends._onnxruntime_cache import OrtCache, OrtDecoderSession
from lensc.backends._onnxruntime_kv import scales_of
from lensc.backends.base import Array, Artifact, Target
from lensc.backends.errors import ExecutionError, UsageError
from lensc.backends.load_options import LoadOptions
from lensc.backends.onnxruntime import backend
from lensc.export.graph import DimRange

TARGET = Target("onnxruntime", "cpu")


@pytest.fixture
def small(small_decoder: Callable[[int], Any]) -> Any:
    return small_decoder(4)


def compiled(small: Any, bundle: Path, suffix: str = "") -> Artifact:
    (bundle / TARGET.slug).mkdir(parents=True)
    graph = dataclasses.replace(small.graph, scheme=f"w4a32-g{small.group}{suffix}")
    return backend.compile(graph, TARGET, bundle / TARGET.slug)


@pytest.fixture
def artifact(small: Any, tmp_path: Path) -> Artifact:
    return compiled(small, tmp_path)


@pytest.fixture
def session(small: Any, artifact: Artifact, tmp_path: Path) -> OrtDecoderSession:
    loaded = backend.load(artifact, small.spec, tmp_path, LoadOptions(threads=2))
    assert isinstance(loaded, OrtDecoderSession)
    return loaded


@pytest.fixture
def int8_session(small: Any, tmp_path: Path) -> OrtDecoderSession:
    """The same with a cache in int8."""
    artifact = compiled(small, tmp_path / "int8", "-kv8")
    assert artifact.options["kv_cache"].startswith("int8")
    loaded = backend.load(artifact, small.spec, tmp_path / "int8", LoadOptions(threads=2))
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
    part = data.read_bytes()[:100]
    data.unlink()  # it may be the portable graph's file, too
    data.write_bytes(part)
    with pytest.raises(ExecutionError, match="onnxruntime failed"):
        backend.load(artifact, small.spec, tmp_path)
    data.write_bytes(b"")
    with pytest.raises(ExecutionError, match=r"\.onnx\.data: cannot be read: it is empty; build the bundle"):
        backend.load(artifact, small.spec, tmp_path)
    data.unlink()
    with pytest.raises(ExecutionError, match=r"\.onnx\.data: cannot be read: No such file"):
        backend.load(artifact, small.spec, tmp_path)


def sqnr_db(expected: Array, got: Array) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(expected - got).sum()))


def stateless(session: OrtDecoderSession, embeds: Array, past: dict[str, Array]) -> dict[str, Array]:
    """The outputs of `run` for `embeds` after `past`, which holds the rows of earlier tokens by state."""
    start = len(next(iter(past.values())))
    positions = np.arange(embeds.shape[1])
    feeds = {"inputs_embeds": embeds, "position_ids": start + positions, "logit_positions": positions}
    return session.run({**feeds, **past})


def no_past(small: Any, batch: int = 1) -> dict[str, Array]:
    empty = np.empty((0, batch, small.kv_heads, small.head_dim), np.float32)
    return {pair.input: empty for pair in small.spec.states}


@pytest.mark.parametrize("batch", (1, 3))
def test_int8_keys_and_values_answer_alike(int8_session: OrtDecoderSession, small: Any, batch: int) -> None:
    """Prefill in two chunks, then one token after the other, in a cache that grows on the way."""
    embeds = small.embeddings(batch, 24)
    cache = int8_session.new_cache(20, batch)
    logits = [step(int8_session, cache, embeds[:, a:b].copy()) for a, b in [(0, 12), (12, 16)]]
    logits += [step(int8_session, cache, embeds[:, i : i + 1].copy()) for i in range(16, 24)]
    assert 30 < sqnr_db(small.logits(embeds), np.concatenate(logits, axis=1)) < 70
    assert cache.growths == 1 and {array.dtype for array in cache.arrays} == {np.dtype(np.int8)}


def test_an_int8_cache_is_saved_with_its_scales(int8_session: OrtDecoderSession, small: Any) -> None:
    embeds = small.embeddings(1, 20)
    cache, again = int8_session.new_cache(20), int8_session.new_cache(20)
    step(int8_session, cache, embeds[:, :16].copy())
    saved = {name: array.copy() for name, array in cache.save().items()}
    again.restore(saved)
    new = embeds[:, 16:].copy()
    np.testing.assert_array_equal(step(int8_session, again, new), step(int8_session, cache, new))
    with pytest.raises(UsageError, match="no scales of float32"):
        again.restore({name: array for name, array in saved.items() if name != "kv_scales"})


def test_scales_are_those_of_the_first_tokens(
    session: OrtDecoderSession, int8_session: OrtDecoderSession, small: Any
) -> None:
    """As wide as the rows of the first chunk need, and left alone by all that follow, however large."""
    first, second = small.embeddings(1, 12), 100 * small.embeddings(1, 3, seed=2)
    rows = stateless(session, first, no_past(small))
    cache = int8_session.new_cache(16)
    step(int8_session, cache, first)
    assert cache.scales is not None
    made = cache.scales.copy()
    # the first layer reads no attention: its rows are exact in both
    for i, is_key in enumerate((True, False)):
        np.testing.assert_allclose(made[i], scales_of(rows[small.spec.states[i].output], is_key), rtol=1e-4)
    step(int8_session, cache, second)
    np.testing.assert_array_equal(cache.scales, made)
    fork = cache.fork(2)
    assert fork.scales is not None and fork.scales is not cache.scales
    np.testing.assert_array_equal(fork.scales, made)
    cache.trim(0)
    step(int8_session, cache, first / 8)
    assert (cache.scales[1] <= made[1]).all()


def test_beams_in_int8_continue_the_prompt(int8_session: OrtDecoderSession, small: Any) -> None:
    embeds = small.embeddings(1, 14)
    cache = int8_session.new_cache(14)
    step(int8_session, cache, embeds[:, :12].copy())
    beams = cache.fork(2)
    both = np.repeat(embeds[:, 12:], 2, axis=0)
    # two tokens of two sequences at once go one sequence at a time
    got = step(int8_session, beams, both)
    expected = np.concatenate([step(int8_session, cache, embeds[:, i : i + 1].copy()) for i in (12, 13)], axis=1)
    for beam in got:
        assert sqnr_db(expected[0], beam) > 60


def test_run_in_int8_needs_no_scales_before(
    int8_session: OrtDecoderSession, session: OrtDecoderSession, small: Any
) -> None:
    """As verification runs it: a past that says nothing of how large the new rows are."""
    generator = np.random.default_rng(3)
    past = {name: 0.01 * generator.standard_normal((5, *a.shape[1:]), np.float32) for name, a in no_past(small).items()}
    expected = stateless(session, small.embeddings(1, 6), past)
    got = stateless(int8_session, small.embeddings(1, 6), past)
    for name, values in expected.items():
        assert sqnr_db(values, got[name]) > 30, name


def test_an_int8_cache_is_a_quarter(int8_session: OrtDecoderSession, session: OrtDecoderSession) -> None:
    assert session.new_cache(40).nbytes == 4 * int8_session.new_cache(40).nbytes


def test_other_caches_are_refused_with_the_nearest(small: Any) -> None:
    reason = backend.supports(small.spec, "w4a8-g128-kv4", TARGET)
    assert reason == (
        "scheme w4a8-g128-kv4: backend onnxruntime keeps the KV cache in float32 or int8; the nearest is w4a8-g128-kv8"
    )
    assert backend.supports(small.spec, "w4a8-g128-kv8", TARGET) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is in memory: no /proc/self/status")
def test_tokens_to_come_take_no_memory(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those of a cache that is gone."""

    def resident_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    monkeypatch.setattr(module, "MAPPED_BYTES", 1)
    spec = dataclasses.replace(small.spec, dims=small.spec.dims | {"past": DimRange(0, 16, 1 << 16)})
    before = resident_bytes()
    cache = OrtCache(spec, 1 << 16, 1)
    assert cache.nbytes > 16 << 20 and resident_bytes() - before < 4 << 20
    for array in cache.arrays:
        array[:] = 1
    assert resident_bytes() - before > cache.nbytes // 2
    del array, cache
    assert resident_bytes() - before < 4 << 20
