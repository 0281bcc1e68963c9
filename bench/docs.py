"""The generated parts of README and docs: tables from bench/results, the command line from the parser itself.

    python -m lensc.bench.docs [--check]

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`. `--check` writes nothing and ends with 1 if a part
is stale.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lensc.backends.errors import InputError, LensError
from lensc.backends.files import write_text
from lensc.export.quantize.scheme import ALLOWED_LOSS, USUAL_LOSS

from . import record

FILES = (
    "README.md",
    "docs/cli.md",
    "docs/full_size.md",
    "docs/ladder.md",
    "docs/native_cpu.md",
    "docs/planning.md",
    "docs/qnn.md",
    "docs/speculation.md",
)
REACH = {
    "bandwidth_gb_s": "GB/s",
    "int8_product_gop_s": "GOP/s in int8 in registers",
    "int16_product_gop_s": "in int16 in registers",
    "bfloat16_product_gop_s": "in bfloat16 in registers",
    "int8_gemm_gop_s": "GOP/s in int8",
    "bfloat16_gemm_gop_s": "in bfloat16",
    "float32_gemm_gop_s": "in float32",
}
"""What `lensc.bench.limits` and `lensc.bench.kernels` measure, as it is printed."""
FULL_SIZE, NATIVE, KERNELS = (
    "python -m lensc.bench.full_size",
    "python -m lensc.bench.cpu",
    "python -m lensc.bench.kernels",
)

_PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo_accuracy(root: Path) -> str:
    """The demo model's accuracy on held-out pictures."""
    found, rows = _rows(root, "demo_accuracy", "python -m lensc.bench.demo_accuracy")
    lines = ["| held-out pictures | measured | 95 % interval | goal |", "|---|---|---|---|"]
    for row in rows:
        low, high = row.get("spread", (None, None))
        interval = f"{low:.1f}–{high:.1f} %" if low is not None else ""
        sign = "≤" if row["unit"] == "% errors" else "≥"
        goal = f"{sign} {row['limit']:g} %" if "limit" in row else ""
        lines.append(f"| {row['what']} | {row['lensc']:.1f} % | {interval} | {goal} |")
    return "\n".join(lines) + f"\n\n{_reproduce(found)}"


def schemes(root: Path) -> str:
    """What each scheme costs on the demo model. Figures that no scheme of the record has take no column."""
    found, rows = _rows(root, "demo_accuracy", "python -m lensc.bench.schemes")
    table = _by_subject(rows)
    columns: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "line": ("lines exact", _percent),
        "page": ("page character errors", _percent),
        "page exact": ("pages exact", _percent),
        "question": ("questions exact", _percent),
        "divergence": ("KL, millinats", lambda row: f"{row['lensc']:.2f}"),
        "size": ("size", lambda row: f"{row['lensc']:.1f} MB"),
        "decode": ("decode", lambda row: f"{row['lensc']:.0f} tok/s"),
        "first token": ("first token", lambda row: f"{row['lensc']:.1f} ms"),
    }
    columns = {what: column for what, column in columns.items() if any(what in of for of in table.values())}
    lines = [f"| scheme | {' | '.join(head for head, _ in columns.values())} | |", "|---" * (len(columns) + 2) + "|"]
    for scheme, of in table.items():
        cells = [shown(of[what]) if what in of else "–" for what, (_, shown) in columns.items()]
        lines.append(f"| `{scheme}` | {' | '.join(cells)} | {mark(scheme, of) or ''} |")
    return "\n".join(lines) + f"\n\n{_reproduce(found)}"


def _percent(row: dict[str, Any]) -> str:
    change = f" ({row['lensc'] - row['rival_value']:+.1f})" if "rival_value" in row else ""
    return f"{row['lensc']:.1f} %{change}"


def mark(scheme: str, of: dict[str, dict[str, Any]]) -> str | None:
    """What is said of a scheme that loses more points of exact match, on any task, than it may; None for all others."""
    judged = [of[task] for task in ("line", "page exact", "question") if "rival_value" in of.get(task, {})]
    lost = max((row["rival_value"] - row["lensc"] for row in judged), default=0.0)
    allowed = ALLOWED_LOSS.get(scheme, USUAL_LOSS)
    return f"loses {lost:.1f} points" if lost > allowed else None


