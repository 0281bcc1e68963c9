"""`config.json` of a MiniCPM-Llama3-V 2.5 checkpoint, parsed once into a typed record.

The file rules; where it is silent, the defaults are those of the official configuration class, which are not the
published model's values (64 queries, last vision layer dropped), so they matter for derived checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lensc.backends.errors import CheckpointError


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower (Idefics2 vision class): sizes in channels, `image_size` and `patch_size` in pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    layer_norm_eps: float

    @property
    def pos_grid(self) -> int:
        """Side of the square position table (70 for 980 / 14)."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ModelConfig:
    """Everything the reference model and the host code need to know of a checkpoint."""

    vision: VisionConfig
    query_num: int
    drop_vision_last_layer: bool
    batch_vision_input: bool
    scale_resolution: int
    max_slice_nums: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_size(self) -> int:
        return self.vision.patch_size

    @property
    def resampler_heads(self) -> int:
        """Heads of the resampler: always of 128 channels (spec section 4)."""
        return self.hidden_size // 128

    @classmethod
    def from_json(cls, data: Any, source: str = "config.json") -> ModelConfig:
        """Parse the JSON object of `config.json`. Raises CheckpointError that lists every problem."""
        reader = _Reader(data, source)
        vision = _Reader(reader.raw("vision_config", dict, {}), source, "vision_config.")
        slices = _Reader(reader.raw("slice_config", dict, {"max_slice_nums": 1}), source, "slice_config.")
        reader.expect("model_type", ("minicpmv",))
        reader.expect("hidden_act", ("silu",), default="silu")
        reader.expect("rope_scaling", (None,), default=None)
        reader.expect("attention_bias", (False,), default=False)
        reader.expect("tie_word_embeddings", (False,), default=False)
        if reader.raw("quantization_config", (dict, type(None)), None):
            reader.problems.append(
                "quantization_config is present: lensc quantizes itself, give it the 16-bit checkpoint"
            )
        vision.expect("hidden_act", ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
        version = reader.raw("version", (str, float, int), "2.5")
        if str(version) != "2.5":
            reader.problems.append(f"version is {_shown(version)}, lensc reads MiniCPM-Llama3-V 2.5")
        heads = reader.integer("num_attention_heads")
        config = cls(
            vision=VisionConfig(
                hidden_size=vision.integer("hidden_size", 768),
                intermediate_size=vision.integer("intermediate_size", 3072),
                num_hidden_layers=vision.integer("num_hidden_layers", 12),
                num_attention_heads=vision.integer("num_attention_heads", 12),
                image_size=vision.integer("image_size", 224),
                patch_size=vision.integer("patch_size", 32),
                num_channels=vision.integer("num_channels", 3),
                layer_norm_eps=vision.number("layer_norm_eps", 1e-6),
            ),
            query_num=reader.integer("query_num", 64),
            drop_vision_last_layer=reader.flag("drop_vision_last_layer", True),
            batch_vision_input=reader.flag("batch_vision_input", True),
            scale_resolution=slices.integer("scale_resolution", 448),
            max_slice_nums=slices.integer("max_slice_nums", 9),
            hidden_size=reader.integer("hidden_size"),
            intermediate_size=reader.integer("intermediate_size"),
            num_hidden_layers=reader.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=reader.integer("num_key_value_heads", heads),
            vocab_size=reader.integer("vocab_size"),
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            rope_theta=reader.number("rope_theta", 10000.0),
            max_position_embeddings=reader.integer("max_position_embeddings", 2048),
            bos_token_id=reader.integer("bos_token_id", 1, least=0),
            eos_token_id=reader.integer("eos_token_id", 2, least=0),
        )
        problems = reader.problems + vision.problems + slices.problems
        if not problems:
            problems = config._inconsistencies()
            slice_patch = slices.integer("patch_size", 14)
            if slice_patch != config.patch_size:
                problems.append(f"slice_config.patch_size {slice_patch} differs from vision {config.patch_size}")
            problems += slices.problems
        if problems:
            raise CheckpointError(f"{source}: " + "; ".join(problems))
        return config

    def _inconsistencies(self) -> list[str]:
        checks = (
            (self.hidden_size % self.num_attention_heads, "hidden_size is not a multiple of num_attention_heads"),
            (self.head_dim % 2, f"head size {self.head_dim} is odd, rotary embedding needs pairs"),
            (
                self.num_attention_heads % self.num_key_value_heads,
                "num_attention_heads is not a multiple of num_key_value_heads",
            ),
            (
                self.hidden_size % 128,
                f"hidden_size {self.hidden_size} is not a multiple of 128, the resampler's head size",
            ),
            (
                self.vision.hidden_size % self.vision.num_attention_heads,
                "vision hidden_size is not a multiple of its heads",
            ),
            (self.vision.image_size % self.vision.patch_size, "vision image_size is not a multiple of patch_size"),
            (self.vision.num_channels - 3, f"vision num_channels is {self.vision.num_channels}, expected 3"),
            (
                max(self.bos_token_id, self.eos_token_id) >= self.vocab_size,
                "bos or eos token id is outside the vocabulary",
            ),
            (self.drop_vision_last_layer and self.vision.num_hidden_layers < 2, "no vision layer is left"),
        )
        return [text for bad, text in checks if bad]


LARGEST = 1 << 20
"""No size of a model of this kind comes near it (vocabulary 128,256), and products of three such sizes fit 64 bits."""


def _shown(value: Any) -> str:
    """`value` as it appears in a message, cut to one short line."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Reader:
    """Typed reads from a JSON object that collect problems instead of stopping at the first."""

    def __init__(self, data: Any, source: str, prefix: str = "") -> None:
        if not isinstance(data, dict):
            raise CheckpointError(f"{source}: expected a JSON object, found {type(data).__name__}")
        self._data: dict[str, Any] = data
        self.problems: list[str] = []
        self._prefix = prefix

    def raw(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self._data.get(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.problems.append(f"{self._prefix}{key} is {_shown(value)}, which has the wrong type")
            return default
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._data.get(key, default)
        if value is None:
            self.problems.append(f"{self._prefix}{key} is missing")
        elif isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            self.problems.append(f"{self._prefix}{key} is {_shown(value)}, expected an integer of {least} to {LARGEST}")
        else:
            return value
        return least

    def number(self, key: str, default: float) -> float:
        value = self._data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
            self.problems.append(f"{self._prefix}{key} is {_shown(value)}, expected a positive number")
            return default
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.raw(key, bool, default))

    def expect(self, key: str, accepted: tuple[Any, ...], default: Any = None) -> None:
        value = self._data.get(key, default)
        if value not in accepted:
            self.problems.append(
                f"{self._prefix}{key} is {_shown(value)}, lensc supports {', '.join(map(repr, accepted))}"
            )
