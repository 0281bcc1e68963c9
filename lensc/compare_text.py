"""What `lensc compare` prints, and the words that its page shares with that."""

from __future__ import annotations

import math

from . import console
from .bench_record import NAMES
from .bench_tables import UNITS, cell, ratio_text, table, threads_text
from .compare_run import WARMUP, Column, Comparison


def wilson(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, in percent (Wilson score interval)."""
    z = 1.96
    centre = (hits + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(hits * (total - hits) / total + z * z / 4)
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


def share(hits: int, total: int) -> str:
    """`58 of 60, 97 % (89 to 99)`: with the 95 % interval; `-` of nothing."""
    if not total:
        return "-"
    low, high = wilson(hits, total)
    return f"{hits} of {total}, {100 * hits / total:.0f} % ({low:.0f} to {high:.0f})"


def beside(made: Comparison, column: Column, name: str) -> str:
    """How many times better than the baseline a figure is: the median over repetitions, with the smallest and the largest."""
    base = next(other for other in made.columns if other.name == made.baseline).row.figures.get(name)
    figure = column.row.figures.get(name)
    if column.name == made.baseline:
        return "baseline"
    return cell(column.row, name) if base is None or figure is None else ratio_text(name, base, figure)


def parity_of(column: Column) -> str:
    """How near each graph is to the reference, as the manifest says it, and what failed."""
    parts = []
    for graph in sorted({p.graph for p in column.parity}, reverse=True):  # vision first
        records = [p for p in column.parity if p.graph == graph]
        worst = min(records, key=lambda p: p.sqnr_db)
        agreed = "" if worst.top1_agreement is None else f", top-1 {100 * worst.top1_agreement:.1f} %"
        judged = [p for p in records if not p.tolerance.startswith("none")]
        verdict = "" if all(p.passed for p in judged) else " FAILED"
        parts.append(f"{graph} {worst.sqnr_db:.0f} dB{agreed}{verdict}")
    return "; ".join(parts) or "not judged"


def notes(made: Comparison) -> list[str]:
    """How it was measured."""
    first = made.columns[0].row
    turns = "in turn" if made.in_turn else "one after the other, as they have no room in memory together"
    request = (
        f"{first.image}, {first.slices} slices, {first.prompt_tokens} tokens of prompt, {first.new_tokens} of answer"
    )
    runs = f"{made.repetitions} runs after {WARMUP}, {turns}; median ± the run that is furthest from it"
    right = f"right: exactly the expected text, with the 95 % interval; same: the tokens of {made.baseline}"
    found = [
        f"speed: {request}; {runs}; no guessed tokens, empty caches; times better than {made.baseline}, of runs that followed each other",
        f"answers: {made.pictures}, greedy; {right}",
        "parity: the lowest of the bundle's records, against the model in float32 or the graph's own reference",
    ]
    emulated = dict.fromkeys(
        f"{p.graph} on {p.target} is emulated: its answers are what the device is expected to say, its times are none"
        for column in made.columns
        for p in column.row.plan
        if p.state == "emulated"
    )
    failed = [f"{c.name}: no figures: {c.row.failed}" for c in made.columns if c.row.failed]
    machine = made.machine
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    return [
        *found,
        *emulated,
        *failed,
        f"{machine.cpu}, {machine.cores} cores, {threads_text(made.threads)}; {versions}",
    ]


def table_of(made: Comparison) -> str:
    """The comparison as a table in Markdown."""
    head = ["", "files", *(f"{NAMES[name]}, {unit}" for name, unit in UNITS.items()), "memory"]
    head += ["first token, times better", "decode, times better", "right", "same", "parity"]
    rows = [head]
    for column in made.columns:
        memory = column.row.figures.get("peak_memory_bytes")
        rows.append(
            [
                column.name,
                console.size(column.size_bytes) if column.size_bytes else "-",
                *(cell(column.row, name) for name in UNITS),
                console.size(round(memory.median)) if memory else cell(column.row, "peak_memory_bytes"),
                beside(made, column, "ttft_ms"),
                beside(made, column, "decode_tokens_s"),
                share(column.right, column.judged),
                share(column.same, column.compared) if column.name != made.baseline else "baseline",
                parity_of(column),
            ]
        )
    return "\n\n".join([table(rows, left=1), "\n".join(f"- {console.printable(note)}" for note in notes(made))])
