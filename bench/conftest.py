"""What the suite of `pytest bench` runs on: the CPU's kernels, and a bundle with the targets that are usable here.

    pytest bench --benchmark-only [--bundle build/bench-bundle] [-k int4_linear] [--benchmark-json FILE | --benchmark-compare]

Each benchmark checks what it is about to time, in the same run: a kernel against its reference, a graph by its golden probe, a
request by the tokens of the torch model. One that fails is a failed test and has no time.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# as in tests/: `python -m pytest` without -P would make the folders importable by their bare names
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

BUNDLE = "build/bench-bundle"
MAKE = "lensc build demo --target onnxruntime:cpu --target openvino:cpu --target native:cpu -o"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --bundle. Raises UsageError where pytest-benchmark is missing: without it, its options are not known either."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise pytest.UsageError("pytest-benchmark is not installed; pip install 'lensc[bench]'")
    parser.addoption(
        "--bundle", type=Path, default=Path(BUNDLE), help=f"graphs and requests are its (default: {BUNDLE})"
    )


def pytest_configure(config: pytest.Config) -> None:
    """What pytest-benchmark warns of is for whoever reads the table: another machine beside it, a resolution of the clock."""
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `target` runs on each one that the bundle was built for; where there is none, it fails."""
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", _targets(metafunc.config.getoption("bundle")), ids=str, scope="session")


def _targets(folder: Path) -> list[Any]:
    """The bundle's, or what is wrong with it in their place."""
    from lensc.backends.bundle import load_manifest
    from lensc.backends.errors import LensError

    try:
        return list(dict.fromkeys(artifact.target for artifact in load_manifest(folder).artifacts))
    except LensError as error:
        return [pytest.param(f"{error}; build it: {MAKE} {folder}", id="no-bundle")]


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Path:
    """The folder that --bundle names."""
    found: Path = request.config.getoption("bundle")
    return found


@pytest.fixture(scope="session")
def usable(target: Any) -> Any:
    """`target`, if its backend can be used here; skips with the reason if not, fails without a bundle."""
    from lensc.backends import registry

    if isinstance(target, str):
        pytest.fail(target, pytrace=False)
    found = next(p for p in registry.get(target.backend).probe() if p.processor == target.processor)
    if not found.usable:
        pytest.skip(f"{target}: {found.reason}")
    return target


@pytest.fixture(scope="session")
def machine() -> Iterator[Any]:
    """The compiled kernels for this CPU's best instruction set, on all cores; skips where there are none."""
    from lensc.backends.errors import UnavailableError
    from lensc.bench.kernels import machine_of
    from lensc.profiles import probe

    try:
        yield machine_of(None, probe.machine().cores)
    except UnavailableError as error:
        pytest.skip(str(error))
