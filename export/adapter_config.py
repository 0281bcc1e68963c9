"""`adapter_config.json` of a LoRA adapter in PEFT's format, parsed once into a typed record.

What changes the weights in another way than W + s·B·A is refused by name. A field that is not known here is refused
too unless it is empty: newer versions of PEFT add fields, and one of them may change what the tensors mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lensc.backends.errors import CheckpointError

BASE_CLASS = "MiniCPMV"

HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
})  # fmt: skip
"""Fields that say how the adapter was trained or is to be loaded, and nothing of what its tensors mean."""

UNSUPPORTED = {
    "alora_invocation_tokens": "an adapter that acts from a certain token on cannot be merged",
    "arrow_config": "a mix of adapters that depends on the input cannot be merged",
    "layer_replication": "replicated layers are not supported",
    "lora_bias": "biases in lora_B are not supported",
    "megatron_config": "Megatron layers are not supported",
    "target_parameters": "adapters of bare parameters are not supported",
    "trainable_token_indices": "trained single tokens are not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_dora": "DoRA also changes the length of the rows, which is not supported",
    "use_qalora": "QALoRA merges into quantized weights only",
}
"""Fields that must be absent, null, false or empty, with the reason."""

INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base weights as they are. PiSSA, OLoRA, CorDA and LoftQ take something
out of them first, so that the adapter does not fit the published weights."""

_READ = frozenset({
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules",
    "use_rslora",
})  # fmt: skip

ALL_LINEAR = "all-linear"
OUTPUT_LAYER = "llm.lm_head"
"""`all-linear` means every linear layer but this."""

PATTERN_CHARACTERS = 10_000

