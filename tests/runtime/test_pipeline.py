"""The pipeline on a small numpy model: what it computes must not depend on caches, chunks, beams or threads."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lensc.backends.base import Array
from lensc.backends.errors import ExecutionError, GraphError, PictureError, PromptError, TokenizerError, UsageError
from lensc.runtime import decoder as decoder_module
from lensc.runtime import sampling
from lensc.runtime.beam import BeamSearch
from lensc.runtime.decoder import HostCachedSession, scatter
from lensc.runtime.embedding import EmbeddingTable
from lensc.runtime.options import resolve
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import user_messages
from lensc.runtime.sequential import Turns
from lensc.runtime.sequential import in_turn as graphs_in_turn

QUESTION = "What is it?"


def prompt_embeds(tiny: Any, vlm: VLM, text: str, images: list[Any]) -> Array:
    request = vlm.prepare(user_messages(text, images))
    embeds = EmbeddingTable(tiny.TABLE).gather(request.prompt.ids)
    scatter(embeds, request.prompt.image_bounds, vlm._vision.encode(request.slices).embeds)
    return embeds


def greedy_by_recomputing(tiny: Any, embeds: Array, steps: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < steps and (not tokens or tokens[-1] not in tiny.SPEC.generation.eos_token_ids):
        tokens.append(int(tiny.recompute(embeds, tokens).argmax()))
    return tokens


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [[], [(28, 28, 0)], [(56, 30, 0), (20, 90, 1)]], ids=["text", "one", "two"])
def test_greedy_equals_recomputing_everything(tiny: Any, pictures: list[Any]) -> None:
    vlm, _, _ = tiny.make()
    images = [tiny.picture(*size) for size in pictures]
    result = vlm.generate(QUESTION, images)
    assert list(result.token_ids) == greedy_by_recomputing(tiny, prompt_embeds(tiny, vlm, QUESTION, images), 12)
    assert len(set(result.token_ids)) > 3


@pytest.mark.parametrize("chunk", [1, 7, 64, 500])
def test_prefill_in_chunks_gives_the_same(tiny: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny.make()[0].generate(QUESTION, [tiny.picture()]).token_ids
    monkeypatch.setattr(decoder_module, "PREFILL_CHUNK", chunk)
    vlm, _, decoder = tiny.make()
    result = vlm.generate(QUESTION, [tiny.picture()])
    assert result.token_ids == expected
    prompt = result.metrics.prompt_tokens
    most = min(chunk, 64)  # the graph takes at most 64 tokens
    assert decoder.tokens == [most] * (prompt // most) + ([prompt % most] if prompt % most else []) + [1] * 11


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("in_turn", [False, True], ids=["all loaded", "in turn"])
def test_nothing_is_fed_in_pieces_larger_than_a_chunk(
    tiny: Any, in_turn: bool, overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a prompt, nor what a turn adds, nor behind a conversation that was restored, for one sequence or several."""
    monkeypatch.setattr(decoder_module, "PREFILL_CHUNK", 7)
    vision, decoder = tiny.FakeVision(), tiny.FakeDecoder()
    sessions: dict[str, Any] = {"vision": vision, "decoder": decoder}
    turns = Turns(sessions.__getitem__) if in_turn else None
    specs = {name: session.spec for name, session in sessions.items()}
    opened = sessions if turns is None else graphs_in_turn(turns, specs)
    vlm = VLM(tiny.SPEC, tiny.TOKENIZER, opened, tiny.TABLE, turns=turns, overlap=overlap)
    content = [{"type": "image", "image": tiny.picture(56, 56)}, QUESTION]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    fed = []

    def ask(**options: Any) -> None:
        decoder.tokens.clear()
        metrics = vlm.chat(messages, max_new_tokens=4, **options).metrics
        assert max(decoder.tokens) <= 7
        prompt = [n for n in decoder.tokens if n > 1]
        fed.append((sum(prompt) + 1, metrics.prompt_tokens - metrics.reused_tokens))

    ask()
    messages += [{"role": "assistant", "content": "a"}, {"role": "user", "content": "And now? " * 6}]
    vlm.save(tmp_path / "said", messages)
    ask(num_beams=3)
    vlm.forget()
    vlm.restore(tmp_path / "said")
    messages += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "And else? " * 5}]
    ask(do_sample=True, seed=1)
    assert all(seen >= new > 10 for seen, new in fed) and fed[2][1] < fed[0][1] + fed[1][1]


