"""What only OpenVINO's backend promises: the lowered file, which operators run and in what precision, its cache."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino", reason="pip install 'lensc[openvino]'")
onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install 'lensc[export]'")

from onnx import TensorProto, helper, numpy_helper

from lensc.backends import openvino as module
from lensc.backends._openvino_cache import OpenVINOCache, OpenVINODecoderSession
from lensc.backends.base import Array, Artifact, Target
from lensc.backends.errors import (
    CompatibilityError,
    ExecutionError,
    GraphError,
    PromptError,
    StorageError,
    UnavailableError,
    UnsupportedError,
    UsageError,
)
from lensc.backends.openvino import backend
from lensc.export.graph import DimRange, Graph, GraphSpec, StatePair, TensorSpec

TARGET = Target("openvino", "cpu")
VERSION = ov.__version__.split("-")[0]
LAYERS, WIDTH, HEADS, KV_HEADS, DIM, VOCAB = 2, 64, 4, 2, 16, 50
LIMIT = 64
EPSILON = 1e-5
GROUP = 32

Weights = dict[str, Array]


def spec() -> GraphSpec:
    names = [f"{kind}.{i}" for i in range(LAYERS) for kind in ("key", "value")]
    rows = (KV_HEADS, DIM)
    return GraphSpec(
        name="decoder",
        inputs=(
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", WIDTH)),
            TensorSpec("position_ids", "int64", ("tokens",)),
            TensorSpec("logit_positions", "int64", ("rows",)),
            *(TensorSpec(f"past_{name}", "float32", ("past", "batch", *rows)) for name in names),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "rows", VOCAB)),
            *(TensorSpec(name, "float32", ("tokens", "batch", *rows)) for name in names),
        ),
        states=tuple(StatePair(f"past_{name}", name) for name in names),
        dims={
            "batch": DimRange(1, 1, 4),
            "tokens": DimRange(1, 1, LIMIT),
            "rows": DimRange(1, 1, LIMIT),
            "past": DimRange(0, 16, LIMIT),
        },
    )


def frequencies() -> Array:
    return (1.0 / 500000.0 ** (np.arange(0, DIM, 2) / DIM)).astype(np.float32)


def write_decoder(path: Path, bits: int = 32) -> Weights:
    """A decoder without MLPs as the exporter writes it, its weights in `bits` bits with a scale per 32 inputs.

    Returns the weights it stands for.
    """
    generator = np.random.default_rng(0)
    nodes: list[Any] = []
    tensors: list[Any] = [numpy_helper.from_array(frequencies(), "frequencies")]
    weights: Weights = {}

    def linear(x: str, name: str, outputs: int, result: str) -> None:
        weight = generator.standard_normal((outputs, WIDTH)).astype(np.float32) * WIDTH**-0.5
        source = name
        if bits == 32:
            tensors.append(numpy_helper.from_array(weight, name))
        else:
            groups = weight.reshape(outputs, WIDTH // GROUP, GROUP)
            scales = np.abs(groups).max(-1, keepdims=True) / 7
            values = np.clip(np.rint(groups / scales), -7, 7)
            weight = (values * scales).astype(np.float32).reshape(outputs, WIDTH)
            unsigned = (values + 8).astype(np.uint8).reshape(outputs, WIDTH)
            packed = unsigned[:, ::2] | unsigned[:, 1::2] << 4
            zeros = np.full(outputs * WIDTH // GROUP // 2, 0x88, np.uint8)
            sizes = [outputs, WIDTH // GROUP]
            tensors.extend(
                [
                    helper.make_tensor(name, TensorProto.UINT4, [outputs, WIDTH], packed.tobytes(), raw=True),
                    numpy_helper.from_array(scales[..., 0].astype(np.float32), f"{name}.scale"),
                    helper.make_tensor(f"{name}.zero", TensorProto.UINT4, sizes, zeros.tobytes(), raw=True),
                ]
            )
            inputs = [name, f"{name}.scale", f"{name}.zero"]
            source = f"{name}.float"
            nodes.append(helper.make_node("DequantizeLinear", inputs, [source], axis=1, block_size=GROUP))
        weights[name] = weight
        nodes.append(helper.make_node("Transpose", [source], [f"{name}.t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [x, f"{name}.t"], [result]))

    def norm(x: str, name: str) -> str:
        weights[name] = (1 + 0.1 * generator.standard_normal(WIDTH)).astype(np.float32)
        tensors.append(numpy_helper.from_array(weights[name], name))
        nodes.append(helper.make_node("RMSNorm", [x, name], [f"{name}.y"], domain="lensc", epsilon=EPSILON))
        return f"{name}.y"

    x = "inputs_embeds"
    for i in range(LAYERS):
        normal = norm(x, f"norm.{i}")
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            linear(normal, f"{name}.{i}", heads * DIM, f"{name}.{i}.y")
        reads = [f"q.{i}.y", f"k.{i}.y", f"v.{i}.y", "position_ids", "frequencies", f"past_key.{i}", f"past_value.{i}"]
        sizes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "head_dim": DIM, "groups": HEADS // KV_HEADS}
        makes = [f"mixed.{i}", f"key.{i}", f"value.{i}"]
        nodes.append(helper.make_node("CausalAttention", reads, makes, domain="lensc", scale=DIM**-0.5, **sizes))
        linear(f"mixed.{i}", f"o.{i}", WIDTH, f"o.{i}.y")
        nodes.append(helper.make_node("Add", [x, f"o.{i}.y"], [f"x.{i}"]))
        x = f"x.{i}"
    nodes.append(helper.make_node("Gather", [x, "logit_positions"], ["picked"], axis=1))
    linear(norm("picked", "norm"), "head", VOCAB, "logits")

    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    infos = [
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in tensors]
        for tensors in (spec().inputs, spec().outputs)
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("lensc", 1)]
    # OpenVINO must never look at the definition: this one is wrong
    identity = [helper.make_node("Identity", ["x"], ["y"])]
    functions = [helper.make_function("lensc", "RMSNorm", ["x", "w"], ["y"], identity, opsets[:1], ["epsilon"])]
    graph = helper.make_graph(nodes, "decoder", *infos, tensors)
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=256)
    return weights


def reference(weights: Weights, embeds: Array) -> Array:
    """Logits of every position, in float64, from the definition; no cache."""

    def norm(x: Array, weight: Array) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight

    def rotate(x: Array) -> Array:
        angles = np.arange(x.shape[1])[:, None, None] * np.tile(frequencies().astype(np.float64), 2)
        turned = np.concatenate([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1)
        return x * np.cos(angles) + turned * np.sin(angles)

    x = embeds.astype(np.float64)
    batch, tokens = x.shape[:2]
    for i in range(LAYERS):
        normal = norm(x, weights[f"norm.{i}"])
        q, k, v = (
            (normal @ weights[f"{n}.{i}"].T).reshape(batch, tokens, heads, DIM)
            for n, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(t, HEADS // KV_HEADS, axis=2) for t in (k, v))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("bhqk,bkhd->bqhd", shares, v).reshape(batch, tokens, HEADS * DIM)
        x = x + mixed @ weights[f"o.{i}"].T
    return norm(x, weights["norm"]) @ weights["head"].T


@dataclasses.dataclass(frozen=True)
class Made:
    graph: Graph
    weights: Weights


@pytest.fixture(scope="module")
def float_graph(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("float") / "decoder.onnx"
    return Made(Graph(spec(), path, "f32", "0" * 64), write_decoder(path))


@pytest.fixture(scope="module")
def int4_graph(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("int4") / "decoder.onnx"
    weights = write_decoder(path, bits=4)
    return Made(Graph(spec(), path, f"w4a32-g{GROUP}", "0" * 64), weights)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / TARGET.slug).mkdir()
    return tmp_path


def compile_graph(graph: Graph, bundle: Path, target: Target = TARGET) -> Artifact:
    (bundle / target.slug).mkdir(exist_ok=True)
    return backend.compile(graph, target, bundle / target.slug)


def open_graph(graph: Graph, bundle: Path) -> OpenVINODecoderSession:
    session = backend.load(compile_graph(graph, bundle), graph.spec, bundle, threads=1)
    assert isinstance(session, OpenVINODecoderSession)
    return session


def step(session: OpenVINODecoderSession, cache: OpenVINOCache, embeds: Array) -> Array:
    """Feed `embeds: float32[batch, tokens, WIDTH]`; return the logits of all its positions."""
    tokens = embeds.shape[1]
    feeds = {
        "inputs_embeds": embeds,
        "position_ids": np.arange(cache.length, cache.length + tokens),
        "logit_positions": np.arange(tokens),
    }
    return session.step(feeds, cache)["logits"]


def embeddings(batch: int, tokens: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((batch, tokens, WIDTH), np.float32)


def lowered(artifact: Artifact, bundle: Path) -> Any:
    return onnx.load(str(bundle / artifact.files[0].path), load_external_data=False)


# --- the artifact -------------------------------------------------------------------------------------------------


def test_functions_become_bare_calls_and_the_past_becomes_states(float_graph: Made, bundle: Path) -> None:
    graph = lowered(compile_graph(float_graph.graph, bundle), bundle)
    assert list(graph.functions) == []
    assert [i.name for i in graph.graph.input] == ["inputs_embeds", "position_ids", "logit_positions", "beam_idx"]
    assert [o.name for o in graph.graph.output] == ["logits"]
    calls = Counter(node.op_type for node in graph.graph.node if node.domain == "lensc")
    assert calls == {"RMSNorm": LAYERS + 1, "CausalAttention": LAYERS}


def test_weights_are_the_portable_graphs_file(float_graph: Made, bundle: Path) -> None:
    artifact = compile_graph(float_graph.graph, bundle)
    assert [f.path for f in artifact.files] == ["openvino-cpu/decoder.onnx", "openvino-cpu/decoder.onnx.data"]
    source = float_graph.graph.path.with_name("decoder.onnx.data")
    assert (bundle / artifact.files[1].path).read_bytes() == source.read_bytes()
    assert (bundle / artifact.files[1].path).samefile(source)


def test_weights_are_copied_where_links_are_not_possible(
    float_graph: Made, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    linked = compile_graph(float_graph.graph, bundle)
    monkeypatch.setattr("os.link", refuse)
    assert compile_graph(float_graph.graph, bundle) == linked


def test_same_graph_same_bytes_and_nothing_left_behind(float_graph: Made, bundle: Path) -> None:
    leftover = bundle / TARGET.slug / "decoder.partial"
    leftover.mkdir()
    (leftover / "decoder.onnx").write_bytes(b"half a graph")
    first = compile_graph(float_graph.graph, bundle)
    assert compile_graph(float_graph.graph, bundle) == first
    assert sorted(p.name for p in (bundle / TARGET.slug).iterdir()) == ["decoder.onnx", "decoder.onnx.data"]
    content = (bundle / first.files[0].path).read_bytes()
    assert str(bundle).encode() not in content and str(float_graph.graph.path.parent).encode() not in content


def test_float32_is_executed_in_float32(float_graph: Made, bundle: Path) -> None:
    """Also where the processor has bfloat16, which OpenVINO prefers unless told otherwise."""
    artifact = compile_graph(float_graph.graph, bundle)
    assert artifact.options["INFERENCE_PRECISION_HINT"] == "f32"
    assert artifact.options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"
    assert artifact.options["KV_CACHE_PRECISION"] == "f32"
    counts = {name: int(count) for count, name in (e.split(" in ") for e in artifact.options["executed"].split(", "))}
    assert counts.keys().isdisjoint({"bf16", "f16", "i8", "u4"}) and counts["f32"] > 20
    assert artifact.placement == {"CPU": sum(counts.values())}
    session = backend.load(artifact, spec(), bundle, threads=1)
    assert isinstance(session, OpenVINODecoderSession)
    embeds = embeddings(1, 40)
    got = step(session, session.new_cache(40), embeds)
    np.testing.assert_allclose(got, reference(float_graph.weights, embeds), atol=2e-5, rtol=1e-5)


def test_every_layer_is_one_attention_that_keeps_its_cache(float_graph: Made, bundle: Path) -> None:
    session = open_graph(float_graph.graph, bundle)
    kinds = Counter(
        str(op.get_rt_info()["layerType"].astype(str)) for op in session._compiled.get_runtime_model().get_ordered_ops()
    )
    assert kinds["ScaledDotProductAttention"] == LAYERS
    assert kinds["MemoryInput"] == kinds["MemoryOutput"] == 2 * LAYERS
    assert kinds["RoPE"] == 2 * LAYERS
    assert kinds["RMS"] == LAYERS + 1


def test_a_cache_that_is_not_fused_is_refused() -> None:
    with pytest.raises(ExecutionError, match=r"fused 0 attentions.*expected 2"):
        module._check_fused([], 2)


def test_int4_weights_stay_int4(int4_graph: Made, bundle: Path) -> None:
    artifact = compile_graph(int4_graph.graph, bundle)
    assert f"{4 * LAYERS + 1} in u4" in artifact.options["executed"]
    session = backend.load(artifact, spec(), bundle, threads=1)
    assert isinstance(session, OpenVINODecoderSession)
    embeds = embeddings(1, 20)
    got = step(session, session.new_cache(20), embeds)
    np.testing.assert_allclose(got, reference(int4_graph.weights, embeds), atol=2e-5, rtol=1e-5)


def test_activations_are_quantized_only_where_the_scheme_says_so(int4_graph: Made, bundle: Path) -> None:
    graph = dataclasses.replace(int4_graph.graph, scheme=f"w4a8-g{GROUP}")
    session = open_graph(graph, bundle)
    embeds = embeddings(1, 20)
    expected = reference(int4_graph.weights, embeds)
    error = step(session, session.new_cache(20), embeds) - expected
    relative = float(np.sqrt((error**2).mean() / (expected**2).mean()))
    assert 1e-3 < relative < 3e-2  # int8 of groups of 32 values: a few thousandths in each product


@pytest.mark.parametrize(
    ("scheme", "smallest", "expected"),
    [
        ("f32", None, ("f32", "0", "f32")),
        ("w4a32-g128", 128, ("f32", "0", "f32")),
        ("w4a16-g128-kv8", 128, ("f32", "0", "u8")),
        ("w4a16-g128", 128, ("f32", "0", "f16")),
        ("w4a8-g128", 128, ("f32", "128", "f32")),
        ("w8a8", None, ("f32", "128", "f32")),
        ("w4a8-g32", 32, ("f32", "32", "f32")),
        ("w4a8-g48", 48, ("f32", "16", "f32")),
        ("w4a8-g8", 8, ("f32", "0", "f32")),
    ],
)
def test_options(scheme: str, smallest: int | None, expected: tuple[str, str, str]) -> None:
    options = module._options(TARGET, scheme, smallest)
    assert (options[module.PRECISION], options[module.QUANTIZATION], options[module.KV_CACHE]) == expected
    # OpenVINO knows all of them
    core = ov.Core()
    core.set_property("CPU", options)


def test_threads(float_graph: Made, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lensc.profiles import probe

    artifact = compile_graph(float_graph.graph, bundle)
    found = dataclasses.replace(probe.machine(), cores=1)
    monkeypatch.setattr(probe, "machine", lambda: found)
    for given in (None, 1):
        session = backend.load(artifact, spec(), bundle, given)
        assert isinstance(session, OpenVINODecoderSession)
        assert session._compiled.get_property("INFERENCE_NUM_THREADS") == 1


# --- the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(float_graph: Made, tmp_path_factory: pytest.TempPathFactory) -> OpenVINODecoderSession:
    return open_graph(float_graph.graph, tmp_path_factory.mktemp("bundle"))


@pytest.mark.parametrize("batch", (1, 3), ids=lambda b: f"B{b}")
def test_steps(session: OpenVINODecoderSession, float_graph: Made, batch: int) -> None:
    embeds = embeddings(batch, 30)
    cache = session.new_cache(1, batch)
    pieces = [step(session, cache, embeds[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 9), (9, 29), (29, 30))]
    expected = reference(float_graph.weights, embeds)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=2e-5, rtol=1e-5)
    assert (cache.length, cache.batch) == (30, batch)


def test_beams(session: OpenVINODecoderSession, float_graph: Made) -> None:
    """Fork, reorder twice without a step between, trim below and above the fork."""
    prompt, steps = embeddings(1, 9), embeddings(3, 4, seed=2)
    root = session.new_cache(16)
    step(session, root, prompt)
    cache = root.fork(3)
    history = np.repeat(prompt, 3, axis=0)

    def feed(i: int) -> None:
        nonlocal history
        history = np.concatenate([history, steps[:, i : i + 1]], axis=1)
        got = step(session, cache, steps[:, i : i + 1])
        np.testing.assert_allclose(got, reference(float_graph.weights, history)[:, -1:], atol=2e-5, rtol=1e-5)

    feed(0)
    for beams in (np.array([2, 0, 1]), np.array([1, 1, 0])):
        cache.reorder(beams, 9)
        history = history[beams]
    feed(1)
    cache.reorder(np.array([2, 2, 0]), 9)
    cache.trim(10)
    history = history[[2, 2, 0], :10]
    feed(2)
    # the sequence they come from is still there
    more = np.concatenate([prompt, steps[:1, 3:]], axis=1)
    got = step(session, root, steps[:1, 3:])
    np.testing.assert_allclose(got, reference(float_graph.weights, more)[:, -1:], atol=2e-5, rtol=1e-5)


def test_trim_to_nothing_begins_anew(session: OpenVINODecoderSession, float_graph: Made) -> None:
    cache = session.new_cache(8, 2)
    step(session, cache, embeddings(2, 8, seed=5))
    cache.reorder(np.array([1, 1]), 0)
    cache.trim(0)
    embeds = embeddings(2, 6)
    got = step(session, cache, embeds)
    np.testing.assert_allclose(got, reference(float_graph.weights, embeds), atol=2e-5, rtol=1e-5)


def test_caches_of_one_session_do_not_mix(session: OpenVINODecoderSession, float_graph: Made) -> None:
    both = [embeddings(1, 10, seed) for seed in (3, 4)]
    caches = [session.new_cache(10) for _ in both]
    got: list[list[Array]] = [[], []]
    for i in range(10):
        for j, cache in enumerate(caches):
            got[j].append(step(session, cache, both[j][:, i : i + 1]))
    for j in range(2):
        expected = reference(float_graph.weights, both[j])
        np.testing.assert_allclose(np.concatenate(got[j], axis=1), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "row_bytes", "atol"), [("w4a16-g32", 2 * DIM, 3e-3), ("w4a16-g32-kv8", DIM + 8, 3e-2)], ids=str
)
def test_cache_in_fewer_bits(int4_graph: Made, bundle: Path, scheme: str, row_bytes: int, atol: float) -> None:
    session = open_graph(dataclasses.replace(int4_graph.graph, scheme=scheme), bundle)
    embeds = embeddings(1, 30)
    expected = reference(int4_graph.weights, embeds)
    cache = session.new_cache(30)
    step(session, cache, embeds[:, :20])
    got = np.concatenate([step(session, cache, embeds[:, i : i + 1]) for i in range(20, 30)], axis=1)
    np.testing.assert_allclose(got, expected[:, 20:], atol=atol)
    assert np.abs(got - expected[:, 20:]).max() > 1e-5, "nothing was rounded"
    assert cache.used_bytes == 30 * 2 * LAYERS * KV_HEADS * row_bytes
    assert cache.used_bytes <= cache.nbytes <= 4 * cache.used_bytes


def test_what_is_put_into_a_state_is_the_engines_own(session: OpenVINODecoderSession, float_graph: Made) -> None:
    """The past of `run` may be freed or written again as soon as it is in."""
    embeds = embeddings(1, 8)
    cache = session.new_cache(8)
    step(session, cache, embeds[:, :5])
    arrays = {name: array.copy() for name, array in cache.take().items()}
    cache.put(arrays)
    for array in arrays.values():
        array[:] = np.nan
    got = step(session, cache, embeds[:, 5:])
    np.testing.assert_allclose(got, reference(float_graph.weights, embeds)[:, 5:], atol=2e-5, rtol=1e-5)


def test_full_context_is_a_prompt_error(session: OpenVINODecoderSession) -> None:
    cache = session.new_cache(LIMIT)
    step(session, cache, embeddings(1, LIMIT))
    with pytest.raises(PromptError, match=f"{LIMIT + 1} tokens do not fit: context_length is {LIMIT}"):
        step(session, cache, embeddings(1, 1))
    assert cache.length == LIMIT
    with pytest.raises(UsageError, match=f"capacity {LIMIT + 1}"):
        session.new_cache(LIMIT + 1)
    with pytest.raises(UsageError, match="batch 5"):
        session.new_cache(1, 5)


def test_a_cache_of_another_engine_or_batch_is_refused(session: OpenVINODecoderSession) -> None:
    with pytest.raises(UsageError, match="object is not a cache of this session"):
        step(session, type("object", (), {"length": 0})(), embeddings(1, 1))
    with pytest.raises(UsageError, match="2 sequences fed, the cache has 1"):
        step(session, session.new_cache(1), embeddings(2, 1))


def test_a_run_that_failed_half_way_spoils_the_cache(session: OpenVINODecoderSession) -> None:
    class Failing:
        def set_tensor(self, *_: object) -> None:
            pass

        def infer(self) -> None:
            raise RuntimeError(
                "Exception from src/inference/src/cpp/infer_request.cpp:225:\nout of\nmemory" + "!" * 999
            )

    cache = session.new_cache(4)
    step(session, cache, embeddings(1, 2))
    good, cache.request = cache.request, Failing()
    with pytest.raises(ExecutionError, match="graph decoder: openvino failed: out of memory!!") as caught:
        step(session, cache, embeddings(1, 1))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    cache.request = good
    with pytest.raises(ExecutionError, match="incomplete"):
        step(session, cache, embeddings(1, 1))


# --- what is refused ----------------------------------------------------------------------------------------------


def test_older_engine_is_refused(float_graph: Made, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = compile_graph(float_graph.graph, bundle)
    assert artifact.compatibility == {"openvino": f">={VERSION}"}
    monkeypatch.setattr(ov, "__version__", "2023.0.1-11005")
    with pytest.raises(CompatibilityError, match=r"needs openvino >=.*found 2023\.0\.1.*lensc compile"):
        backend.load(artifact, spec(), bundle)


def test_missing_engine_says_how_to_install_it(
    float_graph: Made, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = compile_graph(float_graph.graph, bundle)
    monkeypatch.setitem(sys.modules, "openvino", None)
    probes = backend.probe()
    assert [p.processor for p in probes] == ["cpu", "gpu", "npu"]
    assert not any(p.usable for p in probes)
    assert all("pip install 'lensc[openvino]'" in p.reason for p in probes)
    with pytest.raises(UnavailableError, match=r"lensc\[openvino\]"):
        backend.load(artifact, spec(), bundle)
    with pytest.raises(UnavailableError, match=r"lensc\[openvino\]"):
        compile_graph(float_graph.graph, bundle)


def test_probe_asks_openvino_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen:
        available_devices = ("CPU", "GPU.0", "GPU.1")

        def get_property(self, device: str, name: str) -> str:
            assert name == "FULL_DEVICE_NAME"
            return f"some {device}"

    cpu = backend.probe()[0]
    assert (cpu.usable, cpu.state, cpu.reason) == (True, "runs here", f"openvino {VERSION}")
    monkeypatch.setattr(module, "_core", lambda _: Seen())
    cpu, gpu, npu = backend.probe()
    assert (gpu.usable, gpu.state, gpu.reason) == (True, "untested", f"openvino {VERSION}, some GPU")
    assert (npu.usable, npu.state) == (False, "untested")
    assert "compiler" in npu.reason and "wheel" in npu.reason


def test_supports() -> None:
    assert backend.supports(spec(), "w4a8-g128", TARGET) is None
    assert backend.supports(spec(), "w4a16-g128-kv8", Target("openvino", "gpu")) is None
    for scheme, target, reason in (
        ("f32", Target("openvino", "npu"), "fixed sizes"),
        ("f32", Target("openvino", "cpu", "avx2"), "no architecture; expected openvino:cpu"),
        ("f32", Target("onnxruntime", "cpu"), "not one of backend openvino"),
        ("w4a16-g128-kv4", TARGET, "8 or 16 bits"),
    ):
        assert reason in str(backend.supports(spec(), scheme, target))
        with pytest.raises(UnsupportedError, match=reason):
            backend.compile(Graph(spec(), Path("none.onnx"), scheme, ""), target, Path("none"))


def test_an_artifact_can_be_made_for_a_device_that_is_not_here(float_graph: Made, bundle: Path) -> None:
    target = Target("openvino", "gpu")
    if backend.probe()[1].usable:
        pytest.skip("there is a GPU here")
    artifact = compile_graph(float_graph.graph, bundle, target)
    assert artifact.placement == {} and "not compiled here" in artifact.options["executed"]
    with pytest.raises(UnavailableError, match="openvino:gpu: openvino sees no GPU"):
        backend.load(artifact, spec(), bundle)


@pytest.mark.parametrize("damage", ("unknown call", "another scale", "another past", "weights gone", "weights outside"))
def test_graphs_that_cannot_be_lowered(float_graph: Made, bundle: Path, tmp_path: Path, damage: str) -> None:
    model = onnx.load(str(float_graph.graph.path), load_external_data=False)
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
        compile_graph(dataclasses.replace(float_graph.graph, path=path), bundle)
    assert "\n" not in str(caught.value)
    assert list((bundle / TARGET.slug).iterdir()) == []


def test_a_full_disk_is_a_storage_error(float_graph: Made, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(StorageError, match="No space left on device"):
        compile_graph(float_graph.graph, bundle)
    assert list((bundle / TARGET.slug).iterdir()) == []
