"""`lensc bench` as a user meets it: figures of a real bundle, a record that is verified, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lensc import bench_record, bench_run, bench_tables, benching
from lensc.backends.base import Target
from lensc.backends.bundle import load_manifest, write_manifest
from lensc.bench_record import Figure, Placed, Record, moved
from lensc.cli import main
from lensc.runtime.measure import Values
from lensc.runtime.result import Metrics

GOLDEN = Path(__file__).parents[1] / "golden"
PICTURE = GOLDEN / "images" / "tiny64.png"
Cli = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("no_profile_and_a_short_probe")


@pytest.fixture(scope="module")
def recorded(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of the golden bundle, made by the command itself."""
    path = tmp_path_factory.mktemp("bench") / "old.json"
    asked = ["-p", "5,40", "-n", "3", "-r", "4", "--image", str(PICTURE), "--image", "none", "--device", "all"]
    assert main(["bench", str(made.bundle), *asked, "--output", str(path)]) == 0
    return path


@pytest.fixture
def record(recorded: Path) -> Record:
    return bench_record.read(recorded)


def assert_refused(shown: Any, code: int, *parts: str) -> None:
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("lensc: error: ") and "bug in lensc" not in line
    assert [part for part in parts if part not in line] == [], line
    assert shown.code == code


# --- measuring ----------------------------------------------------------------------------------------------------


def test_a_record_holds_every_request(record: Record, bundle: Path) -> None:
    assert [(Path(row.image).name, row.slices, row.text_tokens, row.new_tokens) for row in record.rows] == [
        ("tiny64.png", 1, 5, 3),
        ("tiny64.png", 1, 40, 3),
        ("none", 0, 5, 3),
        ("none", 0, 40, 3),
    ]
    seen, *_, text = record.rows
    assert seen.prompt_tokens > 5 and text.prompt_tokens == 40
    assert set(seen.figures) == set(bench_record.NAMES) and set(text.figures) == set(bench_record.NAMES) - {"image_ms"}
    for row in record.rows:
        assert [len(f.values) for name, f in row.figures.items() if name != "peak_memory_bytes"].count(4) >= 3
        assert row.where == "onnxruntime:cpu" and [p.state for p in row.plan] == 2 * ["runs here"] and not row.failed
        assert row.figures["decode_tokens_s"].limit
        assert row.figures["peak_memory_bytes"].median > 20e6
        first, prefill = row.figures["ttft_ms"], row.figures["prefill_tokens_s"]
        assert all(a > row.prompt_tokens / b * 1e3 for a, b in zip(first.values, prefill.values, strict=True))
    assert record.bundle.manifest_sha256 == bench_run.sha256_file(bundle / "manifest.json")
    assert record.settings.images[0].sha256 == bench_run.sha256_file(PICTURE)
    assert {"lensc", "numpy", "onnxruntime"} <= set(record.versions) and record.probed["bandwidth_gb_s"][0] > 0
    assert record.command.startswith("lensc bench ")


def test_every_format_tells_the_same(record: Record) -> None:
    rows = bench_tables.flat(record)
    assert [json.loads(line) for line in bench_tables.as_jsonl(record).splitlines()] == rows
    table = list(csv.DictReader(io.StringIO(bench_tables.as_csv(record))))
    assert [row["ttft_ms"] for row in table] == [str(row["ttft_ms"]) for row in rows]
    assert table[2]["image_ms"] == "" and table[0]["vision_target"] == "onnxruntime:cpu"
    text = bench_tables.markdown(record)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1
    for row in record.rows:
        assert str(row.figures["decode_tokens_s"]) in text
    for said in ("no token is guessed ahead", "caches are emptied", "4 runs after 1", "golden probes passed"):
        assert said in text


