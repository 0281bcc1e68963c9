"""What only OpenVINO's backend promises: the lowered file, which operators run, in what precision, what it refuses."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino", reason="pip install 'lensc[openvino]'")
onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install 'lensc[export]'")

from onnx import TensorProto, helper

from lensc.backends import openvino as module
from lensc.backends import registry
from lensc.backends._openvino_cache import OpenVINOCache, OpenVINODecoderSession
from lensc.backends.base import Array, Artifact, CachedSession, Target
from lensc.backends.errors import (
    CompatibilityError,
    ExecutionError,
    GraphError,
    StorageError,
    UnavailableError,
    UnsupportedError,
)
from lensc.backends.load_options import LoadOptions
from lensc.backends.openvino import backend
from lensc.export.graph import Graph, GraphSpec
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


VERSION = ov.__version__.split("-")[0]


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


def lowered(artifact: Artifact, bundle: Path) -> Any:
    return onnx.load(str(bundle / artifact.files[0].path), load_external_data=False)


# --- the artifact -------------------------------------------------------------------------------------------------


def test_functions_become_bare_calls_and_the_past_becomes_states(float_decoder: Decoder, bundle: Path) -> None:
    graph = lowered(compile_graph(float_decoder.graph, bundle), bundle)
    assert list(graph.functions) == []
    assert [i.name for i in graph.graph.input] == [
        "inputs_embeds",
        "position_ids",
        "logit_positions",
        "beam_idx",
        "past_length",
    ]
    assert [o.name for o in graph.graph.output] == ["logits"]
    calls = Counter(node.op_type for node in graph.graph.node if node.domain == "lensc")
    assert calls == {"RMSNorm": float_decoder.layers + 1, "CausalAttention": float_decoder.layers}


def test_weights_are_the_portable_graphs_file(float_decoder: Decoder, bundle: Path) -> None:
    artifact = compile_graph(float_decoder.graph, bundle)
    assert [f.path for f in artifact.files] == ["openvino-cpu/openvino-cpu.onnx", "openvino-cpu/decoder.onnx.data"]
    source = float_decoder.graph.path.with_name("decoder.onnx.data")
    assert (bundle / artifact.files[1].path).read_bytes() == source.read_bytes()
    assert source.stat().st_nlink == 1, "onnx refuses to read a file that has a second link"


def test_targets_share_one_copy_of_the_weights(int4_decoder: Decoder, tmp_path: Path) -> None:
    """Both engines take the portable graph's bytes, and both name its file, whichever comes first."""
    (tmp_path / "decoder").mkdir()
    targets = [TARGET, Target("onnxruntime", "cpu"), TARGET]
    made = [registry.get(t.backend).compile(int4_decoder.graph, t, tmp_path / "decoder") for t in targets]
    shared = made[0].files[1]
    assert shared.path == "decoder/decoder.onnx.data"
    assert [a.files[0].path for a in made[:2]] == ["decoder/openvino-cpu.onnx", "decoder/onnxruntime-cpu.onnx"]
    assert all(artifact.files[1:] == (shared,) for artifact in made)
    assert len(list((tmp_path / "decoder").iterdir())) == 3
    feeds = {
        "inputs_embeds": int4_decoder.embeddings(1, 5),
        "position_ids": np.arange(5),
        "logit_positions": np.arange(5),
    }
    for artifact in made:
        session = registry.get(artifact.target.backend).load(artifact, int4_decoder.spec, tmp_path)
        assert isinstance(session, CachedSession)
        logits = session.step(feeds, session.new_cache(5))["logits"]
        np.testing.assert_allclose(logits, int4_decoder.logits(feeds["inputs_embeds"]), rtol=1e-3, atol=1e-3)
        session.close()


