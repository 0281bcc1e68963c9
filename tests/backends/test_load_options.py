"""Settings of an engine: what there is to choose, that it computes the same, and that nothing else is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the graph is made with onnx: pip install 'lensc[export]'")

from lensc.backends import registry
from lensc.backends.base import Artifact, Target, TunableBackend
from lensc.backends.errors import UsageError
from lensc.backends.load_options import LoadOptions, settings_of

SmallDecoder = Any
"""That of conftest.py."""


def engines() -> list[Any]:
    """Every engine on the CPU that lowers the graph of conftest.py."""
    found = []
    for probe in registry.probes():
        if (probe.backend, probe.processor) in {(n, "cpu") for n in ("onnxruntime", "openvino", "native")}:
            marks = () if probe.usable else pytest.mark.skip(reason=probe.reason)
            found.append(pytest.param(Target(probe.backend, "cpu"), id=probe.backend, marks=marks))
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


def test_the_first_value_is_the_default() -> None:
    choices = {"spinning": ("on", "off"), "blocks": ("equal", "halving")}
    assert settings_of(LoadOptions(engine={"blocks": "halving"}), choices, "x") == {
        "spinning": "on",
        "blocks": "halving",
    }
