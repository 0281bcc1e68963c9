"""The smallest recipe whose measured loss stays within what is allowed.

    1. measure what each group of weights costs in each format, all else in float (`sensitivity`)
    2. go down from the float model one step after the other, a step being the next format of one group: always the one
       that costs the least divergence for each byte it saves (the lower convex hull of each group's points, all merged)
    3. how far down, is measured: the recipe as a whole is calibrated as it will be, fed the answers, and compared with
       the float model (`loss`). Costs add up only roughly, so the place is found by trying: the whole way first, then
       between the last recipe that kept the promise and the first that did not

The loss that is promised is `lost`: of 100 answers, how many the float model gives right and the recipe does not. Where
the float model gives fewer than `ENOUGH_ANSWERS` right, as with long texts, it is `changed`: of 100 tokens of the answers,
how many are chosen otherwise.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import ceil, prod, sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from lensc.backends.base import Array
from lensc.backends.errors import UsageError
from lensc.export.calibration import CalibrationSet, Sample
from lensc.export.memory import Limit, available_bytes, resident_bytes
from lensc.export.models.linears import linear_rows
from lensc.export.models.streamed import StreamedModel
from lensc.export.provenance import lensc_version
from lensc.export.source import Source
from lensc.export.stages import Staging
from lensc.export.writer import Quantize, round_to_nearest

from .calibrate import SliceFeeds, calibrate, decoder_feeds, embedding_rows, footprint
from .calibrated import Calibrated
from .loss import Loss, compare_logits, forced_feeds
from .recipe import EMBEDDING, HEAD, Recipe
from .sensitivity import Cost, Group, find_groups, measure, rounded_input, trajectories
from .weights import WeightFormat, dequantize

CANDIDATES = {
    "vision": ("w8", "w4-g32-s4"),
    "decoder": ("w8-g128", "w4-g32-s4", "w4-g128-s4", "w2-g64-s4"),
    "table": ("w8", "w4-g64"),
}
"""Formats that are tried, by falling size, as far as the targets take them. Three bits are none of them: they lie in four,
in files and in engines."""

ACTIVATIONS = {"vision": 8, "decoder": 8}
"""Bits in products of what a search makes."""

ENOUGH_ANSWERS = 20
"""With fewer right answers, one that is lost would be more than 5 of 100."""

VALIDATIONS = 5
"""Recipes that are measured as a whole, at most."""

CLOSE = 0.005
"""Share of the size by which the next larger recipe may be larger for the search to end."""

MOST_TOKENS = 9_000
"""Of the samples that sensitivity is measured with: what a model in memory is shown."""
STREAMED_TOKENS = 1_536
"""The same for a model that is streamed, whose every trajectory computes as long as all samples do."""

STAGES = 2 + VALIDATIONS
CALIBRATED = "calibrated"
"""Where the weights of a recipe that is being measured are staged."""


@dataclass(frozen=True)
class Step:
    """A group's next format: what it saves, and what it costs beyond the one before."""

    pattern: str
    format: WeightFormat
    saved_bytes: int
    kl: float


@dataclass(frozen=True)
class Tried:
    """A recipe that was measured as a whole: after how many steps, its bytes, and its loss."""

    steps: int
    nbytes: int
    loss: Loss
    kept: bool


@dataclass(frozen=True)
class Found:
    """What a search comes to."""

    recipe: Recipe
    groups: tuple[Group, ...]
    costs: tuple[Cost, ...]
    tried: tuple[Tried, ...]
    best: Tried
    float_bytes: int
    by_answers: bool
    exact: bool
    calibrated_on: str
    measured_on: str
    samples: int
    """With which the sensitivity was measured."""


