"""What `lensc tune` keeps: for which artifact it is used, and what is said of a file that cannot be."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

import lensc
from lensc.backends.base import Artifact, Probe
from lensc.backends.bundle import load_manifest
from lensc.backends.errors import StorageError
from lensc.profiles import probe
from lensc.runtime import tiny, tuned
from lensc.runtime.tuned import Settings, Tuned

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="moves the user's folders by variables of Linux")

CHOICES = {"prefill_chunk": ("256", "64", "128"), "spinning": ("on", "off")}
SETTINGS = Settings(1, {"prefill_chunk": "64"}, 3)
NATIVE = "native:cpu"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.unpack(tmp_path_factory.mktemp("tiny"))["int4-g32"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path


def artifact_of(bundle: Path, graph: str) -> Artifact:
    return next(a for a in load_manifest(bundle).artifacts if (a.graph, str(a.target)) == (graph, NATIVE))


def found(key: dict[str, str], settings: Settings = SETTINGS) -> Tuned:
    return Tuned(tuned.FORMAT, key, settings, 1.5, (1.4, 1.6), 8, 12.5, "2026-11-27T12:00:00+00:00")


def test_it_is_found_again_for_the_same_artifact_engine_and_machine(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifact_of(bundle, "decoder")
    key = tuned.key_of(artifact, "engine 1.0")
    kept = found(key)
    path = tuned.keep(kept)
    assert path.parent == data / "lensc" / "profiles" / "tuned"
    assert tuned.find(key, CHOICES) == (kept, "")
    others = [
        tuned.key_of(artifact, "engine 1.1"),
        tuned.key_of(artifact_of(bundle, "vision"), "engine 1.0"),
        tuned.key_of(dataclasses.replace(artifact, options={"other": "1"}), "engine 1.0"),
    ]
    machine = dataclasses.replace(probe.machine(), cores=96, threads=192)
    monkeypatch.setattr(probe, "machine", lambda: machine)
    others.append(tuned.key_of(artifact, "engine 1.0"))
    assert [tuned.find(other, CHOICES) for other in others] == [(None, "")] * 4
    assert tuned.drop(key) and not tuned.drop(key)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "more than 65536 bytes"),
        ("[" * 10_000, "nested too deeply"),
        ("{}", "missing"),
        ('{"format": 1, "format": 1}', "format"),
    ],
)
def test_a_damaged_file_is_ignored_and_said(text: str, expected: str, bundle: Path, data: Path) -> None:
    key = tuned.key_of(artifact_of(bundle, "decoder"), "engine 1.0")
    tuned.keep(found(key)).write_text(text)
    kept, problem = tuned.find(key, CHOICES)
    assert kept is None and expected in problem and problem.endswith("lensc tune writes it again")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": 2}, "format 2, expected 1"),
        ({"key": {"graph": "vision"}}, "is of another graph and target"),
        ({"settings": {"threads": 100_000, "engine": {}, "drafted": None}}, "threads 100000, expected 1 to"),
        ({"settings": {"threads": 1, "engine": {"turbo": "on"}, "drafted": None}}, "setting 'turbo' is not known"),
        ({"settings": {"threads": 1, "engine": {"spinning": "fast"}, "drafted": None}}, "spinning='fast'"),
        ({"settings": {"threads": 1, "engine": {}, "drafted": 99}}, "draft 99, expected 0 to 7"),
        ({"settings": {"threads": "1", "engine": {}, "drafted": None}}, "threads"),
    ],
)
def test_a_foreign_file_is_ignored_and_said(change: dict[str, object], expected: str, bundle: Path, data: Path) -> None:
    key = tuned.key_of(artifact_of(bundle, "decoder"), "engine 1.0")
    path = tuned.keep(found(key))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    kept, problem = tuned.find(key, CHOICES)
    assert kept is None and expected in problem and problem.count("\n") == 0


def test_a_folder_that_cannot_be_written_is_one_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"not written: .*; set XDG_DATA_HOME"):
        tuned.keep(found(tuned.key_of(artifact_of(bundle, "decoder"), "engine 1.0")))


def test_a_load_uses_it_and_says_so(bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lensc.backends import native

    real = probe.machine()
    monkeypatch.setattr(probe, "machine", lambda: dataclasses.replace(real, cores=2, threads=2))
    artifact = artifact_of(bundle, "decoder")
    asked: list[Probe] = list(native.backend.probe())
    path = tuned.keep(found(tuned.key_of(artifact, asked[0].reason)))
    with lensc.load(bundle, NATIVE) as vlm:
        assert vlm.plan is not None
        assert vlm.plan["decoder"].reason.endswith("; tuned: threads 1, chunk 64, draft 3")
        assert "tuned" not in vlm.plan["vision"].reason
        assert [e.kind for e in vlm.events if e.kind == "tuned"] == ["tuned"]
        assert vlm._decoder.session.prefill_chunk == 64  # type: ignore[attr-defined]
        assert vlm._most_drafted == 3
        plain = vlm.generate(tiny.QUESTION, [tiny.picture()], max_new_tokens=4).token_ids
    with lensc.load(bundle, NATIVE, threads=2) as vlm:
        assert vlm.plan is not None and vlm.plan["decoder"].reason.endswith("tuned: threads 2, chunk 64, draft 3")
    with lensc.load(bundle, NATIVE, tuned=False) as vlm:
        assert vlm.plan is not None and "tuned" not in vlm.plan["decoder"].reason
        assert not vlm.events and vlm._most_drafted == 7
        assert vlm.generate(tiny.QUESTION, [tiny.picture()], max_new_tokens=4).token_ids == plain
    path.write_text("{")
    with lensc.load(bundle, NATIVE) as vlm:
        assert vlm.plan is not None and "tuned" not in vlm.plan["decoder"].reason
        [event] = vlm.events
        assert event.text.startswith(f"{path}: not JSON")
