"""A bundle with its vision graph for a phone's NPU, from checkpoint to answer, by emulation."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="pip install 'lensc[export]'")
pytest.importorskip("onnxruntime_qnn", reason="pip install 'lensc[qnn]'")

import lensc
from lensc.backends import registry
from lensc.backends.base import StaticBackend
from lensc.backends.bundle import ModelSpec, load_manifest
from lensc.backends.errors import PromptError, UnavailableError
from lensc.cli import main
from lensc.export import compile_stages, questions, ranges
from lensc.export.calibration import calibration_set
from lensc.export.verify import Question, probe_feeds
from lensc.runtime.embedding import open_table
from lensc.runtime.tokenizer import Tokenizer

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


def test_the_decoder_runs_there_too_within_the_context_it_was_compiled_for(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graphs, bundle = str(made.graphs), str(tmp_path / "bundle")
    argv = ["compile", graphs, "--target", "onnxruntime:cpu", "--target", "decoder=qnn:npu:sm8650", "-o", bundle]
    assert main([*argv, "--context", "100000"]) == 2
    assert "--context 100000: expected 64 to" in capsys.readouterr().err
    assert main([*argv[:4], "-o", bundle, "--context", "128"]) == 2
    assert "--context 128: no decoder of this command has fixed shapes" in capsys.readouterr().err
    assert main([*argv, "--context", "128"]) == 0
    picture = Image.new("RGB", (56, 42), (200, 30, 60))
    answers = []
    for decoder in ("qnn:npu:sm8650", "onnxruntime:cpu"):
        with lensc.load(bundle, target=f"vision=onnxruntime:cpu,decoder={decoder}") as vlm:
            answers.append(vlm.generate("What?", [picture], max_new_tokens=5))
            context = vlm.context
            if decoder.startswith("qnn"):
                assert context.tokens == 128
                with pytest.raises(PromptError, match="this decoder's context is 128"):
                    vlm.generate("What? " * 200)
    assert answers[0].token_ids == answers[1].token_ids


def test_a_decoder_is_shown_prompts_with_their_pictures(made: Any) -> None:
    """Logits all along them: those of the last token alone leave the answers' out of range, 21 dB."""
    graphs = made.graphs
    manifest = load_manifest(graphs)
    portable = compile_stages.portable_graphs(graphs, manifest)
    data = calibration_set(manifest.model, Tokenizer.from_file(graphs / manifest.tokenizer))
    small = dataclasses.replace(data, samples=data.samples[:: len(data.samples) // 4])
    table = open_table(graphs, manifest.tables)
    backend = registry.get("qnn")
    assert isinstance(backend, StaticBackend)
    encode = ranges.prompt_rows(backend, portable["vision"], manifest.model, lambda: small, table.gather)
    plain = [table.gather(sample.ids)[: ranges.PROMPT_TOKENS] for sample in small.samples]
    differs = [bool((rows != other).any()) for rows, other in zip(encode, plain, strict=True)]
    assert differs == [bool(sample.slices) for sample in small.samples] and any(differs)
    feeds = ranges.prompt_samples(portable["decoder"], lambda: encode)
    probes = len(probe_feeds(portable["decoder"].spec)["inputs_embeds"])
    assert len(feeds) == len(encode) + probes
    for fed, rows in zip(feeds, encode, strict=False):
        spread = fed["logit_positions"]
        assert len(spread) >= min(len(rows), 64) and spread[0] == 0 and np.diff(spread).max() <= len(rows) // 64 + 1