def search(
    source: Source,
    staging: Staging,
    data: CalibrationSet,
    held_out: CalibrationSet | None,
    max_loss: float,
    method: str,
    name: str,
    usable: Callable[[str, WeightFormat], bool],
) -> Found:
    """Search a recipe called `name` for the checkpoint of `source`, an f32 one, that is calibrated with `data`.

    The loss is measured on `held_out`, or where there is none on `data` itself. `usable` says whether a linear may be stored
    in a format. What is measured is a stage of `staging`, and is not measured again in its folder, whatever `max_loss` is then.
    Raises UsageError if not even the first step keeps within `max_loss`; MemoryLimitError if the limit is too low; what reading
    weights raises.
    """
    limit = staging.limit
    shapes = {**source.linears, EMBEDDING: _table_shape(source)}
    groups = find_groups(shapes, lambda name: [f for f in _formats(name) if name == EMBEDDING or usable(name, f)])
    exact = not source.is_streamed
    samples = _affordable(source, limit, data, groups, method, exact)
    measured_on = held_out or data
    inputs = {
        "checkpoint": source.checkpoint.sha256,
        "calibration": data.sha256,
        "measured on": measured_on.sha256,
        "method": method,
        "lensc": lensc_version(),
    }
    judge = _Judge(source, limit, data, measured_on.samples)
    right = staging.stage("answers of the float model", inputs, int, lambda: (judge.right, ()))
    by_answers = right >= ENOUGH_ANSWERS

    def costs_of_groups() -> tuple[tuple[Cost, ...], tuple[Path, ...]]:
        model = _streamed(source, limit)
        found = measure(
            model,
            source.checkpoint,
            source.spec,
            samples,
            groups,
            method=method,
            activations=ACTIVATIONS,
            exact=exact,
        )
        return tuple(found), ()

    tried_of_groups = "; ".join(f"{group.pattern} {' '.join(map(str, group.formats))}" for group in groups)
    shown = f"{len(samples)} samples, {sum(len(sample.ids) for sample in samples)} tokens"
    costs = staging.stage(
        f"sensitivity of {len(groups)} groups",
        {**inputs, "groups": tried_of_groups, "samples": shown},
        tuple[Cost, ...],
        costs_of_groups,
    )
    steps = descent(groups, costs, shapes)
    float_bytes = source.graph_bytes + source.table_bytes

    tried: list[Tried] = []
    kept, broken = 0, len(steps) + 1
    best: Tried | None = None
    count = len(steps)
    while len(tried) < VALIDATIONS or best is None:
        recipe = recipe_after(steps[:count], name, method)
        nbytes = float_bytes - sum(step.saved_bytes for step in steps[:count])
        loss = staging.stage(
            f"recipe of {nbytes / 1e6:.1f} MB as a whole ({count} steps)",
            {**inputs, "recipe": recipe.to_toml([], {})},
            Loss,
            partial(_staged_loss, judge, recipe, inputs, staging.folder / CALIBRATED),
        )
        value = loss.lost_percent if by_answers else loss.changed_percent
        tried.append(Tried(count, nbytes, loss, value <= max_loss))
        if value <= max_loss:
            kept, best = count, tried[-1]
        else:
            broken = count
        if broken - kept <= 1:
            break
        larger = sum(step.saved_bytes for step in steps[kept : broken - 1])
        if best is not None and larger <= CLOSE * best.nbytes:
            break
        count = _between(steps, kept, broken, tried[-1], value, max_loss)
    if best is None or best.steps == 0:
        least = min(tried, key=lambda one: one.steps)
        raise UsageError(
            f"--max-loss {max_loss:g}: no recipe keeps it; the first step alone ({steps[0].pattern} in "
            f"{steps[0].format}) loses {points(least.loss, by_answers)}; allow more, or show more with --calibration"
        )
    recipe = recipe_after(steps[: best.steps], name, method)
    return Found(
        recipe, tuple(groups), costs, tuple(tried), best, float_bytes, by_answers, exact,
        str(data), str(measured_on), len(samples),
    )  # fmt: skip


def descent(groups: Sequence[Group], costs: Sequence[Cost], shapes: Mapping[str, tuple[int, int]]) -> list[Step]:
    """All steps of all groups, those first that cost the least divergence for each byte they save."""
    of_group: dict[str, list[Cost]] = {}
    for cost in costs:
        of_group.setdefault(cost.pattern, []).append(cost)
    ranked: list[tuple[float, int, Step]] = []
    for group in groups:
        nbytes, kl = sum(4 * prod(shapes[name]) for name in group.names), 0.0
        points = [
            (sum(c.format.bytes_for(shapes[n]) for n in group.names), c.kl, c.format) for c in of_group[group.pattern]
        ]
        steepness = 0.0
        while lower := [point for point in points if point[0] < nbytes]:
            slopes = [(max(0.0, point[1] - kl) / (nbytes - point[0]), point[0]) for point in lower]
            slope, size = min(slopes)
            _, cost_kl, format = lower[slopes.index((slope, size))]
            # measured values are noisy: a later step of a group never comes before an earlier one
            steepness = max(steepness, slope)
            step = Step(group.pattern, format, nbytes - size, max(0.0, cost_kl - kl))
            ranked.append((steepness, len(ranked), step))
            nbytes, kl = size, max(kl, cost_kl)
    return [step for _, _, step in sorted(ranked, key=lambda entry: entry[:2])]


