"""The random checkpoint: the published layout to the byte, weights that keep activations sane, a tokenizer that works."""

import hashlib
import json
import math
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lensc.backends.errors import StorageError, UsageError
from lensc.bench import checkpoint as synthetic
from lensc.bench.checkpoint import SIZES, Size, header, main, shapes, shards, write_checkpoint
from lensc.bench.vocabulary import LEAST, merges, write_tokenizer
from lensc.export.checkpoint import Checkpoint
from lensc.runtime.prompt import Tokenizer

PUBLISHED = [2443235064, 2416006592, 2499909808, 2499909832, 2416006640, 2499909816, 2299293224]
"""Bytes of the seven shards of MiniCPM-Llama3-V 2.5."""

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "new" / "small"
    write_checkpoint(folder)
    return folder


# --- layout -------------------------------------------------------------------------------------------------------


def test_full_size_has_the_published_shards_to_the_byte() -> None:
    tensors = shapes(SIZES["full"])
    parts = shards(tensors, SIZES["full"].shard_bytes)
    assert [header(part)[1] for part in parts] == PUBLISHED
    assert len(tensors) == 741 and sum(map(math.prod, tensors.values())) == 8_537_092_336
    assert len(parts[6]) == 456
    assert {name.split(".")[0] for part in parts[:6] for name in part} == {"llm"}
    assert {"llm.model.norm.weight", "llm.lm_head.weight", "llm.model.layers.31.mlp.down_proj.weight"} <= parts[
        6
    ].keys()


def test_files_open_and_hold_what_the_index_says(small: Path) -> None:
    checkpoint = Checkpoint(small)
    index = json.loads((small / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(checkpoint.tensors) == set(shapes(SIZES["small"]))
    assert index["metadata"]["total_size"] == 2 * sum(record.nbytes for record in checkpoint.tensors.values())
    assert {record.dtype for record in checkpoint.tensors.values()} == {"F16"}
    assert checkpoint.model_spec().generation.eos_token_ids == (1025, 1033)
    assert len(list(small.glob("model-0000*-of-00003.safetensors"))) == 3
    assert not (small.parent / "small.partial").exists()
    assert sum(path.stat().st_size for path in small.iterdir()) < 6e6


def test_the_library_reads_the_same(small: Path) -> None:
    checkpoint = Checkpoint(small)
    for path in small.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(checkpoint.tensor(name), tensor)


def test_same_seed_same_bytes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "THREADS", 1)
    write_checkpoint(tmp_path / "again", "small", seed=1)
    write_checkpoint(tmp_path / "other", "small", seed=2)
    for path in small.iterdir():
        same = (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        other = (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()
        assert same and other == (path.suffix != ".safetensors")


def test_bytes_are_those_of_every_machine(small: Path) -> None:
    name = "model-00001-of-00003.safetensors"
    assert hashlib.sha256((small / name).read_bytes()).hexdigest() == FIRST_SHARD_SHA256


FIRST_SHARD_SHA256 = "21f6924bd7cee0b620328ae358600ca7e8e55b6ace5da360bd6a8252f1b487c0"


# --- weights ------------------------------------------------------------------------------------------------------


def test_weights_are_normal_and_unrelated(small: Path) -> None:
    checkpoint = Checkpoint(small)
    names = [f"llm.model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up")]
    tensors = [checkpoint.tensor(name).double().flatten() * 16 for name in names]  # 16 = √inputs
    for tensor in tensors:
        assert abs(tensor.mean()) < 0.01 and abs(tensor.std() - 1) < 0.01
        assert abs((tensor**4).mean() - 3) < 0.1, "kurtosis of a normal distribution"
    correlations = torch.corrcoef(torch.stack(tensors)) - torch.eye(4)
    assert correlations.abs().max() < 0.015
    values = torch.linalg.svdvals(tensors[0].reshape(528, 256))
    # The smallest singular value of a random matrix is about √rows - √columns (Marchenko-Pastur): full rank.
    assert values.min() > 0.8 * (math.sqrt(528) - math.sqrt(256))


def test_pieces_join_to_one_stream_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "PIECE", 1000)
    drawn = [piece() for piece in synthetic.pieces("a", 2501, 1.0, 0.5, seed=3)]
    assert [len(piece) for piece in drawn] == [1000, 1000, 501]
    assert all(piece.dtype == np.float16 for piece in drawn)
    assert abs(np.corrcoef(drawn[0].astype(float), drawn[1].astype(float))[0, 1]) < 0.15
    assert abs(np.concatenate(drawn).astype(float).mean() - 1) < 0.05
    again = [piece() for piece in reversed(list(synthetic.pieces("a", 2501, 1.0, 0.5, seed=3)))]
    assert all(np.array_equal(a, b) for a, b in zip(drawn, reversed(again), strict=True))
    other = next(iter(synthetic.pieces("b", 2501, 1.0, 0.5, seed=3)))()
    assert not np.array_equal(other, drawn[0])


def test_activations_stay_sane_through_the_published_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4}
    monkeypatch.setitem(synthetic.SIZES, "deep", Size({**narrow, "vocab_size": 2048}, vision, 10**9))
    write_checkpoint(tmp_path / "deep", "deep")
    model = Checkpoint(tmp_path / "deep").load_model()
    streams: list[float] = []
    for layer in (*model.llm.model.layers, *model.vpm.encoder.layers):
        layer.register_forward_hook(lambda m, i, o: streams.append(float((o[0] if type(o) is tuple else o).std())))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1792, (2, 64), generator=generator)
    ids[1, 32:] = ids[0, 32:]
    places = torch.arange(64)
    logits = model.llm(model.llm.model.embed_tokens(ids), places, places)[0]
    assert 2 < logits.std() < 3
    assert len(set(logits[0].argmax(-1).tolist())) > 40, "the answer depends on the token"
    assert (logits[0, -1] - logits[1, -1]).std() > 0.2 * logits.std(), "and on what was before it"
    patches = torch.rand(1, 64, 588, generator=generator) * 2 - 1
    features = model.vpm(patches, places[None], torch.zeros(1, 64))
    embeds = model.resampler(features, torch.zeros(1, 64), torch.zeros(1, 64, 256))
    assert 0.8 < embeds.std() / model.llm.model.embed_tokens.weight.std() < 1.2
    assert len(streams) == 32 + 27 and min(streams) > 0.4 and max(streams) < 1.5


