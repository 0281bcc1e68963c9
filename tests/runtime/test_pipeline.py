"""The pipeline on a small numpy model: what it computes must not depend on caches, chunks, beams or threads.

The model is made so that errors show: a token's logits depend on its own embedding and on the keys of all before it, in
their order, and its value rows hold its position. `recompute` gives the same logits from scratch, without any cache.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lensc.backends.base import Array, check_feeds
from lensc.backends.bundle import DecoderSpec, GenerationSpec, ModelSpec, PictureSpec
from lensc.backends.errors import ExecutionError, GraphError, PictureError, PromptError, TokenizerError, UsageError
from lensc.export.graph import DimRange, GraphSpec, StatePair, TensorSpec
from lensc.runtime import decoder as decoder_module
from lensc.runtime import sampling
from lensc.runtime import vision as vision_module
from lensc.runtime.beam import BeamSearch
from lensc.runtime.decoder import embed, scatter
from lensc.runtime.options import resolve
from lensc.runtime.picture import vision_feeds
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Tokenizer, user_messages

TOKENIZER = Tokenizer.from_file(Path(__file__).parents[1] / "golden" / "checkpoint" / "tokenizer.json")
D, VOCAB, LAYERS, CONTEXT = 8, 1280, 2, 160
SPEC = ModelSpec(
    "tiny",
    PictureSpec(28, 14, 4, 3, "official", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 70),
    DecoderSpec(D, LAYERS, 2, 4, VOCAB, CONTEXT),
    GenerationSpec(eos_token_ids=(1025, 1033), max_new_tokens=12),
)
TABLE = np.random.default_rng(5).normal(size=(VOCAB, D)).astype(np.float16)
HEAD = np.random.default_rng(6).normal(size=(D, VOCAB)).astype(np.float32) / 5
"""Small, so that several tokens are nearly as likely and beams overtake each other."""
QUESTION = "What is it?"


class FakeVision:
    """Embeddings that depend on a slice's pixels, its position ids and how far it is padded."""

    spec = GraphSpec(
        "vision",
        (
            TensorSpec("patches", "float32", ("slices", "patches", 588)),
            TensorSpec("position_ids", "int64", ("slices", "patches")),
            TensorSpec("attention_bias", "float32", ("slices", "patches")),
            TensorSpec("key_bias", "float32", ("slices", "patches")),
            TensorSpec("key_pos_embed", "float32", ("slices", "patches", D)),
        ),
        (TensorSpec("image_embeds", "float32", ("slices", 3, D)),),
        (),
        {"slices": DimRange(1, 1, 9), "patches": DimRange(1, 4, 99)},
    )

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.closed = 0

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        check_feeds(self.spec, feeds)
        patches = feeds["patches"]
        self.runs.append(patches.shape[1])
        seen = np.exp(feeds["attention_bias"])[..., None]
        summary = (patches * seen).sum((1, 2)) + (feeds["position_ids"] * seen[..., 0]).sum(1) + patches.shape[1]
        waves = np.sin(summary[:, None, None] * np.linspace(0.1, 2, 3 * D).reshape(3, D))
        return {"image_embeds": waves.astype(np.float32)}

    def close(self) -> None:
        self.closed += 1


