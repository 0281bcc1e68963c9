"""What a target of TensorRT asks for, and for which sizes an engine is compiled. Pure: neither TensorRT nor a GPU is asked.

    tensorrt:gpu                 for GPUs like the one at hand, in float16
    tensorrt:gpu:sm_90           for every GPU of that compute capability (some kernels of NVIDIA's libraries are left out)
    tensorrt:gpu:sm_80-plus      for every GPU from Ampere on (slower: it may use what all of them have)
    … -bf16, … -f32              bfloat16 or float32 in the place of float16: tensorrt:gpu:bf16, tensorrt:gpu:sm_90-bf16
    … -versions                  loads on later versions of the same major version of TensorRT, too
    … -streamed                  weights that do not fit into the GPU's memory stay in the host's and are copied in every run

The words stand in this order. An engine is compiled on a GPU of the kind that it is for: TensorRT chooses kernels by timing
them.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from lensc.export.graph import GraphSpec, TensorSpec

from ._qnn_form import patches_of
from .errors import UsageError

NAME = "tensorrt"

Half = Literal["float16", "bfloat16", "float32"]
"""What products, attention and the KV cache are in. The stream that layers add to, and norms, are float32 in any case."""

TYPES: dict[str, Half] = {"": "float16", "bf16": "bfloat16", "f32": "float32"}
ITEM_BYTES: dict[Half, int] = {"float16": 2, "bfloat16": 2, "float32": 4}

OLDEST = (7, 5)
"""Compute capability that TensorRT 11 begins with."""
OLDEST_BFLOAT16 = (8, 0)
AMPERE = (8, 0)

_SPELLING = re.compile(r"(?:sm_(?P<sm>\d{2,3})(?P<plus>-plus)?)?(?:(?:^|-)(?P<type>bf16|f32))?"
                       r"(?P<versions>(?:^|-)versions)?(?P<streamed>(?:^|-)streamed)?")  # fmt: skip
_EXPECTED = "expected words like sm_90, sm_80-plus, bf16, f32, versions, streamed, e.g. sm_90-bf16"


@dataclass(frozen=True)
class Build:
    """A target's architecture, parsed; `str` gives it back. `capability`: of the GPUs it is for, None for the one at hand."""

    capability: tuple[int, int] | None = None
    is_plus: bool = False
    half: Half = "float16"
    for_versions: bool = False
    is_streamed: bool = False

    @classmethod
    def parse(cls, arch: str) -> Build:
        """The build that `arch` spells. Raises UsageError that says what is wrong."""
        match = _SPELLING.fullmatch(arch)
        if match is None:
            raise UsageError(f"target {NAME}:gpu:{arch}: {_EXPECTED}")
        sm = match["sm"]
        capability = None if sm is None else (int(sm[:-1]), int(sm[-1]))
        build = cls(
            capability, match["plus"] is not None, TYPES[match["type"] or ""], match["versions"] is not None,
            match["streamed"] is not None,
        )  # fmt: skip
        if str(build) != arch:
            raise UsageError(f"target {NAME}:gpu:{arch}: is written {build}")
        if build.is_plus and capability != AMPERE:
            raise UsageError(
                f"target {NAME}:gpu:{arch}: TensorRT compiles for later GPUs from sm_80 on only: sm_80-plus"
            )
        if capability is not None and capability < build.oldest:
            raise UsageError(
                f"target {NAME}:gpu:{arch}: {build.half} needs {_sm(build.oldest)} or newer"
                if capability >= OLDEST
                else f"target {NAME}:gpu:{arch}: TensorRT 11 needs {_sm(OLDEST)} or newer"
            )
        return build

    def __str__(self) -> str:
        words = [
            "" if self.capability is None else _sm(self.capability) + ("-plus" if self.is_plus else ""),
            next(word for word, half in TYPES.items() if half == self.half),
            "versions" if self.for_versions else "",
            "streamed" if self.is_streamed else "",
        ]
        return "-".join(word for word in words if word)

    @property
    def oldest(self) -> tuple[int, int]:
        """The oldest compute capability that can run it."""
        return OLDEST_BFLOAT16 if self.half == "bfloat16" else OLDEST

    def wrong_gpu(self, capability: tuple[int, int]) -> str | None:
        """Why it cannot be compiled on a GPU of `capability`, or None."""
        if capability < self.oldest:
            return f"has compute capability {_dotted(capability)}, {self.half} needs {_dotted(self.oldest)} or newer"
        if self.capability is None or capability == self.capability or (self.is_plus and capability > self.capability):
            return None
        newer = " or newer" if self.is_plus else ""
        return f"is {_sm(capability)}, the engine is for {_sm(self.capability)}{newer}"

    def requirements(self, gpu: str, capability: tuple[int, int]) -> dict[str, str]:
        """What of a GPU an engine needs that was compiled on the one called `gpu`, as `check_compatibility` reads it."""
        if self.is_plus:
            return {"compute capability": f">={_dotted(AMPERE)}"}
        exact = {"compute capability": _dotted(capability)}
        return exact if self.capability is not None else {**exact, "gpu": gpu}


def found_gpu(gpu: str, capability: tuple[int, int]) -> dict[str, str]:
    """A GPU at hand, to be compared with `Build.requirements`."""
    return {"compute capability": _dotted(capability), "gpu": gpu}


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


# --- sizes ------------------------------------------------------------------------------------------------------------

SPAN, WRITE, CAPACITY = "span", "write_indices", "capacity"
COLUMNS = "columns"
"""Input int64[span] of a lowered decoder: 0, 1, 2, …; as many columns of the cache are read, of which the causal mask hides
those that are not written yet."""

