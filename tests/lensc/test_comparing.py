"""`lensc compare` as a user meets it: two bundles side by side, a page that needs nothing else, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lensc import compare_page, compare_run, compare_text
from lensc.backends.bundle import ParityRecord, load_manifest, write_manifest
from lensc.backends.codec import decode
from lensc.backends.errors import UnavailableError
from lensc.bench_record import Figure, Placed
from lensc.cli import main
from lensc.compare_run import Asked, Comparison

GOLDEN = Path(__file__).parents[1] / "golden"
NAME = "a&b <i>.png"
PARITY = ParityRecord("decoder", "qnn:npu:sm8650", "torch float32", 0.1, 31.2, 0.999, 0.99, 3, 5, True, "max_abs 0.1")
Cli = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("no_profile_and_a_short_probe")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in (NAME, "plain.png"):
        shutil.copyfile(GOLDEN / "images" / "tiny64.png", folder / name)
    (folder / "questions.json").write_text(json.dumps({NAME: {"question": "<b>What?", "answer": "nothing it says"}}))
    return folder


@pytest.fixture(scope="module")
def folder(made: Any, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command has written what it found of a bundle and of its copy."""
    folder = tmp_path_factory.mktemp("compared")
    shutil.copytree(made.bundle, folder / "other")
    asked = ["--images", str(pictures), "-p", "4", "-n", "2", "-r", "2", "--max-new-tokens", "3", "--threads", "1"]
    where = ["--html", str(folder / "c.html"), "--output", str(folder / "c.json")]
    assert main(["compare", str(made.bundle), str(folder / "other"), *asked, *where]) == 0
    return folder


@pytest.fixture
def found(folder: Path) -> Comparison:
    problems: list[str] = []
    comparison = decode(Comparison, json.loads((folder / "c.json").read_text()), problems)
    assert comparison is not None, problems
    return comparison


def assert_refused(shown: Any, code: int, *parts: str) -> None:
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("lensc: error: ") and "bug in lensc" not in line
    assert [part for part in parts if part not in line] == [], line
    assert shown.code == code


