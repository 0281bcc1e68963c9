"""The whole path on the golden checkpoint: pictures and messages in, the official code's ids and texts out.

The reference model stands in for the engines, so this judges pictures, prompts, scatter, caches and generation at once.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lensc.backends.base import Array
from lensc.runtime import sampling
from lensc.runtime.generation import Generation
from lensc.runtime.options import resolve
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Tokenizer, parse_messages

torch = pytest.importorskip("torch", reason="the reference model needs torch: pip install 'lensc[export]'")

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("text_only", "tiny64", "sq448", "multiturn", "wide800x600")
LOGITS, PROBABILITIES, SCORES = 2e-4, 2e-5, 1e-5
"""Tolerances of golden/README.md for float32; beam scores deviate by at most 9.5e-7 there."""


@pytest.fixture(scope="module")
def models() -> dict[str, VLM]:
    """A VLM per vision_padding, over one reference model."""
    from lensc.export.checkpoint import Checkpoint
    from lensc.export.models.session import torch_sessions

    torch.set_num_threads(1)
    checkpoint = Checkpoint(GOLDEN / "checkpoint")
    model = checkpoint.load_model()
    spec = checkpoint.model_spec()
    tokenizer = Tokenizer.from_file(checkpoint.tokenizer)
    table = checkpoint.tensor("llm.model.embed_tokens.weight").numpy()
    made = {}
    for padding in ("official", "masked", "per_slice"):
        picture = dataclasses.replace(spec.picture, vision_padding=padding)
        made[padding] = VLM(dataclasses.replace(spec, picture=picture), tokenizer, torch_sessions(model), table)
    return made


class Case:
    """One recorded conversation."""

    def __init__(self, name: str) -> None:
        self.record: dict[str, Any] = json.loads((GOLDEN / "cases" / f"{name}.json").read_text(encoding="utf-8"))
        self.arrays: dict[str, Array] = dict(np.load(GOLDEN / "cases" / f"{name}.npz"))
        self.messages: list[dict[str, Any]] = []
        if self.record["system_prompt"]:
            self.messages.append({"role": "system", "content": self.record["system_prompt"]})
        for message in self.record["messages"]:
            content = message["content"]
            parts = [content] if isinstance(content, str) else content
            self.messages.append({"role": message["role"], "content": [self._part(part) for part in parts]})

    def _part(self, part: str) -> dict[str, str]:
        if part.startswith("@"):
            return {"type": "image", "image": str(GOLDEN / "images" / f"{part[1:]}.png")}
        return {"type": "text", "text": part}

    def begin(self, vlm: VLM, **options: Any) -> Generation:
        request = vlm.prepare(parse_messages(self.messages))
        return vlm.begin(request, resolve(vlm.spec.generation, **options))


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_prompt_and_its_last_logits(models: dict[str, VLM], case: Case) -> None:
    generation = case.begin(models["official"], max_new_tokens=1)
    assert generation._request.prompt.ids.tolist() == case.arrays["input_ids"][0].tolist()
    np.testing.assert_allclose(generation.prefill(), case.arrays["logits_last"], rtol=0, atol=LOGITS)


def test_greedy(models: dict[str, VLM], case: Case) -> None:
    result = models["official"].chat(case.messages, max_new_tokens=24)
    assert list(result.token_ids) == case.arrays["greedy_ids"].tolist()
    assert result.text == case.record["greedy_text"]
    assert result.finish_reason == ("stop" if result.token_ids[-1] in (1025, 1033) else "length")
    assert result.metrics.prompt_tokens == case.record["prompt_tokens"]


def test_greedy_in_pieces(models: dict[str, VLM], case: Case) -> None:
    stream = models["official"].chat(case.messages, max_new_tokens=24, stream=True, strip_pad=True)
    assert "".join(stream) == case.record["greedy_text"]
    assert list(stream.result.token_ids) == case.arrays["greedy_ids"].tolist()


def test_greedy_with_penalty(models: dict[str, VLM], case: Case) -> None:
    result = models["official"].chat(case.messages, max_new_tokens=24, repetition_penalty=1.2)
    assert list(result.token_ids) == case.arrays["greedy_rp12_ids"].tolist()


def test_beams(models: dict[str, VLM], case: Case) -> None:
    beam = case.record["beam"]
    result = models["official"].chat(case.messages, max_new_tokens=32, num_beams=3)
    assert list(result.token_ids) == beam["ids"]
    assert result.text == beam["text"]


def test_beams_that_came_second_and_third(models: dict[str, VLM], case: Case) -> None:
    beam = case.record["beam"]
    generation = case.begin(models["official"], max_new_tokens=32, num_beams=3)
    list(generation.tokens())
    width = len(beam["top3_ids"][0])
    padded = [[*h.token_ids, *[0] * (width - len(h.token_ids))] for h in generation.hypotheses]
    assert padded == beam["top3_ids"]
    scores = [h.score for h in generation.hypotheses]
    np.testing.assert_allclose(scores, beam["top3_scores"], rtol=0, atol=SCORES)


def test_sampling_probabilities_along_a_recorded_draw(models: dict[str, VLM], case: Case) -> None:
    options = resolve(models["official"].spec.generation, do_sample=True)
    generation = case.begin(models["official"], max_new_tokens=24)
    logits = generation.prefill()
    history = case.arrays["sample_ids"].tolist()
    steps, ids, chances = (case.arrays[f"sample_prob{k}"] for k in ("_step", "_id", ""))
    for step in range(len(history)):
        expected = np.zeros_like(logits)
        expected[ids[steps == step]] = chances[steps == step]
        warped = sampling.warp(
            logits,
            history[:step],
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
        )
        np.testing.assert_allclose(sampling.softmax(warped), expected, rtol=0, atol=PROBABILITIES)
        logits = generation.decoder.decode_one_token(np.array([history[step]]))[0]


@pytest.mark.parametrize("padding", ["per_slice", "masked"])
@pytest.mark.parametrize("name", NAMES[1:])
def test_slices_that_do_not_see_padding(models: dict[str, VLM], name: str, padding: str) -> None:
    case = Case(name)
    vlm = models[padding]
    logits = case.begin(vlm, max_new_tokens=1).prefill()
    np.testing.assert_allclose(logits, case.arrays["per_slice_logits_last"], rtol=0, atol=LOGITS)
    result = vlm.chat(case.messages, max_new_tokens=24)
    assert list(result.token_ids) == case.arrays["per_slice_greedy_ids"].tolist()


def test_padding_makes_a_difference_where_slices_differ_in_size(models: dict[str, VLM]) -> None:
    case = Case("multiturn")
    official = case.begin(models["official"], max_new_tokens=1).prefill()
    assert np.abs(official - case.arrays["per_slice_logits_last"]).max() > 100 * LOGITS
