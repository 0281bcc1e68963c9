"""Graphs and a bundle of the golden checkpoint, made once by the command line itself."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture
def bundle(made: Made) -> Path:
    return made.bundle


@pytest.fixture
def picture() -> Path:
    return GOLDEN / "images" / "tiny64.png"


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
