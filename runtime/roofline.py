"""What a model will take on a device, before there is either: memory, and times from bytes over bandwidth and operations
over peak (the roofline of Williams, Waterman and Patterson, 2009).

A prediction says what it rests on, number by number, and what it lacks. A figure of the profile that somebody reached
(`achieved_tops`, `achieved_gb_s`) is taken as it is; a peak is multiplied by the share of `SHARES`, which somebody reached
elsewhere. Nothing here touches a device or a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lensc.profiles.profile import Figure, Processor

Part = Literal["vision", "prefill", "decode"]
Processing = Literal["cpu", "gpu", "npu"]


@dataclass(frozen=True)
class Share:
    """The part of a peak that was reached, and where."""

    value: float
    reference: str


SHARES: dict[tuple[Processing, Part, bool], Share] = {
    ("cpu", "vision", True): Share(0.44, "as prefill"),
    ("cpu", "vision", False): Share(0.44, "as prefill"),
    ("cpu", "prefill", True): Share(0.44, "OpenVINO on two Zen 5 cores, 66 tokens/s of 2.078 TOPS in int8"),
    ("cpu", "prefill", False): Share(0.44, "as in 4 bits"),
    ("cpu", "decode", True): Share(0.72, "docs/native_cpu.md, 0.63 to 0.82 of the bandwidth"),
    ("cpu", "decode", False): Share(0.72, "as in 4 bits"),
    ("gpu", "vision", True): Share(0.43, "docs/cuda.md, 2.5 ms a slice on an H200"),
    ("gpu", "vision", False): Share(0.43, "docs/cuda.md, 2.5 ms a slice on an H200"),
    ("gpu", "prefill", True): Share(0.51, "docs/cuda.md, 35,800 tokens/s on an H200"),
    ("gpu", "prefill", False): Share(0.64, "docs/cuda.md, 44,300 tokens/s on an H200"),
    ("gpu", "decode", True): Share(0.46, "docs/cuda.md, 560 tokens/s on an H200"),
    ("gpu", "decode", False): Share(0.75, "docs/cuda.md, 240 tokens/s on an H200"),
    ("npu", "vision", True): Share(0.18, "as prefill"),
    ("npu", "vision", False): Share(0.18, "as prefill"),
    ("npu", "prefill", True): Share(0.18, "AI Hub Models, Llama-3-8B in w4a16 on a Snapdragon X Elite, 8.1 of 45 TOPS"),
    ("npu", "prefill", False): Share(0.18, "as in 4 bits"),
    ("npu", "decode", True): Share(0.70, "AI Hub Models, Llama-3-8B in w4a16 on a Snapdragon 8 Elite, 59 of 84.8 GB/s"),
    ("npu", "decode", False): Share(0.70, "as in 4 bits"),
}
"""By processor, part, and whether weights are quantized (for `prefill` and `decode`: below 8 bits)."""

WORK_BYTES = 150 << 20
"""What a process takes beside weights and caches: measured for native:cpu at 1024 tokens, docs/native_cpu.md."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model. Weights are counted in linears and tables; norms and biases do not matter here.

    `tower` is width, inner width and layers of the vision tower; None where only the number of its weights is known.
    """

    name: str
    vision_weights: int
    layer_weights: int
    head_weights: int
    embedding_weights: int
    hidden: int
    layers: int
    kv_heads: int
    head_dim: int
    queries: int
    tower: tuple[int, int, int] | None = None
    gate_and_up_weights: int = 0
    """Of `layer_weights`."""

    def slice_operations(self, patches: int) -> float:
        """Of the tower and the resampler over a slice of so many patches, two for each multiplication with its addition."""
        if self.tower is None:
            return 2.0 * patches * self.vision_weights
        width, inner, layers = self.tower
        linears = layers * 2 * patches * (4 * width**2 + 2 * width * inner) + 2 * patches * 3 * 14**2 * width
        attention = layers * 4 * patches**2 * width
        wide = self.hidden
        resampler = 2 * patches * (width * wide + 2 * wide**2) + self.queries * (4 * patches * wide + 4 * wide**2)
        return linears + attention + resampler

    def token_operations(self, context: int) -> float:
        """Of the layers for a prompt token with `context` tokens before it; the head is computed for the last one only."""
        heads = self.hidden // self.head_dim
        return 2.0 * self.layer_weights + 4.0 * self.layers * heads * self.head_dim * context


@dataclass(frozen=True)
class Stored:
    """Bits that a weight takes, its share of scales included, and how products are computed.

    `vision_integers` and `decoder_integers` say whether products are of 8-bit activations.
    """

    name: str
    vision_bits: float
    layer_bits: float
    head_bits: float
    embedding_bits: float
    kv_bits: float = 16
    vision_integers: bool = True
    decoder_integers: bool = True
    gate_and_up_bits: float | None = None

    def vision_bytes(self, model: Model) -> int:
        """Of the tower and the resampler."""
        return round(model.vision_weights * self.vision_bits / 8)

    def decoder_bytes(self, model: Model) -> int:
        """Of layers and head: what a token reads, beside the cache."""
        inner = model.gate_and_up_weights if self.gate_and_up_bits is not None else 0
        bits = (model.layer_weights - inner) * self.layer_bits + inner * (self.gate_and_up_bits or 0)
        return round((bits + model.head_weights * self.head_bits) / 8)

    def head_bytes(self, model: Model) -> int:
        """Of the head alone."""
        return round(model.head_weights * self.head_bits / 8)

    def cache_bytes(self, model: Model, context: int) -> int:
        """Keys and values of so many tokens."""
        return round(2 * model.layers * model.kv_heads * model.head_dim * context * self.kv_bits / 8)


@dataclass(frozen=True)
class Request:
    """A question about a picture: patches of each slice, tokens of the prompt without the picture, and the most tokens
    that prompt, picture and answer may have.
    """

    patches: tuple[int, ...]
    prompt_tokens: int
    context: int

    def tokens(self, model: Model) -> int:
        """Of the whole prompt: each slice is its queries between two marks."""
        return self.prompt_tokens + len(self.patches) * (model.queries + 2)


@dataclass(frozen=True)
class Prediction:
    """For a scheme on a processor. What nobody knows is None, and `unknown` says which figures it would need."""

    scheme: str
    processor: Processing
    arch: str
    memory_bytes: int
    sequential_bytes: int
    """Where the tower is released before the decoder is loaded."""
    fits: Literal["yes", "one after the other", "no"] | None
    image_ms: float | None
    prefill_tokens_s: float | None
    ttft_ms: float | None
    decode_tokens_s: float | None
    rests_on: tuple[str, ...]
    unknown: tuple[str, ...]


def predict(model: Model, stored: Stored, processor: Processor, request: Request) -> Prediction:
    """What `request` takes with `model` stored so, all of it on `processor`."""
    basis: list[str] = []
    unknown: list[str] = []
    stored = _moved(stored, processor)
    vision, decoder = stored.vision_bytes(model), stored.decoder_bytes(model)
    table = round(model.embedding_weights * stored.embedding_bits / 8)
    held = decoder + stored.cache_bytes(model, request.context)
    memory = vision + held + table + WORK_BYTES
    sequential = max(vision, held) + table + WORK_BYTES
    tokens = request.tokens(model)

    def rate(part: Part, few_bits: bool, dtypes: Sequence[str]) -> float | None:
        found, why = _operations_s(processor, part, few_bits, dtypes)
        (basis if found else unknown).append(why)
        return found

    below_8 = stored.layer_bits < 8
    gb_s, why = _bytes_s(processor, below_8)
    (basis if gb_s else unknown).append(why)
    seen = rate("vision", stored.vision_integers, _vision_dtypes(processor, stored))
    read = rate("prefill", below_8, _prefill_dtypes(processor, stored))
    steps_s = _overhead_s(processor, model.layers)

    def longer(operations: float, of: float | None, nbytes: int) -> float | None:
        """Seconds: whichever takes longer, computing or reading."""
        return None if of is None else max(operations / of, nbytes / gb_s if gb_s else 0.0)

    slices = [longer(model.slice_operations(patches), seen, vision) for patches in request.patches]
    image = None if None in slices else sum(one for one in slices if one is not None)
    prompt = longer(tokens * model.token_operations(0), read, decoder - stored.head_bytes(model))
    head = longer(2 * model.head_weights, read, stored.head_bytes(model))
    mixing = tokens * (model.token_operations(tokens // 2) - model.token_operations(0))
    mixed = None if read is None else mixing / read
    if known := processor.attention_tops:  # no quantized product computes it
        mixed = mixing / (known.value * 1e12)
        basis.append(f"prefill: {_shown('attention_tops', known, 'TOPS')}")
    if prompt is not None and head is not None and mixed is not None:
        prompt += head + mixed
    token = None
    if gb_s is not None:
        context = (tokens + request.context) // 2
        token = (decoder + stored.cache_bytes(model, context)) / gb_s + steps_s
    ttft = None if image is None or prompt is None else image + prompt
    return Prediction(
        scheme=stored.name,
        processor=processor.kind,
        arch=processor.arch,
        memory_bytes=memory,
        sequential_bytes=sequential,
        fits=_fits(processor, memory, sequential, unknown),
        image_ms=None if image is None else image * 1e3,
        prefill_tokens_s=None if prompt is None else tokens / prompt,
        ttft_ms=None if ttft is None else ttft * 1e3,
        decode_tokens_s=None if token is None else 1 / token,
        rests_on=tuple(dict.fromkeys(basis)),
        unknown=tuple(dict.fromkeys(unknown)),
    )


@dataclass(frozen=True)
class Limits:
    """What cannot be passed: bytes over bandwidth, or operations over peak, whichever takes longer. None where the profile
    lacks a figure, or there is no picture.
    """

    image_ms: float | None
    prefill_tokens_s: float | None
    decode_tokens_s: float | None


def limits(model: Model, stored: Stored, processor: Processor, request: Request) -> Limits:
    """Of `request` on `processor`, by its bandwidth and its peak and not by what anybody reached."""
    stored = _moved(stored, processor)
    gb_s = processor.bandwidth_gb_s
    tokens, decoder = request.tokens(model), stored.decoder_bytes(model)

    def seconds(operations: float, nbytes: int, dtypes: Sequence[str]) -> float | None:
        peaks = [processor.peak_tops[dtype].value for dtype in dtypes if dtype in processor.peak_tops]
        if not peaks or gb_s is None:
            return None
        return max(operations / (peaks[0] * 1e12), nbytes / (gb_s.value * 1e9))

    of = _vision_dtypes(processor, stored)
    slices = [seconds(model.slice_operations(n), stored.vision_bytes(model), of) for n in request.patches]
    of = [dtype for dtype in _prefill_dtypes(processor, stored) if dtype != "int4"]  # no product is of 4 bits
    prompt = seconds(tokens * model.token_operations(tokens // 2), decoder, of)
    read = decoder + stored.cache_bytes(model, (tokens + request.context) // 2)
    return Limits(
        image_ms=None if not slices or None in slices else 1e3 * sum(one for one in slices if one is not None),
        prefill_tokens_s=None if prompt is None else tokens / prompt,
        decode_tokens_s=None if gb_s is None else gb_s.value * 1e9 / read,
    )


def _moved(stored: Stored, processor: Processor) -> Stored:
    """GPUs and NPUs hold in 16 bits what lies in 32."""
    if processor.kind == "cpu":
        return stored
    most = {name: min(16.0, getattr(stored, name)) for name in ("vision_bits", "layer_bits", "head_bits")}
    return Stored(**{**vars(stored), **most})


def _vision_dtypes(processor: Processor, stored: Stored) -> Sequence[str]:
    if processor.kind == "cpu":
        return ("int8",) if stored.vision_integers else ("float32",)
    return ("bfloat16", "float16") if processor.kind == "gpu" else ("float16", "int8")


def _prefill_dtypes(processor: Processor, stored: Stored) -> Sequence[str]:
    if processor.kind == "gpu":
        return ("bfloat16", "float16")
    if not stored.decoder_integers:
        return ("float32",) if processor.kind == "cpu" else ("float16",)
    return ("int4", "int8") if stored.layer_bits < 8 else ("int8",)


def _operations_s(processor: Processor, part: Part, few_bits: bool, dtypes: Sequence[str]) -> tuple[float | None, str]:
    """Operations per second, and what that rests on; None, and the figures that would be needed."""
    for dtype in dtypes:
        if reached := processor.achieved_tops.get(dtype):
            return reached.value * 1e12, f"{part}: {_shown(f'achieved_tops.{dtype}', reached, 'TOPS')}"
    for dtype in dtypes:
        if peak := processor.peak_tops.get(dtype):
            share = SHARES[processor.kind, part, few_bits]
            how = f"{_shown(f'peak_tops.{dtype}', peak, 'TOPS')}, times {share.value:g} (estimated: {share.reference})"
            return peak.value * share.value * 1e12, f"{part}: {how}"
    needed = " or ".join(f"{kind}_tops.{dtype}" for dtype in dtypes for kind in ("achieved", "peak"))
    return None, f"{part}: the profile has no {needed}"


def _bytes_s(processor: Processor, few_bits: bool) -> tuple[float | None, str]:
    """Bytes per second that decoding reads, and what that rests on."""
    if reached := processor.achieved_gb_s:
        return reached.value * 1e9, f"decode: {_shown('achieved_gb_s', reached, 'GB/s')}"
    if most := processor.bandwidth_gb_s:
        share = SHARES[processor.kind, "decode", few_bits]
        how = f"{_shown('bandwidth_gb_s', most, 'GB/s')}, times {share.value:g} (estimated: {share.reference})"
        return most.value * share.value * 1e9, f"decode: {how}"
    return None, "decode: the profile has no achieved_gb_s or bandwidth_gb_s"


def _overhead_s(processor: Processor, layers: int) -> float:
    """What calling the engine for a token costs: the call, and eleven steps of each layer."""
    costs = {name: figure.value / 1e6 for name, figure in processor.overheads_us.items()}
    return costs.get("call", 0.0) + 11 * layers * costs.get("step", 0.0)


def _fits(
    processor: Processor, memory: int, sequential: int, unknown: list[str]
) -> Literal["yes", "one after the other", "no"] | None:
    if processor.memory_bytes is None:
        unknown.append("fit: the profile has no memory_bytes")
        return None
    if memory <= processor.memory_bytes.value:
        return "yes"
    return "one after the other" if sequential <= processor.memory_bytes.value else "no"


def _shown(name: str, figure: Figure, unit: str) -> str:
    return f"{name} {figure.value:g} {unit} ({figure.source}: {figure.reference})"
