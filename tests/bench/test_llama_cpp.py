"""llama.cpp as a rival: what is asked of it without the library, and with it a tiny model that answers."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lensc.bench import full_size
from lensc.bench.rivals import llama_cpp_decoder as rival
from lensc.contender import Contender

SCRIPT = full_size.RIVALS / "llama_cpp_decoder.py"
CONFIG = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 1024,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
MISSING = [name for name in ("llama_cpp", "gguf", "safetensors") if importlib.util.find_spec(name) is None]
needs_llama_cpp = pytest.mark.skipif(
    bool(MISSING), reason=f"{' and '.join(MISSING)} not installed; install with: {rival.INSTALL}"
)


def run(*arguments: str, code: int) -> str:
    """What the script says on stderr when it ends with `code`."""
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=full_size._outside(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of 32 small layers, every value of its own."""
    folder, random = tmp_path_factory.mktemp("checkpoint"), np.random.default_rng(5)
    weights = {
        rival.PREFIX + name: (0.05 * random.normal(size=shape)).astype(np.float16)
        for name, shape in rival.tensors_of(CONFIG).values()
    }
    save_file(weights, folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_what_is_installed_is_what_a_missing_library_asks_for() -> None:
    told = shlex.split(rival.INSTALL)
    assert told[-5:] == list(full_size.ENVIRONMENTS["llama"])
    assert told[: len(full_size.COMPILED)] == [f"{name}={value}" for name, value in full_size.COMPILED.items()]


def test_a_missing_library_is_one_line_with_the_command() -> None:
    with pytest.raises(
        SystemExit, match=r"^error: No module named 'no_such_module'; install .*: CMAKE_ARGS=.* pip install"
    ):
        rival.require("no_such_module")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("build", "a", "b", "--type", "Q5_K"), "argument --type: invalid choice: 'Q5_K'"),
        (("build", "a"), "the following arguments are required: out"),
        (("serve", "a", "--threads", "two"), "argument --threads: invalid int value: 'two'"),
        ((), "the following arguments are required: verb"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in run(*arguments, code=2)


def test_a_variant_is_made_by_the_script_it_is_one_of() -> None:
    script, label = full_size.SMALLER
    name, told = full_size.VARIANTS[script]
    assert full_size.file_of(script) == SCRIPT == full_size.file_of(name)
    assert told == ("--type", label.removeprefix("llama.cpp ")) and told[1] in rival.TYPES
    place = full_size.Place(Path("x"), 2, 1)
    assert place.model(script) != place.model(name)


def test_the_environment_is_compiled_and_the_variants_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[list[str], dict[str, str] | None]] = []

    def note(command: list[str], environment: dict[str, str] | None = None) -> None:
        ran.append((command, environment))
        if "venv" in command:
            (tmp_path / "env-llama" / "bin").mkdir(parents=True)
            (tmp_path / "env-llama" / "bin" / "python").touch()

    monkeypatch.setattr(full_size, "run", note)
    place = full_size.Place(tmp_path, 2, 1)
    full_size.prepare_rivals(place, [("llama", "llama_cpp_decoder"), ("llama", "llama_cpp_q3_k_m")])
    _, (install, environment), (first, _), (second, _) = ran
    assert install[-5:] == list(full_size.ENVIRONMENTS["llama"]) and full_size.TORCH not in install
    assert environment is not None and environment.items() >= full_size.COMPILED.items()
    assert first[-2:] == [str(place.checkpoint), str(place.model("llama_cpp_decoder"))]
    assert second[-3:] == [str(place.model("llama_cpp_q3_k_m")), "--type", "Q3_K_M"]


def test_every_weight_of_the_decoder_has_a_name_and_a_shape() -> None:
    tensors = rival.tensors_of(CONFIG)
    assert len(tensors) == 3 + 9 * 32
    assert tensors["blk.31.attn_k.weight"] == ("model.layers.31.self_attn.k_proj.weight", (128, 512))
    assert tensors["blk.0.ffn_down.weight"] == ("model.layers.0.mlp.down_proj.weight", (512, 768))
    assert tensors["output.weight"] == ("lm_head.weight", (300, 512))
    parameters = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    full = rival.tensors_of(CONFIG | parameters | {"vocab_size": 128256})
    assert sum(int(np.prod(shape)) for _, shape in full.values()) == 8_030_261_248


def test_rotated_pairs_become_neighbours() -> None:
    assert rival.neighbours(16, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@needs_llama_cpp
def test_types_are_those_that_llama_cpp_chooses(tmp_path: Path) -> None:
    types = {kind: rival.chosen_types(CONFIG, kind, tmp_path) for kind in rival.TYPES}
    assert types["Q4_0"].keys() == types["Q3_K_M"].keys() == rival.tensors_of(CONFIG).keys()
    found = {kind: {name.removesuffix(".weight"): of.name for name, of in types[kind].items()} for kind in types}
    assert found["Q4_0"]["output"] == found["Q3_K_M"]["output"] == "Q6_K"
    assert {found["Q4_0"][f"blk.{i}.{name}"] for i in range(32) for name in ("attn_v", "ffn_down", "ffn_up")} == {
        "Q4_0"
    }
    three = found["Q3_K_M"]
    assert three["blk.0.ffn_norm"] == three["output_norm"] == "F32"
    assert {three[f"blk.{i}.{name}"] for i in range(32) for name in ("attn_q", "attn_k", "ffn_gate", "ffn_up")} == {
        "Q3_K"
    }
    assert {three[f"blk.{i}.attn_output"] for i in range(32)} == {"Q4_K"}
    for name in ("attn_v", "ffn_down"):
        assert [three[f"blk.{i}.{name}"] for i in range(32)] == 2 * ["Q5_K"] + 30 * ["Q4_K"]
    assert list(tmp_path.iterdir()) == []


@needs_llama_cpp
@pytest.mark.parametrize("kind", rival.TYPES)
def test_a_tiny_model_is_built_and_answers(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    run("build", str(checkpoint), str(out), "--type", kind, code=0)
    assert [path.name for path in out.iterdir()] == [rival.MODEL] and list(tmp_path.iterdir()) == [out]
    assert (out / rival.MODEL).stat().st_size > 32 * 512 * (3 * 768 + 2 * 512) * 3 / 8
    command = [sys.executable, str(SCRIPT), "serve", str(out), "--threads", "1"]
    with Contender("llama", command, tmp_path, full_size._outside()) as server:
        assert 0 < server.load_s < 60
        for line in ("prefill 600", "decode 3", "prefill 5", "decode 100"):
            answer = server.ask(line)
            assert answer["what"] == line and answer["seconds"] > 0


@needs_llama_cpp
def test_quantized_values_are_near_what_they_were() -> None:
    import gguf

    values = np.random.default_rng(1).normal(size=(3, 512)).astype(np.float16)
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q3_K, gguf.GGMLQuantizationType.Q6_K):
        made = gguf.dequantize(rival.quantized(values, kind).reshape(3, -1), kind)
        assert made.shape == (3, 512) and np.abs(made - values).mean() < 0.2


@needs_llama_cpp
def test_what_is_no_model_or_does_not_fit_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    assert run("serve", str(tmp_path), code=1).splitlines()[-1].startswith(f"error: {tmp_path / rival.MODEL}: ")
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    (other / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 700}))
    text = run("build", str(other), str(tmp_path / "model"), code=1)
    assert "Q4_0 has blocks of 32, no rows of 700 values" in text.splitlines()[-1]
    assert not (tmp_path / "model").exists()
