"""`lensc doctor`: what it says of this machine, of engines that crash, hang or compute something else, and of bundles."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lensc import doctor, installation
from lensc.backends import registry
from lensc.backends.base import Target
from lensc.backends.bundle import load_manifest, write_manifest
from lensc.profiles import probe
from lensc.runtime import checkup, tiny

Outcome = Any
"""That of conftest.py."""
NATIVE = Target("native", "cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="moves the user's folders by variables of Linux")


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Path:
    return tiny.unpack(tmp_path)["int4-g32"]


def lines_of(text: str) -> dict[str, dict[str, str]]:
    document = json.loads(text)
    return {line["name"]: line for line in document["lines"]}


def test_every_usable_engine_runs_the_tiny_model(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling for an NPU takes long and has tests of its own: test_qnn.py."""
    names = [name for name in registry.names() if name not in doctor.COMPILED_HERE]
    monkeypatch.setattr(registry, "names", lambda: names)
    outcome = cli("doctor", "--json")
    assert outcome.code == 0, outcome.out
    document = json.loads(outcome.out)
    assert document["usable"] is True
    engines = {line["name"]: line for line in document["lines"] if line["section"] == "engines"}
    probes = {f"{p.backend}:{p.processor}": p for n in names if n != doctor.ORACLE for p in registry.get(n).probe()}
    assert engines.keys() == probes.keys()
    for name, found in probes.items():
        assert engines[name]["state"] == ("ok" if found.usable else "missing"), engines[name]
        if found.usable:
            assert all(f"{scheme} in " in engines[name]["found"] for scheme in tiny.SCHEMES)
    lines = lines_of(outcome.out)
    assert {"python", "memory", "threads", "kernels", "required", "cache"} <= lines.keys()
    assert lines["required"]["state"] == "ok"
    assert all(line["fix"] for line in document["lines"] if line["state"] == "wrong")


