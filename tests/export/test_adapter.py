"""LoRA adapters: what merging gives, against a second implementation in float64, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lensc.backends.errors import CheckpointError
from lensc.export import adapter as adapter_module
from lensc.export.adapter import Adapter, MergedCheckpoint
from lensc.export.checkpoint import Checkpoint, WeightSource

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
BASE = load_file(GOLDEN / "model.safetensors")
PREFIX = "base_model.model."
Q = "llm.model.layers.0.self_attn.q_proj"
EMBED = "llm.model.embed_tokens"
HEAD = "llm.lm_head"
ATTENTION = [f"llm.model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qkv"]
TARGETS = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)"

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def factors(module: str, rank: int, seed: int = 0) -> dict[str, Tensor]:
    out, inputs = BASE[f"{module}.weight"].shape
    generator = torch.Generator().manual_seed(seed + sum(module.encode()))
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def official() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors as the official fine-tuning writes them, without the modules trained as a whole."""
    config = {
        "alpha_pattern": {},
        "auto_mapping": {"base_model_class": "MiniCPMV", "parent_library": "transformers_modules.modeling_minicpmv"},
        "base_model_name_or_path": "openbmb/MiniCPM-Llama3-V-2_5",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": TARGETS,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    return config, {name: tensor for module in ATTENTION for name, tensor in factors(module, 4).items()}


def adapter(folder: Path, change: Change = lambda config, tensors: None) -> Path:
    config, tensors = official()
    change(config, tensors)
    return write(folder, config, tensors)


def merged(tmp_path: Path, change: Change = lambda config, tensors: None) -> MergedCheckpoint:
    return MergedCheckpoint(Checkpoint(GOLDEN), Adapter(adapter(tmp_path / "lora", change)))


def expected(tensors: dict[str, Tensor], module: str, scale: float) -> np.ndarray[Any, Any]:
    """W + s·B·A in float64, row by row, rounded to float32."""
    a = tensors[f"{PREFIX}{module}.lora_A.weight"].double().numpy()
    b = tensors[f"{PREFIX}{module}.lora_B.weight"].double().numpy()
    weight = BASE[f"{module}.weight"].double().numpy()
    return np.stack([w + scale * sum(b[i, k] * a[k] for k in range(len(a))) for i, w in enumerate(weight)]).astype("f4")


def message(tmp_path: Path, change: Change = lambda config, tensors: None) -> str:
    """The text of the error that opening and merging gives: one line that names the folder."""
    with pytest.raises(CheckpointError) as caught:
        merged(tmp_path, change)
    text = str(caught.value)
    assert str(tmp_path / "lora") in text and "\n" not in text and text.isprintable()
    return text


# --- what merging gives -------------------------------------------------------------------------------------------


def test_merged_weights_are_those_of_an_independent_merge(tmp_path: Path) -> None:
    source = merged(tmp_path)
    _, tensors = official()
    for module in ATTENTION:
        name = f"{module}.weight"
        assert source.tensors[name].dtype == "F32" and source.tensors[name].nbytes == 4 * BASE[name].numel()
        weight = source.tensor(name)
        assert weight.dtype == torch.float32
        np.testing.assert_array_equal(weight.numpy(), expected(tensors, module, 16 / 4))
        assert not torch.equal(weight, BASE[name].float())


def test_everything_else_is_as_stored(tmp_path: Path) -> None:
    checkpoint = Checkpoint(GOLDEN)
    source = merged(tmp_path)
    assert list(source.tensors) == list(checkpoint.tensors)
    for name in source.tensors.keys() - {f"{module}.weight" for module in ATTENTION}:
        assert source.tensors[name] == checkpoint.tensors[name]
        assert source.tensor(name).dtype == torch.float16 and torch.equal(source.tensor(name), BASE[name])


def test_b_of_zeros_changes_nothing(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()

    model, base = merged(tmp_path, change).load_model(), Checkpoint(GOLDEN).load_model()
    state = base.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("piece", [1, 1000, 4 << 20])
def test_pieces_do_not_change_the_result(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{Q}.weight"
    whole = merged(tmp_path).tensor(name)
    monkeypatch.setattr(adapter_module, "PIECE", piece)
    source = merged(tmp_path)
    assert torch.equal(source.tensor(name), whole)
    rows = torch.cat([source.rows(name, start, min(start + 100, 256)) for start in range(0, 256, 100)])
    assert torch.equal(rows, whole)
    assert torch.equal(source.rows(f"{HEAD}.weight", 7, 9), BASE[f"{HEAD}.weight"][7:9])
    assert source.rows(name, 5, 5).shape == (0, 256)


def test_rows_and_names_that_are_not_there(tmp_path: Path) -> None:
    source: WeightSource = merged(tmp_path)
    for name in (f"{Q}.weight", f"{HEAD}.weight"):
        with pytest.raises(IndexError, match="has no rows 0 to 100000"):
            source.rows(name, 0, 100_000)
    for read in (source.tensor, lambda name: source.rows(name, 0, 1)):
        with pytest.raises(KeyError):
            read("llm.nothing")


def test_rank_stabilized(tmp_path: Path) -> None:
    source = merged(tmp_path, lambda config, tensors: config.update(use_rslora=True))
    np.testing.assert_array_equal(source.tensor(f"{Q}.weight").numpy(), expected(official()[1], Q, 16 / math.sqrt(4)))


def test_patterns_overrule_rank_and_alpha_by_the_end_of_the_name(tmp_path: Path) -> None:
    k0, k1, q1 = ATTENTION[1], ATTENTION[4], ATTENTION[3]

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["rank_pattern"] = {r"layers.1.self_attn.(k|x)_proj": 2, "k_proj": 8, "_proj": 1}
        config["alpha_pattern"] = {"layers.0.self_attn.q_proj": 3.5, Q: 99}
        tensors |= factors(k0, 8) | factors(k1, 2)

    source = merged(tmp_path, change)
    tensors = official()[1] | factors(k0, 8) | factors(k1, 2)
    for module, scale in ((k0, 16 / 8), (k1, 16 / 2), (Q, 3.5 / 4), (q1, 16 / 4)):
        np.testing.assert_array_equal(source.tensor(f"{module}.weight").numpy(), expected(tensors, module, scale))


def test_embedding(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, columns = BASE[f"{EMBED}.weight"].shape
    a, b = torch.randn(4, rows, generator=generator), torch.randn(columns, 4, generator=generator)

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["target_modules"] = ["q_proj", "k_proj", "v_proj", "embed_tokens"]
        config["exclude_modules"] = r"vpm\..*"
        tensors |= {f"{PREFIX}{EMBED}.lora_embedding_A": a, f"{PREFIX}{EMBED}.lora_embedding_B": b}
        # What PEFT saves beside the factors of an embedding, as it is.
        tensors |= {f"{PREFIX}{EMBED}.base_layer.weight": BASE[f"{EMBED}.weight"] * 2}
        tensors |= {f"{PREFIX}{HEAD}.weight": BASE[f"{HEAD}.weight"] * 3}

    source = merged(tmp_path, change)
    product = np.einsum("kr,ck->rc", a.double().numpy(), b.double().numpy())
    wanted = (BASE[f"{EMBED}.weight"].double().numpy() * 2 + 4 * product).astype("f4")
    np.testing.assert_allclose(source.tensor(f"{EMBED}.weight").numpy(), wanted, rtol=1e-7)
    np.testing.assert_array_equal(source.rows(f"{EMBED}.weight", 3, 5), source.tensor(f"{EMBED}.weight")[3:5])
    assert torch.equal(source.tensor(f"{HEAD}.weight"), BASE[f"{HEAD}.weight"] * 3)


def test_saved_modules_replace_those_of_the_checkpoint(tmp_path: Path) -> None:
    replaced = {name: torch.randn(tensor.shape) for name, tensor in BASE.items() if name.startswith("resampler.")}
    replaced[f"{EMBED}.weight"] = torch.randn(BASE[f"{EMBED}.weight"].shape).bfloat16()

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["modules_to_save"] = ["embed_tokens", "resampler"]
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in replaced.items()}

    source = merged(tmp_path, change)
    for name, tensor in replaced.items():
        assert source.tensors[name].name == name and source.tensors[name].nbytes == tensor.nbytes
        assert torch.equal(source.tensor(name), tensor) and source.tensor(name).dtype == tensor.dtype
        assert torch.equal(source.rows(name, 1, 3), tensor[1:3])
    assert torch.equal(source.load_model().resampler.query, replaced["resampler.query"])


@pytest.mark.parametrize(
    ("fields", "modules"),
    [
        ({"target_modules": ["q_proj"], "exclude_modules": ["vision", "0.self_attn.q_proj"]}, None),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, None),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, None),
        ({"target_modules": [Q], "layers_to_transform": [1]}, [Q]),
        ({"target_modules": [Q, "1.self_attn.q_proj"], "exclude_modules": r"vpm\..*"}, [Q, ATTENTION[3]]),
        ({"target_modules": rf"({Q})|nothing"}, [Q]),
    ],
    ids=["excluded", "one-layer", "layer-number", "whole-name", "list", "expression"],
)
def test_targets(fields: dict[str, Any], modules: list[str] | None, tmp_path: Path) -> None:
    vision = [n.removesuffix(".weight") for n in BASE if n.startswith("vpm.") and n.endswith("q_proj.weight")]
    if modules is None:
        modules = [ATTENTION[3], *(name for name in vision if ".1." in name or "exclude_modules" in fields)]
        modules = [name for name in modules if "0.self_attn.q_proj" not in name]

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config.update(fields)
        tensors.clear()
        tensors |= {name: tensor for module in modules for name, tensor in factors(module, 4).items()}

    assert merged(tmp_path, change).adapter.factors.keys() == set(modules)


def test_all_linear_means_all_but_the_head(tmp_path: Path) -> None:
    base = Checkpoint(GOLDEN).load_model()
    modules = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != HEAD]

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["target_modules"] = "all-linear"
        tensors |= {name: tensor for module in modules for name, tensor in factors(module, 4).items()}

    model = merged(tmp_path, change).load_model()
    assert len(modules) > 30 and not torch.equal(
        model.vpm.encoder.layers[0].mlp.fc2.weight, base.vpm.encoder.layers[0].mlp.fc2.weight
    )


