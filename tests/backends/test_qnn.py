"""Qualcomm's NPUs by emulation: a small vision tower with everything the real one has, made with onnx alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime_qnn", reason="pip install 'lensc[qnn]'")
onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install 'lensc[export]'")

from onnx import TensorProto, helper, numpy_helper

from lensc.backends import _qnn_chip as chips
from lensc.backends import qnn as module
from lensc.backends._qnn_child import Child
from lensc.backends._qnn_form import HIDDEN, patches_of
from lensc.backends._qnn_quantize import grid
from lensc.backends._ranges import load_ranges, save_ranges
from lensc.backends.base import Array, Artifact, StaticBackend, Target
from lensc.backends.errors import (
    CompatibilityError,
    ExecutionError,
    UnavailableError,
    UnsupportedError,
    UsageError,
)
from lensc.backends.qnn import backend
from lensc.export.functions import functions
from lensc.export.graph import DimRange, Graph, GraphSpec, TensorSpec

WIDTH, HEADS, MLP, STRIP, OUT, QUERIES, ROWS = 64, 4, 96, 48, 32, 3, 50
TARGET = Target("qnn", "npu", "sm8650")


def tower() -> GraphSpec:
    per_patch = ("slices", "patches")
    return GraphSpec(
        name="vision",
        inputs=(
            TensorSpec("patches", "float32", (*per_patch, STRIP)),
            TensorSpec("position_ids", "int64", per_patch),
            TensorSpec("attention_bias", "float32", per_patch),
            TensorSpec("key_bias", "float32", per_patch),
            TensorSpec("key_pos_embed", "float32", (*per_patch, WIDTH)),
        ),
        outputs=(TensorSpec("image_embeds", "float32", ("slices", QUERIES, OUT)),),
        states=(),
        dims={"slices": DimRange(1, 1, 9), "patches": DimRange(1, 16, 64)},
    )


def write_tower(path: Path, bits: int = 32, extra: Callable[[list[Any]], None] | None = None) -> None:
    """One layer, and three learned queries that attend to its features; weights of 32, 8 or 4 `bits`."""
    generator = np.random.default_rng(0)
    nodes: list[Any] = []
    tensors: list[Any] = []

    def constant(name: str, array: Array) -> str:
        tensors.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def linear(x: str, name: str, inputs: int, outputs: int, result: str, bias: bool = True) -> str:
        weight = generator.standard_normal((inputs, outputs)).astype(np.float32) * inputs**-0.5
        source = f"{name}.t"
        if bits == 32:
            nodes.append(helper.make_node("Transpose", [constant(name, weight.T)], [source], perm=[1, 0]))
        elif bits == 8:
            scale = np.abs(weight).max(0) / 127
            tensors.append(numpy_helper.from_array(np.rint(weight / scale).astype(np.int8), name))
            nodes.append(helper.make_node("DequantizeLinear", [name, constant(f"{name}.s", scale)], [source], axis=1))
        else:
            groups = weight.T.reshape(outputs, -1, 16)
            scales = np.abs(groups).max(-1) / 7
            values = (np.rint(groups / scales[..., None]) + 8).astype(np.uint8).reshape(outputs, inputs)
            packed = (values[:, ::2] | values[:, 1::2] << 4).tobytes()
            tensors.append(helper.make_tensor(name, TensorProto.UINT4, [outputs, inputs], packed, raw=True))
            zeros = np.full(scales.size // 2, 0x88, np.uint8).tobytes()
            tensors.append(helper.make_tensor(f"{name}.z", TensorProto.UINT4, list(scales.shape), zeros, raw=True))
            reads = [name, constant(f"{name}.s", scales), f"{name}.z"]
            nodes.append(helper.make_node("DequantizeLinear", reads, [f"{name}.f"], axis=1, block_size=16))
            nodes.append(helper.make_node("Transpose", [f"{name}.f"], [source], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [x, source], [f"{name}.y" if bias else result]))
        if bias:
            shift = constant(f"{name}.b", 0.1 * generator.standard_normal(outputs))
            nodes.append(helper.make_node("Add", [f"{name}.y", shift], [result]))
        return result

    def norm(x: str, name: str, width: int) -> str:
        weight = constant(f"{name}.w", 1 + 0.1 * generator.standard_normal(width))
        bias = constant(f"{name}.b", 0.1 * generator.standard_normal(width))
        nodes.append(helper.make_node("LayerNormalization", [x, weight, bias], [f"{name}.y"], axis=-1, epsilon=1e-6))
        return f"{name}.y"

    def attention(name: str, reads: list[str], result: str) -> str:
        sizes = {"num_heads": HEADS, "scale": (WIDTH // HEADS) ** -0.5}
        nodes.append(helper.make_node("Attention", reads, [result], name=name, domain="lensc", **sizes))
        return result

    embedded = linear("patches", "embed", STRIP, WIDTH, "embed.out")
    table = constant("table", generator.standard_normal((ROWS, WIDTH)))
    nodes.append(helper.make_node("Gather", [table, "position_ids"], ["positions"], axis=0))
    nodes.append(helper.make_node("Add", [embedded, "positions"], ["x.0"]))
    normal = norm("x.0", "norm.0", WIDTH)
    qkv = [linear(normal, part, WIDTH, WIDTH, f"{part}.out") for part in ("q", "k", "v")]
    linear(attention("self", [*qkv, "attention_bias"], "mixed"), "o", WIDTH, WIDTH, "o.out")
    nodes.append(helper.make_node("Add", ["x.0", "o.out"], ["x.1"]))
    linear(norm("x.1", "norm.1", WIDTH), "fc1", WIDTH, MLP, "fc1.out")
    nodes.append(helper.make_node("Gelu", ["fc1.out"], ["gelu"], approximate="tanh"))
    linear("gelu", "fc2", MLP, WIDTH, "fc2.out")
    nodes.append(helper.make_node("Add", ["x.1", "fc2.out"], ["x.2"]))
    if extra is not None:
        extra(nodes)
    nodes.append(helper.make_node("Add", ["x.2", "key_pos_embed"], ["keys"]))
    query = constant("queries", generator.standard_normal((1, QUERIES, WIDTH)))
    seen = [linear(query, "rq", WIDTH, WIDTH, "rq.out"), linear("keys", "rk", WIDTH, WIDTH, "rk.out")]
    attention("resample", [*seen, linear("x.2", "rv", WIDTH, WIDTH, "rv.out"), "key_bias"], "picked")
    linear(norm("picked", "norm.2", WIDTH), "proj", WIDTH, OUT, "image_embeds", bias=False)

    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    infos = [
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in some]
        for some in (tower().inputs, tower().outputs)
    ]
    for i, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type}.{i}"
    graph = helper.make_graph(nodes, "vision", *infos, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("lensc", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    from onnx_ir import serde

    model.functions.extend(serde.serialize_function(function) for function in functions(["Attention"]))
    onnx.save(model, str(path))


def feeds(patches: int, slices: int = 1, hidden: int = 2, seed: int = 1) -> dict[str, Array]:
    """Slices whose last patches are padding, hidden as the host hides them."""
    generator = np.random.default_rng(seed)
    shape = (slices, patches)
    bias = np.where(np.arange(patches) < patches - hidden, 0, -1e4).astype(np.float32)
    return {
        "patches": np.clip(generator.standard_normal((*shape, STRIP)), -2, 2).astype(np.float32),
        "position_ids": generator.integers(0, ROWS, shape),
        "attention_bias": np.broadcast_to(bias, shape).copy(),
        "key_bias": np.broadcast_to(bias, shape).copy(),
        "key_pos_embed": np.sin(generator.standard_normal((*shape, WIDTH))).astype(np.float32),
    }


def expected(path: Path, given: dict[str, Array]) -> Array:
    """What the portable graph computes, in float32: optimized, the engine rounds inputs of quantized weights to 8 bits."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["image_embeds"], given)[0])


