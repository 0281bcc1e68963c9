"""The vision tower and resampler of a checkpoint in plain torch, for one slice of 448 x 448 pixels without padding.

That is the best case for an engine: all sizes are known, and positions are constants. Also the pictures that rivals are
calibrated and judged with.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 448
PATCH = 14
GRID = 70
"""Side of the table of positions."""
EPSILON = 1e-6


def weights(checkpoint: Path) -> dict[str, Any]:
    """The tower's and the resampler's, float32, by their names in the checkpoint."""
    from safetensors import safe_open

    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {}
    for name, shard in index.items():
        if name.startswith(("vpm.", "resampler.")):
            with safe_open(checkpoint / shard, framework="pt") as file:
                weights[name] = file.get_tensor(name).float()
    return weights


def module(config: dict[str, Any], weights: dict[str, Any]) -> Any:
    """pixels: float32[1, 3, 448, 448] -> image_embeds: float32[1, queries, width], a `torch.nn.Module`."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    vision, width = config["vision_config"], config["hidden_size"]
    heads, layers = vision["num_attention_heads"], vision["num_hidden_layers"]
    side = SIDE // PATCH
    ids = torch.arange(side * side) * GRID // (side * side)
    positions = torch.from_numpy(_sincos_2d(side, width))

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in weights.items():
                self.register_buffer(name.replace(".", "_"), tensor)

        def forward(self, pixels: Any) -> Any:
            kernel, bias = (
                self.w("vpm.embeddings.patch_embedding.weight"),
                self.w("vpm.embeddings.patch_embedding.bias"),
            )
            x = F.conv2d(pixels, kernel, bias, stride=PATCH).flatten(2).transpose(1, 2)
            x = x + self.w("vpm.embeddings.position_embedding.weight")[ids]
            for i in range(layers):
                at = f"vpm.encoder.layers.{i}."
                y = self.norm(x, at + "layer_norm1")
                q, k, v = (self.linear(y, f"{at}self_attn.{name}_proj") for name in "qkv")
                x = x + self.linear(attend(q, k, v, heads), at + "self_attn.out_proj")
                y = self.linear(self.norm(x, at + "layer_norm2"), at + "mlp.fc1")
                x = x + self.linear(F.gelu(y, approximate="tanh"), at + "mlp.fc2")
            x = self.norm(x, "vpm.post_layernorm")
            kv = self.norm(F.linear(x, self.w("resampler.kv_proj.weight")), "resampler.ln_kv")
            wq, wk, wv = self.w("resampler.attn.in_proj_weight").chunk(3)
            bq, bk, bv = self.w("resampler.attn.in_proj_bias").chunk(3)
            query = F.linear(self.norm(self.w("resampler.query"), "resampler.ln_q")[None], wq, bq)
            mixed = attend(query, F.linear(kv + positions, wk, bk), F.linear(kv, wv, bv), width // 128)
            mixed = self.norm(self.linear(mixed, "resampler.attn.out_proj"), "resampler.ln_post")
            return mixed @ self.w("resampler.proj")

        def w(self, name: str) -> Any:
            return getattr(self, name.replace(".", "_"))

        def linear(self, x: Any, name: str) -> Any:
            return F.linear(x, self.w(name + ".weight"), self.w(name + ".bias"))

        def norm(self, x: Any, name: str) -> Any:
            return F.layer_norm(x, x.shape[-1:], self.w(name + ".weight"), self.w(name + ".bias"), EPSILON)

    def attend(q: Any, k: Any, v: Any, heads: int) -> Any:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return Vision().eval()


def _sincos_2d(side: int, width: int) -> Any:
    """float32[side * side, width]: the column in the first half, the row in the second."""
    omega = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * omega
    one = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(one, (side, 1)), np.repeat(one, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


def pictures(count: int) -> Any:
    """Drawn pictures, uint8[count, 448, 448, 3]: gradients, boxes and lines like those of print, noise of a camera."""
    random = np.random.default_rng(7)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for picture in pictures:
        waves = [np.sin(2 * math.pi * (random.uniform(0, 6, 2) @ [x.ravel(), y.ravel()])) for _ in range(3)]
        canvas = 128 + 90 * np.stack(waves, -1).reshape(SIDE, SIDE, 3) * random.uniform(0, 1, 3)
        for _ in range(random.integers(5, 60)):
            top, left = random.integers(0, SIDE - 8, 2)
            height, length = random.integers(2, 40), random.integers(2, 160)
            canvas[top : top + height, left : left + length] = random.integers(0, 256, 3)
        canvas += random.normal(0, random.uniform(0, 12), canvas.shape)
        picture[:] = canvas.clip(0, 255)
    return pictures


def pixels(picture: Any) -> Any:
    """float32[1, 3, 448, 448] of -1 to 1."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32) / np.float32(127.5) - np.float32(1)


def answers(run: Callable[[Any], Any], picture: Any) -> Iterator[dict[str, Any]]:
    """Answer the lines of stdin: `vision COUNT` runs so many slices, by default one; `sqnr JUDGE` compares the pictures of
    a `judge.npz`.

    `run` takes what `pixels` gives and returns `image_embeds: float32[1, queries, width]`.
    """
    one = pixels(picture)
    for line in sys.stdin:
        what, *rest = line.split()
        if what == "quit":
            return
        if what == "sqnr":
            with np.load(rest[0]) as judge:
                expected = judge["image_embeds"].astype(np.float64)
                found = np.concatenate([run(pixels(judged)) for judged in judge["pictures"]])
            noise = float(np.square(found - expected).sum())
            yield {"what": line.strip(), "db": 10 * math.log10(float(np.square(expected).sum()) / noise)}
        elif what == "vision":
            started = time.perf_counter()
            for _ in range(int(rest[0]) if rest else 1):
                run(one)
            yield {"what": line.strip(), "seconds": time.perf_counter() - started}
        else:
            raise SystemExit(f"error: {what!r}: expected vision, sqnr or quit")