def test_weights_are_copied_where_links_are_not_possible(
    float_decoder: Decoder, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    linked = compile_graph(float_decoder.graph, bundle)
    monkeypatch.setattr("os.link", refuse)
    assert compile_graph(float_decoder.graph, bundle) == linked


def test_same_graph_same_bytes_and_nothing_left_behind(float_decoder: Decoder, bundle: Path) -> None:
    leftover = bundle / TARGET.slug / f"{TARGET.slug}.partial"
    leftover.mkdir()
    (leftover / f"{TARGET.slug}.onnx").write_bytes(b"half a graph")
    first = compile_graph(float_decoder.graph, bundle)
    assert compile_graph(float_decoder.graph, bundle) == first
    assert sorted(p.name for p in (bundle / TARGET.slug).iterdir()) == ["decoder.onnx.data", "openvino-cpu.onnx"]
    content = (bundle / first.files[0].path).read_bytes()
    assert str(bundle).encode() not in content and str(float_decoder.graph.path.parent).encode() not in content


def test_float32_is_executed_in_float32(float_decoder: Decoder, bundle: Path) -> None:
    """Also where the processor has bfloat16, which OpenVINO prefers unless told otherwise."""
    artifact = compile_graph(float_decoder.graph, bundle)
    assert artifact.options["INFERENCE_PRECISION_HINT"] == "f32"
    assert artifact.options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"
    assert artifact.options["KV_CACHE_PRECISION"] == "f32"
    counts = {name: int(count) for count, name in (e.split(" in ") for e in artifact.options["executed"].split(", "))}
    assert counts.keys().isdisjoint({"bf16", "f16", "i8", "u4"}) and counts["f32"] > 20
    assert artifact.placement == {"CPU": sum(counts.values())}
    session = backend.load(artifact, float_decoder.spec, bundle, LoadOptions(threads=1))
    assert isinstance(session, OpenVINODecoderSession)
    embeds = float_decoder.embeddings(1, 40)
    got = step(session, session.new_cache(40), embeds)
    np.testing.assert_allclose(got, float_decoder.logits(embeds), atol=2e-5, rtol=1e-5)


def test_every_layer_is_one_attention_that_keeps_its_cache(float_decoder: Decoder, bundle: Path) -> None:
    session = open_graph(float_decoder.graph, bundle)
    kinds = Counter(
        str(op.get_rt_info()["layerType"].astype(str)) for op in session._compiled.get_runtime_model().get_ordered_ops()
    )
    assert kinds["ScaledDotProductAttention"] == float_decoder.layers
    assert kinds["MemoryInput"] == kinds["MemoryOutput"] == 2 * float_decoder.layers
    assert kinds["RoPE"] == 2 * float_decoder.layers
    assert kinds["RMS"] == float_decoder.layers + 1


def test_a_cache_that_is_not_fused_is_refused() -> None:
    with pytest.raises(ExecutionError, match=r"fused 0 attentions.*expected 2"):
        module._check_fused([], 2)


def test_int4_weights_stay_int4(int4_decoder: Decoder, bundle: Path) -> None:
    artifact = compile_graph(int4_decoder.graph, bundle)
    assert f"{4 * int4_decoder.layers + 1} in u4" in artifact.options["executed"]
    session = backend.load(artifact, int4_decoder.spec, bundle, LoadOptions(threads=1))
    assert isinstance(session, OpenVINODecoderSession)
    embeds = int4_decoder.embeddings(1, 20)
    got = step(session, session.new_cache(20), embeds)
    np.testing.assert_allclose(got, int4_decoder.logits(embeds), atol=2e-5, rtol=1e-5)


def test_activations_are_quantized_only_where_the_scheme_says_so(int4_decoder: Decoder, bundle: Path) -> None:
    graph = dataclasses.replace(int4_decoder.graph, scheme=f"w4a8-g{int4_decoder.group}")
    artifact = compile_graph(graph, bundle)
    assert artifact.options["attention"] == "bf16"
    session = backend.load(artifact, graph.spec, bundle, LoadOptions(threads=1))
    assert isinstance(session, OpenVINODecoderSession)
    embeds = int4_decoder.embeddings(1, 20)
    expected = int4_decoder.logits(embeds)
    error = step(session, session.new_cache(20), embeds) - expected
    relative = float(np.sqrt((error**2).mean() / (expected**2).mean()))
    # int8 of groups of 32 values: a few thousandths in each product; without VNNI it computes them in float
    assert (relative > 1e-3 or probe.machine().saturates_bytes) and relative < 3e-2


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("f32", ("f32", "0", "f32", "f32", "float")),
        ("w4a32-g128", ("f32", "0", "f32", "f32", "float")),
        ("w4a16-g128-kv8", ("f32", "0", "u8", "f32", "float")),
        ("w4a16-g128", ("f32", "0", "f16", "f32", "float")),
        ("w4a8-g128", ("f32", "64", "bf16", "bf16", "float")),
        ("w8a8", ("f32", "64", "bf16", "bf16", "float")),
    ],
)
def test_options(scheme: str, expected: tuple[str, ...], float_decoder: Decoder) -> None:
    options = module._options(TARGET, dataclasses.replace(float_decoder.graph, scheme=scheme), 64)
    names = (module.PRECISION, module.QUANTIZATION, module.KV_CACHE, module.ATTENTION, module.PRODUCTS)
    assert tuple(options[name] for name in names) == expected
    # OpenVINO knows all of them
    ov.Core().set_property("CPU", module._properties(options))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([(4096, 128)], 128),
        ([(4096, 128), (4096, 32)], 32),
        ([(4096, 0), (1152, 0)], 128),
        ([(4096, 0), (100, 0)], 64),
        ([(4096, 128), (100, 0)], 64),
        ([(768, 48)], 16),
        ([(768, 8)], 0),
        ([], 128),
    ],
    ids=str,
)
def test_inputs_are_quantized_in_groups_that_fit_all_weights(weights: list[tuple[int, int]], expected: int) -> None:
    """OpenVINO computes all others in float, without a word."""
    nodes, tensors = [], []
    for i, (inputs, group) in enumerate(weights):
        shape = [2, inputs] if group else [inputs, 2]
        tensors.append(helper.make_tensor(f"w{i}", TensorProto.INT8, shape, bytes(2 * inputs), raw=True))
        options = {"axis": 1} | ({"block_size": group} if group else {})
        nodes.append(helper.make_node("DequantizeLinear", [f"w{i}", f"s{i}"], [f"y{i}"], **options))
    # activations have no groups
    nodes.append(helper.make_node("DequantizeLinear", ["x", "scale"], ["y"]))
    model = helper.make_model(helper.make_graph(nodes, "graph", [], [], tensors))
    assert module._quantization_group(model, GraphSpec("graph", (), (), (), {})) == expected