Names = str | tuple[str, ...]
"""A regular expression that a module's whole name must match, or names of which one must be its name or the end of it
after a dot."""


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter's tensors mean: on which modules they act, and how strongly."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    bias: str
    target_modules: Names
    exclude_modules: Names
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]

    @classmethod
    def from_json(cls, data: Any, source: str = "adapter_config.json") -> LoraConfig:
        """Parse the JSON object of an adapter_config.json. Raises CheckpointError that lists every problem."""
        if not isinstance(data, dict):
            raise CheckpointError(f"{source}: expected a JSON object, found {type(data).__name__}")
        kind = data.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{source}: peft_type is {_shown(kind)}, lensc merges adapters of type 'LORA'")
        reader = _Reader(data)
        reader.refuse_unsupported()
        config = cls(
            rank=int(reader.number("r", data.get("r", 8), whole=True)),
            alpha=reader.number("lora_alpha", data.get("lora_alpha", 8)),
            use_rslora=reader.flag("use_rslora"),
            rank_pattern={key: int(value) for key, value in reader.pattern("rank_pattern", whole=True).items()},
            alpha_pattern=reader.pattern("alpha_pattern"),
            bias=reader.bias(),
            target_modules=reader.names("target_modules", required=True),
            exclude_modules=reader.names("exclude_modules"),
            layers=reader.layers(),
            layers_pattern=reader.strings("layers_pattern"),
            modules_to_save=reader.strings("modules_to_save"),
        )
        if reader.problems:
            raise CheckpointError(f"{source}: " + "; ".join(reader.problems))
        return config

    def rank_of(self, module: str) -> int:
        """The rank of the adapter of `module`."""
        key = _pattern_key(self.rank_pattern, module)
        return self.rank if key is None else self.rank_pattern[key]

    def scale_of(self, module: str) -> float:
        """The factor s of W + s·B·A for `module`: alpha / r, or alpha / √r with use_rslora."""
        key = _pattern_key(self.alpha_pattern, module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str, linear: bool) -> bool:
        """Whether `module`, a linear layer or else an embedding, has an adapter by this configuration."""
        if _matches(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == ALL_LINEAR:
                return linear and module != OUTPUT_LAYER
            return _matches(self.target_modules, module)
        if module in self.target_modules or self.layers is None:
            return _matches(self.target_modules, module)
        return _matches(self.target_modules, module) and self._layer(module) in self.layers

    def _layer(self, module: str) -> int | None:
        """The layer's number in the name of `module`: after one of `layers_pattern`, or else the first number."""
        for pattern in self.layers_pattern or (r"[^.]*",):
            found = re.match(rf".*?\.{pattern}\.(\d+)\.", module)
            if found:
                return int(found[1])
        return None


def _pattern_key(patterns: Iterable[str], module: str) -> str | None:
    """The first of `patterns` that matches the end of `module`, from its beginning or from a dot on."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


def _matches(names: Names, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Reader:
    """Typed reads from the JSON object that collect problems instead of stopping at the first."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data
        self.problems: list[str] = []

    def refuse_unsupported(self) -> None:
        data = self._data
        for key, reason in UNSUPPORTED.items():
            if data.get(key):
                self.problems.append(f"{key} is {_shown(data[key])}: {reason}")
        if data.get("fan_in_fan_out"):
            self.problems.append(
                f"fan_in_fan_out is {_shown(data['fan_in_fan_out'])}: it is for layers that store [in, out], "
                "and this model has none; the adapter is for another model"
            )
        start = data.get("init_lora_weights")
        if not any(start == known and type(start) is type(known) for known in INITIALIZATIONS):
            self.problems.append(
                f"init_lora_weights is {_shown(start)}: the adapter fits base weights that were changed for it; "
                "convert it to plain LoRA when it is saved"
            )
        mapping = data.get("auto_mapping")
        base = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        if base is not None and base != BASE_CLASS:
            self.problems.append(f"auto_mapping.base_model_class is {_shown(base)}, expected {BASE_CLASS!r}")
        for key in sorted(data.keys() - HARMLESS - UNSUPPORTED.keys() - _READ):
            if data[key]:
                self.problems.append(
                    f"{_shown(key)} is {_shown(data[key])}, a field that lensc does not know; "
                    "remove it if it does not change what the tensors mean"
                )

    def number(self, key: str, value: Any, whole: bool = False) -> float:
        """`value`, the one of `key`, if it is above 0, of a size that can be meant, and whole if that is asked."""
        kinds = (int,) if whole else (int, float)
        if type(value) not in kinds or not 0 < value <= 1 << 20:
            what = "a whole number of 1" if whole else "a number above 0"
            self.problems.append(f"{key} is {_shown(value)}, expected {what} to {1 << 20}")
            return 1
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._data.get(key)
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{key} is {_shown(value)}, expected true or false")
        return value is True

    def bias(self) -> str:
        value = self._data.get("bias") or "none"
        if value not in ("none", "all", "lora_only"):
            self.problems.append(f"bias is {_shown(value)}, expected 'none'")
        return str(value)

    def pattern(self, key: str, whole: bool = False) -> dict[str, float]:
        value = self._data.get(key) or {}
        if not isinstance(value, dict):
            self.problems.append(f"{key} is {_shown(value)}, expected an object of module name to number")
            return {}
        kept = [name for name in value if self._is_expression(key, name)]
        return {name: self.number(f"{key}[{_shown(name)}]", value[name], whole) for name in kept}

    def strings(self, key: str) -> tuple[str, ...]:
        value = self._data.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            self.problems.append(f"{key} is {_shown(value)}, expected a list of names")
            return ()
        if key == "layers_pattern" and any(not self._is_expression(key, name) for name in value):
            return ()
        return tuple(value)

    def names(self, key: str, required: bool = False) -> Names:
        value = self._data.get(key)
        if required and not value:
            self.problems.append(f"{key} is {_shown(value)}, expected a regular expression or a list of module names")
        if isinstance(value, str) and value:
            return value if self._is_expression(key, value) else ()
        return self.strings(key)

    def layers(self) -> frozenset[int] | None:
        value = self._data.get("layers_to_transform")
        if value is None:
            return None
        value = value if isinstance(value, list) else [value]
        if not value:
            return None
        if not all(type(number) is int and number >= 0 for number in value):
            self.problems.append(f"layers_to_transform is {_shown(value)}, expected layer numbers")
            return None
        return frozenset(value)

    def _is_expression(self, key: str, text: str) -> bool:
        try:
            if len(text) <= PATTERN_CHARACTERS:
                re.compile(text)
                return True
            reason = f"longer than {PATTERN_CHARACTERS} characters"
        except (re.error, RecursionError, OverflowError) as error:
            reason = str(error)
        self.problems.append(f"{key}: {_shown(text)} is not a regular expression: {_shown(reason)}")
        return False
