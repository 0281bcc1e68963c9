"""The model in plain torch, with the same random weights: what judges the programs' results, and the rival of their speed.

Written as one writes it for a GPU: few large products (query, key and value as one; gate and up as one), torch's own
norms, `scaled_dot_product_attention`, a cache of fixed size, everything in one dtype. In float32 it is the judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lensc.backends._program import Constant, Linear, Program, WeightRecord
from lensc.export.models.config import ModelConfig

from .gpu_program import FREQUENCIES, LAYER_NORM_EPSILON

if TYPE_CHECKING:
    from lensc.backends._cuda_weights import Source


class Weights:
    """The constants of a program by name, in one dtype on the source's device; quantized weights as what they stand for."""

    def __init__(self, program: Program, source: Source, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype
        self._records: dict[str, WeightRecord] = {}
        self._constants: dict[str, Constant] = {}
        for step in program.steps:
            parts = [part for part in vars(step).values() if isinstance(part, Constant)]
            self._constants |= {part.name: part for part in parts}
            if isinstance(step, Linear):
                self._records[step.weight.name] = step.weight

    def matrix(self, *names: str) -> nn.Parameter:
        """The weights of some linears that read the same, under each other: [outputs, inputs]."""
        return _parameter(torch.cat([self._dense(self._records[name]).to(self._dtype) for name in names]))

    def vector(self, *names: str) -> nn.Parameter:
        """Some constants of one row behind each other: [width]."""
        return _parameter(torch.cat([self._constant(name)[0] for name in names]).to(self._dtype))

    def table(self, name: str) -> nn.Parameter:
        """[rows, width]."""
        return _parameter(self._constant(name).to(self._dtype))

    def frequencies(self) -> nn.Parameter:
        """float32[head_dim / 2], whatever the dtype."""
        return _parameter(self._constant(FREQUENCIES)[0])

    def _constant(self, name: str) -> Tensor:
        return self._source.constant(self._constants[name])

    def _dense(self, record: WeightRecord) -> Tensor:
        """float32[outputs, inputs]: (values - zero point) * scale."""
        values = self._source.values(record)
        if record.kind == "f32":
            return values
        zero = self._source.zero_point(record)
        bits = {"uint2": 2, "uint4": 4, "int8": 8}[record.kind]
        if bits < 8:
            parts = [(values >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
            values = torch.stack(parts, -1).reshape(record.outputs, record.inputs)
        group = record.group or record.inputs
        scale = self._source.scale(record).repeat_interleave(group, 1)[:, : record.inputs]
        shift = 0 if record.kind == "int8" else 2 ** (bits - 1)
        if zero is None:
            return (values.float() - shift) * scale
        return (values.float() - zero.float().repeat_interleave(group, 1)[:, : record.inputs]) * scale


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


# --- decoder ------------------------------------------------------------------------------------------------------


class DecoderLayer(nn.Module):
    """A layer with its part of the cache, keys and values [batch, kv_heads, capacity, head_dim]."""

    keys: Tensor
    values: Tensor

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, batch: int, capacity: int) -> None:
        super().__init__()
        at = f"llm.model.layers.{layer}"
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.epsilon = config.rms_norm_eps
        self.norm1 = weights.vector(f"{at}.input_layernorm.weight")
        self.qkv = weights.matrix(*(f"{at}.self_attn.{name}_proj.weight" for name in "qkv"))
        self.out = weights.matrix(f"{at}.self_attn.o_proj.weight")
        self.norm2 = weights.vector(f"{at}.post_attention_layernorm.weight")
        self.gate_up = weights.matrix(f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight")
        self.down = weights.matrix(f"{at}.mlp.down_proj.weight")
        empty = torch.zeros(batch, self.kv_heads, capacity, self.dim, dtype=self.qkv.dtype, device=self.qkv.device)
        self.register_buffer("keys", empty)
        self.register_buffer("values", empty.clone())

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], positions: Tensor, past: int | None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = F.linear(F.rms_norm(x, (width,), self.norm1, self.epsilon), self.qkv)
        qkv = qkv.view(batch, tokens, -1, self.dim).transpose(1, 2)
        q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = _rotated(q, *angles), _rotated(k, *angles)
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        mixed = self._attended(q, k, v, positions, past).transpose(1, 2).reshape(batch, tokens, -1)
        x = x + F.linear(mixed, self.out)
        gate, up = F.linear(F.rms_norm(x, (width,), self.norm2, self.epsilon), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, past: int | None) -> Tensor:
        """[batch, heads, tokens, dim]; with no `past` the whole cache is read, and masked."""
        tokens = q.shape[2]
        if past == 0 and tokens > 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        end = self.keys.shape[2] if past is None else past + tokens
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        mask = torch.arange(end, device=q.device) <= positions[:, None]
        if tokens == 1:
            # the heads of a group as rows of one query: keys and values are read once
            rows = q.reshape(len(q), self.kv_heads, -1, self.dim)
            seen = None if past is not None else mask
            return F.scaled_dot_product_attention(rows, keys, values, seen).reshape(q.shape)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


class TorchDecoder(nn.Module):
    """`layers` layers and the head, with a cache of `capacity` tokens for `batch` sequences."""

    def __init__(
        self,
        config: ModelConfig,
        program: Program,
        source: Source,
        dtype: torch.dtype,
        layers: int,
        capacity: int,
        batch: int = 1,
    ) -> None:
        super().__init__()
        weights = Weights(program, source, dtype)
        self.epsilon = config.rms_norm_eps
        self.layers = nn.ModuleList(DecoderLayer(config, weights, i, batch, capacity) for i in range(layers))
        self.norm = weights.vector("llm.model.norm.weight")
        self.head = weights.matrix("llm.lm_head.weight")
        self.frequencies = weights.frequencies()

    def forward(self, embeds: Tensor, positions: Tensor, rows: Sequence[int] | slice, past: int | None) -> Tensor:
        """Logits float32[batch, rows, vocab] of new tokens, which follow `past` ones in the cache, or those that
        `positions: int64[tokens]` say where `past` is None.

        embeds: float[batch, tokens, D]; rows: which of the new tokens have logits.
        """
        x = embeds.to(self.head.dtype)
        turns = positions.float()[:, None] * self.frequencies
        angles = (turns.cos(), turns.sin())
        for layer in self.layers:
            x = layer(x, angles, positions, past)
        x = F.rms_norm(x[:, rows], (x.shape[2],), self.norm, self.epsilon)
        return F.linear(x, self.head).float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [batch, heads, tokens, dim]; cos, sin: float32[tokens, dim / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


# --- vision -------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """A linear with a bias, or the linears that read the same as one."""

    def __init__(self, weights: Weights, *names: str) -> None:
        super().__init__()
        self.weight = weights.matrix(*(f"{name}.weight" for name in names))
        self.bias = weights.vector(*(f"{name}.bias" for name in names))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    def __init__(self, weights: Weights, name: str, epsilon: float) -> None:
        super().__init__()
        self.weight, self.bias = weights.vector(f"{name}.weight"), weights.vector(f"{name}.bias")
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.epsilon)


class VisionLayer(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        super().__init__()
        at, epsilon = f"vpm.encoder.layers.{layer}", config.vision.layer_norm_eps
        self.heads = config.vision.num_attention_heads
        self.norm1, self.norm2 = (LayerNorm(weights, f"{at}.layer_norm{i}", epsilon) for i in (1, 2))
        self.qkv = Affine(weights, *(f"{at}.self_attn.{name}_proj" for name in "qkv"))
        self.out = Affine(weights, f"{at}.self_attn.out_proj")
        self.fc1, self.fc2 = Affine(weights, f"{at}.mlp.fc1"), Affine(weights, f"{at}.mlp.fc2")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(_attention(q, k, v, mask, self.heads))
        grown: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))
        return grown


class TorchVision(nn.Module):
    """Tower and resampler."""

    def __init__(self, config: ModelConfig, program: Program, source: Source, dtype: torch.dtype) -> None:
        super().__init__()
        weights = Weights(program, source, dtype)
        count = config.vision.num_hidden_layers - config.drop_vision_last_layer
        self.patches = Affine(weights, "vpm.embeddings.patch_embedding")
        self.positions = weights.table("vpm.embeddings.position_embedding.weight")
        self.layers = nn.ModuleList(VisionLayer(config, weights, i) for i in range(count))
        self.norm = LayerNorm(weights, "vpm.post_layernorm", config.vision.layer_norm_eps)
        self.kv = weights.matrix("resampler.kv_proj.weight")
        self.kv_norm = LayerNorm(weights, "resampler.ln_kv", LAYER_NORM_EPSILON)
        self.query = weights.table("resampler.query")
        at = "resampler.attn"
        self.key, self.value = (weights.matrix(f"{at}.in_proj_weight.{part}") for part in "kv")
        self.key_bias, self.value_bias = (weights.vector(f"{at}.in_proj_bias.{part}") for part in "kv")
        self.out = Affine(weights, f"{at}.out_proj")
        self.post_norm = LayerNorm(weights, "resampler.ln_post", LAYER_NORM_EPSILON)
        self.proj = weights.matrix("resampler.proj")
        self.heads = config.resampler_heads

    def forward(
        self,
        patches: Tensor,
        position_ids: Tensor,
        attention_bias: Tensor | None,
        key_bias: Tensor | None,
        key_pos_embed: Tensor,
    ) -> Tensor:
        """image_embeds float32[slices, queries, D]; inputs as those of the graph, a bias that is None masks nothing."""
        dtype = self.proj.dtype
        x = self.patches(patches.to(dtype)) + self.positions[position_ids]
        for layer in self.layers:
            x = layer(x, attention_bias)
        kv = self.kv_norm(F.linear(self.norm(x), self.kv))
        k = F.linear(kv + key_pos_embed.to(dtype), self.key, self.key_bias)
        v = F.linear(kv, self.value, self.value_bias)
        query = self.query.expand(len(kv), -1, -1)
        x = self.post_norm(self.out(_attention(query, k, v, key_bias, self.heads)))
        return F.linear(x, self.proj).float()


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Of every query over all keys of its slice; bias: float[slices, keys], added to the logits."""
    q, k, v = (torch.unflatten(x, -1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else bias[:, None, None].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
