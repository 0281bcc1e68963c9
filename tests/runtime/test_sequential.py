"""One graph at a time: never two, the same tokens, and what was loaded again is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lensc.backends.errors import ExecutionError, UsageError
from lensc.runtime.decoder import HostCachedSession
from lensc.runtime.pipeline import VLM
from lensc.runtime.sequential import Turns, in_turn

QUESTION = "What is it that can be seen here, in the left part and in the right part of it?"


class Loader:
    """Opens the fakes, and sees to it that no two are open."""

    def __init__(self, tiny: Any, keeps_cache: bool = False) -> None:
        self.tiny = tiny
        self.keeps_cache = keeps_cache
        self.loaded: list[str] = []
        self.open: list[Any] = []
        self.fails = ""

    def __call__(self, name: str) -> Any:
        assert not [s for s in self.open if not s.closed], "another graph is still open"
        if name == self.fails:
            raise ExecutionError(f"{name} cannot be loaded")
        self.loaded.append(name)
        fake = self.tiny.FakeVision() if name == "vision" else self.tiny.FakeDecoder()
        self.open.append(fake)
        return HostCachedSession(fake, self.tiny.SPEC.decoder) if self.keeps_cache and name == "decoder" else fake


def make(tiny: Any, loader: Loader, padding: Any = "masked") -> VLM:
    spec = dataclasses.replace(tiny.SPEC, picture=dataclasses.replace(tiny.SPEC.picture, vision_padding=padding))
    turns = Turns(loader)
    sessions = in_turn(turns, {"vision": tiny.FakeVision.spec, "decoder": tiny.FakeDecoder().spec})
    return VLM(spec, tiny.TOKENIZER, sessions, tiny.TABLE, turns=turns)


def turns_of(tiny: Any) -> list[list[dict[str, Any]]]:
    """A picture, a question about it, another picture."""
    first = [{"role": "user", "content": [{"type": "image", "image": tiny.picture()}, QUESTION]}]
    second = [*first, {"role": "assistant", "content": "a"}, {"role": "user", "content": "And?"}]
    content = [{"type": "image", "image": tiny.picture(seed=1)}, "And this?"]
    return [first, second, [*second, {"role": "assistant", "content": "b"}, {"role": "user", "content": content}]]


@pytest.mark.parametrize("keeps_cache", [False, True], ids=["host's cache", "engine's cache"])
def test_one_graph_at_a_time_gives_the_same_tokens(tiny: Any, keeps_cache: bool) -> None:
    loader = Loader(tiny, keeps_cache)
    vlm = make(tiny, loader)
    assert loader.loaded == ["decoder", "vision"], "each is tried once, and vision stays"
    expected = make_all(tiny)
    loaded = []
    for messages in turns_of(tiny):
        loader.loaded.clear()
        result = vlm.chat(messages, max_new_tokens=6)
        loaded.append(list(loader.loaded))
        assert result.token_ids == expected.chat(messages, max_new_tokens=6).token_ids
        notes = [n.split(" was loaded in ")[0] for n in result.metrics.notes if "was loaded in" in n]
        assert notes == loaded[-1] and (result.metrics.load_ms > 0) == bool(notes)
    assert loaded == [["decoder"], [], ["vision", "decoder"]]
    # what the engine holds is gone with it; what the host holds is gone on with
    assert (result.metrics.reused_tokens > 0) != keeps_cache
    vlm.close()
    assert all(s.closed == 1 for s in loader.open)
    with pytest.raises(UsageError, match="closed; load it again"):
        vlm.generate(QUESTION)


def make_all(tiny: Any) -> VLM:
    spec = dataclasses.replace(tiny.SPEC, picture=dataclasses.replace(tiny.SPEC.picture, vision_padding="masked"))
    return VLM(spec, tiny.TOKENIZER, {"vision": tiny.FakeVision(), "decoder": tiny.FakeDecoder()}, tiny.TABLE)


def test_a_stream_that_is_read_between_other_answers_goes_on(tiny: Any) -> None:
    vlm = make(tiny, Loader(tiny))
    expected = make_all(tiny).generate(QUESTION, [tiny.picture()], strip_pad=False).text
    stream = vlm.generate(QUESTION, [tiny.picture()], stream=True)
    text = ""
    for i, piece in enumerate(stream):
        text += piece
        vlm.generate("Else?", [tiny.picture(seed=i + 5)], max_new_tokens=2)
    assert text == expected


def test_a_graph_that_cannot_be_loaded_again_is_an_error_and_nothing_is_lost(tiny: Any) -> None:
    loader = Loader(tiny)
    vlm = make(tiny, loader)
    expected = vlm.generate(QUESTION, [tiny.picture()]).token_ids
    loader.fails = "vision"
    with pytest.raises(ExecutionError, match="vision cannot be loaded"):
        vlm.generate(QUESTION, [tiny.picture(seed=3)])
    assert vlm.generate(QUESTION, [tiny.picture()]).token_ids == expected, "its embeddings are remembered"
    loader.fails = ""
    vlm.generate(QUESTION, [tiny.picture(seed=3)])
