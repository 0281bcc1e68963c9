"""The chart of `bench/results/<topic>.json`: how many times better than the rival, for every row that has one; of the ladder,
what each step reached.

python -m lensc.bench.chart [full_size|native_cpu|ladder] [-o docs/full_size.svg]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensc.backends.errors import InputError, LensError, UnavailableError
from lensc.backends.files import replacing

from . import record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AHEAD, BEHIND = "#1b7f5c", "#b5502b"
ESTIMATED = "estimated"
"""In the name of a step that nobody has measured."""


def _figure(size: tuple[float, float]) -> Figure:
    """Raises UnavailableError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise UnavailableError("the chart needs matplotlib; pip install 'lensc[demo]'") from error
    matplotlib.use("svg")
    # names of elements are hashes of this: the same results give the same file
    matplotlib.rcParams.update({"svg.hashsalt": "lensc", "svg.fonttype": "none", "font.size": 9})
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the chart as SVG, a panel for each processor. Raises UnavailableError without matplotlib, InputError if no row
    has a rival.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    for found in records:
        rows = [row for row in found["rows"] if "ratio" in row]
        if rows:
            panels.setdefault(found["machine"]["cpu"], []).extend(rows)
    if not panels:
        raise InputError("no row of the record has a rival; run the benchmark with --results first")
    counts = [len(rows) for rows in panels.values()]
    together = [row for rows in panels.values() for row in rows]
    figure = _figure((8, 0.9 * len(panels) + 0.34 * sum(counts)))
    grid = figure.subplots(len(panels), squeeze=False, sharex=True, height_ratios=counts)
    for axes, (processor, rows) in zip(grid[:, 0], panels.items(), strict=True):
        _bars(axes, rows)
        axes.set_yticks(range(len(rows)), [_label(row, together) for row in rows])
        if len(panels) > 1:
            axes.set_title(processor, fontsize=9)
    widest = max(max(row["ratio"], row.get("ratio_spread", [0, 0])[1]) for row in together)
    grid[-1, 0].set_xlim(0, widest + 1.1)
    grid[-1, 0].set_xlabel("times better than the rival in the same run (bar: median, line: smallest and largest)")
    _save(figure, path)


def _bars(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """A bar for each row, how many times better than the rival it is."""
    for place, row in enumerate(rows):
        ratio = row["ratio"]
        low, high = row.get("ratio_spread", (ratio, ratio))
        colour = AHEAD if ratio >= 1 else BEHIND
        axes.barh(place, ratio, color=colour, height=0.62)
        axes.plot([low, high], [place, place], color="black", linewidth=1.2, marker="|", markersize=5)
        text = f"{ratio:.2f}×  ({row['lensc']:.3g} against {row['rival_value']:.3g} {row['unit']})"
        axes.text(max(ratio, high) + 0.03, place, text, va="center")
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_ladder(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the chart of a ladder as SVG: a panel for each figure, a bar for each step. Raises UnavailableError."""
    rows = {tuple(row["what"].split(": ")): row for found in records for row in found["rows"]}
    steps, figures = (list(dict.fromkeys(key[i] for key in rows)) for i in range(2))
    figure = _figure((11, 0.9 + 0.36 * len(steps)))
    for axes, name in zip(figure.subplots(1, len(figures), sharey=True), figures, strict=True):
        known = [(place, rows[step, name]) for place, step in enumerate(steps) if (step, name) in rows]
        most = max(row["lensc"] for _, row in known)
        for place, row in known:
            value, hatch = row["lensc"], "///" if ESTIMATED in steps[place] else None
            axes.barh(place, value, color="white" if hatch else AHEAD, edgecolor=AHEAD, hatch=hatch, height=0.62)
            low, high = row.get("spread", (value, value))
            axes.plot([low, high], [place, place], color="black", linewidth=1.2, marker="|", markersize=5)
            axes.text(max(value, high) + 0.03 * most, place, f"{value:.3g}", va="center")
        axes.set_title(f"{name}, {known[0][1]['unit']}", fontsize=9)
        axes.set_xlim(0, 1.3 * most)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yticks(range(len(steps)), steps)
    axes.invert_yaxis()
    _save(figure, path)


def _label(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """What was measured, and beside whom where that was measured beside several."""
    several = sum(other["what"] == row["what"] for other in rows) > 1
    return f"{row['what']} / {row['rival'].split(',')[0]}" if several else str(row["what"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the chart."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.chart", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("topic", nargs="?", choices=("full_size", "native_cpu", "ladder"), default="full_size")
    parser.add_argument("-o", "--output", type=Path, help="default: docs/TOPIC.svg")
    options = parser.parse_args(arguments)
    output = options.output or Path(f"docs/{options.topic}.svg")
    try:
        (draw_ladder if options.topic == "ladder" else draw)(
            record.read(record.RESULTS / f"{options.topic}.json"), output
        )
    except OSError as error:
        print(f"error: {output}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
