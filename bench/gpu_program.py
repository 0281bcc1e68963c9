"""The programs of the model at its true size, and random weights for them, made where they are used.

Lowering needs a graph, and a graph a checkpoint of 17 GB. A program is a list of steps that follows from a configuration,
and its weights need to be no more than random, so both are made here: `decoder_program` and `vision_program` give the
steps that `backends._program_lower` gives for an exported graph, with places that point nowhere, and `RandomSource` draws
a constant from its name whenever it is asked for it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from lensc.backends._program import (
    BITS,
    Add,
    Attention,
    CausalAttention,
    Constant,
    GatherRows,
    GeluTanh,
    Kind,
    Linear,
    Normalize,
    Place,
    Port,
    Program,
    SelectRows,
    SiluMul,
    Step,
    Value,
    WeightRecord,
)
from lensc.export.graph import GraphSpec
from lensc.export.models.config import ModelConfig, VisionConfig
from lensc.export.models.session import decoder_spec, vision_spec

FULL = ModelConfig(
    vision=VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=980,
        patch_size=14,
        num_channels=3,
        layer_norm_eps=1e-6,
    ),
    query_num=96,
    drop_vision_last_layer=False,
    batch_vision_input=True,
    scale_resolution=448,
    max_slice_nums=9,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=8192,
    bos_token_id=128000,
    eos_token_id=128001,
)
"""That of the published model."""

TINY = replace(
    FULL,
    vision=replace(FULL.vision, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4),
    query_num=3,
    hidden_size=128,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=48,
    bos_token_id=0,
    eos_token_id=1,
)
"""What Triton's interpreter computes in seconds; 128 is the narrowest decoder that a resampler has a head for."""

LAYER_NORM_EPSILON = 1e-6
"""Of the resampler, whatever the configuration says of the tower."""
FREQUENCIES = "inverse_frequencies"
ROW_ALIGNMENT = 64


