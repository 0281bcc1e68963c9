"""A context of 8192 tokens on every engine that keeps its own cache: fed in pieces up to the last token, which is decoded, and
not one more. The cache of all others is the host's (`tests/runtime/test_kv_cache.py`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs it for its attention: pip install 'lensc[export]'")
pytest.importorskip("onnx", reason="pip install 'lensc[export]'")

from lensc.backends import registry
from lensc.backends.base import Array, StaticBackend, Target
from lensc.backends.bundle import DecoderSpec
from lensc.backends.errors import PromptError
from lensc.backends.load_options import LoadOptions
from lensc.export.graph import Graph
from lensc.runtime.decoder import pieces, with_cache

from . import conftest

CONTEXT = 8192


def targets() -> list[Any]:
    found = []
    for probe in registry.probes():
        if isinstance(registry.get(probe.backend), StaticBackend) or probe.backend == "reference":
            continue  # a graph for an NPU has a context of its own: test_qnn_decoder.py
        marks = () if probe.usable else pytest.mark.skip(reason=probe.reason)
        target = Target(probe.backend, probe.processor)
        found.append(pytest.param(target, None, id=str(target), marks=marks))
        if probe.backend == "native":
            found.append(pytest.param(target, 8, id=f"{target}-kv8", marks=marks))
    return found


def last_logits(small: Any, embeds: Array, frequencies: Array) -> Array:
    """Of the last position of `embeds: float32[tokens, width]`, from the definition; no cache."""
    weights = {name: torch.from_numpy(np.asarray(weight, np.float32)) for name, weight in small.weights.items()}
    angles = torch.arange(len(embeds))[:, None] * torch.from_numpy(np.tile(frequencies, 2))

    def norm(x: Any, weight: Any) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + conftest.EPSILON) * weight

    def rotate(x: Any) -> Any:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    x = torch.from_numpy(embeds)
    for i in range(small.layers):
        normal = norm(x, weights[f"norm.{i}"])
        q, k, v = ((normal @ weights[f"{n}.{i}"].T).unflatten(-1, (-1, small.head_dim)).transpose(0, 1) for n in "qkv")
        groups = len(q) // len(k)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            rotate(q)[None],
            rotate(k).repeat_interleave(groups, 0)[None],
            v.repeat_interleave(groups, 0)[None],
            is_causal=True,
        )
        x = x + mixed[0].transpose(0, 1).flatten(1) @ weights[f"o.{i}"].T
    logits: Array = (norm(x[-1], weights["norm"]) @ weights["head"].T).numpy()
    return logits


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Array, Array]:
    """A decoder with a context of 8192, more embeddings than that, and the logits behind the last that fits.

    It has one layer and two heads: what takes the time is that all tokens see all before them.
    """
    path = tmp_path_factory.mktemp("long") / "decoder.onnx"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LIMIT": CONTEXT, "LAYERS": 1, "HEADS": 2, "KV_HEADS": 1, "DIM": 32}.items():
            patch.setattr(conftest, name, value)
        weights = conftest.write_decoder(path)
        frequencies = conftest.frequencies()
        small = conftest.SmallDecoder(
            Graph(conftest.spec(), path, "f32", "0" * 64), weights, layers=1, kv_heads=1, head_dim=32
        )
    embeds = small.embeddings(1, CONTEXT + 1)[0]
    return small, embeds, last_logits(small, embeds[:CONTEXT], frequencies)


@pytest.mark.parametrize(("target", "kv_bits"), targets())
def test_the_last_token_of_8192_and_none_behind_it(
    target: Target, kv_bits: int | None, text: tuple[Any, Array, Array], tmp_path: Path
) -> None:
    small, embeds, expected = text
    spec = DecoderSpec(small.width, small.layers, small.kv_heads, small.head_dim, len(expected), CONTEXT)
    backend = registry.get(target.backend)
    (tmp_path / target.slug).mkdir()
    graph = dataclasses.replace(small.graph, scheme="f32" if kv_bits is None else f"f32-kv{kv_bits}")
    artifact = backend.compile(graph, target, tmp_path / target.slug)
    session = with_cache(backend.load(artifact, graph.spec, tmp_path, LoadOptions(threads=1)), spec)
    cache = session.new_cache(CONTEXT)

    def feed(start: int, end: int) -> Array:
        feeds = {"inputs_embeds": embeds[None, start:end], "position_ids": np.arange(start, end)}
        logits: Array = session.step(feeds | {"logit_positions": np.array([end - start - 1])}, cache)["logits"][0, 0]
        return logits

    for start, end in pieces(CONTEXT - 1, session.prefill_chunk):
        feed(start, end)
    got = feed(CONTEXT - 1, CONTEXT)
    tolerance = 1e-3 if kv_bits is None else 3e-2
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(PromptError, match=f"{CONTEXT + 1} tokens"):
        feed(CONTEXT, CONTEXT + 1)
    assert cache.length == CONTEXT
    session.close()
