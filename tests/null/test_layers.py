"""Who may import whom, read from the source. `LAYERS` is the table; everything else here enforces it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("lensc", "runtime", "export", "backends", "kernels", "profiles", "bench")

ENGINES = frozenset(
    {"onnxruntime", "onnxruntime_qnn", "openvino", "tensorrt", "qai_hub", "cuda", "onnx", "onnx_ir", "google"}
)
"""What only an engine's own module may import, and only inside its functions (google: protobuf, for onnx's errors)."""

CONTRACT = (
    "backends.errors",
    "backends.codec",
    "backends.base",
    "backends.bundle",
    "backends.registry",
    "backends.load_options",
    "backends.compiling",
    "backends.files",
)
PICTURES_AND_WORDS = tuple(
    f"runtime.{name}"
    for name in (
        "picture",
        "picture_source",
        "vision",
        "prompt",
        "kv_cache",
        "sampling",
        "beam",
        "pipeline",
        "embedding",
    )
)
EVERYTHING = frozenset({"*"})


@dataclass(frozen=True)
class Layer:
    """What a module may import: `ours` by dotted name without `lensc.`, a folder standing for all in it."""

    ours: tuple[str, ...] | frozenset[str]
    anywhere: frozenset[str] = frozenset()
    in_functions: frozenset[str] = frozenset()
    siblings: bool = True
    """Whether it may import all of its own folder; if not, only what `ours` names, and its own `_parts`."""


# The longest key that is the module or a package around it counts.
LAYERS = {
    "lensc": Layer(EVERYTHING, in_functions=frozenset({"numpy", "PIL", "tokenizers", "packaging"})),
    "runtime": Layer(
        (
            *(
                "backends.base",
                "backends.bundle",
                "backends.codec",
                "backends.errors",
                "backends.files",
                "backends.load_options",
                "backends.registry",
            ),
            "export.graph",
            "profiles",
        ),
        anywhere=frozenset({"numpy", "PIL", "tokenizers"}),
    ),
    "backends": Layer(
        (
            *("backends.base", "backends.bundle", "backends.codec", "backends.errors", "backends.load_options"),
            *("backends.compiling", "backends.files", "export.graph", "export.quantize.scheme", "profiles", "kernels"),
        ),
        anywhere=frozenset({"numpy"}),
        in_functions=ENGINES,
        siblings=False,
    ),
    **{
        module: Layer((*CONTRACT, "export.graph"), anywhere=frozenset({"numpy"}), siblings=False) for module in CONTRACT
    },
    "backends.errors": Layer((), siblings=False),
    "backends.codec": Layer(("backends.errors",), siblings=False),
    "backends.files": Layer(("backends.errors",), siblings=False),
    "backends.load_options": Layer(("backends.errors",), siblings=False),
    "backends.compiling": Layer(("backends.base",), siblings=False),
    "export": Layer(
        ("kernels", "profiles", *CONTRACT, *PICTURES_AND_WORDS),
        anywhere=frozenset({"numpy", "PIL", "tokenizers", "torch", "onnx", "onnxscript", "onnx_ir", "safetensors"}),
    ),
    "export.demo": Layer(
        ("kernels", "profiles", *CONTRACT, *PICTURES_AND_WORDS),
        anywhere=frozenset({"numpy", "PIL", "tokenizers", "torch", "safetensors"}),
        in_functions=frozenset({"matplotlib", "fontTools"}),
    ),
    # the client of AI Hub, and what it and onnx raise
    "export.aihub_service": Layer(
        ("profiles", *CONTRACT),
        anywhere=frozenset({"numpy"}),
        in_functions=frozenset({"qai_hub", "google", "requests", "botocore", "s3transfer"}),
    ),
    "export.aihub_package": Layer(CONTRACT, anywhere=frozenset({"numpy", "onnx"}), in_functions=frozenset({"google"})),
    "export.graph": Layer((), siblings=False),
    "export.question_folder": Layer((*CONTRACT, "runtime.picture"), siblings=False),
    "export.quantize.scheme": Layer(("backends.errors",), siblings=False),
    "kernels": Layer((), anywhere=frozenset({"numpy"}), in_functions=frozenset({"torch", "triton"})),
    # Imported by nobody but who has a GPU, inside functions.
    **{
        f"kernels.{operator}.gpu": Layer(("kernels",), anywhere=frozenset({"numpy", "torch", "triton"}))
        for operator in ("activation", "attention", "linear", "norm", "rope")
    },
    "profiles": Layer(("backends.errors", "backends.codec")),
    "profiles.measure": Layer(("backends.errors", "kernels"), anywhere=frozenset({"numpy"})),
    "bench": Layer(EVERYTHING, anywhere=frozenset({"numpy", "PIL"}), in_functions=EVERYTHING),
    "kernels.nvrtc": Layer(("backends.errors",), in_functions=frozenset({"cuda"})),
    # the parts of backends.cuda, which imports them to load an artifact
    **{
        f"backends._cuda_{part}": Layer(
            (
                *("backends.base", "backends.errors", "backends.files", "backends._program", "export.graph", "kernels"),
                *(f"backends._cuda_{other}" for other in ("plan", "session", "weights")),
            ),
            anywhere=frozenset({"numpy", "torch"}),
            siblings=False,
        )
        for part in ("plan", "session", "weights")
    },
    "backends.cuda": Layer(
        (
            *("backends.base", "backends.errors", "backends.load_options", "export.graph"),
            *("export.quantize.scheme", "kernels"),
            *(f"backends._cuda_{part}" for part in ("plan", "session", "weights")),
            *(f"backends._program{part}" for part in ("", "_artifact", "_file", "_lower", "_weights")),
        ),
        in_functions=frozenset({"torch"}),
        siblings=False,
    ),
    # the parts of bench.gpu, which imports them when it is known that there is a GPU
    **{
        f"bench.gpu_{part}": Layer(EVERYTHING, anywhere=frozenset({"numpy", "PIL", "torch"}), in_functions=EVERYTHING)
        for part in ("clock", "kernels", "model", "parity", "program", "torch")
    },
    # pytest imports them by their paths, so that there is no package for a relative import
    **{
        f"bench.{suite}": Layer(EVERYTHING, anywhere=frozenset({"numpy", "PIL", "pytest"}), in_functions=EVERYTHING)
        for suite in ("conftest", "test_graphs", "test_kernels", "test_requests")
    },
}


@dataclass(frozen=True)
class Import:
    line: int
    name: str
    relative: bool
    lazy: bool
    """Inside a function, or for type checkers only."""


def modules() -> dict[str, Path]:
    """Import name → file, for every module of ours."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts if folder == "lensc" else ("lensc", *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, source: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of module `name`; `from a import b` is `a.b` where that is a module of ours, else `a`."""
    tree = ast.parse(source)
    lazy = {id(inner) for node in ast.walk(tree) if _defers(node) for inner in ast.walk(node)}
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets, relative = {alias.name for alias in node.names}, False
        elif isinstance(node, ast.ImportFrom):
            relative = node.level > 0
            above = package[: len(package) - node.level + 1] if relative else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
        else:
            continue
        yield from (Import(node.lineno, target, relative, id(node) in lazy) for target in sorted(targets))


