"""What the backend `native` says where its kernels are missing, or another instruction set is asked for than there is."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="compiling needs onnx: pip install 'lensc[export]'")

from lensc.backends import native
from lensc.backends._multiples import scales_of
from lensc.backends._native_build import SUM_MULTIPLES, build
from lensc.backends._program import Linear, Place, Port, Program, Value, WeightRecord
from lensc.backends._program_reference import NumpySession
from lensc.backends.base import Artifact, Target
from lensc.backends.errors import ExecutionError, UnavailableError
from lensc.backends.load_options import LoadOptions
from lensc.kernels.linear.reference import quantized_linear, unpack


@pytest.fixture(name="compiled")
def _compiled(small_decoder: Callable[[int], Any], tmp_path: Path) -> tuple[Any, Artifact]:
    (tmp_path / "decoder").mkdir()
    small = small_decoder(4)
    return small, native.backend.compile(small.graph, Target("native", "cpu"), tmp_path / "decoder")


def test_without_kernels_numpy_answers_and_says_so(
    compiled: tuple[Any, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small, artifact = compiled
    monkeypatch.setattr(native, "_kernels", lambda: "the compiled kernels are missing (no file)")
    (probe,) = native.backend.probe()
    assert probe.usable and probe.state == "emulated" and "many times slower: the compiled kernels" in probe.reason
    session = native.backend.load(artifact, small.spec, tmp_path)
    assert isinstance(session, NumpySession)
    (line,) = caplog.messages
    assert "native-cpu.json: numpy computes, many times slower: the compiled kernels are missing" in line
    embeds = small.embeddings(1, 5)
    empty = np.zeros((0, 1, small.kv_heads, small.head_dim), np.float32)
    feeds = {
        "inputs_embeds": embeds,
        "position_ids": np.arange(5),
        "logit_positions": np.arange(5),
        **{pair.input: empty for pair in small.spec.states},
    }
    np.testing.assert_allclose(session.run(feeds)["logits"], small.logits(embeds), atol=1e-4)
    session.close()


def test_an_instruction_set_that_is_not_here_is_refused_and_not_passed_over(
    compiled: tuple[Any, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("lensc.kernels._cpu", reason="the compiled kernels are not installed")
    small, artifact = compiled
    monkeypatch.setenv("LENSC_ISA", "sse9")
    (probe,) = native.backend.probe()
    assert not probe.usable and "LENSC_ISA=sse9 is not one of" in probe.reason
    with pytest.raises(UnavailableError, match=r"LENSC_ISA=sse9 is not one of .*generic; name one of them or none"):
        native.backend.load(artifact, small.spec, tmp_path)
    for isa in kernels.usable_isas():
        monkeypatch.setenv("LENSC_ISA", isa)
        assert native.backend.probe()[0].reason == f"kernels for {isa}"
        native.backend.load(artifact, small.spec, tmp_path, LoadOptions(threads=1)).close()


def test_multiples_become_scales_where_that_is_faster(tmp_path: Path) -> None:
    """Which shows in the inputs that are rounded together: a group, where every group has a scale."""
    kernels = pytest.importorskip("lensc.kernels._cpu", reason="the compiled kernels are not installed")
    outputs, inputs, group, rows = 40, 1024, 128, 3
    random = np.random.default_rng(0)
    packed = random.integers(0, 256, outputs * inputs // 2, np.uint8)
    steps = random.uniform(1e-3, 1e-2, outputs).astype("<f4")
    multiples = random.integers(1, 16, (outputs, inputs // group), np.int8)
    (tmp_path / "data").write_bytes(packed.tobytes() + steps.tobytes() + multiples.tobytes())
    places = [Place("data", offset) for offset in (0, packed.nbytes, packed.nbytes + steps.nbytes)]
    weight = WeightRecord("w", "uint4", outputs, inputs, group, places[0], places[1], None, "int8", places[2])
    program = Program(
        "g",
        ("data",),
        (Value("rows", inputs), Value("rows", outputs)),
        (Port("x", 0),),
        (Linear(0, weight, None, None, 1),),
        (Port("y", 1),),
    )
    x, y = random.standard_normal((rows, inputs)).astype(np.float32), np.empty((rows, outputs), np.float32)
    values, zeros = unpack(packed, 4, outputs * inputs).reshape(outputs, inputs), np.full(multiples.shape, 8, np.uint8)
    assert weight.unit == 4 * group
    with open(tmp_path / "data", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for isa in kernels.usable_isas():
            built = build(program, {"data": mapped}, kernels, isa, 1, True)
            built.program.run([rows], [(0, x), (1, y)], [], None, 0, 0, 0)
            unit = weight.unit if isa in SUM_MULTIPLES else group
            expected = quantized_linear(x, values, scales_of(steps, multiples), zeros, group, unit)
            # with other units it would be 7e-3
            assert np.linalg.norm(y - expected) <= 1e-3 * np.linalg.norm(expected), isa
            del built


def test_what_kernels_throw_is_an_execution_error(small_decoder: Callable[[int], Any], tmp_path: Path) -> None:
    """So that another device may go on with the answer."""

    class Thrown:
        def run(self, *_: object) -> None:
            raise RuntimeError("a thread could not be started")

    small = small_decoder(32)
    (tmp_path / "decoder").mkdir()
    artifact = native.backend.compile(small.graph, Target.parse("native:cpu"), tmp_path / "decoder")
    session: Any = native.backend.load(artifact, small.spec, tmp_path)
    session._built = dataclasses.replace(session._built, program=Thrown())
    feeds = {"inputs_embeds": small.embeddings(1, 2), "position_ids": np.arange(2), "logit_positions": np.array([1])}
    with pytest.raises(ExecutionError, match="graph decoder: the kernels failed: a thread could not be started"):
        session.step(feeds, session.new_cache(4))
