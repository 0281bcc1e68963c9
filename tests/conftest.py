"""What every test runs under: no folder of the root importable by its bare name, and the versions in the header."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# `python -m pytest` without -P puts the working folder here, and with it the bare names (`kernels`, `export`, ...).
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def pytest_report_header() -> list[str]:
    from lensc.profiles import probe

    found = []
    for name in ("lensc", "numpy", "pillow", "tokenizers", "onnxruntime", "torch", "onnx", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    return [", ".join(found), str(probe.machine())]
