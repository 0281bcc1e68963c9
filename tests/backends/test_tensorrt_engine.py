"""How TensorRT is asked, by what a double of it was told. That an engine computes what it should is not shown here, nor
anywhere yet: see docs/tensorrt.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="the graph is made with onnx: pip install 'lensc[export]'")

from lensc.backends import _tensorrt_engine, tensorrt
from lensc.backends._tensorrt_build import compile_engine
from lensc.backends._tensorrt_device import Gpu
from lensc.backends._tensorrt_engine import GRAPHS, TensorRTEngine
from lensc.backends._tensorrt_session import TensorRTDecoderSession
from lensc.backends._tensorrt_target import Build, engine_spec, present_name, profiles
from lensc.backends.base import Artifact, Target
from lensc.backends.compiling import listening
from lensc.backends.errors import ExecutionError, GraphError, StorageError, UnsupportedError
from lensc.backends.load_options import LoadOptions

from .tensorrt_double import ENGINE, SAID, STATE, Device, Double

SmallDecoder = Any
"""That of conftest.py."""


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_decoder: Callable[[int], SmallDecoder]) -> None:
    SAID.clear()
    STATE.clear()
    own = engine_spec(small_decoder(32).spec, "float16")
    STATE["names"] = [t.name for t in (*own.inputs, *own.outputs)]
    monkeypatch.setitem(sys.modules, "tensorrt", Double)  # type: ignore[arg-type]
    monkeypatch.setattr(_tensorrt_engine, "CudaDevice", Device)
    monkeypatch.setattr(tensorrt, "first_gpu", lambda: Gpu("NVIDIA H200", (9, 0), 140 << 30, 141 << 30, "13.0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- building -----------------------------------------------------------------------------------------------------


def build(arch: str, small: SmallDecoder, folder: Path) -> int:
    made, spec = Build.parse(arch), small.spec
    inputs = engine_spec(spec, made.half).inputs
    return compile_engine(folder / "decoder.onnx", folder / "x.engine", inputs, profiles(spec), made, "NVIDIA H200")


@pytest.mark.parametrize(
    ("arch", "level", "flags"),
    [
        ("", "NONE", {"TF32"}),
        ("sm_90-bf16", "SAME_COMPUTE_CAPABILITY", {"TF32"}),
        ("sm_80-plus-versions", "AMPERE_PLUS", {"TF32", "VERSION_COMPATIBLE"}),
        ("f32-streamed", "NONE", {"WEIGHT_STREAMING"}),
    ],
)
def test_a_target_becomes_options_of_the_builder(
    arch: str, level: str, flags: set[str], small_decoder: Callable[[int], SmallDecoder], tmp_path: Path
) -> None:
    assert build(arch, small_decoder(32), tmp_path) == 42
    config = STATE["config"]
    assert config.hardware_compatibility_level.name == level and {flag.name for flag in config.flags} == flags
    assert (tmp_path / "x.engine").read_bytes() == ENGINE
    [kept] = (tmp_path / "cache" / "lensc" / "tensorrt").iterdir()
    assert kept.name == "11.4.0.106-NVIDIA-H200.timing" and kept.read_bytes() == b"times"


def test_every_dynamic_input_has_its_sizes_in_every_profile(
    small_decoder: Callable[[int], SmallDecoder], tmp_path: Path
) -> None:
    small = small_decoder(32)
    build("", small, tmp_path)
    decode, prefill = STATE["config"].profiles
    names = {t.name for t in engine_spec(small.spec, "float16").inputs}
    assert set(decode) == set(prefill) == names
    assert decode["inputs_embeds"] == ((1, 1, 64), (1, 1, 64), (4, 8, 64))
    assert prefill["position_ids"] == ((1,), (64,), (64,))
    assert decode["past_key.0"] == ((1, 2, 64, 16), (1, 2, 64, 16), (4, 2, 64, 16))


def test_progress_is_reported(small_decoder: Callable[[int], SmallDecoder], tmp_path: Path) -> None:
    heard: list[str] = []
    with listening(heard.append):
        build("", small_decoder(32), tmp_path)
    assert heard == ["Building 0/2", "Building 1/2", ""]


def test_ctrl_c_ends_a_build(small_decoder: Callable[[int], SmallDecoder], tmp_path: Path) -> None:
    """TensorRT swallows what a monitor raises, so that it is raised again when it has returned."""

    def interrupted(text: str) -> None:
        if "1/2" in text:
            raise KeyboardInterrupt

    with listening(interrupted), pytest.raises(KeyboardInterrupt):
        build("", small_decoder(32), tmp_path)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            "unparsed",
            UnsupportedError,
            "decoder.onnx: TensorRT 11.4.0.106 does not take it: TensorScatter node_7: no such thing",
        ),
        ("unbuilt", ExecutionError, "x.engine: TensorRT 11.4.0.106 cannot compile it: no kernel"),
    ],
)
def test_what_tensorrt_refuses_is_one_line(
    state: str, error: type[Exception], message: str, small_decoder: Callable[[int], SmallDecoder], tmp_path: Path
) -> None:
    STATE[state] = True
    with pytest.raises(error) as raised:
        build("", small_decoder(32), tmp_path)
    assert str(raised.value) == message


def test_a_full_disk_is_said(small_decoder: Callable[[int], SmallDecoder], tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    inputs = engine_spec(small_decoder(32).spec, "float16").inputs
    with pytest.raises(StorageError, match=r"/dev: cannot be written: No space left on device"):
        compile_engine(tmp_path / "decoder.onnx", full, inputs, profiles(small_decoder(32).spec), Build(), "GPU")


# --- a bundle -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(small_decoder: Callable[[int], SmallDecoder], tmp_path: Path) -> Artifact:
    (tmp_path / "decoder").mkdir()
    return tensorrt.backend.compile(small_decoder(4).graph, Target.parse("tensorrt:gpu"), tmp_path / "decoder")


def test_an_artifact_is_recorded_as_what_it_is(compiled: Artifact, tmp_path: Path) -> None:
    assert [record.path for record in compiled.files] == ["decoder/tensorrt-gpu.engine"]
    assert [path.name for path in (tmp_path / "decoder").iterdir()] == ["tensorrt-gpu.engine"], "nothing else is left"
    assert compiled.scheme == "w4a16-g32" and compiled.placement == {"GPU": 42}
    assert compiled.toolchain == {"TensorRT": "11.4.0.106", "CUDA": "13.0", "gpu": "NVIDIA H200"}
    assert compiled.options["tested"] == "never run on a GPU" and compiled.options["weights"] == "9 int4"
    assert compiled.compatibility["gpu"] == "NVIDIA H200" and compiled.compatibility["sizes"].startswith(
        "decode: batch 1-4"
    )


def test_it_is_loaded_and_stepped(
    compiled: Artifact, small_decoder: Callable[[int], SmallDecoder], tmp_path: Path
) -> None:
    import numpy as np

    session = tensorrt.backend.load(compiled, small_decoder(4).spec, tmp_path)
    assert isinstance(session, TensorRTDecoderSession) and STATE["host_code"] is False
    cache = session.new_cache(5)
    for past in range(3):
        feeds = {"position_ids": np.array([past]), "logit_positions": np.array([0])}
        session.step({**feeds, "inputs_embeds": small_decoder(4).embeddings(1, 1)}, cache)
    assert SAID[-6:] == ["enqueue", "begin", "enqueue", "end", "launch", "launch"]
    del cache
    session.close()
    assert SAID[-1] == "drop"


def test_cuda_graphs_can_be_turned_off(
    compiled: Artifact, small_decoder: Callable[[int], SmallDecoder], tmp_path: Path
) -> None:
    options = LoadOptions(engine={"cuda_graphs": "off"})
    session = tensorrt.backend.load(compiled, small_decoder(4).spec, tmp_path, options)
    assert isinstance(session, TensorRTDecoderSession)
    engine: Any = session._engine
    inputs, outputs = tensors(small_decoder(4))
    for _ in range(3):
        engine.run(0, inputs, outputs)
    assert "launch" not in SAID and SAID.count("context") == 1
    session.close()


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            {"names": ["patches", "logits"]},
            GraphError,
            "the file of graph decoder holds another graph: no input columns;",
        ),
        ({"copies": True}, ExecutionError, "present_key.0 is not written in place"),
        ({"profiles": 1}, GraphError, "has 1 profiles, expected 2; compile it again"),
    ],
)
def test_an_engine_of_something_else_is_refused(
    state: dict[str, Any],
    error: type[Exception],
    message: str,
    compiled: Artifact,
    small_decoder: Callable[[int], SmallDecoder],
    tmp_path: Path,
) -> None:
    STATE.update(state)
    with pytest.raises(error, match=message):
        tensorrt.backend.load(compiled, small_decoder(4).spec, tmp_path)
    assert STATE["device"].is_closed


def test_a_file_that_tensorrt_refuses_is_one_line(
    compiled: Artifact, small_decoder: Callable[[int], SmallDecoder], tmp_path: Path
) -> None:
    path = tmp_path / compiled.files[0].path
    path.write_bytes(ENGINE[::-1])
    with pytest.raises(ExecutionError) as raised:
        tensorrt.backend.load(compiled, small_decoder(4).spec, tmp_path)
    assert str(raised.value) == (
        f"{path}: TensorRT 11.4.0.106 cannot load it: Magic tag does not match; compile it again"
    )


# --- running ------------------------------------------------------------------------------------------------------


def tensors(small: SmallDecoder, batch: int = 1, at: int = 100) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs of a step, somewhere."""
    own = engine_spec(small.spec, "float16")
    sizes = {"batch": batch, "tokens": 1, "rows": 1, "span": 64}
    placed = {
        t.name: (at + i, tuple(d if isinstance(d, int) else sizes[d] for d in t.shape))
        for i, t in enumerate((*own.inputs, *own.outputs))
    }
    outputs = {t.name for t in own.outputs}
    return {n: p for n, p in placed.items() if n not in outputs}, {n: p for n, p in placed.items() if n in outputs}


