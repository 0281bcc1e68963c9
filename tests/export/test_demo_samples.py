"""The demo pictures: the same everywhere, nothing held out in training, glyphs where the ink is."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np
import pytest

pytest.importorskip("font_roboto", reason="the demo fonts are not installed: pip install 'lensc[demo]'")
pytest.importorskip("torch", reason="torch is not installed: pip install 'lensc[export]'")

from lensc.export.demo import samples
from lensc.export.demo.batches import IGNORED, PATCH_CLASSES, Encoder, Stage, draw_samples, make_batch
from lensc.export.demo.content import CHARSET, SHAPES, Page, form, held_out, line_text, receipt
from lensc.export.demo.draw import draw_page, draw_scene
from lensc.export.demo.evaluate import Outcome, edit_distance, score
from lensc.export.demo.files import QUERIES, picture_spec
from lensc.export.demo.tokenizer import WORDS, first_added_id, write_tokenizer
from lensc.runtime.picture import plan_slices
from lensc.runtime.prompt import Text, Tokenizer, build_prompt, user_messages


@pytest.mark.parametrize("task", samples.TASKS)
def test_evaluation_pictures_are_the_same_every_time(task: str) -> None:
    first, again = (samples.held_out_samples(task, 6) for _ in range(2))
    assert [(s.question, s.answer, s.image.tobytes()) for s in first] == [
        (s.question, s.answer, s.image.tobytes()) for s in again
    ]
    other = samples.held_out_samples(task, 6, seed=1)
    assert [s.image.tobytes() for s in first] != [s.image.tobytes() for s in other]


def test_lines_are_held_out_or_trained_on_never_both() -> None:
    rng = Random(0)
    evaluation = {line_text(rng, True) for _ in range(300)}
    training = {line_text(rng, False) for _ in range(3000)}
    assert not evaluation & training
    assert all(held_out(text) for text in evaluation)
    assert all(4 <= len(text) <= 16 and set(text) <= set(CHARSET + " ") for text in evaluation | training)


def test_about_five_percent_is_held_out() -> None:
    share = sum(held_out(str(i)) for i in range(20_000)) / 20_000
    assert 0.045 < share < 0.056
    assert held_out("x") == (sha256(b"x").digest()[0] < 13)


def test_a_line_is_one_slice_and_a_page_is_several() -> None:
    spec = picture_spec()
    for sample in samples.held_out_samples("line", 40):
        assert plan_slices(*sample.image.size, spec).grid is None
    for sample in samples.held_out_samples("page", 40):
        assert plan_slices(*sample.image.size, spec).grid is not None
        assert sample.answer.count("\n") >= 1


def test_a_receipt_adds_up_and_a_form_holds_its_facts() -> None:
    rng = Random(3)
    page = receipt(rng, False, 6)
    prices = [float(parts[1]) for parts in page.lines[1:]]
    assert sum(prices[:-1]) == pytest.approx(prices[-1])
    assert page.facts["total"] == page.lines[-1][1]
    page = form(rng, False, 4)
    assert all(value in page.text for value in page.facts.values())


@pytest.mark.parametrize("seed", range(12))
def test_glyphs_stand_where_the_ink_is(seed: int) -> None:
    """Painting over every glyph's cell leaves (nearly) no ink: slanted strokes may lean over by a pixel or two."""
    rng = Random(seed)
    drawing = draw_page(rng, Page((("Hxk 47",), ("Qg 83",))), 112 * 112 * 3)
    pixels = np.asarray(drawing.image).astype(int)
    paper = np.median(pixels.reshape(-1, 3), axis=0)
    ink = np.abs(pixels - paper).sum(axis=2) > 120
    total = ink.sum()
    assert total > 200
    for glyph in drawing.glyphs:
        rows = slice(max(0, int(glyph.top)), int(glyph.bottom) + 2)
        columns = slice(max(0, int(glyph.left) - 1), int(glyph.right) + 2)
        assert ink[rows, columns].any(), glyph
        ink[rows, columns] = False
    assert ink.sum() < 0.03 * total
    assert "".join(g.char for g in drawing.glyphs) == "Hxk47Qg83"


def test_shapes_do_not_overlap_and_each_is_seen() -> None:
    rng = Random(5)
    for _ in range(40):
        wanted = [(kind, "red", 0.1) for kind in SHAPES]
        drawing = draw_scene(rng, wanted, 12000)
        if drawing is not None:
            pixels = np.asarray(drawing.image).astype(int)
            red = np.abs(pixels - np.array((214, 40, 40))).sum(axis=2) < 90
            assert red.sum() > 4 * 0.5 * (2 * 0.1 * min(drawing.image.size)) ** 2 * 0.3
    assert draw_scene(rng, [("circle", "red", 0.6)], 12000) is None


@pytest.mark.parametrize("kind", ["colour", "count", "bigger", "field"])
def test_questions_have_short_answers(kind: str) -> None:
    rng = Random(7)
    for _ in range(20):
        sample = samples.question(rng, True, kind)
        assert sample.kind == kind
        assert sample.question.endswith("?")
        assert 1 <= len(sample.answer) <= 12


