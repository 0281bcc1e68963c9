"""adapter_config.json: what it means for a module, and the fields that are refused, each by its name."""

import math
from typing import Any

import pytest

from lensc.backends.errors import CheckpointError
from lensc.export.adapter_config import LoraConfig

Q = "llm.model.layers.0.self_attn.q_proj"
K = "llm.model.layers.1.self_attn.k_proj"
FC = "vpm.encoder.layers.1.mlp.fc1"
EMBED = "llm.model.embed_tokens"
HEAD = "llm.lm_head"
LINEAR = (Q, K, FC, HEAD)

OFFICIAL: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": {"base_model_class": "MiniCPMV", "parent_library": "transformers_modules.modeling_minicpmv"},
    "base_model_name_or_path": "openbmb/MiniCPM-Llama3-V-2_5",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "modules_to_save": ["embed_tokens", "resampler"],
    "peft_type": "LORA",
    "r": 64,
    "target_modules": r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)",
    "use_dora": False,
}


def parsed(**fields: Any) -> LoraConfig:
    return LoraConfig.from_json(OFFICIAL | fields)


def targets(**fields: Any) -> set[str]:
    """Which of five modules have an adapter."""
    config = parsed(**fields)
    return {name for name in (*LINEAR, EMBED) if config.targets(name, name in LINEAR)}


