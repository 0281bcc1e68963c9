"""A program -> what a GPU runs for it, in order: linears that read the same value as one, norms and sums where they cost nothing.

Values are tensors [rows, width]: float32 where they are a stream that layers add to, and else in the type that is
computed in. A linear of few rows takes its RMSNorm, its residual and its gate with it (`linear.gpu.few_rows`). Of many
rows, the sum with the residual stream is made by the norm that reads it first (`Pending`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from lensc.kernels.activation import gpu as activation
from lensc.kernels.attention.gpu import (
    DecodeScratch,
    attention,
    decode_attention,
    decode_scratch,
    one_token,
    prefill_attention,
    takes_one_token,
)
from lensc.kernels.linear import gpu as linear_
from lensc.kernels.linear.gpu import Ending, GroupedWeight, Weight
from lensc.kernels.norm import gpu as norm_
from lensc.kernels.rope import gpu as rope_

from ._cuda_weights import Source, format_of, weight_on_device
from ._program import (
    Add,
    Attention,
    CausalAttention,
    Constant,
    GatherRows,
    GeluTanh,
    Linear,
    Normalize,
    Program,
    SelectRows,
    SiluMul,
    Step,
    count,
    reads,
    split,
)

FEW_ROWS = linear_.MOST_ROWS
"""Rows that go through few_rows, in one pass over the weight."""
FEW_PACKED_ROWS = 32
"""Of packed weights: four passes take as long as making floats of them once."""


@dataclass
class LayerCache:
    """Keys and values of a layer: [batch, kv_heads, capacity, head_dim], of int8 with float32[batch, kv_heads, capacity]."""

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class Pending:
    """A value that is still to be summed: residual + x + bias."""

    x: torch.Tensor
    residual: torch.Tensor
    bias: torch.Tensor | None

    def summed(self) -> torch.Tensor:
        """float32[rows, width]"""
        total = self.residual + self.x
        return total if self.bias is None else total + self.bias


@dataclass
class Run:
    """One run of a plan. `feeds` are tensors on the device; `past`, int32[1] there, is how many tokens `layers` hold."""

    feeds: Mapping[str, torch.Tensor]
    sizes: Mapping[str, int]
    layers: Sequence[LayerCache] = ()
    past: torch.Tensor | None = None
    values: dict[int, Any] = field(default_factory=dict)

    def value(self, i: int) -> torch.Tensor:
        """The value `i`, summed."""
        found = self.values[i]
        if isinstance(found, Pending):
            found = self.values[i] = found.summed()
        made: torch.Tensor = found
        return made


Operation = Callable[[Run], None]


@dataclass(frozen=True)
class Norm:
    """Constants of a Normalize, on the device."""

    kind: Any
    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float


@dataclass(frozen=True)
class Plan:
    """A program made ready for a device and a type."""

    operations: tuple[tuple[Operation, tuple[int, ...]], ...]
    """In order, each with the values that nobody reads after it."""
    notes: tuple[str, ...]
    """What is not as the scheme says: weights that became floats."""

    def __call__(self, run: Run) -> None:
        for operation, done in self.operations:
            operation(run)
            for value in done:
                run.values.pop(value, None)


def plan(program: Program, source: Source, dtype: torch.dtype) -> Plan:
    """Put the constants of `program` on the device and plan its steps. Raises ExecutionError for a file that is short."""
    return _Planning(program, source, dtype).planned()


class _Planning:
    def __init__(self, program: Program, source: Source, dtype: torch.dtype) -> None:
        self._program, self._source, self._dtype = program, source, dtype
        self._readers: dict[int, list[Step]] = {}
        for step in program.steps:
            for value in reads(step):
                self._readers.setdefault(value, []).append(step)
        for port in program.outputs:
            self._readers.setdefault(port.value, [])
        self._outputs = {port.value for port in program.outputs}
        self._operations: list[tuple[Operation, list[int], int]] = []
        self._constants: dict[object, torch.Tensor] = {}
        self._floats = _Floats()
        self._decode_scratch: dict[tuple[int, ...], DecodeScratch] = {}
        self._merged: list[int] = []
        """The values that the linear before made as one, in the place of the first."""
        self._notes: set[str] = set()

    def planned(self) -> Plan:
        steps = list(self._program.steps)
        norms: dict[int, Normalize] = {}
        """By value, those that the only linears that read them take along."""
        i = 0
        while i < len(steps):
            step = steps[i]
            if isinstance(step, Linear):
                members = self._members(steps, i)
                i += len(members)
                self._linear(members, steps[i] if i < len(steps) else None, norms.pop(step.x, None))
                if self._is_gate(members, steps[i] if i < len(steps) else None):
                    i += 1
                continue
            if isinstance(step, Normalize) and self._goes_along(step, steps, i):
                norms[step.y] = step
            else:
                self._add(self._operation(step), reads(step), step.y)
            i += 1
        return Plan(self._with_last_reads(), tuple(sorted(self._notes)))

    # --- linears --------------------------------------------------------------------------------------------------

    def _members(self, steps: Sequence[Step], start: int) -> list[Linear]:
        """The linears from `start` on that can be one: q, k, v of an attention, or gate and up."""
        first = steps[start]
        assert isinstance(first, Linear)
        members = [first]
        for step in steps[start + 1 :]:
            alike = (
                isinstance(step, Linear)
                and step.x == first.x
                and step.residual is None
                and first.residual is None
                and format_of(step.weight) == format_of(first.weight)
                and (step.bias is None) == (first.bias is None)
            )
            if not alike:
                break
            assert isinstance(step, Linear)
            members.append(step)
        behind = steps[start + len(members)] if start + len(members) < len(steps) else None
        if self._is_gate(members, behind) or self._is_query_key_value(members, behind):
            return members
        return members[:1]

    def _only(self, value: int, step: Step) -> bool:
        return self._readers.get(value) == [step] and value not in self._outputs

    def _is_gate(self, members: Sequence[Linear], behind: Step | None) -> bool:
        return (
            isinstance(behind, SiluMul)
            and [member.y for member in members] == [behind.gate, behind.up]
            and all(self._only(member.y, behind) and member.bias is None for member in members)
        )

    def _is_query_key_value(self, members: Sequence[Linear], behind: Step | None) -> bool:
        return (
            isinstance(behind, CausalAttention | Attention)
            and [member.y for member in members] == [behind.q, behind.k, behind.v]
            and all(self._only(member.y, behind) for member in members)
        )

    def _goes_along(self, norm: Normalize, steps: Sequence[Step], i: int) -> bool:
        """Whether a norm can be a part of the linear behind it: of all that read it."""
        behind = steps[i + 1] if i + 1 < len(steps) else None
        if norm.kind != "rms" or norm.y in self._outputs or not isinstance(behind, Linear) or behind.x != norm.y:
            return False
        members = self._members(steps, i + 1)
        return len(self._readers[norm.y]) == len(members) and all(m.bias is None for m in members)

    def _linear(self, members: Sequence[Linear], behind: Step | None, norm: Normalize | None) -> None:
        first, dtype = members[0], self._dtype
        weight = weight_on_device(self._source, [member.weight for member in members], dtype)
        if not isinstance(weight, GroupedWeight) and first.weight.kind != "f32":
            self._notes.add(
                f"weights in {first.weight.kind} become {str(dtype).removeprefix('torch.')} as they are loaded"
            )
        bias = None
        if first.bias is not None:
            parts = [self._constant(member.bias)[0] for member in members if member.bias is not None]
            bias = torch.cat(parts)
        gate = self._is_gate(members, behind)
        assert not gate or isinstance(behind, SiluMul)
        is_output = first.y in self._outputs
        ending = Ending.STORE
        if gate:
            ending = Ending.SILU
        elif first.residual is not None:
            ending = Ending.RESIDUAL
        elif is_output:
            ending = Ending.LOGITS
        y = behind.y if gate and isinstance(behind, SiluMul) else first.y
        along = None if norm is None else self._norm(norm)
        x, rows = first.x if norm is None else norm.x, self._program.values[first.y].rows
        residual, most, floats = first.residual, 0 if bias is not None else _few(weight, dtype), self._floats
        if isinstance(weight, GroupedWeight):
            floats.size = max(floats.size, weight.outputs * weight.inputs)

        def run_linear(run: Run) -> None:
            if count(rows, run.sizes) <= most:
                stream = run.value(x)
                normed = None if along is None else (along.weight, along.epsilon)
                given = stream.float() if along is not None else stream.to(dtype)
                added = None if residual is None else run.value(residual).float().contiguous()
                run.values[y] = linear_.few_rows(given.contiguous(), weight, ending, normed, added, dtype=dtype)
                return
            given = _normalized(run, x, along, dtype) if along is not None else run.value(x).to(dtype)
            if isinstance(weight, GroupedWeight):
                values = linear_.unpacked(weight, dtype, floats.held(dtype, given.device))
            else:
                values = weight.values
            if residual is not None:
                made = F.linear(given, values)
                run.values[y] = Pending(made, run.value(residual), bias)
                return
            made = F.linear(given, values, None if bias is None else bias.to(dtype))
            if ending == Ending.SILU:
                made = activation.silu_mul(made)
            run.values[y] = made.float() if ending == Ending.LOGITS else made

        self._add(run_linear, [x] if residual is None else [x, residual], y)
        if len(members) > 1 and not gate:
            self._merged = [member.y for member in members]

    # --- other steps ----------------------------------------------------------------------------------------------

    def _operation(self, step: Step) -> Operation:
        dtype = self._dtype
        match step:
            case Normalize():
                norm = self._norm(step)

                def run_norm(run: Run) -> None:
                    run.values[step.y] = _normalized(run, step.x, norm, dtype)

                return run_norm
            case Add():
                b = step.b if isinstance(step.b, int) else self._constant(step.b)

                def run_add(run: Run) -> None:
                    a = run.value(step.a).float()
                    other = run.value(b) if isinstance(b, int) else b
                    run.values[step.y] = (a.view(-1, *other.shape) + other).view(a.shape)

                return run_add
            case GatherRows():
                table = self._constant(step.table)

                def run_gather(run: Run) -> None:
                    run.values[step.y] = table[run.feeds[step.ids].flatten()]

                return run_gather
            case SelectRows():
                apart = split(self._program.values[step.y].rows)[0]

                def run_select(run: Run) -> None:
                    x = run.value(step.x)
                    of_each = x.view(count(apart, run.sizes), -1, x.shape[1])
                    run.values[step.y] = of_each[:, run.feeds[step.positions]].reshape(-1, x.shape[1])

                return run_select
            case SiluMul():

                def run_silu(run: Run) -> None:
                    both = torch.cat([run.value(step.gate), run.value(step.up)], dim=1)
                    run.values[step.y] = activation.silu_mul(both)

                return run_silu
            case GeluTanh():

                def run_gelu(run: Run) -> None:
                    run.values[step.y] = activation.gelu_tanh(run.value(step.x))

                return run_gelu
            case CausalAttention():
                return self._causal_attention(step)
            case Attention():
                return self._attention(step)
        raise AssertionError(f"a linear is no operation of its own: {step}")

    def _causal_attention(self, step: CausalAttention) -> Operation:
        merged = self._readers[step.q] == [step] and self._took(step.q, step.k, step.v)
        frequencies = self._constant(step.inverse_frequencies)[0].contiguous()
        apart = split(self._program.values[step.y].rows)[0]

        def run_attention(run: Run) -> None:
            qkv = run.value(step.q) if merged else torch.cat([run.value(i) for i in (step.q, step.k, step.v)], dim=1)
            layer, past = run.layers[step.layer], run.past
            assert past is not None
            batch = count(apart, run.sizes)
            tokens = qkv.shape[0] // batch
            if merged and takes_one_token(qkv, layer.key) and layer.key_scale is None:
                scratch = self._scratch(1, 1, step, qkv.device)
                run.values[step.y] = one_token(
                    qkv, layer.key, layer.value, past, frequencies, step.num_heads, step.scale, scratch
                )
                return
            scales = {"scale_k": layer.key_scale, "scale_v": layer.value_scale}
            query = rope_.rope_append(
                qkv, layer.key, layer.value, past, frequencies, step.num_heads, batch, tokens, **scales
            )
            if tokens <= FEW_ROWS:
                scratch = self._scratch(batch, tokens, step, query.device)
                run.values[step.y] = decode_attention(
                    query, layer.key, layer.value, past, step.scale, batch, tokens, scratch, **scales
                )
            else:
                run.values[step.y] = prefill_attention(
                    query, layer.key, layer.value, past, step.scale, batch, tokens, **scales
                )

        return run_attention

    def _scratch(self, batch: int, tokens: int, step: CausalAttention, device: torch.device) -> DecodeScratch:
        """One for all layers, which follow one another."""
        key = (batch, tokens, step.num_heads, step.kv_num_heads, step.head_dim)
        if key not in self._decode_scratch:
            self._decode_scratch[key] = decode_scratch(*key, device)
        return self._decode_scratch[key]

    def _attention(self, step: Attention) -> Operation:
        merged = isinstance(step.q, int) and self._took(step.q, step.k, step.v)
        constant = self._constant(step.q).to(self._dtype)[None] if isinstance(step.q, Constant) else None
        apart = split(self._program.values[step.y].rows)[0]

        def run_attention(run: Run) -> None:
            slices = count(apart, run.sizes)
            if merged:
                assert isinstance(step.q, int)
                parts = run.value(step.q)
                query, key, value = parts.view(slices, -1, parts.shape[1]).chunk(3, dim=2)
            else:
                key, value = (_apart(run.value(i), slices).to(self._dtype) for i in (step.k, step.v))
                query = constant if constant is not None else _apart(run.value(step.q), slices).to(self._dtype)  # type: ignore[arg-type]  # an id
            bias = None if step.bias is None else run.feeds[step.bias]
            run.values[step.y] = attention(query, key, value, bias, step.num_heads, step.scale)

        return run_attention

    def _took(self, *values: int) -> bool:
        """Whether the linear before made these as one value."""
        return list(values) == self._merged

    # --- constants ------------------------------------------------------------------------------------------------

    def _constant(self, constant: Constant) -> torch.Tensor:
        """float32[rows, width], once for all that name the same bytes."""
        key = (constant.place, constant.rows, constant.width)
        if key not in self._constants:
            self._constants[key] = self._source.constant(constant)
        return self._constants[key]

    def _norm(self, step: Normalize) -> Norm:
        bias = None if step.bias is None else self._constant(step.bias)[0]
        return Norm(step.kind, self._constant(step.weight)[0], bias, step.epsilon)

    # --- lifetimes ------------------------------------------------------------------------------------------------

    def _add(self, operation: Operation, read: Sequence[int], y: int) -> None:
        self._operations.append((operation, [*read, y], y))

    def _with_last_reads(self) -> tuple[tuple[Operation, tuple[int, ...]], ...]:
        last = {value: i for i, (_, values, _) in enumerate(self._operations) for value in values}
        ends: dict[int, list[int]] = {}
        for value, i in last.items():
            if value not in self._outputs:
                ends.setdefault(i, []).append(value)
        return tuple((operation, tuple(ends.get(i, ()))) for i, (operation, _, _) in enumerate(self._operations))


def _apart(x: torch.Tensor, parts: int) -> torch.Tensor:
    """[parts * rows, width] -> [parts, rows, width]"""
    return x.view(parts, -1, x.shape[1])


def _normalized(run: Run, x: int, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """The norm of value `x`, which is summed on the way if it still has to be."""
    given = run.values[x]
    if isinstance(given, Pending):
        run.values[x], made = norm_.add_norm(
            given.x, given.residual, given.bias, norm.weight, norm.bias, norm.epsilon, norm.kind, dtype
        )
        return made
    return norm_.add_norm(given, None, None, norm.weight, norm.bias, norm.epsilon, norm.kind, dtype)[1]


def _few(weight: Weight, dtype: torch.dtype) -> int:
    """How many rows are better off without the vendor's library."""
    if isinstance(weight, GroupedWeight):
        return FEW_PACKED_ROWS
    return 0 if dtype == torch.float32 else FEW_ROWS


class _Floats:
    """Room for any packed weight in floats, one for all: linears run one after the other. Made when it is first needed."""

    def __init__(self) -> None:
        self.size = 0
        self._held: torch.Tensor | None = None

    def held(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self._held is None:
            self._held = torch.empty(self.size, dtype=dtype, device=device)
        return self._held