def test_the_tokenizer_reads_like_the_official_one(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    base = first_added_id()
    assert tokenizer.vocab_size == base + 256
    assert tokenizer.encode("!") == [0]
    assert tokenizer.encode_special("<|begin_of_text|><|eot_id|><image></slice>") == [
        base,
        base + 9,
        base + 10,
        base + 21,
    ]
    ids = tokenizer.encode("Read the text.")
    assert len(ids) == 4
    for text in ("Zoë €5.50", "a\n\nb", "<image>", "7Kx9"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(set(WORDS)) == len(WORDS)


def test_batches_hold_the_runtimes_prompt(tmp_path: Path) -> None:
    """What is trained on is, token by token, what the runtime will send."""
    from tokenizers import Tokenizer as Raw

    write_tokenizer(tmp_path)
    spec, tokenizer = picture_spec(), Tokenizer.from_file(tmp_path / "tokenizer.json")
    encoder = Encoder(Raw.from_file(str(tmp_path / "tokenizer.json")), QUERIES)
    drawn = [samples.page(Random(1), False, 4), samples.line(Random(2), False)]
    batch = make_batch(drawn, spec, encoder)
    first_row = 0
    for i, sample in enumerate(drawn):
        plan = plan_slices(*sample.image.size, spec)
        prompt = build_prompt(user_messages(sample.question, [sample.image]), [plan], tokenizer, QUERIES)
        length = len(prompt.ids)
        assert batch.ids[i, :length].tolist() == list(prompt.ids)
        answer = tokenizer.encode(sample.answer)
        assert batch.targets[i, length - 1 : length - 1 + len(answer)].tolist() == list(answer)
        assert (batch.targets[i, : length - 1] == IGNORED).all()
        rows = len(prompt.image_bounds) * QUERIES
        starts = batch.image_rows[first_row : first_row + rows].reshape(-1, QUERIES)
        first_row += rows
        assert (starts[:, 0] - i * batch.ids.shape[1]).tolist() == [int(b[0]) for b in prompt.image_bounds]


def test_batches_hold_the_runtimes_patches(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Raw

    from lensc.runtime.picture import slice_picture, vision_feeds

    write_tokenizer(tmp_path)
    spec = picture_spec()
    sample = samples.page(Random(4), False, 3)
    batch = make_batch([sample], spec, Encoder(Raw.from_file(str(tmp_path / "tokenizer.json")), QUERIES))
    feeds = vision_feeds(slice_picture(sample.image, spec).pixels, spec, 256)[0].feeds
    own = batch.lengths[:, None] > np.arange(batch.patches.shape[1])
    np.testing.assert_allclose(batch.patches[own] / 127.5 - 1, feeds["patches"][own], atol=1e-6)
    np.testing.assert_array_equal(batch.position_ids, feeds["position_ids"])
    np.testing.assert_array_equal(batch.classes == IGNORED, ~own)
    assert batch.classes.max() < PATCH_CLASSES
    seen = {CHARSET[c - 1] for c in batch.classes[batch.classes > 0]}
    narrow = set("Iijl1.,:;'()/ \n")  # may lie between two patches' centres
    assert seen >= set(sample.answer) - narrow


def test_every_shape_has_a_patch(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Raw

    write_tokenizer(tmp_path)
    encoder = Encoder(Raw.from_file(str(tmp_path / "tokenizer.json")), QUERIES)
    rng = Random(11)
    for _ in range(20):
        sample = samples.question(rng, False, "count")
        batch = make_batch([sample], picture_spec(), encoder)
        seen = set(batch.classes[batch.classes > len(CHARSET)].tolist())
        kinds = {(s.kind, s.colour) for s in sample.drawing.shapes}
        assert len(seen) == len(kinds)


def test_a_stage_draws_what_it_says() -> None:
    rng = Random(9)
    lines = [s for _ in range(6) for s in draw_samples(rng, Stage(5, 0, 0.0, 0.0, 0.0), 8)]
    assert all(s.task == "line" and len(s.answer) <= 5 for s in lines)
    pages = [s for _ in range(4) for s in draw_samples(rng, Stage(16, 2, 0.0, 1.0, 0.0), 16)]
    assert {s.task for s in pages} == {"page"}


def test_scoring() -> None:
    assert [edit_distance(*p) for p in (("", ""), ("abc", "abc"), ("abc", "axc"), ("ab", "abcd"), ("kitten", "sitting"))] == [
        0, 0, 1, 2, 3,
    ]  # fmt: skip
    right, wrong = samples.held_out_samples("line", 2)
    result = score([Outcome(right, right.answer), Outcome(wrong, wrong.answer + "x")])
    assert result.exact == 0.5
    assert result.cer == pytest.approx(1 / (len(right.answer) + len(wrong.answer)))


def test_a_text_part_is_no_placeholder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    message = user_messages("<image>", [])[0]
    assert message.content == (Text("<image>"),) or list(message.content) == [Text("<image>")]
    assert first_added_id() + 10 not in tokenizer.encode("<image>")
