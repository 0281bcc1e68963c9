"""The benchmark at full size, on a bundle that is small: our server, taking turns, ratios, the chart."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lensc.backends.base import Target
from lensc.backends.errors import ExecutionError, InputError
from lensc.bench import chart, demo, full_size, record, turns
from lensc.contender import Contender
from lensc.export.build import build

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "bundle"
    build(GOLDEN / "checkpoint", [Target.parse("onnxruntime:cpu")], folder)
    return folder


def start(bundle: Path, graph: str, folder: Path) -> Contender:
    return Contender(graph, [sys.executable, "-P", "-m", "lensc.bench.serve", str(bundle), graph], folder)


def test_servers_take_turns(bundle: Path, tmp_path: Path) -> None:
    with start(bundle, "decoder", tmp_path) as decoder, start(bundle, "vision", tmp_path) as vision:
        assert 0 < decoder.load_s < 60
        for line in ("prefill 12", "decode 3"):
            answer = decoder.ask(line)
            assert answer["what"] == line and answer["seconds"] > 0
        assert vision.seconds("vision") > 0
        assert 1e6 < decoder.peak_bytes() < 4e9


def test_memory_is_not_that_of_the_parent(bundle: Path, tmp_path: Path) -> None:
    held = np.ones(300 << 20, np.uint8)
    with start(bundle, "vision", tmp_path) as vision:
        assert vision.peak_bytes() < held.nbytes


def test_quality_is_judged_against_float_features(bundle: Path, tmp_path: Path) -> None:
    """The bundle is float32: its own features are met to rounding, features with noise of a hundredth at 40 dB."""
    import lensc

    picture = np.random.default_rng(3).integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    with lensc.load(bundle) as vlm:
        features = np.concatenate([vlm._vision.encode([p]).embeds for p in picture])
    noise = np.random.default_rng(4).normal(size=features.shape)
    noise *= 1e-2 * np.linalg.norm(features) / np.linalg.norm(noise)
    for name, wanted in (("own", features), ("noisy", features + noise)):
        np.savez(tmp_path / f"{name}.npz", pictures=picture, image_embeds=wanted)
    with start(bundle, "vision", tmp_path) as vision:
        assert vision.ask(f"sqnr {tmp_path / 'own.npz'}")["db"] > 80
        assert math.isclose(vision.ask(f"sqnr {tmp_path / 'noisy.npz'}")["db"], 40, abs_tol=0.1)


def test_a_benchmark_that_is_ended_ends_its_servers(tmp_path: Path) -> None:
    """A server is stopped while nobody asks it: it would never see the end of its input."""
    server = 'import os, sys; print(\'{"load_seconds": 0, "pid": %d}\' % os.getpid(), flush=True); sys.stdin.read()'
    script = f"""
import pathlib, signal, subprocess, sys
from lensc.contender import Contender, end_with_us
end_with_us()
with Contender("one", [sys.executable, "-c", {server!r}], pathlib.Path({str(tmp_path)!r})) as one:
    print(one._process.pid, flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        server_pid = int(benchmark.stdout.readline())
        benchmark.terminate()
        assert benchmark.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(server_pid, 0)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match=r"decoder: ended with 1: error: .*manifest\.json.*decoder\.log"):
        start(tmp_path, "decoder", tmp_path)


def test_bytes_of_a_token_are_those_of_the_decoder(bundle: Path) -> None:
    weights = 4 * sum(math.prod(array.shape) for name, array in load_file(GOLDEN / "checkpoint/model.safetensors").items()
                      if name.startswith("llm.") and "embed_tokens" not in name)  # fmt: skip
    assert weights < demo.decoder_bytes(bundle) < 1.5 * weights
    assert sum(f.stat().st_size for f in place(bundle).files("decoder", "onnxruntime")) == demo.decoder_bytes(bundle)


def place(bundle: Path) -> full_size.Place:
    return full_size.Place(bundle.parent, 2, 1)


def test_ratios_are_of_runs_that_followed_each_other() -> None:
    ours, theirs = [1.0, 4.0, 4.0], [1.0, 8.0, 2.0]
    row = turns.compared("x", "s", ours, theirs, "other")
    assert (row.lensc, row.rival_value, row.ratio, row.ratio_spread) == (4.0, 2.0, 1.0, (0.5, 2.0))
    assert turns.compared("x", "tokens/s", ours, theirs, "other").ratio_spread == (0.5, 2.0)


def test_decibels_have_no_quotient() -> None:
    assert record.Row("x", "dB", 30.0, rival="other", rival_value=20.0).ratio is None


def test_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'lensc[demo]')")
    rows = [{"what": "decode", "unit": "tokens/s", "lensc": 3.0, "rival": "it", "rival_value": 2.0, "ratio": 1.5}]
    found = {"machine": {"cpu": "a processor"}, "rows": rows}
    for name in ("a.svg", "b.svg"):
        chart.draw([found], tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert "1.50×  (3 against 2 tokens/s)" in text and text == (tmp_path / "b.svg").read_text()
    assert "a processor" not in text
    chart.draw([found, {"machine": {"cpu": "another"}, "rows": rows}], tmp_path / "two.svg")
    assert {"a processor", "another"} <= set(re.findall(">([^<>]+)</text>", (tmp_path / "two.svg").read_text()))
    with pytest.raises(InputError, match="no row"):
        chart.draw([found | {"rows": []}], tmp_path / "c.svg")


def test_the_chart_names_rivals_where_there_are_several() -> None:
    rows = [
        {"what": "decode", "rival": "one, int4"},
        {"what": "decode", "rival": "other"},
        {"what": "load", "rival": "one"},
    ]
    assert [chart._label(row, rows) for row in rows] == ["decode / one", "decode / other", "load"]


def test_what_comes_along_and_breaks_the_rival_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(full_size, "run", lambda command, environment=None: ran.append(command))
    place = full_size.Place(tmp_path, 2, 1)
    full_size.prepare_rivals(place, [("openvino", "openvino_decoder")])
    _, torch, others, removed, build = ran
    assert torch[-1] == full_size.TORCH and others[-1] == full_size.ENVIRONMENTS["openvino"][-1]
    assert removed[-4:] == ["uninstall", "-qq", "--yes", "torchvision"]
    assert build[-1] == str(place.model("openvino_decoder"))
