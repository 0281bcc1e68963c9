"""The generated parts of README and docs are what the results and the parser give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lensc.backends.errors import InputError
from lensc.bench import docs
from lensc.export.quantize.scheme import MARKS, NAMED

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", docs.FILES)
def test_the_docs_are_fresh(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = (ROOT / name).read_text(encoding="utf-8")
    assert docs.fresh(text, ROOT) == text, "run python -m lensc.bench.docs"


def test_stale_parts_are_made_anew(tmp_path: Path) -> None:
    results = tmp_path / "bench/results"
    results.mkdir(parents=True)
    record = {
        "topic": "demo_accuracy",
        "command": "python -m lensc.bench.demo_accuracy bundle",
        "date": "2026-01-02",
        "machine": {"cpu": "a processor", "cores": 2},
        "versions": {"onnxruntime": "1.0"},
        "rows": [
            {"what": "line: exact match", "unit": "%", "lensc": 96.25, "spread": [94.1, 97.8], "limit": 95.0},
            {"what": "page: character error rate", "unit": "% errors", "lensc": 4.5, "limit": 5.0},
        ],
    }
    (results / "demo_accuracy.json").write_text(json.dumps([record]))
    text = "before\n<!-- generated: demo_accuracy -->\nold\n<!-- end -->\nafter\n"
    made = docs.fresh(text, tmp_path)
    assert "old" not in made
    assert "| line: exact match | 96.2 % | 94.1–97.8 % | ≥ 95 % |" in made
    assert "| page: character error rate | 4.5 % |  | ≤ 5 % |" in made
    assert made.startswith("before\n") and made.endswith("<!-- end -->\nafter\n")
    assert docs.fresh(made, tmp_path) == made


def test_what_loses_more_than_it_may_is_marked_wherever_it_is_offered() -> None:
    """The searched recipe, which has no name, is marked in the table alone."""
    assert {name: text for name, text in docs.marks(ROOT).items() if name in NAMED} == MARKS
    row = {"lensc": 95.0, "rival_value": 96.5}
    kept = {"lensc": 90.0, "rival_value": 90.0}
    of = {"line": row, "page exact": kept, "question": kept}
    assert docs.mark("int4", of) is None and docs.mark("w8a8-vision", of) == "loses 1.5 points"


def test_kernels_have_a_table_each(tmp_path: Path) -> None:
    results = tmp_path / "bench/results"
    results.mkdir(parents=True)
    record = {
        "topic": "native_cpu",
        "command": "python -m lensc.bench.kernels",
        "date": "2026-01-02",
        "machine": {"cpu": "a processor", "cores": 2, "bandwidth_gb_s": 40.4, "int8_product_gop_s": 2000.0},
        "versions": {"onnxruntime": "1.0"},
        "rows": [
            {"what": "a: 1 row", "unit": "GB/s", "lensc": 30.0, "spread": [29.0, 31.0], "limit": 40.0,
             "of_limit": 0.75, "parity": "pass"},
            {"what": "b: 2 x 3", "unit": "GOP/s", "limit": 2000.0, "parity": "fail"},
        ],
    }  # fmt: skip
    (results / "native_cpu.json").write_text(json.dumps([record]))
    made = docs.fresh("<!-- generated: kernels -->\n<!-- end -->\n", tmp_path)
    assert "| `a` | | spread | of the limit |\n|---|---|---|---|\n| 1 row | 30 GB/s | 29–31 | 0.75 of 40 GB/s |" in made
    assert "| 2 x 3 | no speed: it differs from the reference | | |" in made
    assert "The machine reached 40 GB/s, 2000 GOP/s in int8 in registers." in made
    with pytest.raises(InputError, match=r"native_cpu\.json holds no record of python -m lensc\.bench\.cpu"):
        docs.fresh("<!-- generated: native_cpu -->\n<!-- end -->\n", tmp_path)


def test_an_unknown_part_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'nonsense' is not one of"):
        docs.fresh("<!-- generated: nonsense -->\n<!-- end -->\n", tmp_path)


def test_a_missing_record_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/runtime.json").write_text("[]")
    with pytest.raises(InputError, match=r"no record of python -m lensc\.bench\.demo"):
        docs.fresh("<!-- generated: demo_speed -->\n<!-- end -->\n", tmp_path)
