"""Predictions are bytes over bandwidth and operations over peak, say what they rest on, and leave out what nobody knows."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from lensc.planning import named_schemes, official
from lensc.profiles import profile
from lensc.profiles.profile import Figure, Processor
from lensc.runtime import roofline
from lensc.runtime.roofline import Model, Prediction, Request, Stored, predict

MODEL = Model("toy", 1000, 8_000_000, 2_000_000, 2_000_000, 64, 4, 2, 16, 8)
FOUR = Stored("four", 8, 4, 4, 8)
REQUEST = Request((100, 50), 20, 100)


def figure(value: float) -> Figure:
    return Figure(value, "measured", "here")


def cpu(**more: object) -> Processor:
    return replace(Processor("cpu", "toy", ("float32", "int8", "int4"), memory_bytes=figure(1 << 40)), **more)


def test_decode_is_bytes_over_bandwidth() -> None:
    found = predict(MODEL, FOUR, cpu(achieved_gb_s=figure(1.0)), REQUEST)
    weights, context = 5_000_000, (20 + 2 * 10 + 100) // 2
    cache = 2 * 4 * 2 * 16 * context * 2
    assert found.decode_tokens_s == pytest.approx(1e9 / (weights + cache))


def test_times_are_operations_over_what_was_reached() -> None:
    tops = {"int8": figure(1e-3), "int4": figure(2e-3)}
    found = predict(MODEL, FOUR, cpu(achieved_tops=tops, achieved_gb_s=figure(1e6)), REQUEST)
    image_s = 2 * 1000 * (100 + 50) / 1e9
    prompt_s = (40 * (2 * 8_000_000 + 4 * 4 * 64 * 20) + 2 * 2_000_000) / 2e9
    assert found.image_ms == pytest.approx(1e3 * image_s)
    assert found.prefill_tokens_s == pytest.approx(40 / prompt_s)
    assert found.ttft_ms == pytest.approx(1e3 * (image_s + prompt_s))
    assert found.unknown == ()


def test_attention_has_a_rate_of_its_own_where_it_was_measured() -> None:
    tops = {"int8": figure(1e-3), "int4": figure(2e-3)}
    processor = cpu(achieved_tops=tops, achieved_gb_s=figure(1e6), attention_tops=figure(1e-4))
    prompt_s = (40 * 2 * 8_000_000 + 2 * 2_000_000) / 2e9 + 40 * 4 * 4 * 64 * 20 / 1e8
    found = predict(MODEL, FOUR, processor, REQUEST)
    assert found.prefill_tokens_s == pytest.approx(40 / prompt_s)
    assert "prefill: attention_tops 0.0001 TOPS (measured: here)" in found.rests_on


def test_what_only_reads_takes_as_long_as_it_reads() -> None:
    tops = {"int8": figure(1e6), "int4": figure(1e6)}
    found = predict(MODEL, FOUR, cpu(achieved_tops=tops, achieved_gb_s=figure(1e-3)), REQUEST)
    assert found.image_ms == pytest.approx(2 * 1000 / 1e6 * 1e3)


def test_peaks_count_by_the_share_that_is_named() -> None:
    share = roofline.SHARES["cpu", "prefill", True]
    found = predict(MODEL, FOUR, cpu(peak_tops={"int8": figure(1.0)}, bandwidth_gb_s=figure(1e6)), REQUEST)
    prompt_s = (40 * MODEL.token_operations(20) + 2 * 2_000_000) / (share.value * 1e12)
    assert found.prefill_tokens_s == pytest.approx(40 / prompt_s)
    assert any(f"times {share.value:g} (estimated: {share.reference})" in text for text in found.rests_on)


def test_what_nobody_knows_is_unknown_and_named() -> None:
    found = predict(MODEL, FOUR, Processor("npu", "toy", ()), REQUEST)
    assert (found.fits, found.image_ms, found.ttft_ms, found.decode_tokens_s) == (None, None, None, None)
    assert found.rests_on == ()
    said = "; ".join(found.unknown)
    assert "fit: the profile has no memory_bytes" in said
    assert "decode: the profile has no achieved_gb_s or bandwidth_gb_s" in said
    assert "vision: the profile has no achieved_tops.float16" in said


@pytest.mark.parametrize(("of_memory", "fits"), [(1.0, "yes"), (0.9999, "one after the other"), (0.5, "no")])
def test_fit(of_memory: float, fits: Literal["yes", "one after the other", "no"]) -> None:
    model = replace(MODEL, vision_weights=100_000_000)
    whole = predict(model, FOUR, cpu(), REQUEST)
    assert whole.sequential_bytes < whole.memory_bytes
    assert predict(model, FOUR, cpu(memory_bytes=figure(whole.memory_bytes * of_memory)), REQUEST).fits == fits


def test_the_published_model_has_its_operations() -> None:
    model, picture = official()
    assert (picture.scale_resolution, model.queries) == (448, 96)
    assert model.layer_weights + model.head_weights + model.embedding_weights == pytest.approx(8.03e9, rel=1e-3)
    assert model.token_operations(0) == pytest.approx(13.96e9, rel=1e-3)
    assert model.slice_operations(1024) == pytest.approx(1063e9, rel=0.05)


@pytest.mark.parametrize(
    ("name", "kind", "scheme", "measured"),
    [
        ("h200", "gpu", "int4", 560.0),
        ("sm8750", "npu", "int4", 14.72),
        ("sm8850", "npu", "int4", 16.37),
        ("sc8380xp", "npu", "int4", 6.87),
    ],
)
def test_decode_comes_near_what_was_published(name: str, kind: str, scheme: str, measured: float) -> None:
    """The figures that the shares and the profiles were taken from come out again."""
    (processor,) = (p for p in profile.get(name).processors if p.kind == kind)
    found = predict(official()[0], named_schemes()[scheme], processor, Request((), 32, 1024))
    assert found.decode_tokens_s == pytest.approx(measured, rel=0.15)


def test_gpus_and_npus_hold_16_bits() -> None:
    model, schemes = official()[0], named_schemes()

    def on(kind: Literal["cpu", "gpu"]) -> Prediction:
        return predict(model, schemes["f32"], Processor(kind, "toy", ()), REQUEST)

    assert on("cpu").memory_bytes > 1.8 * on("gpu").memory_bytes - 4 * model.embedding_weights
    assert on("gpu").sequential_bytes < on("gpu").memory_bytes