# --- tokenizer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 128_256)
    return Tokenizer.from_file(folder / "tokenizer.json")


def test_tokenizer_of_the_published_size(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 128_256
    special = tokenizer.special
    assert (special.pad, special.bos, special.eos, special.unk) == (0, 128_000, 128_001, 128_002)
    assert (special.start_header, special.end_header, special.eot) == (128_006, 128_007, 128_009)
    assert (special.image_start, special.image_end, special.slice_start, special.slice_end) == (
        *(128_010, 128_011),
        *(128_020, 128_021),
    )


def test_text_becomes_as_many_tokens_as_is_usual(tokenizer: Tokenizer) -> None:
    """The question of the published example has 6 tokens, its template 9 besides picture and question."""
    assert len(tokenizer.encode("What is in the image?")) == 6
    assert [len(tokenizer.encode(word)) for word in ("user", "assistant", "system", "\n\n")] == [1, 1, 1, 1]
    text = "The total of the receipt is 1234.50, printed below the name of the shop in São Paulo.\n\nThank you — come again"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, clean_up=False) == text
    assert 2 < len(text) / len(ids) < 5


def test_every_merge_is_made_of_what_is_there() -> None:
    known = {*map(chr, range(33, 127)), "\u0120", "\u010a"}
    count = 0
    for left, right in merges():
        assert left in known and right in known
        known.add(left + right)
        count += 1
    assert count > 128_256


def test_smallest_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, LEAST)
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size == LEAST and tokenizer.decode(tokenizer.encode("Größe 3")) == "Größe 3"


# --- refused ------------------------------------------------------------------------------------------------------


def test_output_that_is_not_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "killed.partial").mkdir()
    for name, text in (("full", "is not empty"), ("file", "is not a folder"), ("gone", "is not a folder")):
        with pytest.raises(UsageError, match=f"{name}: exists and {text}; choose another output folder or remove it"):
            write_checkpoint(tmp_path / name)
    with pytest.raises(UsageError, match=r"killed.partial: is being written, or was left by a run that was killed"):
        write_checkpoint(tmp_path / "killed")
    with pytest.raises(UsageError, match="cannot be the output folder"):
        write_checkpoint(Path("/"))
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine" and (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out")
    assert len(Checkpoint(tmp_path / "out").tensors) == 87


def test_too_small_a_disk_is_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(20e9, 3e9, 17 * 10**9))
    with pytest.raises(StorageError, match=r"out: about 17\.14 GB are needed, 17\.00 GB are free; free some space"):
        write_checkpoint(tmp_path / "new" / "out", "full")
    assert not (tmp_path / "new" / "out").exists() and not (tmp_path / "new" / "out.partial").exists()


def test_a_failed_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = synthetic._write_shard

    def full_disk(path: Path, *arguments: object) -> None:
        if "00002" in path.name:
            raise OSError(28, "No space left on device", str(path))
        real(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(synthetic, "_write_shard", full_disk)
    with pytest.raises(StorageError, match=r"model-00002-of-00003.safetensors: cannot be written: No space left"):
        write_checkpoint(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=r"cannot be written: Permission denied"):
        write_checkpoint(tmp_path / "out")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-o", str(tmp_path / "out"), "--size", "small", "--seed", "7"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'out'}: 87 tensors, 2,700,932 parameters, 5.41 MB in 3 shards; ")
    assert "peak memory" in out and out.count("\n") == 1 and err.count("\n") == 3
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'out'}: exists and is not empty; choose another output folder or remove it\n"
    )
    for wrong in (["--seed", "-1"], ["--size", "huge"]):
        with pytest.raises(SystemExit) as end:
            main(["-o", str(tmp_path / "new"), *wrong])
        assert end.value.code == 2
