"""`lensc aihub` with the real client, against a server of our own: untested against the service."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lensc import aihub as front
from lensc.backends.bundle import load_manifest, sha256_file, write_manifest
from lensc.backends.errors import UnsupportedError
from lensc.cli import main

S24 = "Samsung Galaxy S24"
PLACE = f"{S24} (14)"
UNTESTED = "untested against the service"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command: its exit code, stdout and the error it printed."""

    def run(*argv: str | Path, device: str = S24) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["aihub", *map(str, argv), "--device", device])
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "unexpected" not in err, err
        return code, out, err

    return run


def test_compile_profile_infer(hub: Any, run: Run, graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    code, text, err = run("compile", graphs, "-o", out, "--options", "--qairt_version 2.51")
    assert code == 0, err
    assert UNTESTED in text and UNTESTED in err
    manifest = load_manifest(out, verify=True)
    vision, *others = manifest.artifacts
    assert str(vision.target) == "qnn:npu:sm8650" and {str(a.target) for a in others} == {"onnxruntime:cpu"}
    assert [Path(f.path).suffix for f in vision.files] == [".onnx", ".bin"]
    assert vision.toolchain["qairt"] == "2.51.0" and vision.options["device"] == PLACE
    assert vision.scheme == "f16" and int(vision.options["patches"]) > 1
    assert vision.compatibility == {"qairt": "2.51.0", "chip": "sm8650", "soc_model": "57", "htp_arch": "75"}
    assert hub.options == ["--target_runtime precompiled_qnn_onnx --truncate_64bit_io --qairt_version 2.51"]
    assert hub.count("PUT /bucket/") > 1  # in parts
    binary = out / vision.files[1].path
    assert binary.read_bytes() == hub.files["m0000"]
    assert b"qnn-npu-sm8650.bin" in (out / vision.files[0].path).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "client.ini"]

    code, text, err = run("profile", out)
    assert code == 0, err
    (record,) = load_manifest(out, verify=True).measured
    assert (record.device, record.latency_ms, record.spread_ms, record.runs) == (PLACE, 0.057, (0.055, 1.865), 7)
    assert (record.peak_bytes, record.placement) == (43 << 20, {"cpu": 1, "npu": 7})
    assert "0.057 ms" in text and "Qualcomm AI Hub, job" in text and UNTESTED in text
    assert hub.count("POST /api/v1/models/$") == 1  # the service compiled it: nothing is uploaded again

    code, text, err = run("infer", out)
    assert code == 0, err
    found = load_manifest(out, verify=True)
    assert found.measured == (record,)
    probe, pictures = [r for r in found.parity if r.where]
    assert probe.against == "golden probe of the reference model" and pictures.against == "onnxruntime:cpu"
    assert all(r.where.startswith(f"measured on {PLACE}") and r.passed for r in (probe, pictures))
    assert (probe.pictures, pictures.pictures) == (0, 5)
    # float32 on both sides: what was padded, cut and sent really is the picture
    assert probe.sqnr_db > 100 and pictures.sqnr_db > 100 and pictures.max_abs > 0
    assert text.count(f"measured on {PLACE}") == 2
    assert run("profile", out)[0] == 0
    again = load_manifest(out)
    assert len(again.measured) == 1 and len([r for r in again.parity if r.where]) == 2


