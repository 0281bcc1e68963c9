"""What the backend `tensorrt` gives TensorRT, run by ONNX Runtime and held against the portable graph. No GPU is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="graphs are traced with torch: pip install 'lensc[export]'")
onnx = pytest.importorskip("onnx", reason="pip install 'lensc[export]'")
ort = pytest.importorskip("onnxruntime", reason="pip install lensc")

from lensc.backends import _tensorrt_weights, tensorrt
from lensc.backends._tensorrt_lower import write_lowered
from lensc.backends._tensorrt_target import COLUMNS, WRITE, Half, capacity_of, engine_spec, present_name
from lensc.backends.base import Array
from lensc.backends.errors import ExecutionError, GraphError, UnsupportedError
from lensc.export.graph import Graph, GraphSpec
from lensc.export.quantize.recipe import EMBEDDING, PRESETS, Recipe

from .graph_feeds import feeds_of

Graphs = Callable[[str, Recipe], tuple[GraphSpec, Path]]

backend = tensorrt.backend

LEAST_DB: dict[Half, float] = {"float32": 100.0, "float16": 45.0}
"""Against the portable graph in float32. In float16, rounding to 11 bits makes 60 to 70 dB of well-scaled values; the
golden model's random weights leave 50."""
CALLS = {"vision": ((3, 63), (1, 7)), "decoder": ((1, 7, 0), (1, 1, 9), (3, 2, 5))}
"""Of awkward sizes."""
LEAST_INT8_DB = 18.0
"""As on the NPU (test_qnn.py): one scale for all inputs of a product of random weights."""


def opened(path: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns that it copies caches
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(session: Any, feeds: dict[str, Array]) -> dict[str, Array]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def lowered_outputs(spec: GraphSpec, session: Any, feeds: dict[str, Array], half: Half) -> dict[str, Array]:
    """What the lowered graph gives, with the new rows taken out of its caches."""
    if not spec.states:
        return outputs(session, feeds)
    past, batch, _, _ = feeds[spec.states[0].input].shape
    tokens = len(feeds["position_ids"])
    given = {name: array for name, array in feeds.items() if not name.startswith("past_")}
    given |= {WRITE: np.full(batch, past), COLUMNS: np.arange(past + tokens + 2)}
    for pair in spec.states:
        rows = feeds[pair.input].transpose(1, 2, 0, 3)
        cache = np.full((*rows.shape[:2], capacity_of(spec), rows.shape[3]), 7, half)  # what a mask has to hide
        cache[:, :, :past] = rows
        given[pair.input] = cache
    made = outputs(session, given)
    found = {"logits": made["logits"]}
    for pair in spec.states:
        new = made[present_name(pair.input)][:, :, past : past + tokens]
        found[pair.output] = new.transpose(2, 0, 1, 3).astype(np.float32)
    return found


def sqnr_db(got: Array, reference: Array) -> float:
    noise = float(((reference.astype(np.float64) - got) ** 2).sum())
    return 10 * np.log10(float((reference.astype(np.float64) ** 2).sum()) / max(noise, 1e-300))


def check(spec: GraphSpec, model: Path, path: Path, half: Half, least_db: float) -> None:
    """Compare the lowered graph at `path` with the portable one."""
    onnx.checker.check_model(str(path), full_check=True)
    portable, made = opened(model), opened(path)
    own = engine_spec(spec, half)
    assert {v.name for v in made.get_inputs()} == {t.name for t in own.inputs}
    assert {v.name for v in made.get_outputs()} == {t.name for t in own.outputs}
    for feeds in feeds_of(spec, CALLS):
        expected, got = outputs(portable, feeds), lowered_outputs(spec, made, feeds, half)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype), name
            assert sqnr_db(got[name], value) > least_db, f"{name}: {sqnr_db(got[name], value):.1f} dB"


# --- what TensorRT is given ---------------------------------------------------------------------------------------


def everything(text: str) -> Recipe:
    """All linears in one format."""
    return Recipe(text, ((EMBEDDING, "f32"), ("*", text)))


RECIPES = {
    "f32": (PRESETS["f32"], {"float"}),
    "int4": (PRESETS["int4-g32"], {"int4 with sums of groups", "8 bits as floats", "float"}),
    "w3-g32": (everything("w3-g32"), {"int4", "float"}),
    "w2-g32": (everything("w2-g32"), {"int4", "float"}),
    "w8-g32": (everything("w8-g32"), {"8 bits as floats", "float"}),
    "w4-g100": (everything("w4-g100"), {"4 bits as floats", "float"}),
}


@pytest.mark.parametrize(
    ("graph", "name", "half"),
    [
        *(("decoder", name, "float32") for name in RECIPES),
        *(("vision", name, "float32") for name in ("f32", "int4")),
        ("decoder", "int4", "float16"),
        ("vision", "f32", "float16"),
    ],
)
def test_it_computes_what_the_portable_graph_does(
    graph: str, name: str, half: Half, graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tensorrt_weights, "PIECE", 50)  # which divides no number of outputs
    recipe, kinds = RECIPES[name]
    spec, model = graphs(graph, dataclasses.replace(recipe, activations={}) if recipe.activations else recipe)
    made = write_lowered(Graph(spec, model, "", ""), tmp_path / "model.onnx", half)
    assert set(made.kinds) <= kinds and (name == "f32" or len(made.kinds) > 1 or graph == "decoder")
    check(spec, model, tmp_path / "model.onnx", half, LEAST_DB[half])


