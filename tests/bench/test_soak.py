"""The soak: flat memory and equal answers pass, a leak and an answer that changes do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="bundles are made with torch: pip install 'lensc[export]'")
from safetensors.torch import load_file, save_file

from lensc.backends.base import Target
from lensc.bench import soak as soaking
from lensc.bench.soak import main, requests, rows_of, soak
from lensc.export.build import build
from lensc.runtime import generation
from lensc.runtime.vision import VisionEncoder

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with one layer in each tower and slices of 112 pixels, so that every picture is cut."""
    folder = tmp_path_factory.mktemp("soak")
    checkpoint = Path(shutil.copytree(GOLDEN, folder / "checkpoint", copy_function=shutil.copyfile))
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = 1
    config["slice_config"]["scale_resolution"] = 112
    preprocessor = json.loads((checkpoint / "preprocessor_config.json").read_text()) | {"scale_resolution": 112}
    for name, data in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        (checkpoint / name).write_text(json.dumps(data))
    stored = load_file(checkpoint / "model.safetensors")
    kept = {n: t for n, t in stored.items() if ".layers." not in n or ".layers.0." in n}
    save_file(kept, checkpoint / "model.safetensors")
    build(checkpoint, [Target("onnxruntime", "cpu")], folder / "bundle")
    return folder / "bundle"


def test_sixty_generations_in_a_process_of_their_own(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle), "--generations", "60"]) == 0
    said = capfd.readouterr().out
    assert f"onnxruntime:cpu: {3 * len(requests())} generations" in said and said.rstrip().endswith(": passed")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of short answers."""
    monkeypatch.setattr(soaking, "WARM_UP_ROUNDS", 1)
    monkeypatch.setattr(soaking, "TOKENS", 6)


@pytest.mark.usefixtures("short")
def test_a_leak_fails(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaked: list[bytes] = []
    each = VisionEncoder.each

    def leaking(self: VisionEncoder, *arguments: Any) -> Any:
        leaked.append(b"x" * (4 << 20))
        return each(self, *arguments)

    monkeypatch.setattr(VisionEncoder, "each", leaking)
    soaked = soak(bundle, "onnxruntime:cpu", 1, lambda line: None)
    assert soaked.generations == 2 * len(requests()) and not soaked.changed
    assert soaked.drift > 0.02 and not soaked.passed


@pytest.mark.usefixtures("short")
def test_an_answer_that_changes_fails_and_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, greedy = [0], generation.greedy

    def drifting(logits: np.ndarray[Any, Any]) -> int:
        calls[0] += 1
        return greedy(-logits if calls[0] == 100 else logits)

    monkeypatch.setattr(generation, "greedy", drifting)
    soaked = soak(bundle, "onnxruntime:cpu", 1, lambda line: None)
    assert calls[0] > 100 and not soaked.passed
    assert soaked.changed and all(line.startswith("onnxruntime:cpu: round 2: ") for line in soaked.changed)
    memory, changed = rows_of(soaked)
    assert (memory.lensc, memory.parity, changed.lensc) == (None, "fail", len(soaked.changed))
