"""The training script, for real but briefly: it learns, writes a checkpoint that loads and answers, and resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("font_roboto", reason="the demo fonts are not installed: pip install 'lensc[demo]'")
pytest.importorskip("torch", reason="torch is not installed: pip install 'lensc[export]'")

from lensc.backends.errors import CheckpointError, StorageError
from lensc.export.checkpoint import Checkpoint
from lensc.export.demo.learner import Recipe
from lensc.export.demo.samples import held_out_samples
from lensc.export.demo.train import PAGES, START, STATE, WHOLE, Budget, next_stage, train
from lensc.export.models.session import torch_sessions
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Tokenizer

SMALL = Recipe(seed=3, slices_per_batch=24, vision_share=0.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps: the first 20 on the vision tower, pages from step 18 on."""
    folder = tmp_path_factory.mktemp("demo")
    train(folder, Budget(minutes=5, steps=40), SMALL, threads=1)
    return folder


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_it_learns(trained: Path) -> None:
    start, *_, end = rows(trained)
    assert start["event"] == "start"
    assert end["event"] == "end"
    assert end["step"] == 40
    # At the start the head knows nothing (ln 79 = 4.4) and neither does the decoder (ln 560 = 6.3).
    assert end["aux"] < 3.7
    assert min(end.get(task, 9.0) for task in ("line", "page", "question")) < 6.0


def test_the_checkpoint_loads_and_answers(trained: Path) -> None:
    checkpoint = Checkpoint(trained)
    model = checkpoint.load_model()
    table = model.llm.model.embed_tokens.weight.detach().numpy()
    sample = held_out_samples("line", 1)[0]
    with VLM(
        checkpoint.model_spec(), Tokenizer.from_file(trained / "tokenizer.json"), torch_sessions(model), table
    ) as vlm:
        result = vlm.generate(sample.question, [sample.image], max_new_tokens=4)
    assert 1 <= result.metrics.new_tokens <= 4
    assert (trained / "model.safetensors").stat().st_size < 24e6


def test_it_resumes_where_it_stopped(trained: Path) -> None:
    before = len(rows(trained))
    end = train(trained, Budget(minutes=5, steps=43), SMALL, resume=True, threads=1)
    assert end.step == 43
    assert rows(trained)[before]["step"] == 40
    assert rows(trained)[before]["event"] == "start"


def test_nothing_to_resume_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(tmp_path, Budget(1), SMALL, resume=True, threads=1)
    (tmp_path / STATE).write_bytes(b"not a state")
    with pytest.raises(CheckpointError, match="not a state of this training"):
        train(tmp_path, Budget(1), SMALL, resume=True, threads=1)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        train(tmp_path / "file", Budget(1), SMALL, threads=1)


def test_absurd_flags_are_usage_errors() -> None:
    command = [sys.executable, "-m", "lensc.export.demo.train", "-o", "nowhere", "--minutes", "-1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--minutes -1.0: expected at least 0.01" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_curriculum() -> None:
    assert next_stage(START, 0.1, 0.5, 4.0) == START
    assert next_stage(START, 0.1, 0.3, 4.0) == replace(START, longest=8)
    assert next_stage(replace(START, longest=16), 0.2, 0.3, 4.0) == PAGES
    assert next_stage(START, 0.46, 3.0, 4.0) == PAGES
    assert next_stage(PAGES, 0.3, 0.9, 0.5) == PAGES
    assert next_stage(PAGES, 0.3, 0.9, 0.2) == WHOLE
    assert next_stage(WHOLE, 0.3, 0.9, 0.9) == WHOLE
    assert next_stage(START, 0.73, 3.0, 4.0) == WHOLE
