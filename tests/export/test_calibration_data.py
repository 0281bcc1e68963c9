"""What a quantizer is shown: where the pictures come from, what is fed of them, and folders that do not do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="pip install 'lensc[export]'")

from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import InputError, PictureError, UnavailableError
from lensc.export import calibration
from lensc.export.calibration import calibration_set
from lensc.export.calibration_text import SHIPPED, TEXTS
from lensc.export.checkpoint import Checkpoint
from lensc.export.demo import CHECKPOINT
from lensc.export.demo.content import held_out
from lensc.export.question_folder import Item
from lensc.runtime.prompt import Tokenizer


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return Checkpoint(CHECKPOINT).model_spec()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(CHECKPOINT / "tokenizer.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, of one and of three slices."""
    made = tmp_path / "pictures"
    made.mkdir()
    Image.linear_gradient("L").resize((90, 60)).save(made / "a.png")
    Image.radial_gradient("L").resize((230, 100)).save(made / "b.JPG", format="JPEG")
    return made


# --- samples --------------------------------------------------------------------------------------------------------


def test_answers_stand_behind_prompts_with_the_slices_in_their_places(spec: ModelSpec, tokenizer: Tokenizer) -> None:
    data = calibration_set(spec, tokenizer)
    assert 20 <= data.pictures <= 60 and "built in: " in str(data) and f"{data.tokens} tokens" in str(data)
    with_answer = 0
    for sample in data.samples:
        assert len(sample.image_bounds) == len(sample.slices)
        for start, stop in sample.image_bounds:
            assert stop - start == spec.picture.query_num and stop < sample.prompt_tokens
            assert (sample.ids[start:stop] == tokenizer.special.unk).all()
        assert sample.ids[sample.prompt_tokens - 4] == tokenizer.special.start_header
        with_answer += len(sample.ids) > sample.prompt_tokens
    texts = [tokenizer.decode(sample.ids[sample.prompt_tokens :].tolist()) for sample in data.samples]
    assert SHIPPED["receipt.png"][1] in texts and texts[-1] == TEXTS[-1][1]
    assert with_answer >= len(data.samples) * 2 // 3


def test_the_same_data_have_the_same_hash_and_others_another(
    spec: ModelSpec, tokenizer: Tokenizer, folder: Path
) -> None:
    first = calibration_set(spec, tokenizer, folder).sha256
    assert first == calibration_set(spec, tokenizer, folder).sha256
    (folder / "questions.json").write_text(json.dumps({"a.png": {"answer": "7"}}))
    second = calibration_set(spec, tokenizer, folder).sha256
    picture = np.asarray(Image.open(folder / "a.png")).copy()
    picture[30, 40] ^= 255
    Image.fromarray(picture).save(folder / "a.png")
    assert len({first, second, calibration_set(spec, tokenizer, folder).sha256}) == 3


def test_the_demo_model_is_shown_its_own_tasks_and_nothing_held_out(spec: ModelSpec, tokenizer: Tokenizer) -> None:
    pytest.importorskip("font_roboto", reason="the demo fonts are not installed: pip install 'lensc[demo]'")
    items = list(calibration._demo())
    assert len(items) == sum(calibration.DEMO_SAMPLES.values())
    asked = {item.question for item in items}
    assert "Read the text." in asked and len(asked) > 5
    read = [item.answer for item in items if item.question == "Read the text."]
    lines = [text for text in read if "\n" not in text]
    assert len(lines) == calibration.DEMO_SAMPLES["line"] and not any(map(held_out, lines))
    data = calibration_set(spec, tokenizer, is_demo=True)
    assert "drawn for the demo model" in data.source and data.pictures == len(items)


