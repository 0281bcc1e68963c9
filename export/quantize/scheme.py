"""The quantization scheme as one word: `f32`, `f16`, `w8a8`, `w4a16-g128-s4-kv8`.

    scheme  = "f32" | "f16" | "w" bits "a" bits          then, each at most once and in this order:
              "-g" group size                            weights share a scale in groups along the inputs
              "-s" bits                                  scales are whole multiples, of that many bits, of one step for
                                                         each output
              "-asym"                                    weights have a zero point
              "-kv" bits                                 the KV cache is stored with fewer bits
              "-mixed"                                   most weights are so, some are not: the recipe says which
              "-keep:" part { "+" part }                 these parts of the model stay in float, sorted

A scheme has exactly one spelling, so that it can serve as flag, log entry and key of a cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lensc.backends.errors import UsageError

WEIGHT_BITS = (2, 3, 4, 5, 6, 8)
ACTIVATION_BITS = (8, 16, 32)
KV_BITS = (4, 8, 16)
SCALE_BITS = (4,)
FLOATS = {"f32": 32, "f16": 16}

NAMED = {
    "f32": "float weights",
    "int8": "8 bits throughout",
    "int4": "decoder in 4 bits, groups of 128; vision tower and embedding table in 8",
    "int4-g32": "the same in groups of 32",
    "int4-asym": "the same with zero points",
    "int4-gptq": "int4, calibrated",
    "int4-g32-gptq": "int4-g32, calibrated",
    "int4-small": "int4-gptq with an embedding table of 4 bits",
    "int4-kv8": "int4 with keys and values in 8 bits",
    "int2-mlp-gptq": "int4-gptq with gate and up projections in 2 bits, groups of 64; for ONNX Runtime",
    "int3-gptq": "decoder in 3 bits, which lie in 4, head in 4; calibrated",
    "int4-decoder": "decoder in 4 bits, vision tower in float",
    "w8a8-vision": "vision tower in 8 bits, decoder in float",
    "w8a16-vision": "vision tower in 8 bits with activations of 16, for an NPU; decoder in float",
    "w4a16-vision": "the same with weights of 4 bits, groups of 16",
    "int4-npu": "int4 with the vision tower of w8a16-vision, for an NPU beside a CPU",
    "w8a16": "8 bits throughout with activations of 16, for an NPU alone",
    "w4a16-gptq": "the same with the decoder in 4 bits, groups of 32, calibrated, and its head in 8",
}
"""The recipes with a name, in words. They stand in `recipe.PRESETS`, which needs torch."""

MARKS: dict[str, str] = {}
"""Of these, what a scheme loses on the demo model where it is more than `ALLOWED_LOSS`; shown wherever it is offered.
Tests hold it against bench/results."""

ALLOWED_LOSS = {"w8a8-vision": 1.0}
"""Points of exact match, on the task that loses most, that a scheme may lose without a mark: by default `USUAL_LOSS`."""
USUAL_LOSS = 2.0

_SPELLING = re.compile(
    r"(?:(?P<float>f32|f16)|w(?P<weight>[1-9][0-9]?)a(?P<activation>[1-9][0-9]?))"
    r"(?:-g(?P<group>[1-9][0-9]{0,6}))?(?:-s(?P<scale>[1-9][0-9]?))?(?P<asym>-asym)?(?:-kv(?P<kv>[1-9][0-9]?))?"
    r"(?P<mixed>-mixed)?"
    r"(?:-keep:(?P<keep>[a-z0-9_.]+(?:\+[a-z0-9_.]+)*))?",
    re.ASCII,
)
_EXAMPLES = "expected f32, f16 or like w4a16-g128 (see lensc.export.quantize.scheme)"


@dataclass(frozen=True)
class Scheme:
    """How weights, activations and KV cache are stored. Raises UsageError for a combination that means nothing.

    `group_size=None` is one scale per output channel. `kv_bits=None` stores the cache in the precision of attention.
    `scale_bits=None` leaves each scale free. `keep` names the parts that stay in float, e.g. `("lm_head",)`.
    """

    weight_bits: int = 32
    group_size: int | None = None
    symmetric: bool = True
    activation_bits: int = 32
    kv_bits: int | None = None
    mixed: bool = False
    keep: tuple[str, ...] = ()
    scale_bits: int | None = None

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise UsageError(f"scheme {str(self)!r}: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if self.is_float:
            if self.group_size is not None:
                problems.append("float weights have no groups")
            if not self.symmetric:
                problems.append("float weights have no zero point")
            if self.scale_bits is not None:
                problems.append("float weights have no scales")
            if self.keep:
                problems.append("all parts are float, nothing is left to keep")
        else:
            if self.weight_bits not in WEIGHT_BITS:
                problems.append(f"weight bits {self.weight_bits} is not one of {_listed(WEIGHT_BITS)}")
            if self.activation_bits not in ACTIVATION_BITS:
                problems.append(f"activation bits {self.activation_bits} is not one of {_listed(ACTIVATION_BITS)}")
            if self.group_size is not None and self.group_size < 1:
                problems.append(f"group size {self.group_size}, expected at least 1")
            if self.scale_bits is not None and self.scale_bits not in SCALE_BITS:
                problems.append(f"scale bits {self.scale_bits} is not one of {_listed(SCALE_BITS)}")
            if self.scale_bits is not None and (self.weight_bits >= 8 or self.group_size is None or not self.symmetric):
                problems.append("scale bits are for groups of weights below 8 bits without a zero point")
        if self.kv_bits is not None and self.kv_bits not in KV_BITS:
            problems.append(f"KV bits {self.kv_bits} is not one of {_listed(KV_BITS)}")
        if self.kv_bits is not None and self.kv_bits > self.activation_bits:
            problems.append(f"KV bits {self.kv_bits}, expected at most the activations' {self.activation_bits}")
        if list(self.keep) != sorted(set(self.keep)):
            problems.append(f"keep: expected sorted names without repetition, {'+'.join(sorted(set(self.keep)))}")
        problems += [f"keep: {name!r} is no name" for name in self.keep if not re.fullmatch("[a-z0-9_.]+", name)]
        return problems

    @property
    def is_float(self) -> bool:
        """Whether nothing but the KV cache can be quantized."""
        return (self.weight_bits, self.activation_bits) in ((32, 32), (16, 16))

    @property
    def weights_are_float(self) -> bool:
        """Whether no weight is quantized."""
        return self.is_float and not self.mixed

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme spelled `text`. Raises UsageError that names what is wrong."""
        match = _SPELLING.fullmatch(text)
        if match is None:
            raise UsageError(f"scheme {text!r}: {_EXAMPLES}")
        bits = FLOATS.get(match["float"] or "")
        scheme = cls(
            weight_bits=bits or int(match["weight"]),
            group_size=int(match["group"]) if match["group"] else None,
            symmetric=match["asym"] is None,
            activation_bits=bits or int(match["activation"]),
            kv_bits=int(match["kv"]) if match["kv"] else None,
            mixed=match["mixed"] is not None,
            keep=tuple((match["keep"] or "").split("+")) if match["keep"] else (),
            scale_bits=int(match["scale"]) if match["scale"] else None,
        )
        if str(scheme) != text:
            raise UsageError(f"scheme {text!r}: is written {scheme}")
        return scheme

    def __str__(self) -> str:
        text = f"f{self.weight_bits}" if self.is_float else f"w{self.weight_bits}a{self.activation_bits}"
        text += f"-g{self.group_size}" if self.group_size is not None else ""
        text += f"-s{self.scale_bits}" if self.scale_bits is not None else ""
        text += "" if self.symmetric else "-asym"
        text += f"-kv{self.kv_bits}" if self.kv_bits is not None else ""
        text += "-mixed" if self.mixed else ""
        return text + (f"-keep:{'+'.join(self.keep)}" if self.keep else "")


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
