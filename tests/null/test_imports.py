"""Start-up stays light: neither `import lensc` nor `lensc --help` loads a framework, an engine or a vendor's SDK."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    *("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "transformers", "matplotlib"),
    *("onnxruntime", "onnxruntime_qnn", "openvino", "tensorrt", "qai_hub", "cuda", "triton"),
}

IMPORT = "import lensc"
HELP = """
import contextlib, io, lensc.cli
sys.argv = ["lensc", *arguments]
with contextlib.redirect_stdout(io.StringIO()) as text:
    try:
        code = lensc.cli.main()
    except SystemExit as end:
        code = end.code
assert not code, code
assert "usage" in text.getvalue().lower(), text.getvalue()
"""
VERBS = (
    "export",
    "compile",
    "build",
    "run",
    "chat",
    "inspect",
    "profile",
    "plan",
    "bench",
    "compare",
    "devices",
    "aihub",
    "aihub compile",
)


def loaded(script: str, folder: Path) -> set[str]:
    """The top-level modules in memory after `script` ran in a fresh interpreter."""
    script = f"import sys\n{script}\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_is_light(tmp_path: Path) -> None:
    names = loaded(IMPORT, tmp_path)
    assert "lensc" in names
    assert names & HEAVY == set()


@pytest.mark.parametrize("arguments", [["--help"], *([*verb.split(), "--help"] for verb in VERBS)], ids=" ".join)
def test_help_is_light(arguments: list[str], tmp_path: Path) -> None:
    names = loaded(f"arguments = {arguments}\n{HELP}", tmp_path)
    assert names & HEAVY == set()


@pytest.mark.parametrize("module", ["backends.registry", "backends.bundle", "profiles.probe", "export.quantize.scheme"])
def test_contract_is_light(module: str, tmp_path: Path) -> None:
    assert loaded(f"import lensc.{module}", tmp_path) & HEAVY == set()


def test_listing_backends_imports_none(tmp_path: Path) -> None:
    names = loaded("from lensc.backends import registry\nassert 'onnxruntime' in registry.names()", tmp_path)
    assert names & HEAVY == set()


def test_runtime_is_free_of_torch(tmp_path: Path) -> None:
    script = "import importlib, pkgutil, lensc.runtime as r\n"
    script += "for m in pkgutil.iter_modules(r.__path__): importlib.import_module(f'lensc.runtime.{m.name}')"
    assert loaded(script, tmp_path) & HEAVY == set()
