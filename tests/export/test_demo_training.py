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

from lensc.backends.errors import CheckpointError, ExecutionError, StorageError, UnavailableError
from lensc.export.checkpoint import Checkpoint
from lensc.export.demo.learner import Recipe
from lensc.export.demo.samples import held_out_samples
from lensc.export.demo.train import PAGES, START, STATE, WHOLE, Budget, Drawing, Machine, Position, next_stage, train
from lensc.export.models.session import torch_sessions
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Tokenizer

ONE = Machine(threads=1)
SMALL = Recipe(seed=3, slices_per_batch=24, vision_share=0.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps: the first 20 on the vision tower, pages from step 18 on."""
    folder = tmp_path_factory.mktemp("demo")
    train(folder, Budget(minutes=5, steps=40), SMALL, machine=ONE)
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
    end = train(trained, Budget(minutes=5, steps=43), SMALL, resume=True, machine=ONE)
    assert end.step == 43
    assert rows(trained)[before]["step"] == 40
    assert rows(trained)[before]["event"] == "start"


def test_it_goes_on_from_given_weights(trained: Path, tmp_path: Path) -> None:
    end = train(tmp_path, Budget(minutes=5, steps=2), SMALL, init=trained, machine=Machine(threads=1, drawers=2))
    assert end.stage in (PAGES, WHOLE)
    first = rows(tmp_path)[0]
    assert first["init"] == str(trained)
    assert first["vision_share"] == 0.0


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UnavailableError, match="sees no GPU here; use --device cpu"):
        train(tmp_path, Budget(1), SMALL, machine=Machine("cuda"))


def test_a_dead_drawing_process_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("not a tokenizer")
    drawing = Drawing(tmp_path, SMALL, Position(), 1)
    try:
        with pytest.raises(ExecutionError, match="drawing process ended with 1"):
            drawing.next()
    finally:
        drawing.end()


def test_nothing_to_resume_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(tmp_path, Budget(1), SMALL, resume=True, machine=ONE)
    (tmp_path / STATE).write_bytes(b"not a state")
    with pytest.raises(CheckpointError, match="not a state of this training"):
        train(tmp_path, Budget(1), SMALL, resume=True, machine=ONE)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        train(tmp_path / "file", Budget(1), SMALL, machine=ONE)


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
