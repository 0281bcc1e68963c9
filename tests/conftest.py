"""What every test runs under: no folder of the root importable by its bare name, a cache folder of its own, and the
versions in the header. Where no GPU is, Triton's interpreter takes its place.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # each process has one core: read by torch and numpy as they are imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# `python -m pytest` without -P puts the working folder here, and with it the bare names (`kernels`, `export`, ...).
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    os.environ["TRITON_INTERPRET"] = "1"  # read by every kernel as it is defined


@pytest.fixture(scope="session")
def device() -> Any:
    """The torch.device that GPU kernels run on: the GPU, or the CPU in Triton's interpreter."""
    torch = pytest.importorskip("torch", reason="pip install 'lensc[cuda]'")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.importorskip("triton", reason="pip install 'lensc[cuda]'")
    from lensc.bench.gpu_sections import interpret

    interpret()
    return torch.device("cpu")


def pytest_report_header() -> list[str]:
    from lensc.profiles import probe

    found = []
    for name in ("lensc", "numpy", "pillow", "tokenizers", "onnxruntime", "torch", "onnx", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    return [", ".join(found), str(probe.machine())]


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What an earlier run kept, or the user tuned, would hide what is wrong now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _traced_once() -> Iterator[None]:
    """Builds of models alike share a traced graph, which takes torch seconds; export/test_onnx.py traces each time."""
    stages: Any = sys.modules.get("lensc.export.export_stages")
    if stages is None:  # no file that was collected builds anything
        yield
        return
    trace, kept = stages.trace_graph, {}

    def trace_graph(module: Any, example: Any, spec: Any) -> Any:
        """By all that a trace depends on: it sees no weights."""
        parts = [(name, type(part), type(part).forward, _settings(part)) for name, part in module.named_modules()]
        key = repr((spec, parts, [(name, p.shape, p.dtype) for name, p in module.state_dict().items()]))
        if key not in kept:
            kept[key] = trace(module, example, spec)
        model, parameters = kept[key]
        return model.clone(), dict(parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "trace_graph", trace_graph)
        yield


def _settings(part: Any) -> dict[str, Any]:
    """The attributes of a torch module that are its own: heads, epsilon, ..."""
    return {name: value for name, value in vars(part).items() if not name.startswith("_")}
