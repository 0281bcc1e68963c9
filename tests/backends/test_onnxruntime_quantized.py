"""Quantized graphs on ONNX Runtime: which operators they become, and that those compute the stored weights."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="weights are quantized with torch: pip install 'lensc[export]'")
onnx = pytest.importorskip("onnx", reason="pip install 'lensc[export]'")
ort = pytest.importorskip("onnxruntime", reason="pip install lensc")
import onnx_ir as ir
import torch
from torch import Tensor

from lensc.backends.base import Array, Artifact, CachedSession, Target
from lensc.backends.errors import GraphError, UnsupportedError
from lensc.backends.load_options import LoadOptions
from lensc.backends.onnxruntime import backend
from lensc.export import writer
from lensc.export.graph import DimRange, Graph, GraphSpec, TensorSpec
from lensc.export.quantize.weights import WeightFormat, dequantize, quantize_rtn
from lensc.export.writer import Parameter, write_graph

TARGET = Target("onnxruntime", "cpu")
OUTPUTS, INPUTS = 24, 80


def sqnr_db(expected: Array, got: Array) -> float:
    return float(10 * np.log10((expected**2).sum() / ((expected - got) ** 2).sum()))


def spec() -> GraphSpec:
    return GraphSpec(
        "linear",
        (TensorSpec("x", "float32", ("rows", INPUTS)),),
        (TensorSpec("y", "float32", ("rows", OUTPUTS)),),
        (),
        {"rows": DimRange(1, 1, 64)},
    )


def weight() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) * INPUTS**-0.5


BIAS = np.linspace(-1, 1, OUTPUTS, dtype=np.float32)


def write_linear(path: Path, format: WeightFormat, activation_bits: int, turned: bool = False) -> Graph:
    """y = x @ weight.T + bias; `turned`: the parameter is stored [inputs, outputs]."""
    helper, tensor = onnx.helper, onnx.TensorProto
    stored = weight().T.contiguous() if turned else weight()
    nodes = [] if turned else [helper.make_node("Transpose", ["weight"], ["weight.t"], perm=[1, 0])]
    nodes.append(helper.make_node("MatMul", ["x", "weight" if turned else "weight.t"], ["product"]))
    nodes.append(helper.make_node("Add", ["product", "bias"], ["y.0"]))
    nodes.append(helper.make_node("Identity", ["y.0"], ["y"]))
    infos = [
        [helper.make_tensor_value_info(t.name, tensor.FLOAT, t.shape) for t in tensors]
        for tensors in (spec().inputs, spec().outputs)
    ]
    initializers = [onnx.numpy_helper.from_array(stored.numpy(), "weight"), onnx.numpy_helper.from_array(BIAS, "bias")]
    graph = helper.make_graph(nodes, "linear", *infos, initializers)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    parameters = {"weight": Parameter("weight", tuple(stored.shape))}
    write_graph(model, path, parameters, lambda name, start, stop: stored[start:stop], {"weight": format})
    group = "" if format.group_size is None else f"-g{format.group_size}"
    scheme = f"w{format.bits}a{activation_bits}{group}{'' if format.symmetric else '-asym'}"
    return Graph(spec(), path, scheme, "0" * 64)


def compiled(graph: Graph, bundle: Path) -> tuple[Artifact, Counter[str]]:
    (bundle / TARGET.slug).mkdir()
    artifact = backend.compile(graph, TARGET, bundle / TARGET.slug)
    model = onnx.load(str(bundle / artifact.files[0].path), load_external_data=False)
    return artifact, Counter(node.op_type for node in model.graph.node)


def run(artifact: Artifact, bundle: Path, x: Array) -> Array:
    session = backend.load(artifact, spec(), bundle, LoadOptions(threads=1))
    return session.run({"x": x})["y"]


X = np.random.default_rng(1).standard_normal((5, INPUTS)).astype(np.float32)


@pytest.mark.parametrize("turned", (False, True), ids=("as it is", "turned"))
@pytest.mark.parametrize(
    "text",
    (
        "w4-g16",
        "w4-g16-s4",
        "w4-g16-asym",
        "w4-g32",
        "w4-g32-asym",
        "w8-g16",
        "w8-g32-asym",
        "w3-g16",
        "w2-g32",
        "w2-g32-asym",
    ),
)
def test_groups_become_matmul_nbits(text: str, turned: bool, tmp_path: Path) -> None:
    """Also a last group that is shorter (80 = 2 * 32 + 16), and zero points whose rows end within a byte."""
    format = WeightFormat.parse(text)
    artifact, kinds = compiled(write_linear(tmp_path / "g.onnx", format, 32, turned), tmp_path)
    assert kinds == {"MatMulNBits": 1, "Add": 1, "Identity": 1}
    expected = X @ dequantize(quantize_rtn(weight(), format)).numpy().T + BIAS
    np.testing.assert_allclose(run(artifact, tmp_path, X), expected, rtol=1e-4, atol=1e-5)
    assert artifact.options["products"] == "float32"


def test_int8_products_are_as_good_as_int8(tmp_path: Path) -> None:
    artifact, kinds = compiled(write_linear(tmp_path / "g.onnx", WeightFormat(4, 16), 8), tmp_path)
    assert kinds["MatMulNBits"] == 1 and artifact.options["products"] == "int8"
    expected = X @ dequantize(quantize_rtn(weight(), WeightFormat(4, 16))).numpy().T + BIAS
    assert 30 < sqnr_db(expected, run(artifact, tmp_path, X)) < 90


@pytest.mark.parametrize("turned", (False, True), ids=("as it is", "turned"))
def test_a_scale_per_output_becomes_an_integer_product(
    turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias is part of it: nothing of the linear is left in float. Weights lie as the portable graph has them, which
    was written a few rows at a time.
    """
    monkeypatch.setattr(writer, "PIECE_BYTES", 4 * INPUTS * 7)
    graph = write_linear(tmp_path / "g.onnx", WeightFormat(8), 8, turned)
    artifact, kinds = compiled(graph, tmp_path)
    assert (tmp_path / artifact.files[1].path).read_bytes() == (tmp_path / "g.onnx.data").read_bytes()
    assert kinds == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Identity": 1}
    expected = X @ dequantize(quantize_rtn(weight(), WeightFormat(8))).numpy().T + BIAS
    assert 30 < sqnr_db(expected, run(artifact, tmp_path, X)) < 90


