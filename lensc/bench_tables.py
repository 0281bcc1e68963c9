"""What `lensc bench` prints: a record as a table in Markdown, as CSV, as lines of JSON, and two records side by side."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lensc.profiles.profile import Figure as Known

from . import console
from .bench_record import HIGHER_IS_BETTER, NAMES, TOLERANCE, TUNED, Figure, Moved, Record, Row, moved, of_limit

UNITS = {"image_ms": "ms", "prefill_tokens_s": "tokens/s", "decode_tokens_s": "tokens/s", "ttft_ms": "ms"}
ROOFED = ("image_ms", "prefill_tokens_s", "decode_tokens_s")
"""The figures that have a limit."""


# --- one record ---------------------------------------------------------------------------------------------------


def markdown(record: Record) -> str:
    """All of it for people."""
    bundle = record.bundle
    parts = [f"{console.printable(bundle.model)}, {bundle.scheme}, bundle {bundle.manifest_sha256[:12]}", _main(record)]
    failed = dict.fromkeys((row.where, row.failed) for row in record.rows if row.failed)
    parts += [f"- no figures for {console.printable(where)}: {console.printable(why)}" for where, why in failed]
    if beside := _beside(record):
        parts.append(beside)
    if foreseen := _predictions(record):
        parts.append(foreseen)
    parts.append("\n".join(f"- {console.printable(note)}" for note in notes(record)))
    return "\n\n".join(parts)


def _main(record: Record) -> str:
    head = ["on", "weights", "picture", "slices", "prompt", "new"]
    head += [f"{NAMES[name]}, {unit}" for name, unit in UNITS.items()] + ["memory", "of the limit"]
    rows = [head]
    for row in record.rows:
        cells = [row.where, row.scheme or "-", image_name(row.image), str(row.slices)]
        cells += [str(row.prompt_tokens), str(row.new_tokens), *(cell(row, name) for name in UNITS)]
        memory = row.figures.get("peak_memory_bytes")
        rows.append([*cells, console.size(round(memory.median)) if memory else _absent(row), _shares(row)])
    return table(rows, left=3)


def cell(row: Row, name: str) -> str:
    """A figure of a row, or why there is none."""
    figure = row.figures.get(name)
    return str(figure) if figure is not None else _absent(row, name)


def _absent(row: Row, name: str = "") -> str:
    if row.failed:
        return "not here" if row.skipped else "failed"
    if (name == "image_ms" and not row.slices) or (name == "decode_tokens_s" and row.new_tokens == 1):
        return "-"
    return "emulated" if row.emulated else "-"


def _shares(row: Row) -> str:
    shares = [(NAMES[name], of_limit(name, row.figures[name])) for name in ROOFED if name in row.figures]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares if share is not None) or "-"


def image_name(name: str) -> str:
    """The name of a picture without its folders."""
    return console.printable(name.replace("\\", "/").rsplit("/", 1)[-1])


def ratios(name: str, first: Figure, other: Figure) -> list[float]:
    """How many times better `other` was than `first`, for each repetition; above 1 is better, for times too."""
    pairs = zip(first.values, other.values, strict=False)
    return [b / a if name in HIGHER_IS_BETTER else a / b for a, b in pairs]


def ratio_text(name: str, first: Figure, other: Figure) -> str:
    """The median ratio, and the smallest and largest where there are several."""
    found = ratios(name, first, other)
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return f"{median(found):.2f}{spread}"


def _beside(record: Record) -> str:
    """Every placement beside the first, where there are several."""
    rows = [["times better than the first", *(row_name for row_name in ("picture", "prompt", "new")), *NAMES.values()]]
    first: dict[tuple[object, ...], Row] = {}
    for row in record.rows:
        if row.failed:
            continue
        base = first.setdefault(row.key[1:], row)
        if base is row:
            continue
        found = [
            ratio_text(name, base.figures[name], row.figures[name])
            if name in base.figures and name in row.figures
            else _absent(row, name)
            for name in NAMES
        ]
        cells = [f"{row.where} : {base.where}", image_name(row.image), str(row.prompt_tokens), str(row.new_tokens)]
        rows.append([*cells, *found])
    return table(rows, left=2) if len(rows) > 1 else ""


def _predictions(record: Record) -> str:
    """What the profile predicts, and by how much it is off."""
    rows = [["predicted by lensc plan", "picture", "prompt", "figure", "measured", "predicted", "off by"]]
    for row in record.rows:
        for name, figure in row.figures.items():
            if figure.predicted is not None:
                off = figure.predicted / figure.median - 1
                at = [row.where, image_name(row.image), str(row.prompt_tokens), f"{NAMES[name]}, {UNITS[name]}"]
                rows.append([*at, f"{figure.median:.4g}", f"{figure.predicted:.4g}", f"{100 * off:+.0f} %"])
    return table(rows, left=2) if len(rows) > 1 else ""


def notes(record: Record) -> Iterator[str]:
    """How it was measured, and what a reader should know."""
    settings, machine = record.settings, record.machine
    repeated = f"{settings.repetitions} run{'s' * (settings.repetitions > 1)} after {settings.warmup} that do not count"
    several = len({row.where for row in record.rows}) > 1
    turns = "; placements took turns" if several and record.in_turn else ""
    if several and not record.in_turn:
        turns = "; placements one after the other, as they have no room in memory together"
    yield f"{repeated}{turns}; median ± the run that is furthest from it"
    guesses = "no token is guessed ahead"
    if settings.prompt_lookup_num_tokens:
        guesses = f"up to {settings.prompt_lookup_num_tokens} tokens are guessed ahead"
    yield f"prompts are the picture and random tokens; {guesses}, stop ids end nothing, caches are emptied before each run"
    yield "golden probes passed where there are figures; first token: from the call on, the picture included"
    emulated = {(p.graph, p.target) for row in record.rows for p in row.plan if p.state == "emulated"}
    yield from (f"{graph} on {target} is emulated: its times are none of the device's" for graph, target in emulated)
    tuned = dict.fromkeys(
        f"{p.graph} on {p.target}, tuned: {p.reason.split(TUNED)[1]}"
        for row in record.rows
        for p in row.plan
        if TUNED in p.reason
    )
    yield from tuned
    untested = {(p.graph, p.target) for row in record.rows for p in row.plan if p.state == "untested"}
    yield from (f"{graph} on {target} is untested" for graph, target in untested)
    if record.limits:
        yield "limits, bytes over bandwidth or operations over peak: " + "; ".join(map(_known, record.limits.items()))
    told = (row for row in record.rows if not row.emulated)  # whose slices are encoded once
    yield from dict.fromkeys(
        f"{image_name(row.image)}: {note.removeprefix('picture 1: ')}" for row in told for note in row.notes
    )
    packages = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    yield f"{machine.cpu}, {machine.cores} cores, {threads_text(settings.threads)}, {machine.system}; {packages}"


def threads_text(threads: int | None) -> str:
    """How many threads were asked for, in words."""
    return "default threads" if threads is None else f"{threads} thread{'s' * (threads > 1)}"


def _known(named: tuple[str, Known]) -> str:
    name, figure = named
    unit = "GB/s" if name.endswith("gb_s") else "TOPS"
    return f"{name} {figure.value:.4g} {unit} ({figure.source}: {figure.reference})"


def flat(record: Record) -> list[dict[str, Any]]:
    """A row as one level of names, with the machine and the bundle: what CSV and lines of JSON hold."""
    return [_flat(record, row) for row in record.rows]


def _flat(record: Record, row: Row) -> dict[str, Any]:
    targets = {p.graph: p for p in row.plan}
    found: dict[str, Any] = {"model": record.bundle.model, "scheme": record.bundle.scheme}
    for graph in ("vision", "decoder"):
        placed = targets.get(graph)
        found |= {f"{graph}_target": placed and placed.target, f"{graph}_scheme": placed and placed.scheme}
    found |= {
        "picture": row.image,
        "slices": row.slices,
        "prompt_tokens": row.prompt_tokens,
        "new_tokens": row.new_tokens,
    }
    for name in NAMES:
        figure = row.figures.get(name)
        found[name] = figure and figure.median
        if name != "peak_memory_bytes":
            found[f"{name}_spread"] = figure and figure.spread
        if name in ROOFED:
            found[f"{name}_of_limit"] = figure and of_limit(name, figure)
        if name in UNITS:
            found[f"{name}_predicted"] = figure and figure.predicted
    settings = record.settings
    return found | {
        "load_ms": row.load_ms,
        "emulated": " ".join(row.emulated),
        "failed": row.failed,
        "repetitions": settings.repetitions,
        "threads": settings.threads,
        "cpu": record.machine.cpu,
        "lensc": record.versions.get("lensc"),
        "manifest_sha256": record.bundle.manifest_sha256,
        "created": record.created,
    }


def as_csv(record: Record) -> str:
    """The rows as CSV with a header; what is not known is empty."""
    rows = flat(record)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def as_jsonl(record: Record) -> str:
    """The rows as objects of JSON, one a line."""
    return "\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in flat(record))


FORMATS: dict[str, Callable[[Record], str]] = {"md": markdown, "csv": as_csv, "jsonl": as_jsonl}
"""Those of `-o`, beside json."""


# --- two records --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A figure in two records; `moved` says how, or that it is in only one of them."""

    row: Row
    name: str
    old: Figure | None
    new: Figure | None
    moved: Moved


