"""Checkpoint → the file of a recipe that was searched for it: `lensc quantize --search`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lensc.backends import registry
from lensc.backends.base import Target
from lensc.backends.errors import UsageError
from lensc.backends.files import write_text

from . import demo
from .build import opened
from .calibration import calibration_set, held_out_set
from .compile_stages import check_supported
from .memory import Limit
from .provenance import lensc_version, timestamp
from .quantize.recipe import METHODS, PRESETS, Recipe
from .quantize.scheme import Scheme
from .quantize.search import ACTIVATIONS, STAGES, Found, points, search
from .quantize.weights import WeightFormat
from .ranges import Work, works
from .source import Source
from .stages import Report, Staging

MOST_LOSS = 50.0
"""Points of 100. What loses more is no model."""


def search_recipe(
    checkpoint: str | Path,
    out: str | Path,
    *,
    max_loss: float,
    targets: Sequence[Target | tuple[str, Target]],
    method: str = "gptq",
    adapter: str | Path | None = None,
    calibration: str | Path | None = None,
    max_memory: int | None = None,
    report: Report | None = None,
    command: str = "",
) -> Found:
    """Search the smallest recipe for `checkpoint` (a folder, or `demo`) that loses at most `max_loss`, write it to `out`.

    `method` chooses values below 8 bits: gptq or rtn; `calibration` is a folder of pictures for it. The loss is described
    in `quantize.search`. Raises UsageError for arguments that mean nothing, an `out` that exists, or a loss that no recipe
    keeps; UnsupportedError if a target cannot run what a search makes; what `Source` raises of checkpoint and pictures;
    MemoryLimitError or StorageError if memory or disk do not suffice. `out` is complete or not there; what a search that ends
    before has measured lies in `<out>.partial/`, and the next one goes on with it.
    """
    path, work = Path(out), works(targets)
    check(path, max_loss, method)
    pictures = None if calibration is None else Path(calibration)
    source = Source(opened(checkpoint, adapter), PRESETS["f32"], max_memory)
    mixed = Recipe(path.stem, (("llm.*", "w4-g32-s4"), ("*", "w8")), dict(ACTIVATIONS))
    check_supported(source.specs, source.required_schemes(mixed), work)
    is_demo = source.checkpoint.folder.resolve() == demo.CHECKPOINT.resolve()
    data = calibration_set(source.spec, source.tokenizer, pictures, is_demo=is_demo)
    held_out = held_out_set(source.spec, source.tokenizer) if is_demo and pictures is None else None
    usable = partial(_usable, source, work)
    limit = Limit(max_memory)
    with Staging(path, STAGES, report, limit) as staging:
        found = search(source, staging, data, held_out, max_loss, method, path.stem, usable)
        write_text(path, text(found, max_loss, source.checkpoint.sha256, command, limit.peak))
        staging.discard()
    return found


def _usable(source: Source, work: Sequence[Work], name: str, format: WeightFormat) -> bool:
    """Whether all targets take the linear `name` in `format`."""
    graph = "decoder" if name.startswith("llm.") else "vision"
    bits, size, scale_bits = format.bits, format.group_size, format.scale_bits
    scheme = str(Scheme(bits, size, format.symmetric, ACTIVATIONS[graph], scale_bits=scale_bits))
    spec, inputs = source.specs[graph], source.linears[name][1]
    targets = [job.target for job in work if graph in job.graphs]
    return all(registry.get(t.backend).supports(spec, scheme, t, (inputs,)) is None for t in targets)


def check(path: Path, max_loss: float, method: str) -> None:
    """Raise UsageError for what can be seen before any work."""
    if not (math.isfinite(max_loss) and 0 <= max_loss <= MOST_LOSS):
        raise UsageError(f"--max-loss {max_loss:g}: expected 0 to {MOST_LOSS:g} points of 100, e.g. 1")
    if method not in METHODS:
        raise UsageError(f"--method {method!r}: expected one of {', '.join(METHODS)}")
    if path.suffix != ".toml":
        raise UsageError(f"{path}: a recipe is a .toml file, e.g. recipe.toml")
    if os.path.lexists(path):
        raise UsageError(f"{path}: exists; choose another name or remove it")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} is not there")


def text(found: Found, max_loss: float, checkpoint_sha256: str, command: str, peak_bytes: int) -> str:
    """The file: the recipe, what was measured above it, and beside each group what its formats cost."""
    best = found.best
    unit = "answers that the float model gives right" if found.by_answers else "tokens of the answers"
    how = "at the logits" if found.exact else "at the block's output, in proportion to one trajectory of its block"
    header = [
        f"Searched by lensc {lensc_version()}, {timestamp()}: {command}",
        f"Checkpoint sha256 {checkpoint_sha256}",
        f"Calibrated with {found.calibrated_on}",
        f"Loss measured on {found.measured_on}, answers fed, inputs of products rounded as engines do",
        f"Allowed: {max_loss:g} of 100 {unit}. This recipe: {points(best.loss, found.by_answers)}",
        f"Its KL is {1000 * best.loss.mean_kl:.3g} millinats a token, {best.loss.changed_percent:.2f} % of tokens change",
        f"Size of graphs and table: {found.float_bytes / 1e6:.1f} MB in float32, {best.nbytes / 1e6:.1f} MB by this recipe",
        f"Peak memory of the search {peak_bytes / 2**30:.2f} GiB",
        "Recipes measured as a whole:",
        *(
            f"  {one.nbytes / 1e6:8.1f} MB, KL {1000 * one.loss.mean_kl:.3g}: loses {points(one.loss, found.by_answers)}"
            for one in found.tried
        ),
        f"Beside each group: what each format costs with all else in float, in millinats a token, measured {how},",
        f"on {found.samples} samples. Edit what follows as you like; lensc build --scheme FILE takes it.",
    ]
    notes: dict[str, str] = {}
    for cost in found.costs:
        entry = f"{cost.format} {1000 * cost.kl:.3g}"
        notes[cost.pattern] = f"{notes[cost.pattern]}, {entry}" if cost.pattern in notes else entry
    left = [(group.pattern, "f32") for group in found.groups if group.pattern not in dict(found.recipe.weights)]
    recipe = dataclasses.replace(found.recipe, weights=(*found.recipe.weights, *left))
    return recipe.to_toml(header, notes)


def summary(found: Found, out: str) -> str:
    """What was found, in a few lines."""
    best, counts = found.best, Counter(text for _, text in found.recipe.weights)
    formats = ", ".join(f"{count} {format}" for format, count in counts.most_common())
    left = len(found.groups) - len(found.recipe.weights)
    return "\n".join(
        [
            f"recipe {out}: {found.float_bytes / 1e6:.1f} MB in float32, {best.nbytes / 1e6:.1f} MB by this recipe",
            f"  groups   {formats}" + (f", {left} left in f32" if left else ""),
            f"  loses    {points(best.loss, found.by_answers)}, measured on {found.measured_on}",
            f"  KL       {1000 * best.loss.mean_kl:.3g} millinats a token, {best.loss.changed_percent:.2f} % of tokens change",
        ]
    )


def as_json(found: Found) -> dict[str, Any]:
    """What was found, for programs. Sizes in bytes, KL in nats per token."""
    return {
        "float_bytes": found.float_bytes,
        "recipe_bytes": found.best.nbytes,
        "loss_by": "answers" if found.by_answers else "tokens",
        "loss": dataclasses.asdict(found.best.loss),
        "formats": dict(found.recipe.weights),
        "costs": [{"pattern": c.pattern, "format": str(c.format), "kl": c.kl} for c in found.costs],
        "exact_sensitivity": found.exact,
        "measured": [{"bytes": t.nbytes, "kept": t.kept, **dataclasses.asdict(t.loss)} for t in found.tried],
        "measured_on": found.measured_on,
    }
