"""What prompts have in common with earlier ones is fed once, and whoever owns a cache owns it alone."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest

from lensc.backends.errors import ExecutionError
from lensc.runtime.kv_cache import KVCache
from lensc.runtime.pipeline import VLM
from lensc.runtime.prefix_cache import LEAST, PrefixCache, common_length, token_rows

LONG = "What is it that can be seen here, in the left part and in the right part of it, and why is it there at all?"
"""As long as two prompts must be alike."""


def turns(*texts: str, images: Any = ()) -> list[dict[str, Any]]:
    """A conversation: user and assistant take turns, pictures are in the first message."""
    roles = itertools.cycle(("user", "assistant"))
    messages: list[dict[str, Any]] = [{"role": next(roles), "content": text} for text in texts]
    messages[0]["content"] = [*({"type": "image", "image": i} for i in images), {"type": "text", "text": texts[0]}]
    return messages


def without(tiny: Any, spec: Any = None) -> VLM:
    parts = {"vision": tiny.FakeVision(), "decoder": tiny.FakeDecoder()}
    return VLM(spec or tiny.SPEC, tiny.TOKENIZER, parts, tiny.TABLE, prefix_cache_bytes=0)


def test_a_turn_feeds_only_what_is_new(tiny: Any) -> None:
    vlm, vision, decoder = tiny.make()
    images = [tiny.picture(56, 30)]
    first = vlm.chat(turns(LONG, images=images), max_new_tokens=4)
    fed, encoded = sum(decoder.tokens), len(vision.runs)
    vlm._vision._cache.clear()
    messages = turns(LONG, first.text, "And?", images=images)
    second = vlm.chat(messages)
    metrics = second.metrics
    assert metrics.reused_tokens >= first.metrics.prompt_tokens
    assert sum(decoder.tokens) - fed == metrics.prompt_tokens - metrics.reused_tokens + len(second.token_ids) - 1
    assert len(vision.runs) == encoded, "what is in the KV cache need not be encoded, remembered or not"
    assert metrics.slices_from_cache == len(metrics.image_ms) == encoded
    assert second.token_ids == without(tiny).chat(messages).token_ids
    assert metrics.kv_cache_bytes == (metrics.prompt_tokens + len(second.token_ids) - 1) * 2 * tiny.LAYERS * tiny.D * 4


def test_the_same_prompt_again_feeds_its_last_row(tiny: Any) -> None:
    vlm, _, decoder = tiny.make()
    first = vlm.generate(LONG)
    decoder.tokens.clear()
    again = vlm.generate(LONG)
    assert again.token_ids == first.token_ids
    assert again.metrics.reused_tokens == first.metrics.prompt_tokens - 1
    assert decoder.tokens[0] == 1


def test_another_picture_in_the_same_place_is_another_prompt(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    a, b = tiny.picture(seed=1), tiny.picture(seed=2)
    vlm.chat(turns(LONG, images=[tiny.picture(), a]))
    other = turns(LONG, images=[tiny.picture(), b])
    result = vlm.chat(other)
    assert result.metrics.reused_tokens == 0, "too little is the same"
    assert result.token_ids == without(tiny).chat(other).token_ids


@pytest.mark.parametrize(("padding", "reused"), [("official", False), ("masked", True), ("per_slice", True)])
def test_a_picture_that_is_padded_otherwise_is_another_one(tiny: Any, padding: Any, reused: bool) -> None:
    """Under "official" the larger slices of a second picture change the features of the first."""
    spec = dataclasses.replace(tiny.SPEC, picture=dataclasses.replace(tiny.SPEC.picture, vision_padding=padding))
    vlm, _, _ = tiny.make(spec)
    small, large = tiny.picture(28, 28), tiny.picture(49, 28, 1)
    first = vlm.chat(turns(LONG, images=[small]), max_new_tokens=4)
    messages = turns(LONG, first.text, "And?", images=[small])
    messages[-1]["content"] = [{"type": "image", "image": large}, "And?"]
    second = vlm.chat(messages, max_new_tokens=8)
    assert (second.metrics.reused_tokens >= first.metrics.prompt_tokens) == reused
    assert second.token_ids == without(tiny, spec).chat(messages, max_new_tokens=8).token_ids


def test_a_cancelled_prompt_is_gone_on_with_where_it_stopped(tiny: Any) -> None:
    """Chunks of 5 tokens: what is held ends within the rows of a slice."""
    expected = tiny.make()[0].generate(LONG, [tiny.picture(56, 30)]).token_ids
    for stop_at in range(1, 20):
        vlm, _, decoder = tiny.make()
        decoder.spec = dataclasses.replace(
            decoder.spec, dims=decoder.spec.dims | {"tokens": dataclasses.replace(decoder.spec.dims["tokens"], max=5)}
        )
        vlm._decoder.session.spec = decoder.spec
        asked = itertools.count()
        cut = vlm.generate(LONG, [tiny.picture(56, 30)], should_stop=lambda a=asked, s=stop_at: next(a) >= s)
        assert cut.finish_reason == "cancelled"
        whole = vlm.generate(LONG, [tiny.picture(56, 30)])
        assert whole.token_ids == expected
        held = sum(decoder.tokens) - (whole.metrics.prompt_tokens - whole.metrics.reused_tokens) - 11
        assert whole.metrics.reused_tokens in (0, min(held, whole.metrics.prompt_tokens - 1))


def test_an_answer_that_failed_leaves_nothing(tiny: Any) -> None:
    vlm, _, decoder = tiny.make()
    decoder.broken = True
    with pytest.raises(ExecutionError):
        vlm.generate(LONG)
    decoder.broken = False
    assert vlm.generate(LONG).metrics.reused_tokens == 0


def test_forget_and_close_free_what_was_kept(tiny: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        for end in ("forget", "close"):
            vlm, _, _ = tiny.make()
            stream = vlm.generate(LONG, stream=True)
            next(stream)
            cache = weakref.ref(stream._generation.decoder.cache)
            if end == "close":
                vlm.close()
            del stream
            assert (cache() is None) == (end == "close")
            vlm.forget()
            assert cache() is None
    finally:
        gc.enable()


def test_two_streams_of_one_prompt_do_not_share_a_cache(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    expected = vlm.generate(LONG, strip_pad=False).text
    streams = [vlm.generate(LONG, stream=True) for _ in range(3)]
    texts = ["", "", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        texts = [t + p for t, p in zip(texts, pieces, strict=True)]
    assert texts == [expected] * 3


# --- which are kept -----------------------------------------------------------------------------------------------


def cache_of(tiny: Any, rows: np.ndarray[Any, Any]) -> KVCache:
    cache = KVCache(tiny.SPEC.decoder, 150)
    cache.advance(len(rows))
    return cache


def rows(*ids: int) -> Any:
    return token_rows(list(ids))


ROW_BYTES = 2 * 2 * 8 * 4


def test_common_length() -> None:
    assert common_length(rows(1, 2, 3), rows(1, 2, 4, 5)) == 2
    assert common_length(rows(1, 2), rows(1, 2, 3)) == common_length(rows(1, 2, 3), rows(1, 2)) == 2
    assert common_length(rows(), rows(1)) == 0


def test_a_conversation_whose_most_part_differs_stays_if_there_is_room(tiny: Any) -> None:
    shared, a, b = (list(range(n, n + 40)) for n in (0, 100, 200))
    for limit, stays in ((1 << 20, True), (100 * ROW_BYTES, False)):
        kept = PrefixCache(limit)
        long = rows(*shared, *a, *a)
        kept.give(long, cache_of(tiny, long))
        taken = kept.take(rows(*shared, *b))
        assert taken is not None and taken.length == 40
        again = kept.take(long)
        assert (again is not None) == stays and again is not taken


def test_the_least_recently_used_goes_first_and_the_last_stays(tiny: Any) -> None:
    prompts = [rows(*range(n, n + 50)) for n in (0, 100, 200)]
    kept = PrefixCache(2 * 50 * ROW_BYTES)
    for prompt in prompts:
        kept.give(prompt, cache_of(tiny, prompt))
    used = kept.take(prompts[1])
    assert used is not None and used.length == 49
    kept.give(prompts[1], used)
    assert kept.take(rows(*range(300, 350))) is None
    assert [len(held.rows) for held in kept._held] == [50, 49], "the first was dropped when there were three"
    assert kept.take(prompts[0]) is None
    alone = PrefixCache(10 * ROW_BYTES)
    alone.give(prompts[0], cache_of(tiny, prompts[0]))
    assert len(alone._held) == 1, "the next turn needs it, whatever its size"
    assert alone.take(prompts[1]) is None and not alone._held, "but not beside an answer that has nothing of it"


def test_a_few_words_of_the_template_are_not_worth_a_cache(tiny: Any) -> None:
    kept = PrefixCache()
    prompt = rows(*range(LEAST + 5))
    kept.give(prompt, cache_of(tiny, prompt))
    assert kept.take(rows(*range(LEAST - 1), 500, 501)) is None
    assert len(kept._held) == 1
    found = kept.take(rows(*range(LEAST), 500, 501))
    assert found is not None and found.length == LEAST