class FakeDecoder:
    """A weighted sum of keys as attention; the second layer's keys repeat the first's, values hold positions."""

    def __init__(self, batch: int = 16) -> None:
        names = [f"{kind}.{i}" for i in range(LAYERS) for kind in ("key", "value")]
        self.spec = GraphSpec(
            "decoder",
            (
                TensorSpec("inputs_embeds", "float32", ("batch", "tokens", D)),
                TensorSpec("position_ids", "int64", ("tokens",)),
                TensorSpec("logit_positions", "int64", ("rows",)),
                *(TensorSpec(f"past_{n}", "float32", ("past", "batch", 2, 4)) for n in names),
            ),
            (
                TensorSpec("logits", "float32", ("batch", "rows", VOCAB)),
                *(TensorSpec(n, "float32", ("tokens", "batch", 2, 4)) for n in names),
            ),
            tuple(StatePair(f"past_{n}", n) for n in names),
            {
                "batch": DimRange(1, 1, batch),
                "tokens": DimRange(1, 1, 64),
                "past": DimRange(0, 9, 99),
                "rows": DimRange(1, 1, 9),
            },
        )
        self.tokens: list[int] = []
        self.before_run: Callable[[], None] = lambda: None
        self.broken = False
        self.past: list[Array] = []
        self.closed = 0

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        self.before_run()
        sizes = check_feeds(self.spec, feeds)
        batch, tokens, past = sizes["batch"], sizes["tokens"], sizes["past"]
        assert out is not None and all(
            feeds[n].flags.c_contiguous and out[n].flags.c_contiguous for n in feeds if n in out
        )
        self.tokens.append(tokens)
        self.past.append(feeds["past_key.0"])
        np.testing.assert_array_equal(feeds["position_ids"], np.arange(past, past + tokens))
        np.testing.assert_array_equal(feeds["past_value.1"][:, :, 1, 3].T, np.tile(np.arange(past), (batch, 1)))
        embeds = feeds["inputs_embeds"]
        new = embeds.transpose(1, 0, 2).reshape(tokens, batch, 2, 4)
        for i in range(LAYERS):
            np.testing.assert_array_equal(feeds[f"past_key.{i}"], feeds["past_key.0"])
            out[f"key.{i}"][...] = new
            out[f"value.{i}"][...] = feeds["position_ids"][:, None, None, None]
        keys = np.concatenate([feeds["past_key.0"], new]).transpose(1, 0, 2, 3).reshape(batch, past + tokens, D)
        out["logits"][...] = np.stack([_logits(keys[:, : past + r + 1]) for r in feeds["logit_positions"]], 1)
        if self.broken:
            out["logits"][...] = np.nan
        return dict(out)

    def close(self) -> None:
        self.closed += 1


def _logits(keys: Array) -> Array:
    """Of the last of `keys: float32[batch, tokens, D]`."""
    weights = 1 + np.sin(1.7 * np.arange(keys.shape[1], dtype=np.float32))
    seen = np.einsum("btd,t->bd", keys, weights) / np.sqrt(np.float32(keys.shape[1]))
    return np.asarray((np.sin(3 * keys[:, -1]) + 2 * np.sin(3 * seen)) @ HEAD)


def recompute(embeds: Array, tokens: list[int]) -> Array:
    """float32[vocab] after a prompt and tokens, with nothing cached."""
    keys = np.concatenate([embeds, TABLE[np.array(tokens, np.int64)].astype(np.float32)])
    return np.asarray(_logits(keys[None])[0])


def make(spec: ModelSpec = SPEC, batch: int = 16) -> tuple[VLM, FakeVision, FakeDecoder]:
    vision, decoder = FakeVision(), FakeDecoder(batch)
    return VLM(spec, TOKENIZER, {"vision": vision, "decoder": decoder}, TABLE), vision, decoder


