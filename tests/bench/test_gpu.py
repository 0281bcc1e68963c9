"""The benchmark of the GPU where there is none: what it says, what it keeps when a section ends badly, and its checks."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="pip install 'lensc[cuda]'")

from lensc.backends.errors import ParityError
from lensc.bench import gpu, gpu_model, gpu_sections, record
from lensc.bench.full_size import FLOP_PER_TOKEN
from lensc.bench.gpu_clock import sqnr_db
from lensc.bench.gpu_program import FULL, decoder_program, vision_program
from lensc.bench.gpu_sections import CHECKS, SECTIONS, State

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="its interpreter runs the checks: pip install 'lensc[cuda]'"
)


@without_gpu
@needs_triton
def test_without_a_gpu_it_says_so_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) != 0
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert "finds no CUDA GPU" in said.err


@pytest.mark.parametrize("arguments", (["--sections", "speed"], ["--device", "cpu"]))
def test_arguments_that_mean_nothing_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)


@without_gpu
def test_an_error_of_a_section_is_kept() -> None:
    """In a process of its own, as on a GPU."""
    found = gpu.Found()
    gpu.in_process(State("limits"), 120, found.add)
    assert len(found.errors) == 1 and "gpu_clock.py" in found.errors[0]
    assert not found.rows


def test_a_section_that_takes_too_long_is_ended() -> None:
    found = gpu.Found()
    gpu.in_process(State("limits"), 0.05, found.add)
    assert found.errors == ["limits: ended after 0 s"]


def test_what_failed_parity_has_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A section is told which checks have passed; one that ended with an error has not."""
    told: dict[str, dict[str, bool]] = {}

    def run(state: State, seconds: float, emit: gpu_sections.Emit) -> None:
        if state.section == "limits":
            emit({"reach": {"read_gb_s": 1000.0, "bfloat16_tops": 500.0}})
        elif state.section in CHECKS:
            emit({"passed": {state.section: "int4" not in state.section}})
            if state.section == "vision bfloat16":
                emit({"error": "its process ended with status -9"})
        else:
            told[state.section] = dict(state.passed)
            emit({"row": record.Row("decode", "tokens/s", 100.0, parity="pass").to_json()})
            emit({"measured": {"decode": [100.0]}})

    monkeypatch.setattr(gpu, "in_process", run)
    out = tmp_path / "gpu.json"
    assert not gpu.measure(State("", repeat=5), list(SECTIONS), out, 1000.0)
    assert [*told] == [*SECTIONS]
    assert told["kernels"]["decoder bfloat16"] and told["kernels"]["vision float32"]
    assert not told["kernels"]["decoder int4"] and not told["kernels"]["vision bfloat16"]
    records = {r["command"].rpartition(" ")[2]: r for r in record.read(out)}
    assert [*records] == ["lensc.bench.gpu", "parity", *SECTIONS]
    assert records["parity"]["errors"] == ["its process ended with status -9"]
    assert records["vision"]["machine"]["read_gb_s"] == 1000.0
    bench = gpu_model.Bench(FULL, 5, {}, told["kernels"])
    bench.require("decoder bfloat16")
    with pytest.raises(ParityError, match="decoder int4 has not passed"):
        bench.require("decoder int4")
    with pytest.raises(ParityError):
        next(gpu_model.decoder(bench, "uint4"))


def test_sections_that_do_not_fit_the_budget_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing is started")

    monkeypatch.setattr(gpu, "in_process", refuse)
    found = gpu.section(State("vision"), 3.0)
    assert found.errors == ["vision: left out, 460 s are over"]


def test_operations_are_those_of_the_published_model() -> None:
    """A token's products without the head, and the attention of a prompt; a slice by hand."""
    _, program = decoder_program(FULL, 32, "f32")
    sizes = {"batch": 1, "tokens": 1, "rows": 0}
    attention = 4 * 4096 * 32
    assert gpu_model.operations(program, sizes) - attention == pytest.approx(FLOP_PER_TOKEN, rel=1e-3)
    assert gpu_model.operations(program, sizes, past=99) - gpu_model.operations(program, sizes) == 99 * attention
    prompt = gpu_model.operations(program, {"batch": 1, "tokens": 64, "rows": 0})
    assert prompt == 64 * (gpu_model.operations(program, sizes) - attention) + 64 * 65 // 2 * attention
    _, tower = vision_program(FULL)
    layer = 2 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * 1024 * 1152
    resampler = 2 * (1152 * 4096 + 2 * 4096**2) + 96 / 1024 * (4 * 4096**2 + 4 * 1024 * 4096)
    patch = 2 * 588 * 1152
    found = gpu_model.operations(tower, {"slices": 3, "patches": 1024})
    assert found == pytest.approx(3 * 1024 * (27 * layer + resampler + patch))


def test_noise_is_measured_in_decibels() -> None:
    truth = torch.ones(10)
    assert sqnr_db(truth * 1.001, truth) == pytest.approx(60, abs=0.01)
    assert sqnr_db(truth, truth) == pytest.approx(300)
    assert sqnr_db(truth * torch.nan, truth) == sqnr_db(truth[:5], truth) == -math.inf


@needs_triton
def test_checks_pass_on_a_tiny_model(tmp_path: Path) -> None:
    """In Triton's interpreter, which a process has or has not from the start."""
    pytest.importorskip("lensc.backends._cuda_session")
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-P", "-m", "lensc.bench.gpu", "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (parity,) = json.loads(out.read_text())
    assert parity["errors"] == []
    assert len(parity["rows"]) == 4 * 5 + 2 * 3 and {row["parity"] for row in parity["rows"]} == {"pass"}
