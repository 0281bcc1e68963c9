"""The reference model's three parts against independent implementations, on random weights of awkward sizes.

transformers' own classes judge the decoder (Llama) and the tower (Idefics2, SigLIP); torch's MultiheadAttention judges
the resampler.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lensc.export.models.config import ModelConfig, VisionConfig
from lensc.export.models.functions import MASK
from lensc.export.models.minicpmv import MiniCPMV
from lensc.runtime.picture import position_ids, resampler_pos_embed

WHY = "the comparison needs transformers, which is part of the extra lensc[test]"

CONFIG = ModelConfig(
    vision=VisionConfig(
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=980,
        patch_size=14,
        num_channels=3,
        layer_norm_eps=1e-6,
    ),
    query_num=7,
    drop_vision_last_layer=False,
    batch_vision_input=True,
    scale_resolution=448,
    max_slice_nums=9,
    hidden_size=384,
    intermediate_size=200,
    num_hidden_layers=3,
    num_attention_heads=12,
    num_key_value_heads=4,
    vocab_size=301,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_model(config: ModelConfig = CONFIG) -> MiniCPMV:
    torch.manual_seed(0)
    model = MiniCPMV(config)
    for parameter in model.parameters():
        spread = 0.3 if parameter.dim() < 2 else 1.5 / parameter.shape[-1] ** 0.5
        nn.init.normal_(parameter, 1.0 if parameter.dim() < 2 else 0.0, spread)
    return model.eval()


def assert_close(got: Tensor, expected: Tensor, limit: float) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < limit


# --- decoder ------------------------------------------------------------------------------------------------------


def llama(model: MiniCPMV) -> Any:
    transformers = pytest.importorskip("transformers", reason=WHY)
    c = model.config
    config = transformers.LlamaConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        vocab_size=c.vocab_size,
        rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    other = transformers.LlamaForCausalLM(config).eval()
    other.load_state_dict(model.llm.state_dict())
    return other


@pytest.mark.parametrize("batch", [1, 3], ids=["B1", "B3"])
def test_decoder_prefill_equals_llama(batch: int) -> None:
    model = random_model()
    ids = torch.randint(0, 301, (batch, 63), generator=torch.Generator().manual_seed(1))
    expected = llama(model)(ids).logits
    positions = torch.arange(63)
    logits, keys, values = model.llm(model.llm.model.embed_tokens(ids), positions, positions)
    assert_close(logits, expected, 1e-4)
    assert [tuple(t.shape) for t in (*keys, *values)] == [(63, batch, 4, 32)] * 6
    rows = torch.tensor([5, 62, 0])
    assert_close(model.llm(model.llm.model.embed_tokens(ids), positions, rows)[0], expected[:, rows], 1e-4)


def test_decoder_steps_over_the_cache_equal_llama() -> None:
    """Prefill, one token, then several at once (verification of drafts), after each other."""
    model = random_model()
    ids = torch.randint(0, 301, (2, 40), generator=torch.Generator().manual_seed(2))
    embeds = model.llm.model.embed_tokens(ids)
    expected = llama(model)(ids).logits
    cache: list[list[Tensor]] = [[torch.zeros(0, 2, 4, 32)] * 3, [torch.zeros(0, 2, 4, 32)] * 3]
    length = 0
    for tokens in (17, 1, 1, 9, 12):
        new = slice(length, length + tokens)
        positions = torch.arange(length, length + tokens)
        logits, *rows = model.llm(embeds[:, new], positions, torch.arange(tokens), *cache)
        assert_close(logits, expected[:, new], 1e-4)
        cache = [
            [torch.cat(pair) for pair in zip(old, added, strict=True)] for old, added in zip(cache, rows, strict=True)
        ]
        length += tokens


def test_decoder_notices_another_rope_base() -> None:
    model = random_model()
    other = random_model(replace(CONFIG, rope_theta=10000.0))
    ids = torch.arange(50)[None]
    positions = torch.arange(50)
    got = other.llm(model.llm.model.embed_tokens(ids), positions, positions)[0]
    assert float((got - llama(model)(ids).logits).abs().max()) > 1e-2


# --- tower --------------------------------------------------------------------------------------------------------


class Idefics2:
    """transformers' class with the tower's weights, and the position ids that it used last."""

    def __init__(self, model: MiniCPMV) -> None:
        pytest.importorskip("transformers", reason=WHY)
        from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
        from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

        c = model.config.vision
        config = Idefics2VisionConfig(
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            image_size=c.image_size,
            patch_size=c.patch_size,
            attn_implementation="eager",
        )
        self.ids = torch.zeros(0)
        self.tower = Idefics2VisionTransformer(config).eval()
        self.tower.load_state_dict(model.vpm.state_dict())
        self.tower.embeddings.position_embedding.register_forward_pre_hook(self._remember)

    def _remember(self, _: nn.Module, args: tuple[Tensor]) -> None:
        self.ids = args[0]

    def __call__(self, pixels: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.tower(pixel_values=pixels, patch_attention_mask=mask).last_hidden_state
        return out


def pictures(count: int, rows: int, cols: int) -> Tensor:
    return torch.randn(count, 3, 14 * rows, 14 * cols, generator=torch.Generator().manual_seed(3))


def patches(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, patches, 588], row-major, the order of the vision graph's input."""
    batch, _, height, width = pixels.shape
    cut = pixels.reshape(batch, 3, height // 14, 14, width // 14, 14)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 588)


def test_tower_on_a_strip_equals_idefics2_with_one_dimensional_ids() -> None:
    """The official call: a strip one patch high and an all-true mask of one row."""
    model = random_model()
    idefics2 = Idefics2(model)
    pixels = pictures(2, 3, 11)
    strip = patches(pixels).reshape(2, 33, 3, 14, 14).permute(0, 2, 3, 1, 4).reshape(2, 3, 14, 33 * 14)
    expected = idefics2(strip, torch.ones(2, 1, 33, dtype=torch.bool))
    # 33 has no factor with 70, so no coordinate lies on a bucket's boundary, where releases of transformers differ.
    ids = torch.from_numpy(np.tile(position_ids(33), (2, 1)))
    assert torch.equal(idefics2.ids, ids)
    assert_close(model.vpm(patches(pixels), ids, torch.zeros(2, 33)), expected, 5e-5)


def test_tower_on_a_grid_equals_idefics2_with_two_dimensional_ids() -> None:
    """With the ids of the true grid, which the released model does not use, the tower is Idefics2's as well."""
    model = random_model()
    idefics2 = Idefics2(model)
    pixels = pictures(2, 3, 11)
    expected = idefics2(pixels, torch.ones(2, 3, 11, dtype=torch.bool))
    ids = 70 * position_ids(3)[:, None] + position_ids(11)[None, :]
    assert torch.equal(idefics2.ids, torch.from_numpy(np.tile(ids.reshape(-1), (2, 1))))
    assert_close(model.vpm(patches(pixels), idefics2.ids, torch.zeros(2, 33)), expected, 5e-5)
    strip_ids = torch.from_numpy(np.tile(position_ids(33), (2, 1)))
    assert float((model.vpm(patches(pixels), strip_ids, torch.zeros(2, 33)) - expected).abs().max()) > 0.1


def test_masked_padding_equals_idefics2() -> None:
    model = random_model()
    idefics2 = Idefics2(model)
    pixels = pictures(2, 3, 11)
    mask = torch.ones(2, 3, 11, dtype=torch.bool)
    mask[1, :, 7:] = False
    expected = idefics2(pixels, mask)
    bias = torch.where(mask.flatten(1), 0.0, MASK)
    got = model.vpm(patches(pixels), idefics2.ids, bias)
    assert_close(got[mask.flatten(1)], expected[mask.flatten(1)], 5e-5)
    unmasked = model.vpm(patches(pixels), idefics2.ids, torch.zeros(2, 33))
    assert_close(unmasked[0], expected[0], 5e-5)
    assert float((unmasked[1] - expected[1])[mask[1].flatten()].abs().max()) > 0.1


def test_tower_equals_siglip() -> None:
    pytest.importorskip("transformers", reason=WHY)
    from transformers import SiglipVisionConfig, SiglipVisionModel

    vision = replace(CONFIG.vision, image_size=70)
    model = random_model(replace(CONFIG, vision=vision))
    config = SiglipVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vision_use_head=False,
        attn_implementation="eager",
    )
    siglip = SiglipVisionModel(config).eval()
    weights = model.vpm.state_dict()
    ours = set(siglip.state_dict())
    siglip.load_state_dict(weights if ours == set(weights) else {f"vision_model.{k}": v for k, v in weights.items()})
    pixels = pictures(2, 5, 5)
    got = model.vpm(patches(pixels), torch.arange(25).repeat(2, 1), torch.zeros(2, 25))
    assert_close(got, siglip(pixels).last_hidden_state, 5e-5)