def picture(width: int = 28, height: int = 28, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt_embeds(vlm: VLM, text: str, images: list[Any]) -> Array:
    request = vlm.prepare(user_messages(text, images))
    embeds = embed(TABLE, request.prompt.ids)
    scatter(embeds, request.prompt.image_bounds, vlm._vision.encode(request.slices).embeds)
    return embeds


def greedy_by_recomputing(embeds: Array, steps: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < steps and (not tokens or tokens[-1] not in SPEC.generation.eos_token_ids):
        tokens.append(int(recompute(embeds, tokens).argmax()))
    return tokens


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [[], [picture()], [picture(56, 30), picture(20, 90, 1)]], ids=["text", "one", "two"])
def test_greedy_equals_recomputing_everything(images: list[Any]) -> None:
    vlm, _, _ = make()
    result = vlm.generate(QUESTION, images)
    assert list(result.token_ids) == greedy_by_recomputing(prompt_embeds(vlm, QUESTION, images), 12)
    assert len(set(result.token_ids)) > 3


@pytest.mark.parametrize("chunk", [1, 7, 64, 500])
def test_prefill_in_chunks_gives_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make()[0].generate(QUESTION, [picture()]).token_ids
    monkeypatch.setattr(decoder_module, "PREFILL_CHUNK", chunk)
    vlm, _, decoder = make()
    result = vlm.generate(QUESTION, [picture()])
    assert result.token_ids == expected
    prompt = result.metrics.prompt_tokens
    most = min(chunk, 64)  # the graph takes at most 64 tokens
    assert decoder.tokens == [most] * (prompt // most) + ([prompt % most] if prompt % most else []) + [1] * 11


def test_pictures_change_the_answer_and_their_order_matters() -> None:
    vlm, _, _ = make()
    a, b = picture(seed=1), picture(seed=2)
    answers = {vlm.generate(QUESTION, images).token_ids for images in ([], [a], [b], [a, b], [b, a])}
    assert len(answers) == 5


def test_beams_equal_a_search_without_cache() -> None:
    vlm, _, _ = make()
    embeds = prompt_embeds(vlm, QUESTION, [picture()])
    search = BeamSearch(4, SPEC.generation.eos_token_ids, 1.2)
    histories: list[list[int]] = [[], [], [], []]
    swaps = 0
    while not search.done and search.length < 12:
        tokens, parents = search.advance(np.stack([recompute(embeds, h) for h in histories]))
        swaps += search.length > 1 and parents.tolist() != [0, 1, 2, 3]
        histories = [[*histories[p], int(t)] for t, p in zip(tokens, parents, strict=True)]
    generation = vlm.begin(vlm.prepare(user_messages(QUESTION, [picture()])), resolve(SPEC.generation, num_beams=4))
    list(generation.tokens())
    assert [h.token_ids for h in generation.hypotheses] == [h.token_ids for h in search.hypotheses()]
    assert swaps > 3


def test_penalty_looks_at_generated_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, _, _ = make()
    embeds = prompt_embeds(vlm, QUESTION, [])
    tokens: list[int] = []
    for _ in range(12):
        logits = recompute(embeds, tokens)
        for t in set(tokens):
            logits[t] *= 5.0 if logits[t] < 0 else 1 / 5.0
        tokens.append(int(logits.argmax()))
    seen: list[list[int]] = []

    def recorded(logits: Any, generated: list[int], penalty: float) -> Any:
        seen.append(list(generated))
        return sampling.penalize(logits, generated, penalty)

    monkeypatch.setattr("lensc.runtime.generation.penalize", recorded)
    assert vlm.generate(QUESTION, repetition_penalty=5.0).token_ids == tuple(tokens)
    assert seen == [tokens[:i] for i in range(12)]


def test_a_seed_repeats_the_answer() -> None:
    vlm, _, _ = make()
    options: dict[str, Any] = {"do_sample": True, "temperature": 30.0}
    first = vlm.generate(QUESTION, seed=3, **options)
    assert first.token_ids == vlm.generate(QUESTION, seed=3, **options).token_ids
    assert first.token_ids != vlm.generate(QUESTION, seed=4, **options).token_ids
    assert vlm.generate(QUESTION, **options).token_ids != vlm.generate(QUESTION, **options).token_ids


def test_top_k_of_one_is_greedy() -> None:
    vlm, _, _ = make()
    sampled = vlm.generate(QUESTION, do_sample=True, top_k=1, repetition_penalty=1.0)
    assert sampled.token_ids == vlm.generate(QUESTION).token_ids


def test_generated_rows_are_written_in_place() -> None:
    vlm, _, decoder = make()
    vlm.generate(QUESTION, max_new_tokens=60)
    assert all(np.shares_memory(a, b) for a, b in itertools.pairwise(decoder.past[1:]))
    assert len(decoder.past) == 60


def test_chat_is_generate_with_turns() -> None:
    vlm, _, _ = make()
    image = picture()
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    assert vlm.chat([{"role": "user", "content": content}]).token_ids == vlm.generate(QUESTION, [image]).token_ids
    waiting = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    with_images = vlm.chat([{"role": "user", "content": waiting}], [image])
    assert with_images.token_ids == vlm.generate(QUESTION, [image]).token_ids
    system = vlm.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}])
    assert (
        system.token_ids
        == vlm.generate(QUESTION, system_prompt="Be brief.").token_ids
        != vlm.generate(QUESTION).token_ids
    )


def test_threads_do_not_disturb_each_other() -> None:
    vlm, _, _ = make()
    texts = [f"Question {i}?" for i in range(8)]
    expected = [vlm.generate(t, [picture(seed=9)]).token_ids for t in texts]
    got: dict[int, tuple[int, ...]] = {}

    def work(i: int) -> None:
        got[i] = vlm.generate(texts[i], [picture(seed=9)]).token_ids

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [got[i] for i in range(8)] == expected


# --- how it ends --------------------------------------------------------------------------------------------------


def test_a_stop_id_ends_the_answer_and_is_kept_in_the_ids() -> None:
    free = make()[0].generate(QUESTION)
    stop = free.token_ids[4]
    cut = free.token_ids[: free.token_ids.index(stop) + 1]
    spec = dataclasses.replace(SPEC, generation=dataclasses.replace(SPEC.generation, eos_token_ids=(7, stop)))
    result = make(spec)[0].generate(QUESTION)
    assert (result.token_ids, result.finish_reason) == (cut, "stop")
    assert free.finish_reason == "length"


