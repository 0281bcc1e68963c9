"""Portable graphs as programs: what numpy computes of them is what ONNX Runtime computes of the graph, in every recipe."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="graphs are traced with torch: pip install 'lensc[export]'")
onnx = pytest.importorskip("onnx", reason="pip install 'lensc[export]'")
ort = pytest.importorskip("onnxruntime", reason="pip install lensc")
import onnx_ir as ir

from lensc.backends import _program_weights
from lensc.backends._program import Add, Attention, Constant, Linear, Program
from lensc.backends._program_file import read, write
from lensc.backends._program_lower import lower
from lensc.backends._program_reference import NumpySession
from lensc.backends.base import Array
from lensc.backends.errors import GraphError, UsageError
from lensc.export.graph import DimRange, GraphSpec, TensorSpec
from lensc.export.quantize.linears import SCALE
from lensc.export.quantize.recipe import EMBEDDING, PRESETS, Recipe

OWN = "native-cpu.data"

LEAST_DB = 100.0
"""Against ONNX Runtime in float32 from the same weights: sums of some hundred products differ by 2e-6 of their size."""
LEAST_INT8_DB = 30.0
"""With the inputs of linears in 8 bits."""

FORMATS = (
    "w8-g32",
    "w8-asym",
    "w8-g100-asym",
    "w4",
    "w4-g100-asym",
    "w4-g32-asym",
    "w3-g32",
    "w2-g64-asym",
    "w2-g32",
    "w4-g32-s4",
)
"""What no named recipe has: one scale per output, zero points, groups that do not divide the inputs, of which there is an
odd number, so that the zero points of an output begin within a byte."""


@dataclass(frozen=True)
class Lowered:
    spec: GraphSpec
    model: Path
    program: Program
    folder: Path
    """Where the program and its data files lie."""

    def session(self) -> NumpySession:
        return NumpySession(self.spec, self.program, self.folder)


def lowered(model: Path, spec: GraphSpec, folder: Path, activation_bits: int = 32) -> Lowered:
    """The program, written and read again."""
    folder.mkdir()
    made = lower(ir.load(model), spec, folder / OWN, activation_bits)
    for name in made.files:
        if name != OWN:
            shutil.copyfile(model.with_name(name), folder / name)
    write(made, folder / "native-cpu.json")
    program = read(folder / "native-cpu.json")
    assert program == made
    return Lowered(spec, model, program, folder)


Graphs = Callable[[str, Recipe], tuple[GraphSpec, Path]]


def feeds_of(spec: GraphSpec) -> Iterator[dict[str, Array]]:
    """Calls of awkward sizes: slices with masked keys, whole and in part; several sequences; tokens with and without a
    past."""
    generator = np.random.default_rng(0)
    calls = ((3, 63), (1, 7)) if spec.name == "vision" else ((1, 7, 0), (1, 1, 9), (3, 2, 5))
    for call in calls:
        names = ("slices", "patches") if spec.name == "vision" else ("batch", "tokens", "past")
        sizes = {**dict(zip(names, call, strict=True)), "rows": 2}
        shapes = {t.name: [d if isinstance(d, int) else sizes[d] for d in t.shape] for t in spec.inputs}
        feeds: dict[str, Array] = {
            t.name: generator.standard_normal(shapes[t.name], np.float32) for t in spec.inputs if t.dtype == "float32"
        }
        if spec.name == "vision":
            bias = np.zeros(shapes["key_bias"], np.float32)
            bias[-1, 5:] = -10000
            bias[0, 1::2] = -10000
            ids = generator.integers(0, 4900, shapes["position_ids"])
            yield feeds | {"attention_bias": bias * (len(bias) > 1), "key_bias": bias, "position_ids": ids}
        else:
            past, tokens = sizes["past"], sizes["tokens"]
            positions = np.arange(past, past + tokens)
            yield feeds | {"position_ids": positions, "logit_positions": np.array([tokens - 1, 0])}


def engine(model: Path) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """The portable graph as it stands: fusions would round the inputs of int8 weights."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))


