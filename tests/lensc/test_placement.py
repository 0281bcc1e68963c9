"""Candidates that are timed when a bundle is first loaded: what is chosen, kept, and what becomes of those that fail."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import lensc
from lensc.backends import registry
from lensc.backends.base import Artifact, Target
from lensc.backends.bundle import load_manifest
from lensc.backends.errors import ParityError, UnavailableError
from lensc.backends.load_options import LoadOptions
from lensc.runtime import placement, selftest, trial
from lensc.runtime.pipeline import VLM
from lensc.runtime.plan import Timing
from lensc.runtime.tuned import Settings

OTHER = {"onnxruntime": "native", "native": "onnxruntime"}
HANGS_S = 0.2
SCRIPT = Path(__file__).with_name("faulty.py")


def where(vlm: VLM) -> dict[str, str]:
    assert vlm.plan is not None
    return {p.graph: str(p.effective) for p in vlm.plan.placements}


def never(*_: Any) -> Any:
    raise AssertionError("nothing is to be timed")


VISION_ONLY = {"target": "decoder=native:cpu", "threads": 1}


def test_candidates_are_timed_once_and_remembered(
    bundles: dict[str, Path], cache: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lensc.load(bundles["native"], threads=1) as vlm:
        assert [(e.kind, e.graph) for e in vlm.events[:2]] == [("measured", "vision"), ("measured", "decoder")]
        assert vlm.plan is not None
        for placed in vlm.plan.placements:
            assert placed.requested is None and placed.measured is not None
            others = json.loads(next(cache.iterdir()).read_text())["candidates"][placed.graph]
            assert placed.measured.ms == min(entry["ms"] for entry in others.values())
            unit = "per slice" if placed.graph == "vision" else "per request"
            assert placed.reason.startswith("fastest, ") and placed.reason.count(f" ms {unit}") == 2
        expected = where(vlm)
    monkeypatch.setattr(trial, "tried", never)
    with lensc.load(bundles["native"], threads=1) as vlm:
        assert where(vlm) == expected and vlm.events == ()
    shown = cli("run", bundles["native"], "What?", "--max-new-tokens", 2, "--threads", 1, "--json")
    document = json.loads(shown.out)
    assert {p["graph"]: p["target"] for p in document["plan"]} == expected and document["events"] == []
    assert all(p["measured_ms"] > 0 and p["requested"] is None for p in document["plan"])
    shown = cli("run", bundles["native"], "What?", "--max-new-tokens", 2, "--placement", "ranked", "--metrics")
    assert "vision       native:cpu: best usable: runs here" in shown.err
    with lensc.load(bundles["native"], target="native:cpu", threads=1) as vlm:
        assert vlm.plan is not None and vlm.plan["vision"].reason.startswith("requested: ")
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("kind", "backend", "problem"),
    [
        ("zeros", "onnxruntime", "self-test failed: vision on onnxruntime:cpu"),
        ("hang", "onnxruntime", "gave no answer within 0.2 s and was stopped"),
        ("crash", "native", "its trial ended the process it ran in (SIGABRT)"),
    ],
)
def test_a_candidate_that_fails_costs_only_itself(
    bundles: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str, backend: str, problem: str
) -> None:
    monkeypatch.setattr(trial, "COMMAND", (sys.executable, "-P", str(SCRIPT)))
    monkeypatch.setenv("LENSC_FAULT", json.dumps({"graph": "vision", "backend": backend, "kind": kind}))
    if kind == "hang":
        limits = {f"{backend}:cpu": HANGS_S}
        monkeypatch.setattr(selftest, "limit_s", lambda artifact, state: limits.get(str(artifact.target), 60.0))
    for again in (False, True):
        if again:
            monkeypatch.setattr(trial, "tried", never)
        with lensc.load(bundles[backend], **VISION_ONLY) as vlm:
            assert where(vlm)["vision"] == f"{OTHER[backend]}:cpu" and vlm.plan is not None
            assert problem in vlm.plan["vision"].reason
            out = [e for e in vlm.events if e.kind in ("self-test", "refused")]
            assert [(e.kind, e.target) for e in out] == [
                ("self-test" if kind == "zeros" else "refused", f"{backend}:cpu")
            ]
            assert problem in out[0].text and again != ("measured" in [e.kind for e in vlm.events])


def test_a_wrong_answer_in_a_trial_is_dealt_with_by_policy(
    bundles: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(bundle: Path, artifact: Artifact, state: str, options: LoadOptions) -> Any:
        right = str(artifact.target) == "native:cpu"
        return Timing(5.0, "5 ms per slice") if right else trial.Refusal("self-test", "it is wrong")

    monkeypatch.setattr(trial, "tried", tried)
    with pytest.raises(ParityError, match="it is wrong"):
        lensc.load(bundles["onnxruntime"], selftest="error", **VISION_ONLY)
    for policy in ("replace", "warn", "off"):
        with lensc.load(bundles["onnxruntime"], selftest=policy, **VISION_ONLY) as vlm:
            assert where(vlm)["vision"] == "native:cpu" and [e.kind for e in vlm.events][-1] == "self-test"
    monkeypatch.setattr(trial, "tried", lambda *_: trial.Refusal("self-test", "it is wrong"))
    shutil.rmtree(cache)
    with pytest.raises(ParityError, match=r"onnxruntime:cpu: it is wrong; native:cpu: it is wrong"):
        lensc.load(bundles["onnxruntime"], **VISION_ONLY)
    monkeypatch.setattr(trial, "tried", lambda *_: trial.Refusal("refused", "it hangs"))
    shutil.rmtree(cache)
    with pytest.raises(UnavailableError, match=r"onnxruntime:cpu: it hangs; native:cpu: it hangs"):
        lensc.load(bundles["onnxruntime"], **VISION_ONLY)


@pytest.mark.parametrize("command", [("/nowhere/python",), (sys.executable, "-c", "raise SystemExit('no room')")])
def test_where_no_process_can_be_started_candidates_are_ranked(
    bundles: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(trial, "COMMAND", command)
    with lensc.load(bundles["native"], **VISION_ONLY) as vlm:
        assert [e.kind for e in vlm.events] == ["not measured"] and "taken by rank" in vlm.events[0].text
        assert vlm.plan is not None and vlm.plan["vision"].reason.startswith("best usable: ")
    assert not cache.exists()


def _candidate(document: Any, **changes: Any) -> Any:
    document["candidates"]["vision"]["native:cpu"] |= changes
    return document


def test_candidates_are_timed_as_they_will_run(
    bundles: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[LoadOptions] = []

    def tried(bundle: Path, artifact: Artifact, state: str, options: LoadOptions) -> Timing:
        told.append(options)
        return Timing(5.0, "5 ms per slice")

    monkeypatch.setattr(trial, "tried", tried)
    monkeypatch.setattr(placement, "settings_for", lambda *_: (Settings(2, {"spin": "no"}), ""))
    manifest, asked = load_manifest(bundles["native"]), {"decoder": Target.parse("native:cpu")}
    for threads, tuned in ((None, True), (None, False), (1, True)):
        placement.measured(bundles["native"], manifest, registry.probes(), asked, threads, tuned)
    tuned_settings = {"spin": "no"}
    expected = [LoadOptions(2, tuned_settings), LoadOptions(), LoadOptions(1, tuned_settings)]
    assert told == [options for options in expected for _ in range(2)], "none is taken for another"


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "cut": lambda d: json.dumps(d)[:-40],
    "no object": lambda d: "[]",
    "another key": lambda d: json.dumps(d | {"key": "0" * 64}),
    "a newer format": lambda d: json.dumps(d | {"format": 2}),
    "a candidate less": lambda d: json.dumps(d | {"candidates": {}}),
    "no time": lambda d: json.dumps(_candidate(d, ms=-1.0)),
    "not a number": lambda d: json.dumps(_candidate(d, ms=float("nan"))),
    "text": lambda d: json.dumps(_candidate(d, ms="5")),
}


def test_a_damaged_or_foreign_file_is_a_note_and_candidates_are_timed_again(
    bundles: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []

    def tried(bundle: Path, artifact: Artifact, state: str, options: LoadOptions) -> Timing:
        timed.append(str(artifact.target))
        return Timing(5.0 if artifact.target.backend == "native" else 6.0, "some ms per slice")

    monkeypatch.setattr(trial, "tried", tried)

    def events() -> list[str]:
        manifest = load_manifest(bundles["onnxruntime"])
        asked = {"decoder": Target.parse("native:cpu")}
        found = placement.measured(bundles["onnxruntime"], manifest, registry.probes(), asked, 1)
        assert len(found.outcomes) == 2
        return [event.kind for event in found.events]

    assert events() == ["measured"] and events() == []
    monkeypatch.setattr(trial, "tried", lambda *_: Timing(5.0, "5 ms per slice", 2.5))
    shutil.rmtree(cache)
    assert events() == ["measured", "not measured"] and events() == [], "the machine was busy"
    monkeypatch.setattr(trial, "tried", tried)
    shutil.rmtree(cache)
    assert events() == ["measured"]
    (path,) = cache.iterdir()
    right = path.read_bytes()
    for damage in DAMAGES.values():
        path.write_text(damage(json.loads(right)))
        timed.clear()
        assert events() == ["not measured", "measured"] and len(timed) == 2
        assert path.read_bytes() == right and events() == []
    shutil.rmtree(cache)
    with ThreadPoolExecutor(4) as pool:
        assert [f.result() for f in [pool.submit(events) for _ in range(4)]]
    assert path.read_bytes() == right and len(list(cache.iterdir())) == 1
    shutil.rmtree(cache)
    cache.write_text("in the way")
    assert events() == ["not measured", "measured", "not measured"]
