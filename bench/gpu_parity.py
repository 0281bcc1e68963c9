"""Whether the programs compute on this device what plain torch computes in float32 from the same weights.

Layers have their full width and are few, so that the judge is one of the same weights in float32: float32 against float32
shows that the steps are right, bfloat16 and int4 against it what rounding costs. A decoder sees a prompt, single tokens,
drafted tokens and two sequences; its judge sees all of it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lensc.backends._program import Program
from lensc.export.models.config import ModelConfig

from .gpu_clock import sqnr_db
from .gpu_program import RandomSource, decoder_program, vision_program
from .gpu_torch import TorchDecoder, TorchVision

FLOAT32_DB, BFLOAT16_DB = 60.0, 30.0
"""What is asked for. Sums of float32 in another order differ by -110 dB; a bfloat16 has 8 bits, which are 50 dB in each
product, and the layers of the test add up to 36 to 40."""

Precision = Literal["float32", "bfloat16", "int4", "int4 in float32"]
DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int4": torch.bfloat16,
    "int4 in float32": torch.float32,
}


@dataclass(frozen=True)
class Finding:
    """One comparison."""

    what: str
    db: float
    least: float

    @property
    def passed(self) -> bool:
        return self.db >= self.least


@dataclass(frozen=True)
class Sizes:
    """What is fed: tokens of the prompt, single tokens behind it, drafted tokens behind those; slices and their patches."""

    layers: int
    prompt: int
    single: int
    drafted: int
    slices: int
    patches: int


LARGE = Sizes(layers=2, prompt=257, single=8, drafted=4, slices=2, patches=1024)
SMALL = Sizes(layers=1, prompt=9, single=1, drafted=2, slices=2, patches=5)


def decoder(config: ModelConfig, device: torch.device, sizes: Sizes, precision: Precision) -> Iterator[Finding]:
    """The decoder in one precision."""
    from lensc.backends._cuda_session import CudaDecoderSession

    source = RandomSource(device)
    dtype = DTYPES[precision]
    least = FLOAT32_DB if dtype == torch.float32 else BFLOAT16_DB
    weight: Literal["f32", "uint4"] = "uint4" if "int4" in precision else "f32"
    group = min(128, config.hidden_size // 2)
    spec, program = decoder_program(config, sizes.layers, weight, group)
    total = sizes.prompt + sizes.single + sizes.drafted
    embeds = torch.randn(2, total, config.hidden_size, generator=torch.Generator(device).manual_seed(2), device=device)
    expected = _judged(config, program, source, sizes, embeds)
    session = CudaDecoderSession(spec, program, source, dtype)
    name = f"decoder, {precision}"

    cache = session.new_cache(total + 1)
    rows = [0, sizes.prompt // 2, sizes.prompt - 1]
    found = session.step_on_device(embeds[:1, : sizes.prompt], cache, rows)
    yield Finding(f"{name}: prompt of {sizes.prompt}", sqnr_db(found, expected[:1, rows]), least)
    at = sizes.prompt
    ends = at + sizes.single
    tokens = [session.step_on_device(embeds[:1, i : i + 1], cache, [0]).clone() for i in range(at, ends)]
    yield Finding(f"{name}: {sizes.single} tokens", sqnr_db(torch.cat(tokens, 1), expected[:1, at:ends]), least)
    found = session.step_on_device(embeds[:1, ends:], cache, range(sizes.drafted))
    yield Finding(f"{name}: {sizes.drafted} drafted", sqnr_db(found, expected[:1, ends:]), least)

    cache.trim(at)
    feeds = {
        "inputs_embeds": embeds[:1, at : at + 1].cpu().numpy(),
        "position_ids": np.array([at]),
        "logit_positions": np.array([0]),
    }
    answer = torch.from_numpy(np.array(session.step(feeds, cache)["logits"])).to(device)
    yield Finding(f"{name}: a token again, from numpy", sqnr_db(answer, expected[:1, at : at + 1]), least)

    pair = session.new_cache(total, 2)
    session.step_on_device(embeds[:, :at].contiguous(), pair, [0])
    found = session.step_on_device(embeds[:, at : at + 1].contiguous(), pair, [0])
    yield Finding(f"{name}: two sequences", sqnr_db(found, expected[:, at : at + 1]), least)
    session.close()


def _judged(config: ModelConfig, program: Program, source: RandomSource, sizes: Sizes, embeds: Tensor) -> Tensor:
    """Logits of all tokens, read at once."""
    total = embeds.shape[1]
    judge = TorchDecoder(config, program, source, torch.float32, sizes.layers, total, 2)
    logits: Tensor = judge(embeds, torch.arange(total, device=embeds.device), range(total), 0)
    return logits


def vision(config: ModelConfig, device: torch.device, sizes: Sizes, precision: Precision) -> Iterator[Finding]:
    """Tower and resampler, keys of the last slice masked in part."""
    from lensc.backends._cuda_session import CudaSession

    source, dtype = RandomSource(device), DTYPES[precision]
    least = FLOAT32_DB if dtype == torch.float32 else BFLOAT16_DB
    config = replace(
        config, vision=replace(config.vision, num_hidden_layers=sizes.layers), drop_vision_last_layer=False
    )
    spec, program = vision_program(config)
    feeds = vision_feeds(config, device, sizes.slices, sizes.patches)
    session = CudaSession(spec, program, source, dtype)
    judge = TorchVision(config, program, source, torch.float32)
    name = f"vision, {precision}"
    yield Finding(f"{name}: slices", sqnr_db(session.run_on_device(feeds)["image_embeds"], judge(**feeds)), least)
    masked = {**feeds, "attention_bias": feeds["attention_bias"].clone(), "key_bias": feeds["key_bias"].clone()}
    for bias in (masked["attention_bias"], masked["key_bias"]):
        bias[-1, sizes.patches // 2 :] = -1e4
    expected = judge(**masked)
    yield Finding(f"{name}: keys masked", sqnr_db(session.run_on_device(masked)["image_embeds"], expected), least)
    answer = session.run({key: value.cpu().numpy() for key, value in masked.items()})["image_embeds"]
    yield Finding(
        f"{name}: the same from numpy", sqnr_db(torch.from_numpy(np.array(answer)).to(device), expected), least
    )
    session.close()


def vision_feeds(config: ModelConfig, device: torch.device, slices: int, patches: int) -> dict[str, Tensor]:
    """Random slices, nothing masked."""
    random = torch.Generator(device).manual_seed(3)
    pixels, width = config.vision.num_channels * config.patch_size**2, config.hidden_size

    def normal(width: int) -> Tensor:
        return torch.randn(slices, patches, width, generator=random, device=device)

    ids = torch.randint(0, config.vision.pos_grid**2, (slices, patches), generator=random, device=device)
    nothing = torch.zeros(slices, patches, device=device)
    return {
        "patches": normal(pixels),
        "position_ids": ids,
        "attention_bias": nothing,
        "key_bias": nothing.clone(),
        "key_pos_embed": normal(width),
    }


Check = Callable[[ModelConfig, torch.device, Sizes, Precision], Iterator[Finding]]
CHECKS: tuple[tuple[str, Check, Precision], ...] = (
    ("decoder float32", decoder, "float32"),
    ("decoder bfloat16", decoder, "bfloat16"),
    ("decoder int4 in float32", decoder, "int4 in float32"),
    ("decoder int4", decoder, "int4"),
    ("vision float32", vision, "float32"),
    ("vision bfloat16", vision, "bfloat16"),
)
"""By the name under which others ask whether it passed."""
