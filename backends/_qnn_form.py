"""The fixed shapes an NPU is given, and how a call of any size is fitted to them.

    vision    one slice of `patches_of` patches
    prefill   one sequence, 128 new tokens behind a past of as many rows as asked for, logits at 8 of them
    decode    the same with one new token

What is missing is padded and hidden by the biases. Of a decoder, everything that depends on positions comes from the host:
cosines and sines of the rotary embedding, and one bias that says which keys a token sees, past ones before new ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lensc.export.graph import GraphSpec, TensorSpec

HIDDEN = -100.0
"""Added to the logit of a key that must not be seen. exp(-100) is 0 beside any key that is seen, and a range of 100 in 16
bits resolves 0.0015, where the portable graph's -10000 would take the resolution from all logits."""

BIASES = ("attention_bias", "key_bias")
"""Inputs that say which keys are seen: 0 or less."""

ASPECT = 10
"""Longer side over shorter side of a slice that must fit."""

STEP = 32
"""Patches are a multiple of it: the HTP's vectors take 64 bytes."""

PREFILL_TOKENS = 128
"""New tokens of a prefill: the chunk that Qualcomm's own language models are compiled for."""

PREFILL_ROWS = 8
"""How many logits a prefill gives: those of drafted tokens. The head is a thirteenth of the model's products per row."""

CONTEXT = 2048
"""Rows of past that a decoder is compiled for, if the model has as many: ten slices and as much text."""

RANGE_TOKENS, RANGE_ROWS, RANGE_PAST = 512, 128, 32
"""Sizes at which ranges of a decoder's activations are measured: a prompt at once, logits all along it, and the golden
probe's past."""


@dataclass(frozen=True)
class Form:
    """One set of sizes of a graph, by the names of its dimensions."""

    name: str
    sizes: dict[str, int]

    def shape(self, tensor: TensorSpec) -> tuple[int, ...]:
        """The shape of `tensor` at these sizes; keys and values lie as products take them."""
        found = tuple(d if isinstance(d, int) else self.sizes[d] for d in tensor.shape)
        if is_state(tensor.name):
            rows, batch, heads, width = found
            return (batch, heads, width, rows) if is_key(tensor.name) else (batch, heads, rows, width)
        return found


def is_state(name: str) -> bool:
    """Whether it is one of a decoder's keys or values, old or new."""
    return name.removeprefix("past_").partition(".")[0] in ("key", "value") and "." in name


def is_key(name: str) -> bool:
    """Whether a state holds keys."""
    return name.removeprefix("past_").startswith("key.")


def decoder_inputs(form: Form, groups: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what a decoder is given in place of position ids, float32: cosines and sines for each token, and the bias
    of every key for each token of each head of a group.
    """
    tokens, keys = form.sizes["tokens"], form.sizes["past"] + form.sizes["tokens"]
    turns = (tokens, 1, width // 2)
    return {"rope_cos": turns, "rope_sin": turns, "attention_bias": (1, 1, groups * tokens, keys)}


def patches_of(spec: GraphSpec) -> int:
    """The patches to compile for.

    A slice has an area of `opt` patches at most and sides rounded to whole patches, which adds up to half a patch to each:
    (a + 1/2) * (b + 1/2) with a * b = opt and a / b = ASPECT. 1088 for 448 x 448 pixels.
    """
    size = spec.dims["patches"]
    sides = math.sqrt(size.opt) * (math.sqrt(ASPECT) + 1 / math.sqrt(ASPECT))
    needed = size.opt + sides / 2 + 0.25
    return min(size.max, math.ceil(needed / STEP) * STEP)


def forms(spec: GraphSpec, context: int | None = None) -> tuple[Form, ...]:
    """The forms to compile `spec` in, a decoder for a past of `context` rows."""
    if not spec.states:
        return (Form(spec.name, {"slices": 1, "patches": patches_of(spec)}),)
    past = min(context or CONTEXT, spec.dims["past"].max)
    tokens = min(PREFILL_TOKENS, spec.dims["tokens"].max)
    prefill = {"batch": 1, "tokens": tokens, "rows": min(PREFILL_ROWS, tokens), "past": past}
    return Form("prefill", prefill), Form("decode", {"batch": 1, "tokens": 1, "rows": 1, "past": past})


def range_form(spec: GraphSpec) -> Form:
    """The form in which ranges of activations are measured; values have the same names in all."""
    if not spec.states:
        return forms(spec)[0]
    tokens = min(RANGE_TOKENS, spec.dims["tokens"].max)
    rows, past = min(RANGE_ROWS, tokens), min(RANGE_PAST, spec.dims["past"].max)
    return Form("ranges", {"batch": 1, "tokens": tokens, "rows": rows, "past": past})
