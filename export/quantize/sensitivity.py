"""How much it costs to store one group of weights in few bits, all others as they are: in divergence at the logits.

All samples pass through the float model once, block by block (`StreamedModel`). Where a block holds a group, its weights
are rounded to each candidate format, by the method that the recipe will use, and what the block then computes is a
*trajectory*: it goes on through the float weights of all later blocks beside the samples' own, and is compared with them
at the logits. That is exact, but for one thing: every group sees the inputs of the float model, while in a quantized
model it sees those of the groups before it, rounded too.

A large model has too many candidates to carry each of them to the end. With `exact=False` one trajectory leaves each
block, made with the coarsest format of all its groups at once (the anchor), and a candidate counts in proportion:

    kl(candidate) = kl(anchor) * |change of the block's output|^2 / |the anchor's change|^2

The divergence is quadratic in small changes; what the proxy leaves out is that two changes of the same size may point
where later blocks care more, or less. The head and the table are always measured exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import InputError
from lensc.export.calibration import Sample
from lensc.export.checkpoint import WeightSource
from lensc.export.memory import trim
from lensc.export.models.hooks import observed
from lensc.export.models.linears import LinearRows, linear_rows, shared_input
from lensc.export.models.streamed import Run, StreamedModel

from .calibrate import HEAD, SliceFeeds, embedding_rows
from .calibrated import is_calibrated
from .gptq import Factor, Hessian, quantize_gptq
from .loss import Divergence, Loss, forced_feeds, sum_up
from .recipe import EMBEDDING
from .smooth import round_activations
from .weights import QuantizedWeight, WeightFormat, dequantize, quantize_rtn

NORM = "llm.model.norm"


@dataclass(frozen=True)
class Group:
    """Weights that are stored in one format: in the decoder those that read the same inputs, in a layer of the vision
    tower those of its attention, and of its MLP; all of the resampler.

    pattern: what a recipe calls them, in the sense of `fnmatch`; formats: the candidates, by falling size.
    """

    pattern: str
    names: tuple[str, ...]
    formats: tuple[WeightFormat, ...]

    @property
    def block(self) -> str:
        """The block of a `StreamedModel` that holds them; of lm_head, whose blocks are pieces, the part they share."""
        match = re.match(r"(?:vpm\.encoder|llm\.model)\.layers\.\d+|resampler|llm\.lm_head", self.names[0])
        return match[0] if match else ""

    @property
    def is_vision(self) -> bool:
        """Whether it is part of the graph `vision`."""
        return not self.names[0].startswith("llm.")


@dataclass(frozen=True)
class Cost:
    """What `format` costs where only the group `pattern` has it: summed over all tokens of all answers."""

    pattern: str
    format: WeightFormat
    loss: Loss

    @property
    def kl(self) -> float:
        """Nats per token."""
        return self.loss.mean_kl


def pattern_of(name: str) -> str:
    """The pattern of the group that the linear `name` belongs to."""
    vision = re.match(r"resampler\.|vpm\.encoder\.layers\.\d+\.(?:self_attn|mlp)\.", name)
    if vision:
        return f"{vision[0]}*"
    name = re.sub(r"\.[qkv]_proj\.weight$", ".[qkv]_proj.weight", name)
    return re.sub(r"\.(?:gate|up)_proj\.weight$", ".[gu]*_proj.weight", name)


def find_groups(shapes: Mapping[str, tuple[int, int]], formats: Callable[[str], Sequence[WeightFormat]]) -> list[Group]:
    """The groups of all linears and of the embedding table; shapes: (outputs, inputs) by name.

    `formats` names the candidates for a weight. One whose groups do not divide the inputs is left out: not every engine
    takes it. A group without candidates is none.
    """
    names: dict[str, list[str]] = {}
    for name in shapes:
        names.setdefault(pattern_of(name), []).append(name)
    found = []
    for pattern, members in names.items():
        fitting = tuple(
            format
            for format in formats(members[0])
            if all(shapes[name][1] % format.group_of(shapes[name][1]) == 0 for name in members)
        )
        if fitting:
            found.append(Group(pattern, tuple(members), fitting))
    return found


def measure(
    model: StreamedModel,
    weights: WeightSource,
    spec: ModelSpec,
    samples: Sequence[Sample],
    groups: Sequence[Group],
    *,
    method: str,
    activations: Mapping[str, int],
    exact: bool,
) -> list[Cost]:
    """The cost of every candidate of every group, in the order of `groups`.

    activations: bits in products, by graph: the inputs of a group are rounded with it where they are 8. Raises
    InputError where the samples never reach a group, or hold nothing that `gptq` could look at.
    """
    probing = _Probing(groups, samples, method, activations, exact)
    width = spec.decoder.hidden_size
    slices = [SliceFeeds(pixels, sample, spec.picture, width) for sample in samples for pixels in sample.slices]
    embeds = [np.empty((0, 0, width), np.float32)]
    if slices:
        vision = [group for group in groups if group.is_vision]
        on_block = probing.on_block if vision else None
        outputs = model.run_vision(slices, on_linear=probing.on_linear if vision else None, on_block=on_block)
        embeds = [output["image_embeds"] for output in outputs]
    feeds = []
    rows = iter(embeds)
    for sample in samples:
        words = embedding_rows(weights, sample.ids, None)
        feeds.append(forced_feeds(sample, [next(rows)[0] for _ in sample.slices], words, spec))
    probing.enter_decoder([feed["inputs_embeds"] for feed in feeds], [f["logit_positions"] for f in feeds], weights)
    model.run_decoder(feeds, [["logits"]] * len(feeds), on_linear=probing.on_linear, on_block=probing.on_block)
    return probing.costs(spec.generation.eos_token_ids)


def trajectories(groups: Sequence[Group], exact: bool) -> tuple[int, int]:
    """How many trajectories `measure` carries out of the vision graph, and through the decoder's last layer."""

    def count(chosen: Sequence[Group]) -> int:
        return sum(len(g.formats) for g in chosen) if exact else len({g.block for g in chosen})

    inner = [g for g in groups if g.names[0] != EMBEDDING and g.block != HEAD]
    tables = sum(len(g.formats) for g in groups if g.names[0] == EMBEDDING)
    vision = count([g for g in inner if g.is_vision])
    return vision, vision + tables + count([g for g in inner if not g.is_vision])