def test_names_of_an_unsaved_state_and_a_trainers_folder(tmp_path: Path) -> None:
    """`.default.` in the names, and beside the adapter what trainers leave: earlier states and pickles of their own."""

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    adapter(tmp_path / "lora" / "checkpoint-100")
    (tmp_path / "lora" / "training_args.bin").write_bytes(b"\x80\x04.")
    source = merged(tmp_path, change)
    np.testing.assert_array_equal(source.tensor(f"{Q}.weight").numpy(), expected(official()[1], Q, 4.0))


def test_identity_is_that_of_checkpoint_and_adapter(tmp_path: Path) -> None:
    first = merged(tmp_path).sha256
    assert first == merged(tmp_path).sha256 and first not in (
        Checkpoint(GOLDEN).sha256,
        Adapter(tmp_path / "lora").sha256,
    )
    assert merged(tmp_path, lambda config, tensors: config.update(lora_alpha=17)).sha256 != first
    assert merged(tmp_path, lambda config, tensors: tensors[f"{PREFIX}{Q}.lora_B.weight"].mul_(2)).sha256 != first


def test_the_rest_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoint, source = Checkpoint(GOLDEN), merged(tmp_path)
    assert source.model_spec() == checkpoint.model_spec()
    assert (source.folder, source.tokenizer, source.config) == (
        checkpoint.folder,
        checkpoint.tokenizer,
        checkpoint.config,
    )


