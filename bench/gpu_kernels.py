"""Our GPU kernels alone, beside torch's, at the sizes of the model.

A case has several copies of its operands, more than the second-level cache holds, as in a model other weights pass between
two calls of the same kernel. All copies are one CUDA graph, so that launching costs nothing. What a kernel computed is
compared with what torch computed of the same operands; one that differs has no speed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gpu_clock, record, turns
from .gpu_clock import Work
from .gpu_program import FULL

ALLOWED = 1e-2
"""Norm of the difference over the norm: results are rounded to 8 bits, which are 1e-3 to 2e-3."""
COLD_BYTES, MOST_COPIES = 256 << 20, 192

BF16 = torch.bfloat16
WIDTH, HEADS, KV_HEADS, DIM = FULL.hidden_size, FULL.num_attention_heads, FULL.num_key_value_heads, FULL.head_dim
GROUP = 128


@dataclass(frozen=True)
class Pair:
    """One call of ours and one of the rival, with operands of their own."""

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """`nbytes` are those of the operands and results of one call, `operations` its multiplications and additions; which
    of the two limits it is said by the unit of its speed.
    """

    what: str
    unit: Literal["GB/s", "TOPS"]
    nbytes: int
    operations: int
    rival: str
    make: Callable[[], Pair]

    @property
    def copies(self) -> int:
        return max(1, min(MOST_COPIES, -(-COLD_BYTES // self.nbytes)))


def measure(case: Case, repeat: int, reach: dict[str, float]) -> record.Row:
    """The row of a case, without a speed if its result differs from the rival's."""
    pairs = [case.make() for _ in range(case.copies)]
    truth = pairs[0].theirs().float()
    error = float((pairs[0].ours().float() - truth).norm() / truth.norm())
    if not error <= ALLOWED:
        print(f"{case.what}: error {error:.2g}, allowed is {ALLOWED:g}", flush=True)
        return record.Row(case.what, case.unit, None, parity="fail")
    works: dict[str, Work] = {
        "ours": gpu_clock.graphed([pair.ours for pair in pairs]),
        "theirs": gpu_clock.graphed([pair.theirs for pair in pairs]),
    }
    took = gpu_clock.in_turn(works, repeat)
    amount = len(pairs) * (case.nbytes / 1e6 if case.unit == "GB/s" else case.operations / 1e9)
    ours, theirs = ([amount / ms for ms in took[who]] for who in ("ours", "theirs"))
    limit = reach["read_gb_s" if case.unit == "GB/s" else "bfloat16_tops"]
    return turns.compared(case.what, case.unit, ours, theirs, case.rival, limit)


def cases() -> Iterator[Case]:
    """All of them. What they need is imported and allocated when they are made."""
    yield from _linears()
    yield from _decode_attention()
    yield from _prefill_attention()
    yield from _vision_attention()
    yield from _rows()


def _normal(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


# --- linears of few rows --------------------------------------------------------------------------------------------

LINEARS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * DIM, WIDTH),
    "out": (WIDTH, WIDTH),
    "gate and up": (2 * FULL.intermediate_size, WIDTH),
    "down": (WIDTH, FULL.intermediate_size),
    "head": (FULL.vocab_size, WIDTH),
}
"""Outputs and inputs of the decoder's products, merged where they read the same."""


def _linears() -> Iterator[Case]:
    for name, (outputs, inputs) in LINEARS.items():
        for rows in (1, 8) if name == "gate and up" else (1,):
            what, operations = f"{name} {outputs} x {inputs}, {rows} row{'s' * (rows > 1)}", 2 * rows * outputs * inputs
            make = _maker(_float_linear, rows, outputs, inputs)
            yield Case(f"{what}, bfloat16", "GB/s", 2 * outputs * inputs, operations, "torch", make)
            nbytes = outputs * inputs // 2 + 2 * outputs * inputs // GROUP + 4 * outputs
            for rival, pack in (("torch, bfloat16", False), ("torch, _weight_int4pack_mm", True)):
                make = _maker(_int4_linear, rows, outputs, inputs, pack)
                yield Case(f"{what}, int4", "GB/s", nbytes, operations, rival, make)


def _maker(make: Callable[..., Pair], *arguments: int | bool) -> Callable[[], Pair]:
    return lambda: make(*arguments)