def worst_db(made: Lowered) -> float:
    """The lowest SQNR of any output of any call."""
    expect, session = engine(made.model), made.session()
    worst = np.inf
    for feeds in feeds_of(made.spec):
        expected, got = expect(feeds), session.run(feeds)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype), name
            noise = float(((value.astype(np.float64) - got[name]) ** 2).sum())
            worst = min(worst, 10 * np.log10(float((value.astype(np.float64) ** 2).sum()) / max(noise, 1e-300)))
    return worst


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ("vision", "decoder"))
def test_named_recipes_compute_what_the_graph_does(graph: str, graphs: Graphs, tmp_path: Path) -> None:
    """Those that differ in nothing that a graph shows share one."""
    models = {graphs(graph, recipe)[1]: recipe for recipe in PRESETS.values()}
    for i, (model, recipe) in enumerate(models.items()):
        made = lowered(model, graphs(graph, recipe)[0], tmp_path / str(i))
        assert worst_db(made) >= LEAST_DB, recipe.name
    assert len(models) == (3 if graph == "vision" else 9)


@pytest.mark.parametrize("text", FORMATS)
def test_every_format_computes_what_the_graph_does(text: str, graphs: Graphs, tmp_path: Path) -> None:
    spec, model = graphs("decoder", Recipe("mine", ((EMBEDDING, "f32"), ("*", text))))
    assert worst_db(lowered(model, spec, tmp_path / "out")) >= LEAST_DB


@pytest.mark.parametrize("name", ("int8", "int4", "int4-asym"))
@pytest.mark.parametrize("graph", ("vision", "decoder"))
def test_inputs_in_8_bits_cost_little(graph: str, name: str, graphs: Graphs, tmp_path: Path) -> None:
    spec, model = graphs(graph, PRESETS[name])
    made = lowered(model, spec, tmp_path / "out", 8)
    weights = [step.weight for step in made.program.steps if isinstance(step, Linear)]
    assert {weight.activations for weight in weights if weight.kind != "f32"} == {"int8"}
    assert LEAST_INT8_DB <= worst_db(made) < LEAST_DB


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    (("w4-g128-s4", 8, True), ("w4-g128-s4", 32, False), ("w4-g128-asym", 8, False)),
    ids=("int8-inputs", "float-inputs", "zero-points"),
)
def test_scales_that_are_multiples_are_taken_so(
    name: str, bits: int, expected: bool, graphs: Graphs, tmp_path: Path
) -> None:
    spec, model = graphs("decoder", Recipe("mine", ((EMBEDDING, "f32"), ("*", name))))
    made = lowered(model, spec, tmp_path / "made", bits)
    weights = [step.weight for step in made.program.steps if isinstance(step, Linear)]
    assert {weight.kind for weight in weights} == {"uint4"}
    assert {weight.multiples is not None for weight in weights} == {expected}
    if expected:
        held = (made.folder / OWN).read_bytes()
        scales = {i.name: i.const_value.numpy() for i in ir.load(model).graph.initializers.values()}
        for weight in weights:
            assert weight.scale is not None and weight.multiples is not None
            assert weight.scale.file == weight.multiples.file == OWN
            steps = np.frombuffer(held, "<f4", weight.outputs, weight.scale.offset)
            multiples = np.frombuffer(held, np.int8, weight.multiples_bytes, weight.multiples.offset)
            products = steps[:, None] * multiples.reshape(weight.outputs, -1)
            np.testing.assert_allclose(products, scales[weight.name + SCALE].reshape(products.shape), rtol=2e-7)
            assert np.abs(multiples).max() <= 15


