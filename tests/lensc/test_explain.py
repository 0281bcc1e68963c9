"""`lensc explain` on a bundle with an artifact for an NPU, its parts made by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lensc.backends.base import Target, file_record
from lensc.backends.bundle import load_manifest, write_manifest
from lensc.cli import main


@pytest.fixture
def bundle(made: Any, tmp_path: Path) -> Path:
    """The golden bundle, whose vision graph has an artifact for a phone with two nodes on the CPU."""
    folder = tmp_path / "bundle"
    shutil.copytree(made.bundle, folder)
    manifest = load_manifest(folder)
    path = folder / "vision" / "qnn-npu-sm8650.placement.json"
    where = {"a": ["MatMul", "QNNExecutionProvider"], "b": ["Mish", "CPUExecutionProvider"]}
    path.write_text(json.dumps(where))
    first = next(a for a in manifest.artifacts if a.graph == "vision")
    npu = dataclasses.replace(
        first,
        target=Target("qnn", "npu", "sm8650"),
        files=(*first.files, file_record(path, folder)),
        placement={"QNNExecutionProvider": 7, "CPUExecutionProvider": 1},
    )
    write_manifest(folder, dataclasses.replace(manifest, artifacts=(*manifest.artifacts, npu)))
    return folder


def test_every_node_is_shown_those_elsewhere_first(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(bundle), "--target", "qnn:npu:sm8650"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("vision for qnn:npu:sm8650: ")
    assert lines[0].endswith("; 1 on the CPU")
    assert lines[1].split()[:3] == ["b", "Mish", "CPUExecutionProvider"]
    assert "allowed by name" in lines[1]
    assert lines[2].split() == ["a", "MatMul", "QNNExecutionProvider"]


def test_it_is_a_gate(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(bundle), "--max-cpu-nodes", "1"]) == 0
    assert main(["explain", str(bundle), "--max-cpu-nodes", "0"]) == 1
    assert "at most 0 are allowed: vision for qnn:npu:sm8650: 1" in capsys.readouterr().err
    assert main(["explain", str(bundle), "--max-cpu-nodes", "0", "--target", "onnxruntime:cpu"]) == 0


def test_a_program_reads_the_same(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [a["cpu_nodes"] for a in document["artifacts"]] == [0, 0, 1]
    assert document["artifacts"][2]["nodes"][1]["operator"] == "Mish"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-cpu-nodes", "-1"], "expected 0 or more"),
        (["--target", "alpha:cpu"], "no artifact for alpha:cpu; it was built for onnxruntime:cpu, qnn:npu:sm8650"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    bundle: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(bundle), *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_placement_is_one_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle / "vision" / "qnn-npu-sm8650.placement.json"
    path.write_text("[" + " " * (path.stat().st_size - 2) + "]")
    assert main(["explain", str(bundle)]) == 1
    assert "no placement of nodes" in capsys.readouterr().err
