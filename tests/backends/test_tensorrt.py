"""The backend `tensorrt` as far as no GPU is needed: targets, sizes, what an engine requires, and every way in which a GPU
cannot be used. The graphs that TensorRT is given are in test_tensorrt_lower.py, sessions in test_tensorrt_session.py.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnx", reason="the graph is made with onnx: pip install 'lensc[export]'")

from lensc.backends import _tensorrt_build, _tensorrt_device, tensorrt
from lensc.backends._tensorrt_build import described, timing_cache_path
from lensc.backends._tensorrt_device import Gpu, first_gpu
from lensc.backends._tensorrt_lower import Lowered
from lensc.backends._tensorrt_target import Build, Half, engine_spec, profiles, shapes_key
from lensc.backends.base import Artifact, FileRecord, StaticBackend, Target, TunableBackend
from lensc.backends.compiling import CompilesOnDevice
from lensc.backends.errors import CompatibilityError, ExecutionError, UnavailableError, UnsupportedError, UsageError
from lensc.export.graph import DimRange, GraphSpec

SmallDecoder = Any
"""That of conftest.py."""

backend = tensorrt.backend

# --- targets and sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("", Build()),
        ("bf16", Build(half="bfloat16")),
        ("sm_90", Build((9, 0))),
        ("sm_120-f32", Build((12, 0), half="float32")),
        ("sm_80-plus-bf16", Build((8, 0), True, "bfloat16")),
        ("versions", Build(for_versions=True)),
        ("sm_87-bf16-versions-streamed", Build((8, 7), False, "bfloat16", True, True)),
    ],
)
def test_a_target_says_what_is_compiled(arch: str, expected: Build) -> None:
    assert Build.parse(arch) == expected and str(expected) == arch
    target = Target.parse("tensorrt:gpu" + (f":{arch}" if arch else ""))
    assert backend.supports(decoder_spec(), "w4a16-g128", target) is None


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("sm90", "expected words like sm_90, sm_80-plus, bf16"),
        ("bf16-sm_90", "expected words like"),
        ("streamed-versions", "expected words like"),
        ("f16", "expected words like"),
        ("sm_90-plus", "from sm_80 on only: sm_80-plus"),
        ("sm_75-bf16", "bfloat16 needs sm_80 or newer"),
        ("sm_70", "TensorRT 11 needs sm_75 or newer"),
    ],
)
def test_a_target_that_means_nothing_is_refused(arch: str, message: str) -> None:
    reason = backend.supports(decoder_spec(), "f32", Target("tensorrt", "gpu", arch))
    assert reason is not None and reason.startswith(f"target tensorrt:gpu:{arch}: ") and message in reason


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [
        ("w4a16-g128-asym", "w4a16-g128"),
        ("w4a8-g32-kv8", "w4a8-g32"),
        ("w8a8", "w8a8-g128, whose weights become floats"),
    ],
)
def test_a_scheme_that_it_has_not_is_refused_with_the_nearest(scheme: str, nearest: str) -> None:
    reason = backend.supports(decoder_spec(), scheme, Target("tensorrt", "gpu"))
    assert reason is not None and reason.endswith(f"is {nearest}")
    assert backend.supports(decoder_spec(), nearest.split(",")[0], Target("tensorrt", "gpu")) is None


def test_profiles_cover_what_a_session_asks_for() -> None:
    decode, prefill = profiles(decoder_spec())
    assert decode.sizes["tokens"] == (1, 1, 8) and prefill.sizes["tokens"] == (1, 64, 64), "the context is the limit"
    assert decode.is_replayed and not prefill.is_replayed
    caches = [t for t in engine_spec(decoder_spec(), "bfloat16").inputs if t.name.startswith("past_")]
    assert decode.shapes(caches[0]) == ((1, 2, 64, 16), (1, 2, 64, 16), (4, 2, 64, 16)), "room is fixed, beams are not"
    assert shapes_key(decoder_spec()) != shapes_key(
        dataclasses.replace(decoder_spec(), dims={**decoder_spec().dims, "past": decoder_spec().dims["batch"]})
    )


def test_a_slice_several_and_one_of_any_shape_have_profiles() -> None:
    dims = {"slices": DimRange(1, 1, 102), "patches": DimRange(1, 1024, 4900)}
    one, several, any_slice = profiles(GraphSpec("vision", (), (), (), dims))
    assert one.sizes == {"slices": (1, 1, 1), "patches": (1, 1024, 1088)} and one.is_replayed
    assert several.sizes == {"slices": (2, 10, 10), "patches": (1, 1024, 1088)} and several.is_replayed
    assert any_slice.sizes == {"slices": (1, 1, 1), "patches": (1, 1088, 4900)}


def decoder_spec() -> GraphSpec:
    """That of conftest.py."""
    return SPEC


SPEC: GraphSpec


@pytest.fixture(scope="module", autouse=True)
def _spec(small_decoder: Callable[[int], Any]) -> None:
    global SPEC
    SPEC = small_decoder(32).spec


# --- what an engine requires --------------------------------------------------------------------------------------

H200 = Gpu("NVIDIA H200", (9, 0), 140 << 30, 141 << 30, "13.0")


def artifact(arch: str = "", version: str = "11.4.0.106", gpu: Gpu = H200, **options: str) -> Artifact:
    build = Build.parse(arch)
    lowered = Lowered(None, 1000, {"int4": 3})
    return Artifact(
        graph="decoder",
        target=Target("tensorrt", "gpu", arch),
        scheme="w4a16-g128",
        files=(FileRecord("decoder/x.engine", 10, "0" * 64),),
        toolchain={},
        options=tensorrt.options_of(build, lowered, decoder_spec()) | options,
        compatibility=tensorrt.requirements(build, version, gpu, decoder_spec()),
        placement={},
    )


def loaded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, one: Artifact, version: str = "11.4.0.106", gpu: Gpu = H200
) -> None:
    """Load an artifact on a machine that has `gpu` and `version`, up to where TensorRT would be asked."""
    monkeypatch.setattr(tensorrt, "first_gpu", lambda: gpu)
    monkeypatch.setattr(tensorrt, "_version", lambda: version)

    def reached(*args: object) -> None:
        raise EOFError

    monkeypatch.setattr(tensorrt, "_opened", reached)
    (folder / "decoder").mkdir(exist_ok=True)
    (folder / "decoder" / "x.engine").write_bytes(b"0123456789")
    backend.load(one, decoder_spec(), folder)


H100 = dataclasses.replace(H200, name="NVIDIA H100 80GB HBM3")
RTX4090 = dataclasses.replace(H200, name="NVIDIA GeForce RTX 4090", capability=(8, 9))
RTX2080 = dataclasses.replace(H200, name="NVIDIA GeForce RTX 2080", capability=(7, 5))


@pytest.mark.parametrize(
    ("arch", "here", "problem"),
    [
        ("", {}, None),
        ("", {"version": "11.5.0.1"}, "needs TensorRT 11.4.0.106, found 11.5.0.1"),
        ("", {"gpu": H100}, "needs gpu NVIDIA H200, found NVIDIA H100 80GB HBM3"),
        ("sm_90", {"gpu": H100}, None),
        ("sm_90", {"gpu": RTX4090}, "needs compute capability 9.0, found 8.9"),
        ("sm_80-plus", {"gpu": RTX4090}, None),
        ("sm_80-plus", {"gpu": RTX2080}, "needs compute capability >=8.0, found 7.5"),
        ("versions", {"version": "11.5.0.1"}, None),
        ("versions", {"version": "11.3.0.1"}, "needs TensorRT >=11.4.0.106, found 11.3.0.1"),
        ("versions", {"version": "12.0.0.1"}, "needs TensorRT major 11, found 12"),
        ("", {"gpu": dataclasses.replace(H200, driver="12.9")}, "needs CUDA driver >=13.0, found 12.9"),
    ],
)
def test_an_engine_of_elsewhere_is_refused_with_the_field_and_the_command(
    arch: str, here: dict[str, Any], problem: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = artifact(arch)
    if problem is None:
        with pytest.raises(EOFError):
            loaded(monkeypatch, tmp_path, one, **here)
        return
    with pytest.raises(CompatibilityError) as error:
        loaded(monkeypatch, tmp_path, one, **here)
    assert problem in str(error.value)
    assert str(error.value).endswith(f"rebuild it here with: lensc compile GRAPHS --target {one.target} -o BUNDLE")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("sizes", "decode: batch 1-1", "needs sizes decode: batch 1-1, found decode: batch 1-4, tokens 1-8"),
        ("tensorrt layout", "2", "needs tensorrt layout 2, found 1"),
        ("moon", "full", "requirement moon full is not known to this version of lensc"),
    ],
)
def test_an_engine_for_other_sizes_is_refused(
    field: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = artifact()
    one = dataclasses.replace(one, compatibility={**one.compatibility, field: value})
    with pytest.raises(CompatibilityError, match=re.escape(problem)):
        loaded(monkeypatch, tmp_path, one)


def test_a_gpu_too_small_is_told_what_would_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """8 billion weights: 16 GB in float16."""
    small = dataclasses.replace(H200, name="GPU", free_bytes=11 << 30, total_bytes=12 << 30)
    one = dataclasses.replace(artifact(parameters="8000000000"), scheme="f16")
    (tmp_path / "decoder").mkdir()
    with pytest.raises(UnavailableError) as error:
        tensorrt._check_memory("decoder", 16 << 30, 8_000_000_000, small.free_bytes, small)
    assert str(error.value) == (
        "decoder: needs 17.0 GiB of a GPU's memory, GPU has 11.0 of 12.0 GiB free; in int4 its weights would take 4.0 GiB"
    )
    with pytest.raises(UnavailableError, match="no scheme would fit: add -streamed to the target"):
        tensorrt._check_memory("decoder", 16 << 30, 80_000_000_000, small.free_bytes, small)
    nothing = dataclasses.replace(H200, free_bytes=1 << 20)
    with pytest.raises(UnavailableError, match=r"decoder/x.engine: needs 1.0 GiB of a GPU's memory"):
        loaded(monkeypatch, tmp_path, one, gpu=nothing)
    with pytest.raises(EOFError):
        loaded(monkeypatch, tmp_path, artifact("streamed"), gpu=nothing)


def test_a_file_that_is_not_the_engine_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = artifact()
    other = dataclasses.replace(one, files=(FileRecord("decoder/x.engine", 11, "0" * 64),))
    with pytest.raises(ExecutionError, match=r"x.engine: has 10 bytes, expected the engine of 11 bytes"):
        loaded(monkeypatch, tmp_path, other)
    absent = dataclasses.replace(one, files=(FileRecord("decoder/y.engine", 11, "0" * 64),))
    with pytest.raises(ExecutionError, match=r"y.engine: is not there, expected"):
        loaded(monkeypatch, tmp_path, absent)


@pytest.mark.parametrize(
    ("scheme", "half", "recorded"),
    [
        ("f32", "float16", "f16"),
        ("f32", "bfloat16", "f16"),
        ("f32", "float32", "f32"),
        ("w4a32-g32-s4", "float16", "w4a16-g32-s4"),
        ("w4a32-g32", "float32", "w4a32-g32"),
        ("w4a8-g128-s4-mixed", "float16", "w4a8-g128-s4-mixed"),
        ("f32-mixed", "float16", "f16-mixed"),
    ],
)
def test_what_is_computed_in_16_bits_is_judged_as_such(scheme: str, half: Half, recorded: str) -> None:
    assert tensorrt.recorded_scheme(scheme, half) == recorded


def test_the_manifest_says_that_it_never_ran() -> None:
    options = artifact("bf16-versions").options
    assert options["tested"] == "never run on a GPU" and options["products"] == "bfloat16"
    assert "lean runtime, which is run where it is loaded" in options["host_code"]


# --- no GPU -------------------------------------------------------------------------------------------------------


class Cuda:
    """`cuda.bindings.runtime` on a machine that never was. Its functions are held against the real ones below."""

    def __init__(
        self, version: int = 13000, count: int = 1, error: int = 0, capability: tuple[int, int] = (9, 0)
    ) -> None:
        self.version, self.count, self.error, self.capability = version, count, error, capability

    def cudaDriverGetVersion(self) -> tuple[int, int]:  # noqa: N802  (the names are NVIDIA's)
        return 0, self.version

    def cudaGetDeviceCount(self) -> tuple[int, int]:  # noqa: N802
        return self.error, self.count

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"no CUDA-capable device is detected"

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:  # noqa: N802
        major, minor = self.capability
        return 0, SimpleNamespace(name=b"NVIDIA H200\0", major=major, minor=minor)

    def cudaSetDevice(self, device: int) -> tuple[int]:  # noqa: N802
        return (0,)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return 0, 140 << 30, 141 << 30


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (Cuda(version=12080), "the NVIDIA driver has CUDA 12.8, expected 13.0 (r580) or newer; update the driver"),
        (Cuda(version=0), "the NVIDIA driver is not loaded, expected 13.0 (r580) or newer"),
        (Cuda(count=0, error=100), "no NVIDIA GPU: no CUDA-capable device is detected; nvidia-smi shows"),
        (Cuda(count=0), "no NVIDIA GPU: there is none"),
        (Cuda(capability=(7, 0)), "NVIDIA H200 has compute capability 7.0, TensorRT 11 needs 7.5 or newer"),
    ],
)
def test_a_machine_that_cannot_is_told_why(cuda: Cuda, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tensorrt_device, "missing", lambda: None)
    monkeypatch.setattr(_tensorrt_device, "_cudart", lambda: cuda)
    with pytest.raises(UnavailableError) as error:
        first_gpu()
    assert message in str(error.value) and "\n" not in str(error.value)
    [probe] = backend.probe()
    assert not probe.usable and message in probe.reason and probe.state == "untested"


def test_a_machine_that_can_is_called_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tensorrt_device, "missing", lambda: None)
    monkeypatch.setattr(_tensorrt_device, "_cudart", Cuda)
    monkeypatch.setattr(tensorrt, "_version", lambda: "11.4.0.106")
    assert first_gpu() == H200
    [probe] = backend.probe()
    assert probe.usable and probe.state == "untested"
    assert probe.reason.startswith("TensorRT 11.4.0.106, NVIDIA H200, 141 GiB, sm_90, CUDA 13.0; never run on a GPU")


def test_without_its_gpu_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, small_decoder: Callable[[int], SmallDecoder], tmp_path: Path
) -> None:
    """What is there is left as it is; the message says how to do it where there is one."""
    graph = small_decoder(32).graph
    with pytest.raises(UnsupportedError, match="takes weights without zero points"):
        backend.compile(dataclasses.replace(graph, scheme="w4a16-g128-asym"), Target("tensorrt", "gpu"), tmp_path)
    stateless = dataclasses.replace(graph, spec=graph.spec.stateless, scheme="w8a8")
    with pytest.raises(UnsupportedError, match="scheme w8a8 needs ranges of its activations"):
        backend.compile(stateless, Target("tensorrt", "gpu"), tmp_path)
    monkeypatch.setattr(_tensorrt_device, "missing", lambda: "tensorrt not installed; pip install 'lensc[tensorrt]'")
    with pytest.raises(
        UnavailableError, match=r"tensorrt not installed; pip .*lensc compile GRAPHS --target tensorrt:gpu "
    ):
        backend.compile(graph, Target("tensorrt", "gpu"), tmp_path)
    monkeypatch.setattr(tensorrt, "first_gpu", lambda: H200)
    monkeypatch.setattr(tensorrt, "_version", lambda: "11.4.0.106")
    for arch, problem in (("sm_89", "NVIDIA H200 is sm_90, the engine is for sm_89"), ("sm_120", "is for sm_120")):
        with pytest.raises(UnavailableError, match=problem):
            backend.compile(graph, Target("tensorrt", "gpu", arch), tmp_path)
    tiny = dataclasses.replace(H200, total_bytes=1 << 30)
    monkeypatch.setattr(tensorrt, "first_gpu", lambda: tiny)
    with pytest.raises(UnavailableError, match=r"decoder for tensorrt:gpu: needs 1.0 GiB of a GPU's memory"):
        backend.compile(graph, Target("tensorrt", "gpu"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_that_its_gpu_is_not_here_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is exported in half an hour; compiling comes after that."""
    pytest.importorskip("torch", reason="pip install 'lensc[export]'")
    from lensc.export.compile_stages import check_compilable
    from lensc.export.ranges import works

    monkeypatch.setattr(tensorrt, "first_gpu", lambda: H200)
    monkeypatch.setattr(tensorrt, "_version", lambda: "11.4.0.106")
    check_compilable(works([Target("onnxruntime", "cpu"), Target("tensorrt", "gpu", "sm_90")]))
    with pytest.raises(
        UnavailableError, match=r"H200 is sm_90, the engine is for sm_89; prepare it here with `lensc export`"
    ):
        check_compilable(works([Target("onnxruntime", "cpu"), Target("tensorrt", "gpu", "sm_89")]))
    monkeypatch.undo()
    monkeypatch.setattr(_tensorrt_device, "missing", lambda: "no NVIDIA driver: libcuda.so.1 cannot be loaded")
    with pytest.raises(UnavailableError, match="no NVIDIA driver"):
        check_compilable(works([Target("tensorrt", "gpu")]))