def test_a_bundle_is_checked_artifact_by_artifact(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoder's golden probe is another model's, its vision for one engine needs another version."""
    monkeypatch.setattr(registry, "names", lambda: ("native", "onnxruntime"))
    manifest = load_manifest(tiny_bundle)
    record = next(p for p in manifest.probes if p.graph == "decoder")
    with np.load(tiny_bundle / record.file) as file:
        arrays = {name: file[name] + np.array(2 * (name == "out.logits"), file[name].dtype) for name in file.files}
    np.savez(tiny_bundle / record.file, **arrays)
    artifacts = tuple(
        dataclasses.replace(a, compatibility={"native program": "9999"})
        if (a.graph, a.target) == ("vision", NATIVE)
        else a
        for a in manifest.artifacts
        if a.target.backend in ("native", "onnxruntime", "cuda")
    )
    write_manifest(tiny_bundle, dataclasses.replace(manifest, artifacts=artifacts))
    found, problem = doctor.bundle(tiny_bundle, None, lambda text: None)
    lines = {line.name: line for line in found}
    assert lines["files"].state == "ok" and "sizes and SHA-256 are right" in lines["files"].found
    right = lines["vision on onnxruntime:cpu"]
    if platform.machine() == "x86_64":  # int8 products are compiled for one architecture
        assert right.state == "ok" and "golden probe: vision within" in right.found
    assert (
        lines["decoder on native:cpu"].state == "wrong" and "logits differs by" in lines["decoder on native:cpu"].found
    )
    other = lines["vision on native:cpu"]
    assert other.state == "wrong" and "needs native program 9999" in other.found
    assert other.fix == "lensc compile GRAPHS --target native:cpu -o BUNDLE"
    assert lines["vision on cuda:gpu"].found == "lensc knows no gpu of a backend 'cuda'"
    assert problem == f"{tiny_bundle}: no target works here for decoder"


def test_another_answer_is_found(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    write_manifest(tiny_bundle, dataclasses.replace(manifest, metadata={**manifest.metadata, tiny.ANSWER: "1 2 3 4"}))
    [outcome] = checkup.run([checkup.Job(tiny_bundle, NATIVE, tuple(manifest.graphs))], 60)
    assert outcome.kind == "ParityError" and "expected 1 2 3 4" in outcome.problem


def test_what_keeps_a_bundle_from_working_ends_with_1(
    tiny_bundle: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "engines", lambda *_: [])
    outcome = cli("doctor")
    assert outcome.code == 1 and outcome.out.splitlines()[-1] == "no engine runs the tiny model"
    manifest = load_manifest(tiny_bundle)
    write_manifest(tiny_bundle, dataclasses.replace(manifest, artifacts=(), parity=()))
    outcome = cli("doctor", tiny_bundle)
    assert outcome.code == 1 and f"fix: lensc compile {tiny_bundle} --target native:cpu -o BUNDLE" in outcome.out
    data = next((tiny_bundle / "decoder").glob("*.data"))
    data.write_bytes(b"x" + data.read_bytes()[1:])
    outcome = cli("doctor", tiny_bundle)
    assert outcome.code == 1 and f"decoder/{data.name}" in outcome.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("script", "kind", "expected"),
    [
        ("echo loading; echo driver 7 is on fire >&2; kill -SEGV $$", "crash", "SIGSEGV): driver 7 is on fire"),
        ("exec sleep 60", "timeout", "gave no answer within 0.3 s"),
        ("exit 3", "crash", "exit code 3): it said nothing"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the child is a shell script")
def test_a_child_that_dies_or_hangs_is_an_outcome(
    script: str, kind: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "python"
    child.write_text(f"#!/bin/sh\necho '{{}}'\n{script}\n")
    child.chmod(0o755)
    monkeypatch.setattr(checkup, "COMMAND", (str(child),))
    job = checkup.Job(tmp_path, NATIVE, ("vision",))
    [outcome] = checkup.run([job], 0.3 if kind == "timeout" else 60)
    assert outcome.kind == kind and expected in outcome.problem
    line = installation.Line("engines", "native:cpu", "ok", "kernels for avx2")
    assert doctor._judged(line, [("f32", outcome)]).state == "wrong"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("nowhere",), "nowhere: no such folder; expected a bundle"),
        (("--timeout", "0"), "--timeout 0: expected a number of seconds above 0"),
        (("--timeout", "soon"), "invalid float value: 'soon'"),
    ],
)
def test_wrong_usage_is_one_line(argv: tuple[str, ...], expected: str, cli: Callable[..., Outcome]) -> None:
    outcome = cli("doctor", *argv)
    assert outcome.code == 2 and expected in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.parametrize("missing", ["tokenizers", "numpy", "PIL"])
def test_a_package_that_all_engines_need_is_a_line(missing: str) -> None:
    """In a process of its own: here it is imported already."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from lensc.cli import main; sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document["usable"] is False and missing in document["problem"]
    [line] = [line for line in document["lines"] if line["section"] == "engines"]
    assert line["state"] == "wrong" and missing in line["found"] and line["fix"] == "pip install lensc"


# --- installation -------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a distribution that is nothing but its metadata."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, version: str, requires: tuple[str, ...] = (), module: str = "") -> None:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        needs = "".join(f"Requires-Dist: {text}\n" for text in requires)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        (folder / "top_level.txt").write_text(f"{module}\n")

    return install


def test_packages_that_overwrite_each_other_are_named(site: Callable[..., None]) -> None:
    site("onnxruntime_somebody", "1.0", module="onnxruntime")
    found = {line.name: line for line in installation.packages()}["onnxruntime"]
    assert found.state == "wrong" and "both bring onnxruntime and overwrite each other's files" in found.found
    assert found.fix.startswith("pip uninstall -y onnxruntime onnxruntime_somebody && pip install")


def test_a_requirement_of_a_requirement_that_is_not_met_is_named(site: Callable[..., None]) -> None:
    site("lensc_test_client", "1.0", ("lensc_test_protobuf<=6.31.1", 'numpy<1; extra == "old"'))
    site("lensc_test_protobuf", "7.0")
    assert installation.unmet(["lensc-test-client"]) == [
        ("lensc-test-client", "lensc_test_protobuf<=6.31.1", "7.0"),
    ]


def test_an_extra_is_missing_or_wrong_with_the_command(site: Callable[..., None]) -> None:
    from packaging.requirements import Requirement

    site("lensc_test_engine", "2026.1")
    old = installation._group("extra x", [Requirement("lensc_test_engine>=2026.4")], "lensc[x]", must=False)
    assert (old.state, old.fix) == ("wrong", "pip install --upgrade 'lensc[x]'")
    assert old.found == "lensc_test_engine 2026.1, expected >=2026.4"
    absent = installation._group("extra x", [Requirement("lensc_test_nobody")], "lensc[x]", must=False)
    assert (absent.state, absent.fix) == ("missing", "pip install 'lensc[x]'")


@linux
def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    line = installation._cache()
    assert line.state == "wrong" and "cannot be written" in line.found and "XDG_CACHE_HOME" in line.fix


@linux
def test_a_profile_of_another_processor_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lensc.profiles.profile import to_toml

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert installation._profile().state == "missing"
    path = tmp_path / "lensc" / "profiles" / "here.toml"
    path.parent.mkdir(parents=True)
    here = probe.device_profile(probe.machine())
    path.write_text(to_toml(here))
    assert installation._profile().state == "ok"
    path.write_text(to_toml(dataclasses.replace(here, title="another CPU")))
    line = installation._profile()
    assert (line.state, line.fix) == ("wrong", "lensc profile") and "of another CPU, this is" in line.found


def test_little_memory_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = dataclasses.replace(probe.machine(), memory_bytes=8 << 30)
    monkeypatch.setattr(probe, "free_memory", lambda: (100 << 20, 1 << 30))
    line = installation._memory(machine)
    assert line.state == "wrong" and line.found == "8.59 GB, 105 MB available, 1.07 GB swapped out"


def test_free_memory_is_read_from_proc(tmp_path: Path) -> None:
    assert probe.free_memory(tmp_path) == (None, None)
    (tmp_path / "proc").mkdir()
    text = "MemTotal: 10 kB\nMemAvailable: 4 kB\nHugePages_Total: 0\nSwapTotal: 8 kB\nSwapFree: 5 kB\n"
    (tmp_path / "proc" / "meminfo").write_text(text)
    assert probe.free_memory(tmp_path) == (4096, 3072)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("not installed; pip install 'lensc[qnn]'", ("not installed", "pip install 'lensc[qnn]'")),
        ("a; b; rebuild it here with: lensc compile X", ("a; b", "lensc compile X")),
        (
            "openvino sees no GPU: needs an Intel GPU; and more",
            ("openvino sees no GPU: needs an Intel GPU; and more", ""),
        ),
    ],
)
def test_the_command_in_a_reason_is_the_fix(reason: str, expected: tuple[str, str]) -> None:
    assert doctor.split_fix(reason) == expected
