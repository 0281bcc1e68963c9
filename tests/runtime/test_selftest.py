"""The golden probe: passes what is right, fails what is wrong, names both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from lensc.backends.base import Array
from lensc.backends.bundle import ProbeRecord
from lensc.backends.errors import ManifestError, ParityError
from lensc.export.graph import GraphSpec, TensorSpec
from lensc.runtime.selftest import check, run_selftest


class Doubler:
    """A graph that doubles its input, plus an error."""

    spec = GraphSpec(
        "vision",
        (TensorSpec("x", "float32", ("n",)),),
        (TensorSpec("y", "float32", ("n",)), TensorSpec("z", "float32", ("n",))),
        (),
        {},
    )

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        return {"y": feeds["x"] * 2, "z": feeds["x"] + self.error}

    def close(self) -> None:
        pass


PROBE = ProbeRecord("vision", "probe.npz", 1e-3)
X = np.arange(5, dtype=np.float32)


def write(folder: Path, **arrays: Array) -> Path:
    np.savez(folder / "probe.npz", **{name.replace("_", "."): a for name, a in arrays.items()})
    return folder


def test_a_right_graph_passes(tmp_path: Path) -> None:
    results = run_selftest([PROBE], {"vision": Doubler(5e-4)}, write(tmp_path, in_x=X, out_y=2 * X, out_z=X))
    assert len(results) == 1 and results[0].passed
    assert (results[0].graph, results[0].worst) == ("vision", "z")
    assert results[0].max_abs == pytest.approx(5e-4, rel=1e-2)
    check(results, {"vision": "alpha:cpu"})


@pytest.mark.parametrize("error", [2e-3, float("nan"), float("inf")])
def test_a_wrong_graph_is_refused_by_name(tmp_path: Path, error: float) -> None:
    results = run_selftest([PROBE], {"vision": Doubler(error)}, write(tmp_path, in_x=X, out_y=2 * X, out_z=X))
    assert not results[0].passed
    with pytest.raises(ParityError, match=r"vision on alpha:cpu: z differs by .*, tolerance 0.001 \(probe.npz\)"):
        check(results, {"vision": "alpha:cpu"})


def test_a_wrong_shape_fails(tmp_path: Path) -> None:
    results = run_selftest([PROBE], {"vision": Doubler()}, write(tmp_path, in_x=X, out_y=2 * X[:4]))
    assert results[0].max_abs == float("inf") and not results[0].passed


def test_probes_of_graphs_that_are_not_loaded_are_skipped(tmp_path: Path) -> None:
    assert run_selftest([PROBE], {}, tmp_path) == ()


@pytest.mark.parametrize("arrays", [{"in_x": X}, {"in_x": X, "out_w": X}, {"in_x": X, "out_y": X, "extra": X}])
def test_arrays_that_are_not_the_graph_s_are_refused(tmp_path: Path, arrays: dict[str, Array]) -> None:
    with pytest.raises(ManifestError, match=r"expected in\.<name>"):
        run_selftest([PROBE], {"vision": Doubler()}, write(tmp_path, **arrays))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 truncated"])
def test_a_damaged_probe_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "probe.npz").write_bytes(content)
    with pytest.raises(ManifestError, match=r"probe\.npz"):
        run_selftest([PROBE], {"vision": Doubler()}, tmp_path)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    objects = np.array([object()], object)
    np.savez(tmp_path / "probe.npz", **{"in.x": objects, "out.y": objects})
    with pytest.raises(ManifestError, match=r"probe\.npz"):
        run_selftest([PROBE], {"vision": Doubler()}, tmp_path)
