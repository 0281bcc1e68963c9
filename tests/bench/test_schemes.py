"""From what was measured of schemes to the table: losses against f32, the divergence, and marks on what loses too much."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="pip install 'lensc[export]'")

from lensc.bench import docs, record
from lensc.bench.schemes import Figures, Speed, rows_of


def figures(scheme: str, line: int, page: int, question: int, kl: float) -> Figures:
    exact = {"line": line, "page": page, "question": question}
    return Figures(scheme, 500, exact, {"line": 0.5, "page": 1.5, "question": 0.5}, kl, 9_900_000, "sha256")


def test_the_table_shows_losses_and_marks_what_loses_too_much(tmp_path: Path) -> None:
    measured = [
        figures("f32", 480, 406, 491, 0.0),
        figures("int4", 480, 397, 490, 1.7e-3),
        figures("coarse", 480, 394, 491, 9e-3),
        figures("w8a8-vision", 474, 406, 491, 1e-4),
    ]
    results = tmp_path / record.RESULTS
    results.mkdir(parents=True)
    rows = rows_of(measured, {one.scheme: Speed([100.0, 200.0, 300.0], [5.0]) for one in measured})
    record.write("demo_accuracy", "python -m lensc.bench.schemes --target onnxruntime:cpu", rows, results)
    table = {line.split("`")[1]: line for line in docs.schemes(tmp_path).splitlines() if line.startswith("| `")}
    assert (
        "| 96.0 % (+0.0) | 1.5 % (+0.0) | 79.4 % (-1.8) | 98.0 % (-0.2) | 1.70 | 9.9 MB | 200 tok/s |" in table["int4"]
    )
    assert table["int4"].endswith("|  |") and table["f32"].endswith("|  |")
    assert table["coarse"].endswith("| loses 2.4 points |") and table["w8a8-vision"].endswith("| loses 1.2 points |")
    assert docs.marks(tmp_path) == {"coarse": "loses 2.4 points", "w8a8-vision": "loses 1.2 points"}
