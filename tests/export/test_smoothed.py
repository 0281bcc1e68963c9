"""Smoothing: the float model stays what it is, and a vision tower with outlier channels survives products in 8 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'lensc[export]'")
import torch
from safetensors.torch import load_file, save_file

from lensc.backends.base import Target
from lensc.backends.bundle import Manifest
from lensc.backends.errors import ParityError, UsageError
from lensc.export.build import build, export_checkpoint
from lensc.export.calibration import calibration_set
from lensc.export.checkpoint import Checkpoint
from lensc.export.memory import Limit
from lensc.export.models.session import torch_sessions
from lensc.export.quantize.recipe import Recipe, resolve
from lensc.export.smoothed import SmoothedCheckpoint, find_smoothing
from lensc.export.source import Source
from lensc.export.verify import probe_feeds
from lensc.runtime.prompt import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
ORT = Target("onnxruntime", "cpu")
CHANNELS, TIMES = [5, 23], 60.0
NORMS = {"layer_norm1": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "layer_norm2": ("mlp.fc1",)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with one layer in each tower and slices of 112 pixels, and two channels behind each norm of
    the vision layer 60 times as large, which the linears that read them take back: the same function, hard to round.
    """
    folder = tmp_path_factory.mktemp("checkpoint") / "outliers"
    shutil.copytree(GOLDEN, folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = 1
    config["slice_config"]["scale_resolution"] = 112
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**preprocessor, "scale_resolution": 112}))
    weights = load_file(folder / "model.safetensors")
    weights = {n: t for n, t in weights.items() if ".layers." not in n or ".layers.0." in n}
    for norm, readers in NORMS.items():
        layer = "vpm.encoder.layers.0"
        for kind in ("weight", "bias"):
            weights[f"{layer}.{norm}.{kind}"][CHANNELS] *= TIMES
        for reader in readers:
            weights[f"{layer}.{reader}.weight"][:, CHANNELS] /= TIMES
    save_file(weights, folder / "model.safetensors")
    return folder


def recipe(folder: Path, smooth: bool) -> str:
    path = folder / f"smooth-{smooth}.toml"
    path.write_text(
        f"format = 1\nsmooth = {str(smooth).lower()}\n[activations]\nvision = 8\n"
        '[weights]\n"vpm.*" = "w8"\n"resampler.*" = "w8"\n'
    )
    return str(path)


def test_the_float_model_stays_what_it_is(checkpoint: Path, tmp_path: Path) -> None:
    plain = Checkpoint(checkpoint)
    spec = plain.model_spec()
    data = calibration_set(spec, Tokenizer.from_file(plain.tokenizer))
    record = find_smoothing(plain, spec, data, tmp_path / "factors.safetensors", Limit().check)
    assert record.norms == record.smoothed == 2 and record.error < record.error_before / 3
    factors = load_file(tmp_path / "factors.safetensors")
    for found in factors.values():
        others = torch.ones(len(found), dtype=torch.bool)
        others[CHANNELS] = False
        assert float(found[CHANNELS].min()) > 5 * float(found[others].max())
    smoothed = SmoothedCheckpoint(plain, tmp_path / "factors.safetensors")
    feeds = probe_feeds(torch_sessions(plain.load_model())["vision"].spec)
    before, after = (torch_sessions(c.load_model())["vision"].run(feeds)["image_embeds"] for c in (plain, smoothed))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    name = "vpm.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(smoothed.rows(name, 3, 9), smoothed.tensor(name)[3:9])
    changed = [n for n in plain.tensors if not torch.equal(plain.tensor(n).float(), smoothed.tensor(n).float())]
    assert len(changed) == 2 * 2 + 4


def sqnr_db(manifest: Manifest) -> float:
    """Of the vision graph on the engine, against the reference with the recipe's weights."""
    (found,) = [r for r in manifest.parity if (r.graph, r.target) == ("vision", "onnxruntime:cpu")]
    return found.sqnr_db


def test_outliers_that_ruin_the_engines_products_are_in_the_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the exported graph and ONNX Runtime's integer products, in memory and streamed."""
    with pytest.raises(ParityError, match=r"SQNR 1\d\.\d dB"):
        build(checkpoint, [ORT], tmp_path / "plain", scheme=recipe(tmp_path, smooth=False))
    smooth = build(checkpoint, [ORT], tmp_path / "smooth", scheme=recipe(tmp_path, smooth=True))
    assert sqnr_db(smooth) > 30
    assert smooth.metadata["smoothing"].startswith("2 of 2 norms; error")
    assert smooth.provenance.checkpoint_sha256 == Checkpoint(checkpoint).sha256
    assert "smooth = true" in smooth.metadata["recipe"]
    monkeypatch.setattr(Source, "is_streamed", True)
    streamed = export_checkpoint(checkpoint, tmp_path / "g", scheme=recipe(tmp_path, smooth=True))
    assert streamed.graphs["vision"].sha256 == smooth.graphs["vision"].sha256


def test_smoothing_is_for_products_in_eight_bits(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="smooth: is for products in 8 bits, expected activations: vision = 8"):
        Recipe("r", smooth=True)
    path = tmp_path / "r.toml"
    path.write_text("format = 1\nsmooth = 1\n")
    with pytest.raises(UsageError, match="smooth is 1, expected true or false"):
        resolve(str(path))
