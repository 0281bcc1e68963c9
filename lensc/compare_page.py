"""The page of `lensc compare --html`: one file that loads nothing, runs no script and can be read without its charts.

Colours follow the reader's preference for light or dark; charts are SVG with a text that says the same, and all that they show
stands in the table, too. Whatever comes from a bundle or a picture's name is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import console
from .bench_tables import cell, threads_text
from .compare_run import Asked, Column, Comparison
from .compare_text import beside, notes, parity_of, share, wilson

WIDTH, GAP, BAR, LINE = 360, 12, 14, 16
"""Of a chart, between its rows, of a bar and of a line of text; where a chart is 360 pixels wide they are pixels."""
LABEL = 46
"""Characters of a name that have room in a line."""
RIGHT = 64
"""What is kept free for the value behind a bar."""
DIFFERENT = 100
"""The most answers that are shown."""
ANSWER = 400
"""Characters of an answer that are shown."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #586274; --line: #d5dae2; --ground: #ffffff; --card: #f5f7fa;
  --bar: #2f6fb3; --base: #1b7f5c; --whisker: #1c2330; --bad: #a8321e; --best: #e3f1ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a3adbd; --line: #3a4352; --ground: #12161d;
  --card: #1b212b; --bar: #6aa5e3; --base: #4dbd92; --whisker: #e6e9ef; --bad: #ff9580; --best: #1d3a30; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, li { max-width: 60rem; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; padding: .6rem .75rem; color: var(--soft); }
