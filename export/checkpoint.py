"""A checkpoint in the official layout of MiniCPM-Llama3-V 2.5, opened without reading a weight.

The folder holds `config.json`, `tokenizer.json` and either `model.safetensors` or `model.safetensors.index.json` with
the shards it names; `tokenizer_config.json`, `preprocessor_config.json` and `generation_config.json` are read where
present. Opening checks all of it: JSON, every shard's header, names and shapes of all tensors against the reference
model. What is wrong is listed in one error. No code of the checkpoint is ever run: `auto_map` is ignored, and pickled
weights are refused because unpickling runs code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lensc.backends.bundle import DecoderSpec, GenerationSpec, ModelSpec, PictureSpec
from lensc.backends.errors import CheckpointError, listed

from .fingerprint import file_state, sha256_of
from .models.config import ModelConfig
from .models.minicpmv import MiniCPMV
from .shards import DTYPES, TensorRecord, read_header, read_rows, read_tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
OPTIONAL_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")

JSON_BYTES = 256 << 20
"""The real tokenizer.json has 9 MB; no JSON file of a checkpoint comes near this."""

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPECIAL_TOKENS = (
    BOS, EOS, EOT, "<unk>", "<|start_header_id|>", "<|end_header_id|>",
    "<image>", "</image>", "<slice>", "</slice>",
)  # fmt: skip
"""What the prompt template and the picture placeholders are made of; tokenizer.json must know each by this spelling."""


class WeightSource(Protocol):
    """Where weights come from, one at a time: a `Checkpoint`, or one with an adapter merged into it."""

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Every tensor's name, with the dtype and shape in which `tensor` returns it."""

    @property
    def sha256(self) -> str:
        """The identity of all weights, configuration and tokenizer."""

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, read now; its memory is its own. Raises CheckpointError; KeyError if unknown."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of the tensor `name`; no other row is read. Raises as `tensor` does.

        IndexError if it has no such rows.
        """


class Checkpoint:
    """A checked checkpoint folder, which must not change from now on.

    `tensors` maps every tensor's name to its file, dtype and shape, `config` is the parsed config.json.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open and check `folder`. Raises CheckpointError that lists what is wrong."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            found = "is a file" if self.folder.exists() else "not found"
            raise CheckpointError(
                f"checkpoint {self.folder}: {found}, expected a folder with config.json and {WEIGHTS}"
            )
        self._refuse_pickles()
        # Taken before anything is read: what changes from here on is noticed.
        self._states = {path: file_state(path) for path in self._small_files()}
        self.config = ModelConfig.from_json(self._json("config.json"), str(self.folder / "config.json"))
        self.tensors: Mapping[str, TensorRecord] = self._read_headers()
        self._check_tensors()

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER

    @cached_property
    def sha256(self) -> str:
        """The identity of the checkpoint: SHA-256 over name and SHA-256 of every file that is read. Reads them all."""
        digest = hashlib.sha256()
        for path in sorted(self._states.keys() | {self.tokenizer}):
            state = self._states.get(path) or file_state(path)
            digest.update(f"{sha256_of(path, state)}  {path.name}\n".encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file of the checkpoint is not what it was when it was opened."""
        for path, state in self._states.items():
            state.check(path, file_state(path))

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` as stored, read now; its memory is its own. Raises CheckpointError; KeyError if unknown."""
        record = self.tensors[name]
        return read_tensor(record, self._states[record.file])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of the tensor `name`; no other row is read. Raises as `tensor` does.

        IndexError if it has no such rows.
        """
        record = self.tensors[name]
        return read_rows(record, self._states[record.file], start, stop)

    def load_model(self, dtype: torch.dtype = torch.float32) -> MiniCPMV:
        """The reference model with all weights in `dtype`; see the function `load_model`."""
        return load_model(self, self.config, str(self.folder), dtype)

    def model_spec(self) -> ModelSpec:
        """What the runtime needs to know, from config.json, the preprocessor's and the tokenizer's files.

        Raises CheckpointError that lists where these disagree.
        """
        config = self.config
        problems: list[str] = []
        mean, std = self._preprocessor(problems)
        eos_token_ids, pad_token_id = self._special_tokens(problems)
        if problems:
            raise CheckpointError(f"{self.folder}: " + listed(problems, "; "))
        return ModelSpec(
            name=self._name(),
            picture=PictureSpec(
                scale_resolution=config.scale_resolution,
                patch_size=config.patch_size,
                max_slice_nums=config.max_slice_nums,
                query_num=config.query_num,
                vision_padding="official" if config.batch_vision_input else "per_slice",
                mean=mean,
                std=std,
                pos_grid=config.vision.pos_grid,
            ),
            decoder=DecoderSpec(
                hidden_size=config.hidden_size,
                num_layers=config.num_hidden_layers,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                vocab_size=config.vocab_size,
                context_length=config.max_position_embeddings,
            ),
            generation=GenerationSpec(eos_token_ids=eos_token_ids, pad_token_id=pad_token_id),
        )

    # --- files ----------------------------------------------------------------------------------------------------

    def _refuse_pickles(self) -> None:
        try:
            found = sorted(path.name for path in self.folder.iterdir() if path.suffix.lower() in PICKLES)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read: {error.strerror}") from error
        if found:
            raise CheckpointError(
                f"{self.folder}: {listed(found)}: pickled files are refused, because unpickling can run any code; "
                "convert the weights to safetensors and remove them from the folder"
            )

    def _json(self, name: str) -> Any:
        return read_json(self.folder / name, f"a checkpoint folder has config.json, {TOKENIZER} and {WEIGHTS}")

    def _object(self, name: str, problems: list[str]) -> dict[str, Any]:
        """The JSON object in an optional file, {} where there is none."""
        if name in OPTIONAL_FILES and not (self.folder / name).exists():
            return {}
        data = self._json(name)
        if not isinstance(data, dict):
            problems.append(f"{name}: expected a JSON object, found {type(data).__name__}")
            return {}
        return data

    def _small_files(self) -> list[Path]:
        """Every file that is read besides the weights, as far as it is there."""
        names = ("config.json", TOKENIZER, INDEX, *OPTIONAL_FILES)
        return [self.folder / name for name in names if os.path.isfile(self.folder / name)]

    def _header(self, path: Path) -> dict[str, TensorRecord]:
        if os.path.isfile(path):
            self._states[path] = file_state(path)
        return read_header(path)

    def _read_headers(self) -> dict[str, TensorRecord]:
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        if single.exists() and index.exists():
            raise CheckpointError(
                f"{self.folder}: holds both {WEIGHTS} and {INDEX}; remove the one that does not belong"
            )
        if single.exists():
            return self._header(single)
        if index.exists():
            return self._read_shards()
        raise CheckpointError(f"{self.folder}: neither {WEIGHTS} nor {INDEX} found")

    def _read_shards(self) -> dict[str, TensorRecord]:
        data = self._json(INDEX)
        weight_map = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{self.folder / INDEX}: expected weight_map, an object of tensor name to file name")
        names = sorted(set(weight_map.values()))
        problems = [f"{n!a} is not the name of a .safetensors file in this folder" for n in names if _outside(n)]
        problems += [
            f"shard {n} is named but missing" for n in names if not _outside(n) and not (self.folder / n).exists()
        ]
        shards = sorted(path.name for path in self.folder.glob("model-*.safetensors"))
        problems += [f"shard {name} is in the folder but not named" for name in shards if name not in names]
        if problems:
            raise CheckpointError(f"{self.folder / INDEX}: " + listed(problems, "; "))
        tensors: dict[str, TensorRecord] = {}
        for shard in names:
            for name, record in self._header(self.folder / shard).items():
                if name in tensors:
                    problems.append(f"{name} is in both {tensors[name].file.name} and {shard}")
                elif name not in weight_map:
                    problems.append(f"{name} is in {shard} but not in the index")
                elif weight_map[name] != shard:
                    problems.append(f"{name} is in {shard}, the index says {weight_map[name]}")
                tensors.setdefault(name, record)
        problems += [f"{name} is not in {shard}" for name, shard in weight_map.items() if name not in tensors]
        if problems:
            raise CheckpointError(f"{self.folder / INDEX}: {len(problems)} wrong entries: " + listed(problems, "; "))
        return tensors

    # --- checks ---------------------------------------------------------------------------------------------------

    def _check_tensors(self) -> None:
        """Compare names, shapes and dtypes with the reference model's."""
        layers = max(self.config.num_hidden_layers, self.config.vision.num_hidden_layers)
        if layers > len(self.tensors):
            raise CheckpointError(
                f"{self.folder}: config.json asks for {layers} layers, the weights have only {len(self.tensors)} tensors"
            )
        with torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in MiniCPMV(self.config).state_dict().items()}
        missing = [name for name in expected if name not in self.tensors]
        unexpected = [ascii(name)[1:-1] for name in self.tensors if name not in expected]
        misshapen = [
            f"{name} {list(record.shape)} instead of {list(expected[name])}"
            for name, record in self.tensors.items()
            if name in expected and record.shape != expected[name]
        ]
        unsupported = [
            f"{name} {record.dtype}"
            for name, record in self.tensors.items()
            if name in expected and record.dtype not in DTYPES
        ]
        problems = [
            f"{len(names)} {what}: {listed(names)}"
            for what, names in (
                ("missing tensors", missing),
                ("unexpected tensors", unexpected),
                ("misshapen tensors", misshapen),
                (f"tensors with a dtype other than {', '.join(DTYPES)}", unsupported),
            )
            if names
        ]
        if problems:
            raise CheckpointError(f"{self.folder}: weights do not fit config.json: " + "; ".join(problems))

    def _preprocessor(self, problems: list[str]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and deviation; what preprocessor_config.json and config.json both say must agree."""
        file, config = "preprocessor_config.json", self.config
        data = self._object(file, problems)
        both = {
            "scale_resolution": config.scale_resolution,
            "max_slice_nums": config.max_slice_nums,
            "patch_size": config.patch_size,
            "image_feature_size": config.query_num,
        }
        problems += [
            f"{file}: {key} is {ascii(data[key])[:60]}, config.json says {value}"
            for key, value in both.items()
            if key in data and data[key] != value
        ]
        values = []
        for key, least in (("norm_mean", 0.0), ("norm_std", 1e-3)):
            value = data.get(key, [0.5, 0.5, 0.5])
            if not isinstance(value, list) or len(value) != 3 or not all(_is_between(v, least, 1.0) for v in value):
                problems.append(f"{file}: {key} is {ascii(value)[:60]}, expected three numbers of {least} to 1")
                value = [0.5, 0.5, 0.5]
            values.append((float(value[0]), float(value[1]), float(value[2])))
        return values[0], values[1]

    def _special_tokens(self, problems: list[str]) -> tuple[tuple[int, ...], int]:
        """Stop ids (eos and eot) and the pad id."""
        self._object("generation_config.json", problems)
        pad = self._object("tokenizer_config.json", problems).get("pad_token", "!")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        tokenizer = self._object(TOKENIZER, problems)
        model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocabulary, dict) or not isinstance(added, list):
            problems.append(f"{TOKENIZER}: expected model.vocab and added_tokens")
            return (), 0
        if not isinstance(pad, str):
            problems.append(f"tokenizer_config.json: pad_token is {ascii(pad)[:60]}, expected a string")
            return (), 0
        known = {t["content"]: t.get("id") for t in added if isinstance(t, dict) and isinstance(t.get("content"), str)}
        ids = {token: known.get(token) for token in SPECIAL_TOKENS}
        ids[pad] = known.get(pad, vocabulary.get(pad))
        rows = self.config.vocab_size
        valid: dict[str, int] = {}
        for token, value in ids.items():
            if value is None:
                problems.append(f"{TOKENIZER}: special token {ascii(token)[:60]} is missing")
            elif type(value) is not int or not 0 <= value < rows:
                problems.append(f"{TOKENIZER}: {token} has id {ascii(value)[:60]}, the vocabulary has {rows} rows")
            else:
                valid[token] = value
        for token, key in ((BOS, "bos_token_id"), (EOS, "eos_token_id")):
            stated = getattr(self.config, key)
            if valid.get(token, stated) != stated:
                problems.append(f"{TOKENIZER}: {token} has id {valid[token]}, config.json's {key} is {stated}")
        return tuple(valid[token] for token in (EOS, EOT) if token in valid), valid.get(pad, 0)

    def _name(self) -> str:
        """The model's name: the last part of config.json's `_name_or_path`, else the folder's name."""
        data = self._json("config.json")
        stated = data.get("_name_or_path") if isinstance(data, dict) else None
        name = stated.rstrip("/").rpartition("/")[2] if isinstance(stated, str) else ""
        return name if re.fullmatch(r"[\w.+ -]{1,100}", name) else self.folder.resolve().name


class AlteredCheckpoint:
    """Base of what stands in the place of a `Checkpoint` with other weights; all else is the checkpoint's."""

    checkpoint: Checkpoint | AlteredCheckpoint

    def __init__(self, checkpoint: Checkpoint | AlteredCheckpoint) -> None:
        self.checkpoint = checkpoint

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def tokenizer(self) -> Path:
        return self.checkpoint.tokenizer

    def check_unchanged(self) -> None:
        """See `Checkpoint.check_unchanged`."""
        self.checkpoint.check_unchanged()

    def model_spec(self) -> ModelSpec:
        """See `Checkpoint.model_spec`."""
        return self.checkpoint.model_spec()


def load_model(weights: WeightSource, config: ModelConfig, source: str, dtype: torch.dtype = torch.float32) -> MiniCPMV:
    """The reference model with all `weights` in `dtype`, in eval mode, without gradients; `source` names it in errors.

    Holds each weight once. Raises CheckpointError that names every tensor with NaN or Inf.
    """
    with torch.device("meta"):
        model = MiniCPMV(config)
    state: dict[str, Tensor] = {}
    damaged: list[str] = []
    too_large: list[str] = []
    for name in weights.tensors:
        stored = weights.tensor(name)
        state[name] = stored.to(dtype)
        if not bool(torch.isfinite(state[name]).all()):
            (too_large if bool(torch.isfinite(stored).all()) else damaged).append(name)
    if damaged:
        raise CheckpointError(f"{source}: {len(damaged)} tensors hold NaN or Inf: {listed(damaged)}")
    if too_large:
        raise CheckpointError(f"{source}: {len(too_large)} tensors do not fit {dtype}: {listed(too_large)}")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def read_json(path: Path, expected: str) -> Any:
    """What the JSON file `path` holds. Raises CheckpointError; `expected` says in it why the file should be there."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: not found, {expected}")
        if path.stat().st_size > JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, expected at most {JSON_BYTES}")
        return json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError:
        raise CheckpointError(f"{path}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {str(error)[:120]}; copy the file again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _outside(name: str) -> bool:
    return not name.endswith(".safetensors") or Path(name).name != name or "\\" in name or not name.isprintable()


def _is_between(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most
