"""Answers in pieces."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest

from lensc.backends.errors import PictureError, PromptError, UsageError

QUESTION = "What is it?"


def test_pieces_join_to_the_text_of_the_whole(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    whole = vlm.generate(QUESTION, strip_pad=False)
    stream = vlm.generate(QUESTION, stream=True)
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text == whole.text
    assert stream.result.token_ids == whole.token_ids and stream.result.finish_reason == whole.finish_reason
    assert len(pieces) > 2


def test_exclamation_marks_stay_in_streams_and_leave_whole_answers(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, _, _ = tiny.make()
    ids = iter(tiny.TOKENIZER.encode("Stop! Now! Here.") * 2)
    monkeypatch.setattr("lensc.runtime.generation.greedy", lambda logits: next(ids))
    count = len(tiny.TOKENIZER.encode("Stop! Now! Here."))
    whole = vlm.generate(QUESTION, max_new_tokens=count)
    stream = vlm.generate(QUESTION, max_new_tokens=count, stream=True)
    assert (whole.text, "".join(stream)) == ("Stop Now Here.", "Stop! Now! Here.")
    assert whole.token_ids == stream.result.token_ids


def test_strip_pad_can_be_chosen(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, _, _ = tiny.make()
    ids = tiny.TOKENIZER.encode("Stop! Now!")
    for stream, strip in itertools.product((False, True), repeat=2):
        forced = iter(ids)
        monkeypatch.setattr("lensc.runtime.generation.greedy", lambda logits, forced=forced: next(forced))
        answer: Any = vlm.generate(QUESTION, max_new_tokens=len(ids), stream=stream, strip_pad=strip)
        text = "".join(answer) if stream else answer.text
        assert text == ("Stop Now" if strip else "Stop! Now!")


def test_a_stream_runs_only_when_read(tiny: Any) -> None:
    vlm, vision, decoder = tiny.make()
    stream = vlm.generate(QUESTION, [tiny.picture()], stream=True)
    assert not vision.runs and not decoder.tokens
    next(stream)
    assert vision.runs and decoder.tokens


def test_bad_input_is_refused_before_a_stream_is_made(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    with pytest.raises(PromptError):
        vlm.generate("word " * 500, stream=True)
    with pytest.raises(PictureError):
        vlm.generate(QUESTION, ["missing.png"], stream=True)


def test_cancel_ends_a_stream(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    full = vlm.generate(QUESTION, strip_pad=False)
    stream = vlm.generate(QUESTION, stream=True)
    first = next(stream)
    with pytest.raises(UsageError, match="has not ended"):
        _ = stream.result
    stream.cancel()
    result = stream.result
    assert result.finish_reason == "cancelled"
    assert full.text.startswith(first) and full.token_ids[: len(result.token_ids)] == result.token_ids
    assert len(result.token_ids) < len(full.token_ids)
    assert list(stream) == []


def test_two_streams_can_be_read_in_turns(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    expected = [vlm.generate(q, strip_pad=False).text for q in ("One?", "Two?")]
    streams = [vlm.generate(q, stream=True) for q in ("One?", "Two?")]
    texts = ["", ""]
    for pair in itertools.zip_longest(*streams, fillvalue=""):
        texts = [t + p for t, p in zip(texts, pair, strict=True)]
    assert texts == expected


@pytest.mark.parametrize("pieces", [0, 2], ids=["not begun", "halfway"])
def test_a_dropped_stream_frees_its_cache_at_once(tiny: Any, pieces: int) -> None:
    """And not when the collector of circles comes by, which counts objects and not the gigabytes that they hold."""
    vlm, _, _ = tiny.make()
    gc.collect()
    gc.disable()
    try:
        stream = vlm.generate("What is it?", [tiny.picture()], stream=True)
        for _ in range(pieces):
            next(stream)
        cache = weakref.ref(stream._generation.decoder.cache)
        assert cache() is not None
        del stream
        assert cache() is None
    finally:
        gc.enable()
