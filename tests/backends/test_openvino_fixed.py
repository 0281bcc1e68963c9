"""Graphs on devices that run fixed sizes only: OpenVINO's NPU, with the CPU's plugin in its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino", reason="pip install 'lensc[openvino]'")
onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install 'lensc[export]'")

from onnx import TensorProto, helper, numpy_helper

from lensc.backends import openvino as module
from lensc.backends.base import Array, Target
from lensc.backends.errors import ExecutionError
from lensc.backends.load_options import LoadOptions
from lensc.backends.openvino import backend
from lensc.export.graph import DimRange, Graph, GraphSpec, TensorSpec

TARGET = Target("openvino", "npu")
WIDTH, HEADS, DIM = 64, 4, 16


def tower() -> GraphSpec:
    """A graph as the vision tower is: pieces along the first dimension, keys hidden by a bias."""
    per_patch = ("slices", "patches")
    return GraphSpec(
        name="vision",
        inputs=(TensorSpec("patches", "float32", (*per_patch, WIDTH)), TensorSpec("key_bias", "float32", per_patch)),
        outputs=(TensorSpec("image_embeds", "float32", ("slices", 3, WIDTH)),),
        states=(),
        dims={"slices": DimRange(1, 1, 9), "patches": DimRange(1, 10, 30)},
    )


def write_tower(path: Path) -> Array:
    """Three learned queries, projected with int8 weights, attend to all patches. Returns the projected queries."""
    generator = np.random.default_rng(0)
    queries = generator.standard_normal((1, 3, WIDTH)).astype(np.float32)
    values = generator.integers(-127, 128, (WIDTH, WIDTH)).astype(np.int8)
    scales = generator.uniform(0.5, 1.5, WIDTH).astype(np.float32) / 600
    sizes = {"num_heads": HEADS, "scale": DIM**-0.5}
    nodes = [
        helper.make_node("DequantizeLinear", ["values", "scales"], ["weight"], axis=1),
        helper.make_node("MatMul", ["queries", "weight"], ["query"]),
        helper.make_node(
            "Attention", ["query", "patches", "patches", "key_bias"], ["image_embeds"], domain="lensc", **sizes
        ),
    ]
    infos = [
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in tensors]
        for tensors in (tower().inputs, tower().outputs)
    ]
    arrays = {"queries": queries, "values": values, "scales": scales}
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "vision", *infos, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("lensc", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    projected: Array = queries @ (values * scales)
    return projected


def attend(queries: Array, patches: Array, bias: Array) -> Array:
    def heads(x: Array) -> Array:
        return x.astype(np.float64).reshape(*x.shape[:2], HEADS, DIM).transpose(0, 2, 1, 3)

    scores = heads(queries) @ heads(patches).swapaxes(2, 3) * DIM**-0.5 + bias[:, None, None]
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed: Array = (shares @ heads(patches)).transpose(0, 2, 1, 3).reshape(len(patches), 3, WIDTH)
    return mixed


@pytest.mark.parametrize("patches", (1, 7, 10, 11, 30), ids=lambda p: f"N{p}")
def test_fixed_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patches: int) -> None:
    """What the NPU's session does to sizes, on the CPU's plugin in its place."""
    monkeypatch.setitem(module.DEVICES, "npu", "CPU")
    queries = write_tower(tmp_path / "vision.onnx")
    # the NPU decides its precision itself
    options = {"INFERENCE_PRECISION_HINT": "f32", "attention": "f32", "products": "float"}
    monkeypatch.setattr(module, "_options", lambda *_: options)
    folder = tmp_path / TARGET.slug
    folder.mkdir()
    artifact = backend.compile(Graph(tower(), tmp_path / "vision.onnx", "f16", "0" * 64), TARGET, folder)
    assert artifact.placement["CPU"] > 0
    session = backend.load(artifact, tower(), tmp_path, LoadOptions(threads=1))
    generator = np.random.default_rng(patches)
    feeds: dict[str, Array] = {
        "patches": generator.standard_normal((3, patches, WIDTH), np.float32),
        "key_bias": generator.standard_normal((3, patches), np.float32),
    }
    out = np.full((3, 3, WIDTH), np.nan, np.float32)
    expected = attend(queries, feeds["patches"], feeds["key_bias"])
    for given in ({"image_embeds": out}, None):
        got = session.run(feeds, given)["image_embeds"]
        assert (got is out) == (given is not None)
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)
    many = {"patches": np.zeros((1, 31, WIDTH), np.float32), "key_bias": np.zeros((1, 31), np.float32)}
    with pytest.raises(ExecutionError, match="larger than it was compiled for: patches 31, at most 30"):
        session.run(many)
    session.close()
    with pytest.raises(ExecutionError, match="closed"):
        session.run(feeds)


def test_products_that_no_input_reaches_are_computed_when_loaded(tmp_path: Path) -> None:
    queries = write_tower(tmp_path / "vision.onnx")
    target = Target("openvino", "cpu")
    folder = tmp_path / target.slug
    folder.mkdir()
    artifact = backend.compile(Graph(tower(), tmp_path / "vision.onnx", "w8a32", "0" * 64), target, folder)
    assert "i8" not in artifact.options["executed"]
    session = backend.load(artifact, tower(), tmp_path, LoadOptions(threads=1))
    generator = np.random.default_rng(0)
    patches = generator.standard_normal((2, 5, WIDTH), np.float32)
    bias = generator.standard_normal((2, 5), np.float32)
    got = session.run({"patches": patches, "key_bias": bias})["image_embeds"]
    np.testing.assert_allclose(got, attend(queries, patches, bias), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_fixed() -> None:
    assert backend.supports(tower(), "w8a8", TARGET) is None
    assert "computes in 16 bits" in str(backend.supports(tower(), "f32", TARGET))
    other = dataclasses.replace(tower(), outputs=(TensorSpec("rows", "float32", ("slices", "patches", WIDTH)),))
    assert "outputs have dimensions that are not fixed" in str(backend.supports(other, "f16", TARGET))
    other = dataclasses.replace(tower(), inputs=tower().inputs[:1])
    assert "no input *_bias to hide the padding of patches" in str(backend.supports(other, "f16", TARGET))
    other = dataclasses.replace(tower(), inputs=(*tower().inputs, TensorSpec("grid", "int64", (2,))))
    assert "no first dimension in common, found 2, slices" in str(backend.supports(other, "f16", TARGET))