def marks(root: Path) -> dict[str, str]:
    """The marks that the record asks for, by scheme."""
    _, rows = _rows(root, "demo_accuracy", "python -m lensc.bench.schemes")
    found = {scheme: mark(scheme, of) for scheme, of in _by_subject(rows).items()}
    return {scheme: text for scheme, text in found.items() if text is not None}


def _by_subject(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows `<subject>: <figure>`, by scheme or chip, and figure."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        subject, what = row["what"].split(": ")
        table.setdefault(subject, {})[what] = row
    return table


def demo_speed(root: Path) -> str:
    """The demo bundle's speed beside torch."""
    found, rows = _rows(root, "runtime", "python -m lensc.bench.demo")
    lines = ["| picture | lensc | spread | torch eager float32 | faster by |", "|---|---|---|---|---|"]
    for row in rows:
        if row.get("parity") != "pass":
            lines.append(f"| {row['what']} | no speed: the answer differs from the reference | | | |")
            continue
        low, high = row["spread"]
        unit = row["unit"]
        lines.append(
            f"| {row['what']} | {row['lensc']:.4g} {unit} | {low:.4g}–{high:.4g} | {row['rival_value']:.4g} {unit} "
            f"| {row['ratio']:.2f} × |"
        )
    return "\n".join(lines) + f"\n\n{_reproduce(found)}"


def startup(root: Path) -> str:
    """What starting costs."""
    found, rows = _rows(root, "runtime", "python -m lensc.bench.startup")
    lines = ["| in a fresh process | median | spread | limit |", "|---|---|---|---|"]
    for row in rows:
        low, high = (1000 * value for value in row["spread"])
        limit = f"{1000 * row['limit']:.0f} ms" if "limit" in row else ""
        lines.append(f"| {row['what']} | {1000 * row['lensc']:.0f} ms | {low:.0f}–{high:.0f} ms | {limit} |")
    return "\n".join(lines) + f"\n\n{_reproduce(found)}"


def speculation(root: Path) -> str:
    """What guessing gains and costs, by bundle, engine and case."""
    tables = []
    for found in _records(root, "runtime", "python -m lensc.bench.speculation"):
        lines = ["| | with guesses | without | ratio | two standard errors |", "|---|---|---|---|---|"]
        for row in found["rows"]:
            if row.get("parity") != "pass":
                lines.append(f"| {row['what']} | no speed: guesses changed a token | | | |")
                continue
            low, high = row["ratio_interval"]
            lines.append(
                f"| {row['what']} | {row['lensc']:.4g} {row['unit']} | {row['rival_value']:.4g} | {row['ratio']:.3f} × "
                f"| {low:.3f}–{high:.3f} |"
            )
        tables.append("\n".join(lines) + f"\n\n{_reproduce(found)}")
    return "\n\n".join(tables)


def prediction(root: Path) -> str:
    """What `lensc plan` predicts beside what `lensc bench` measures."""
    found, rows = _rows(root, "runtime", "python -m lensc.bench.predict")
    lines = ["| | measured | spread | predicted | time off by |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["spread"]
        unit = row["unit"]
        lines.append(
            f"| {row['what']} | {row['lensc']:.4g} {unit} | {low:.4g}–{high:.4g} | {row['predicted']:.4g} {unit} "
            f"| {100 * row['error']:+.0f} % |"
        )
    seconds = found["machine"]["profile_s"]
    return "\n".join(lines) + f"\n\n{_reproduce(found)} The profile took {seconds:.0f} s."


def qnn(root: Path) -> str:
    """What compiling for each chip took, and what emulating it gave, in a table for each record."""
    found = _records(root, "qnn", "python -m lensc.bench.qnn")
    return "\n\n".join(f"{npu_table(one['rows'])}\n\n{_reproduce(one)}" for one in found)


def npu_table(rows: list[dict[str, Any]]) -> str:
    """A line for each chip, a column for each figure."""
    chips = _by_subject(rows)
    figures = [*dict.fromkeys(figure for of in chips.values() for figure in of)]
    lines = [f"| chip | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|"]
    for chip, of in chips.items():
        lines.append(f"| `{chip}` | {' | '.join(_npu(of.get(figure)) for figure in figures)} |")
    return "\n".join(lines)


def _npu(row: dict[str, Any] | None) -> str:
    """A figure of a chip, with its limit where it has one."""
    if row is None:
        return "–"
    if "lensc" not in row:
        return "**wrong**"
    unit = "" if row["unit"] == "nodes" else f" {row['unit']}"
    return f"{row['lensc']:.4g}{unit}" + (f" of {row['limit']:g}" if "limit" in row else "")


def full_size(root: Path) -> str:
    """The full-size model beside its rivals, section by section."""
    return _beside(root, "full_size", FULL_SIZE)


def full_size_short(root: Path) -> str:
    """The medians of the full-size model and its rivals."""
    return _beside_short(root, "full_size", FULL_SIZE)


def native_cpu(root: Path) -> str:
    """The full-size model on our own kernels beside its rivals, section by section."""
    return _beside(root, "native_cpu", NATIVE)


def native_cpu_short(root: Path) -> str:
    """The medians of the full-size model on our own kernels, and of its rivals."""
    return _beside_short(root, "native_cpu", NATIVE)


def ladder(root: Path) -> str:
    """What each step of the ladder reached, and how many times better than the step before it that is."""
    found, rows = _rows(root, "ladder", "python -m lensc.bench.ladder")
    steps: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        step, figure = row["what"].split(": ")
        steps.setdefault(step, {})[figure] = row
    figures = list(next(iter(steps.values())))
    lines = [f"| | {' | '.join(figures)} |", "|---" * (1 + len(figures)) + "|"]
    for step, of in steps.items():
        lines.append(f"| {step} | {' | '.join(_rung(of.get(figure)) for figure in figures)} |")
    return "\n".join(lines) + f"\n\n{_reproduce(found)}"


def _rung(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    times = f" ({row['ratio']:.2f} ×)" if "ratio" in row else ""
    return f"{row['lensc']:.3g} {row['unit']}{times}"


def kernels(root: Path) -> str:
    """Our kernels beside what the machine could reach, a table for each."""
    parts = []
    for found in _records(root, "native_cpu", KERNELS):
        tables: dict[str, list[str]] = {}
        for row in found["rows"]:
            kernel, size = row["what"].split(": ", 1)
            if kernel not in tables:
                tables[kernel] = [f"| `{kernel}` | | spread | of the limit |", "|---|---|---|---|"]
            if row["parity"] != "pass":
                tables[kernel].append(f"| {size} | no speed: it differs from the reference | | |")
                continue
            limit = f"{row['of_limit']:.2f} of {row['limit']:.3g} {row['unit']}" if "limit" in row else ""
            tables[kernel].append(f"| {size} | {row['lensc']:.4g} {row['unit']} | {_spread(row, 'spread')} | {limit} |")
        parts += ["\n".join(lines) for lines in tables.values()] + [_reached(found)]
    return "\n\n".join(parts)


def _beside(root: Path, topic: str, command: str) -> str:
    """All that is known of the rows of a command's records, a table for each."""
    parts = []
    for found in _records(root, topic, command):
        lines = [
            "| | lensc | spread | beside it | | ratio | spread | of the limit |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            unit = row["unit"]
            cells = [row["what"], f"{row['lensc']:.4g} {unit}", _spread(row, "spread")]
            rival = f"{row['rival_value']:.4g} {unit}" if "rival" in row else ""
            cells += [row.get("rival", ""), rival, f"{row['ratio']:.2f} ×" if "ratio" in row else ""]
            limit = f"{row['of_limit']:.2f} of {row['limit']:.3g} {unit}" if "limit" in row else ""
            lines.append(f"| {' | '.join([*cells, _spread(row, 'ratio_spread'), limit])} |")
        parts.append("\n".join([*lines, "", _reached(found)]))
    return "\n\n".join(parts)


def _beside_short(root: Path, topic: str, command: str) -> str:
    """The medians of a command's rows that have a rival, in a table for each processor."""
    tables: dict[str, list[str]] = {}
    for found in _records(root, topic, command):
        head = [f"| {found['machine']['cpu']} | lensc | beside it | | times better |", "|---|---|---|---|---|"]
        lines = tables.setdefault(found["machine"]["cpu"], head)
        for row in found["rows"]:
            if "rival" in row:
                unit, ratio = row["unit"], f"{row['ratio']:.2f}" if "ratio" in row else ""
                values = (f"{row['lensc']:.3g} {unit}", row["rival"], f"{row['rival_value']:.3g} {unit}")
                lines.append(f"| {row['what']} | {' | '.join(values)} | {ratio} |")
    return "\n\n".join("\n".join(lines) for lines in tables.values())


def _spread(row: dict[str, Any], name: str) -> str:
    return f"{row[name][0]:.3g}–{row[name][1]:.3g}" if name in row else ""


def command_line(_: Path) -> str:
    """`--help` of every command."""
    from lensc.cli import parser as make_parser

    os.environ["COLUMNS"] = "100"  # argparse wraps to the terminal
    return "\n".join(f"```text\n{text.rstrip()}\n```\n" for text in _helps(make_parser())).rstrip()


def _helps(parser: argparse.ArgumentParser) -> list[str]:
    """The help of a parser and of all commands below it."""
    texts = [parser.format_help()]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts += [text for sub in action.choices.values() for text in _helps(sub)]
    return texts


PARTS: dict[str, Callable[[Path], str]] = {
    "demo_accuracy": demo_accuracy,
    "demo_speed": demo_speed,
    "full_size": full_size,
    "full_size_short": full_size_short,
    "kernels": kernels,
    "ladder": ladder,
    "native_cpu": native_cpu,
    "native_cpu_short": native_cpu_short,
    "prediction": prediction,
    "qnn": qnn,
    "schemes": schemes,
    "speculation": speculation,
    "startup": startup,
    "command_line": command_line,
}


def fresh(text: str, root: Path) -> str:
    """`text` with every generated part made anew. Raises InputError for a part that nobody makes."""

    def replace(match: re.Match[str]) -> str:
        if match[2] not in PARTS:
            raise InputError(f"generated part {match[2]!r} is not one of {', '.join(PARTS)}")
        return f"{match[1]}{PARTS[match[2]](root)}\n{match[3]}"

    return _PART.sub(replace, text)


def _rows(root: Path, topic: str, command: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    found = _records(root, topic, command)[0]
    return found, found["rows"]


def _records(root: Path, topic: str, command: str) -> list[dict[str, Any]]:
    """Those whose command begins with `command`. Raises InputError if there is none."""
    found = [r for r in record.read(root / record.RESULTS / f"{topic}.json") if r["command"].startswith(command)]
    if not found:
        raise InputError(f"bench/results/{topic}.json holds no record of {command}; run it first")
    return found


def _reached(found: dict[str, Any]) -> str:
    machine = found["machine"]
    reach = ", ".join(f"{machine[name]:.0f} {label}" for name, label in REACH.items() if name in machine)
    return f"{_reproduce(found)} The machine reached {reach}."


def _reproduce(found: dict[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    return (
        f"`{found['command']}` on {machine['cpu']}, {machine['cores']} cores, onnxruntime {versions['onnxruntime']}, "
        f"{found['date']}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what is stale, or with --check say so and return 1."""
    parser = argparse.ArgumentParser(
        prog="python -m lensc.bench.docs", description="Write the generated parts of docs."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if something is stale")
    options = parser.parse_args(arguments)
    root = Path.cwd()
    stale = []
    try:
        for name in FILES:
            path = root / name
            text = path.read_text(encoding="utf-8")
            made = fresh(text, root)
            if made != text:
                stale.append(name)
                if not options.check:
                    write_text(path, made)
    except FileNotFoundError as error:
        print(f"error: {error.filename} is not there; run from the root of the source tree", file=sys.stderr)
        return 1
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(f"{name}: {'stale' if options.check else 'written'}" for name in stale) or "nothing is stale")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
