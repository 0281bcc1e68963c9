"""As few slices as a time to the first token asks for, by costs that are injected: 100 ms a slice, 1 ms a token."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from lensc.backends.errors import UsageError
from lensc.runtime.budget import Cuts, Fitting, Graphs
from lensc.runtime.costs import Curve
from lensc.runtime.picture import open_picture, plan_slices
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import user_messages
from lensc.runtime.sequential import Turns, in_turn

QUESTION = "What is it?"
SLICE_MS, TOKEN_MS = 1000.0, 10.0
"""So slow that what the test itself takes does not matter."""
SLACK_MS = 900.0


class Fixed(Curve):
    """So many ms for each unit, or for any number of them, whatever is measured."""

    def __init__(self, each_ms: float = 0.0, all_ms: float = 0.0) -> None:
        super().__init__()
        self.each_ms, self.all_ms = each_ms, all_ms

    def at(self, size: int) -> float | None:
        return self.all_ms + self.each_ms * size


def made(tiny: Any, most: int = 9, padding: Any = "masked", **options: Any) -> tuple[VLM, Any, Any]:
    picture = dataclasses.replace(tiny.SPEC.picture, max_slice_nums=most, vision_padding=padding)
    spec = dataclasses.replace(
        tiny.SPEC, picture=picture, decoder=dataclasses.replace(tiny.SPEC.decoder, context_length=600)
    )
    vision, decoder = tiny.FakeVision(), tiny.FakeDecoder()
    vlm = VLM(spec, tiny.TOKENIZER, {"vision": vision, "decoder": decoder}, tiny.TABLE, **options)
    vlm._vision.slice_ms = Fixed(all_ms=SLICE_MS)
    vlm._decoder = dataclasses.replace(vlm._decoder, prefill_ms=Fixed(TOKEN_MS))
    return vlm, vision, decoder


def slices_of(vlm: VLM, width: int, height: int, most: int) -> int:
    return len(plan_slices(width, height, dataclasses.replace(vlm.spec.picture, max_slice_nums=most)).sizes)


# --- costs --------------------------------------------------------------------------------------------------------


def test_a_curve_goes_through_what_was_measured() -> None:
    curve = Curve()
    assert curve.at(10) is None
    curve.add(100, 900)
    assert (curve.at(100), curve.at(50), curve.at(200)) == (900, 450, 1800), "the first counts while it is the only one"
    for ms in (200, 210, 5000):
        curve.add(100, ms)
    assert curve.at(100) == 210, "it was engines' preparation, and an interruption is one of many"
    curve.add(300, 410)
    assert (curve.at(200), curve.at(300), curve.at(600), curve.at(50)) == (310, 410, 820, 105)


SLICES = [(4, 9), (12, 9), (20, 9)]
"""Each is to be there for the tokens from 4, 12, 20 on; pieces are of 8 tokens."""


@pytest.mark.parametrize(
    ("overlap", "slice_ms", "slices", "expected"),
    [
        (False, 100, SLICES, 3 * 100 + 40 + 5),
        (True, 100, SLICES, 3 * 100 + 3 * 8 + 5),  # three pieces and the rest are behind the last slice
        (True, 1, SLICES, 1 + 40 + 5),  # the first piece waits for the first slice, then all are there
        (True, 100, [], 40 + 5),
    ],
)  # fmt: skip
def test_the_estimate_does_as_the_answer_does(
    tiny: Any, overlap: bool, slice_ms: float, slices: Any, expected: float
) -> None:
    vlm, _, _ = made(tiny)
    vlm._vision.slice_ms = Fixed(all_ms=slice_ms)
    loaded = dataclasses.replace(vlm._decoder, prefill_ms=Fixed(1.0))
    loaded.pace.plain_s = 0.005
    # 40 tokens in five pieces, and a last one of one token that costs a pass over the weights
    graphs = Graphs(vlm._vision, loaded, 8, 32, overlap)
    assert graphs.first_token_ms(slices, 41) == pytest.approx(expected)


# --- cuts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(84, 84), (140, 56), (30, 200)])
@pytest.mark.parametrize("padding", ["official", "masked"])
def test_the_finest_cut_within_the_budget(tiny: Any, size: Any, padding: Any) -> None:
    """Any cut can be had; the budget that one takes gives that one, a little less gives the next coarser one."""
    counts = sorted({slices_of(made(tiny)[0], *size, most) for most in range(1, 10)})
    assert len(counts) > 3
    for fewer, count in zip([0, *counts], counts, strict=False):
        vlm, vision, _ = made(tiny, padding=padding)
        alone = next(m for m in range(1, 10) if slices_of(vlm, *size, m) == count)
        prompt = made(tiny, alone)[0].prepare(user_messages(QUESTION, [tiny.picture(*size)])).prompt
        assert len(prompt.image_bounds) == count
        takes_ms = SLICE_MS * count + TOKEN_MS * len(prompt.ids)
        result = vlm.generate(QUESTION, [tiny.picture(*size)], max_new_tokens=2, max_ttft_ms=takes_ms + SLACK_MS)
        metrics = result.metrics
        assert len(metrics.image_ms) == len(vision.runs) == count
        assert metrics.prompt_tokens == len(prompt.ids)
        assert metrics.ttft_estimate_ms == pytest.approx(takes_ms, abs=SLACK_MS)
        assert metrics.slices_given_up == counts[-1] - count
        said = [note for note in metrics.notes if "instead of" in note]
        assert bool(said) == (count < counts[-1])
        for note in said:
            assert note.startswith(
                f"picture 1: {count} slice{'s' if count > 1 else ''} instead of {counts[-1]}, for max_"
            )
        exact = made(tiny, alone, padding)[0].generate(QUESTION, [tiny.picture(*size)], max_new_tokens=2)
        assert result.token_ids == exact.token_ids
        less = made(tiny, padding=padding)[0].prepare(user_messages(QUESTION, [tiny.picture(*size)]), takes_ms - 1)
        assert len(less.slices) == (fewer or count)


def test_of_several_pictures_the_one_with_most_slices_gives_up_first(tiny: Any) -> None:
    images = [tiny.picture(56, 56, 1), tiny.picture(84, 84, 2), tiny.picture(28, 28, 3)]
    vlm, _, _ = made(tiny)
    full = vlm.prepare(user_messages(QUESTION, images))
    assert full.slices_per_picture == (5, 10, 1)
    seen = []
    for budget in range(20_000, 4_000, -1000):
        request = made(tiny)[0].prepare(user_messages(QUESTION, images), budget)
        seen.append(request.slices_per_picture)
        assert request.ttft_estimate_ms is not None and request.ttft_estimate_ms <= budget
    found = list(dict.fromkeys(seen))
    assert found[0] == (5, 10, 1) and found[-1] == (1, 1, 1)
    assert all(a[0] == 5 for a in found if a[1] > 5)
    assert all(x >= y for a, b in itertools.pairwise(found) for x, y in zip(a, b, strict=True))


def test_what_cannot_be_kept_is_said_with_the_least(tiny: Any) -> None:
    vlm, vision, _ = made(tiny)
    result = vlm.generate(QUESTION, [tiny.picture(84, 84)], max_new_tokens=2, max_ttft_ms=500)
    assert len(vision.runs) == 1 and result.metrics.slices_given_up == 9
    [note] = [n for n in result.metrics.notes if "cannot" in n]
    assert note.startswith("max_ttft_ms=500 cannot be kept: the least is about 1")
    # without a picture there is nothing to give up
    result = vlm.generate(QUESTION, max_new_tokens=2, max_ttft_ms=5)
    assert result.metrics.slices_given_up == 0
    assert [n for n in result.metrics.notes if n.startswith("max_ttft_ms=5 cannot be kept")]
    result = vlm.generate(QUESTION, [tiny.picture(84, 84, 2)], max_new_tokens=2)
    assert (result.metrics.ttft_estimate_ms, result.metrics.slices_given_up) == (None, 0)


@pytest.mark.parametrize("padding", ["official", "masked"])
def test_a_picture_that_is_remembered_costs_nothing_to_see(tiny: Any, padding: Any) -> None:
    """All ten slices are kept, though encoding them would take ten times the budget; one beside it is cut coarsely."""
    vlm, vision, _ = made(tiny, padding=padding)
    known, new = tiny.picture(84, 84, 1), tiny.picture(84, 84, 2)
    vlm.generate(QUESTION, [known], max_new_tokens=2)
    vlm.forget()  # the KV caches, not the embeddings
    vision.runs.clear()
    result = vlm.generate("And now?", [known], max_new_tokens=2, max_ttft_ms=1500)
    assert not vision.runs and len(result.metrics.image_ms) == 10
    result = vlm.generate("And this?", [known, new], max_new_tokens=2, max_ttft_ms=3500)
    assert 1 <= len(vision.runs) < 5 and result.metrics.slices_given_up == 10 - len(vision.runs)
    assert result.metrics.image_ms[:10] == (0.0,) * 10
    # what the KV cache holds is not counted, either
    result = vlm.generate("And this?", [known, new], max_new_tokens=2, max_ttft_ms=100 + SLACK_MS)
    assert result.metrics.reused_tokens > 70
    assert result.metrics.ttft_estimate_ms == pytest.approx(10, abs=SLACK_MS)


def test_a_remembered_picture_is_cut_again_if_its_tokens_are_too_many(tiny: Any) -> None:
    vlm, _, _ = made(tiny)
    picture = tiny.picture(84, 84)
    vlm.generate(QUESTION, [picture], max_new_tokens=2)
    vlm.forget()
    vlm._decoder = dataclasses.replace(vlm._decoder, prefill_ms=Fixed(100.0))
    result = vlm.generate(QUESTION, [picture], max_new_tokens=2, max_ttft_ms=4500)
    assert 1 <= len(result.metrics.image_ms) < 10
    assert result.metrics.ttft_estimate_ms is not None and result.metrics.ttft_estimate_ms < 4500


def test_the_turns_of_a_chat_keep_their_cut(tiny: Any) -> None:
    """A finer one would have room for the next question, but would have to be encoded, and the turns before fed again."""
    vlm, vision, _ = made(tiny)
    content = [{"type": "image", "image": tiny.picture(84, 84)}, QUESTION]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    first = vlm.chat(messages, max_new_tokens=2, max_ttft_ms=4000)
    assert 1 < len(first.metrics.image_ms) < 10
    vision.runs.clear()
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And now?"}]
    second = vlm.chat(messages, max_new_tokens=2, max_ttft_ms=9000)
    assert not vision.runs and second.metrics.reused_tokens >= first.metrics.prompt_tokens - 1
    count = len(first.metrics.image_ms)
    assert f"picture 1: {count} slices instead of 10, as before, they are remembered" in second.metrics.notes
    vlm.forget(pictures=True)
    assert len(vlm.chat(messages, max_new_tokens=2, max_ttft_ms=9000).metrics.image_ms) > count


def test_what_was_never_measured_is_measured_on_what_all_cuts_begin_with(tiny: Any) -> None:
    """The first slice is encoded and what is before it is fed, once: the answer goes on behind it."""
    vlm, vision, decoder = made(tiny)
    vlm._vision.slice_ms = Curve()
    vlm._decoder = dataclasses.replace(vlm._decoder, prefill_ms=Curve())
    system = "You see a picture, perhaps several of them, and answer what is asked about it in few words and no more."
    expected = made(tiny)[0].generate(QUESTION, [tiny.picture(84, 84)], system_prompt=system)
    result = vlm.generate(QUESTION, [tiny.picture(84, 84)], system_prompt=system, max_ttft_ms=60_000)
    assert result.token_ids == expected.token_ids
    assert result.metrics.ttft_estimate_ms is not None
    assert len(vision.runs) == 10
    assert sum(decoder.tokens) == result.metrics.prompt_tokens + len(result.token_ids) - 1
    assert result.metrics.ttft_ms >= result.metrics.prepare_ms > 0


def test_where_graphs_take_turns_loading_counts(tiny: Any) -> None:
    specs = {"vision": tiny.FakeVision.spec, "decoder": tiny.FakeDecoder().spec}
    turns = Turns(lambda name: tiny.FakeVision() if name == "vision" else tiny.FakeDecoder())
    vlm = VLM(tiny.SPEC, tiny.TOKENIZER, in_turn(turns, specs), tiny.TABLE, turns=turns)
    result = vlm.generate(QUESTION, [tiny.picture(56, 56)], max_new_tokens=2, max_ttft_ms=1)
    assert "max_ttft_ms=1: nothing was measured yet to estimate by, so all slices are kept" in result.metrics.notes
    assert len(result.metrics.image_ms) == 5
    vlm._vision.slice_ms = Fixed(all_ms=SLICE_MS)
    vlm._decoder = dataclasses.replace(vlm._decoder, prefill_ms=Fixed(TOKEN_MS))
    turns._load_ms = {"vision": 5000.0, "decoder": 7000.0}
    for picture, load_ms in ((tiny.picture(28, 28, 1), 12_000), (tiny.picture(28, 28, 1), 0)):
        metrics = vlm.generate(QUESTION, [picture], max_new_tokens=2, max_ttft_ms=60_000).metrics
        slices_ms = SLICE_MS * sum(ms > 0 for ms in metrics.image_ms)
        tokens_ms = TOKEN_MS * (metrics.prompt_tokens - metrics.reused_tokens)
        assert metrics.ttft_estimate_ms == pytest.approx(load_ms + slices_ms + tokens_ms, abs=SLACK_MS)
        turns._load_ms = {"vision": 5000.0, "decoder": 7000.0}


@pytest.mark.parametrize("value", [0, -5, "soon", float("nan"), float("inf"), True])
def test_a_budget_that_is_none_is_refused(tiny: Any, value: Any) -> None:
    with pytest.raises(UsageError, match="max_ttft_ms="):
        made(tiny)[0].generate(QUESTION, max_ttft_ms=value)


def test_the_estimate_follows_the_overlap(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten slices at 100 ms each and a prompt that takes as long, only the end is behind the last slice."""
    monkeypatch.setattr("lensc.runtime.overlap.ROUND", 8)
    monkeypatch.setattr("lensc.runtime.decoder.LEAST_PIECE", 4)
    images = [tiny.picture(84, 84)]
    one, other = (
        made(tiny, overlap=overlap)[0].prepare(user_messages(QUESTION, images), 60_000).ttft_estimate_ms
        for overlap in (True, False)
    )
    assert one is not None and other is not None
    assert 10 * SLICE_MS < one < other - 300


