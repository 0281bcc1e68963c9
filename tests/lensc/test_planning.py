"""`lensc profile` and `lensc plan` as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lensc import planning
from lensc.backends.errors import UsageError
from lensc.export.quantize.recipe import EMBEDDING, FLOAT, HEAD, PRESETS
from lensc.export.quantize.scheme import NAMED, Scheme
from lensc.profiles import measure, probe, profile

GOLDEN = Path(__file__).parents[1] / "golden"
Cli = Callable[..., Any]

SMALL: dict[str, float] = {
    "READ_BYTES": 1 << 20,
    "POOL_BYTES": 1 << 22,
    "PRODUCT_ROUNDS": 1000,
    "TRIES": 2,
    "RUNS": 2,
    "SECONDS": 0,
    "CALLS": 200,
    "PATCHES": 64,
    "WIDTH": 128,
    "INNER": 256,
    "HEADS": 2,
    "HIDDEN": 256,
    "KV": 128,
    "MLP": 512,
    "LAYERS": 2,
    "PROMPT": 32,
    "DECODER_LAYER_WEIGHTS": 2 * 256**2 + 2 * 256 * 128 + 3 * 256 * 512,
    "VISION_LAYER_OPERATIONS": 10**7,
}
"""Sizes at which everything is measured in a moment, and means nothing."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Small sizes, and a data folder of our own, which is returned."""
    for name, value in SMALL.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(profile, "profile_folder", lambda: tmp_path / "data/lensc/profiles")
    monkeypatch.setattr("lensc.profiles.folders.profile_folder", lambda: tmp_path / "data/lensc/profiles")
    return tmp_path / "data/lensc/profiles"


def assert_refused(shown: Any, code: int, *parts: str) -> None:
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("lensc: error: ") and "bug in lensc" not in line
    assert [part for part in parts if part not in line] == [], line
    assert shown.code == code


# --- profile ------------------------------------------------------------------------------------------------------


def test_profile_is_measured_kept_and_used(small: Path, cli: Cli) -> None:
    assert_refused(cli("plan", planning.OFFICIAL), 2, "this machine has no profile yet; run lensc profile")
    shown = cli("profile")
    assert shown.code == 0, shown.err
    assert "memory read" in shown.out and f"written to {small / 'here.toml'}" in shown.out
    (cpu,) = profile.get("here").processors
    assert cpu.bandwidth_gb_s is not None and cpu.bandwidth_gb_s.source == "measured"
    assert [rates.threads for rates in cpu.by_threads] == sorted({1, probe.machine().cores})
    assert "float32" in cpu.achieved_tops
    if measure.kernels() is not None:
        assert {"int4", "int8"} <= set(cpu.achieved_tops) and cpu.achieved_gb_s is not None
        assert cpu.attention_tops is not None and "attention, prefill" in shown.out
        assert set(cpu.overheads_us) == {"call", "step"}
        assert "unknown: " not in cli("plan", planning.OFFICIAL, "--scheme", "int4").out
    assert not list(small.glob("*.partial"))


def test_profile_goes_where_it_is_told(small: Path, cli: Cli, tmp_path: Path) -> None:
    shown = cli("profile", "--threads", 1, "--json", "-o", tmp_path / "mine.toml")
    document = json.loads(shown.out)
    assert document["file"] == str(tmp_path / "mine.toml")
    assert profile.load_profile(tmp_path / "mine.toml").name == document["profile"]["name"] == "mine"
    assert not small.exists()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("--threads", 0), 2, ("--threads 0: expected 1 to",)),
        (("--threads", 100000), 2, ("--threads 100000: expected 1 to",)),
        (("-o", "mine.json"), 2, ("mine.json: expected a file that ends in .toml",)),
        (("-o", "nowhere/mine.toml"), 2, ("nowhere is no folder",)),
    ],
)
def test_wrong_profile_arguments(arguments: tuple[object, ...], code: int, parts: tuple[str, ...], cli: Cli) -> None:
    assert_refused(cli("profile", *arguments), code, *parts)


def test_profile_that_cannot_be_written_leaves_the_old_one(small: Path, cli: Cli) -> None:
    small.mkdir(parents=True)
    (small / "here.toml").mkdir()
    assert_refused(cli("profile"), 1, "here.toml: not written: ")
    assert [path.name for path in small.iterdir()] == ["here.toml"]


@pytest.mark.usefixtures("small")
def test_without_compiled_kernels_numpy_is_measured(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "kernels", lambda: None)
    shown = cli("profile", "-o", tmp_path / "plain.toml")
    assert "without the compiled kernels only numpy is measured" in shown.out
    (cpu,) = profile.load_profile(tmp_path / "plain.toml").processors
    assert set(cpu.achieved_tops) == {"float32"} and cpu.peak_tops == {} and cpu.achieved_gb_s is None


@pytest.mark.skipif(measure.kernels() is None, reason="needs the compiled kernels")
@pytest.mark.usefixtures("small")
def test_layers_compute_what_they_say() -> None:
    """Outputs are numbers, and reads count a row's weights."""
    compiled = measure.kernels()
    rows = measure.decoder_layers(compiled, 1, 8, measure.random_bytes(1 << 22))
    assert rows.amount == 2 * 8 * 2 * SMALL["DECODER_LAYER_WEIGHTS"]
    row = measure.decoder_layers(compiled, 1, 1, measure.random_bytes(1 << 22))
    outputs = 2 * (2 * 256 + 2 * 128 + 2 * 512 + 256)
    assert row.amount == SMALL["DECODER_LAYER_WEIGHTS"] * (1 / 2 + 1 / measure.GROUP) * 2 + 4 * outputs
    assert row.rate() > 0 and measure.vision_layer(compiled, 1).rate() > 0
    assert measure.prompt_attention(compiled, 1).rate() > 0