def sqnr_db(got: Array, reference: Array) -> float:
    error = got.astype(np.float64) - reference
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / (error**2).sum()))


@dataclasses.dataclass(frozen=True)
class Built:
    graph: Graph
    bundle: Path
    artifact: Artifact


SCHEMES = {"f32": 32, "w8a16": 8, "w8a8": 8, "w4a16-g16": 4}


def made(folder: Path, scheme: str, extra: Callable[[list[Any]], None] | None = None) -> Graph:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    write_tower(path, SCHEMES[scheme], extra)
    graph = Graph(tower(), path, scheme, "")
    if backend.needs_ranges(scheme):
        samples = [feeds(patches, seed=seed) for seed, patches in enumerate((16, 20, 12, 16, 18, 16, 9, 14))]
        backend.measure_ranges(graph, samples, folder / "ranges.json")
        graph = dataclasses.replace(graph, ranges=folder / "ranges.json")
    return graph


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """The tower in a scheme, compiled for the Snapdragon 8 Gen 3, each once."""
    kept: dict[str, Built] = {}

    def build(scheme: str) -> Built:
        if scheme not in kept:
            folder = tmp_path_factory.mktemp(scheme)
            graph = made(folder / "graphs", scheme)
            out = folder / "bundle" / "vision"
            out.mkdir(parents=True)
            kept[scheme] = Built(graph, folder / "bundle", backend.compile(graph, TARGET, out))
        return kept[scheme]

    return build