def test_products_of_int8_have_inputs_of_measured_ranges(graphs: Graphs, tmp_path: Path) -> None:
    """Measured without a GPU; without ranges the inputs stay floats."""
    spec, model = graphs("vision", PRESETS["w8a8-vision"])
    graph = Graph(spec, model, "w8a8", "")
    assert backend.needs_ranges("w8a8") and not backend.needs_ranges("w8a16")
    samples = [{k: v[:1] for k, v in feeds.items()} for feeds in feeds_of(spec, CALLS)]
    backend.measure_ranges(graph, samples, tmp_path / "ranges.json")
    made = write_lowered(graph, tmp_path / "float.onnx", "float32", has_int8_products=True)
    assert made.kinds["int8"] > 8
    check(spec, model, tmp_path / "float.onnx", "float32", LEAST_DB["float32"])
    ranges = tensorrt._ranges(dataclasses.replace(graph, ranges=tmp_path / "ranges.json"))
    assert ranges is not None
    write_lowered(graph, tmp_path / "int8.onnx", "float16", True, ranges)
    check(spec, model, tmp_path / "int8.onnx", "float16", LEAST_INT8_DB)
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx", load_external_data=False).graph.node]
    assert kinds.count("QuantizeLinear") >= 4, "inputs that several linears read are rounded once"
    assert kinds.count("QuantizeLinear") < made.kinds["int8"]
    with pytest.raises(UnsupportedError, match="has no measured range; build the bundle again"):
        write_lowered(graph, tmp_path / "none.onnx", "float16", True, {})


def test_bfloat16_is_the_same_graph_in_another_type(graphs: Graphs, tmp_path: Path) -> None:
    """ONNX Runtime computes nothing in bfloat16 on a CPU, so the types are checked, and float16 stands for the numbers."""
    spec, model = graphs("decoder", PRESETS["int4-g32"])
    graph = Graph(spec, model, "w4a16-g32", "")
    kinds = {}
    for half, own in (("float16", onnx.TensorProto.FLOAT16), ("bfloat16", onnx.TensorProto.BFLOAT16)):
        write_lowered(graph, tmp_path / half, half)  # type: ignore[arg-type]
        onnx.checker.check_model(str(tmp_path / half), full_check=True)
        model_proto = onnx.load(tmp_path / half)
        types = {t.name: t.data_type for t in model_proto.graph.initializer}
        assert own in types.values()
        kinds[half] = [node.op_type for node in model_proto.graph.node]
        [scales] = [t for t in model_proto.graph.initializer if "q_proj" in t.name and ".scales." in t.name]
        values = onnx.numpy_helper.to_array(scales).astype(np.float32)
        assert scales.data_type == own and values.min() > 0
    assert kinds["float16"] == kinds["bfloat16"]


def test_nothing_but_standard_operators_and_int4_in_blocks(graphs: Graphs, tmp_path: Path) -> None:
    spec, model = graphs("decoder", PRESETS["int4-g32"])
    write_lowered(Graph(spec, model, "w4a16-g32", ""), tmp_path / "model.onnx", "float16")
    made = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in made.opset_import] == [("", 24)]
    assert not made.functions and not [node for node in made.graph.node if node.domain]
    tensors = {t.name: t for t in made.graph.initializer}
    blocks = [node for node in made.graph.node if node.op_type == "DequantizeLinear"]
    for node in blocks:
        values, scales = (tensors[name] for name in node.input)
        about = {a.name: a.i for a in node.attribute}
        assert values.data_type == onnx.TensorProto.INT4 and about["axis"] == 0
        assert list(scales.dims) == [values.dims[0] // about["block_size"], values.dims[1]]
    scatters = [node for node in made.graph.node if node.op_type == "TensorScatter"]
    inputs, results = {v.name for v in made.graph.input}, {v.name for v in made.graph.output}
    assert len(scatters) == len(spec.states)
    assert all(node.input[0] in inputs and node.output[0] in results for node in scatters), "in place, so at both ends"


def test_weights_that_tensorrt_cannot_hold_are_refused(graphs: Graphs, tmp_path: Path) -> None:
    spec, model = graphs("decoder", everything("w4-g32-asym"))
    with pytest.raises(GraphError, match=r"weight \S+: zero points have no form in TensorRT.*without -asym"):
        write_lowered(Graph(spec, model, "w4a16-g32-asym", ""), tmp_path / "model.onnx", "float16")
    spec, model = graphs("vision", PRESETS["f32"])
    large = onnx.load(model)
    weight = next(t for t in large.graph.initializer if t.name.endswith("fc1.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(weight.dims), 1e6, np.float32), weight.name))
    onnx.save(large, tmp_path / "large.onnx")
    with pytest.raises(GraphError, match=r"fc1.weight: holds values that float16 does not; use -bf16"):
        write_lowered(Graph(spec, tmp_path / "large.onnx", "f32", ""), tmp_path / "model.onnx", "float16")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x0a nothing of the sort")
    with pytest.raises(ExecutionError, match=r"broken.onnx: cannot be read as ONNX: .*; export it again"):
        write_lowered(Graph(spec, tmp_path / "broken.onnx", "f32", ""), tmp_path / "model.onnx", "float16")