def test_the_output_is_written_where_it_is_wanted(graphs: Graphs, tmp_path: Path) -> None:
    spec, model = graphs("decoder", PRESETS["f32"])
    session = lowered(model, spec, tmp_path / "out").session()
    feeds = next(feeds_of(spec))
    keys = np.zeros((7, 1, *spec.output("key.0").shape[2:]), np.float32)
    outputs = session.run(feeds, {"key.0": keys})
    assert outputs["key.0"] is keys and np.array_equal(keys, session.run(feeds)["key.0"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logit_positions", [7, 0], r"logit_positions has 7, expected 0 to 6"),
        ("logit_positions", [-1, 0], r"logit_positions has -1, expected 0 to 6"),
        ("position_ids", [1, 2, 3, 4, 5, 6, 7], r"expected 0 to 6, which follow the cache"),
    ],
)
def test_an_index_outside_is_refused(name: str, value: list[int], message: str, graphs: Graphs, tmp_path: Path) -> None:
    spec, model = graphs("decoder", PRESETS["f32"])
    session = lowered(model, spec, tmp_path / "out").session()
    with pytest.raises(UsageError, match=message):
        session.run(next(feeds_of(spec)) | {name: np.array(value)})


# --- what the steps are ---------------------------------------------------------------------------------------------


def test_a_decoder_layer_is_eleven_steps(graphs: Graphs, tmp_path: Path) -> None:
    spec, model = graphs("decoder", PRESETS["int4"])
    program = lowered(model, spec, tmp_path / "out").program
    layer = [
        *("normalize", "linear", "linear", "linear", "causal_attention", "linear"),
        *("normalize", "linear", "linear", "silu_mul", "linear"),
    ]
    assert [step.step for step in program.steps] == [*layer, "select_rows", "normalize", "linear"]
    streams = [step.residual for step in program.steps if isinstance(step, Linear) and step.residual is not None]
    assert streams == [0, 6]
    assert {(value.rows, value.width) for value in program.values[:12]} == {
        ("batch*tokens", width) for width in (256, 128, 512)
    }
    assert program.values[-1].rows == "batch*rows"


def test_a_vision_layer_has_no_step_for_biases_and_residuals(graphs: Graphs, tmp_path: Path) -> None:
    spec, model = graphs("vision", PRESETS["int4"])
    program = lowered(model, spec, tmp_path / "out").program
    layer = [
        *("normalize", "linear", "linear", "linear", "attention", "linear"),
        *("normalize", "linear", "gelu_tanh", "linear"),
    ]
    resampler = [
        "normalize",
        "linear",
        "normalize",
        "add",
        "linear",
        "linear",
        "attention",
        "linear",
        "normalize",
        "linear",
    ]
    assert [step.step for step in program.steps] == ["gather_rows", "linear", *layer, *resampler]
    (add,) = (step for step in program.steps if isinstance(step, Add))
    assert add.b == [port.name for port in program.inputs].index("key_pos_embed")
    last = [step for step in program.steps if isinstance(step, Attention)][-1]
    assert isinstance(last.q, Constant) and (last.q.rows, program.values[last.y].rows) == (96, "slices*96")


def test_weights_are_read_where_they_lie(graphs: Graphs, tmp_path: Path) -> None:
    spec, model = graphs("decoder", PRESETS["int4"])
    made = lowered(model, spec, tmp_path / "out")
    tensors = {name: value.const_value for name, value in ir.load(model).graph.initializers.items()}
    weights = [step.weight for step in made.program.steps if isinstance(step, Linear)]
    assert len(weights) == 8
    for weight in weights:
        for part, place in (("", weight.values), (".scale", weight.scale)):
            tensor = tensors[weight.name + part]
            assert isinstance(tensor, ir.ExternalTensor) and place is not None
            assert (place.file, place.offset) == (tensor.location, tensor.offset)
        assert weight.zero_point is None, "8 everywhere is what a weight without any has"
    assert (made.folder / OWN).stat().st_size < 16 << 10


