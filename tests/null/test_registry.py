"""Backends are found by file name."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from lensc.backends import registry
from lensc.backends.base import PROCESSORS, Probe
from lensc.backends.errors import UsageError

FOLDER = Path(__file__).parents[2] / "backends"


def test_every_file_is_the_contract_or_a_backend() -> None:
    files = {path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_")}
    assert set(registry.names()) == files - registry.NOT_BACKENDS
    assert files >= registry.NOT_BACKENDS
    assert {"onnxruntime", "reference"} <= set(registry.names())


@pytest.mark.parametrize("name", registry.names())
def test_backend_is_what_its_file_says(name: str) -> None:
    backend = registry.get(name)
    assert backend is importlib.import_module(f"lensc.backends.{name}").backend
    assert backend.name == name


@pytest.mark.parametrize("name", ["tpu", "", "base", "errors", "_private", "../onnxruntime", "onnxruntime.backend"])
def test_unknown_backend_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry.get(name)
    assert str(caught.value) == f"backend {name!r} is not known; expected one of {', '.join(registry.names())}"


def test_probes_name_backend_processor_and_reason() -> None:
    probes = registry.probes()
    assert {probe.backend for probe in probes} == set(registry.names())
    for probe in probes:
        assert isinstance(probe, Probe)
        assert probe.processor in PROCESSORS
        assert probe.reason.strip() and probe.reason.isprintable()
        assert probe.state in ("runs here", "emulated", "untested")


def test_a_new_file_is_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text("class Toy:\n    name = 'toy'\n\nbackend = Toy()\n")
    (tmp_path / "_toy_part.py").write_text("")
    monkeypatch.setattr("lensc.backends.__path__", [str(tmp_path)])
    registry.names.cache_clear()
    try:
        assert registry.names() == ("toy",)
        assert registry.get("toy").name == "toy"
    finally:
        monkeypatch.undo()
        registry.names.cache_clear()
