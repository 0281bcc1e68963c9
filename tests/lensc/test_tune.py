"""`lensc tune` as a user runs it: what it prints and keeps, when it keeps nothing, and wrong usage."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lensc import tune
from lensc.backends.bundle import load_manifest, write_manifest
from lensc.profiles import probe
from lensc.runtime import tiny
from lensc.runtime import tune as searching

Outcome = Any
"""That of conftest.py."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="moves the user's folders by variables of Linux")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.unpack(tmp_path_factory.mktemp("tiny"))["int4-g32"]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is kept. A second is enough for a tiny model."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "LEAST_S", 0.5)
    return tmp_path / "lensc" / "profiles" / "tuned"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.name != tune.LOCK)


def test_it_shows_each_trial_and_keeps_the_best(
    bundle: Path, kept: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = searching.Search.best

    def with_a_gain(self: searching.Search, seconds: float) -> searching.Found:
        found = best(self, seconds)
        settings = dataclasses.replace(found.settings, threads=1)
        return dataclasses.replace(found, settings=settings, times=1.25, interval=(1.2, 1.3), pairs=8)

    monkeypatch.setattr(searching.Search, "best", with_a_gain)
    argv = ("tune", bundle, "--device", "native:cpu", "--budget", "1s", "--busy")
    outcome = cli(*argv)
    assert outcome.code == 0, outcome.err
    assert "vision on native:cpu: a slice of 56 x 56" in outcome.out
    assert "decoder on native:cpu: 72 tokens of prompt and 64 of answer" in outcome.out
    assert "1.25 times as fast as the defaults (1.20 to 1.30, 8 pairs of runs); kept for later loads" in outcome.out
    assert "\n  draft" in outcome.out
    assert len(files(kept)) == 2
    run = cli("run", bundle, "Read.", "--device", "native:cpu", "--max-new-tokens", "1", "--metrics")
    assert run.code == 0 and "note: vision on native:cpu runs as lensc tune found best here: threads 1" in run.err
    assert "tuned: threads 1" in run.err.partition("first token")[2]
    run = cli("run", bundle, "Read.", "--device", "native:cpu", "--max-new-tokens", "1", "--metrics", "--no-tuned")
    assert "tuned" not in run.err
    reset = cli("tune", bundle, "--reset", "--json")
    assert json.loads(reset.out)["forgotten"] == 2 and files(kept) == []


def test_nothing_is_kept_from_a_busy_machine(
    bundle: Path, kept: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 100_000, 100))
    monkeypatch.setattr(probe, "busy_s", lambda: float(next(seconds)))
    outcome = cli("tune", bundle, "--device", "native:cpu", "--budget", "1s", "--json")
    document = json.loads(outcome.out)
    assert outcome.code == 0 and document["kept"] is False and files(kept) == []
    assert "so nothing is kept: run it again when the machine is idle" in document["notes"][0]
    assert {f["graph"] for f in document["found"]} == {"vision", "decoder"}
    assert all(t["verdict"] in ("kept", "no gain", "refused", "not tried") for t in document["trials"])


def test_a_second_one_waits_for_nobody(bundle: Path, kept: Path, cli: Callable[..., Outcome]) -> None:
    with tune._alone():
        outcome = cli("tune", bundle, "--device", "native:cpu")
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert "another lensc tune runs on this machine" in outcome.err


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        (("--budget", "0s"), 2, "--budget 0s: expected 0s to 24h"),
        (("--budget", "-5"), 2, "--budget"),
        (("--budget", "soon"), 2, "--budget soon: expected"),
        (("--budget", "99h"), 2, "--budget 99h: expected"),
        (("--device", "abacus:cpu"), 2, "backend 'abacus' is not one of"),
        (("--device", "native:gpu"), 1, "not the requested native:gpu"),
    ],
)
def test_wrong_usage_is_one_line(
    argv: tuple[str, ...], code: int, expected: str, bundle: Path, kept: Path, cli: Callable[..., Outcome]
) -> None:
    outcome = cli("tune", bundle, *argv)
    assert outcome.code == code and expected in outcome.err and outcome.err.count("\n") == 1
    assert files(kept) == []


def test_a_folder_of_graphs_and_a_folder_that_cannot_be_written(
    tmp_path: Path, cli: Callable[..., Outcome], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny.unpack(tmp_path)["int4-g32"]
    write_manifest(other, dataclasses.replace(load_manifest(other), artifacts=(), parity=()))
    outcome = cli("tune", other)
    assert outcome.code == 1 and "only portable graphs: lensc compile" in outcome.err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    outcome = cli("tune", bundle)
    assert outcome.code == 1 and "cannot be written" in outcome.err and "set XDG_DATA_HOME" in outcome.err


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5min", 90), ("90", 90), ("2h", 7200)])
def test_a_budget_has_a_unit(text: str, seconds: float) -> None:
    assert tune._seconds(text) == seconds


def test_others_share_is_what_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "busy_s", lambda: None)
    assert tune.Others().share() == 0.0


def test_busy_seconds_are_read_from_proc(tmp_path: Path) -> None:
    import os

    assert probe.busy_s(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "stat").write_text("cpu  100 20 30 9999 8888 4 5 6 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    assert probe.busy_s(tmp_path) == 165 / os.sysconf("SC_CLK_TCK")