# --- plan ---------------------------------------------------------------------------------------------------------


def test_plan_of_the_published_model(cli: Cli) -> None:
    shown = cli("plan", planning.OFFICIAL, "--profile", "sm8650", "--scheme", "int4")
    assert shown.code == 0, shown.err
    assert "Snapdragon 8 Gen 3 (sm8650), predicted, not measured" in shown.out
    assert "10 slices, 1012 tokens with the question" in shown.out
    assert "rests on: npu vision: achieved_tops.float16" in shown.out
    assert "unknown: npu prefill: the profile has no achieved_tops.int4" in shown.out


def test_plan_as_json_of_several_devices(cli: Cli) -> None:
    document = json.loads(
        cli("plan", planning.OFFICIAL, "--profile", "h200", "--profile", "core-ultra-2", "--json").out
    )
    h200, ultra = document["plans"]
    assert [one["scheme"] for one in h200["predictions"]] == list(NAMED)
    assert {one["processor"] for one in ultra["predictions"]} == {"cpu", "gpu", "npu"}
    assert all(one["rests_on"] for one in h200["predictions"])


def test_plan_of_a_checkpoint_needs_its_config_alone(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((GOLDEN / "checkpoint/config.json").read_bytes())
    shown = cli("plan", tmp_path, "--profile", "h100", "--scheme", "f32", "--image", "64x64")
    assert shown.code == 0, shown.err
    assert "1 slices" in shown.out


def test_plan_of_a_bundle_counts_its_bytes(bundle: Path, cli: Cli) -> None:
    document = json.loads(cli("plan", bundle, "--profile", "h100", "--image", "64x64", "--json").out)
    (one,) = document["plans"][0]["predictions"]
    assert "weights counted from the bundle's bytes" in document["basis"]
    assert one["scheme"] == "f32" and one["decode_tokens_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("nothing",), 2, ("nothing: expected a checkpoint's folder or config.json, a bundle, or minicpm",)),
        ((planning.OFFICIAL, "--profile", "sm8651"), 2, ("'sm8651' is not known; expected one of sm8650, ",)),
        (
            (planning.OFFICIAL, "--profile", "h200", "--scheme", "in4"),
            2,
            ("'in4' is not known; expected one of int4, ",),
        ),
        ((planning.OFFICIAL, "--profile", "h200", "--image", "wide"), 2, ("--image wide: expected WIDTHxHEIGHT",)),
        (
            (planning.OFFICIAL, "--profile", "h200", "--context", 1000),
            2,
            ("--context 1000: picture and question have",),
        ),
        (
            (planning.OFFICIAL, "--profile", "h200", "--prompt-tokens", -1),
            2,
            ("--prompt-tokens -1: expected at least",),
        ),
        ((planning.OFFICIAL, "--profile", "none.toml"), 1, ("none.toml: cannot be read",)),
    ],
)
def test_wrong_plan_arguments(arguments: tuple[object, ...], code: int, parts: tuple[str, ...], cli: Cli) -> None:
    assert_refused(cli("plan", *arguments), code, *parts)


def test_scheme_of_a_bundle_is_not_chosen(bundle: Path, cli: Cli) -> None:
    assert_refused(cli("plan", bundle, "--profile", "h200", "--scheme", "int4"), 2, "of a bundle are stored already")


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"model_type": "llama"}'])
def test_foreign_config_is_refused(content: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert_refused(cli("plan", tmp_path, "--profile", "h200"), 1, "config.json: ")


@pytest.mark.parametrize("content", ["", "x", "name = 1", 'name = "a"\ntitle = "A"\nprocessors = []'])
def test_foreign_profile_is_refused(content: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(content)
    assert_refused(cli("plan", planning.OFFICIAL, "--profile", tmp_path / "a.toml"), 1, "a.toml: ")


# --- schemes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NAMED))
def test_bits_are_those_of_the_recipes(name: str) -> None:
    recipe, stored = PRESETS[name], planning.named_schemes()[name]

    def bits(weight: str) -> float:
        format = recipe.format_of(weight)
        if format is None:
            return 32.0
        scheme = Scheme(format.bits, format.group_size, format.symmetric, 32, scale_bits=format.scale_bits)
        return planning.bits_of(scheme)

    assert stored.vision_bits == bits("vpm.encoder.layers.0.mlp.fc1.weight")
    assert stored.layer_bits == bits("llm.model.layers.0.mlp.down_proj.weight")
    inner = bits("llm.model.layers.0.mlp.gate_proj.weight")
    assert inner == (stored.layer_bits if stored.gate_and_up_bits is None else stored.gate_and_up_bits)
    assert stored.head_bits == bits(HEAD)
    assert stored.embedding_bits == bits(EMBEDDING)
    assert stored.vision_integers == (recipe.activations.get("vision") == 8)
    assert stored.decoder_integers == (recipe.activations.get("decoder") == 8)
    assert (stored.kv_bits < 16) == (recipe.kv_bits == 8)
    assert FLOAT == "f32"


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(UsageError, match="expected one of int4"):
        planning.model_of(planning.OFFICIAL, ["int4x"])