def test_what_crashes_while_it_is_measured_has_no_figures(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    subject = bench_run.Subject(bundle, manifest, "onnxruntime:cpu", 1)
    cases = bench_run.cases_of(manifest, bundle, ["none"], [4], [2])

    def report(text: str, part: tuple[int, int] | None) -> None:
        if part == (3, 4):
            assert subject.contender is not None
            os.kill(subject.contender._process.pid, signal.SIGKILL)

    assert bench_run.measure([subject], cases, 3, 1, 0, report, lenient=False)
    assert "ended with -9" in subject.failed and len(subject.runs[cases[0]]) == 1
    roof = bench_run.roof_of(bundle, 1, {"bandwidth_gb_s": (1.0, 2.0)}, {})
    row = bench_run.row_of(subject, cases[0], roof)
    assert (row.figures, row.failed, row.skipped) == ({}, subject.failed, False)


def test_a_graph_that_fails_its_probe_gets_no_figures(bundle: Path, tmp_path: Path, cli: Cli) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = load_manifest(folder)
    file = folder / next(probe.file for probe in manifest.probes if probe.graph == "decoder")
    with np.load(file) as arrays:
        changed = {name: array + np.float32(1) if name == "out.logits" else array for name, array in arrays.items()}
    np.savez(file, **changed)
    write_manifest(folder, manifest)
    shown = cli("bench", folder, "-p", 4, "-n", 2, "--json")
    (row,) = json.loads(shown.out)["rows"]
    assert shown.code == 1 and row["figures"] == {} and "self-test failed: decoder" in row["failed"]


def test_a_target_that_cannot_run_here_is_no_failure_unless_it_was_asked_for(
    bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = load_manifest(folder)
    elsewhere = tuple(replace(a, target=Target.parse("openvino:npu")) for a in manifest.artifacts)
    write_manifest(folder, replace(manifest, artifacts=(*elsewhere, *manifest.artifacts)))
    asked = ("bench", folder, "-p", 4, "-n", 2, "-r", 1, "--warmup", 0, "--image", "none")
    shown = cli(*asked, "--device", "all", "--output", tmp_path / "new.json")
    npu, cpu = bench_record.read(tmp_path / "new.json").rows
    assert shown.code == 0 and npu.skipped and npu.figures == {} and "decode_tokens_s" in cpu.figures
    assert "not here" in shown.out and "- no figures for openvino:npu: nothing runs for openvino:npu" in shown.out
    assert_refused(cli(*asked, "--device", "openvino:npu"), 1, "nothing runs for openvino:npu")


def test_a_time_that_an_emulation_is_part_of_is_none(record: Record, bundle: Path) -> None:
    manifest = load_manifest(bundle)
    subject = bench_run.Subject(bundle, manifest, "", 1)
    subject.plan = (
        Placed("vision", "qnn:npu:sm8650", "f16", "emulated", ""),
        Placed("decoder", "native:cpu", "f32", "runs here", ""),
    )
    case = bench_run.Case("64x64", (1024,), 4, 2, 20)
    told: dict[str, Any] = dict.fromkeys((field.name for field in fields(Metrics)), 0)
    told |= {"image_ms": (9e3,), "prefill_ms": 2.0, "ttft_ms": 9e3, "decode_tokens_per_s": 50.0, "prompt_tokens": 20}
    run = Metrics(**told | {"new_tokens": 2, "notes": (), "events": ()})
    subject.runs, subject.peaks = {case: [run, run]}, {case: 10**9}
    row = bench_run.row_of(subject, case, bench_run.roof_of(bundle, 1, {"bandwidth_gb_s": (1.0, 2.0)}, {}))
    assert set(row.figures) == {"prefill_tokens_s", "decode_tokens_s"}
    text = bench_tables.markdown(replace(record, rows=(*record.rows, row)))
    assert "9000" not in text and text.count("emulated") >= 4
    assert "vision on qnn:npu:sm8650 is emulated: its times are none of the device's" in text


def test_limits_and_predictions_stand_beside_the_figures(record: Record, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "box.toml").write_text(
        'name = "box"\ntitle = "a box"\n\n[[processors]]\nkind = "cpu"\narch = "x86_64"\ndtypes = ["float32", "int8"]\n'
        + "".join(
            f'{name} = {{ value = {value}, source = "measured", reference = "here" }}\n'
            for name, value in (("bandwidth_gb_s", 40), ("achieved_gb_s", 30))
        )
        + 'achieved_tops.float32 = { value = 0.2, source = "measured", reference = "here" }\n'
        + 'peak_tops.float32 = { value = 0.5, source = "measured", reference = "here" }\n'
    )
    manifest = load_manifest(bundle)
    reached = {"bandwidth_gb_s": (100.0, 90.0), "float32_tops": (0.3, 0.4)}
    roof = bench_run.roof_of(bundle, 1, reached, bench_run.profile_of(str(tmp_path / "box.toml"), 1))
    # weights that may lie in a cache are held against what was probed
    assert {name: known.value for name, known in roof.known().items()} == {
        "cpu bandwidth_gb_s": 100,
        "cpu peak_tops.float32": 0.5,
    }
    (case, *_) = bench_run.cases_of(manifest, bundle, ["64x64"], [40], [8])
    most, expected = roof.of(case, record.rows[0].plan)
    assert set(most) == {"image_ms", "prefill_tokens_s", "decode_tokens_s"} and set(expected) == {*most, "ttft_ms"}
    read = roof.stored.decoder_bytes(roof.model)
    assert 0.5 * 100e9 / read < most["decode_tokens_s"] < 100e9 / read
    assert expected["image_ms"] > most["image_ms"] and expected["decode_tokens_s"] < most["decode_tokens_s"]
    row = record.rows[0]
    figure = Figure((50.0, 40.0, 60.0), limit=100.0, predicted=55.0)
    shown = bench_tables.markdown(replace(record, rows=(replace(row, figures={"decode_tokens_s": figure}),)))
    assert "decode 50 %" in shown and "50.0 ± 10.0" in shown and "+10 %" in shown
    assert bench_record.of_limit("image_ms", Figure((20.0,), limit=5.0)) == 0.25


def test_placements_stand_beside_the_first(record: Record) -> None:
    first = replace(record.rows[0], figures={"ttft_ms": Figure((10.0, 20.0, 30.0))})
    plan = tuple(replace(p, target="native:cpu") for p in first.plan)
    other = replace(first, device="native:cpu", plan=plan, figures={"ttft_ms": Figure((5.0, 5.0, 30.0))})
    tuned = (replace(plan[0], reason="best usable: runs here; tuned: 1 thread"), plan[1])
    assert "vision on native:cpu, tuned: 1 thread" in bench_tables.markdown(
        replace(record, rows=(replace(other, plan=tuned),))
    )
    text = bench_tables.markdown(replace(record, rows=(first, other)))
    assert "native:cpu : onnxruntime:cpu" in text and "2.00 (1.00 to 4.00)" in text and "placements took turns" in text


# --- verifying ----------------------------------------------------------------------------------------------------


def doctored(recorded: Path, times: float) -> str:
    """The record as if the machine had been so many times faster."""
    document = json.loads(recorded.read_text())
    for row in document["rows"]:
        for name, figure in row["figures"].items():
            factor = times if name in bench_record.HIGHER_IS_BETTER else 1 / times
            figure["values"] = [value * factor for value in figure["values"]]
    document["versions"]["numpy"] = "1.0"
    return json.dumps(document)


@pytest.mark.parametrize(("times", "code", "how"), [(1e6, 1, "worse"), (1e-6, 0, "better")])
def test_a_record_is_measured_again(
    times: float, code: int, how: str, recorded: Path, record: Record, tmp_path: Path, cli: Cli
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(doctored(recorded, times))
    shown = cli("bench", "--verify", old, "--json", "--output", new)
    document = json.loads(shown.out)
    assert shown.code == code, shown.err
    assert {change["moved"] for change in document["changes"]} == {how} and document["worse"] == (code == 1)
    assert any(text.startswith("version of numpy: 1.0 -> ") for text in document["differences"])
    again = bench_record.read(new)
    assert [row.key for row in again.rows] == [row.key for row in record.rows]
    assert again.settings.devices == ("onnxruntime:cpu",) and again.settings.images == record.settings.images


@pytest.mark.parametrize(
    ("name", "old", "new", "how"),
    [
        ("ttft_ms", (10, 11, 11, 12), (13, 14, 15, 90), "worse"),
        ("ttft_ms", (13, 14, 14, 15), (9, 10, 11, 12), "better"),
        ("decode_tokens_s", (9, 10, 11, 12), (13, 14, 15, 16), "better"),
        ("decode_tokens_s", (13, 14, 15, 16), (9, 10, 11, 12), "worse"),
        ("ttft_ms", (10, 11, 11, 12), (12, 14, 15, 16), "same"),  # they meet
        ("ttft_ms", (100, 101, 102, 102), (103, 104, 105, 105), "same"),  # within the tolerance
        ("ttft_ms", (10, 11, 12), (20, 21, 22, 23), "not judged"),
        ("peak_memory_bytes", (100,), (109,), "same"),
        ("peak_memory_bytes", (100,), (112,), "worse"),
    ],
)
def test_what_moves_beyond_the_noise(name: str, old: tuple[float, ...], new: tuple[float, ...], how: str) -> None:
    assert moved(name, old, new) == how
    assert moved(name, old, new, tolerance=10) in ("same", "not judged")


def test_a_figure_that_is_gone_is_worse(record: Record) -> None:
    gone = replace(record, rows=tuple(replace(row, figures={}, failed="it crashed") for row in record.rows))
    made = bench_tables.changes(record, gone)
    assert {change.moved for change in made} == {"worse"} and len(made) == sum(len(row.figures) for row in record.rows)
    assert "worse: no figure anymore" in bench_tables.compared(made, [], 0.05)
    assert {change.moved for change in bench_tables.changes(record, record)} <= {"same", "not judged"}


def test_what_differs_is_named(record: Record) -> None:
    assert bench_record.differences(record, record) == []
    other = replace(
        record,
        machine=replace(record.machine, cores=99),
        versions={**record.versions, "onnxruntime": "1.0"},
        bundle=replace(record.bundle, manifest_sha256="0" * 64),
        probed={name: (value / 2, value / 2) for name, (value, _) in record.probed.items()},
    )
    tuned = tuple(replace(p, reason=f"{p.reason}; tuned: 1 thread") for p in record.rows[0].plan)
    other = replace(other, rows=(replace(record.rows[0], plan=tuned),))
    found = "; ".join(bench_record.differences(record, other))
    assert "placement vision on onnxruntime:cpu: f32, runs here -> f32, runs here, 1 thread" in found
    for part in ("machine cores: ", "version of onnxruntime: ", "bundle manifest_sha256: ", "reached bandwidth_gb_s: "):
        assert part in found
    assert "000000000000…" in found


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("-n", 0), 2, ("-n 0: expected numbers of tokens from 1 on",)),
        (("-p", "16,x"), 2, ("-p 16,x: expected numbers",)),
        (("-p", 100000), 2, ("100000 of prompt and 32 of answer are", "the model's context is")),
        (("-r", 0), 2, ("-r 0: expected 1 to",)),
        (("--warmup", -1), 2, ("--warmup -1: expected 0 to",)),
        (("--threads", 0), 2, ("--threads 0: expected 1 to",)),
        (("--prompt-lookup-num-tokens", 8), 2, ("--prompt-lookup-num-tokens 8: expected 0 to 7",)),
        (("--device", "toaster:cpu"), 2, ("--device toaster:cpu: ", "has vision for onnxruntime:cpu, not for toaster")),
        (("--device", "cpu"), 2, ("target 'cpu': expected backend:processor",)),
        (("--device", "all", "--device", "native:cpu"), 2, ("--device all with --device native:cpu: choose one",)),
        (("--image", "gone.png"), 1, ("gone.png: cannot be read",)),
        (("--image", str(GOLDEN)), 1, ("golden: cannot be read",)),
        (("--image", "99999x99999"), 1, ("99999x99999 has", "scale it down")),
        (("-o", "xml"), 2, ("invalid choice: 'xml'",)),
        (("--output", "nowhere/b.json"), 2, ("nowhere is no folder that can be written to",)),
        (("--output", "/dev/null"), 2, ("/dev/null: is no plain file",)),
        (("--profile", "sm8651"), 2, ("'sm8651' is not known",)),
        (("--verify", "old.json", "--no-tuned"), 2, ("with --no-tuned: the settings are those of the record",)),
        (("--tolerance", 5), 2, ("--tolerance is for --verify",)),
    ],
)
def test_wrong_arguments(
    arguments: tuple[object, ...], code: int, parts: tuple[str, ...], bundle: Path, cli: Cli
) -> None:
    assert_refused(cli("bench", bundle, *arguments), code, *parts)