# --- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "least_db"), [("f32", 50), ("w8a16", 55), ("w8a8", 18), ("w4a16-g16", 55)])
def test_it_computes_what_the_portable_graph_does(built: Callable[[str], Built], scheme: str, least_db: float) -> None:
    one = built(scheme)
    session = backend.load(one.artifact, one.graph.spec, one.bundle)
    try:
        for patches, slices in ((16, 1), (11, 2), (patches_of(tower()), 1)):
            given = feeds(patches, slices, seed=7)
            got = session.run(given)["image_embeds"]
            assert sqnr_db(got, expected(one.graph.path, given)) >= least_db
    finally:
        session.close()


def test_every_node_is_on_the_npu_and_the_bundle_says_so(built: Callable[[str], Built]) -> None:
    one = built("w8a16")
    assert list(one.artifact.placement) == ["QNNExecutionProvider"]
    [placement] = [record.path for record in one.artifact.files if record.path.endswith(".placement.json")]
    where = json.loads((one.bundle / placement).read_text())
    assert {provider for _, provider in where.values()} == {"QNNExecutionProvider"}
    assert len(where) >= 0.9 * sum(one.artifact.placement.values())


def test_float_graphs_are_recorded_as_float16(built: Callable[[str], Built]) -> None:
    assert built("f32").artifact.scheme == "f16"
    assert built("w8a16").artifact.scheme == "w8a16"


def test_outputs_can_be_written_in_place(built: Callable[[str], Built]) -> None:
    one = built("f32")
    session = backend.load(one.artifact, one.graph.spec, one.bundle)
    try:
        out = np.zeros((1, QUERIES, OUT), np.float32)
        assert session.run(feeds(16), {"image_embeds": out})["image_embeds"] is out
        assert out.any()
    finally:
        session.close()
    with pytest.raises(ExecutionError, match="the session is closed"):
        session.run(feeds(16))


# --- traps --------------------------------------------------------------------------------------------------------


def test_a_mask_of_any_depth_is_cut_so_that_it_takes_no_resolution(built: Callable[[str], Built]) -> None:
    """float-min as a mask leaves 0.57 dB in 16 bits, silently: here it gives what -100 gives."""
    one = built("w8a16")
    session = backend.load(one.artifact, one.graph.spec, one.bundle)
    try:
        results = []
        for mask in (-100.0, -1e4, float(np.finfo(np.float32).min), -np.inf):
            given = feeds(16, seed=3)
            for name in ("attention_bias", "key_bias"):
                given[name] = np.where(given[name] < 0, np.float32(mask), given[name])
            results.append(session.run(given)["image_embeds"])
    finally:
        session.close()
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_the_range_of_a_mask_is_no_matter_of_pictures() -> None:
    scale, zero = grid(HIDDEN, 0.0, 16)
    assert (zero, round(scale * 65535)) == (65535, 100)


def test_padding_to_the_compiled_size_changes_nothing(built: Callable[[str], Built]) -> None:
    one = built("f32")
    session = backend.load(one.artifact, one.graph.spec, one.bundle)
    try:
        short = feeds(12, hidden=0, seed=5)
        grown = feeds(20, hidden=8, seed=6)
        for name in ("patches", "position_ids", "key_pos_embed"):
            grown[name][:, :12] = short[name]
        a, b = (session.run(given)["image_embeds"] for given in (short, grown))
    finally:
        session.close()
    np.testing.assert_allclose(b, a, atol=2e-3)


def shrink(nodes: list[Any]) -> None:
    """Put an operator into the tower that the HTP does not take."""
    nodes[-1].output[0] = "x.1b"
    nodes.append(helper.make_node("Shrink", ["x.1b"], ["x.2"], name="odd_one", lambd=0.0, bias=0.0))


