"""A small model in numpy, made so that errors show, and fixtures on it.

A token's logits depend on its own embedding and on the keys of all before it, in their order; its value rows hold its
position. `recompute` gives the same logits from scratch, without any cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lensc.backends.base import Array, check_feeds
from lensc.backends.bundle import DecoderSpec, GenerationSpec, ModelSpec, PictureSpec
from lensc.export.graph import DimRange, GraphSpec, StatePair, TensorSpec
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Tokenizer

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
                "past": DimRange(0, 9, 9999),
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


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The model, its parts and what makes them: test files cannot import this one."""
    return SimpleNamespace(
        SPEC=SPEC,
        TABLE=TABLE,
        D=D,
        LAYERS=LAYERS,
        CONTEXT=CONTEXT,
        TOKENIZER=TOKENIZER,
        FakeVision=FakeVision,
        FakeDecoder=FakeDecoder,
        make=make,
        picture=picture,
        recompute=recompute,
    )
