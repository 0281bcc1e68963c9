"""The shipped demo model: it reads, and a bundle built from it answers as the reference model does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("font_roboto", reason="the demo fonts are not installed: pip install 'lensc[demo]'")
pytest.importorskip("torch", reason="torch is not installed: pip install 'lensc[export]'")

import lensc
from lensc.backends.base import Target
from lensc.bench.demo import QUESTIONS
from lensc.bench.demo_accuracy import reference_answers
from lensc.export.build import build
from lensc.export.checkpoint import Checkpoint
from lensc.export.demo import CHECKPOINT, PICTURES
from lensc.export.demo.evaluate import evaluate, score
from lensc.export.demo.files import config_json, preprocessor_json
from lensc.export.demo.samples import TASKS, held_out_samples
from lensc.runtime.pipeline import VLM


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLM]:
    bundle = tmp_path_factory.mktemp("demo") / "bundle"
    build("demo", [Target.parse("onnxruntime:cpu")], bundle)
    with lensc.load(bundle) as loaded:
        yield loaded


def test_the_checkpoint_is_small_and_complete() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 24e6
    model = Checkpoint(CHECKPOINT).load_model()
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 15e6
    assert json.loads((CHECKPOINT / "config.json").read_text()) == config_json()
    assert json.loads((CHECKPOINT / "preprocessor_config.json").read_text()) == preprocessor_json()


def test_the_training_log_is_there() -> None:
    rows = [json.loads(line) for line in (CHECKPOINT / "train.jsonl").read_text().splitlines()]
    assert rows[0]["event"] == "start" and "seed" in rows[0]
    assert rows[-1]["event"] == "end"


def test_it_reads_lines_it_has_never_seen(vlm: VLM) -> None:
    """40 pictures: far below the accuracy in the README, far above a broken model."""
    result = score(evaluate(held_out_samples("line", 40), lambda i, q: vlm.generate(q, [i], max_new_tokens=40).text))
    assert result.exact >= 0.8
    assert result.cer <= 0.04


def test_it_compares_shapes(vlm: VLM) -> None:
    samples = [s for s in held_out_samples("question", 60) if s.kind == "bigger"]
    result = score(evaluate(samples, lambda i, q: vlm.generate(q, [i], max_new_tokens=10).text))
    assert result.exact >= 0.9


def test_its_tokens_are_the_reference_models(vlm: VLM) -> None:
    reference = reference_answers(CHECKPOINT)
    for task in TASKS:
        for sample in held_out_samples(task, 3, seed=5):
            ids = vlm.generate(sample.question, [sample.image], max_new_tokens=256).token_ids
            assert ids == reference(sample), (task, sample.answer)


@pytest.mark.parametrize("picture", QUESTIONS)
def test_the_shipped_pictures_are_answered(vlm: VLM, picture: str) -> None:
    result = vlm.generate(QUESTIONS[picture], [Path(PICTURES / picture)], max_new_tokens=256)
    assert result.finish_reason == "stop"
    assert result.text
