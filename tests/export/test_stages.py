"""Building a folder in stages: killed anywhere it leaves the old folder or none, and the rerun continues."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from lensc.backends.bundle import (
    DecoderSpec,
    GenerationSpec,
    Manifest,
    ModelSpec,
    PictureSpec,
    Provenance,
    load_manifest,
    write_manifest,
)
from lensc.backends.compiling import report_part
from lensc.backends.errors import StorageError, UsageError
from lensc.export.stages import StageEvent, Staging, check_replaceable

HALF = (0.5, 0.5, 0.5)
MANIFEST = Manifest(
    format=1,
    model=ModelSpec(
        "toy",
        PictureSpec(448, 14, 9, 96, "official", HALF, HALF, 70),
        DecoderSpec(256, 2, 2, 64, 1280, 8192),
        GenerationSpec(eos_token_ids=(1,)),
    ),
    graphs={},
    artifacts=(),
    tables={},
    tokenizer="tokenizer.json",
    files=(),
    provenance=Provenance("0", "test", "0" * 64, {}, "f32", "2026-01-01"),
)

STAGES = ("tokenizer", "work", "table")


@dataclasses.dataclass(frozen=True)
class Length:
    characters: int


class Builder:
    """A build of three stages: a shipped file, one that is only worked with, and one made from it."""

    def __init__(self, out: Path, text: str, kill_at: Sequence[str] = ()) -> None:
        self.out, self.text, self.kill_at = out, text, kill_at
        self.events: list[str] = []

    def report(self, event: StageEvent) -> None:
        self.events.append(f"{event.state} {event.stage}")
        if self.events[-1] in self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self) -> Manifest:
        with Staging(self.out, total=4, report=self.report) as staging:

            def write(path: Path, text: str) -> tuple[Length, list[Path]]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text[: len(text) // 2])
                self.report(StageEvent("half of " + path.name, "done", 0, 0))
                path.write_text(text)
                return Length(len(text)), [path]

            tree = staging.tree
            inputs = {"text": self.text}
            staging.stage("tokenizer", inputs, Length, lambda: write(tree / "tokenizer.json", self.text))
            work = staging.folder / "work" / "raw"
            made = staging.stage("work", inputs, Length, lambda: write(work, self.text * 2))
            assert made == Length(2 * len(self.text))
            staging.stage("table", inputs, Length, lambda: write(tree / "sub" / "table", work.read_text()))
            return staging.publish(lambda folder: write_manifest(folder, MANIFEST))

    def states(self) -> dict[str, str]:
        return {stage: state for state, _, stage in (e.partition(" ") for e in self.events) if stage in STAGES}


def contents(out: Path) -> dict[str, str]:
    load_manifest(out, verify=True)
    return {
        p.relative_to(out).as_posix(): p.read_text()
        for p in out.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }


def expected(text: str) -> dict[str, str]:
    return {"tokenizer.json": text, "sub/table": text * 2}


def killed_build(out: Path, text: str, event: str) -> None:
    """Run the build in another process that kills itself (SIGKILL) when `event` is reported."""
    program = (
        f"import sys, importlib.util as u; from pathlib import Path\n"
        f"spec = u.spec_from_file_location('stages_under_test', {__file__!r})\n"
        f"module = u.module_from_spec(spec); sys.modules[spec.name] = module; spec.loader.exec_module(module)\n"
        f"module.Builder(Path({str(out)!r}), {text!r}, [{event!r}])()\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_builds_and_leaves_nothing_beside(tmp_path: Path) -> None:
    build = Builder(tmp_path / "deep" / "out", "abc")
    build()
    assert contents(tmp_path / "deep" / "out") == expected("abc")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert build.states() == dict.fromkeys(STAGES, "done")


@pytest.mark.parametrize("old", [True, False], ids=["over-an-old-bundle", "fresh"])
def test_killed_at_every_event_in_turn(old: bool, tmp_path: Path) -> None:
    """Each run goes on where the last was killed, one event further, until there is nothing left to kill."""
    out = tmp_path / "out"
    if old:
        Builder(out, "old")()
    plain = Builder(tmp_path / "plain", "new")
    if old:
        Builder(tmp_path / "plain", "old")()
    plain()
    finished: list[str] = []
    for event in plain.events[:-1]:
        event = event.replace("publish plain", "publish out")
        killed_build(out, "new", event)
        between = event == "done move the old folder aside"
        if event == "done rename the new folder":
            assert contents(out) == expected("new")
            break
        assert out.exists() == (old and not between)
        if out.exists():
            assert contents(out) == expected("old")
        if event.removeprefix("done ") in STAGES:
            finished.append(event.removeprefix("done "))
            lines = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
            assert [json.loads(line)["stage"] for line in lines] == finished
    assert finished == list(STAGES)
    again = Builder(out, "new")
    again()
    assert contents(out) == expected("new")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out"]


def test_what_a_compiler_reports_is_reported_of_its_stage(tmp_path: Path) -> None:
    """By any thread of it, while the stage runs, and by nobody afterwards."""
    events: list[StageEvent] = []

    def make() -> tuple[Length, list[Path]]:
        thread = threading.Thread(target=report_part, args=("Building 1/6",))
        thread.start()
        thread.join()
        return Length(1), []

    with Staging(tmp_path / "out", total=2, report=events.append) as staging:
        staging.stage("compile", {}, Length, make)
        report_part("nobody listens")
    assert [(e.state, e.stage, e.index) for e in events] == [
        ("start", "compile", 1),
        ("part", "compile: Building 1/6", 1),
        ("done", "compile", 1),
    ]


def test_rerun_keeps_what_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_build(out, "abc", "done half of table")
    again = Builder(out, "abc")
    again()
    assert again.states() == {"tokenizer": "kept", "work": "kept", "table": "done"}
    assert contents(out) == expected("abc")


def test_killed_between_the_two_renames_the_old_folder_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Builder(out, "old")()
    killed_build(out, "new", "done move the old folder aside")
    assert not out.exists()
    with Staging(out, total=1):
        assert contents(out) == expected("old")
    again = Builder(out, "new")
    again()
    assert again.states() == dict.fromkeys(STAGES, "kept")
    assert contents(out) == expected("new")


def test_changed_inputs_start_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_build(out, "abc", "done table")
    again = Builder(out, "xyz")
    again()
    assert again.states() == dict.fromkeys(STAGES, "done")
    assert contents(out) == expected("xyz")


@pytest.mark.parametrize("damage", ["changed", "longer", "gone"])
def test_a_damaged_file_makes_its_stage_run_again(damage: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_build(out, "abc", "done table")
    path = tmp_path / "out.partial" / "tree" / "tokenizer.json"
    {"changed": lambda: path.write_text("abX"), "longer": lambda: path.write_text("abcd"), "gone": path.unlink}[
        damage
    ]()
    again = Builder(out, "abc")
    again()
    assert again.states() == {"tokenizer": "done", "work": "kept", "table": "kept"}
    assert contents(out) == expected("abc")


@pytest.mark.parametrize("damage", [b"{garbage\n", b'{"stage": 7}\n', b"\xff\xfe\n", b"[[[[", b'{"stage": "table", '])
def test_a_damaged_journal_is_believed_up_to_the_damage(damage: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_build(out, "abc", "done table")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    first = journal.read_bytes().splitlines(keepends=True)[0]
    journal.write_bytes(first + damage)
    again = Builder(out, "abc")
    again()
    assert contents(out) == expected("abc")
    assert again.states()["table"] == "done"


def test_files_of_an_interrupted_stage_are_not_shipped(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_build(out, "abc", "done half of table")
    (tmp_path / "out.partial" / "tree" / "stray").write_text("left by a killed stage")
    Builder(out, "abc")()
    assert contents(out) == expected("abc")


def test_two_builds_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        Staging(out, total=1),
        pytest.raises(StorageError, match=f"is being built by another process .pid {os.getpid()}"),
    ):
        Builder(out, "abc")()
    Builder(out, "abc")()


def test_many_builds_at_once_take_turns_or_are_refused(tmp_path: Path) -> None:
    results: list[str] = []

    def run() -> None:
        try:
            Builder(tmp_path / "out", "abc")()
            results.append("built")
        except StorageError:
            results.append("refused")

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and "built" in results
    assert contents(tmp_path / "out") == expected("abc")


# --- what must not be overwritten ---------------------------------------------------------------------------------


def test_refuses_to_replace_anything_but_a_bundle(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    web = tmp_path / "web"
    web.mkdir()
    (web / "manifest.json").write_text('{"name": "a browser extension", "manifest_version": 3}')
    more = tmp_path / "more"
    Builder(more, "abc")()
    (more / "receipt.png").write_text("precious")
    for path, reason in (
        (file, "is not a folder"),
        (folder, "manifest.json not found"),
        (web, "format"),
        (more, "receipt.png"),
    ):
        with pytest.raises(UsageError, match=reason):
            Builder(path, "new")()
        assert not (tmp_path / f"{path.name}.partial").exists()
    assert (folder / "thesis.txt").read_text() == "precious" == file.read_text() == (more / "receipt.png").read_text()


def test_refuses_a_foreign_staging_folder(tmp_path: Path) -> None:
    foreign = tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"out.partial: exists and was not made by lensc"):
        Builder(tmp_path / "out", "abc")()
    assert (foreign / "thesis.txt").read_text() == "precious"


def test_an_empty_folder_and_a_damaged_bundle_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Builder(out, "abc")()
    (out / "tokenizer.json").write_text("cut")
    Builder(out, "xyz")()
    assert contents(out) == expected("xyz")


def test_a_link_is_followed(tmp_path: Path) -> None:
    Builder(tmp_path / "real", "abc")()
    (tmp_path / "link").symlink_to("real")
    Builder(tmp_path / "link", "xyz")()
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == expected("xyz")


def test_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "here"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(UsageError, match="is the current folder"):
        Builder(Path("."), "abc")()
    assert list(tmp_path.iterdir()) == [inside]


def test_root_is_no_output_folder() -> None:
    with pytest.raises(UsageError, match="cannot be the output folder"):
        check_replaceable(Path("/"))


# --- storage ------------------------------------------------------------------------------------------------------


def test_full_disk_is_one_line_and_leaves_the_old_bundle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Builder(out, "old")()
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(StorageError, match="No space left on device; free some") as caught,
        Staging(out, total=1) as staging,
    ):
        staging.stage("write", {}, Length, lambda: (Length(full.write(b"x" * 100)), []))
    assert "\n" not in str(caught.value)
    assert contents(out) == expected("old")


def test_file_size_limit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(StorageError, match="File too large; the file is larger than"):
            Builder(out, "x" * 15_000)()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not out.exists()
    again = Builder(out, "x" * 15_000)
    again()
    assert again.states() == {"tokenizer": "kept", "work": "done", "table": "done"}


def test_read_only_place() -> None:
    with pytest.raises(StorageError, match=r"/proc/.*: "):
        Builder(Path("/proc/lensc-bundle"), "abc")()


def test_too_little_space_is_said_before_the_work(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", total=1) as staging:
        staging.require(1000)
        with pytest.raises(StorageError, match=r"about 1000000.00 GB are needed, .* GB are free"):
            staging.require(10**15)
        (staging.tree / "staged").write_text("x" * 1000)
        staging.require(1)