# --- resampler ----------------------------------------------------------------------------------------------------


def test_resampler_equals_torch_attention() -> None:
    model = random_model()
    resampler, width = model.resampler, CONFIG.hidden_size
    attention = nn.MultiheadAttention(width, 3, batch_first=True).eval()
    attention.load_state_dict(resampler.attn.state_dict())
    grids = ((3, 11), (4, 5))
    positions = torch.zeros(2, 33, width)
    padding = torch.zeros(2, 33, dtype=torch.bool)
    for i, (rows, cols) in enumerate(grids):
        positions[i, : rows * cols] = torch.from_numpy(resampler_pos_embed(rows, cols, width))
        padding[i, rows * cols :] = True
    seen = torch.randn(2, 33, 48, generator=torch.Generator().manual_seed(4))

    kv = nn.functional.layer_norm(
        seen @ resampler.kv_proj.weight.T, (width,), resampler.ln_kv.weight, resampler.ln_kv.bias, 1e-6
    )
    query = resampler.ln_q(resampler.query).repeat(2, 1, 1)
    mixed = attention(query, kv + positions, kv, key_padding_mask=padding, need_weights=False)[0]
    expected = resampler.ln_post(mixed) @ resampler.proj
    got = resampler(seen, torch.where(padding, MASK, 0.0), positions)
    assert_close(got, expected, 1e-4)
    seen[1, 20:] = 1e3
    assert_close(resampler(seen, torch.where(padding, MASK, 0.0), positions), expected, 1e-4)
