"""What is said of a chip's binary: who must refuse it, what failed has no figure, and the record names its command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import pytest

from lensc.backends._qnn_chip import chips
from lensc.backends.base import Artifact, FileRecord, Target
from lensc.backends.errors import CompatibilityError, ExecutionError, UsageError
from lensc.bench import docs, qnn, record
from lensc.export.build import resolve_checkpoint
from lensc.export.checkpoint import Checkpoint
from lensc.export.graph import Graph

CHIPS = sorted(chips())


class Loader:
    """A backend that takes the binaries for which `takes` is true."""

    def __init__(self, takes: Any) -> None:
        self.takes = takes
        self.offered: list[tuple[str, str]] = []

    def load(self, artifact: Artifact, spec: object, bundle: Path) -> None:
        self.offered.append((artifact.target.arch, artifact.compatibility["chip"]))
        if not self.takes(artifact):
            raise CompatibilityError("another chip's")


def artifact(chip: str) -> Artifact:
    target = Target("qnn", "npu", chip)
    return Artifact(
        "vision",
        target,
        "w8a16",
        (FileRecord("a", 0, ""),),
        {},
        {},
        {"chip": chip} | chips()[chip].provider_options,
        {},
    )


def bench(loader: Loader) -> qnn.Bench:
    graph = cast(Graph, argparse.Namespace(spec=None))
    return qnn.Bench(cast(Any, loader), graph, (), 0.0, 0)


def test_each_binary_is_offered_to_every_other_chip_under_its_name_and_under_theirs(tmp_path: Path) -> None:
    loader = Loader(lambda _: False)
    qnn.refused(bench(loader), {"sm8650": artifact("sm8650")}, tmp_path)
    others = [chip for chip in CHIPS if chip != "sm8650"]
    assert sorted(loader.offered) == sorted([(o, "sm8650") for o in others] + [(o, o) for o in others])


@pytest.mark.parametrize("lies", [False, True])
def test_a_chip_that_takes_anothers_binary_ends_the_benchmark(tmp_path: Path, lies: bool) -> None:
    loader = Loader(lambda a: a.target.arch == "sm8750" and (a.compatibility["chip"] == "sm8750") == lies)
    with pytest.raises(ExecutionError, match="sm8750 took the binary of sm8650"):
        qnn.refused(bench(loader), {"sm8650": artifact("sm8650")}, tmp_path)


def test_chips_are_named_and_unknown_ones_refused() -> None:
    assert qnn._expanded(["all"], "--chip", CHIPS) == CHIPS
    assert qnn._expanded(["sm8750", "sm8750"], "--chip", CHIPS) == ["sm8750"]
    with pytest.raises(UsageError, match=r"--emulate sm8750: expected all or one of sm8650"):
        qnn._expanded(["sm8750"], "--emulate", ["sm8650"])


def test_bad_flags_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert qnn.main(["demo", "--chip", "sm1"]) == UsageError("").exit_code
    assert "error: --chip sm1: expected all or one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        qnn.main(["demo", "--layers", "0"])
    assert "--layers 0: expected at least 1" in capsys.readouterr().err


def test_the_command_says_what_was_asked_for_and_not_where(tmp_path: Path) -> None:
    options = argparse.Namespace(
        checkpoint=str(tmp_path / "checkpoint"), graph="vision", scheme="w8a16-vision", layers=2, context=None,
        samples=None, chip=["sm8650"], emulate=["all"],
    )  # fmt: skip
    wanted = "python -m lensc.bench.qnn checkpoint --graph vision --scheme w8a16-vision --layers 2 --chip sm8650 --emulate all"
    assert qnn.command_of(options) == wanted


def test_a_chip_has_a_line_and_what_differs_no_figure() -> None:
    rows: list[dict[str, Any]] = [
        record.Row("sm8650: off the NPU", "nodes", 0.0).to_json(),
        record.Row("sm8650: both", "s", 61.5, limit=600.0).to_json(),
        record.Row("qcs6490: off the NPU", "nodes", 0.0).to_json(),
        record.Row("qcs6490: slice image_embeds", "dB", None, parity="fail").to_json(),
    ]
    shown = docs.npu_table(rows)
    assert shown.splitlines() == [
        "| chip | off the NPU | both | slice image_embeds |",
        "|---|---|---|---|",
        "| `sm8650` | 0 | 61.5 s of 600 | – |",
        "| `qcs6490` | 0 | – | **wrong** |",
    ]


def test_a_cut_graph_keeps_so_many_layers() -> None:
    config = Checkpoint(resolve_checkpoint("demo")).config
    assert qnn.cut(config, "decoder", 1).num_hidden_layers == 1
    kept = qnn.cut(config, "vision", 1).vision.num_hidden_layers
    assert kept == 1 + config.drop_vision_last_layer
