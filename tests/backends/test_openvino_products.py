"""Products in 8 bits on OpenVINO: inputs are quantized row by row, and what is multiplied is int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino", reason="pip install 'lensc[openvino]'")
pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install 'lensc[export]'")

from lensc.backends import openvino as module
from lensc.backends._openvino_session import OpenVINOSession
from lensc.backends.base import Artifact, Target
from lensc.backends.load_options import LoadOptions
from lensc.backends.openvino import backend
from lensc.export.graph import Graph
from lensc.profiles import probe

TARGET = Target("openvino", "cpu")
Mlp = Any
"""The `SmallMlp` of conftest.py."""


def opened(small_mlp: Mlp, tmp_path: Path, scheme: str) -> tuple[OpenVINOSession, Artifact]:
    (tmp_path / "vision").mkdir()
    graph = Graph(small_mlp.spec, small_mlp.path, scheme, "0" * 64)
    artifact = backend.compile(graph, TARGET, tmp_path / "vision")
    session = backend.load(artifact, small_mlp.spec, tmp_path, LoadOptions(threads=1))
    assert isinstance(session, OpenVINOSession)
    return session, artifact


def products(session: OpenVINOSession) -> list[str]:
    """What computes each product of the runtime's graph: `brgemm_avx512_amx_i8` or the like."""
    compiled = session._request.get_compiled_model()
    nodes = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    return [module._text(n, "primitiveType").lower() for n in nodes if module._text(n, "layerType") == "FullyConnected"]


def test_products_are_of_int8_and_each_row_has_its_own_scale(small_mlp: Mlp, tmp_path: Path) -> None:
    """Where they would lose what does not fit they are computed in float, and are as near."""
    session, artifact = opened(small_mlp, tmp_path, "w8a8")
    assert artifact.options["products"] == "int8"
    exactly = not probe.machine().saturates_bytes
    assert [name.endswith("i8") for name in products(session)] == [exactly, exactly]
    patches = np.random.default_rng(1).standard_normal((2, 7, small_mlp.width), np.float32)
    patches[0, 1] *= 1e4
    patches[0, 2] = 0
    got, expected = session.run({"patches": patches})["made"], small_mlp.made(patches)
    error = np.sqrt(((got - expected) ** 2).mean(-1) / (expected**2).mean(-1))
    assert error.max() < 0.03
    assert error.max() > 1e-4 or not exactly, "8 bits cannot be that near"


def test_a_machine_whose_products_lose_what_does_not_fit_computes_in_float(
    small_mlp: Mlp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe.Machine, "saturates_bytes", True)
    session, artifact = opened(small_mlp, tmp_path, "w8a8")
    assert artifact.options["products"] == "int8", "what is compiled holds on other machines, too"
    assert [name.endswith("i8") for name in products(session)] == [False, False]
    patches = np.random.default_rng(1).standard_normal((1, 7, small_mlp.width), np.float32)
    np.testing.assert_allclose(session.run({"patches": patches})["made"], small_mlp.made(patches), rtol=1e-4, atol=1e-4)
    assert (
        "no VNNI: int8 vision is computed in float32" in next(p for p in backend.probe() if p.processor == "cpu").reason
    )


def test_products_are_float_where_inputs_are(small_mlp: Mlp, tmp_path: Path) -> None:
    session, artifact = opened(small_mlp, tmp_path, "w8a32")
    assert artifact.options["products"] == "float"
    assert [name.endswith("i8") for name in products(session)] == [False, False]
    patches = np.random.default_rng(1).standard_normal((1, 7, small_mlp.width), np.float32)
    np.testing.assert_allclose(session.run({"patches": patches})["made"], small_mlp.made(patches), rtol=1e-4, atol=1e-4)
