"""Errors of predictions are those of times, each figure is reported once, and what was not predicted is left out."""

from __future__ import annotations

from typing import Any

import pytest

from lensc.bench import predict
from lensc.bench_record import Figure, Row


def row(text_tokens: int, **figures: Figure) -> Row:
    known: dict[str, Any] = {"device": "native:cpu", "plan": (), "image": "448x448", "slices": 1, "new_tokens": 32}
    more: dict[str, Any] = {"load_ms": None, "failed": "", "skipped": False, "notes": ()}
    return Row(prompt_tokens=98 + text_tokens, text_tokens=text_tokens, figures=figures, **known, **more)


@pytest.mark.parametrize("unit", ["ms", "tokens/s"])
def test_a_time_that_is_predicted_twice_as_long_is_off_by_100_percent(unit: str) -> None:
    predicted = 200.0 if unit == "ms" else 50.0
    assert predict.error_of(unit, predicted, 100.0) == pytest.approx(1.0)


def test_each_predicted_figure_is_a_row_and_a_picture_is_one_once() -> None:
    image = Figure((100.0, 110.0, 90.0), None, 120.0)
    rows = [
        row(128, image_ms=image, decode_tokens_s=Figure((10.0,), None, 8.0), ttft_ms=Figure((5.0,))),
        row(1024, image_ms=image, prefill_tokens_s=Figure((50.0,), None, 50.0)),
    ]
    found = predict.rows_of("mid", rows, "native:cpu")
    assert [(one["what"], one["error"]) for one in found] == [
        ("mid, native:cpu: image", 0.2),
        ("mid, native:cpu: decode, context 226", 0.25),
        ("mid, native:cpu: prefill 1122", 0.0),
    ]
    assert (found[0]["spread"], found[0]["lensc"], found[0]["predicted"]) == ([90.0, 110.0], 100.0, 120.0)
    assert predict.errors(found) == (0.2, 0.25)