def test_max_new_tokens() -> None:
    vlm, _, decoder = make()
    assert vlm.generate(QUESTION, max_new_tokens=1).metrics.new_tokens == 1
    assert len(decoder.tokens) == 1  # the last token is not fed
    result = vlm.generate(QUESTION, max_new_tokens=5)
    assert (len(result.token_ids), result.finish_reason) == (5, "length")


def test_max_new_tokens_is_cut_to_the_context_with_a_note() -> None:
    vlm, _, _ = make()
    result = vlm.generate("a " * 100, max_new_tokens=500)
    assert len(result.token_ids) + result.metrics.prompt_tokens == CONTEXT
    assert result.finish_reason == "length"
    assert any("max_new_tokens cut from 500 to" in note for note in result.metrics.notes)


def test_a_prompt_longer_than_the_context_is_refused_with_numbers() -> None:
    vlm, vision, decoder = make()
    with pytest.raises(PromptError, match=r"the prompt has \d+ tokens .*context is 160.*shorten"):
        vlm.generate("many words " * 100, [picture()])
    assert not vision.runs and not decoder.tokens


def test_should_stop_ends_between_steps() -> None:
    vlm, _, _ = make()
    full = vlm.generate(QUESTION).token_ids
    asked = itertools.count()
    result = vlm.generate(QUESTION, should_stop=lambda: next(asked) >= 4)
    # Asked before the one chunk of the prompt and after each token that is to be followed by another.
    assert (result.token_ids, result.finish_reason) == (full[:4], "cancelled")


def test_should_stop_before_the_first_run() -> None:
    vlm, vision, decoder = make()
    result = vlm.generate(QUESTION, [picture()], should_stop=lambda: True)
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "cancelled")
    assert not vision.runs and not decoder.tokens


def test_beams_can_be_cancelled() -> None:
    vlm, _, _ = make()
    asked = itertools.count()
    result = vlm.generate(QUESTION, num_beams=2, should_stop=lambda: next(asked) >= 3)
    assert (len(result.token_ids), result.finish_reason) == (3, "cancelled")


def test_nan_logits_are_an_error_not_an_answer() -> None:
    vlm, _, decoder = make()
    decoder.broken = True
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        with pytest.raises(ExecutionError, match="logits"):
            vlm.generate(QUESTION, **options)


# --- streams ------------------------------------------------------------------------------------------------------


def test_pieces_join_to_the_text_of_the_whole() -> None:
    vlm, _, _ = make()
    whole = vlm.generate(QUESTION, strip_pad=False)
    stream = vlm.generate(QUESTION, stream=True)
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text == whole.text
    assert stream.result.token_ids == whole.token_ids and stream.result.finish_reason == whole.finish_reason
    assert len(pieces) > 2


def test_exclamation_marks_stay_in_streams_and_leave_whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, _, _ = make()
    ids = iter(TOKENIZER.encode("Stop! Now! Here.") * 2)
    monkeypatch.setattr("lensc.runtime.generation.greedy", lambda logits: next(ids))
    count = len(TOKENIZER.encode("Stop! Now! Here."))
    whole = vlm.generate(QUESTION, max_new_tokens=count)
    stream = vlm.generate(QUESTION, max_new_tokens=count, stream=True)
    assert (whole.text, "".join(stream)) == ("Stop Now Here.", "Stop! Now! Here.")
    assert whole.token_ids == stream.result.token_ids


def test_strip_pad_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, _, _ = make()
    ids = TOKENIZER.encode("Stop! Now!")
    for stream, strip in itertools.product((False, True), repeat=2):
        forced = iter(ids)
        monkeypatch.setattr("lensc.runtime.generation.greedy", lambda logits, forced=forced: next(forced))
        answer: Any = vlm.generate(QUESTION, max_new_tokens=len(ids), stream=stream, strip_pad=strip)  # type: ignore[call-overload]
        text = "".join(answer) if stream else answer.text
        assert text == ("Stop Now" if strip else "Stop! Now!")


def test_a_stream_runs_only_when_read() -> None:
    vlm, vision, decoder = make()
    stream = vlm.generate(QUESTION, [picture()], stream=True)
    assert not vision.runs and not decoder.tokens
    next(stream)
    assert vision.runs and decoder.tokens