def _defers(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return True
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def folder_of(name: str) -> str:
    """The root folder of a module of ours; the front door's modules are in `lensc`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "lensc"


def layer_of(name: str) -> Layer:
    """The entry of `LAYERS` for a module: the longest key that is the module or a package around it."""
    short = name.removeprefix("lensc.") if folder_of(name) != "lensc" else "lensc"
    return LAYERS[max((key for key in LAYERS if f"{short}.".startswith(f"{key}.")), key=len)]


def violations(name: str, source: str, is_package: bool = False) -> list[str]:
    """What module `name` imports and may not."""
    layer = layer_of(name)
    found = []
    for item in imports(name, source, is_package):
        at = f"{name}:{item.line}: imports {item.name}"
        if item.name.split(".")[0] == "lensc":
            short = item.name.removeprefix("lensc.")
            same_folder = folder_of(item.name) == folder_of(name)
            if item.relative and not same_folder:
                found.append(f"{at}: expected an absolute import")
            elif (
                "pytest" not in layer.anywhere
                and not item.relative
                and item.name.rpartition(".")[0] == name.rpartition(".")[0] != "lensc"
            ):
                found.append(f"{at}: expected a relative import")
            elif not (same_folder and (layer.siblings or "._" in short)) and not _covers(layer.ours, short):
                found.append(f"{at}, which its layer may not")
        elif (top := item.name.split(".")[0]) not in sys.stdlib_module_names:
            if top in layer.anywhere or (item.lazy and _covers(layer.in_functions, top)):
                continue
            later = not item.lazy and _covers(layer.in_functions, top)
            found.append(f"{at}{': only inside functions' if later else ', which its layer may not'}")
    return found


def _covers(allowed: tuple[str, ...] | frozenset[str], name: str) -> bool:
    return allowed == EVERYTHING or any(f"{name}.".startswith(f"{entry}.") for entry in allowed)


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_allowed(name: str) -> None:
    path = MODULES[name]
    assert violations(name, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("lensc.runtime.plan", "import torch", "imports torch, which its layer may not"),
        ("lensc.runtime.plan", "def f():\n    import onnxruntime", "onnxruntime, which its layer may not"),
        ("lensc.runtime.plan", "import lensc.backends.onnxruntime", "which its layer may not"),
        ("lensc.runtime.plan", "from lensc.backends import onnxruntime", "onnxruntime, which its layer may not"),
        ("lensc.runtime.plan", "from lensc.export.models import minicpmv", "minicpmv, which its layer may not"),
        ("lensc.runtime.plan", "from lensc.runtime.beam import x", "expected a relative import"),
        ("lensc.runtime.plan", "from ..backends.errors import x", "expected an absolute import"),
        ("lensc.backends.onnxruntime", "import onnxruntime", "only inside functions"),
        ("lensc.backends.onnxruntime", "from .registry import get", "registry, which its layer may not"),
        ("lensc.backends.onnxruntime", "def f():\n    import torch", "torch, which its layer may not"),
        ("lensc.backends.errors", "from .base import Target", "which its layer may not"),
        ("lensc.backends.base", "from lensc.runtime import plan", "which its layer may not"),
        ("lensc.export.graph", "import numpy", "numpy, which its layer may not"),
        ("lensc.export.onnx", "from lensc.bench import record", "which its layer may not"),
        ("lensc.export.onnx", "def f():\n    import transformers", "transformers, which its layer may not"),
        ("lensc.profiles.probe", "import numpy", "numpy, which its layer may not"),
        ("lensc.profiles.measure", "from lensc.backends import native", "native, which its layer may not"),
        ("lensc.kernels.rope.reference", "import torch", "only inside functions"),
        ("lensc.kernels.rope.gpu", "import onnxruntime", "onnxruntime, which its layer may not"),
        ("lensc.kernels", "from lensc.export import graph", "which its layer may not"),
        ("lensc.cli", "import numpy", "only inside functions"),
        ("lensc", "import torch", "torch, which its layer may not"),
        ("lensc.bench.demo", "import torch", "only inside functions"),
    ],
)
def test_violation_is_found(name: str, source: str, expected: str) -> None:
    assert len(found := violations(name, source)) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lensc.runtime.plan", "from lensc.backends import registry"),
        ("lensc.runtime.plan", "from . import beam\nfrom .beam import x\nimport numpy.typing"),
        ("lensc.backends.onnxruntime", "def f():\n    import onnxruntime"),
        ("lensc.backends.onnxruntime", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnxruntime"),
        ("lensc.backends.onnxruntime", "from .errors import UnavailableError\nfrom ._onnxruntime_options import x"),
        ("lensc.export.verify", "import torch\nfrom lensc.runtime.prompt import Tokenizer"),
        ("lensc.bench.demo", "def f():\n    import transformers"),
        ("lensc.kernels.rope.gpu", "import torch\nimport triton.language as tl"),
        ("lensc.cli", "def f():\n    from lensc.export import build"),
    ],
)
def test_permitted_import_is_not(name: str, source: str) -> None:
    assert violations(name, source) == []


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_files_are_short(folder: str) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > 500} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_typed(folder: str) -> None:
    assert (ROOT / folder / "py.typed").is_file()
