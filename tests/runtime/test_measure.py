"""Measuring a request: every run does all the work, and has the length that was asked for."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lensc.backends.errors import UsageError
from lensc.runtime.measure import Values, Work, measure, prompt_of, run, summed_up
from lensc.runtime.picture import slice_picture
from lensc.runtime.pipeline import VLM


@pytest.mark.parametrize("pictures", [0, 1])
def test_every_run_does_all_the_work(tiny: SimpleNamespace, pictures: int) -> None:
    vlm, vision, decoder = tiny.make()
    numbers: list[int] = []
    work = Work(40, 6, tiny.picture(56, 28) if pictures else None)
    found = measure(vlm, work, runs=3, warmup=2, report=numbers.append)
    slices = 3 * pictures
    assert numbers == [1, 2, 3, 4, 5]
    assert len(vision.runs) == 5 * slices and found.slices == slices
    assert sum(decoder.tokens) == 5 * (found.prompt_tokens + found.new_tokens - 1)
    assert max(decoder.tokens) > 1 and decoder.tokens.count(1) == 5 * (found.new_tokens - 1)  # and nothing is guessed
    assert [len(figure.values) for figure in (found.ttft_ms, found.prefill_tokens_s)] == [3, 3]
    assert found.decode_tokens_s is not None and (found.image_ms is not None) == bool(pictures)


def test_a_stop_id_ends_nothing(tiny: SimpleNamespace) -> None:
    every = dataclasses.replace(tiny.SPEC.generation, eos_token_ids=tuple(range(tiny.SPEC.decoder.vocab_size)))
    vlm, _, _ = tiny.make(dataclasses.replace(tiny.SPEC, generation=every))
    assert run(vlm, Work(4, 20)).new_tokens == 20
    assert vlm.generate("What?", max_new_tokens=20).metrics.new_tokens == 1


def test_embeddings_of_pictures_are_kept_on_request(tiny: SimpleNamespace) -> None:
    vlm, vision, _ = tiny.make()
    work = Work(4, 2, tiny.picture())
    run(vlm, work)
    assert (run(vlm, work, keep="pictures").slices_from_cache, len(vision.runs)) == (1, 1)
    assert (run(vlm, work).slices_from_cache, len(vision.runs)) == (0, 2)


def test_the_prompt_is_the_picture_and_so_many_tokens(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, _, _ = tiny.make()
    begun: list[Any] = []
    begin = VLM.begin
    monkeypatch.setattr(
        VLM, "begin", lambda vlm, request, options: begun.append(request) or begin(vlm, request, options)
    )
    picture, special = tiny.picture(56, 28), tiny.TOKENIZER.special
    run(vlm, Work(9, 2, picture))
    (request,) = begun
    ids, bounds = request.prompt.ids, request.prompt.image_bounds
    assert ids[0] == special.image_start and ids[-10] == special.slice_end and special.bos not in ids[:-9]
    assert [set(ids[start:end]) for start, end in bounds] == 3 * [{special.unk}]
    alike = prompt_of(slice_picture(picture, tiny.SPEC.picture).plan, tiny.TOKENIZER, tiny.SPEC, Work(9, 2))
    np.testing.assert_array_equal(alike.ids, ids)
    np.testing.assert_array_equal(alike.image_bounds, bounds)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (Work(0, 4), "0 tokens of prompt, 4 of answer: expected at least 1"),
        (Work(4, 0), "4 tokens of prompt, 0 of answer: expected at least 1"),
        (Work(150, 11), "150 of prompt and 11 of answer are 161, the model's context is 160"),
    ],
)
def test_impossible_work(work: Work, message: str, tiny: SimpleNamespace) -> None:
    vlm, _, decoder = tiny.make()
    with pytest.raises(UsageError, match=message):
        run(vlm, work)
    assert decoder.tokens == []


def test_figures_are_medians_and_all_runs_are_within_the_spread(tiny: SimpleNamespace) -> None:
    values = Values((4.0, 1.0, 2.0))
    assert (values.median, values.spread) == (2.0, 2.0)
    assert [str(Values(v)) for v in ((4.0, 1.0, 2.0), (1310.4, 1303.0), (0.1234,))] == [
        "2.00 ± 2.00",
        "1307 ± 4",
        "0.123",
    ]
    metrics = run(tiny.make()[0], Work(8, 3, tiny.picture()))
    runs = [
        dataclasses.replace(metrics, image_ms=(ms, ms), prefill_ms=ms, prompt_tokens=10, reused_tokens=0)
        for ms in (1.0, 4.0, 2.0)
    ]
    found = summed_up(runs)
    assert found.image_ms == Values((2.0, 8.0, 4.0)) and found.prefill_tokens_s == Values((10000.0, 2500.0, 5000.0))
    with pytest.raises(UsageError, match="runs=0"):
        measure(tiny.make()[0], Work(1, 1), runs=0)
