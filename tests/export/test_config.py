"""config.json: the published model's values, the class defaults, and refusals that list every problem."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lensc.backends.errors import CheckpointError
from lensc.export.models.config import ModelConfig
from lensc.export.models.minicpmv import MiniCPMV

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint" / "config.json"

PUBLISHED = {
    "model_type": "minicpmv",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "query_num": 96,
    "drop_vision_last_layer": False,
    "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "model_type": "idefics2",
    },
}
"""The published model's config.json, without the fields that say nothing (specification, section 1)."""


def golden(**changes: Any) -> dict[str, Any]:
    return {**json.loads(GOLDEN.read_text()), **changes}


def problem(data: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_json(data, "x/config.json")
    text = str(caught.value)
    assert text.startswith("x/config.json: ") and text.isprintable() and len(text) < 2000
    return text


def test_published_model_has_741_tensors_and_8537092336_parameters() -> None:
    config = ModelConfig.from_json(PUBLISHED)
    with torch.device("meta"):
        state = MiniCPMV(config).state_dict()
    assert len(state) == 741
    counts = {"llm": [0, 0], "vpm": [0, 0], "resampler": [0, 0]}
    for name, tensor in state.items():
        part = counts[name.partition(".")[0]]
        part[0] += 1
        part[1] += tensor.numel()
    assert counts == {"llm": [291, 8_030_261_248], "vpm": [437, 417_792_240], "resampler": [13, 89_038_848]}
    shapes = {
        "vpm.embeddings.position_embedding.weight": (4900, 1152),
        "vpm.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "vpm.encoder.layers.26.mlp.fc1.weight": (4304, 1152),
        "resampler.attn.in_proj_weight": (12288, 4096),
        "resampler.kv_proj.weight": (4096, 1152),
        "llm.model.layers.31.self_attn.k_proj.weight": (1024, 4096),
        "llm.lm_head.weight": (128256, 4096),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert (config.head_dim, config.resampler_heads, config.vision.pos_grid) == (128, 32, 70)
    assert (config.scale_resolution, config.max_slice_nums, config.patch_size) == (448, 9, 14)


def test_class_defaults_where_the_file_is_silent() -> None:
    data = {k: v for k, v in golden().items() if k not in ("query_num", "drop_vision_last_layer", "slice_config")}
    config = ModelConfig.from_json(data)
    assert (config.query_num, config.drop_vision_last_layer, config.max_slice_nums) == (64, True, 1)
    assert config.batch_vision_input and config.scale_resolution == 448


def test_dropping_the_last_vision_layer_keeps_the_others() -> None:
    with torch.device("meta"):
        state = MiniCPMV(ModelConfig.from_json(golden(drop_vision_last_layer=True))).state_dict()
    layers = {int(name.split(".")[3]) for name in state if name.startswith("vpm.encoder.layers.")}
    assert layers == {0, 1}


def test_older_files_have_no_version() -> None:
    data = golden()
    del data["version"]
    assert ModelConfig.from_json(data) == ModelConfig.from_json(golden())


@pytest.mark.parametrize("data", [None, [], "text", 3], ids=repr)
def test_not_an_object(data: Any) -> None:
    assert "expected a JSON object" in problem(data)


def test_all_problems_are_listed() -> None:
    text = problem(
        golden(
            model_type="llama",
            vocab_size=-1,
            hidden_size="256",
            rope_theta=float("nan"),
            query_num=True,
            batch_vision_input="yes",
            vision_config={**golden()["vision_config"], "num_hidden_layers": 0},
            slice_config={"max_slice_nums": 0},
        )
    )
    for part in (
        "model_type is 'llama', lensc supports 'minicpmv'",
        "vocab_size is -1, expected an integer of 1 to 1048576",
        "hidden_size is '256'",
        "rope_theta is nan",
        "query_num is True",
        "batch_vision_input is 'yes', which has the wrong type",
        "vision_config.num_hidden_layers is 0",
        "slice_config.max_slice_nums is 0",
    ):
        assert part in text


def test_missing_sizes_are_named_once() -> None:
    data = golden()
    for key in ("hidden_size", "num_attention_heads", "vocab_size"):
        del data[key]
    text = problem(data)
    for key in ("hidden_size", "num_attention_heads", "vocab_size"):
        assert text.count(f"{key} is missing") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "2.6"}, "version is '2.6', lensc reads MiniCPM-Llama3-V 2.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', lensc supports 'silu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "lensc quantizes itself, give it the 16-bit"),
        ({"num_attention_heads": 3}, "hidden_size is not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads is not a multiple of num_key_value_heads"),
        ({"hidden_size": 192, "num_attention_heads": 6}, "192 is not a multiple of 128"),
        ({"eos_token_id": 1280}, "bos or eos token id is outside the vocabulary"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"hidden_size": 2**40}, "expected an integer of 1 to 1048576"),
        (
            {"slice_config": {"max_slice_nums": 9, "patch_size": 16}},
            "slice_config.patch_size 16 differs from vision 14",
        ),
        ({"slice_config": {"max_slice_nums": 9, "patch_size": "x"}}, "slice_config.patch_size is 'x'"),
        ({"vision_config": []}, "vision_config is [], which has the wrong type"),
        ({"model_type": ["\x1b[31m"] * 10_000}, "model_type is ['\\x1b[31m'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    assert reason in problem(golden(**changes))
