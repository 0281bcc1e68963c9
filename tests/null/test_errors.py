"""The error tree is the one its docstring draws, and says which exit code each error has."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from lensc.backends import errors

ROOT = Path(__file__).parents[2]
CLASSES = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}


def outline() -> dict[str, str]:
    """Name → name of the parent, read from the tree in the docstring."""
    parents: dict[str, str] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip("│├└─ ").split(" ")[0]
        if not name.endswith("Error"):
            continue
        depth = (len(line) - len(line.lstrip("│├└─ "))) // 4
        above = [*above[:depth], name]
        parents[name] = above[-2] if depth else "Exception"
    return parents


def test_docstring_is_the_tree() -> None:
    assert outline() == {name: cls.__bases__[0].__name__ for name, cls in CLASSES.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_exit_code(name: str) -> None:
    assert CLASSES[name].exit_code == (2 if name == "UsageError" else 1)


def test_all_are_caught_as_one() -> None:
    assert all(issubclass(cls, errors.LensError) for cls in CLASSES.values())


@pytest.mark.parametrize("folder", ["runtime", "export", "backends", "kernels", "profiles", "bench"])
def test_nothing_catches_everything(folder: str) -> None:
    """`except Exception` hides bugs as "unsupported". Only the command line does it, to print a line and no traceback."""
    found = []
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            bare = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if bare and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
