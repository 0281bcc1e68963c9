"""The ladder: a model of fewer layers is the checkpoint's, all layers are counted, and every step has its rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lensc.backends.errors import ExecutionError, UsageError
from lensc.bench import chart, docs, ladder, record
from lensc.bench.checkpoint import write_checkpoint
from lensc.bench.ladder_torch import FewerLayers, load, whole
from lensc.export.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladder") / "checkpoint"
    write_checkpoint(folder, "small")
    return folder


def test_fewer_layers_are_the_first_of_the_checkpoint(checkpoint: Path) -> None:
    vlm, layer_bytes, most = load(checkpoint, 1)
    opened = Checkpoint(checkpoint)
    layer = [name for name in opened.tensors if name.startswith("llm.model.layers.0.")]
    assert layer_bytes == sum(4 * int(np.prod(opened.tensors[name].shape)) for name in layer)
    assert most == opened.config.num_hidden_layers > 1
    assert len(FewerLayers(opened, 1).tensors) == len(opened.tensors) - (most - 1) * len(layer)
    whole_vlm, _, _ = load(checkpoint, most)
    answers = [model.generate("What?", max_new_tokens=4, do_sample=False, num_beams=1) for model in (vlm, whole_vlm)]
    assert answers[0].token_ids != answers[1].token_ids
    with pytest.raises(UsageError, match=f"--layers {most + 1}: expected 1 to {most}"):
        load(checkpoint, most + 1)


def test_missing_layers_take_as_long_as_those_that_were_measured() -> None:
    # a layer feeds the prompt in 0.5 s and takes 0.1 s of a token; the head 0.2 s of each, the picture 7 s
    few = {"image": 0.0, "first token": 0.2 + 0.5, "decode": 1 / 0.3, "memory": 2.0}
    many = {"image": 7.0, "first token": 7.2 + 1.5, "decode": 1 / 0.5, "memory": 3.0}
    found = whole({1: few, 3: many}, layer_bytes=250_000_000, num_layers=32)
    expected = {"image": 7.0, "first token": 7.2 + 16, "decode": 1 / 3.4, "memory": 3.0 + 29 * 0.25}
    assert found == pytest.approx(expected)
    with pytest.raises(ExecutionError, match="3 layers took less time than 1: others use this machine"):
        whole({1: few, 3: {**many, "decode": 4.0}}, layer_bytes=1, num_layers=32)


def test_rows_stand_beside_the_step_before(tmp_path: Path) -> None:
    first = [{"image": 8.0, "first token": 30.0, "decode": 1.0, "memory": 34.0}] * 3
    second = [{"image": 4.0, "first token": 10.0, "decode": value, "memory": 5.0} for value in (3.0, 4.0, 8.0)]
    third = [{"image": 0.0, "first token": 0.5, "decode": 4.0, "memory": 5.0}] * 3
    rows = {row.what: row for row in ladder.rows_of({"plain": first, "small": second, "again": third}, 2.5)}
    assert rows["plain: decode"].ratio is None and rows["plain: decode"].lensc == 1.0
    assert rows["small: decode"].ratio == 4.0 and rows["small: decode"].ratio_spread == (3.0, 8.0)
    assert rows["small: memory"].ratio == 34 / 5 and rows["again: image"].lensc == 0.0
    estimated = rows[f"{ladder.ON_A_PHONE}: image"]
    assert estimated.lensc == 2.5 and estimated.parity == "none" and chart.ESTIMATED in ladder.ON_A_PHONE

    results = tmp_path / record.RESULTS
    results.mkdir(parents=True)
    record.write("ladder", f"{ladder.COMMAND} --image 28x28", list(rows.values()), results)
    table = docs.ladder(tmp_path).splitlines()
    assert table[3] == "| small | 4 s (2.00 ×) | 10 s (3.00 ×) | 4 tokens/s (4.00 ×) | 5 GB (6.80 ×) |"
    assert table[5] == f"| {ladder.ON_A_PHONE} | 2.5 s | – | – | – |"
    drawn = tmp_path / "ladder.svg"
    chart.draw_ladder(record.read(results / "ladder.json"), drawn)
    assert all(step in drawn.read_text() for step in ("plain", "small", "again", ladder.ON_A_PHONE))