def test_a_node_that_the_npu_refuses_is_named_with_what_it_is(tmp_path: Path) -> None:
    graph = made(tmp_path / "graphs", "f32", shrink)
    out = tmp_path / "bundle" / "vision"
    out.mkdir(parents=True)
    with pytest.raises(UnsupportedError, match=r"not for the NPU: odd_one \(Shrink \[1, 32, 64\]"):
        backend.compile(graph, TARGET, out)
    assert list(out.iterdir()) == []


def test_a_node_that_is_allowed_by_name_runs_on_the_cpu(tmp_path: Path) -> None:
    graph = dataclasses.replace(made(tmp_path / "graphs", "f32", shrink), cpu_nodes=("odd_one",))
    out = tmp_path / "bundle" / "vision"
    out.mkdir(parents=True)
    artifact = backend.compile(graph, TARGET, out)
    assert artifact.placement["CPUExecutionProvider"] >= 1
    session = backend.load(artifact, graph.spec, tmp_path / "bundle")
    try:
        given = feeds(16, seed=7)
        assert sqnr_db(session.run(given)["image_embeds"], expected(graph.path, given)) > 45
    finally:
        session.close()


def test_a_value_without_a_range_is_an_error(tmp_path: Path) -> None:
    graph = made(tmp_path / "graphs", "w8a16")
    assert graph.ranges is not None
    ranges = load_ranges(graph.ranges)
    del ranges["gelu"]
    save_ranges(ranges, graph.ranges)
    (tmp_path / "out").mkdir()
    with pytest.raises(Exception, match="no range was measured for gelu"):
        backend.compile(graph, TARGET, tmp_path / "out")


# --- chips --------------------------------------------------------------------------------------------------------

CHIPS = ("sm8650", "sm8750", "sc8380xp", "sm8550", "sm8850", "qcs6490", "sa8295")


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_compiles_and_refuses_the_others_binaries(
    built: Callable[[str], Built], tmp_path: Path, name: str
) -> None:
    graph = built("w8a16").graph
    out = tmp_path / "vision"
    out.mkdir()
    artifact = backend.compile(graph, Target("qnn", "npu", name), out)
    path = tmp_path / artifact.files[0].path
    chip, qairt = chips.chip(name), artifact.toolchain["qairt"]
    chips.check_context(path, chip, qairt)
    for other in CHIPS:
        if other != name:
            with pytest.raises(CompatibilityError, match=rf"chip: it was made for .*\({name}\), {other} has"):
                chips.check_context(path, chips.chip(other), qairt)
    with pytest.raises(CompatibilityError, match=r"qairt: it was made by .*, here is 2\.99\.0; rebuild: lensc compile"):
        chips.check_context(path, chip, "2.99.0")


def test_a_binary_under_another_chips_name_is_refused(built: Callable[[str], Built]) -> None:
    one = built("w8a16")
    other = dataclasses.replace(one.artifact, target=Target("qnn", "npu", "sm8750"))
    with pytest.raises(CompatibilityError, match="sm8750"):
        backend.load(other, one.graph.spec, one.bundle)
    lying = dataclasses.replace(
        other,
        compatibility=one.artifact.compatibility | {"chip": "sm8750", "soc_model": "69", "htp_arch": "79"},
    )
    with pytest.raises(CompatibilityError, match="it was made for soc_model 57"):
        backend.load(lying, one.graph.spec, one.bundle)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("qnn:npu", "a chip is missing; expected one of"),
        ("qnn:npu:sm8560", "chip 'sm8560' is not known; expected one of sm8550, sm8650"),
        ("qnn:cpu:sm8650", "is not one of backend qnn"),
    ],
)
def test_a_target_that_is_none_is_refused(target: str, reason: str) -> None:
    assert reason in str(backend.supports(tower(), "f32", Target.parse(target)))


def test_there_is_no_way_to_ask_for_a_wrong_architecture() -> None:
    with pytest.raises(UsageError, match="chip 'sm8650-v79' is not known"):
        chips.chip("sm8650-v79")


@pytest.mark.parametrize("scheme", ["w8a8-g128", "w4a8-g32", "w4a16-g32-s4", "w4a16-g128-asym", "w8a32"])
def test_a_scheme_without_a_form_names_the_nearest(scheme: str) -> None:
    assert "the nearest is w" in str(backend.supports(tower(), scheme, TARGET))


@pytest.mark.parametrize("scheme", ["f32", "w4a16-g32"])
def test_what_an_older_chip_has_no_arithmetic_for_is_refused(scheme: str) -> None:
    assert "no float16, no groups of 4 bits; expected w8a16" in str(
        backend.supports(tower(), scheme, Target("qnn", "npu", "qcs6490"))
    )
    assert backend.supports(tower(), "w8a16", Target("qnn", "npu", "qcs6490")) is None