def _float_linear(rows: int, outputs: int, inputs: int) -> Pair:
    from lensc.kernels.linear import gpu

    x, values = _normal(rows, inputs), _normal(outputs, inputs, scale=inputs**-0.5)
    weight = gpu.FloatWeight(values)
    return Pair(lambda: gpu.few_rows(x, weight), lambda: F.linear(x, values))


def _int4_linear(rows: int, outputs: int, inputs: int, packed: bool) -> Pair:
    from lensc.kernels.linear import gpu

    x = _normal(rows, inputs)
    values = torch.randint(0, 256, (outputs, inputs // 2), device="cuda", dtype=torch.uint8)
    scale = (torch.rand(outputs, inputs // GROUP, device="cuda") + 0.5) / (4.6 * inputs**0.5)
    # a float16 and a bfloat16 alike, so that both formats hold the same weights
    scale = scale.to(BF16).float()
    weight = gpu.pack(values, scale, None, GROUP, inputs)
    if not packed:
        floats = gpu.unpacked(weight, BF16)
        return Pair(lambda: gpu.few_rows(x, weight), lambda: F.linear(x, floats))
    # its nibbles lie the other way round, its scales [groups, outputs, (scale, zero)]
    turned = torch.ops.aten._convert_weight_to_int4pack((values << 4) | (values >> 4), 8)
    pairs = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).to(BF16).contiguous()
    return Pair(lambda: gpu.few_rows(x, weight), lambda: torch.ops.aten._weight_int4pack_mm(x, turned, GROUP, pairs))


# --- attention ------------------------------------------------------------------------------------------------------


def _decode_attention() -> Iterator[Case]:
    for context in (128, 1024, 4096, 8192):
        nbytes = 2 * 2 * KV_HEADS * DIM * context
        operations = 4 * HEADS * DIM * context
        make = _maker(_one_token, context)
        yield Case(f"decode attention, context {context}", "GB/s", nbytes, operations, "torch SDPA", make)


def _one_token(context: int) -> Pair:
    from lensc.kernels.attention import gpu

    q = _normal(1, HEADS, DIM)
    keys, values = (_normal(1, KV_HEADS, context, DIM) for _ in range(2))
    past = torch.tensor([context - 1], dtype=torch.int32, device="cuda")
    # of a kv head the query heads are rows of one query: torch reads keys and values once, too
    rows = q.view(1, KV_HEADS, HEADS // KV_HEADS, DIM)
    scratch = gpu.decode_scratch(1, 1, HEADS, KV_HEADS, DIM, q.device)
    return Pair(
        lambda: gpu.decode_attention(q, keys, values, past, DIM**-0.5, 1, 1, scratch),
        lambda: F.scaled_dot_product_attention(rows, keys, values).view(1, HEADS * DIM),
    )


def _prefill_attention() -> Iterator[Case]:
    for tokens in (1024, 4096):
        nbytes, operations = 4 * (HEADS + KV_HEADS) * DIM * tokens, 2 * HEADS * DIM * tokens * (tokens + 1)
        make = _maker(_prompt, tokens)
        yield Case(f"prefill attention, {tokens} tokens", "TOPS", nbytes, operations, "torch SDPA", make)


def _prompt(tokens: int) -> Pair:
    from lensc.kernels.attention import gpu

    q = _normal(tokens, HEADS, DIM)
    keys, values = (_normal(1, KV_HEADS, tokens, DIM) for _ in range(2))
    past = torch.zeros(1, dtype=torch.int32, device="cuda")
    queries = q.transpose(0, 1)[None]

    def theirs() -> Tensor:
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return mixed[0].transpose(0, 1).reshape(tokens, -1)

    return Pair(lambda: gpu.prefill_attention(q, keys, values, past, DIM**-0.5, 1, tokens), theirs)


def _vision_attention() -> Iterator[Case]:
    wide, heads, queries = FULL.vision.hidden_size, FULL.vision.num_attention_heads, FULL.query_num
    for slices in (1, 10):
        rows = 1024 * slices
        make = _maker(_slices, slices, 1024, 1024, heads, wide)
        yield Case(
            f"vision attention, {slices} x 1024", "TOPS", 8 * wide * rows, 4 * wide * rows * 1024, "torch SDPA", make
        )
    make = _maker(_slices, 10, queries, 1024, FULL.resampler_heads, WIDTH)
    nbytes, operations = 4 * 10 * WIDTH * (1024 + queries), 4 * WIDTH * 10 * 1024 * queries
    yield Case(f"resampler attention, 10 x {queries} x 1024", "TOPS", nbytes, operations, "torch SDPA", make)


def _slices(slices: int, queries: int, keys: int, heads: int, width: int) -> Pair:
    """Where there are as many queries as keys, q, k and v lie side by side, else each for itself."""
    from lensc.kernels.attention import gpu

    if queries == keys:
        q, k, v = _normal(slices, keys, 3 * width).chunk(3, -1)
    else:
        q = _normal(1, queries, width)
        k, v = (_normal(slices, keys, width) for _ in range(2))
    bias = torch.zeros(slices, keys, device="cuda")

    def theirs() -> Tensor:
        rows = (x.expand(slices, -1, -1) for x in (q, k, v))
        query, key, value = (torch.unflatten(x, -1, (heads, -1)).transpose(1, 2) for x in rows)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(slices * queries, width)

    return Pair(lambda: gpu.attention(q, k, v, bias, heads, (width // heads) ** -0.5), theirs)


# --- rows -----------------------------------------------------------------------------------------------------------

COMPILED = "torch.compile"


def _rows() -> Iterator[Case]:
    wide = FULL.vision.hidden_size
    shapes: Sequence[tuple[str, int, int]] = (("rms", 1, WIDTH), ("rms", 1024, WIDTH), ("layer", 10240, wide))
    for kind, rows, width in shapes:
        # two values are read and two written, of 2 and 4 bytes each
        what, nbytes = f"{kind} norm after a sum, {rows} x {width}", 12 * rows * width
        yield Case(what, "GB/s", nbytes, 8 * rows * width, COMPILED, _norm_maker(kind, rows, width))
    gate, wider = FULL.intermediate_size, FULL.vision.intermediate_size
    yield Case(f"silu_mul, 1024 x {gate}", "GB/s", 6 * 1024 * gate, 1, COMPILED, _maker(_silu_mul, 1024, gate))
    yield Case(f"gelu_tanh, 10240 x {wider}", "GB/s", 4 * 10240 * wider, 1, COMPILED, _maker(_gelu, 10240, wider))


def _norm_maker(kind: str, rows: int, width: int) -> Callable[[], Pair]:
    def make() -> Pair:
        from lensc.kernels.norm import gpu

        x, stream = _normal(rows, width), _normal(rows, width, dtype=torch.float32)
        weight, shift = (_normal(width, dtype=torch.float32) for _ in range(2))
        ours: Any = (x, stream, None, weight, None if kind == "rms" else shift, 1e-5, kind, BF16)
        theirs = _compiled(_summed_rms if kind == "rms" else _summed_layer)
        return Pair(lambda: gpu.add_norm(*ours)[1], lambda: theirs(x, stream, weight, shift)[1])

    return make


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compile makes of a function for each of its shapes, when it is first called."""
    return torch.compile(function, dynamic=False)


def _summed_rms(x: Tensor, stream: Tensor, weight: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    total = stream + x
    return total, F.rms_norm(total, (total.shape[1],), weight, 1e-5).to(BF16)


def _summed_layer(x: Tensor, stream: Tensor, weight: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    total = stream + x
    return total, F.layer_norm(total, (total.shape[1],), weight, shift, 1e-5).to(BF16)


def _silu_mul(rows: int, width: int) -> Pair:
    from lensc.kernels.activation import gpu

    x, theirs = _normal(rows, 2 * width), _compiled(_plain_silu_mul)
    return Pair(lambda: gpu.silu_mul(x), lambda: theirs(x))


def _gelu(rows: int, width: int) -> Pair:
    from lensc.kernels.activation import gpu

    x, bias = _normal(rows, width), _normal(width, dtype=torch.float32)
    theirs = _compiled(_plain_gelu)
    return Pair(lambda: gpu.gelu_tanh(x, bias), lambda: theirs(x, bias))


def _plain_silu_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def _plain_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x.float() + bias, approximate="tanh").to(x.dtype)