def test_bad_input_is_refused_before_a_stream_is_made() -> None:
    vlm, _, _ = make()
    with pytest.raises(PromptError):
        vlm.generate("word " * 500, stream=True)
    with pytest.raises(PictureError):
        vlm.generate(QUESTION, ["missing.png"], stream=True)


def test_cancel_ends_a_stream() -> None:
    vlm, _, _ = make()
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


def test_two_streams_can_be_read_in_turns() -> None:
    vlm, _, _ = make()
    expected = [vlm.generate(q, strip_pad=False).text for q in ("One?", "Two?")]
    streams = [vlm.generate(q, stream=True) for q in ("One?", "Two?")]
    texts = ["", ""]
    for pair in itertools.zip_longest(*streams, fillvalue=""):
        texts = [t + p for t, p in zip(texts, pair, strict=True)]
    assert texts == expected


# --- pictures seen before -----------------------------------------------------------------------------------------


def test_a_picture_is_encoded_once() -> None:
    vlm, vision, _ = make()
    first = vlm.generate(QUESTION, [picture(56, 56)])
    runs = len(vision.runs)
    second = vlm.generate("Something else?", [picture(56, 56)])
    assert runs == len(vision.runs) == len(first.metrics.image_ms) == 5
    assert (first.metrics.slices_from_cache, second.metrics.slices_from_cache) == (0, 5)
    assert second.metrics.image_ms == (0.0,) * 5
    assert "picture 1: 5 of 5 slices reused from the cache" in second.metrics.notes
    assert vlm.generate(QUESTION, [picture(56, 56)]).token_ids == first.token_ids


def test_a_picture_given_twice_is_encoded_once() -> None:
    vlm, vision, _ = make()
    vlm.generate(QUESTION, [picture(), picture()])
    assert len(vision.runs) == 1


WIDE = (49, 28)
"""Its overview has 6 patches, its two cells 4 each; a 28x28 picture has 4."""


@pytest.mark.parametrize(("padding", "again"), [("official", True), ("masked", False), ("per_slice", False)])
def test_features_are_reused_only_where_they_are_the_same(padding: Any, again: bool) -> None:
    # The small picture is shorter than the slices of the other, so only "official" pads it there.
    spec = dataclasses.replace(SPEC, picture=dataclasses.replace(SPEC.picture, vision_padding=padding))
    vlm, vision, _ = make(spec)
    small, large = picture(28, 28), picture(*WIDE, 1)
    alone = vlm.prepare(user_messages(QUESTION, [small])).slices
    together = vlm.prepare(user_messages(QUESTION, [small, large])).slices
    first = vlm._vision.encode(alone)
    both = vlm._vision.encode(together)
    assert both.from_cache[0] != again
    assert np.array_equal(both.embeds[0], first.embeds[0]) != again
    assert vision.runs == ([4, 6, 6, 6, 6] if again else [4, 6, 4, 4])


def test_slice_by_slice_equals_the_whole_batch() -> None:
    vlm, _, _ = make()
    slices = vlm.prepare(user_messages(QUESTION, [picture(*WIDE, 1), picture()])).slices
    batch = vision_feeds(slices, SPEC.picture, D)[0]
    np.testing.assert_array_equal(vlm._vision.encode(slices).embeds, FakeVision().run(batch.feeds)["image_embeds"])


def test_the_least_recently_used_features_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_module, "CACHE_BYTES", 2 * 3 * D * 4)
    vlm, vision, _ = make()
    for seed in (1, 2, 1, 3, 1, 2):
        vlm.generate(QUESTION, [picture(seed=seed)], max_new_tokens=1)
    # 1, 2 and 3 are encoded; 3 drops 2, not 1, which was used after it; 2 comes again.
    assert len(vision.runs) == 4


# --- metrics and misuse -------------------------------------------------------------------------------------------


def test_metrics() -> None:
    vlm, _, _ = make()
    metrics = vlm.generate(QUESTION, [picture(56, 56)]).metrics
    assert metrics.new_tokens == 12
    assert metrics.kv_cache_bytes == (metrics.prompt_tokens + 11) * 2 * LAYERS * D * 4
    assert 0 < metrics.prepare_ms + sum(metrics.image_ms) + metrics.prefill_ms < metrics.ttft_ms
    assert metrics.decode_tokens_per_s is not None and metrics.decode_tokens_per_s > 0
    assert metrics.peak_memory_bytes is None or metrics.peak_memory_bytes > 1 << 20
    assert any("56x56" in note for note in metrics.notes)
    assert vlm.generate(QUESTION, max_new_tokens=1).metrics.decode_tokens_per_s is None