@pytest.fixture
def own(tmp_path: Path) -> tuple[str, Path]:
    """One small picture, which is faster than the golden ones."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 60, 3), np.uint8)).save(folder / "own.png")
    return "--image", folder / "own.png"


def test_own_pictures(compiled: Path, hub: Any, run: Run, tmp_path: Path, own: tuple[str, Path]) -> None:
    code, _, err = run("infer", compiled, *own)
    assert code == 0, err
    assert [r.pictures for r in load_manifest(compiled).parity if r.where] == [0, 1]
    before = hub.count("POST")
    assert run("infer", compiled, "--image", tmp_path / "none.png")[0] == 1
    assert hub.count("POST") == before


@pytest.mark.parametrize("fault", ["zeros", "nan"])
def test_wrong_outputs_are_recorded_and_fail(
    fault: str, compiled: Path, hub: Any, run: Run, own: tuple[str, Path]
) -> None:
    hub.faults = {fault}
    code, text, err = run("infer", compiled, *own)
    assert code == 1 and "FAILED" in text
    assert f"measured on {PLACE}" in err and "at least 20 dB" in err
    assert [r.passed for r in load_manifest(compiled, verify=True).parity if r.where] == [False, False]


def test_a_bundle_compiled_here_is_uploaded_once(compiled: Path, hub: Any, run: Run, own: tuple[str, Path]) -> None:
    manifest = load_manifest(compiled)
    vision, *others = manifest.artifacts
    vision = dataclasses.replace(vision, options={})
    write_manifest(compiled, dataclasses.replace(manifest, artifacts=(vision, *others)))
    assert run("profile", compiled)[0] == 0
    assert run("infer", compiled, *own)[0] == 0
    assert hub.count("POST /api/v1/models/$") == 2


# --- before anybody is asked --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not found"),
        ("[api]\napi_url = http://127.0.0.1:1\nweb_url = x\napi_token = \n", "lacks api_token"),
        ("[other]\n", "lacks api_url, web_url, api_token"),
        ("not a configuration", "cannot be read"),
    ],
    ids=["none", "empty", "other", "damaged"],
)
@pytest.mark.parametrize("verb", ["compile", "profile", "infer"])
def test_without_a_token(verb: str, text: str | None, message: str, tmp_path: Path) -> None:
    pytest.importorskip("qai_hub", reason="qai-hub is not installed; pip install 'lensc[aihub]'")
    config = tmp_path / "client.ini"
    if text is not None:
        config.write_text(text)
    more = ["-o", "out"] if verb == "compile" else []
    script = (
        "import sys, lensc.cli\n"
        f"code = lensc.cli.main({['aihub', verb, 'folder', '--device', 'x', *more]!r})\n"
        "heavy = {'qai_hub', 'torch', 'onnx', 'onnxruntime', 'requests', 'h5py'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    environment = {**os.environ, "QAIHUB_CLIENT_INI": str(config)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr and "qai-hub configure --api_token" in done.stderr


def test_without_the_client(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("profile", "bundle")
    assert code == 1 and "pip install 'lensc[aihub]'" in err


def test_unknown_device_lists_the_nearest_first(hub: Any, run: Run, graphs: Path, tmp_path: Path) -> None:
    code, _, err = run("compile", graphs, "-o", tmp_path / "bundle", device="samsung galaxy s26")
    assert code == 2
    assert "nearest of 4: Samsung Galaxy S2" in err and err.index("Galaxy S25") < err.index("Pixel 3")
    assert hub.count("POST") == 0 and not (tmp_path / "bundle").exists()


def test_chip_without_a_profile(hub: Any, run: Run, graphs: Path, tmp_path: Path) -> None:
    code, _, err = run("compile", graphs, "-o", tmp_path / "bundle", device="Samsung Galaxy Tab S8")
    assert code == 1 and "sm8450 has no profile" in err
    code, _, err = run("compile", graphs, "-o", tmp_path / "bundle", device="Google Pixel 3")
    assert code == 1 and "does not name" in err
    assert hub.count("POST") == 0


def test_bundle_for_another_chip(compiled: Path, hub: Any, run: Run) -> None:
    before = hub.count("POST")
    code, _, err = run("profile", compiled, device="Samsung Galaxy S25")
    assert code == 1 and "no vision for qnn:npu:sm8750" in err and "it has qnn:npu:sm8650, onnxruntime:cpu" in err
    assert hub.count("POST") == before


def test_damaged_bundle(compiled: Path, hub: Any, run: Run) -> None:
    path = next(compiled.glob("vision/*.bin"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    before = (compiled / "manifest.json").read_bytes()
    code, _, err = run("profile", compiled)
    assert code == 1 and "sha256" in err
    assert (compiled / "manifest.json").read_bytes() == before


def test_quantized_graphs_are_refused(hub: Any, run: Run, graphs: Path, tmp_path: Path) -> None:
    shutil.copytree(graphs, tmp_path / "graphs")
    manifest = load_manifest(tmp_path / "graphs")
    records = {name: dataclasses.replace(r, scheme="w8a8") for name, r in manifest.graphs.items()}
    write_manifest(tmp_path / "graphs", dataclasses.replace(manifest, graphs=records))
    code, _, err = run("compile", tmp_path / "graphs", "-o", tmp_path / "bundle")
    assert code == 1 and "--scheme f32" in err and hub.count("") == 0


def test_dynamic_shapes_are_not_uploaded(
    hub: Any, run: Run, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(graph: Any, path: Path) -> int:
        shutil.copy(graph.path, path)
        return 1

    monkeypatch.setattr(front, "_write_fixed", write)
    code, _, err = run("compile", graphs, "-o", tmp_path / "bundle")
    assert code == 1 and "has a dimension that is not fixed" in err
    assert hub.count("POST") == 0


# --- what goes wrong there ----------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


COMPILE_FAULTS = [
    ("job_fails", "failed: Op 'Bucketize' is not supported by QNN"),
    ("cut_upload", "goes on from here"),
    ("cut_after_job", "goes on from here"),
    ("short", "downloaded is damaged"),
    ("short_of_length", "goes on from here"),
    ("flipped", "downloaded is damaged"),
    ("wrong_soc", "SoC model 69, expected 57 of sm8650"),
    ("html", "goes on from here"),
    ("limited", "too many requests"),
]


@pytest.mark.parametrize(("fault", "message"), COMPILE_FAULTS, ids=[fault for fault, _ in COMPILE_FAULTS])
def test_compile_fault(fault: str, message: str, hub: Any, run: Run, graphs: Path, tmp_path: Path) -> None:
    """One line, nothing at OUT; the second run, without the fault, does only what is missing."""
    out = tmp_path / "bundle"
    hub.faults = {fault}
    code, _, err = run("compile", graphs, "-o", out)
    assert code == 1 and message in err, err
    assert len([line for line in err.splitlines() if line.startswith("lensc: error:")]) == 1
    assert not out.exists()
    hub.faults = set()
    uploads, jobs = hub.count("PUT /bucket/"), hub.count("POST /api/v1/jobs/$")
    code, _, err = run("compile", graphs, "-o", out)
    assert code == 0, err
    load_manifest(out, verify=True)
    again = fault in ("cut_upload", "html", "limited")
    assert (hub.count("PUT /bucket/") > uploads) == again
    asked_anew = again or fault in ("job_fails", "wrong_soc")
    assert (hub.count("POST /api/v1/jobs/$") > jobs) == (asked_anew or (fault == "cut_after_job"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "client.ini"]


def test_time_out_then_on(hub: Any, run: Run, graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    hub.faults = {"stuck"}
    started = time.monotonic()
    code, _, err = run("compile", graphs, "-o", out, "--timeout", "0.2")
    assert code == 1 and "is not done after 0 s (optimizing model)" in err and time.monotonic() - started < 10
    assert json.loads((tmp_path / "bundle.aihub.json").read_text())
    hub.faults = set()
    assert run("compile", graphs, "-o", out)[0] == 0
    assert hub.count("POST /api/v1/jobs/$") == 1 and hub.count("POST /api/v1/models/$") == 1


def test_expired_token(compiled: Path, hub: Any, run: Run, tmp_path: Path) -> None:
    config = tmp_path / "client.ini"
    config.write_text(config.read_text().replace("right", "wrong"))
    before = snapshot(compiled)
    for verb in ("profile", "infer"):
        code, _, err = run(verb, compiled)
        assert code == 1 and f"refuses the token of {config}" in err and "qai-hub configure" in err
        assert "wrong-token" not in err
    assert snapshot(compiled) == before


BUNDLE_FAULTS = [
    ("profile", "job_fails", "is not supported by QNN"),
    ("profile", "no_times", "tells no times"),
    ("profile", "cut", "goes on from here"),
    ("infer", "job_fails", "is not supported by QNN"),
    ("infer", "too_few", "of image_embeds"),
    ("infer", "short", "damaged answer"),
    ("infer", "short_of_length", "goes on from here"),
]


@pytest.mark.parametrize(("verb", "fault", "message"), BUNDLE_FAULTS, ids=[f"{v}-{f}" for v, f, _ in BUNDLE_FAULTS])
def test_bundle_fault(
    verb: str, fault: str, message: str, compiled: Path, hub: Any, run: Run, own: tuple[str, Path]
) -> None:
    more = own if verb == "infer" else ()
    before = snapshot(compiled)
    hub.faults = {fault}
    code, _, err = run(verb, compiled, *more)
    assert code == 1 and message in err, err
    assert snapshot(compiled) == before
    hub.faults = set()
    code, _, err = run(verb, compiled, *more)
    assert code == 0, err


def test_what_is_gone_from_the_service_is_made_anew(compiled: Path, hub: Any, run: Run, tmp_path: Path) -> None:
    """The compiled model was deleted: the bundle's own file is uploaded. A job was deleted: the next run asks anew."""
    for name in [name for name in hub.models if name.startswith("t")]:
        del hub.models[name]
    hub.faults = {"stuck"}
    assert run("profile", compiled, "--timeout", "0.05")[0] == 1
    hub.jobs.clear()
    hub.faults = set()
    code, _, err = run("profile", compiled)
    assert code == 1 and "is gone" in err
    assert run("profile", compiled)[0] == 0
    assert hub.count("POST /api/v1/models/$") == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": "../x"}'])
def test_foreign_file_of_jobs(text: str, compiled: Path, run: Run) -> None:
    jobs = compiled.parent / "bundle.aihub.json"
    jobs.write_text(text)
    code, _, err = run("profile", compiled)
    assert code == 1 and "remove it to begin anew" in err
    assert jobs.read_text() == text


def test_slice_that_is_too_large_for_the_artifact() -> None:
    from lensc.export.aihub_package import Interface, split

    fixed = Interface({"patches": ("float32", (1, 4, 2)), "key_bias": ("float32", (1, 4))}, ("y",))
    feeds = {"patches": np.ones((2, 3, 2), np.float32), "key_bias": np.full((2, 3), -1e4, np.float32)}
    one, other = split(feeds, fixed)
    assert one["patches"].shape == (1, 4, 2) and one["patches"][0, 3].tolist() == [0, 0]
    assert other["key_bias"].tolist() == [[-100.0] * 4]
    with pytest.raises(UnsupportedError, match=r"a slice of \[1, 5, 2\]"):
        split({**feeds, "patches": np.ones((2, 5, 2), np.float32)}, fixed)
    with pytest.raises(UnsupportedError, match="other inputs"):
        split({"patches": feeds["patches"]}, fixed)
