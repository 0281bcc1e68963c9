"""Whole answers on every backend: what is kept from an earlier answer changes no token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference model needs torch: pip install 'lensc[export]'")
import torch

from lensc.backends import registry
from lensc.backends.base import Array, Session, StaticBackend, Target
from lensc.backends.bundle import DecoderSpec, GenerationSpec, ModelSpec, PictureSpec
from lensc.backends.errors import UsageError
from lensc.backends.load_options import LoadOptions
from lensc.export.graph import Graph
from lensc.export.models.config import ModelConfig
from lensc.export.models.minicpmv import MiniCPMV
from lensc.export.models.session import graph_modules
from lensc.export.onnx import example_inputs, export_graph
from lensc.runtime.decoder import with_cache
from lensc.runtime.generation import Generation, Request
from lensc.runtime.options import resolve
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Prompt, Tokenizer
from lensc.runtime.speculation import Speculation

TOKENIZER = Tokenizer.from_file(Path(__file__).parents[1] / "golden" / "checkpoint" / "tokenizer.json")
VOCAB, QUERIES, WIDTH, CONTEXT = 101, 5, 128, 512
SPEC = ModelSpec(
    "tiny",
    PictureSpec(56, 14, 4, QUERIES, "official", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 10),
    DecoderSpec(WIDTH, 2, 2, 32, VOCAB, CONTEXT),
    GenerationSpec(eos_token_ids=(VOCAB - 1,), max_new_tokens=24),
)
CONFIG = ModelConfig.from_json(
    {
        "model_type": "minicpmv",
        "hidden_size": WIDTH,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "query_num": QUERIES,
        "rope_theta": 500000.0,
        "max_position_embeddings": CONTEXT,
        "drop_vision_last_layer": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "slice_config": {"max_slice_nums": 4, "patch_size": 14, "scale_resolution": 56},
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 100,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 140,
            "patch_size": 14,
        },
    }
)


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    """Vision and decoder of a small random model."""
    torch.manual_seed(3)
    model = MiniCPMV(CONFIG).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        scale = 0.15 if parameter.ndim == 1 else 0.7 * parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1 and name.endswith("weight")))
    folder = tmp_path_factory.mktemp("graphs")
    return {
        name: export_graph(module, example_inputs(spec), spec, folder / f"{name}.onnx")
        for name, (module, spec) in graph_modules(model).items()
        if name in ("vision", "decoder")
    }


def targets() -> list[Any]:
    found = []
    for probe in registry.probes():
        if isinstance(registry.get(probe.backend), StaticBackend):
            continue  # graphs of fixed shapes for a named chip have a file of their own, test_qnn.py
        marks = () if probe.usable else pytest.mark.skip(reason=probe.reason)
        target = Target(probe.backend, probe.processor)
        found.append(pytest.param(target, id=str(target), marks=marks))
    return found


@pytest.fixture(scope="module", params=targets())
def sessions(
    request: pytest.FixtureRequest, graphs: dict[str, Graph], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Session]]:
    target: Target = request.param
    backend = registry.get(target.backend)
    made = {}
    for name, graph in graphs.items():
        bundle = tmp_path_factory.mktemp("bundle")
        (bundle / name).mkdir()
        made[name] = backend.load(
            backend.compile(graph, target, bundle / name), graph.spec, bundle, LoadOptions(threads=1)
        )
    yield made
    for session in made.values():
        session.close()


TABLE = np.random.default_rng(5).normal(size=(VOCAB, WIDTH)).astype(np.float32)


def make(sessions: dict[str, Session], **options: Any) -> VLM:
    return VLM(SPEC, TOKENIZER, sessions, TABLE, **options)


def picture(seed: int, side: int = 56) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def request_of(*parts: Any) -> Request:
    """A prompt of ids and slices: where a slice is, as many placeholders, with an id before and one behind."""
    ids: list[int] = []
    bounds, slices = [], []
    for part in parts:
        if isinstance(part, np.ndarray):
            bounds.append((len(ids) + 1, len(ids) + 1 + QUERIES))
            slices.append(part)
            part = [3, *[0] * QUERIES, 4]
        ids += part
    prompt = Prompt(np.array(ids, np.int64), np.array(bounds, np.int64).reshape(-1, 2))
    return Request(prompt, tuple(slices), (1,) * len(slices), (), 0.0)


def answer(vlm: VLM, *parts: Any, **options: Any) -> Generation:
    generation = vlm.begin(request_of(*parts), resolve(SPEC.generation, **options))
    list(generation.tokens())
    return generation


def test_a_saved_cache_is_gone_on_with(sessions: dict[str, Session]) -> None:
    """As if it had never left the engine; what is no cache of this kind is refused."""
    first, more = [TEXT[:30], picture(1), TEXT[30:40]], TEXT[45:]
    one = make(sessions)
    said = answer(one, *first).token_ids
    expected = answer(one, *first, said, more)
    (held,) = one._decoder.prefixes._held
    arrays = {name: array.copy() for name, array in held.cache.save().items()}
    two = make(sessions)
    restored = with_cache(two._decoder.session, SPEC.decoder).new_cache(1)
    for broken in (
        {},
        {name: array[..., :-1] for name, array in arrays.items()},
        {name: array.astype(np.float64) for name, array in arrays.items()},
        arrays | {"more": next(iter(arrays.values()))},
    ):
        with pytest.raises(UsageError, match=r"KV cache: these are not its tokens|no scales"):
            restored.restore(broken)
    restored.restore(arrays)
    assert restored.length == len(held.rows)
    restored.trim(held.cache.length - len(more) - 3)
    two._decoder.prefixes.give(held.rows, restored)
    again = answer(two, *first, said, more)
    assert again.result("").metrics.reused_tokens > 40
    assert again.token_ids == expected.token_ids


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}], ids=["greedy", "draw"])
@pytest.mark.parametrize("guessed", [1, 3, 7])
def test_guessed_tokens_change_none(
    sessions: dict[str, Session], guessed: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guesses that are right, and from some place on wrong, at every place of the answer."""
    prompt: list[Any] = [TEXT[:30], picture(1), TEXT[30:40]]
    plain = answer(make(sessions), *prompt, prompt_lookup_num_tokens=0, **options)
    expected = plain.token_ids
    assert len(expected) > 12

    def draft(self: Speculation, most: int) -> list[int]:
        at = len(self._ids) + len(self._pending) - len(request_of(*prompt).prompt.ids)
        ids = expected[at : at + min(guessed, most)]
        return [*ids[:-1], (ids[-1] + 1) % VOCAB] if at % 3 and ids else ids

    monkeypatch.setattr(Speculation, "draft", draft)
    found = answer(make(sessions, prefix_cache_bytes=0), *prompt, **options)
    assert found.token_ids == expected
    metrics = found.result("").metrics
    assert 0 < metrics.accepted_tokens <= metrics.drafted_tokens
    assert metrics.kv_cache_bytes == plain.result("").metrics.kv_cache_bytes