def test_the_reader_s_time_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, _, decoder = make()
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += 0.01

    decoder.before_run = run
    stream = vlm.generate(QUESTION, stream=True)
    for _ in stream:
        now[0] += 5.0
    metrics = stream.result.metrics
    assert metrics.ttft_ms == pytest.approx(10)
    assert metrics.decode_tokens_per_s == pytest.approx(100)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v: v.generate(5), UsageError, "prompt: got int"),
        (lambda v: v.generate(QUESTION, "receipt.png"), UsageError, "images: got str"),
        (lambda v: v.generate(QUESTION, picture()), UsageError, "images: got Image"),
        (lambda v: v.generate(QUESTION, ["no-such.png"]), PictureError, "no-such.png"),
        (lambda v: v.generate(QUESTION, num_beams=0), UsageError, "num_beams=0"),
        (lambda v: v.generate(QUESTION, num_beams=17), UsageError, "made for at most 16"),
        (lambda v: v.generate(QUESTION, num_beams=2, stream=True), UsageError, "stream=True"),
        (lambda v: v.chat([]), UsageError, "empty"),
        (lambda v: v.chat([{"role": "user", "content": [{"type": "image"}]}]), PromptError, "1 image parts"),
        (lambda v: v.chat([{"role": "user", "content": "x"}], [picture()]), PromptError, "1 images are given"),
    ],
)
def test_misuse_is_one_clear_line(call: Any, error: type[Exception], message: str) -> None:
    vlm, vision, decoder = make()
    with pytest.raises(error, match=message) as caught:
        call(vlm)
    assert "\n" not in str(caught.value)
    assert not vision.runs and not decoder.tokens


def test_close() -> None:
    vlm, vision, decoder = make()
    with vlm as entered:
        assert entered is vlm
        stream = vlm.generate(QUESTION, stream=True)
    vlm.close()
    assert (vision.closed, decoder.closed) == (1, 1)
    for call in (lambda: vlm.generate(QUESTION), lambda: vlm.chat([{"role": "user", "content": "x"}])):
        with pytest.raises(UsageError, match="closed; load it again"):
            call()
    with pytest.raises(UsageError, match="closed; load it again"):
        next(stream)


def test_sessions_and_tables_that_do_not_fit_the_model_are_refused() -> None:
    vision, decoder = FakeVision(), FakeDecoder()
    both: dict[str, Any] = {"vision": vision, "decoder": decoder}
    with pytest.raises(GraphError, match="no graph vision"):
        VLM(SPEC, TOKENIZER, {"decoder": decoder}, TABLE)
    with pytest.raises(GraphError, match="embed_tokens is float16"):
        VLM(SPEC, TOKENIZER, both, TABLE[:-1])
    with pytest.raises(GraphError, match="embed_tokens is float64"):
        VLM(SPEC, TOKENIZER, both, TABLE.astype(np.float64))
    deeper = dataclasses.replace(SPEC, decoder=dataclasses.replace(SPEC.decoder, num_layers=3, vocab_size=1281))
    with pytest.raises(GraphError, match=r"past_key\.2 is missing.*1280\]: expected \[batch, rows, 1281\]"):
        VLM(deeper, TOKENIZER, both, TABLE)
    queries = dataclasses.replace(SPEC, picture=dataclasses.replace(SPEC.picture, query_num=4))
    with pytest.raises(GraphError, match=r"expected output image_embeds \[slices, 4, 8\]"):
        VLM(queries, TOKENIZER, both, TABLE)
    with pytest.raises(GraphError, match=r"graph decoder .*patches is missing"):
        VLM(SPEC, TOKENIZER, {"vision": decoder, "decoder": decoder}, TABLE)


def test_ids_outside_the_table_are_refused() -> None:
    with pytest.raises(TokenizerError, match="token id 1280 is outside the embedding table of 1280 rows"):
        embed(TABLE, np.array([3, 1280]))


def test_options_of_the_model_reach_the_generation() -> None:
    vlm, _, _ = make()
    request = vlm.prepare(user_messages(QUESTION))
    generation = vlm.begin(request, resolve(SPEC.generation, num_beams=2))
    assert len(list(generation.tokens())) == len(generation.hypotheses[0].token_ids)
    scores = [h.score for h in generation.hypotheses]
    assert len(scores) == 2 and scores == sorted(scores, reverse=True)