th, td { padding: .45rem .75rem; border-top: 1px solid var(--line); text-align: left; vertical-align: top; }
th[scope=row] { font-weight: 600; min-width: 14.5rem; overflow-wrap: anywhere; white-space: pre-line; }
@media (max-width: 40rem) { th[scope=row] { min-width: 9.5rem; } }
caption span { display: inline-block; max-width: calc(100vw - 4rem); }
td.parity { white-space: pre-line; min-width: 17rem; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
td.best { background: var(--best); font-weight: 600; }
td.answer { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 9rem; font-family: ui-monospace, monospace;
  font-size: .85rem; }
td.wrong { color: var(--bad); }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; padding: .75rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figcaption { font-weight: 600; margin-bottom: .25rem; }
figcaption span { font-weight: 400; color: var(--soft); }
svg { display: block; width: 100%; max-width: 28rem; height: auto; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
.bar { fill: var(--bar); } .bar.base { fill: var(--base); } .none { fill: var(--soft); font-style: italic; }
.axis { stroke: var(--line); } .whisker { stroke: var(--whisker); stroke-width: 1.5; }
"""


@dataclass(frozen=True)
class Bar:
    """A value with the interval that it lies in; None where there is none, with the reason as its text."""

    name: str
    value: float | None
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Chart:
    """What is compared; `better` is `higher` or `lower`."""

    title: str
    unit: str
    better: str
    bars: tuple[Bar, ...]
    most: float | None = None
    """The end of the scale, if it has one."""


def page(made: Comparison) -> str:
    """The comparison as HTML."""
    model = made.bundles[0].model
    schemes = ", ".join(dict.fromkeys(bundle.scheme for bundle in made.bundles))
    title = f"{model}: {len(made.columns)} placements compared"
    drawn = [chart for chart in charts(made) if any(bar.value is not None for bar in chart.bars)]
    what = f"{schemes} on {made.machine.cpu}, {threads_text(made.threads)}; {made.created}"
    bars = "Bars are medians; lines reach from the worst run to the best, or over the 95 % interval of a share."
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(what)}<br><code>{_text(made.command)}</code></p>',
        "<h2>Side by side</h2>",
        _table(made),
        "<h2>Charts</h2>",
        f'<p class="soft">{bars} Green: {_text(made.baseline)}, which answers are held against.</p>',
        f'<div class="charts">{"".join(_figure(chart, made.baseline) for chart in drawn)}</div>',
        "<h2>Answers that are not the same</h2>",
        _answers(made),
        "<h2>How it was measured</h2>",
        f"<ul>{''.join(f'<li>{_text(note)}</li>' for note in notes(made))}</ul>",
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{_text(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, "</body>", "</html>"]
    return "\n".join(lines) + "\n"


# --- the table ----------------------------------------------------------------------------------------------------

_HEADS: dict[str, Callable[[Column, Comparison], str]] = {
    "image, ms": lambda column, _: cell(column.row, "image_ms"),
    "first token, ms": lambda column, _: cell(column.row, "ttft_ms"),
    "prefill, tokens/s": lambda column, _: cell(column.row, "prefill_tokens_s"),
    "decode, tokens/s": lambda column, _: cell(column.row, "decode_tokens_s"),
    "memory": lambda column, _: _memory(column),
    "first token, times better": lambda column, made: beside(made, column, "ttft_ms"),
    "decode, times better": lambda column, made: beside(made, column, "decode_tokens_s"),
    "files": lambda column, _: console.size(column.size_bytes) if column.size_bytes else "-",
    "right": lambda column, _: share(column.right, column.judged),
    "same answer": lambda column, made: (
        "baseline" if column.name == made.baseline else share(column.same, column.compared)
    ),
}
_CHART_OF = {
    "image, ms": "Image",
    "first token, ms": "First token",
    "prefill, tokens/s": "Prefill",
    "decode, tokens/s": "Decode",
    "memory": "Peak memory",
    "files": "Files",
    "right": "Right answers",
}


def _table(made: Comparison) -> str:
    best = {chart.title: _best(chart) for chart in charts(made)}
    heads = "".join(f'<th scope="col">{_text(name)}</th>' for name in ("placement", *_HEADS, "parity"))
    rows = []
    for column in made.columns:
        cells = [f'<th scope="row">{_text(_lined(column.name))}</th>']
        for name, shown in _HEADS.items():
            is_best = column.name in best.get(_CHART_OF.get(name, ""), ())
            mark = ' <span title="the best of its column">★</span>' if is_best else ""
            cells.append(f'<td class="number{" best" * is_best}">{_text(shown(column, made))}{mark}</td>')
        cells.append(f'<td class="parity">{_text(_lined(parity_of(column)))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"{made.pictures}; ★ and shading: the best of a column"
    return (
        f'<div class="scroll" tabindex="0"><table><caption><span>{_text(caption)}</span></caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _lined(text: str) -> str:
    """What is said of each graph, on a line of its own."""
    return text.replace("; ", "\n").replace(",decoder=", ",\ndecoder=")


def _memory(column: Column) -> str:
    figure = column.row.figures.get("peak_memory_bytes")
    return cell(column.row, "peak_memory_bytes") if figure is None else console.size(round(figure.median))


def _best(chart: Chart) -> tuple[str, ...]:
    """The names of the best bars; none where all are alike, or there is only one."""
    values = {bar.name: bar.value for bar in chart.bars if bar.value is not None}
    if len(values) < 2 or len(set(values.values())) == 1:
        return ()
    best = (max if chart.better == "higher" else min)(values.values())
    return tuple(name for name, value in values.items() if value == best)


# --- charts -------------------------------------------------------------------------------------------------------


def charts(made: Comparison) -> list[Chart]:
    """What is drawn, where there is a value."""
    timed = [
        ("First token", "ms", "lower", "ttft_ms", 1.0),
        ("Image", "ms", "lower", "image_ms", 1.0),
        ("Prefill", "tokens/s", "higher", "prefill_tokens_s", 1.0),
        ("Decode", "tokens/s", "higher", "decode_tokens_s", 1.0),
        ("Peak memory", "MB", "lower", "peak_memory_bytes", 1e6),
    ]
    found = [
        Chart(title, unit, better, tuple(_bar(column, name, scale) for column in made.columns))
        for title, unit, better, name, scale in timed
    ]
    sizes = [_plain(c.name, c.size_bytes / 1e6 if c.size_bytes else None) for c in made.columns]
    found.append(Chart("Files", "MB", "lower", tuple(sizes)))
    right = [_share(c.name, c.right, c.judged) for c in made.columns]
    same = [_share(c.name, c.same, c.compared) for c in made.columns if c.name != made.baseline]
    found.append(Chart("Right answers", "%", "higher", tuple(right), 100))
    found.append(Chart("Same answer as the baseline", "%", "higher", tuple(same), 100))
    return found


def _bar(column: Column, name: str, scale: float) -> Bar:
    figure = column.row.figures.get(name)
    if figure is None:
        return Bar(column.name, None, 0, 0, cell(column.row, name))
    values = [value / scale for value in figure.values]
    return Bar(column.name, figure.median / scale, min(values), max(values), _number(figure.median / scale))


def _plain(name: str, value: float | None) -> Bar:
    return Bar(name, value, value or 0, value or 0, "none" if value is None else _number(value))


def _share(name: str, hits: int, total: int) -> Bar:
    if not total:
        return Bar(name, None, 0, 0, "none")
    low, high = wilson(hits, total)
    return Bar(name, 100 * hits / total, low, high, f"{100 * hits / total:.0f} %")


def _figure(chart: Chart, baseline: str) -> str:
    caption = f"{_text(chart.title)} <span>{_text(chart.unit)}, {chart.better} is better</span>"
    return f"<figure><figcaption>{caption}</figcaption>{_svg(chart, baseline)}</figure>"


def _svg(chart: Chart, baseline: str) -> str:
    room = WIDTH - RIGHT
    most = chart.most or max((max(bar.high, bar.value or 0) for bar in chart.bars), default=1) or 1
    said = "; ".join(f"{bar.name}: {bar.text}" for bar in chart.bars)
    parts: list[str] = []
    top = 0
    for bar in chart.bars:
        for line in _lines(bar.name):
            top += LINE
            parts.append(f'<text x="4" y="{top - 3}">{_text(line)}</text>')
        middle = top + 3 + BAR // 2
        top = middle + BAR // 2 + GAP
        if bar.value is None:
            parts.append(f'<text class="none" x="4" y="{middle + 5}">{_text(bar.text)}</text>')
            continue
        wide, low, high = (max(0.0, value) / most * room for value in (bar.value, bar.low, bar.high))
        kind = "bar base" if bar.name == baseline else "bar"
        parts.append(
            f'<rect class="{kind}" x="0" y="{middle - BAR // 2}" width="{max(1.0, wide):.1f}" height="{BAR}"/>'
        )
        if high - low > 1:
            ends = "".join(f"M{x:.1f} {middle - 4}v8" for x in (low, high))
            parts.append(f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}{ends}"/>')
        parts.append(f'<text x="{max(wide, high) + 6:.1f}" y="{middle + 5}">{_text(bar.text)}</text>')
    parts.append(f'<line class="axis" x1="0.5" y1="0" x2="0.5" y2="{top}"/>')
    label = _text(f"{chart.title}, {chart.unit}. {said}")
    return f'<svg viewBox="0 0 {WIDTH} {top}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _lines(name: str) -> list[str]:
    """A name in lines that have room above a bar, one for each graph where it is long; all of it is in the table."""
    lines = [name] if len(name) <= LABEL else name.split(",")
    return [line if len(line) <= LABEL else line[: LABEL - 1] + "…" for line in lines]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


# --- answers ------------------------------------------------------------------------------------------------------


def _answers(made: Comparison) -> str:
    """Those questions that not all placements answer alike."""
    different = [asked for asked in made.asked if len({text for text in asked.answers if text is not None}) > 1]
    if not different:
        return f"<p>All placements give the same answer to all {len(made.asked)} questions.</p>"
    names = [column.name for column in made.columns]
    heads = "".join(f'<th scope="col">{_text(name)}</th>' for name in ("picture", "question", "expected", *names))
    rows = "".join(f"<tr>{''.join(_answer_cells(asked))}</tr>" for asked in different[:DIFFERENT])
    hidden = len(different) - DIFFERENT
    caption = f"{len(different)} of {len(made.asked)} questions" + (
        f", {hidden} of them not shown" if hidden > 0 else ""
    )
    return (
        f'<div class="scroll" tabindex="0"><table><caption><span>{caption}</span></caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _answer_cells(asked: Asked) -> Iterator[str]:
    yield f'<th scope="row">{_text(Path(asked.picture).name)}</th><td>{_text(asked.question)}</td>'
    yield f'<td class="answer">{_text(_cut(asked.expected))}</td>'
    for text in asked.answers:
        wrong = " wrong" if asked.expected and text is not None and text != asked.expected else ""
        yield f'<td class="answer{wrong}">{_text("none" if text is None else _cut(text))}</td>'


def _cut(text: str) -> str:
    return text if len(text) <= ANSWER else text[:ANSWER] + "…"


def _text(text: str) -> str:
    """Escaped, without what cannot be shown; lines stay lines."""
    return html.escape("\n".join(console.printable(line) for line in text.split("\n")))