def recipe_after(steps: Sequence[Step], name: str, method: str) -> Recipe:
    """The recipe in which each group has the format of its last step."""
    formats = {step.pattern: str(step.format) for step in steps}
    return Recipe(name, tuple(sorted(formats.items(), key=lambda item: _order(item[0]))), dict(ACTIVATIONS), method)


# --- the loss of a whole recipe -----------------------------------------------------------------------------------


class _Judge:
    """The float model's answers, and how far those of a recipe are from them."""

    def __init__(self, source: Source, limit: Limit, data: CalibrationSet, samples: Sequence[Sample]) -> None:
        self._source = source
        self._limit = limit
        self._data = data
        self._samples = _chosen(samples, STREAMED_TOKENS) if source.is_streamed else list(samples)
        self._stops = source.spec.generation.eos_token_ids

    @cached_property
    def _reference(self) -> list[Array]:
        return self._logits(None, round_to_nearest)

    @property
    def right(self) -> int:
        """How many answers the float model gives as they stand."""
        return compare_logits(self._reference, self._reference, self._samples, self._stops).right

    def loss(self, recipe: Recipe, folder: Path, key: str) -> Loss:
        """Calibrate by `recipe`, and compare. Weights that `folder` holds from an earlier run with the same `key` are kept."""
        source = self._source
        formats = recipe.formats([*source.linears, EMBEDDING])
        quantize: Quantize = round_to_nearest
        if recipe.is_calibrated:
            checkpoint, spec = source.checkpoint, source.spec
            calibrate(checkpoint, checkpoint.config, spec, self._data, formats, folder, key, self._limit)
            quantize = Calibrated(folder)
        return compare_logits(self._reference, self._logits(formats, quantize), self._samples, self._stops)

    def _logits(self, formats: Mapping[str, WeightFormat] | None, quantize: Quantize) -> list[Array]:
        """float32[rows, vocab] of each sample, with the weights and inputs in `formats`, as they are without."""
        source, given = self._source, formats or {}
        model = _streamed(source, self._limit)
        hooks: dict[str, Any] = {}
        if formats is not None:
            hooks = {
                "replace": partial(_rounded, given, quantize),
                "change_input": partial(rounded_input, ACTIVATIONS, given),
            }
        spec = source.spec
        width = spec.decoder.hidden_size
        slices = [SliceFeeds(p, sample, spec.picture, width) for sample in self._samples for p in sample.slices]
        embeds = iter(model.run_vision(slices, **hooks) if slices else [])
        feeds = []
        for sample in self._samples:
            words = embedding_rows(source.checkpoint, sample.ids, given.get(EMBEDDING))
            feeds.append(forced_feeds(sample, [next(embeds)["image_embeds"][0] for _ in sample.slices], words, spec))
        outputs = model.run_decoder(feeds, [["logits"]] * len(feeds), **hooks)
        return [output["logits"][0] for output in outputs]


def _staged_loss(
    judge: _Judge, recipe: Recipe, inputs: Mapping[str, str], folder: Path
) -> tuple[Loss, tuple[Path, ...]]:
    key = hashlib.sha256(json.dumps([dict(inputs), recipe.to_toml([], {})]).encode()).hexdigest()
    loss = judge.loss(recipe, folder, key)
    shutil.rmtree(folder, ignore_errors=True)  # large, and of no use to the next recipe
    return loss, ()


def _rounded(formats: Mapping[str, WeightFormat], quantize: Quantize, block: str, state: dict[str, Tensor]) -> None:
    """Overwrite a block's weights with what they stand for in `formats`."""
    first = int(block.partition("[")[2].partition(":")[0] or 0)
    for name, weight in state.items():
        for rows in linear_rows(name, weight):
            if rows.name in formats:
                made = quantize(rows.name, rows.weight.contiguous(), formats[rows.name], first)
                rows.weight.copy_(dequantize(made))


# --- what is tried, and with what ---------------------------------------------------------------------------------


def _formats(name: str) -> list[WeightFormat]:
    part = "table" if name == EMBEDDING else "decoder" if name.startswith("llm.") else "vision"
    return [WeightFormat.parse(text) for text in CANDIDATES[part]]