def test_without_the_demo_fonts_the_built_in_pictures_are_taken(
    spec: ModelSpec, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> list[Item]:
        raise UnavailableError("demo fonts not found")

    monkeypatch.setattr(calibration, "_demo", missing)
    data = calibration_set(spec, tokenizer, is_demo=True)
    assert data.source == "built in, as the demo fonts are not installed (pip install 'lensc[demo]')"
    assert data.sha256 == calibration_set(spec, tokenizer).sha256


def test_an_answer_is_cut_to_the_context(spec: ModelSpec, tokenizer: Tokenizer, folder: Path) -> None:
    (folder / "questions.json").write_text(json.dumps({"a.png": {"answer": "long " * 5000}}))
    data = calibration_set(spec, tokenizer, folder)
    assert len(data.samples[0].ids) == spec.decoder.context_length


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_with_questions(spec: ModelSpec, tokenizer: Tokenizer, folder: Path) -> None:
    (folder / "questions.json").write_text(json.dumps({"b.JPG": {"question": "Which?", "answer": "the round one"}}))
    (folder / ".hidden").write_text("of the system")
    data = calibration_set(spec, tokenizer, folder)
    assert data.source == "folder pictures" and data.pictures == 2 and len(data.samples) == 2 + len(TEXTS)
    first, second = (tokenizer.decode(sample.ids.tolist()) for sample in data.samples[:2])
    assert "Describe the picture." in first and "Which?" in second and second.endswith("the round one")
    assert [len(sample.slices) for sample in data.samples[:3]] == [1, 3, 0]


def test_a_folder_that_is_none(spec: ModelSpec, tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--calibration .*absent: not found, expected a folder of pictures"):
        calibration_set(spec, tokenizer, tmp_path / "absent")
    with pytest.raises(InputError, match=r"a\.png: is a file"):
        calibration_set(spec, tokenizer, folder / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds no picture \(\.png, \.jpg, \.jpeg\)"):
        calibration_set(spec, tokenizer, tmp_path / "empty")


def test_all_pictures_that_cannot_be_read_are_listed(spec: ModelSpec, tokenizer: Tokenizer, folder: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:100])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    with pytest.raises(PictureError, match="3 of 5 pictures cannot be read") as caught:
        calibration_set(spec, tokenizer, folder)
    assert all(name in str(caught.value) for name in ("broken.png", "empty.jpg", "text.png"))
    assert "\n" not in str(caught.value)


def test_pictures_that_cannot_be_cut_are_listed(spec: ModelSpec, tokenizer: Tokenizer, folder: Path) -> None:
    Image.new("RGB", (60000, 1)).save(folder / "thin.png")
    with pytest.raises(PictureError, match=r"1 of \d+ cannot be used: .*thin\.png: 60000x1 is too thin"):
        calibration_set(spec, tokenizer, folder)


@pytest.mark.parametrize("name", ("notes.txt", "photo.webp", "more"))
def test_nothing_in_a_folder_is_passed_over(spec: ModelSpec, tokenizer: Tokenizer, folder: Path, name: str) -> None:
    (folder / name).mkdir() if name == "more" else (folder / name).write_bytes(b"x")
    with pytest.raises(InputError, match=rf"{name}: neither a picture \(\.png, \.jpg, \.jpeg\) nor questions\.json"):
        calibration_set(spec, tokenizer, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "list, expected an object of file name to question and answer"),
        ('{"c.png": {}}', r"'c\.png' is no picture of the folder"),
        ('{"a.png": "x"}', r"'a\.png' is 'x'; expected"),
        ('{"a.png": {"answer": 7}}', r"'a\.png' is \{'answer': 7\}"),
        ('{"a.png": {"reply": "7"}, "c.png": {}}', r"'c\.png' is no picture of the folder; 'a\.png' is \{'reply'"),
    ),
)
def test_wrong_questions(spec: ModelSpec, tokenizer: Tokenizer, folder: Path, text: str, message: str) -> None:
    (folder / "questions.json").write_text(text)
    with pytest.raises(InputError, match=message):
        calibration_set(spec, tokenizer, folder)
