"""The vision step: slices are encoded one by one, and once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lensc.runtime import vision as vision_module
from lensc.runtime.picture import vision_feeds
from lensc.runtime.prompt import user_messages

QUESTION = "What is it?"


def test_a_picture_is_encoded_once(tiny: Any) -> None:
    vlm, vision, _ = tiny.make()
    first = vlm.generate(QUESTION, [tiny.picture(56, 56)])
    runs = len(vision.runs)
    second = vlm.generate("Something else?", [tiny.picture(56, 56)])
    assert runs == len(vision.runs) == len(first.metrics.image_ms) == 5
    assert (first.metrics.slices_from_cache, second.metrics.slices_from_cache) == (0, 5)
    assert second.metrics.image_ms == (0.0,) * 5
    assert "picture 1: 5 of 5 slices reused from the cache" in second.metrics.notes
    assert vlm.generate(QUESTION, [tiny.picture(56, 56)]).token_ids == first.token_ids


def test_a_picture_given_twice_is_encoded_once(tiny: Any) -> None:
    vlm, vision, _ = tiny.make()
    vlm.generate(QUESTION, [tiny.picture(), tiny.picture()])
    assert len(vision.runs) == 1


WIDE = (49, 28)
"""Its overview has 6 patches, its two cells 4 each; a 28x28 picture has 4."""


@pytest.mark.parametrize(("padding", "again"), [("official", True), ("masked", False), ("per_slice", False)])
def test_features_are_reused_only_where_they_are_the_same(tiny: Any, padding: Any, again: bool) -> None:
    # The small picture is shorter than the slices of the other, so only "official" pads it there.
    spec = dataclasses.replace(tiny.SPEC, picture=dataclasses.replace(tiny.SPEC.picture, vision_padding=padding))
    vlm, vision, _ = tiny.make(spec)
    small, large = tiny.picture(28, 28), tiny.picture(*WIDE, 1)
    alone = vlm.prepare(user_messages(QUESTION, [small])).slices
    together = vlm.prepare(user_messages(QUESTION, [small, large])).slices
    first = vlm._vision.encode(alone)
    both = vlm._vision.encode(together)
    assert both.from_cache[0] != again
    assert np.array_equal(both.embeds[0], first.embeds[0]) != again
    assert vision.runs == ([4, 6, 6, 6, 6] if again else [4, 6, 4, 4])


def test_slice_by_slice_equals_the_whole_batch(tiny: Any) -> None:
    vlm, _, _ = tiny.make()
    slices = vlm.prepare(user_messages(QUESTION, [tiny.picture(*WIDE, 1), tiny.picture()])).slices
    batch = vision_feeds(slices, tiny.SPEC.picture, tiny.D)[0]
    np.testing.assert_array_equal(vlm._vision.encode(slices).embeds, tiny.FakeVision().run(batch.feeds)["image_embeds"])


def test_the_least_recently_used_features_go_first(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_module, "CACHE_BYTES", 2 * 3 * tiny.D * 4)
    vlm, vision, _ = tiny.make()
    for seed in (1, 2, 1, 3, 1, 2):
        vlm.generate(QUESTION, [tiny.picture(seed=seed)], max_new_tokens=1)
    # 1, 2 and 3 are encoded; 3 drops 2, not 1, which was used after it; 2 comes again.
    assert len(vision.runs) == 4