@pytest.mark.parametrize(
    ("tokens", "chunk", "most", "ends"),
    [
        (300, 128, None, [128, 256, 300]),
        (258, 128, None, [128, 256, 258]),  # a chunk is the most
        (258, 128, 128, [128, 256, 258]),
        (258, 256, 128, [128, 258]),
        (290, 256, 128, [128, 256, 290]),
        (20, 256, 128, [20]),
        (0, 256, 128, []),
    ],
)
def test_pieces(tokens: int, chunk: int, most: int | None, ends: list[int]) -> None:
    found = list(decoder_module.pieces(tokens, chunk, most))
    assert [end for _, end in found] == ends
    assert [start for start, _ in found] == [0, *ends][: len(ends)]


def test_pictures_change_the_answer_and_their_order_matters(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    a, b = tiny.picture(seed=1), tiny.picture(seed=2)
    answers = {vlm.generate(QUESTION, images).token_ids for images in ([], [a], [b], [a, b], [b, a])}
    assert len(answers) == 5


def test_beams_equal_a_search_without_cache(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    embeds = prompt_embeds(tiny, vlm, QUESTION, [tiny.picture()])
    search = BeamSearch(4, tiny.SPEC.generation.eos_token_ids, 1.2)
    histories: list[list[int]] = [[], [], [], []]
    swaps = 0
    while not search.done and search.length < 12:
        tokens, parents = search.advance(np.stack([tiny.recompute(embeds, h) for h in histories]))
        swaps += search.length > 1 and parents.tolist() != [0, 1, 2, 3]
        histories = [[*histories[p], int(t)] for t, p in zip(tokens, parents, strict=True)]
    generation = vlm.begin(
        vlm.prepare(user_messages(QUESTION, [tiny.picture()])), resolve(tiny.SPEC.generation, num_beams=4)
    )
    list(generation.tokens())
    assert [h.token_ids for h in generation.hypotheses] == [h.token_ids for h in search.hypotheses()]
    assert swaps > 3


def test_penalty_looks_at_generated_tokens_only(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, _, _ = tiny.make()
    embeds = prompt_embeds(tiny, vlm, QUESTION, [])
    tokens: list[int] = []
    for _ in range(12):
        logits = tiny.recompute(embeds, tokens)
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


def test_a_seed_repeats_the_answer(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    options: dict[str, Any] = {"do_sample": True, "temperature": 30.0}
    first = vlm.generate(QUESTION, seed=3, **options)
    assert first.token_ids == vlm.generate(QUESTION, seed=3, **options).token_ids
    assert first.token_ids != vlm.generate(QUESTION, seed=4, **options).token_ids
    assert vlm.generate(QUESTION, **options).token_ids != vlm.generate(QUESTION, **options).token_ids


def test_top_k_of_one_is_greedy(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    sampled = vlm.generate(QUESTION, do_sample=True, top_k=1, repetition_penalty=1.0)
    assert sampled.token_ids == vlm.generate(QUESTION).token_ids


def test_generated_rows_are_written_in_place(tiny: Any) -> None:
    vlm, _, decoder = tiny.make()
    vlm.generate(QUESTION, max_new_tokens=60)
    assert all(np.shares_memory(a, b) for a, b in itertools.pairwise(decoder.past[1:]))
    assert len(decoder.past) == 60


def test_an_engine_that_keeps_the_cache_is_given_it(tiny: Any) -> None:
    """Rows stay with the engine: nothing is fed to `run`, which would copy the whole past in and out at each step."""

    class Keeping(HostCachedSession):
        steps = 0

        def step(self, *arguments: Any) -> Any:
            self.steps += 1
            return super().step(*arguments)

        def run(self, *arguments: Any) -> Any:
            raise AssertionError("the past was fed")

    decoder = Keeping(tiny.FakeDecoder(), tiny.SPEC.decoder)
    plain, pictures = tiny.make()[0], [tiny.picture(56, 30)]
    vlm = VLM(tiny.SPEC, tiny.TOKENIZER, {"vision": tiny.FakeVision(), "decoder": decoder}, tiny.TABLE)
    answer = vlm.generate("What?", pictures)
    assert answer.token_ids == plain.generate("What?", pictures).token_ids
    prefill = -(-answer.metrics.prompt_tokens // 64)  # the graph takes at most 64 tokens
    assert decoder.steps == prefill + len(answer.token_ids) - 1
    decoder.prefill_chunk, decoder.steps = 5, 0
    vlm = VLM(tiny.SPEC, tiny.TOKENIZER, {"vision": tiny.FakeVision(), "decoder": decoder}, tiny.TABLE)
    assert vlm.generate("What?", pictures).token_ids == answer.token_ids
    assert decoder.steps == -(-answer.metrics.prompt_tokens // 5) + len(answer.token_ids) - 1
    ways: tuple[dict[str, Any], ...] = ({"num_beams": 3}, {"do_sample": True, "seed": 3})
    for more in ways:
        assert vlm.generate("What?", pictures, **more).token_ids == plain.generate("What?", pictures, **more).token_ids
    stream = vlm.generate("What?", stream=True)
    vlm.close()
    with pytest.raises(UsageError, match="the model is closed"):
        list(stream)


def test_chat_is_generate_with_turns(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    image = tiny.picture()
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


def test_threads_do_not_disturb_each_other(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    texts = [f"Question {i}?" for i in range(8)]
    expected = [vlm.generate(t, [tiny.picture(seed=9)]).token_ids for t in texts]
    got: dict[int, tuple[int, ...]] = {}

    def work(i: int) -> None:
        got[i] = vlm.generate(texts[i], [tiny.picture(seed=9)]).token_ids

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [got[i] for i in range(8)] == expected


# --- how it ends --------------------------------------------------------------------------------------------------


def test_a_stop_id_ends_the_answer_and_is_kept_in_the_ids(tiny: Any) -> None:
    free = tiny.make()[0].generate(QUESTION)
    stop = free.token_ids[4]
    cut = free.token_ids[: free.token_ids.index(stop) + 1]
    spec = dataclasses.replace(tiny.SPEC, generation=dataclasses.replace(tiny.SPEC.generation, eos_token_ids=(7, stop)))
    result = tiny.make(spec)[0].generate(QUESTION)
    assert (result.token_ids, result.finish_reason) == (cut, "stop")
    assert free.finish_reason == "length"


def test_max_new_tokens(tiny: Any) -> None:
    vlm, _, decoder = tiny.make()
    assert vlm.generate(QUESTION, max_new_tokens=1).metrics.new_tokens == 1
    assert len(decoder.tokens) == 1  # the last token is not fed
    result = vlm.generate(QUESTION, max_new_tokens=5)
    assert (len(result.token_ids), result.finish_reason) == (5, "length")


def test_should_stop_ends_between_steps(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    full = vlm.generate(QUESTION).token_ids
    asked = itertools.count()
    result = vlm.generate(QUESTION, should_stop=lambda: next(asked) >= 4)
    # Asked before the one chunk of the prompt and after each token that is to be followed by another.
    assert (result.token_ids, result.finish_reason) == (full[:4], "cancelled")


def test_should_stop_before_the_first_run(tiny: Any) -> None:
    vlm, vision, decoder = tiny.make()
    result = vlm.generate(QUESTION, [tiny.picture()], should_stop=lambda: True)
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "cancelled")
    assert not vision.runs and not decoder.tokens


def test_beams_can_be_cancelled(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    asked = itertools.count()
    result = vlm.generate(QUESTION, num_beams=2, should_stop=lambda: next(asked) >= 3)
    assert (len(result.token_ids), result.finish_reason) == (3, "cancelled")


def test_nan_logits_are_an_error_not_an_answer(tiny: Any) -> None:
    vlm, _, decoder = tiny.make()
    decoder.broken = True
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        with pytest.raises(ExecutionError, match="logits"):
            vlm.generate(QUESTION, **options)


# --- metrics and misuse -------------------------------------------------------------------------------------------


def test_metrics(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    metrics = vlm.generate(QUESTION, [tiny.picture(56, 56)]).metrics
    assert metrics.new_tokens == 12
    assert metrics.kv_cache_bytes == (metrics.prompt_tokens + 11) * 2 * tiny.LAYERS * tiny.D * 4
    assert 0 < metrics.prepare_ms + sum(metrics.image_ms) + metrics.prefill_ms < metrics.ttft_ms
    assert metrics.decode_tokens_per_s is not None and metrics.decode_tokens_per_s > 0
    assert metrics.peak_memory_bytes is None or metrics.peak_memory_bytes > 1 << 20
    assert any("56x56" in note for note in metrics.notes)
    assert vlm.generate(QUESTION, max_new_tokens=1).metrics.decode_tokens_per_s is None


def test_the_reader_s_time_is_not_counted(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, _, decoder = tiny.make()
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
        (lambda v: v.generate(QUESTION, np.zeros((9, 9, 3), np.uint8)), UsageError, "images: got ndarray"),
        (lambda v: v.generate(QUESTION, ["no-such.png"]), PictureError, "no-such.png"),
        (lambda v: v.generate(QUESTION, num_beams=0), UsageError, "num_beams=0"),
        (lambda v: v.generate(QUESTION, num_beams=17), UsageError, "made for at most 16"),
        (lambda v: v.generate(QUESTION, num_beams=2, stream=True), UsageError, "stream=True"),
        (lambda v: v.chat([]), UsageError, "empty"),
        (lambda v: v.chat([{"role": "user", "content": [{"type": "image"}]}]), PromptError, "1 image parts"),
        (lambda v: v.chat([{"role": "user", "content": "x"}], [b"?"]), PromptError, "1 images are given"),
    ],
)
def test_misuse_is_one_clear_line(tiny: Any, call: Any, error: type[Exception], message: str) -> None:
    vlm, vision, decoder = tiny.make()
    with pytest.raises(error, match=message) as caught:
        call(vlm)
    assert "\n" not in str(caught.value)
    assert not vision.runs and not decoder.tokens


def test_close(tiny: Any) -> None:
    vlm, vision, decoder = tiny.make()
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


def test_sessions_and_tables_that_do_not_fit_the_model_are_refused(tiny: Any) -> None:
    vision, decoder = tiny.FakeVision(), tiny.FakeDecoder()
    both: dict[str, Any] = {"vision": vision, "decoder": decoder}
    with pytest.raises(GraphError, match="no graph vision"):
        VLM(tiny.SPEC, tiny.TOKENIZER, {"decoder": decoder}, tiny.TABLE)
    with pytest.raises(GraphError, match="embed_tokens is float16"):
        VLM(tiny.SPEC, tiny.TOKENIZER, both, tiny.TABLE[:-1])
    with pytest.raises(GraphError, match="embed_tokens is float64"):
        VLM(tiny.SPEC, tiny.TOKENIZER, both, tiny.TABLE.astype(np.float64))
    deeper = dataclasses.replace(
        tiny.SPEC, decoder=dataclasses.replace(tiny.SPEC.decoder, num_layers=3, vocab_size=1281)
    )
    with pytest.raises(GraphError, match=r"past_key\.2 is missing.*1280\]: expected \[batch, rows, 1281\]"):
        VLM(deeper, tiny.TOKENIZER, both, tiny.TABLE)
    queries = dataclasses.replace(tiny.SPEC, picture=dataclasses.replace(tiny.SPEC.picture, query_num=4))
    with pytest.raises(GraphError, match=r"expected output image_embeds \[slices, 4, 8\]"):
        VLM(queries, tiny.TOKENIZER, both, tiny.TABLE)
    with pytest.raises(GraphError, match=r"graph decoder .*patches is missing"):
        VLM(tiny.SPEC, tiny.TOKENIZER, {"vision": decoder, "decoder": decoder}, tiny.TABLE)


def test_ids_outside_the_table_are_refused(tiny: Any) -> None:
    with pytest.raises(TokenizerError, match="token id 1280 is outside the embedding table of 1280 rows"):
        EmbeddingTable(tiny.TABLE).gather(np.array([3, 1280]))


def test_options_of_the_model_reach_the_generation(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    request = vlm.prepare(user_messages(QUESTION))
    generation = vlm.begin(request, resolve(tiny.SPEC.generation, num_beams=2))
    assert len(list(generation.tokens())) == len(generation.hypotheses[0].token_ids)
    scores = [h.score for h in generation.hypotheses]
    assert len(scores) == 2 and scores == sorted(scores, reverse=True)
