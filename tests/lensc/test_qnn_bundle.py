"""A bundle with its vision graph for a phone's NPU, from checkpoint to answer, by emulation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("torch", reason="pip install 'lensc[export]'")
pytest.importorskip("onnxruntime_qnn", reason="pip install 'lensc[qnn]'")

import lensc
from lensc.backends.bundle import ModelSpec, load_manifest
from lensc.backends.errors import UnavailableError
from lensc.cli import main
from lensc.export import compile_stages, questions
from lensc.export.verify import Question

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with slices of 64 patches instead of 1024, which take a second to emulate."""
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    shutil.copytree(GOLDEN, folder)
    for name, part in (("config.json", "slice_config"), ("preprocessor_config.json", None)):
        document = json.loads((folder / name).read_text())
        (document if part is None else document[part])["scale_resolution"] = 112
        (folder / name).write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npu") / "bundle"
    first = questions.questions_for

    def one_picture(spec: ModelSpec) -> tuple[Question, ...]:
        return first(spec)[:1]  # emulating one slice takes seconds

    argv = ["build", str(checkpoint), "--scheme", "w8a16-vision", "-o", str(folder)]
    argv += ["--target", "vision=qnn:npu:sm8650", "--target", "decoder=onnxruntime:cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_stages, "questions_for", one_picture)
        assert main(argv) == 0
    return folder


def test_the_report_says_emulated_and_how_close_it_is(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    [record] = [r for r in manifest.parity if r.target == "qnn:npu:sm8650"]
    assert (record.graph, record.where, record.passed) == ("vision", "emulated", True)
    assert record.sqnr_db > 38  # random weights: every rounding counts
    assert record.pictures > 0
    [artifact] = [a for a in manifest.artifacts if a.graph == "vision"]
    assert list(artifact.placement) == ["QNNExecutionProvider"]
    assert {"qairt", "chip", "soc_model", "htp_arch"} <= set(artifact.compatibility)


def test_it_answers_with_vision_there_and_the_decoder_here(bundle: Path) -> None:
    picture = Image.new("RGB", (56, 42), (200, 30, 60))
    with lensc.load(bundle, target="vision=qnn:npu:sm8650,decoder=onnxruntime:cpu") as vlm:
        assert str(vlm.plan["vision"].effective) == "qnn:npu:sm8650"
        assert vlm.overlap.reason == "vision is on qnn:npu:sm8650, the decoder on onnxruntime:cpu"
        assert len(vlm.generate("What?", [picture], max_new_tokens=4).metrics.image_ms) == 1
    with pytest.raises(UnavailableError, match="the bundle was built for"):
        lensc.load(bundle, target="vision=qnn:npu:sm8750")


def test_a_float_graph_is_compiled_to_float16_and_judged_as_such(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "graphs")]) == 0
    argv = ["compile", str(tmp_path / "graphs"), "--target", "qnn:npu:sm8650", "--target", "qnn:npu:sm8750"]
    assert main([*argv, "-o", str(tmp_path / "bundle")]) == 0
    assert "decoder: compiled for no target of this command, and lensc run needs it" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "bundle")
    assert [(str(a.target), a.scheme) for a in manifest.artifacts] == [
        ("qnn:npu:sm8650", "f16"),
        ("qnn:npu:sm8750", "f16"),
    ]
    for artifact in manifest.artifacts:
        assert float(artifact.parity["probe_sqnr_db"]) > 45
    assert main(["explain", str(tmp_path / "bundle"), "--max-cpu-nodes", "0"]) == 0


def test_too_few_calibration_pictures_are_refused(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (30, 30)).save(pictures / "one.png")
    argv = ["build", str(GOLDEN), "--scheme", "w8a16-vision", "--target", "vision=qnn:npu:sm8650", "-o"]
    assert main([*argv, str(tmp_path / "b"), "--calibration", str(pictures)]) == 1
    assert "are too few to measure ranges" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    argv = ["compile", str(made.graphs), "--target", "qnn:npu:sm8650", "-o", str(tmp_path / "b"), "--calibration"]
    assert main([*argv, str(pictures)]) == 2
    assert "no target of this command looks at pictures" in capsys.readouterr().err
    assert main([*argv[:-1], "--target", "qnn:npu:sm8560"]) == 1
    assert "expected one of sm8550" in capsys.readouterr().err