def test_cuts_are_forgotten_in_the_order_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lensc.runtime.budget.REMEMBERED", 2)
    cuts = Cuts()
    for digest, most in ((b"a", 1), (b"b", 2), (b"a", 3), (b"c", 4)):
        cuts.put(digest, most)
    assert (cuts.get(b"a", 9), cuts.get(b"b", 9), cuts.get(b"c", 9)) == (3, 9, 4)


def test_a_prompt_as_it_is_estimated_is_the_prompt_that_is_made(tiny: Any) -> None:
    """Rows of cells have a newline between them, and a cut picture two marks of its own."""
    for size in ((84, 84), (140, 56), (30, 200), (28, 28)):
        vlm, _, _ = made(tiny)
        graphs = Graphs(vlm._vision, vlm._decoder, 8, 8, False)
        messages = user_messages(QUESTION, [tiny.picture(*size)])
        pictures = [open_picture(tiny.picture(*size))]
        fitting = Fitting(vlm.spec.picture, vlm.tokenizer, graphs, Cuts(), messages, pictures, 0.0)
        for most, plan in fitting._all[0]:
            tokens: list[int] = []
            fitting._graphs = Recorder(vlm._decoder, tokens)  # type: ignore[assignment]
            fitting._estimate_ms([plan])
            assert tokens == [len(made(tiny, most)[0].prepare(messages).prompt.ids)]


class Recorder:
    """In the place of `Graphs`: keeps how many tokens are fed."""

    forgetful = False

    def __init__(self, decoder: Any, tokens: list[int]) -> None:
        self.decoder = decoder
        self.tokens = tokens

    def first_token_ms(self, slices: Any, tokens: int) -> float:
        self.tokens.append(tokens)
        return 0.0