def message(**fields: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        parsed(**fields)
    text = str(caught.value)
    assert text.startswith("adapter_config.json: ") and text.isprintable() and len(text) < 400
    return text


def test_as_the_official_fine_tuning_writes_it() -> None:
    config = parsed()
    assert (config.rank, config.scale_of(Q), config.modules_to_save) == (64, 1.0, ("embed_tokens", "resampler"))
    assert targets() == {Q, K}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": "q_proj"}, set()),
        ({"target_modules": ".*q_proj"}, {Q}),
        ({"target_modules": ["q_proj"]}, {Q}),
        ({"target_modules": ["proj"]}, set()),
        ({"target_modules": ["self_attn.k_proj", "fc1", EMBED]}, {K, FC, EMBED}),
        ({"target_modules": "all-linear"}, {Q, K, FC}),
        ({"target_modules": "All-Linear", "exclude_modules": ["fc1"]}, {Q, K}),
        ({"target_modules": "all-linear", "exclude_modules": "vpm.*"}, {Q, K}),
        ({"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]}, {K}),
        ({"target_modules": ["q_proj", "k_proj"], "layers_to_transform": []}, {Q, K}),
        ({"target_modules": ["q_proj", "fc1"], "layers_to_transform": 1, "layers_pattern": ["model.layers"]}, set()),
        ({"target_modules": ["k_proj", "fc1"], "layers_to_transform": 1, "layers_pattern": ["encoder.layers"]}, {FC}),
        ({"target_modules": [Q, "k_proj"], "layers_to_transform": [7]}, {Q}),
        ({"target_modules": ["lm_head", "k_proj"], "layers_to_transform": [1]}, {K}),
    ],
    ids=lambda given: str(sorted(given) if isinstance(given, set) else given),  # the same in every process
)
def test_targets(fields: dict[str, Any], expected: set[str]) -> None:
    assert targets(**fields) == expected


def test_patterns_match_ends_of_names_and_the_first_counts() -> None:
    config = parsed(
        rank_pattern={r"layers\.0\..*": 16, "q_proj": 8, "_proj": 4, "model": 2},
        alpha_pattern={K: 1.5, "proj": 7},
        use_rslora=True,
    )
    assert [config.rank_of(name) for name in (Q, Q.replace("0", "1"), K)] == [16, 8, 64]
    assert [config.scale_of(name) for name in (Q, K)] == [64 / 4, 1.5 / 8]


@pytest.mark.parametrize("value", [None, False, {}, [], "", 0])
def test_unknown_fields_may_be_empty(value: Any) -> None:
    assert parsed(use_tomorrow=value) == parsed()


@pytest.mark.parametrize("value", [False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_leave_the_base_weights_alone(value: Any) -> None:
    assert parsed(init_lora_weights=value) == parsed()


@pytest.mark.parametrize("data", [[], "LORA", None], ids=repr)
def test_something_else_than_an_object(data: Any) -> None:
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        LoraConfig.from_json(data)


FIELDS: dict[str, tuple[str, Any, str]] = {
    "another-type": ("peft_type", "IA3", "peft_type is 'IA3', lensc merges adapters of type 'LORA'"),
    "no-type": ("peft_type", None, "peft_type is None"),
    "another-model": ("auto_mapping", {"base_model_class": "Qwen2VL"}, "base_model_class is 'Qwen2VL', expected 'MiniCPMV'"),
    "dora": ("use_dora", True, "use_dora is True: DoRA also changes the length of the rows"),
    "qalora": ("use_qalora", True, "use_qalora is True: QALoRA merges into quantized weights only"),
    "lora-bias": ("lora_bias", True, "lora_bias is True: biases in lora_B are not supported"),
    "replication": ("layer_replication", [[0, 2]], "layer_replication is [[0, 2]]: replicated layers"),
    "parameters": ("target_parameters", ["proj"], "target_parameters is ['proj']: adapters of bare parameters"),
    "tokens": ("trainable_token_indices", [5], "trainable_token_indices is [5]: trained single tokens"),
    "activated": ("alora_invocation_tokens", [5], "acts from a certain token on"),
    "arrow": ("arrow_config", {"top_k": 3}, "a mix of adapters"),
    "megatron": ("megatron_config", {"a": 1}, "Megatron layers"),
    "block-diagonal": ("use_bdlora", {"a": 1}, "block-diagonal"),
    "unknown": ("use_tomorrow", True, "'use_tomorrow' is True, a field that lensc does not know"),
    "unknown-odd": ("evil\n\x1b[31m", 1, r"'evil\n\x1b[31m' is 1, a field that lensc does not know"),
    "fan": ("fan_in_fan_out", True, "fan_in_fan_out is True: it is for layers that store [in, out]"),
    "pissa": ("init_lora_weights", "pissa_niter_4", "init_lora_weights is 'pissa_niter_4': the adapter fits base weights that"),
    "loftq": ("init_lora_weights", "loftq", "init_lora_weights is 'loftq'"),
    "olora": ("init_lora_weights", "olora", "init_lora_weights is 'olora'"),
    "start-number": ("init_lora_weights", 1, "init_lora_weights is 1"),
    "rank-zero": ("r", 0, "r is 0, expected a whole number of 1 to 1048576"),
    "rank-fraction": ("r", 4.0, "r is 4.0, expected a whole number"),
    "rank-flag": ("r", True, "r is True, expected a whole number"),
    "rank-text": ("r", "4", "r is '4', expected a whole number"),
    "alpha-zero": ("lora_alpha", 0, "lora_alpha is 0, expected a number above 0"),
    "alpha-nan": ("lora_alpha", math.nan, "lora_alpha is nan, expected a number above 0"),
    "alpha-infinite": ("lora_alpha", math.inf, "lora_alpha is inf"),
    "rslora-text": ("use_rslora", "yes", "use_rslora is 'yes', expected true or false"),
    "bias-odd": ("bias", "some", "bias is 'some'"),
    "no-targets": ("target_modules", None, "target_modules is None, expected a regular expression or a list"),
    "targets-empty": ("target_modules", [], "target_modules is [], expected"),
    "targets-number": ("target_modules", 7, "target_modules is 7, expected a list of names"),
    "targets-mixed": ("target_modules", ["q_proj", 7], "target_modules is ['q_proj', 7], expected a list of names"),
    "targets-damaged": ("target_modules", "(q_proj", "target_modules: '(q_proj' is not a regular expression: 'missing )"),
    "targets-long": ("target_modules", "q" * 10_001, "longer than 10000 characters"),
    "saved-object": ("modules_to_save", {"a": 1}, "modules_to_save is {'a': 1}, expected a list of names"),
    "layers-text": ("layers_to_transform", ["1"], "layers_to_transform is ['1'], expected layer numbers"),
    "layers-negative": ("layers_to_transform", -1, "layers_to_transform is [-1], expected layer numbers"),
    "layers-pattern": ("layers_pattern", "(", "layers_pattern: '(' is not a regular expression"),
    "ranks-list": ("rank_pattern", [4], "rank_pattern is [4], expected an object"),
    "ranks-zero": ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj'] is 0, expected a whole number"),
    "ranks-damaged": ("rank_pattern", {"*": 4}, "rank_pattern: '*' is not a regular expression"),
    "alphas-text": ("alpha_pattern", {"q_proj": "4"}, "alpha_pattern['q_proj'] is '4', expected a number above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_that_is_not_supported_is_named(case: str) -> None:
    key, value, text = FIELDS[case]
    assert text in message(**{key: value})


def test_all_problems_are_listed() -> None:
    text = message(r=0, use_dora=True, lora_alpha=-1, bias="x")
    assert all(part in text for part in ("r is 0", "use_dora is True", "lora_alpha is -1", "bias is 'x'"))