def test_an_adapter_that_changes_under_way(tmp_path: Path) -> None:
    source = merged(tmp_path)
    source.check_unchanged()
    adapter(tmp_path / "lora", lambda config, tensors: tensors[f"{PREFIX}{Q}.lora_B.weight"].mul_(2))
    for use in (source.check_unchanged, lambda: source.tensor(f"{Q}.weight"), lambda: source.sha256):
        with pytest.raises(CheckpointError, match=r"adapter_.*: changed while it was being read: .*run again"):
            use()


# --- the folder ---------------------------------------------------------------------------------------------------


def test_folder_missing_a_file_or_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, text in (("absent", "not found"), ("file", "is a file"), ("empty", "adapter_config.json: not found")):
        with pytest.raises(CheckpointError, match=f"{name}.*{text}"):
            Adapter(tmp_path / name)
    (adapter(tmp_path / "lora") / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: not found"):
        Adapter(tmp_path / "lora")


def test_a_pickle_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"adapter_model.bin: pickled .* unpickling can run any code; .*safe_seria"
    ):
        Adapter(folder)


def test_several_adapters_in_one_folder(tmp_path: Path) -> None:
    adapter(tmp_path / "lora" / "first")
    adapter(tmp_path / "lora" / "second")
    with pytest.raises(CheckpointError, match=r"holds 2 adapters \(first, second\)"):
        Adapter(tmp_path / "lora")
    assert "holds 3 adapters (one at the top, first, second)" in message(tmp_path)