PREFILL_TOKENS = 1024
DECODE_TOKENS = 8
"""Most new tokens of a run that is replayed as a CUDA graph: one, or guessed ones that are checked."""
MOST_ROWS = 64
"""Most rows of logits of a run: of 128,256 ids, 33 MB in float32."""
BUCKET = 256
"""Columns that are read are a multiple of it, so that a CUDA graph serves that many tokens."""
MOST_BATCH = 8
MOST_SLICES = 10
"""Slices of a picture of 1344 x 1344, with its overview. Attention's bias takes 2 MB of float16 for each with 1024 patches."""

Sizes = dict[str, tuple[int, int, int]]
"""Of a profile, by symbolic dimension: smallest, the one to optimize for, largest."""


@dataclass(frozen=True)
class Profile:
    """Sizes that an engine is compiled for; TensorRT chooses kernels for each profile by itself."""

    name: str
    sizes: Sizes
    is_replayed: bool
    """Whether runs are recorded as CUDA graphs."""

    def takes(self, sizes: dict[str, int]) -> bool:
        """Whether a run of `sizes` is within it."""
        return all(low <= sizes[dim] <= high for dim, (low, _, high) in self.sizes.items() if dim in sizes)

    def shapes(self, tensor: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The smallest, the usual and the largest shape of an input."""
        low, usual, high = (
            tuple(d if isinstance(d, int) else self.sizes[d][i] for d in tensor.shape) for i in range(3)
        )
        return low, usual, high


def profiles(spec: GraphSpec) -> tuple[Profile, ...]:
    """The profiles of a portable graph, in the order in which they are preferred."""
    return _decoder_profiles(spec) if spec.states else _vision_profiles(spec)


def capacity_of(spec: GraphSpec) -> int:
    """Tokens that a KV cache has room for: the model's context. TensorRT wants it fixed, and updates it in place."""
    return spec.dims["past"].max


def _decoder_profiles(spec: GraphSpec) -> tuple[Profile, ...]:
    capacity, batch = capacity_of(spec), min(MOST_BATCH, spec.dims["batch"].max)
    span = (min(BUCKET, capacity), min(4 * BUCKET, capacity), capacity)
    made = []
    for name, most in (("decode", DECODE_TOKENS), ("prefill", PREFILL_TOKENS)):
        tokens, rows = min(most, spec.dims["tokens"].max), min(most, MOST_ROWS, spec.dims["rows"].max)
        usual = 1 if name == "decode" else tokens
        sizes = {"batch": (1, 1, batch), "tokens": (1, usual, tokens), "rows": (1, 1, rows), SPAN: span}
        made.append(Profile(name, sizes, name == "decode"))
    return tuple(made)


def _vision_profiles(spec: GraphSpec) -> tuple[Profile, ...]:
    """One slice of the usual size, which is what the runtime encodes at a time, several, and one of any size."""
    slices, patches = spec.dims["slices"], spec.dims["patches"]
    usual = patches_of(spec)
    most = min(MOST_SLICES, slices.max)
    sizes = (1, min(patches.opt, usual), usual)
    made = [Profile("slice", {"slices": (1, 1, 1), "patches": sizes}, True)]
    if most > 1:
        made.append(Profile("slices", {"slices": (2, most, most), "patches": sizes}, True))
    if usual < patches.max:
        made.append(Profile("any slice", {"slices": (1, 1, 1), "patches": (1, usual, patches.max)}, False))
    return tuple(made)


def engine_inputs(spec: GraphSpec, half: Half) -> tuple[TensorSpec, ...]:
    """The inputs of the lowered graph: those of `spec`, with caches of fixed room in the place of the past, the place of the
    first new token, int64[batch], and the columns to read.
    """
    if not spec.states:
        return spec.inputs
    past = {pair.input for pair in spec.states}
    kept = tuple(t for t in spec.inputs if t.name not in past)
    own = (TensorSpec(WRITE, "int64", ("batch",)), TensorSpec(COLUMNS, "int64", (SPAN,)))
    return (*kept, *own, *caches(spec, half))


def engine_spec(spec: GraphSpec, half: Half) -> GraphSpec:
    """What the lowered graph takes and gives: caches come out under names of their own, which share their memory."""
    states = {pair.output for pair in spec.states}
    outputs = tuple(t for t in spec.outputs if t.name not in states)
    presents = tuple(dataclasses.replace(t, name=present_name(t.name)) for t in caches(spec, half))
    return GraphSpec(spec.name, engine_inputs(spec, half), outputs + presents, (), spec.dims)


def caches(spec: GraphSpec, half: Half) -> tuple[TensorSpec, ...]:
    """The inputs that hold keys and values: [batch, kv_heads, capacity, head_dim]. numpy has no bfloat16: int16 stands for it."""
    dtype = {"float16": "float16", "bfloat16": "int16", "float32": "float32"}[half]
    found = []
    for pair in spec.states:
        kv_heads, head_dim = spec.input(pair.input).shape[2:]
        shape = ("batch", kv_heads, capacity_of(spec), head_dim)
        found.append(TensorSpec(pair.input, dtype, shape))  # type: ignore[arg-type]  # int16 is none of a graph's own
    return tuple(found)


def present_name(past: str) -> str:
    """The output that shares its memory with the cache input `past`."""
    return past.replace("past_", "present_")


def shapes_key(spec: GraphSpec) -> str:
    """The sizes that an engine of `spec` takes, in words: of two that differ, so do the engines."""
    parts = []
    for profile in profiles(spec):
        sizes = ", ".join(f"{dim} {low}-{high}" for dim, (low, _, high) in profile.sizes.items())
        parts.append(f"{profile.name}: {sizes}")
    return "; ".join(parts)
