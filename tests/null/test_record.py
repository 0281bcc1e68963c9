"""Bench records: a failed parity has no speed, ratios point the same way, records replace their own kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lensc.backends.errors import ExecutionError, InputError, ParityError, StorageError
from lensc.bench import record, startup


@pytest.mark.parametrize("value", [{"lensc": 1.0}, {"lensc": None, "spread": (1.0, 2.0)}])
def test_failed_parity_has_no_speed(value: dict[str, object]) -> None:
    with pytest.raises(ParityError, match="bench row 'decode': its parity failed, so it has no value; pass lensc=None"):
        record.Row("decode", "tokens/s", parity="fail", **value)  # type: ignore[arg-type]


def test_failed_parity_is_recorded_without() -> None:
    row = record.Row("decode", "tokens/s", None, rival="torch", rival_value=5.0, parity="fail")
    assert row.to_json() == {
        "what": "decode",
        "unit": "tokens/s",
        "rival": "torch",
        "rival_value": 5.0,
        "parity": "fail",
    }


@pytest.mark.parametrize(("unit", "ratio", "of_limit"), [("tokens/s", 2.0, 0.5), ("ms", 0.5, 2.0), ("MB", 0.5, 2.0)])
def test_above_one_is_better(unit: str, ratio: float, of_limit: float) -> None:
    row = record.Row("x", unit, 10.0, rival="other", rival_value=5.0, limit=20.0, parity="pass")
    assert (row.ratio, row.of_limit) == (ratio, of_limit)


def test_unknown_unit_is_refused() -> None:
    with pytest.raises(InputError, match="bench row 'x': unit 'furlongs' is not one of"):
        record.Row("x", "furlongs", 1.0)


def test_record_replaces_that_of_the_same_command(tmp_path: Path) -> None:
    rows = [record.Row("x", "s", 1.23456, (1.0, 2.0))]
    record.write("runtime", "a", [], tmp_path)
    record.write("runtime", "b", [], tmp_path)
    path = record.write("runtime", "a", rows, tmp_path, limits={"bandwidth_gb_s": 45.8})
    records = record.read(path)
    assert [r["command"] for r in records] == ["b", "a"]
    assert records[1]["rows"] == [{"what": "x", "unit": "s", "lensc": 1.235, "spread": [1.0, 2.0], "parity": "none"}]
    assert records[1]["machine"]["bandwidth_gb_s"] == 45.8
    assert records[1].keys() == {"topic", "commit", "date", "machine", "versions", "command", "rows"}
    assert "python" in records[1]["versions"]


def test_processors_stand_beside_each_other_where_kernels_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = record.machine()
    for cpu in ("one", "other", "one"):
        monkeypatch.setattr(record, "machine", lambda cpu=cpu: here | {"cpu": cpu})
        path = record.write("native_cpu", "a", [], tmp_path)
        record.write("runtime", "a", [], tmp_path)
    assert [r["machine"]["cpu"] for r in record.read(path)] == ["other", "one"]
    assert [r["machine"]["cpu"] for r in record.read(tmp_path / "runtime.json")] == ["one"]


def test_wrong_place_or_topic_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bench topic 'speed' is not one of"):
        record.write("speed", "a", [], tmp_path)
    with pytest.raises(StorageError, match="is not a folder"):
        record.write("runtime", "a", [], tmp_path / "missing")


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"rows": []}]'])
def test_damaged_results_are_not_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / "runtime.json").write_text(text)
    with pytest.raises(InputError, match=r"runtime\.json: "):
        record.write("runtime", "a", [], tmp_path)
    assert (tmp_path / "runtime.json").read_text() == text


def test_commit_without_git_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() == "unknown"


def test_startup_measures_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    startup.main(["--runs", "1", "--results", str(tmp_path)])
    (written,) = json.loads((tmp_path / "runtime.json").read_text())
    assert [row["what"] for row in written["rows"]] == ["interpreter start", "import lensc", "lensc --help"]
    assert all(0 < row["spread"][0] <= row["lensc"] <= row["spread"][1] for row in written["rows"])
    assert "lensc --help" in capsys.readouterr().out


def test_startup_says_what_failed() -> None:
    with pytest.raises(ExecutionError, match=r"python -c import no_such_module ended with 1: ModuleNotFoundError"):
        startup._run("-c", "import no_such_module")