def test_several_adapters_in_one_file(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "q_proj" in n]:
            tensors[name.replace(".weight", ".other.weight")] = tensors.pop(name)

    assert "holds 2 adapters (one without a name, other), one can be merged" in message(tmp_path, change)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000], ids=["", "cut", "list", "bytes", "deep"]
)
def test_damaged_config(content: bytes, tmp_path: Path) -> None:
    (adapter(tmp_path / "lora") / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_config.json: (not JSON|expected a JSON object)"):
        Adapter(tmp_path / "lora")


def test_unsupported_configuration_names_the_file(tmp_path: Path) -> None:
    text = message(tmp_path, lambda config, tensors: config.update(use_dora=True))
    assert f"{tmp_path / 'lora' / 'adapter_config.json'}: use_dora is True" in text


def test_truncated_weights(tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: not a valid safetensors file"):
        Adapter(tmp_path / "lora")


# --- the tensors --------------------------------------------------------------------------------------------------


def put(name: str, tensor: Tensor, **fields: Any) -> Change:
    """A change that adds or replaces a tensor, and fields of the configuration."""
    return lambda config, tensors: (tensors.update({name: tensor}), config.update(fields))


def drop(*names: str) -> Change:
    return lambda config, tensors: [tensors.pop(name) for name in names]


A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
FC1, PATCHES = "vpm.encoder.layers.0.mlp.fc1", "vpm.embeddings.patch_embedding"
VISION = {"target_modules": rf"({TARGETS})|vpm\..*", "exclude_modules": r"vpm\.(?!.*layers.0.mlp.fc1|.*patch_emb).*"}

TENSORS: dict[str, tuple[Change, str]] = {
    "no-b": (drop(B), f"{Q} has no lora_B"),
    "no-a": (drop(A), f"{Q} has no lora_A"),
    "neither": (drop(A, B), f"1 of its target_modules have no lora_A and lora_B: {Q}"),
    "nothing": (lambda config, tensors: tensors.clear(), "holds no tensors"),
    "prefix": (put("llm.x.lora_A.weight", torch.zeros(4, 4)), "llm.x.lora_A.weight: expected a name that begins with"),
    "magnitude": (put(f"{PREFIX}{Q}.lora_magnitude_vector", torch.ones(256)), f"{Q}.lora_magnitude_vector: DoRA"),
    "lora-b-bias": (put(f"{PREFIX}{Q}.lora_B.bias", torch.ones(256)), f"{Q}.lora_B.bias: expected lora_A.weight"),
    "bias": (
        put(f"{PREFIX}vpm.post_layernorm.bias", torch.ones(64), bias="all"),
        "bias is 'all' and 1 trained biases are there, which are not supported: base_model.model.vpm.post_layernorm.bias",
    ),
    "bias-none": (put(f"{PREFIX}vpm.post_layernorm.bias", torch.ones(64)), "belongs to none of the modules_to_save"),
    "quantized": (put(B, torch.zeros(256, 4, dtype=torch.int8)), f"{Q}.lora_B.weight is I8, expected one of F16"),
    "rank": (put(B, torch.zeros(256, 8)), "lora_A [4, 256] and lora_B [256, 8] have not the rank 4 of adapter_config.json"),
    "vector": (put(A, torch.zeros(4)), "lora_A is [4], lora_B [256, 4]; only matrices are supported"),
    "convolution": (
        lambda config, tensors: (config.update(VISION), tensors.update({
            f"{PREFIX}{PATCHES}.lora_A.weight": torch.zeros(4, 3, 14, 14),
            f"{PREFIX}{PATCHES}.lora_B.weight": torch.zeros(64, 4, 1, 1),
        })),
        f"{PATCHES}: lora_A is [4, 3, 14, 14], lora_B [64, 4, 1, 1]; only matrices are supported",
    ),
    "flat-convolution": (
        lambda config, tensors: (config.update(VISION), tensors.update({
            f"{PREFIX}{PATCHES}.lora_A.weight": torch.zeros(4, 588), f"{PREFIX}{PATCHES}.lora_B.weight": torch.zeros(64, 4),
        })),
        f"{PATCHES} is a Conv2d, no linear layer or embedding",
    ),
    "inputs": (put(A, torch.zeros(4, 512)), f"{Q}: factors of [256, 512] instead of [256, 256]"),
    "outputs": (put(B, torch.zeros(512, 4)), f"{Q}: factors of [512, 256] instead of [256, 256]"),
    "module": (
        lambda config, tensors: tensors.update({
            f"{PREFIX}model.layers.0.q.lora_{s}.weight": torch.zeros(4, 4) for s in "AB"
        }),
        "model.layers.0.q is no module of it",
    ),
    "not-targeted": (
        lambda config, tensors: tensors.update(factors(FC1, 4)), f"{FC1} has an adapter but is not among the target_modules"
    ),
    "embedding-as-linear": (
        lambda config, tensors: (config.update(target_modules=rf"{TARGETS}|.*embed_tokens"), tensors.update(factors(EMBED, 4))),
        f"{EMBED} is a Embedding, the adapter has factors of a linear layer",
    ),
    "linear-as-embedding": (
        lambda config, tensors: (drop(A, B)(config, tensors), tensors.update({
            f"{PREFIX}{Q}.lora_embedding_A": torch.zeros(4, 256), f"{PREFIX}{Q}.lora_embedding_B": torch.zeros(256, 4),
        })),
        f"{Q} is a Linear, the adapter has factors of an embedding",
    ),
    "extra": (put(f"{PREFIX}llm.score.weight", torch.zeros(4)), "llm.score.weight is no tensor of it"),
    "extra-odd": (put(f"{PREFIX}evil\x1b[31m", torch.zeros(4)), r"evil\x1b[31m is no tensor of it"),
    "resized": (put(f"{PREFIX}{HEAD}.weight", torch.zeros(1288, 256)), f"{HEAD}.weight is [1288, 256] instead of [1280, 256]"),
    "twice": (
        lambda config, tensors: tensors.update({
            f"{PREFIX}{HEAD}.weight": torch.zeros(1280, 256), f"{PREFIX}{HEAD}.base_layer.weight": torch.ones(1280, 256),
        }),
        "is there twice, with and without base_layer",
    ),
    "saved-missing": (
        put(f"{PREFIX}resampler.query", torch.zeros(96, 256), modules_to_save=["resampler"]),
        "12 tensors of the modules_to_save are missing: resampler.",
    ),
    "saved-unknown": (
        lambda config, tensors: config.update(modules_to_save=["classifier"]),
        "modules_to_save names 'classifier', which it does not have",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named(case: str, tmp_path: Path) -> None:
    change, text = TENSORS[case]
    assert text in message(tmp_path, change)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_factors_are_found_at_once(value: float, tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[A][1, 2] = value
        tensors[f"{PREFIX}{ATTENTION[5]}.lora_B.weight"][0, 0] = value

    text = message(tmp_path, change)
    assert "2 tensors hold NaN or Inf" in text and A in text and f"{ATTENTION[5]}.lora_B.weight" in text


def test_an_adapter_of_the_true_size_names_both_folders(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        for i in range(3):
            name = f"{PREFIX}llm.model.layers.{i}.self_attn.q_proj.lora_"
            tensors |= {f"{name}A.weight": torch.zeros(4, 4096), f"{name}B.weight": torch.zeros(4096, 4)}

    text = message(tmp_path, change)
    assert f"does not fit {GOLDEN}: " in text
    assert "llm.model.layers.2.self_attn.q_proj is no module of it" in text
    assert f"{Q}: factors of [4096, 4096] instead of [256, 256]" in text
    assert "4 of its target_modules have no lora_A and lora_B" in text


def test_damaged_files_never_raise_anything_else(tmp_path: Path) -> None:
    """Bytes of header and configuration changed at random: refused in one line, or merged."""
    checkpoint = Checkpoint(GOLDEN)
    folder = adapter(tmp_path / "lora")
    rng = np.random.default_rng(0)
    refused = 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        good = (folder / name).read_bytes()
        for _ in range(30):
            damaged = bytearray(good)
            for position in rng.integers(0, min(len(good), 1000), 3):
                damaged[position] = rng.integers(256)
            (folder / name).write_bytes(damaged)
            try:
                MergedCheckpoint(checkpoint, Adapter(folder))
            except CheckpointError as error:
                refused += 1
                assert "\n" not in str(error)
        (folder / name).write_bytes(good)
    assert refused > 30
    shutil.rmtree(folder)
