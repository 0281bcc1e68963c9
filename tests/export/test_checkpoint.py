"""Opening a checkpoint folder: what is read, what is refused, and that every problem is listed in one error."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lensc.backends.bundle import GenerationSpec, PictureSpec
from lensc.backends.errors import CheckpointError
from lensc.export import shards
from lensc.export.checkpoint import Checkpoint, WeightSource

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
IDS = ["empty", "cut", "list", "bytes", "deep", "huge-integer"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint that a test may damage."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "ckpt", copy_function=shutil.copyfile))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def shard(folder: Path, parts: int = 3) -> dict[str, str]:
    """Split model.safetensors into shards with an index; return the weight map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    weight_map = {name: names[i % parts] for i, name in enumerate(sorted(weights))}
    for file in names:
        save_file({n: weights[n] for n, f in weight_map.items() if f == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def message(folder: Path, use: Callable[[Checkpoint], object] = lambda c: c) -> str:
    """The text of the CheckpointError that opening (and using) `folder` raises: one line, names the folder."""
    with pytest.raises(CheckpointError) as caught:
        use(Checkpoint(folder))
    text = str(caught.value)
    assert str(folder) in text and "\n" not in text
    return text


# --- what is read -------------------------------------------------------------------------------------------------


def test_opening_reads_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_read", lambda *a, **k: pytest.fail("a weight was read"))
    checkpoint = Checkpoint(GOLDEN)
    record = checkpoint.tensors["vpm.embeddings.patch_embedding.weight"]
    assert len(checkpoint.tensors) == 87
    assert (record.dtype, record.shape, record.nbytes) == ("F16", (64, 3, 14, 14), 64 * 588 * 2)
    assert checkpoint.model_spec().decoder.vocab_size == 1280


def test_tensor_is_the_stored_one() -> None:
    checkpoint = Checkpoint(GOLDEN)
    stored = load_file(GOLDEN / "model.safetensors")
    for name in ("llm.lm_head.weight", "resampler.query", "vpm.post_layernorm.bias"):
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == torch.float16 and torch.equal(tensor, stored[name])
    with pytest.raises(KeyError):
        checkpoint.tensor("llm.nothing")


def test_rows_are_those_of_the_tensor() -> None:
    source: WeightSource = Checkpoint(GOLDEN)
    tensor = source.tensor("llm.lm_head.weight")
    assert torch.equal(source.rows("llm.lm_head.weight", 1000, 1280), tensor[1000:])
    with pytest.raises(IndexError, match=r"llm.lm_head.weight \[1280, 256\] has no rows 1280 to 1281"):
        source.rows("llm.lm_head.weight", 1280, 1281)
    with pytest.raises(KeyError):
        source.rows("llm.nothing", 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_model_has_every_weight_in_the_dtype(dtype: torch.dtype) -> None:
    model = Checkpoint(GOLDEN).load_model(dtype)
    stored = load_file(GOLDEN / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(value.dtype == dtype and torch.equal(value, stored[name].to(dtype)) for name, value in state.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_model_spec() -> None:
    spec = Checkpoint(GOLDEN).model_spec()
    half = (0.5, 0.5, 0.5)
    assert spec.name == "MiniCPM-Llama3-V-2_5"
    assert spec.picture == PictureSpec(448, 14, 9, 96, "official", half, half, 70)
    assert vars(spec.decoder) == {
        "hidden_size": 256,
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 64,
        "vocab_size": 1280,
        "context_length": 8192,
    }
    assert spec.generation == GenerationSpec(eos_token_ids=(1025, 1033), pad_token_id=0)


def test_unbatched_checkpoint_encodes_each_slice_alone(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(batch_vision_input=False))
    assert Checkpoint(folder).model_spec().picture.vision_padding == "per_slice"


def test_optional_files_may_be_absent(folder: Path) -> None:
    for name in ("preprocessor_config.json", "generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert Checkpoint(folder).model_spec() == Checkpoint(GOLDEN).model_spec()


def test_shards_give_the_same_model_through_links(folder: Path, tmp_path: Path) -> None:
    shard(folder)
    linked = tmp_path / "snapshot"  # the layout of a hub cache: every file is a link
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    state, expected = Checkpoint(linked).load_model().state_dict(), Checkpoint(GOLDEN).load_model().state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_identity_is_that_of_the_contents(folder: Path) -> None:
    before = Checkpoint(GOLDEN).sha256
    assert Checkpoint(folder).sha256 == before and len(before) == 64
    (folder / "README.md").write_text("not part of the checkpoint")
    assert Checkpoint(folder).sha256 == before
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        assert Checkpoint(folder).sha256 != before
        before = Checkpoint(folder).sha256
    edit_weights(folder, lambda w: w["resampler.query"].mul_(2))
    assert Checkpoint(folder).sha256 != before


def test_no_code_of_the_checkpoint_runs(folder: Path) -> None:
    marker = folder / "executed"
    for name in ("modeling_minicpmv.py", "configuration_minicpm.py"):
        (folder / name).write_text(
            f"open({str(marker)!r}, 'w').close()\nclass MiniCPMV: pass\nclass MiniCPMVConfig: pass"
        )
    checkpoint = Checkpoint(folder)
    checkpoint.load_model()
    checkpoint.model_spec()
    assert not marker.exists()


# --- the folder ---------------------------------------------------------------------------------------------------


def test_folder_missing_or_a_file(tmp_path: Path) -> None:
    assert "not found" in message(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "is a file" in message(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "config.json: not found" in message(tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "training_args.BIN", "x.ckpt"]
)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside"])
def test_pickles_are_refused_with_the_reason(name: str, alone: bool, folder: Path) -> None:
    (folder / name).write_bytes(b"\x80\x04.")
    if alone:
        (folder / "model.safetensors").unlink()
    text = message(folder)
    assert name in text and "unpickling can run any code" in text and "convert the weights to safetensors" in text


def test_weights_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json found" in message(folder)


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors: not a valid safetensors file" in message(folder)


def test_file_that_shrinks_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError,
        match=r"model.safetensors: changed while it was being read: 5352488 bytes became 5351488; .* run again",
    ):
        checkpoint.tensor("llm.lm_head.weight")


def test_shard_that_is_written_again_after_opening(folder: Path) -> None:
    """Same size, other contents: what was read before must not be mixed with what would be read."""
    names = shard(folder)
    file = folder / names["resampler.query"]
    os.utime(file, ns=(1, 1))
    checkpoint = Checkpoint(folder)
    checkpoint.check_unchanged()
    assert checkpoint.tensor("resampler.query").shape == (96, 256)
    weights = load_file(file)
    save_file({name: tensor * 2 for name, tensor in weights.items()}, folder / "new")
    (folder / "new").replace(file)
    for use in (
        lambda: checkpoint.tensor("resampler.query"),
        lambda: checkpoint.rows("resampler.query", 0, 1),
        lambda: checkpoint.sha256,
        checkpoint.load_model,
        checkpoint.check_unchanged,
    ):
        with pytest.raises(CheckpointError, match=rf"{file.name}: changed while it was being read: it was written to"):
            use()
    assert checkpoint.tensor(next(n for n, f in names.items() if f != file.name)).numel()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_small_file_that_changes_after_opening(name: str, folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    (folder / name).write_text((folder / name).read_text() + "\n")
    for use in (lambda: checkpoint.sha256, checkpoint.check_unchanged):
        with pytest.raises(CheckpointError, match=rf"{name}: changed while it was being read"):
            use()


def test_shard_that_goes_away_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: tensor resampler.query cannot be read: No such file"
    ):
        checkpoint.tensor("resampler.query")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"9" * 5000], ids=IDS)
def test_damaged_config(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json" in message(folder) and len(message(folder)) < 400


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000], ids=IDS[:5])
def test_damaged_side_file(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    assert name in message(folder, Checkpoint.model_spec)


# --- names, shapes, dtypes, values --------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_are_all_in_one_error(folder: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        del weights["resampler.proj"], weights["llm.model.norm.weight"]
        weights["vpm.head.weight"] = torch.zeros(3)
        weights["resampler.query"] = torch.zeros(64, 256)
        weights["vpm.post_layernorm.bias"] = torch.zeros(64, 1)

    edit_weights(folder, change)
    text = message(folder)
    assert "2 missing tensors: resampler.proj, llm.model.norm.weight" in text
    assert "1 unexpected tensors: vpm.head.weight" in text
    assert "2 misshapen tensors" in text
    assert "resampler.query [64, 256] instead of [96, 256]" in text
    assert "vpm.post_layernorm.bias [64, 1] instead of [64]" in text


def test_long_lists_become_a_count(folder: Path) -> None:
    edit_weights(folder, lambda w: [w.pop(name) for name in list(w) if name.startswith("vpm.")])
    text = message(folder)
    vision = sum(name.startswith("vpm.") for name in Checkpoint(GOLDEN).tensors)
    assert f"{vision} missing tensors: " in text and f"and {vision - 20} more" in text and len(text) < 2500


def test_more_layers_than_tensors_is_refused_at_once(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(num_hidden_layers=1_000_000))
    assert "asks for 1000000 layers, the weights have only 87 tensors" in message(folder)


def test_enormous_sizes_are_compared_not_allocated(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(vocab_size=1 << 20, intermediate_size=1 << 20, query_num=1 << 20))
    assert "llm.lm_head.weight [1280, 256] instead of [1048576, 256]" in message(folder)


def test_quantized_weights_are_refused(folder: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["llm.lm_head.weight"] = torch.zeros(1280, 256, dtype=torch.uint8)

    edit_weights(folder, change)
    assert "tensors with a dtype other than F16, BF16, F32, F64: llm.lm_head.weight U8" in message(folder)


def test_nan_and_inf_are_reported_with_all_names(folder: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["resampler.query"][5, 7] = float("nan")
        weights["llm.model.norm.weight"][0] = float("-inf")

    edit_weights(folder, change)
    text = message(folder, Checkpoint.load_model)
    assert "2 tensors hold NaN or Inf" in text and "resampler.query" in text and "llm.model.norm.weight" in text


def test_weight_too_large_for_the_dtype(folder: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["resampler.query"] = weights["resampler.query"].float() * 1e6

    edit_weights(folder, change)
    Checkpoint(folder).load_model(torch.float32)
    text = message(folder, lambda c: c.load_model(torch.float16))
    assert "1 tensors do not fit torch.float16: resampler.query" in text


# --- shards -------------------------------------------------------------------------------------------------------


def test_both_layouts_at_once(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "holds both" in message(folder)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'], ids=["list", "empty", "map-list", "number"]
)
def test_index_of_another_shape(text: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    assert "expected weight_map" in message(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", "", "a\\b.safetensors"]
)
def test_index_that_points_elsewhere(name: str, folder: Path) -> None:
    weight_map = shard(folder)
    weight_map["resampler.query"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert f"{name!a} is not the name of a .safetensors file in this folder" in message(folder)


def test_missing_and_unnamed_shards(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").rename(folder / "model-00009-of-00009.safetensors")
    text = message(folder)
    assert "shard model-00002-of-00003.safetensors is named but missing" in text
    assert "shard model-00009-of-00009.safetensors is in the folder but not named" in text


def test_index_and_shards_that_disagree(folder: Path) -> None:
    weight_map = shard(folder)
    first, second = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
    in_first, in_second = ([n for n, f in weight_map.items() if f == file] for file in (first, second))
    weights = load_file(folder / first)
    save_file({**weights, in_second[0]: torch.zeros(1)}, folder / first)
    del weight_map[in_first[0]]
    weight_map[in_first[1]] = second
    weight_map["llm.absent"] = first
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = message(folder)
    assert f"{in_second[0]} is in both {first} and {second}" in text
    assert f"{in_first[0]} is in {first} but not in the index" in text
    assert f"{in_first[1]} is in {first}, the index says {second}" in text
    assert f"llm.absent is not in {first}" in text


# --- the files agree ----------------------------------------------------------------------------------------------


def test_preprocessor_and_config_must_agree(folder: Path) -> None:
    values = {"scale_resolution": 336, "max_slice_nums": 4, "patch_size": 16, "image_feature_size": 64}
    edit(folder / "preprocessor_config.json", lambda p: p.update(values))
    text = message(folder, Checkpoint.model_spec)
    for key, value in values.items():
        assert f"{key} is {value}, config.json says" in text
    assert "config.json says 448" in text, "the default where slice_config is silent"


def test_preprocessor_and_config_may_agree_on_another_resolution(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", lambda p: p.update(scale_resolution=224))
    edit(folder / "config.json", lambda c: c["slice_config"].update(scale_resolution=224))
    assert Checkpoint(folder).model_spec().picture.scale_resolution == 224


@pytest.mark.parametrize("value", [[0.5], "half", [0.5, 0.5, "x"], [0.5, 0.5, 0.0], [0.5, 0.5, float("nan")]], ids=str)
def test_bad_deviation(value: Any, folder: Path) -> None:
    edit(folder / "preprocessor_config.json", lambda p: p.update(norm_std=value))
    assert "norm_std is" in message(folder, Checkpoint.model_spec)


def test_special_tokens_must_be_there_and_agree(folder: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        added = [t for t in tokenizer["added_tokens"] if t["content"] != "<slice>"]
        for token in added:
            token["id"] = {"<|eot_id|>": 99_999, "<|end_of_text|>": 5}.get(token["content"], token["id"])
        tokenizer["added_tokens"] = added

    edit(folder / "tokenizer.json", change)
    text = message(folder, Checkpoint.model_spec)
    assert "special token '<slice>' is missing" in text
    assert "<|eot_id|> has id 99999, the vocabulary has 1280 rows" in text
    assert "<|end_of_text|> has id 5, config.json's eos_token_id is 1025" in text


def test_pad_token_of_another_kind(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda t: t.update(pad_token={"content": "<unk>"}))
    assert Checkpoint(folder).model_spec().generation.pad_token_id == 1026
    edit(folder / "tokenizer_config.json", lambda t: t.update(pad_token=7))
    assert "pad_token is 7" in message(folder, Checkpoint.model_spec)
    edit(folder / "tokenizer_config.json", lambda t: t.update(pad_token="nowhere"))
    assert "special token 'nowhere' is missing" in message(folder, Checkpoint.model_spec)


def test_name_falls_back_to_the_folder(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(_name_or_path="\x1b[31mred"))
    assert Checkpoint(folder).model_spec().name == "ckpt"