def test_it_is_a_backend() -> None:
    assert isinstance(backend, StaticBackend) and isinstance(backend, TunableBackend)
    assert isinstance(backend, CompilesOnDevice)
    assert backend.choices(artifact()) == {"cuda_graphs": ("on", "off")}


# --- CUDA, and what is kept ---------------------------------------------------------------------------------------


def test_every_function_of_cuda_is_there_and_takes_what_it_is_given() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="pip install 'lensc[tensorrt]'")
    tree = ast.parse(inspect.getsource(_tensorrt_device))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("cuda")
    ]
    assert len(calls) > 15
    for call in calls:
        name = call.func.attr  # type: ignore[attr-defined]
        signature = str(getattr(runtime, name).__doc__).splitlines()[0]
        taken = [p for p in signature[signature.index("(") + 1 : signature.rindex(")")].split(",") if p.strip()]
        assert len(call.args) == len(taken), f"{name}: {signature}"
    names = re.findall(r"_cudart\.(cuda\w+(?:\.\w+)?)", inspect.getsource(_tensorrt_device))
    for name in names:
        found: Any = runtime
        for part in name.split("."):
            found = getattr(found, part)


def test_what_was_timed_is_kept_by_version_and_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = timing_cache_path("11.4.0.106", "NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "lensc" / "tensorrt" / "11.4.0.106-NVIDIA-H100-80GB-HBM3.timing"

    class Config:
        """As much of a builder's configuration as keeps a timing cache."""

        def __init__(self) -> None:
            self.given: list[bytes] = []

        def create_timing_cache(self, data: bytes) -> Any:
            self.given.append(data)
            return None if data == b"broken" else SimpleNamespace(serialize=lambda: data + b"+")

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return not ignore_mismatch

        def get_timing_cache(self) -> Any:
            return self.cache

    config: Any = Config()
    for expected in (b"+", b"++"):
        _tensorrt_build.set_timing_cache(config, path)
        _tensorrt_build.save_timing_cache(config, path)
        assert path is not None and path.read_bytes() == expected
    path.write_bytes(b"broken")
    _tensorrt_build.set_timing_cache(config, path)
    assert config.given == [b"", b"+", b"broken", b""]
    _tensorrt_build.save_timing_cache(config, path)
    assert path.read_bytes() == b"+" and len(list(path.parent.iterdir())) == 1
    (tmp_path / "file").write_text("")
    _tensorrt_build.save_timing_cache(config, tmp_path / "file" / "x.timing")  # costs time, and nothing else


def test_a_phase_is_described_with_the_one_around_it() -> None:
    assert described({}) == ""
    assert described({"Building Engine": (1, 6)}) == "Building Engine 1/6"
    phases = {"Building Engine": (1, 6), "Tactics": (0, 3), "Timing nodes": (113, 420), "Empty": (0, 0)}
    assert described(phases) == "Building Engine 1/6, Empty"
    del phases["Empty"]
    assert described(phases) == "Building Engine 1/6, Timing nodes 113/420"


def test_a_damaged_cache_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.timing").write_bytes(b"broken")
    config: Any = SimpleNamespace(
        create_timing_cache=lambda data: None if data else 0, set_timing_cache=lambda c, **k: False
    )
    with caplog.at_level(logging.WARNING, "lensc"):
        _tensorrt_build.set_timing_cache(config, tmp_path / "x.timing")
    assert [record.message.partition(": ")[0].partition(" is ")[2] for record in caplog.records] == [
        "damaged; kernels are timed anew",
        "of another GPU or TensorRT; kernels are timed anew",
    ]


def test_a_usage_error_of_a_target_is_one_of_the_command_line() -> None:
    with pytest.raises(UsageError, match="expected words like"):
        Build.parse("fast")