@dataclass(eq=False)
class _Trajectory:
    """One candidate's way through the model: the input of the next block, by slice, then by sample."""

    values: list[Tensor]
    divergences: list[Divergence] = field(default_factory=list)


Key = tuple[str, str]
"""A group's pattern and a format, or a block and nothing."""


class _Probing:
    """What a `StreamedModel` calls."""

    def __init__(
        self,
        groups: Sequence[Group],
        samples: Sequence[Sample],
        method: str,
        activations: Mapping[str, int],
        exact: bool,
    ) -> None:
        self._groups = groups
        self._samples = samples
        self._method = method
        self._activations = activations
        self._exact = exact
        self._alive: dict[Key, _Trajectory] = {}
        self._powers: dict[Key, float] = {}
        self._hessians: dict[str, Hessian] = {}
        self._owners: dict[str, str] = {}
        self._head: Factor | None = None
        self._wanted = {
            name for group in groups for name in group.names if any(is_calibrated(f) for f in group.formats)
        }

    # --- hooks --------------------------------------------------------------------------------------------------------

    def on_linear(self, name: str, x: Tensor) -> None:
        """Note what a linear is given, once for all that share it."""
        if self._method != "gptq" or name not in self._wanted:
            return
        place = shared_input(name)
        if self._owners.setdefault(place, name) == name:
            if place not in self._hessians:
                self._hessians[place] = Hessian(x.shape[1])
            self._hessians[place].add(x)

    def on_block(self, name: str, module: nn.Module, x: Sequence[Tensor], run: Run) -> None:
        """Carry all trajectories through the block, and let new ones begin."""
        if name.startswith(HEAD):
            self._on_head(name, module, x, run)
            return
        for trajectory in self._alive.values():
            if name == NORM:
                trajectory.values = [v.index_select(1, p) for v, p in zip(trajectory.values, self._rows, strict=True)]
            trajectory.values = [run(i, value) for i, value in enumerate(trajectory.values)]
        here = [group for group in self._groups if group.block == name]
        if not here:
            return
        linears = {
            rows.name: rows for path, p in module.named_parameters() for rows in linear_rows(f"{name}.{path}", p.data)
        }
        computed = partial(self._computed, name, module, x, run)
        if self._exact:
            for group, format, rounded in self._candidates(here, linears):
                with _in_place(linears, rounded):
                    self._alive[group.pattern, str(format)] = _Trajectory(computed(dict.fromkeys(group.names, format)))
            return
        exact = [run(i, value) for i, value in enumerate(x)]
        anchor: dict[str, Tensor] = {}
        for group, format, rounded in self._candidates(here, linears):
            with _in_place(linears, rounded):
                self._powers[group.pattern, str(format)] = _power(computed(dict.fromkeys(group.names, format)), exact)
            if format == group.formats[-1]:
                anchor |= rounded
        coarsest = {name: group.formats[-1] for group in here for name in group.names}
        with _in_place(linears, anchor):
            values = computed(coarsest)
        self._powers[name, ""] = _power(values, exact)
        self._alive[name, ""] = _Trajectory(values)

    def enter_decoder(
        self,
        embeds: Sequence[np.typing.NDArray[np.float32]],
        positions: Sequence[np.typing.NDArray[np.int64]],
        weights: WeightSource,
    ) -> None:
        """Put what the trajectories made of the pictures between the words, and let those of the table begin.

        embeds: float32[1, tokens, D] of each sample; positions: where its logits are asked for.
        """
        self._rows = [torch.from_numpy(p) for p in positions]
        for trajectory in self._alive.values():
            made = iter(trajectory.values)
            trajectory.values = []
            for sample, rows in zip(self._samples, embeds, strict=True):
                mixed = torch.from_numpy(rows.copy())
                for start, stop in sample.image_bounds.tolist():
                    mixed[0, start:stop] = next(made)[0]
                trajectory.values.append(mixed)
        for group in self._groups:
            for format in group.formats if group.names[0] == EMBEDDING else ():
                values = []
                for sample, rows in zip(self._samples, embeds, strict=True):
                    words = torch.from_numpy(embedding_rows(weights, sample.ids, format))[None]
                    for start, stop in sample.image_bounds.tolist():
                        words[0, start:stop] = torch.from_numpy(rows[0, start:stop])
                    values.append(words)
                self._alive[group.pattern, str(format)] = _Trajectory(values)

    def costs(self, stops: Sequence[int]) -> list[Cost]:
        """Of every candidate, once all blocks were seen."""
        found = []
        for group in self._groups:
            for format in group.formats:
                key = (group.pattern, str(format))
                if key in self._powers:
                    anchor = (group.block, "")
                    whole = sum_up(self._alive[anchor].divergences, self._samples, stops)
                    share = self._powers[key] / self._powers[anchor] if self._powers[anchor] else 0.0
                    # no choice was observed of it
                    loss = Loss(whole.kl * share, whole.tokens, 0, whole.answers, whole.right, 0)
                elif key in self._alive and self._alive[key].divergences:
                    loss = sum_up(self._alive[key].divergences, self._samples, stops)
                else:
                    raise InputError(f"the calibration data never reach {group.pattern}; calibrate with other data")
                found.append(Cost(group.pattern, format, loss))
        return found

    # --- candidates ---------------------------------------------------------------------------------------------------

    def _candidates(
        self, groups: Sequence[Group], linears: Mapping[str, LinearRows]
    ) -> Iterator[tuple[Group, WeightFormat, dict[str, Tensor]]]:
        """Each group of a block in each of its formats, with the float values that its weights then stand for.

        Small inputs come first: their Hessians are gone when the largest are factored.
        """
        for group in sorted(groups, key=lambda group: max(linears[n].weight.shape[1] for n in group.names)):
            factors: dict[str, Factor] = {}
            for format in group.formats:
                rounded = {}
                for name in group.names:
                    weight = linears[name].weight
                    rounded[name] = dequantize(self._round(name, weight.contiguous(), format, factors))
                yield group, format, rounded

    def _round(self, name: str, weight: Tensor, format: WeightFormat, factors: dict[str, Factor]) -> QuantizedWeight:
        if self._method != "gptq" or not is_calibrated(format):
            return quantize_rtn(weight, format)
        place = shared_input(name)
        if place not in factors:
            if place not in self._hessians:
                raise InputError(f"weight {name}: the calibration data never reach it; calibrate with other data")
            factors[place] = self._hessians.pop(place).factor()
        return quantize_gptq(weight, factors[place], format)

    def _computed(
        self, block: str, module: nn.Module, x: Sequence[Tensor], run: Run, formats: Mapping[str, WeightFormat]
    ) -> list[Tensor]:
        """The block's outputs for all samples, with the inputs of the linears in `formats` rounded as engines do."""
        with observed(block, module, partial(rounded_input, self._activations, formats)):
            outputs = [run(i, value) for i, value in enumerate(x)]
        trim()  # what the samples leave in the heap would come on top of the next candidate's
        return outputs

    def _on_head(self, name: str, module: nn.Module, x: Sequence[Tensor], run: Run) -> None:
        """Compare the logits of some columns of the vocabulary, and try the head's own formats on them."""
        start = int(re.search(r"\[(\d+):", name)[1])  # type: ignore[index]  # the name of a piece
        weight = dict(module.named_parameters())["weight"].data
        full = f"{HEAD}.weight"
        factors = {} if self._head is None else {shared_input(full): self._head}

        def compare(key: Key, logits: Callable[[int], Tensor]) -> None:
            # the exact ones are made anew each time: all of them together would be the largest thing that is held
            trajectory = self._alive.setdefault(key, _Trajectory([]))
            for i, value in enumerate(x):
                exact = run(i, value)[0]
                if i == len(trajectory.divergences):
                    trajectory.divergences.append(Divergence(len(exact)))
                trajectory.divergences[i].add(exact, logits(i), start)

        def narrow(given: Callable[[Tensor], Tensor], rounded: Tensor, i: int) -> Tensor:
            return given(x[i].flatten(0, -2)) @ rounded.mT

        def carried(values: Sequence[Tensor], i: int) -> Tensor:
            return run(i, values[i])[0]

        for group in self._groups:
            for format in group.formats if group.block == HEAD else ():
                rounded = dequantize(self._round(full, weight, format, factors))
                given = partial(rounded_input, self._activations, {full: format}, full)
                compare((group.pattern, str(format)), partial(narrow, given, rounded))
        self._head = factors.get(shared_input(full))
        for key, trajectory in list(self._alive.items()):
            if trajectory.values:
                compare(key, partial(carried, trajectory.values))


def rounded_input(activations: Mapping[str, int], formats: Mapping[str, WeightFormat], name: str, x: Tensor) -> Tensor:
    """`x: float[tokens, in]` as an engine feeds it to the linear `name`: in 8 bits where the graph's products are.

    One scale for the tensor where the weight has one per output, else one for each group of a token's values.
    """
    format = formats.get(name)
    if format is None or activations.get("decoder" if name.startswith("llm.") else "vision", 32) != 8:
        return x
    if format.group_size is None:
        return round_activations(x, "tensor")
    size = format.group_of(x.shape[1])
    if x.shape[1] % size:
        return round_activations(x, "token")
    return round_activations(x.reshape(len(x), -1, size), "token").view_as(x)


@contextmanager
def _in_place(linears: Mapping[str, LinearRows], values: Mapping[str, Tensor]) -> Iterator[None]:
    """While inside, the weights named in `values` have these."""
    held = {name: linears[name].weight.clone() for name in values}
    for name, value in values.items():
        linears[name].weight.copy_(value)
    try:
        yield
    finally:
        for name, value in held.items():
            linears[name].weight.copy_(value)


def _power(changed: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The squared change, summed over all values."""
    return sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(changed, exact, strict=True))
