"""Settings of an engine: what there is to choose, that it computes the same, and that nothing else is taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the graph is made with onnx: pip install 'lensc[export]'")

from lensc.backends import registry
from lensc.backends._engine_cores import CachedOnCores, cpus_of
from lensc.backends.base import Artifact, Target, TunableBackend
from lensc.backends.errors import UsageError
from lensc.backends.load_options import LoadOptions, settings_of
from lensc.profiles import probe

SmallDecoder = Any
"""That of conftest.py."""


def engines() -> list[Any]:
    """Every engine on the CPU that lowers the graph of conftest.py."""
    found = []
    for one in registry.probes():
        if (one.backend, one.processor) in {(n, "cpu") for n in ("onnxruntime", "openvino", "native")}:
            marks = () if one.usable else pytest.mark.skip(reason=one.reason)
            found.append(pytest.param(Target(one.backend, "cpu"), id=one.backend, marks=marks))
    return found


@pytest.fixture(scope="module", params=engines())
def compiled(
    request: pytest.FixtureRequest,
    small_decoder: Callable[[int], SmallDecoder],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Artifact, Path]:
    bundle = tmp_path_factory.mktemp("bundle")
    (bundle / "decoder").mkdir()
    target: Target = request.param
    artifact = registry.get(target.backend).compile(small_decoder(32).graph, target, bundle / "decoder")
    return artifact, bundle


def test_every_setting_computes_the_same(
    compiled: tuple[Artifact, Path], small_decoder: Callable[[int], SmallDecoder]
) -> None:
    artifact, bundle = compiled
    backend, small = registry.get(artifact.target.backend), small_decoder(32)
    choices = backend.choices(artifact) if isinstance(backend, TunableBackend) else {}
    feeds = {
        "inputs_embeds": small.embeddings(1, 5),
        "position_ids": np.arange(5),
        "logit_positions": np.arange(5),
        **{p.input: np.zeros((0, 1, small.kv_heads, small.head_dim), np.float32) for p in small.spec.states},
    }
    for name, values in {"": ("",), **choices}.items():
        for value in values:
            session = backend.load(artifact, small.spec, bundle, LoadOptions(1, {name: value} if name else {}))
            logits = session.run(feeds)["logits"]
            session.close()
            np.testing.assert_allclose(
                logits, small.logits(feeds["inputs_embeds"]), atol=2e-5, err_msg=f"{name}={value}"
            )


def test_what_an_engine_has_not_is_refused(
    compiled: tuple[Artifact, Path], small_decoder: Callable[[int], SmallDecoder]
) -> None:
    artifact, bundle = compiled
    backend, spec = registry.get(artifact.target.backend), small_decoder(32).spec
    with pytest.raises(UsageError, match=f"backend {backend.name}: setting 'turbo' is not known"):
        backend.load(artifact, spec, bundle, LoadOptions(engine={"turbo": "on"}))
    for name in backend.choices(artifact) if isinstance(backend, TunableBackend) else ():
        with pytest.raises(UsageError, match=f"{name}='faster': expected one of"):
            backend.load(artifact, spec, bundle, LoadOptions(engine={name: "faster"}))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are bound on Linux only")
@pytest.mark.skipif(len(probe.core_speeds()) < 2, reason="one core: threads have no choice")
def test_threads_stay_on_the_fastest_cores(
    compiled: tuple[Artifact, Path], small_decoder: Callable[[int], SmallDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, bundle = compiled
    backend, small = registry.get(artifact.target.backend), small_decoder(32)
    allowed = os.sched_getaffinity(0)
    slow, fast, *_ = probe.core_speeds()
    monkeypatch.setattr(probe, "core_speeds", lambda: {fast: 2, slow: 1})
    assert isinstance(backend, TunableBackend)
    if backend.name == "openvino":  # which binds threads itself
        assert "pinning" in backend.choices(artifact) and "cores" not in backend.choices(artifact)
        return
    assert backend.choices(artifact)["cores"] == ("any", "fastest")
    options = LoadOptions(1, {"cores": "fastest"})
    session = backend.load(artifact, small.spec, bundle, options)
    assert isinstance(session, CachedOnCores) and os.sched_getaffinity(0) == allowed
    ran_on = []
    step = session._cached.step
    monkeypatch.setattr(session._cached, "step", lambda *a: (ran_on.append(os.sched_getaffinity(0)), step(*a))[1])
    cache = session.new_cache(8)
    feeds = {"inputs_embeds": small.embeddings(1, 5), "position_ids": np.arange(5), "logit_positions": np.arange(5)}
    logits = session.step(feeds, cache)["logits"]
    np.testing.assert_allclose(logits, small.logits(feeds["inputs_embeds"]), atol=2e-5)
    assert ran_on == [{fast}] and os.sched_getaffinity(0) == allowed
    session.close()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are bound on Linux only")
@pytest.mark.parametrize("name", ["native", "onnxruntime"])
def test_threads_of_an_engine_inherit_where_they_may_run(
    name: str, small_decoder: Callable[[int], SmallDecoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, small = registry.get(name), small_decoder(32)
    (tmp_path / "decoder").mkdir()
    artifact = backend.compile(small.graph, Target(name, "cpu"), tmp_path / "decoder")
    last = max(os.sched_getaffinity(0))
    monkeypatch.setattr(f"lensc.backends.{name}.cpus_of", lambda chosen, threads: (last,))
    before = set(os.listdir("/proc/self/task"))
    session = backend.load(artifact, small.spec, tmp_path, LoadOptions(3))
    started = set(os.listdir("/proc/self/task")) - before
    assert len(started) >= 2 and all(os.sched_getaffinity(int(task)) == {last} for task in started)
    session.close()


def test_more_threads_than_cores_stay_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "core_speeds", lambda: {3: 9, 2: 9, 0: 1})
    assert cpus_of({"cores": "fastest"}, 2) == (3, 2)
    assert cpus_of({"cores": "fastest"}, 4) == cpus_of({"cores": "any"}, 2) == cpus_of({}, 2) == ()


def test_the_first_value_is_the_default() -> None:
    choices = {"spinning": ("on", "off"), "blocks": ("equal", "halving")}
    assert settings_of(LoadOptions(engine={"blocks": "halving"}), choices, "x") == {
        "spinning": "on",
        "blocks": "halving",
    }
