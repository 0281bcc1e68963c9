"""MiniCPM-Llama3-V 2.5 in plain torch: the definition that every graph and engine is judged by.

Three parts under the checkpoint's own names, so that `state_dict()` has the official keys and shapes:

    vpm        SigLIP-400M tower: patches -> features, 1-D position ids, no class token, no pooling
    resampler  96 learned queries attend to the features of one slice -> 96 embeddings of the decoder's width
    llm        Llama-3 decoder with grouped-query attention

Whatever depends on a picture's size (position ids, masks, the resampler's position embedding) is an input computed
on the host (`lensc.runtime.picture`), so that nothing here is data-dependent and every part exports as it stands.
What engines have fused operators for (norm, attention) stands in `functions`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig, VisionConfig
from .functions import attention, causal_attention, inverse_frequencies, rms_norm

# --- vision tower -------------------------------------------------------------------------------------------------


class VisionEmbeddings(nn.Module):
    """Patch embedding as a matrix product (equal to the 14x14 convolution, patch for patch) plus position rows."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(config.pos_grid**2, config.hidden_size)

    def forward(self, patches: Tensor, position_ids: Tensor) -> Tensor:
        """patches: float[slices, patches, 3*14*14], position_ids: int64[slices, patches] -> [slices, patches, C]."""
        kernel = self.patch_embedding
        embedded = F.linear(patches, kernel.weight.flatten(1), kernel.bias)
        positions: Tensor = self.position_embedding(position_ids)
        return embedded + positions


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        mixed = attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), bias, self.heads)
        out: Tensor = self.out_proj(mixed)
        return out


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), bias)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class VisionLayers(nn.Module):
    """Holds the list under the checkpoint's name `vpm.encoder.layers`."""

    def __init__(self, config: VisionConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(num_layers))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, bias)
        return x


class VisionTower(nn.Module):
    """27 pre-norm layers and `post_layernorm`; all of them, no intermediate taps."""

    def __init__(self, config: VisionConfig, drop_last_layer: bool) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionLayers(config, config.num_hidden_layers - drop_last_layer)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, position_ids: Tensor, attention_bias: Tensor) -> Tensor:
        """Return features [slices, patches, C]; `attention_bias` [slices, patches] is added to every key's logit."""
        x = self.embeddings(patches, position_ids)
        out: Tensor = self.post_layernorm(self.encoder(x, attention_bias))
        return out


# --- resampler ----------------------------------------------------------------------------------------------------


class ResamplerAttention(nn.Module):
    """Multi-head attention with the packed in-projection of the checkpoint (rows: q, k, v)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """query: [1, queries, D] shared by all slices; key, value: [slices, patches, D]; bias: [slices, patches]."""

        wq, wk, wv = self.in_proj_weight.chunk(3)
        bq, bk, bv = self.in_proj_bias.chunk(3)
        q, k, v = F.linear(query, wq, bq), F.linear(key, wk, bk), F.linear(value, wv, bv)
        out: Tensor = self.out_proj(attention(q, k, v, bias, self.heads))
        return out


class Resampler(nn.Module):
    """Learned queries over one slice's features; the position embedding goes to the keys only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.query = nn.Parameter(torch.zeros(config.query_num, width))
        self.kv_proj = nn.Linear(config.vision.hidden_size, width, bias=False)
        self.attn = ResamplerAttention(width, config.resampler_heads)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, features: Tensor, key_bias: Tensor, key_pos_embed: Tensor) -> Tensor:
        """features: [slices, patches, C], key_pos_embed: [slices, patches, D] -> [slices, queries, D]."""
        kv = self.ln_kv(self.kv_proj(features))
        query = self.ln_q(self.query)[None]
        mixed = self.attn(query, kv + key_pos_embed, kv, key_bias)
        out: Tensor = self.ln_post(mixed) @ self.proj
        return out


# --- decoder ------------------------------------------------------------------------------------------------------


Past = tuple[Tensor, Tensor] | None
"""Keys and values of the tokens before, each [past, batch, kv_heads, head_dim]."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class DecoderAttention(nn.Module):
    """Projections around grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, self.heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * head_dim, width, bias=False)

    def forward(
        self, x: Tensor, position_ids: Tensor, frequencies: Tensor, past: Past
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [batch, tokens, D]; see `causal_attention` for the rest and for the new keys and values."""
        past_key, past_value = past or (None, None)
        mixed, key, value = causal_attention(
            self.q_proj(x),
            self.k_proj(x),
            self.v_proj(x),
            position_ids,
            frequencies,
            past_key,
            past_value,
            self.heads,
            self.kv_heads,
        )
        return self.o_proj(mixed), key, value


class DecoderMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(config)
        self.mlp = DecoderMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, position_ids: Tensor, frequencies: Tensor, past: Past
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, key, value = self.self_attn(self.input_layernorm(x), position_ids, frequencies, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class DecoderLayers(nn.Module):
    """Holds embeddings, layers and the last norm under the checkpoint's name `llm.model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """Llama-3: prefill, decode and verification of drafted tokens are one function of different sizes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderLayers(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor,
        past_keys: Sequence[Tensor] | None = None,
        past_values: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run `tokens` new tokens after `past` cached ones.

        inputs_embeds: [batch, tokens, D]; position_ids: int64[tokens], the same for the batch; logit_positions:
        int64[rows], indices into the new tokens; past_keys and past_values, one per layer:
        [past, batch, kv_heads, head_dim]. Returns logits [batch, rows, vocab] and the new rows of keys and values,
        each [tokens, batch, kv_heads, head_dim].
        """
        frequencies = inverse_frequencies(self.config.head_dim, self.config.rope_theta, position_ids.device)
        x, keys, values = inputs_embeds, [], []
        for i, layer in enumerate(self.model.layers):
            past = None if past_keys is None or past_values is None else (past_keys[i], past_values[i])
            x, key, value = layer(x, position_ids, frequencies, past)
            keys.append(key)
            values.append(value)
        x = self.model.norm(x.index_select(1, logit_positions))
        return self.lm_head(x), keys, values


# --- the whole ----------------------------------------------------------------------------------------------------


class VisionEncoder(nn.Module):
    """Tower and resampler as one function: the graph `vision`."""

    def __init__(self, vpm: VisionTower, resampler: Resampler) -> None:
        super().__init__()
        self.vpm = vpm
        self.resampler = resampler

    def forward(
        self, patches: Tensor, position_ids: Tensor, attention_bias: Tensor, key_bias: Tensor, key_pos_embed: Tensor
    ) -> Tensor:
        """Return image_embeds [slices, queries, D]; inputs as in `VisionTower` and `Resampler`."""
        features = self.vpm(patches, position_ids, attention_bias)
        out: Tensor = self.resampler(features, key_bias, key_pos_embed)
        return out


class MiniCPMV(nn.Module):
    """The model with the checkpoint's key names: `vpm.*`, `resampler.*`, `llm.*`. Weights are uninitialized."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vpm = VisionTower(config.vision, config.drop_vision_last_layer)
        self.resampler = Resampler(config)
        self.llm = Decoder(config)

    def vision_encoder(self) -> VisionEncoder:
        """The graph `vision`; shares this model's parameters."""
        return VisionEncoder(self.vpm, self.resampler)
