"""The files of the demo checkpoint: the official layout with smaller numbers, weights in float16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from lensc.backends.bundle import PictureSpec

from .samples import SCALE_RESOLUTION
from .tokenizer import first_added_id, vocab_size, write_tokenizer

QUERIES = 32
"""Image embeddings per slice: about 64 patches hold some 22 characters."""


def config_json() -> dict[str, Any]:
    """The checkpoint's config.json: the official one with smaller numbers."""
    return {
        "_name_or_path": "lensc/demo",
        "version": "2.5",
        "architectures": ["MiniCPMV"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "batch_vision_input": True,
        "bos_token_id": first_added_id(),
        "drop_vision_last_layer": False,
        "eos_token_id": first_added_id() + 1,
        "hidden_act": "silu",
        "hidden_size": 256,
        "image_size": SCALE_RESOLUTION,
        "initializer_range": 0.02,
        "intermediate_size": 768,
        "max_position_embeddings": 2048,
        "mm_use_im_start_end": True,
        "model_type": "minicpmv",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "patch_size": 14,
        "pretraining_tp": 1,
        "query_num": QUERIES,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "slice_config": {
            "max_slice_nums": 9,
            "patch_size": 14,
            "scale_resolution": SCALE_RESOLUTION,
            "model_type": "minicpmv",
        },
        "slice_mode": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": False,
        "vision_config": {
            "hidden_size": 192,
            "image_size": 980,
            "intermediate_size": 768,
            "model_type": "idefics2",
            "num_attention_heads": 4,
            "num_hidden_layers": 5,
            "patch_size": 14,
        },
        "vocab_size": vocab_size(),
    }


def preprocessor_json() -> dict[str, Any]:
    return {
        "image_processor_type": "MiniCPMVImageProcessor",
        "processor_class": "MiniCPMVProcessor",
        "max_slice_nums": 9,
        "scale_resolution": SCALE_RESOLUTION,
        "patch_size": 14,
        "image_feature_size": QUERIES,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "version": 2.5,
    }


def picture_spec() -> PictureSpec:
    half = (0.5, 0.5, 0.5)
    return PictureSpec(
        scale_resolution=SCALE_RESOLUTION,
        patch_size=14,
        max_slice_nums=9,
        query_num=QUERIES,
        vision_padding="official",
        mean=half,
        std=half,
        pos_grid=70,
    )


def write_checkpoint(state: dict[str, Tensor], folder: Path) -> None:
    """Write weights (of `MiniCPMV.state_dict()`), configuration and tokenizer; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in state.items()}
    _write(folder / "model.safetensors", serialize(weights, metadata={"format": "pt"}))
    eos = first_added_id() + 1
    generation = {"_from_model_config": True, "bos_token_id": eos - 1, "eos_token_id": eos}
    for name, data in (
        ("config.json", config_json()),
        ("preprocessor_config.json", preprocessor_json()),
        ("generation_config.json", generation),
    ):
        _write(folder / name, (json.dumps(data, indent=1) + "\n").encode())
    write_tokenizer(folder)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
