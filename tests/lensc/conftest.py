"""Graphs and a bundle of the golden checkpoint, made once by the command line itself."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lensc.backends.bundle import load_manifest, write_manifest
from lensc.cli import main

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Made:
    """Folders made by `lensc export` and `lensc compile`, and what these printed to stdout."""

    graphs: Path
    bundle: Path
    exported: dict[str, Any]
    compiled: str


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    texts = []
    for argv in (
        ["export", str(GOLDEN / "checkpoint"), "-o", str(folder / "graphs"), "--json"],
        ["compile", str(folder / "graphs"), "--target", "onnxruntime:cpu", "-o", str(folder / "bundle")],
    ):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            assert main(argv) == 0
        texts.append(text.getvalue())
    return Made(folder / "graphs", folder / "bundle", json.loads(texts[0]), texts[1])


@pytest.fixture(scope="session")
def bundles(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles for two backends each, by the one that their plan ranks first."""
    folder = tmp_path_factory.mktemp("several")
    pairs = {"onnxruntime": "native", "native": "onnxruntime", "openvino": "native"}
    names = [name for name in pairs if find_spec(name) or name == "native"]
    argv = ["compile", str(made.graphs), "-o", str(folder / "all")]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*argv, *(word for name in names for word in ("--target", f"{name}:cpu"))]) == 0
    manifest = load_manifest(folder / "all")
    for name in names:
        shutil.copytree(folder / "all", folder / name)
        two = [a for backend in (name, pairs[name]) for a in manifest.artifacts if a.target.backend == backend]
        write_manifest(folder / name, dataclasses.replace(manifest, artifacts=tuple(two)))
    return {name: folder / name for name in names}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lensc" / "placement"


@pytest.fixture
def bundle(made: Made) -> Path:
    return made.bundle


@pytest.fixture
def picture() -> Path:
    return GOLDEN / "images" / "tiny64.png"


@pytest.fixture(scope="module")
def no_profile_and_a_short_probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured of the machine takes no time, and no profile of it is there."""
    from lensc import bench_run
    from lensc.profiles import measure as rates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "PRODUCT_ROUNDS", 1000)
        patch.setattr(bench_run, "PROBE_S", 0)
        patch.setattr("lensc.profiles.profile.profile_folder", lambda: tmp_path_factory.mktemp("none"))
        yield


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process; every argument is turned into text."""

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        return Outcome(code, *capsys.readouterr())

    return run