def test_turned_weights_are_written_by_rows(graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of every size, and into one file if that saves the other."""
    spec, model = graphs("vision", PRESETS["int8"])
    made = lowered(model, spec, tmp_path / "out")
    whole = (made.folder / OWN).read_bytes()
    initializers = ir.load(model).graph.initializers
    own = [
        step.weight
        for step in made.program.steps
        if isinstance(step, Linear) and step.weight.values.file == OWN and step.weight.kind == "int8"
    ]
    assert len(own) == 6 + 5
    for weight in own:
        lies = initializers[weight.name].const_value
        assert lies is not None and weight.values.offset % 64 == 0
        start = weight.values.offset
        assert whole[start : start + weight.values_bytes] == np.ascontiguousarray(lies.numpy().T).tobytes()
    monkeypatch.setattr(_program_weights, "PIECE_BYTES", 1000)
    assert (lowered(model, spec, tmp_path / "again").folder / OWN).read_bytes() == whole
    table = initializers["vpm.embeddings.position_embedding.weight"].const_value
    assert table is not None and set(made.program.files) == {OWN, f"{model.name}.data"}, "the table is most of it"


# --- small graphs ---------------------------------------------------------------------------------------------------


ROWS = ("slices", "patches")


def small(path: Path, nodes: list[Any], constants: dict[str, Array], bias: bool = False) -> GraphSpec:
    """A graph from x: [slices, patches, 8] and ids: [patches] to y."""
    inputs = (TensorSpec("x", "float32", (*ROWS, 8)), TensorSpec("ids", "int64", ROWS))
    spec = GraphSpec(
        "small", inputs, (TensorSpec("y", "float32", (*ROWS, 8)),), (), {d: DimRange(1, 2, 9) for d in ROWS}
    )
    kinds = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    infos = [
        [onnx.helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in tensors]
        for tensors in (spec.inputs, spec.outputs)
    ]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("lensc", 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "small", *infos, tensors), opset_imports=opsets, ir_version=10
    )
    onnx.save(model, str(path), save_as_external_data=True, location="small.data", size_threshold=0)
    return spec


def node(kind: str, *values: str, **attributes: Any) -> Any:
    """Inputs, then one output; `domain` among the attributes."""
    return onnx.helper.make_node(kind, values[:-1], values[-1:], **attributes)


def eye(*shape: int) -> Array:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("nodes", "constants", "message"),
    [
        ([node("Relu", "x", "y")], {}, r"node Relu of 'y' expected one of Add, .*lensc\.RMSNorm"),
        ([node("Gelu", "x", "y")], {}, r"node Gelu of 'y' expected approximate='tanh'"),
        (
            [node("Add", "x", "c", "y")],
            {"c": eye(3, 8)},
            r"node Add of 'y' adds the constant c FLOAT\[3, 8\] to a value",
        ),
        ([node("Add", "x", "ids", "y")], {}, r"reads the input ids int64\[slices, patches\], expected floats"),
        ([node("Mul", "x", "x", "y")], {}, r"node Mul of 'y' multiplies .* expected x \* Sigmoid\(x\) \* y"),
        ([node("Sigmoid", "x", "y")], {}, r"expected to make y: float32.*found half of a SiLU"),
        ([node("MatMul", "x", "x", "y")], {}, r"second input is the input x .*, expected a constant matrix"),
        ([node("MatMul", "x", "w", "y")], {"w": eye(9, 8)}, r"first input is the input x .*, expected rows of 9"),
        (
            [node("MatMul", "x", "w", "y")],
            {"w": eye(8, 9)},
            r"expected to make y: .*found a value \[slices, patches, 9\]",
        ),
        (
            [node("MatMul", "x", "w", "y")],
            {"w": eye(8, 8).astype(np.float64)},
            r"constant w: DOUBLE is not one of FLOAT",
        ),
        ([node("Transpose", "x", "y", perm=[0, 2, 1])], {}, r"node Transpose of 'y' turns the input x"),
        ([node("LayerNormalization", "x", "w", "y", axis=1)], {"w": eye(8)}, r"expected the last axis"),
        ([node("LayerNormalization", "x", "w", "y")], {"w": eye(7)}, r"w has 7 values, expected 8"),
        ([node("Gather", "x", "ids", "y", axis=2)], {}, r"takes from a value .* along axis 2"),
        ([node("Gather", "c", "x", "y")], {"c": eye(3, 8)}, r"its indices are the input x float32"),
        ([node("RMSNorm", "x", "w", "y", domain="lensc")], {"w": eye(2, 4)}, r"expected a vector of floats"),
        ([node("Unheard", "x", "y", domain="lensc")], {}, r"node lensc\.Unheard of 'y' expected one of"),
        ([node("Add", "x", "later", "y")], {}, r"input 'later' is not made by a node before it"),
        (
            [node("Attention", "x", "x", "x", "c", "y", domain="lensc", num_heads=2, scale=1.0)],
            {"c": eye(2, 2)},
            r"its bias is the constant c FLOAT\[2, 2\], expected an input float32\[slices\*patches\]",
        ),
        (
            [node("DequantizeLinear", "w", "s", "d", axis=0), node("MatMul", "x", "d", "y")],
            {"w": np.ones((8, 8), np.int8), "s": eye(8)},
            r"weight w: scales along axis 0, expected groups of inputs or one an output",
        ),
    ],
)
def test_what_has_no_step_is_refused_by_name(
    nodes: list[Any], constants: dict[str, Array], message: str, tmp_path: Path
) -> None:
    spec = small(tmp_path / "small.onnx", nodes, constants)
    with pytest.raises(GraphError, match=message):
        lower(ir.load(tmp_path / "small.onnx"), spec, tmp_path / OWN)
    assert not list(tmp_path.glob("native*")), "nothing is left behind"


def test_adds_go_into_the_linear_that_alone_makes_them(tmp_path: Path) -> None:
    """A product that is read twice stays; a bias of several rows is added by itself."""
    nodes = [
        node("MatMul", "x", "w", "first"),
        node("Add", "bias", "first", "second"),
        node("MatMul", "second", "w", "third"),
        node("Add", "third", "third", "fourth"),
        node("MatMul", "fourth", "w", "fifth"),
        node("Add", "fifth", "x", "sixth"),
        node("Add", "sixth", "x", "seventh"),
        node("Identity", "seventh", "y"),
    ]
    generator = np.random.default_rng(0)
    constants = {"w": generator.standard_normal((8, 8), np.float32), "bias": generator.standard_normal(8, np.float32)}
    spec = small(tmp_path / "small.onnx", nodes, constants)
    made = lowered(tmp_path / "small.onnx", spec, tmp_path / "out")
    assert [step.step for step in made.program.steps] == ["linear", "linear", "add", "linear", "add"]
    feeds = {"x": generator.standard_normal((2, 3, 8), np.float32), "ids": np.zeros((2, 3), np.int64)}
    np.testing.assert_allclose(made.session().run(feeds)["y"], engine(made.model)(feeds)["y"], rtol=1e-5, atol=1e-4)


def test_a_data_file_that_is_cut_is_an_error(tmp_path: Path) -> None:
    spec = small(tmp_path / "small.onnx", [node("MatMul", "x", "w", "y")], {"w": eye(8, 8)})
    (tmp_path / "small.data").write_bytes(b"\0" * 100)
    with pytest.raises(GraphError, match=r"constant w: expected 256 bytes at 0 of .*, which has 100; export it again"):
        lower(ir.load(tmp_path / "small.onnx"), spec, tmp_path / OWN)


def test_lowering_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight that lies turned, 32 MiB."""
    monkeypatch.setattr(_program_weights, "PIECE_BYTES", 1 << 20)
    weight = np.ones((8, 8), np.float32)
    nodes = [node("MatMul", "x", "w", "wide"), node("MatMul", "wide", "v", "y")]
    wide = (1 << 20) // 2
    spec = small(tmp_path / "small.onnx", nodes, {"w": np.broadcast_to(weight[:, :1], (8, wide)), "v": eye(wide, 8)})
    model = ir.load(tmp_path / "small.onnx")
    tracemalloc.start()
    lower(model, spec, tmp_path / OWN)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / OWN).stat().st_size == 2 * 8 * 4 * wide
    assert peak < 8 << 20