def changes(old: Record, new: Record, tolerance: float = TOLERANCE) -> list[Change]:
    """Every figure of the old record, and what has become of it. One that is gone has become worse."""
    found = {row.key: row for row in new.rows}
    made = []
    for row in old.rows:
        now = found.get(row.key)
        for name, before in row.figures.items():
            after = None if now is None else now.figures.get(name)
            how: Moved = "worse" if after is None else moved(name, before.values, after.values, tolerance)
            made.append(Change(now or row, name, before, after, how))
    return made


def compared(made: Sequence[Change], different: Sequence[str], tolerance: float) -> str:
    """What moved, and what else is not the same."""
    rows = [["on", "picture", "prompt", "figure", "before", "now", "change", ""]]
    for change in made:
        row, name = change.row, change.name
        at = [row.where, image_name(row.image), str(row.prompt_tokens), NAMES[name]]
        if change.old is None or change.new is None:
            rows.append([*at, _value(name, change.old), "none", "", "worse: no figure anymore"])
            continue
        ratio = change.new.median / change.old.median - 1
        rows.append([*at, _value(name, change.old), _value(name, change.new), f"{100 * ratio:+.1f} %", change.moved])
    worse, better = (sum(change.moved == how for change in made) for how in ("worse", "better"))
    said = f"{len(made)} figures: {worse} worse, {better} better, {len(made) - worse - better} not beyond the noise"
    rule = f"moved: all runs on one side of all runs before, and medians more than {100 * tolerance:g} % apart"
    other = [f"- {console.printable(text)}" for text in different] or ["- machine, versions and bundle are the same"]
    return "\n\n".join([table(rows, left=2), f"{said} ({rule}; memory: {200 * tolerance:g} %)", "\n".join(other)])


def _value(name: str, figure: Figure | None) -> str:
    if figure is None:
        return "none"
    return console.size(round(figure.median)) if name == "peak_memory_bytes" else f"{figure} {UNITS[name]}"


def table(rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """A table in Markdown whose columns line up; those from `left` on are aligned to the right."""
    cells = [[console.printable(text).replace("|", "\\|") for text in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(cells[0]))]

    def line(row: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = ("-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])