def test_without_a_bundle(tmp_path: Path, cli: Cli) -> None:
    assert "--json with -o csv: choose one" in cli("bench", tmp_path, "-o", "csv", "--json").err
    assert_refused(cli("bench"), 2, "expected a BUNDLE, or a record with --verify")
    assert_refused(cli("bench", tmp_path / "gone"), 1, "gone is not a bundle")


FOREIGN: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "not JSON"),
    "truncated": (lambda text: text[: len(text) // 2], "not JSON"),
    "foreign": (lambda text: '[{"n_prompt": 512}]', "no record of lensc bench"),
    "newer": (lambda text: text.replace('"lensc_bench": 1', '"lensc_bench": 2'), "record format 2 is newer"),
    "a field more": (lambda text: text.replace('"in_turn"', '"turns": 1, "in_turn"'), "a damaged record"),
    "no rows": (lambda text: json.dumps(json.loads(text) | {"rows": []}), "it holds no measurement"),
    "negative": (lambda text: doctored_with(text, -1.0), "expected positive numbers"),
    "another checkpoint": (lambda text: text.replace(json.loads(text)["bundle"]["checkpoint_sha256"], "0" * 64), "another checkpoint"),
    "another target": (lambda text: text.replace("onnxruntime:cpu", "native:cpu"), "not for native:cpu"),
}  # fmt: skip


def doctored_with(text: str, value: float) -> str:
    document = json.loads(text)
    document["rows"][0]["figures"]["ttft_ms"]["values"][0] = value
    return json.dumps(document)


@pytest.mark.parametrize("name", FOREIGN)
def test_bad_record(name: str, recorded: Path, tmp_path: Path, cli: Cli) -> None:
    change, part = FOREIGN[name]
    path = tmp_path / "old.json"
    path.write_text(change(recorded.read_text()))
    shown = cli("bench", "--verify", path)
    assert_refused(shown, 2 if name == "another target" else 1, part)


def test_verify_takes_its_settings_from_the_record(recorded: Path, tmp_path: Path, cli: Cli) -> None:
    assert_refused(cli("bench", "--verify", recorded, "-p", 4), 2, "with --prompt-tokens: the settings are those of")
    assert_refused(cli("bench", "--verify", recorded, "-o", "csv"), 2, "with -o csv")
    assert_refused(cli("bench", "--verify", recorded, "--tolerance", -1), 2, "--tolerance -1: expected 0 to 1000")
    assert_refused(cli("bench", "--verify", tmp_path / "gone.json"), 1, "gone.json: cannot be read")


def test_figures_are_shown_where_the_record_cannot_be_written(
    record: Record, bundle: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.json").write_text("kept")
    monkeypatch.setattr(benching, "measured", lambda *_: record)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk does, this ends the writing
    try:
        shown = cli("bench", bundle, "--output", tmp_path / "out.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert shown.code == 1 and str(record.rows[0].figures["ttft_ms"]) in shown.out
    assert shown.err.startswith(f"lensc: error: {tmp_path / 'out.json'}: not written: ") and shown.err.count("\n") == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.json": "kept"}


def test_values_that_are_one_have_no_spread() -> None:
    assert str(Values((12345.6,))) == "1.23e+04" and Values((3.0,)).spread == 0