class Page(HTMLParser):
    """Raises for tags that are not closed in order; collects tags, classes and text."""

    VOID = ("meta", "br", "line", "rect", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.classes: list[str] = []
        self.text = ""
        self.labels: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.classes += [value or "" for name, value in attrs if name == "class"]
        self.labels += [value or "" for name, value in attrs if name == "aria-label"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_bundles_side_by_side(found: Comparison, bundle: Path) -> None:
    assert [column.bundle for column in found.columns] == [0, 1]
    assert [column.name for column in found.columns] == [
        "f32 onnxruntime:cpu (bundle)",
        "f32 onnxruntime:cpu (other)",
    ]
    assert found.baseline == found.columns[0].name and found.pictures.startswith("2 pictures, folder pictures")
    manifest = load_manifest(bundle)
    for column in found.columns:
        assert (column.right, column.judged, column.same, column.compared) == (0, 1, 2, 2)
        assert {"image_ms", "ttft_ms", "decode_tokens_s", "peak_memory_bytes"} <= set(column.row.figures)
        assert column.size_bytes == sum({f.path: f.bytes for a in manifest.artifacts for f in a.files}.values())
        assert column.parity == ()  # lensc compile has no checkpoint to judge by
    asked, plain = found.asked
    assert (asked.picture, asked.question, asked.expected) == (NAME, "<b>What?", "nothing it says")
    assert plain.question == "Describe the picture." and None not in plain.answers and len(set(plain.answers)) == 1


def test_the_table_says_it(found: Comparison) -> None:
    text = compare_text.table_of(found)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "0 of 1, 0 % (0 to 79)" in text and "2 of 2, 100 % (34 to 100)" in text
    assert lines[2].count("baseline") == 3  # first token, decode, answers
    assert "same: the tokens of f32 onnxruntime:cpu (bundle)" in text and "2 runs after 1, in turn" in text
    assert compare_text.share(0, 0) == "-"


def test_the_page_needs_nothing_else_and_escapes_names(found: Comparison, folder: Path) -> None:
    text = (folder / "c.html").read_text()
    page = Page(text)
    assert {"script", "link", "img", "iframe", "i", "b"} & set(page.tags) == set()
    assert "http" not in text.replace('http-equiv="', "") and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and 'lang="en"' in text
    for column in found.columns:
        assert str(column.row.figures["ttft_ms"]) in page.text and page.text.count(column.name) >= 3
    assert len(page.labels) == page.tags.count("svg") >= 6
    assert all(found.columns[1].name in label for label in page.labels)
    assert "All placements give the same answer to all 2 questions." in page.text
    hostile = replace(found, bundles=tuple(replace(b, model="<script>alert(1)</script>") for b in found.bundles))
    assert "script" not in Page(compare_page.page(hostile)).tags


def test_what_differs_fails_or_is_emulated_is_shown(found: Comparison) -> None:
    first, second = found.columns
    plan = tuple(Placed(p.graph, "qnn:npu:sm8650", p.scheme, "emulated", "") for p in second.row.plan)
    judged = [replace(PARITY, graph="vision", passed=False), PARITY, replace(PARITY, sqnr_db=28.4, tolerance="none")]
    emulated = replace(second, name="npu", same=1, parity=tuple(judged), row=replace(second.row, plan=plan, figures={}))
    failed = replace(
        second, name="gone", judged=0, compared=0, row=replace(second.row, figures={}, failed="it <crashed>")
    )
    asked = (Asked(NAME, "<b>What?", "right", ("right", "<u>wrong\nline", None)), found.asked[1])
    changed = replace(found, columns=(first, emulated, failed), asked=asked)
    page = Page(compare_page.page(changed))
    assert "u" not in page.tags and "<u>wrong\nline" in page.text and "1 of 2 questions" in page.text
    assert page.classes.count("answer wrong") == 1
    assert "emulated" in page.text and "gone: no figures: it <crashed>" in page.text
    assert any("npu: emulated; gone: failed" in label for label in page.labels)
    table = compare_text.table_of(changed)
    assert "| emulated |" in table and "1 of 2, 50 %" in table and "its times are none" in table
    # what a recipe costs is shown and not judged
    assert "vision 31 dB, top-1 99.0 % FAILED; decoder 28 dB, top-1 99.0 %" in table and "FAILED" in page.text


def test_bars_have_the_lengths_of_their_values(found: Comparison) -> None:
    first, second = found.columns
    rows = (
        replace(column.row, figures={"ttft_ms": Figure(values)})
        for column, values in ((first, (10.0, 20.0, 30.0)), (second, (5.0, 10.0, 15.0)))
    )
    columns = tuple(replace(column, row=row) for column, row in zip((first, second), rows, strict=True))
    chart = compare_page.charts(replace(found, columns=columns))[0]
    text = compare_page._svg(chart, found.baseline)
    room = compare_page.WIDTH - compare_page.RIGHT
    assert f'width="{20 / 30 * room:.1f}"' in text and f'width="{10 / 30 * room:.1f}"' in text
    assert f"M{room / 3:.1f} " in text and f"H{room:.1f}" in text
    assert compare_page._best(chart) == (second.name,)


def test_the_baseline_is_in_float32(found: Comparison) -> None:
    first, second = (column.row for column in found.columns)
    small = replace(first, plan=tuple(replace(p, scheme="w4a8-g128") for p in first.plan))
    assert compare_run._baseline([small, second]) == 1
    assert compare_run._baseline([replace(first, failed="no"), small]) == 1
    assert compare_run._baseline([small, replace(second, failed="no")]) == 0


def test_the_demo_brings_its_own_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path, found: Comparison
) -> None:
    def no_fonts(task: str, count: int) -> Any:
        raise UnavailableError("fonts")

    monkeypatch.setattr("lensc.export.demo.samples.held_out_samples", no_fonts)
    manifest = load_manifest(bundle)
    demo = replace(manifest, model=replace(manifest.model, name="demo"))
    with compare_run.questions(None, demo, 3) as (source, items):
        assert source.startswith("3 pictures, shipped with the demo (more with pip install")
        assert [Path(str(item.pictures[0])).is_file() and item.answer != "" for item in items] == 3 * [True]


def test_held_out_pictures_of_the_demo_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("font_roboto", reason="pip install 'lensc[demo]'")
    monkeypatch.setattr(compare_run, "DEMO_EACH", 1)
    source, items = compare_run._of_the_demo(tmp_path)
    assert source == "held out from the demo's training"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["line-01.png", "page-01.png", "question-01.png"]
    assert all(item.answer for item in items)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        ((), 2, ("--images DIR: expected pictures to ask about; MiniCPM-Llama3-V-2_5 has none of its own",)),
        (("--images", "EMPTY"), 1, ("--images ", "holds no picture")),
        (("--images", "EMPTY/gone"), 1, ("gone: not found, expected a folder of pictures",)),
        (("--images", "PICTURES", "-n", 0), 2, ("-n 0: expected 1 to",)),
        (("--images", "PICTURES", "-p", 100000), 2, ("100000 of prompt and 32 of answer", "the model's context is")),
        (("--images", "PICTURES", "-r", 0), 2, ("-r 0: expected 1 to",)),
        (("--images", "PICTURES", "--max-pictures", 0), 2, ("--max-pictures 0: expected 1 to",)),
        (("--images", "PICTURES", "--device", "native:cpu"), 2, ("--device native:cpu: ", "not for native:cpu")),
        (("--images", "PICTURES", "--html", "nowhere/c.html"), 2, ("--html nowhere/c.html: nowhere is no folder",)),
        (("--images", "PICTURES", "--output", "/dev/null"), 2, ("--output /dev/null: is no plain file",)),
    ],
)
def test_wrong_arguments(
    arguments: tuple[object, ...],
    code: int,
    parts: tuple[str, ...],
    bundle: Path,
    pictures: Path,
    tmp_path: Path,
    cli: Cli,
) -> None:
    named = {"EMPTY": str(tmp_path), "PICTURES": str(pictures)}
    argv = [
        str(argument).replace("EMPTY", named["EMPTY"]).replace("PICTURES", named["PICTURES"]) for argument in arguments
    ]
    assert_refused(cli("compare", bundle, *argv), code, *parts)


def test_bundles_of_other_checkpoints_and_graphs_are_refused(
    bundle: Path, made: Any, pictures: Path, tmp_path: Path, cli: Cli
) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    manifest = load_manifest(other)
    write_manifest(other, replace(manifest, provenance=replace(manifest.provenance, checkpoint_sha256="0" * 64)))
    assert_refused(cli("compare", bundle, other), 1, "other/manifest.json: of another checkpoint", "000000000000…")
    assert_refused(cli("compare", made.graphs, "--images", pictures), 2, "holds no compiled graph")
    assert_refused(cli("compare", tmp_path / "gone"), 1, "gone is not a bundle")