TEXT = [int(i) for i in np.random.default_rng(7).integers(5, VOCAB - 1, 60)]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 3}], ids=["greedy", "beams", "draw"]
)
def test_turns_give_the_same_tokens_with_and_without_the_prefix_cache(
    sessions: dict[str, Session], options: dict[str, Any]
) -> None:
    kept, fresh = make(sessions), make(sessions, prefix_cache_bytes=0)
    first: list[Any] = [TEXT[:30], picture(1), TEXT[30:40]]
    outcomes = []
    for vlm in (kept, fresh):
        one = answer(vlm, *first, **options)
        # the answer, cut as a chat template would, a second picture, another question
        two = answer(vlm, *first, one.token_ids[:-2], TEXT[:3], picture(2), TEXT[40:], **options)
        # another question about the first picture, at the place of the one before
        three = answer(vlm, *first[:-1], TEXT[45:], **options)
        outcomes.append([g.token_ids for g in (one, two, three)])
        reused = [g.result("").metrics.reused_tokens for g in (one, two, three)]
        prompt = len(request_of(*first).prompt.ids)
        said = 0 if "num_beams" in options else len(one.token_ids) - 2
        shared = 30 + QUERIES + 2
        if vlm is kept:
            assert reused[:2] == [0, prompt + said] and shared <= reused[2] < shared + 3
        else:
            assert reused == [0, 0, 0]
    assert outcomes[0] == outcomes[1]
    assert len({tuple(ids) for ids in outcomes[0]}) > 1


@pytest.mark.parametrize("beams", [1, 3])
def test_pictures_encoded_beside_the_prompt_change_nothing(
    sessions: dict[str, Session], beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens and logits; slices of three sizes, so that "official" pads two of them."""
    monkeypatch.setattr("lensc.runtime.overlap.ROUND", 16)
    monkeypatch.setattr("lensc.runtime.decoder.LEAST_PIECE", 4)
    parts = [TEXT[:20], picture(1), picture(2, 42), TEXT[20:24], picture(3, 28), picture(4), TEXT[30:40]]
    found = []
    for overlap in (True, False):
        vlm = make(sessions, overlap=overlap)
        again = vlm.begin(request_of(*parts), resolve(SPEC.generation, max_new_tokens=1))
        logits = again.prefill()
        fed = next(span.name for span in again.timeline.spans if span.track == "decoder")
        assert fed == ("feed 16 tokens" if overlap else "feed 62 tokens")
        found.append((logits, answer(make(sessions, overlap=overlap), *parts, num_beams=beams).token_ids))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-4 * np.abs(found[1][0]).max())
    assert found[0][1] == found[1][1]