def engine_of(small: SmallDecoder, tmp_path: Path, room: int | None = None) -> TensorRTEngine:
    (tmp_path / "x.engine").write_bytes(ENGINE)
    return TensorRTEngine(tmp_path / "x.engine", profiles(small.spec), True, room, False)


def ran(engine: TensorRTEngine, profile: int, where: tuple[dict[str, Any], dict[str, Any]]) -> list[Any]:
    """What a run asked of TensorRT and CUDA."""
    SAID.clear()
    engine.run(profile, *where)
    return list(SAID)


def test_a_run_that_comes_again_is_recorded_and_replayed(
    small_decoder: Callable[[int], SmallDecoder], tmp_path: Path
) -> None:
    small = small_decoder(32)
    engine = engine_of(small, tmp_path)
    one, two, moved = tensors(small), tensors(small, batch=2), tensors(small, at=500)
    recording = ["begin", "enqueue", "end", "launch"]
    assert ran(engine, 0, one) == ["context", ("profile", 0), "enqueue"]
    assert ran(engine, 0, one) == recording
    assert ran(engine, 0, one) == ["launch"]
    assert ran(engine, 0, two) == ["context", ("profile", 0), "enqueue"], "other shapes have a context of their own"
    assert ran(engine, 0, one) == ["launch"]
    assert ran(engine, 0, moved) == ["drop", "enqueue"], "a graph holds addresses"
    assert ran(engine, 0, moved) == recording and ran(engine, 0, moved) == ["launch"]
    assert ran(engine, 1, one) == ["context", ("profile", 1), "enqueue"], "prompts are not recorded"
    assert ran(engine, 1, two) == ["enqueue"] and ran(engine, 1, two) == ["enqueue"]
    engine.close()
    engine.close()
    with pytest.raises(ExecutionError, match="the engine is closed"):
        engine.run(1, *one)