def test_threads(float_decoder: Decoder, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    artifact = compile_graph(float_decoder.graph, bundle)
    found = dataclasses.replace(probe.machine(), cores=1)
    monkeypatch.setattr(probe, "machine", lambda: found)
    for given in (None, 1):
        session = backend.load(artifact, float_decoder.spec, bundle, LoadOptions(given))
        assert isinstance(session, OpenVINODecoderSession)
        assert session._compiled.get_property("INFERENCE_NUM_THREADS") == 1


# --- what is refused ----------------------------------------------------------------------------------------------


def test_older_engine_is_refused(float_decoder: Decoder, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = compile_graph(float_decoder.graph, bundle)
    assert artifact.compatibility == {"openvino": f">={VERSION}"}
    monkeypatch.setattr(ov, "__version__", "2023.0.1-11005")
    with pytest.raises(CompatibilityError, match=r"needs openvino >=.*found 2023\.0\.1.*lensc compile"):
        backend.load(artifact, float_decoder.spec, bundle)


def test_missing_engine_says_how_to_install_it(
    float_decoder: Decoder, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = compile_graph(float_decoder.graph, bundle)
    monkeypatch.setitem(sys.modules, "openvino", None)
    probes = backend.probe()
    assert [p.processor for p in probes] == ["cpu", "gpu", "npu"]
    assert not any(p.usable for p in probes)
    assert all("pip install 'lensc[openvino]'" in p.reason for p in probes)
    with pytest.raises(UnavailableError, match=r"lensc\[openvino\]"):
        backend.load(artifact, float_decoder.spec, bundle)
    with pytest.raises(UnavailableError, match=r"lensc\[openvino\]"):
        compile_graph(float_decoder.graph, bundle)


def test_probe_asks_openvino_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen:
        available_devices = ("CPU", "GPU.0", "GPU.1")

        def get_property(self, device: str, name: str) -> str:
            assert name == "FULL_DEVICE_NAME"
            return f"some {device}"

    cpu = backend.probe()[0]
    assert (cpu.usable, cpu.state, cpu.reason) == (True, "runs here", f"openvino {VERSION}{module._exactly()}")
    monkeypatch.setattr(module, "_core", lambda _: Seen())
    cpu, gpu, npu = backend.probe()
    assert (gpu.usable, gpu.state, gpu.reason) == (True, "untested", f"openvino {VERSION}, some GPU")
    assert (npu.usable, npu.state) == (False, "untested")
    assert "compiler" in npu.reason and "wheel" in npu.reason


def test_supports(float_decoder: Decoder) -> None:
    assert backend.supports(float_decoder.spec, "w4a8-g128", TARGET) is None
    assert backend.supports(float_decoder.spec, "w4a8-g128-s4-mixed", TARGET) is None
    assert backend.supports(float_decoder.spec, "w4a16-g128-kv8", Target("openvino", "gpu")) is None
    for scheme, target, reason in (
        ("f16", Target("openvino", "npu"), "decoder is none: its cache grows"),
        ("f32", Target("openvino", "cpu", "avx2"), "no architecture; expected openvino:cpu"),
        ("f32", Target("onnxruntime", "cpu"), "not one of backend openvino"),
        ("w4a16-g128-kv4", TARGET, "8 or 16 bits"),
        ("w2a8-g64", TARGET, "reads no weights of 2 bits; the nearest is w4a8-g64"),
        ("w2a8-g64-s4", TARGET, "reads no weights of 2 bits; the nearest is w4a8-g64-s4"),
    ):
        assert reason in str(backend.supports(float_decoder.spec, scheme, target))
        with pytest.raises(UnsupportedError, match=reason):
            backend.compile(Graph(float_decoder.spec, Path("none.onnx"), scheme, ""), target, Path("none"))


def test_groups_that_do_not_divide_the_inputs_are_refused_before_the_work(float_decoder: Decoder) -> None:
    """4304 is the width of the vision tower's MLP: 16 * 269."""
    spec = float_decoder.spec
    assert backend.supports(spec, "w4a8-g128", TARGET, (1152, 4096, 100)) is None
    assert backend.supports(spec, "w8a8", TARGET, (4304,)) is None
    reason = "32 does not divide 4304; the nearest is w4a8-g16"
    assert reason in str(backend.supports(spec, "w4a8-g32", TARGET, (1152, 4304)))
    assert "48 does not divide 100; the nearest is w8a8" in str(backend.supports(spec, "w4a8-g48", TARGET, (96, 100)))


def test_an_artifact_can_be_made_for_a_device_that_is_not_here(float_decoder: Decoder, bundle: Path) -> None:
    target = Target("openvino", "gpu")
    if backend.probe()[1].usable:
        pytest.skip("there is a GPU here")
    artifact = compile_graph(float_decoder.graph, bundle, target)
    assert artifact.placement == {} and "not compiled here" in artifact.options["executed"]
    with pytest.raises(UnavailableError, match="openvino:gpu: openvino sees no GPU"):
        backend.load(artifact, float_decoder.spec, bundle)


@pytest.mark.parametrize("damage", ("unknown call", "another scale", "another past", "weights gone", "weights outside"))
def test_graphs_that_cannot_be_lowered(float_decoder: Decoder, bundle: Path, tmp_path: Path, damage: str) -> None:
    model = onnx.load(str(float_decoder.graph.path), load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "CausalAttention")
    expected: type[Exception] = GraphError
    if damage == "unknown call":
        attention.op_type, match = "TreeAttention", "no lowering of lensc.TreeAttention"
    elif damage == "another scale":
        next(a for a in attention.attribute if a.name == "scale").f = 0.5
        match = "scale 0.5, expected 0.25"
    elif damage == "another past":
        attention.input[5], match = "past_key.7", "past_key.7.*not the states"
    elif damage == "weights gone":
        expected, match = ExecutionError, "decoder.onnx.data' is missing"
    else:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "../data" if entry.key == "location" else entry.value
        expected, match = ExecutionError, "'../data' does not lie beside"
    path = tmp_path / "elsewhere" / "decoder.onnx"
    path.parent.mkdir()
    path.write_bytes(model.SerializeToString())
    with pytest.raises(expected, match=match) as caught:
        compile_graph(dataclasses.replace(float_decoder.graph, path=path), bundle)
    assert "\n" not in str(caught.value)
    assert list((bundle / TARGET.slug).iterdir()) == []


def test_groups_must_divide_the_inputs(int4_decoder: Decoder, bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(str(int4_decoder.graph.path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "block_size":
                attribute.i = 48
    path = tmp_path / "decoder.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(
        UnsupportedError, match=r"q\.0 has 64 inputs in groups of 48; openvino needs groups that divide"
    ):
        compile_graph(dataclasses.replace(int4_decoder.graph, path=path), bundle)


def test_a_full_disk_is_a_storage_error(float_decoder: Decoder, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(StorageError, match="No space left on device"):
        compile_graph(float_decoder.graph, bundle)
    assert list((bundle / TARGET.slug).iterdir()) == []
