"""Run pytest with another build of the compiled kernels in the place of the installed one, however that is found.

python tests/kernels/with_module.py build/sanitize/_cpu.*.so -q tests/kernels
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys

import pytest

NAME = "lensc.kernels._cpu"


def main(path: str, *arguments: str) -> int:
    loader = importlib.machinery.ExtensionFileLoader(NAME, path)
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[NAME])
    return int(pytest.main(list(arguments)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