def _table_shape(source: Source) -> tuple[int, int]:
    rows, width = source.checkpoint.tensors[EMBEDDING].shape
    return rows, width


def _streamed(source: Source, limit: Limit) -> StreamedModel:
    """The float model, a block at a time; after each, the promise is checked."""
    return StreamedModel(source.checkpoint, source.checkpoint.config, after_block=lambda name: limit.check())


def _affordable(
    source: Source, limit: Limit, data: CalibrationSet, groups: Sequence[Group], method: str, exact: bool
) -> list[Sample]:
    """As many of the samples as the memory limit, or half of what is free, allows the trajectories of. Raises
    MemoryLimitError if it allows none.
    """
    most = MOST_TOKENS if exact else STREAMED_TOKENS
    allowed = resident_bytes() + available_bytes() // 2 if limit.max_bytes is None else limit.max_bytes
    while True:
        samples = _chosen(data.samples, most)
        needed = resident_bytes() + _footprint(source, samples, groups, method, exact)
        if needed <= allowed or samples == _chosen(data.samples, most // 2):
            break
        most //= 2
    slices, tokens = sum(len(sample.slices) for sample in samples), sum(len(sample.ids) for sample in samples)
    limit.require(needed, f"measure the sensitivity on {slices} slices and {tokens} tokens")
    return samples


def _footprint(source: Source, samples: Sequence[Sample], groups: Sequence[Group], method: str, exact: bool) -> int:
    """Bytes that `measure` allocates: what a calibration does, copies of a block's weights, and the trajectories."""
    config, spec = source.checkpoint.config, source.spec
    width = spec.decoder.hidden_size
    slices = [SliceFeeds(pixels, sample, spec.picture, width) for sample in samples for pixels in sample.slices]
    prompts = decoder_feeds(samples, spec)
    model = StreamedModel(source.checkpoint, config)
    coarsest = {n: g.formats[-1] for g in groups for n in g.names if n != EMBEDDING} if method == "gptq" else {}
    held = footprint(model, slices, prompts, [["logits"]] * len(prompts), coarsest, source.linears)
    block = max(model.decoder_footprint(prompts).block, model.vision_footprint(slices).block if slices else 0)
    of_vision, of_all = trajectories(groups, exact)
    patches = sum(int(feeds["patches"].shape[1]) for feeds in slices)
    tokens = sum(len(sample.ids) for sample in samples)
    return held + 2 * block + 4 * max(of_vision * patches * config.vision.hidden_size, of_all * tokens * width)


def _chosen(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Samples with at most `most` tokens together, spread over all of them; the shortest one if even that has more."""
    total = sum(len(sample.ids) for sample in samples)
    for stride in range(max(1, ceil(total / most)), len(samples) + 1):
        for offset in range(stride):
            chosen = list(samples[offset::stride])
            if sum(len(sample.ids) for sample in chosen) <= most and any(sample.slices for sample in chosen):
                return chosen
    return [min(samples, key=lambda sample: (not sample.slices, len(sample.ids)))]


def _between(steps: Sequence[Step], kept: int, broken: int, last: Tried, value: float, max_loss: float) -> int:
    """How many steps to try next, more than `kept` and fewer than `broken`: as if the loss grew with the divergence."""
    sums = [0.0, *itertools.accumulate(step.kl for step in steps)]
    low, high = sums[kept], sums[broken]
    wanted = 0.9 * sums[last.steps] * max_loss / value if value > max_loss else 0.0
    if not low < wanted < high:
        wanted = sqrt(low * high) if low else high / 4
    return min(max(bisect.bisect_right(sums, wanted) - 1, kept + 1), broken - 1)


def _order(pattern: str) -> tuple[int, list[tuple[int, str]]]:
    """Vision, resampler, table, layers, head; layers by their number."""
    first = ("vpm.", "resampler.", EMBEDDING, "llm.model.layers.", HEAD)
    place = next(i for i, start in enumerate(first) if pattern.startswith(start))
    return place, [(int(part), "") if part.isdigit() else (-1, part) for part in pattern.split(".")]


def points(loss: Loss, by_answers: bool) -> str:
    """A loss in words."""
    if by_answers:
        return f"{loss.lost} of {loss.answers} answers ({loss.lost_percent:.2f} of 100)"
    return f"{loss.changed} of {loss.tokens} tokens ({loss.changed_percent:.2f} of 100)"
