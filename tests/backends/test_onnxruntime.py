"""What only ONNX Runtime's backend promises: the optimized graph, its placement, in-place decode, what it refuses."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime", reason="pip install lensc")
onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install 'lensc[export]'")

from onnx import TensorProto, helper, numpy_helper

from lensc.backends.base import Array, Artifact, Session, Target
from lensc.backends.errors import CompatibilityError, ExecutionError, StorageError, UnavailableError
from lensc.backends.load_options import LoadOptions
from lensc.backends.onnxruntime import backend
from lensc.export.graph import DimRange, Graph, GraphSpec, StatePair, TensorSpec

TARGET = Target("onnxruntime", "cpu")
HEADS, DIM = 2, 16


def spec() -> GraphSpec:
    cache = ("past", "batch", HEADS, DIM)
    return GraphSpec(
        name="attention",
        inputs=(
            TensorSpec("query", "float32", ("batch", HEADS, "rows", DIM)),
            TensorSpec("past_key.0", "float32", cache),
            TensorSpec("past_value.0", "float32", cache),
        ),
        outputs=(
            TensorSpec("mixed", "float32", ("batch", HEADS, "rows", DIM)),
            TensorSpec("key.0", "float32", ("rows", "batch", HEADS, DIM)),
        ),
        states=(StatePair("past_key.0", "key.0"),),
        dims={"batch": DimRange(1, 1, 8), "rows": DimRange(1, 1, 64), "past": DimRange(0, 64, 4096)},
    )


def write_attention(path: Path) -> Graph:
    """Attention over a time-major cache, written as an exporter writes it: Transpose, MatMul, no private operator."""
    scale = numpy_helper.from_array(np.float32(DIM**-0.5).reshape(1), "scale")
    weight = np.random.default_rng(0).standard_normal((DIM, DIM)).astype(np.float32) * DIM**-0.5
    nodes = [
        helper.make_node("Transpose", ["weight"], ["weight_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["query", "weight_t"], ["projected"]),
        helper.make_node("Mul", ["projected", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["past_key.0"], ["keys"], perm=[1, 2, 3, 0]),
        helper.make_node("MatMul", ["scaled", "keys"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("Transpose", ["past_value.0"], ["values"], perm=[1, 2, 0, 3]),
        helper.make_node("MatMul", ["weights", "values"], ["mixed"]),
        helper.make_node("Transpose", ["projected"], ["key.0"], perm=[2, 0, 1, 3]),
    ]
    interface = spec()
    infos = [
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in tensors]
        for tensors in (interface.inputs, interface.outputs)
    ]
    graph = helper.make_graph(nodes, "attention", *infos, [scale, numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(path), save_as_external_data=True, location="attention.onnx.data", size_threshold=100)
    return Graph(interface, path, "f32", "0" * 64)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return write_attention(tmp_path_factory.mktemp("graph") / "attention.onnx")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / TARGET.slug).mkdir()
    return tmp_path


@pytest.fixture
def artifact(graph: Graph, bundle: Path) -> Artifact:
    return backend.compile(graph, TARGET, bundle / TARGET.slug)


@pytest.fixture
def session(artifact: Artifact, bundle: Path) -> Session:
    return backend.load(artifact, spec(), bundle, LoadOptions(threads=1))


def feeds(batch: int, rows: int, past: int) -> dict[str, Array]:
    generator = np.random.default_rng(past)
    sizes = {"batch": batch, "rows": rows, "past": past}
    return {
        t.name: generator.standard_normal([sizes[d] if isinstance(d, str) else d for d in t.shape], np.float32)
        for t in spec().inputs
    }


def optimized(bundle: Path, artifact: Artifact) -> onnx.GraphProto:
    return onnx.load(str(bundle / artifact.files[0].path), load_external_data=False).graph


def test_cache_is_read_in_place(artifact: Artifact, bundle: Path) -> None:
    """No node copies or transposes the cache: the products read it by strides."""
    readers = [n.op_type for n in optimized(bundle, artifact).node if {"past_key.0", "past_value.0"} & set(n.input)]
    assert readers == ["FusedMatMul", "FusedMatMul"]


def test_constants_are_folded_once(artifact: Artifact, bundle: Path) -> None:
    transposed = [n for n in optimized(bundle, artifact).node if "weight" in n.input]
    assert transposed == []


def test_weights_lie_in_the_data_file(artifact: Artifact, bundle: Path) -> None:
    external = [t for t in optimized(bundle, artifact).initializer if t.data_location == TensorProto.EXTERNAL]
    assert [list(t.dims) for t in external] == [[DIM, DIM]]
    assert [f.path for f in artifact.files] == [
        "onnxruntime-cpu/onnxruntime-cpu.onnx",
        "onnxruntime-cpu/onnxruntime-cpu.onnx.data",
    ]
    assert artifact.files[1].bytes >= DIM * DIM * 4


def test_placement_counts_the_nodes_that_run(artifact: Artifact, bundle: Path) -> None:
    assert artifact.placement == {"CPUExecutionProvider": len(optimized(bundle, artifact).node)}


def test_same_graph_same_bytes(graph: Graph, artifact: Artifact, bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / TARGET.slug
    again.mkdir(parents=True)
    assert backend.compile(graph, TARGET, again) == artifact


def test_artifact_names_no_path(graph: Graph, artifact: Artifact, bundle: Path) -> None:
    content = (bundle / artifact.files[0].path).read_bytes()
    assert str(bundle).encode() not in content
    assert str(graph.path.parent).encode() not in content


def test_recompiling_replaces_and_leaves_nothing_behind(graph: Graph, artifact: Artifact, bundle: Path) -> None:
    leftover = bundle / TARGET.slug / f"{TARGET.slug}.partial"
    leftover.mkdir()
    (leftover / f"{TARGET.slug}.onnx").write_bytes(b"half a graph")
    (bundle / artifact.files[0].path).write_bytes(b"old")
    assert backend.compile(graph, TARGET, bundle / TARGET.slug) == artifact
    assert sorted(p.name for p in (bundle / TARGET.slug).iterdir()) == [
        "onnxruntime-cpu.onnx",
        "onnxruntime-cpu.onnx.data",
    ]


def test_loading_optimizes_nothing(session: Session) -> None:
    options = session._session.get_session_options()  # type: ignore[attr-defined]
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options.intra_op_num_threads == 1


def test_threads_default_to_physical_cores(artifact: Artifact, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lensc.profiles import probe

    found = dataclasses.replace(probe.machine(), cores=1)
    monkeypatch.setattr(probe, "machine", lambda: found)
    loaded = backend.load(artifact, spec(), bundle)
    assert loaded._session.get_session_options().intra_op_num_threads == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("past", (1, 37, 2048), ids=lambda p: f"P{p}")
@pytest.mark.parametrize("batch", (1, 3), ids=lambda b: f"B{b}")
def test_values(session: Session, batch: int, past: int) -> None:
    given = feeds(batch, 2, past)
    weight = np.random.default_rng(0).standard_normal((DIM, DIM)).astype(np.float32) * DIM**-0.5
    projected = given["query"] @ weight.T
    scores = np.einsum("bhrd,pbhd->bhrp", projected, given["past_key.0"]) * DIM**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    got = session.run(given)
    np.testing.assert_allclose(
        got["mixed"], np.einsum("bhrp,pbhd->bhrd", weights, given["past_value.0"]), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(got["key.0"], projected.transpose(2, 0, 1, 3), rtol=1e-5, atol=1e-5)


def test_addresses_do_not_outlive_a_run(session: Session) -> None:
    """Feeds of an earlier run may be freed: the next run must not read them."""
    for past in (64, 1, 300):
        given = feeds(1, 1, past)
        expected = session.run({name: array.copy() for name, array in given.items()})["mixed"]
        np.testing.assert_array_equal(session.run(given)["mixed"], expected)


def test_older_engine_is_refused_before_it_opens_the_file(
    artifact: Artifact, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert artifact.compatibility == {"onnxruntime": f">={ort.__version__}"}
    (bundle / artifact.files[0].path).unlink()
    monkeypatch.setattr(ort, "__version__", "1.9.2")
    with pytest.raises(CompatibilityError, match=r"needs onnxruntime >=.*found 1\.9\.2.*lensc compile"):
        backend.load(artifact, spec(), bundle)


def test_quantized_graphs_are_optimized_for_a_kind_of_cpu(
    graph: Graph, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = backend.compile(dataclasses.replace(graph, scheme="w8a8"), TARGET, bundle / TARGET.slug)
    assert made.compatibility["machine"] == platform.machine()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(CompatibilityError, match=r"needs machine .*, found riscv64"):
        backend.load(made, spec(), bundle)


def test_engine_failure_is_one_line(
    session: Session, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The engine finds at run time that sizes do not fit, and must not answer from elsewhere or print."""
    wrong = dataclasses.replace(
        session.spec, outputs=(*session.spec.outputs[:1], TensorSpec("key.0", "float32", ("past", "batch", HEADS, DIM)))
    )
    monkeypatch.setattr(session, "spec", wrong)
    with pytest.raises(ExecutionError, match="graph attention: onnxruntime failed") as caught:
        session.run(feeds(1, 2, 7))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    monkeypatch.undo()
    assert session.run(feeds(1, 2, 7))["mixed"].shape == (1, HEADS, 2, DIM)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_missing_engine_says_how_to_install_it(
    graph: Graph, artifact: Artifact, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (probe,) = backend.probe()
    assert not probe.usable and "pip install lensc" in probe.reason
    with pytest.raises(UnavailableError, match="pip install lensc"):
        backend.load(artifact, spec(), bundle)
    with pytest.raises(UnavailableError, match="pip install lensc"):
        backend.compile(graph, TARGET, bundle / TARGET.slug)


def test_probe_names_the_version() -> None:
    (probe,) = backend.probe()
    assert (probe.usable, probe.processor) == (True, "cpu") and probe.reason.startswith(
        f"onnxruntime {ort.__version__}"
    )


@pytest.mark.parametrize(("free", "expected"), [(10, StorageError), (1 << 40, ExecutionError)])
def test_a_failed_write_on_a_full_disk_is_a_storage_error(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: type[Exception]
) -> None:
    out = tmp_path / "bundle" / TARGET.slug
    out.mkdir(parents=True)

    def fail(*_: object) -> None:
        raise ExecutionError(
            "onnxruntime failed: [ONNXRuntimeError] : 1 : FAIL : Failed to write external initializers"
        )

    monkeypatch.setattr("lensc.backends.onnxruntime._optimize", fail)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1 << 41, 1 << 40, free))
    with pytest.raises(expected):
        backend.compile(graph, TARGET, out)
    assert list(out.iterdir()) == []