def test_products_of_bytes_lose_nothing(small_mlp: Any, tmp_path: Path) -> None:
    """Also where a processor sums two of them in 16 bits: there half of these did not fit."""
    (tmp_path / "vision").mkdir()
    graph = Graph(small_mlp.spec, small_mlp.path, "w8a8", "0" * 64)
    session = backend.load(backend.compile(graph, TARGET, tmp_path / "vision"), small_mlp.spec, tmp_path)
    patches = np.random.default_rng(1).standard_normal((2, 7, small_mlp.width), np.float32)
    assert sqnr_db(small_mlp.made(patches), session.run({"patches": patches})["made"]) > 35


@pytest.mark.parametrize(
    ("text", "bits", "known", "found"),
    [
        ("w8", 32, "scheme w8a32: a scale per output needs", "a scale per output with float activations has no kernel"),
        (
            "w4-g24",
            32,
            "scheme w4a32-g24: groups of 24, expected a power",
            "groups of 24; onnxruntime takes powers of two",
        ),
    ],
)
def test_what_has_no_kernel_is_refused(text: str, bits: int, known: str, found: str, tmp_path: Path) -> None:
    """By the scheme, which is known before any work, or where a graph of several formats is lowered."""
    graph = write_linear(tmp_path / "g.onnx", WeightFormat.parse(text), bits)
    with pytest.raises(UnsupportedError, match=f"{known}.*the nearest are groups"):
        compiled(graph, tmp_path)
    (tmp_path / TARGET.slug).rmdir()
    with pytest.raises(GraphError, match=found):
        compiled(dataclasses.replace(graph, scheme=f"w4a{bits}-g32-mixed"), tmp_path)
    assert list((tmp_path / TARGET.slug).iterdir()) == []


def test_packed_weights_are_copied_byte_for_byte(small_decoder: Callable[[int], Any], tmp_path: Path) -> None:
    """Four bits stay four bits, and lie where the portable graph had them."""
    graph = small_decoder(4).graph
    artifact, kinds = compiled(graph, tmp_path)
    data = graph.path.with_name(f"{graph.path.name}.data").read_bytes()
    assert (tmp_path / artifact.files[1].path).read_bytes() == data
    model = onnx.load(str(tmp_path / artifact.files[0].path), load_external_data=False)
    outside = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert {"q.0.blocks", "q.0.scale", "head.blocks"} <= outside
    # what is read in place at each run is not
    assert not outside & {"norm", "norm.0", "norm.1"}
    assert kinds["MatMulNBits"] == 2 * 4 + 1 and kinds["GroupQueryAttention"] == 2 and "MatMul" not in kinds
    assert "DequantizeLinear" not in kinds


@pytest.mark.parametrize("bits", (8, 32))
def test_a_quantized_decoder_answers_as_its_weights_do(
    bits: int, small_decoder: Callable[[int], Any], tmp_path: Path
) -> None:
    """Prefill, then one token after the other, against all at once in float64."""
    small = small_decoder(4)
    graph = dataclasses.replace(small.graph, scheme=f"w4a{bits}-g{small.group}")
    artifact, _ = compiled(graph, tmp_path)
    session = backend.load(artifact, small.spec, tmp_path, LoadOptions(threads=1))
    assert isinstance(session, CachedSession)
    embeds = small.embeddings(2, 9)
    cache = session.new_cache(4, 2)
    logits = []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        feeds = {"inputs_embeds": embeds[:, start:stop].copy(), "position_ids": np.arange(start, stop)}
        logits.append(session.step({**feeds, "logit_positions": np.arange(stop - start)}, cache)["logits"])
    error = sqnr_db(small.logits(embeds), np.concatenate(logits, axis=1))
    assert error > (100 if bits == 32 else 25)
