"""What does not fit the context: refused, cut off, or left out, and said so each time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lensc.backends.errors import PromptError, UsageError
from lensc.export.graph import DimRange
from lensc.runtime.context import Context
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Message, Picture, Prompt, Text

QUESTION = "What is in the picture?"
HEADER = 1
FULL = Context(100, 100)


def conversation(*roles: str, tokens: int) -> tuple[list[Message], Prompt]:
    """Messages of so many tokens each, and the prompt that they become, with the open header of an answer at its end."""
    messages = [Message(role, (Text(str(i)),)) for i, role in enumerate(roles)]
    return messages, prompt_of([tokens] * len(roles))


def prompt_of(tokens: list[int]) -> Prompt:
    ids = [i for count in tokens for i in [HEADER, *[5] * (count - 1)]]
    return Prompt(np.array([0, *ids, HEADER, 5]), np.empty((0, 2), np.int64))


def kept(messages: list[Message], prompt: Prompt, max_new_tokens: int = 10) -> tuple[list[str], str | None]:
    left, note = FULL.kept(messages, prompt, HEADER, max_new_tokens)
    return [part.text for m in left for part in m.content if isinstance(part, Text)], note


USER, SAYS = "user", "assistant"


def test_what_fits_is_kept() -> None:
    messages, prompt = conversation(USER, SAYS, USER, SAYS, USER, tokens=17)
    assert len(prompt.ids) == 88 and kept(messages, prompt) == (["0", "1", "2", "3", "4"], None)
    # of 100 tokens 12 are kept for the longest answer, no more
    assert kept(messages, prompt, 1000)[1] is None
    messages, prompt = conversation(USER, SAYS, USER, SAYS, USER, tokens=18)
    assert kept(messages, prompt)[1] is not None


def test_turns_go_as_a_whole_and_the_system_message_stays() -> None:
    messages, prompt = conversation("system", USER, USER, SAYS, USER, SAYS, USER, tokens=13)
    found, note = kept(messages, prompt)
    assert found == ["0", "4", "5", "6"]
    assert note == (
        "the oldest turn of the conversation was left out, 39 tokens: the whole has 94, the model's context is 100 and 10 are "
        "kept for the answer"
    )


def test_pictures_that_go_are_counted() -> None:
    messages, prompt = conversation(USER, SAYS, USER, SAYS, USER, tokens=20)
    messages[0] = Message(USER, (Picture(b""), Picture(b""), Text("0")))
    assert "the oldest turn of the conversation was left out, 40 tokens with 2 pictures" in str(
        kept(messages, prompt)[1]
    )


def test_the_turns_that_follow_drop_the_same_ones() -> None:
    """Each turn is 10 tokens: two or three go at once, and the next ones find their beginning as it was."""
    first: list[int] = []
    for turns in range(9, 20):
        messages, prompt = conversation(*[USER, SAYS] * (turns - 1), USER, tokens=5)
        found, note = kept(messages, prompt)
        assert len(found) * 5 + 3 <= 90 and (note is None) == (len(prompt.ids) <= 90)
        first.append(int(found[0]))
    assert first == sorted(first) and len(set(first)) == 6 and len(first) == 11


def test_the_last_question_is_never_left_out() -> None:
    messages, _ = conversation(USER, SAYS, USER, tokens=5)
    assert kept(messages, prompt_of([5, 5, 200]))[0] == ["2"]
    alone, prompt = conversation(USER, tokens=200)
    assert kept(alone, prompt) == (["0"], None)


def talk(turns: int, words: int = 9) -> list[dict[str, Any]]:
    said = [
        [{"role": "user", "content": f"{i} " + "word " * words}, {"role": "assistant", "content": "Yes."}]
        for i in range(turns)
    ]
    return [message for turn in said for message in turn][:-1]


def test_a_chat_goes_on_without_its_oldest_turns(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    with pytest.raises(PromptError, match="shorten the text or leave out early turns"):
        vlm.chat(talk(12))
    found = vlm.chat(talk(12), when_full="drop_oldest")
    notes = [note for note in found.metrics.notes if "left out" in note]
    assert len(notes) == 1 and found.metrics.prompt_tokens + 12 <= tiny.CONTEXT
    dropped = int(notes[0].split()[2]) if "turns of" in notes[0] else 1
    assert found.token_ids == tiny.make()[0].chat(talk(12)[2 * dropped :]).token_ids
    following = [vlm.chat(talk(turns, 2), when_full="drop_oldest").metrics for turns in range(20, 26)]
    assert sum(metrics.reused_tokens > metrics.prompt_tokens // 2 for metrics in following) >= 2
    streamed = vlm.chat(talk(12), when_full="drop_oldest", stream=True)
    assert list(streamed) and notes[0] in streamed.result.metrics.notes
    with pytest.raises(UsageError, match="when_full='never': expected error or drop_oldest"):
        vlm.chat(talk(1), when_full="never")
    with pytest.raises(PromptError, match="the prompt has"):
        vlm.chat([*talk(2), *talk(1, 300)[:1]], when_full="drop_oldest")


def test_pictures_of_turns_that_go_are_not_encoded(tiny: Any) -> None:
    vlm, vision, _ = tiny.make()
    messages = talk(12)
    messages[0] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    messages[-1] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And here?"}]}
    for more in ({}, {"max_ttft_ms": 1e6}):
        vision.runs.clear()
        vlm.forget(pictures=True)
        found = vlm.chat(messages, [tiny.picture(seed=1), tiny.picture(seed=2)], when_full="drop_oldest", **more)
        assert any("with 1 picture" in note for note in found.metrics.notes)
        assert len(vision.runs) == len(found.metrics.image_ms) == 1


def test_an_answer_that_is_cut_off_says_by_what(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    result = vlm.generate("a " * 100, max_new_tokens=500)
    assert len(result.token_ids) + result.metrics.prompt_tokens == tiny.CONTEXT
    assert result.finish_reason == "length"
    said = f"the model's context is 160, {result.metrics.prompt_tokens} of that are the prompt's"
    assert f"the answer was cut off after {len(result.token_ids)} tokens: {said}" in result.metrics.notes
    for more in ({}, {"num_beams": 2}):
        result = vlm.generate(QUESTION, max_new_tokens=1, **more)
        assert "the answer was cut off after 1 token: max_new_tokens is 1" in result.metrics.notes
    stop = vlm.generate(QUESTION).token_ids[4]
    spec = dataclasses.replace(tiny.SPEC, generation=dataclasses.replace(tiny.SPEC.generation, eos_token_ids=(stop,)))
    whole = tiny.make(spec)[0].generate(QUESTION)
    assert whole.finish_reason == "stop" and not any("cut off" in note for note in whole.metrics.notes)


def test_a_prompt_longer_than_the_context_is_refused_with_numbers(tiny: Any) -> None:
    vlm, vision, decoder = tiny.make()
    expected = (
        r"the prompt has \d+ tokens \(1 slices of 3 among them\), 159 fit: the model's context is 160 and the answer "
    )
    with pytest.raises(
        PromptError, match=expected + r"needs at least 1; shorten the text or use fewer or smaller pictures$"
    ):
        vlm.generate("many words " * 100, [tiny.picture()])
    assert not vision.runs and not decoder.tokens


def test_a_decoder_with_a_context_of_its_own(tiny: Any) -> None:
    """As one on an NPU has: what it says is what the decoder takes, and how to have more."""
    decoder = tiny.FakeDecoder()
    decoder.spec = dataclasses.replace(decoder.spec, dims=decoder.spec.dims | {"past": DimRange(0, 8, 40)})
    vlm = VLM(tiny.SPEC, tiny.TOKENIZER, {"vision": tiny.FakeVision(), "decoder": decoder}, tiny.TABLE)
    assert vlm.context == Context(40, 160) and str(vlm.context) == "this decoder's context is 40"
    with pytest.raises(PromptError, match=r"39 fit: .* or compile .* with a larger --context \(the model's is 160\)$"):
        vlm.generate("word " * 60)
    result = vlm.generate("word " * 5, max_new_tokens=100)
    assert len(result.token_ids) + result.metrics.prompt_tokens == 40
    assert any("this decoder's context is 40" in note for note in result.metrics.notes)
    assert any("left out" in n for n in vlm.chat(talk(4), when_full="drop_oldest", max_new_tokens=2).metrics.notes)