def test_graphs_that_came_first_are_given_up(small_decoder: Callable[[int], SmallDecoder], tmp_path: Path) -> None:
    small = small_decoder(32)
    engine = engine_of(small, tmp_path)
    for batch in range(1, GRAPHS + 1):
        for _ in range(2):
            ran(engine, 0, tensors(small, batch))
    assert ran(engine, 0, tensors(small, 1)) == ["launch"]
    assert ran(engine, 0, tensors(small, 99)) == ["drop", "context", ("profile", 0), "enqueue"]
    assert ran(engine, 0, tensors(small, 1)) == ["launch"] and ran(engine, 0, tensors(small, 2))[:2] == [
        "drop",
        "context",
    ]
    engine.close()


def test_weights_that_do_not_fit_are_streamed(small_decoder: Callable[[int], SmallDecoder], tmp_path: Path) -> None:
    STATE["streamable"] = 8 << 30
    small = small_decoder(32)
    engine = engine_of(small, tmp_path, room=6 << 30)
    assert engine.notes == ["6.0 of 8.0 GiB of weights are kept on the GPU, the others are copied in every run"]
    for _ in range(3):
        assert ran(engine, 0, tensors(small))[-1] == "enqueue", "nothing is recorded"
    engine.close()
    for room in (None, 9 << 30):
        engine = engine_of(small, tmp_path, room)
        assert not engine.notes
        engine.close()


def test_a_run_that_fails_is_one_line(small_decoder: Callable[[int], SmallDecoder], tmp_path: Path) -> None:
    small = small_decoder(32)
    engine = engine_of(small, tmp_path)
    STATE["misshapen"] = "columns"
    with pytest.raises(ExecutionError, match=r"x.engine: TensorRT does not take columns: it says nothing"):
        engine.run(1, *tensors(small))
    STATE.update(misshapen=None, fails=True)
    with pytest.raises(ExecutionError, match=r"x.engine: TensorRT failed: it says nothing"):
        engine.run(1, *tensors(small))
    engine.close()


def test_outputs_are_named_after_their_inputs() -> None:
    assert present_name("past_key.3") == "present_key.3"