def test_groups_that_do_not_divide_the_inputs_are_refused() -> None:
    """The tower's second projection has 4304 inputs: 134.5 groups of 32, 269 of 16."""
    reason = str(backend.supports(tower(), "w4a16-g32", TARGET, (1152, 4304)))
    assert "needs groups that divide the inputs, 4304; the nearest is w4a16-g16" in reason
    assert backend.supports(tower(), "w4a16-g16", TARGET, (1152, 4304)) is None


def test_a_graph_of_other_dimensions_is_refused() -> None:
    spec = dataclasses.replace(tower(), dims={**tower().dims, "past": DimRange(0, 1, 9)})
    assert "expected dimensions patches, slices and inputs attention_bias" in str(backend.supports(spec, "f32", TARGET))


# --- what breaks --------------------------------------------------------------------------------------------------


def test_a_larger_slice_than_was_compiled_for_is_refused(built: Callable[[str], Built]) -> None:
    one = built("f32")
    session = backend.load(one.artifact, one.graph.spec, one.bundle)
    try:
        with pytest.raises(ExecutionError, match="a slice of 40 patches, compiled for 32 at most"):
            session.run(feeds(40))
    finally:
        session.close()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_damaged_binary_is_one_error(built: Callable[[str], Built], tmp_path: Path, damage: str) -> None:
    one = built("f32")
    for record in one.artifact.files:
        target = tmp_path / record.path
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((one.bundle / record.path).read_bytes())
    [binary] = (tmp_path / "vision").glob("*.bin")
    data = binary.read_bytes()
    if damage == "missing":
        binary.unlink()
    else:
        binary.write_bytes(data[: len(data) // 3] if damage == "truncated" else b"\x07" * len(data))
    with pytest.raises(ExecutionError, match=r"qnn-npu-sm8650\.onnx"):
        backend.load(one.artifact, one.graph.spec, tmp_path)
    (tmp_path / one.artifact.files[0].path).write_bytes(b"no onnx")
    with pytest.raises(ExecutionError, match="not the wrapper of a QNN context binary"):
        backend.load(one.artifact, one.graph.spec, tmp_path)


def test_an_emulator_that_hangs_is_stopped(built: Callable[[str], Built]) -> None:
    one = built("f32")
    path = one.bundle / one.artifact.files[0].path
    provider = module.PROVIDER_OPTIONS | chips.chip("sm8650").provider_options
    with (
        Child("vision", "run", {"sources": [str(path)], "provider": provider, "cpu_nodes": []}, 0.01) as child,
        pytest.raises(ExecutionError, match=r"took longer than 0 s and was stopped"),
    ):
        child.ask({})


def test_an_emulator_that_crashes_is_reported(built: Callable[[str], Built]) -> None:
    one = built("f32")
    path = one.bundle / one.artifact.files[0].path
    provider = module.PROVIDER_OPTIONS | chips.chip("sm8650").provider_options
    with Child("vision", "run", {"sources": [str(path)], "provider": provider, "cpu_nodes": []}, 60) as child:
        child.ask({})
        child._process.kill()
        with pytest.raises(ExecutionError, match=r"ended the process it ran in \(signal 9\)"):
            child.ask({"patches": np.zeros(1)})


def test_a_slice_that_takes_too_long_to_emulate_is_not_begun(
    built: Callable[[str], Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = built("f32")
    monkeypatch.setenv(module.LIMIT_VARIABLE, "0.000001")
    with pytest.raises(UnavailableError, match=r"emulating a slice takes about .*LENSC_QNN_LIMIT_S=SECONDS"):
        backend.load(one.artifact, one.graph.spec, one.bundle)
    monkeypatch.setenv(module.LIMIT_VARIABLE, "soon")
    with pytest.raises(ExecutionError, match="expected a number of seconds"):
        backend.load(one.artifact, one.graph.spec, one.bundle)


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.util, "find_spec", lambda name: None)
    assert not backend.probe()[0].usable
    assert "pip install 'lensc[qnn]'" in backend.probe()[0].reason


def test_it_says_that_it_is_emulated_here() -> None:
    assert isinstance(backend, StaticBackend)
    assert [(p.processor, p.state) for p in backend.probe()] == [("npu", module._state())]