def decoder_program(
    config: ModelConfig, layers: int, weight: Literal["f32", "uint4"], group: int = 128
) -> tuple[GraphSpec, Program]:
    """The decoder with `layers` layers and the head; `group` inputs share a scale of a quantized weight."""
    width, dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    spec = decoder_spec(replace(config, num_hidden_layers=layers))
    steps = _Steps(weight, group)
    tokens = "batch*tokens"
    frequencies = steps.constant(FREQUENCIES, 1, dim // 2)
    stream = steps.input("inputs_embeds", tokens, width)

    def normalized(x: int, name: str) -> int:
        return steps.normalize("rms", x, f"{name}.weight", None, config.rms_norm_eps)

    for layer in range(layers):
        at = f"llm.model.layers.{layer}"
        x = normalized(stream, f"{at}.input_layernorm")
        q = steps.linear(x, f"{at}.self_attn.q_proj.weight", heads * dim)
        k = steps.linear(x, f"{at}.self_attn.k_proj.weight", kv_heads * dim)
        v = steps.linear(x, f"{at}.self_attn.v_proj.weight", kv_heads * dim)
        mixed = steps.makes(
            tokens,
            heads * dim,
            lambda y, q=q, k=k, v=v, layer=layer: CausalAttention(  # type: ignore[misc]  # bound now, not at the end
                q, k, v, y, layer, heads, kv_heads, dim, dim**-0.5, frequencies
            ),
        )
        stream = steps.linear(mixed, f"{at}.self_attn.o_proj.weight", width, residual=stream)
        x = normalized(stream, f"{at}.post_attention_layernorm")
        gate = steps.linear(x, f"{at}.mlp.gate_proj.weight", config.intermediate_size)
        up = steps.linear(x, f"{at}.mlp.up_proj.weight", config.intermediate_size)
        product = steps.makes(
            tokens,
            config.intermediate_size,
            lambda y, gate=gate, up=up: SiluMul(gate, up, y),  # type: ignore[misc]
        )
        stream = steps.linear(product, f"{at}.mlp.down_proj.weight", width, residual=stream)
    last = stream
    picked = steps.makes("batch*rows", width, lambda y: SelectRows(last, "logit_positions", y))
    logits = steps.linear(normalized(picked, "llm.model.norm"), "llm.lm_head.weight", config.vocab_size)
    return spec, steps.program("decoder", Port("logits", logits))


def vision_program(config: ModelConfig, weight: Literal["f32", "int8"] = "f32") -> tuple[GraphSpec, Program]:
    """Tower and resampler. In int8 weights have a scale for each output, the patch embedding stays in float."""
    tower, width = config.vision, config.hidden_size
    wide, patches, queries = tower.hidden_size, "slices*patches", f"slices*{config.query_num}"
    steps = _Steps(weight, 0)
    pixels = steps.input("patches", patches, tower.num_channels * tower.patch_size**2)
    positions = steps.input("key_pos_embed", patches, width)

    def normalized(x: int, name: str, epsilon: float) -> int:
        return steps.normalize("layer", x, f"{name}.weight", f"{name}.bias", epsilon)

    def attended(q: int | Constant, k: int, v: int, bias: str, heads: int, dim: int) -> int:
        rows = queries if isinstance(q, Constant) else patches
        return steps.makes(
            rows, heads * dim, lambda y: Attention(q, k, v, bias, y, heads, float(np.float32(dim**-0.5)))
        )

    def linear(x: int, name: str, outputs: int, residual: int | None = None, kind: Kind | None = None) -> int:
        return steps.linear(x, f"{name}.weight", outputs, f"{name}.bias", residual, kind)

    table = steps.constant("vpm.embeddings.position_embedding.weight", tower.pos_grid**2, wide)
    stream = steps.makes(patches, wide, lambda y: GatherRows(table, "position_ids", y))
    stream = linear(pixels, "vpm.embeddings.patch_embedding", wide, stream, "f32")
    for layer in range(tower.num_hidden_layers - config.drop_vision_last_layer):
        at, heads = f"vpm.encoder.layers.{layer}", tower.num_attention_heads
        x = normalized(stream, f"{at}.layer_norm1", tower.layer_norm_eps)
        q, k, v = (linear(x, f"{at}.self_attn.{name}_proj", wide) for name in "qkv")
        mixed = attended(q, k, v, "attention_bias", heads, wide // heads)
        stream = linear(mixed, f"{at}.self_attn.out_proj", wide, stream)
        x = normalized(stream, f"{at}.layer_norm2", tower.layer_norm_eps)
        x = linear(x, f"{at}.mlp.fc1", tower.intermediate_size)
        x = steps.makes(patches, tower.intermediate_size, lambda y, x=x: GeluTanh(x, y))  # type: ignore[misc]
        stream = linear(x, f"{at}.mlp.fc2", wide, stream)
    features = normalized(stream, "vpm.post_layernorm", tower.layer_norm_eps)
    at = "resampler.attn"
    kv = normalized(steps.linear(features, "resampler.kv_proj.weight", width), "resampler.ln_kv", LAYER_NORM_EPSILON)
    placed = steps.makes(patches, width, lambda y: Add(kv, positions, y))
    k = steps.linear(placed, f"{at}.in_proj_weight.k", width, f"{at}.in_proj_bias.k")
    v = steps.linear(kv, f"{at}.in_proj_weight.v", width, f"{at}.in_proj_bias.v")
    query = steps.constant("resampler.query", config.query_num, width)
    heads = config.resampler_heads
    mixed = attended(query, k, v, "key_bias", heads, width // heads)
    x = normalized(linear(mixed, f"{at}.out_proj", width), "resampler.ln_post", LAYER_NORM_EPSILON)
    return vision_spec(config), steps.program("vision", Port("image_embeds", steps.linear(x, "resampler.proj", width)))


@dataclass
class _Steps:
    """A program while its steps are listed: the inputs are asked for first, and each step makes the next value."""

    kind: Kind
    group: int
    values: list[Value] = field(default_factory=list)
    inputs: list[Port] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    _end: int = 0

    def program(self, name: str, output: Port) -> Program:
        return Program(name, ("nowhere",), tuple(self.values), tuple(self.inputs), tuple(self.steps), (output,))

    def input(self, name: str, rows: str, width: int) -> int:
        self.values.append(Value(rows, width))
        self.inputs.append(Port(name, len(self.values) - 1))
        return self.inputs[-1].value

    def makes(self, rows: str, width: int, step: Callable[[int], Step]) -> int:
        self.values.append(Value(rows, width))
        self.steps.append(step(len(self.values) - 1))
        return len(self.values) - 1

    def normalize(self, kind: Literal["rms", "layer"], x: int, weight: str, bias: str | None, epsilon: float) -> int:
        value = self.values[x]
        parts = (self.constant(weight, 1, value.width), None if bias is None else self.constant(bias, 1, value.width))
        # an attribute of a graph is a float32
        rounded = float(np.float32(epsilon))
        return self.makes(value.rows, value.width, lambda y: Normalize(kind, x, *parts, rounded, y))

    def linear(
        self,
        x: int,
        name: str,
        outputs: int,
        bias: str | None = None,
        residual: int | None = None,
        kind: Kind | None = None,
    ) -> int:
        record = self.weight(name, outputs, self.values[x].width, kind or self.kind)
        shift = None if bias is None else self.constant(bias, 1, outputs)
        return self.makes(self.values[x].rows, outputs, lambda y: Linear(x, record, shift, residual, y))

    def constant(self, name: str, rows: int, width: int) -> Constant:
        return Constant(name, rows, width, self._place(4 * rows * width))

    def weight(self, name: str, outputs: int, inputs: int, kind: Kind) -> WeightRecord:
        group = 0 if kind == "f32" or self.group >= inputs else self.group
        values = self._place(outputs * inputs * BITS[kind] // 8)
        scale = None if kind == "f32" else self._place(4 * outputs * (-(-inputs // group) if group else 1))
        return WeightRecord(name, kind, outputs, inputs, group, values, scale, None, "float")

    def _place(self, size: int) -> Place:
        """The next, so that no two constants are one."""
        start, self._end = self._end, self._end + -(-size // ROW_ALIGNMENT) * ROW_ALIGNMENT
        return Place("nowhere", start)


# --- weights ------------------------------------------------------------------------------------------------------

SPREAD = {"norm": 0.1, "bias": 0.02, "position_embedding": 0.5, "query": 1.0}
"""Standard deviations of constants; norm weights lie around 1, all others around 0."""


class RandomSource:
    """A source of constants (`backends._cuda_weights.Source`) that draws them on `device`: the same name, the same values.

    A linear that is fed values of deviation 1 gives such values. Scales of quantized weights differ by up to a half and in
    sign, so that a scale in a wrong place shows. Nothing is kept.
    """

    def __init__(self, device: torch.device, seed: int = 1, theta: float = FULL.rope_theta) -> None:
        self.device = device
        self._seed = seed
        self._theta = theta

    def constant(self, constant: Constant) -> torch.Tensor:
        """float32[rows, width]."""
        shape = (constant.rows, constant.width)
        if constant.name == FREQUENCIES:
            # in float64, as the model takes the powers: export.models.functions.inverse_frequencies
            exponents = torch.arange(constant.width, dtype=torch.float64, device=self.device) / constant.width
            powers = torch.pow(self._theta, exponents).float()
            return torch.reciprocal(powers).reshape(shape)
        name = constant.name.removesuffix(".weight")
        kind = next((kind for kind in ("bias", "position_embedding", "query") if kind in name), "norm")
        drawn = self._normal(constant.name, shape).mul_(SPREAD[kind])
        return drawn + 1 if kind == "norm" else drawn

    def values(self, weight: WeightRecord) -> torch.Tensor:
        """f32: float32[outputs, inputs]; uint4, uint2: uint8[outputs, inputs * bits / 8]; int8: int8[outputs, inputs]."""
        if weight.kind == "f32":
            return self._normal(weight.name, (weight.outputs, weight.inputs)).mul_(weight.inputs**-0.5)
        if weight.kind == "int8":
            return self._integers(weight.name, (weight.outputs, weight.inputs), -127, 128, torch.int8)
        row = weight.inputs * BITS[weight.kind] // 8
        return self._integers(weight.name, (weight.outputs, row), 0, 256, torch.uint8)

    def scale(self, weight: WeightRecord) -> torch.Tensor:
        """float32[outputs, groups]."""
        shape, name = (weight.outputs, weight.groups), f"{weight.name}.scale"
        # root mean square of the integers, and of sizes between 0.5 and 1.5: unsigned ones lie around -1/2
        integers = (255**2 - 1) / 12 if weight.kind == "int8" else (4 ** BITS[weight.kind] - 1) / 12 + 1 / 4
        deviation = (integers * 13 / 12) ** 0.5
        sizes = torch.rand(shape, generator=self._generator(name), device=self.device) + 0.5
        signs = self._integers(f"{name}.sign", shape, 0, 2, torch.float32).mul_(2).sub_(1)
        return torch.mul(sizes, signs).div_(deviation * float(weight.inputs) ** 0.5)

    def zero_point(self, weight: WeightRecord) -> torch.Tensor | None:
        """uint8[outputs, groups], or None where the weight has the default."""
        if weight.zero_point is None:
            return None
        most = 2 ** BITS[weight.kind]
        return self._integers(f"{weight.name}.zero", (weight.outputs, weight.groups), 0, most, torch.uint8)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))

    def _normal(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator(name), device=self.device)

    def _integers(self, name: str, shape: tuple[int, int], least: int, end: int, dtype: Any) -> torch.Tensor:
        return torch.randint(least, end, shape, generator=self._generator(name), device=self.device, dtype=dtype)


def weight_bytes(program: Program, float_bytes: int) -> int:
    """What all linears of a program read: weights in float as so many bytes each, quantized ones with their scales."""
    records = [step.weight for step in program.steps if isinstance(step, Linear)]
    return sum(
        float_bytes * w.outputs * w.inputs if w.kind == "f32" else w.values_bytes + w.scale_bytes for w in records
    )
