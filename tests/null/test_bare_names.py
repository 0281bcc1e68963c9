"""The root folders are parts of `lensc` and nothing else: `kernels` is the name of another package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("runtime", "export", "backends", "kernels", "profiles", "bench")


def test_folders_are_not_importable_by_bare_name(tmp_path: Path) -> None:
    script = (
        "import importlib.util\n"
        f"for name in {FOLDERS!r}:\n"
        "    spec = importlib.util.find_spec(name)\n"
        "    print(name, spec and spec.origin)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    origins = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert origins.keys() == set(FOLDERS)
    assert {name: origin for name, origin in origins.items() if origin.startswith(str(ROOT))} == {}


def test_root_is_not_on_the_path() -> None:
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_imported_as_part_of_lensc(folder: str) -> None:
    module = __import__(f"lensc.{folder}", fromlist=["_"])
    found = Path(module.__file__ or "")
    assert found.read_bytes() == (ROOT / folder / "__init__.py").read_bytes()


def test_kernels_init_is_a_docstring() -> None:
    body = ast.parse((ROOT / "kernels/__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)
