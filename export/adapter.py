"""LoRA adapters in PEFT's format, merged into a checkpoint while its weights are read.

The folder holds `adapter_config.json` and `adapter_model.safetensors`. A module with factors A [r, in] and B [out, r]
gets the weight W + s·B·A; an embedding with A [r, rows] and B [columns, r] gets W + s·(B·A)ᵀ; modules that were
trained as a whole (`modules_to_save`) are in the file as they are and replace those of the checkpoint.

The product is computed in float64 and the sum rounded once, to float32: a merged weight is the same whether it is read
at once or in pieces, and rounding it to float16 here would be one rounding too many for who quantizes it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from lensc.backends.errors import CheckpointError, listed

from .adapter_config import LoraConfig
from .checkpoint import AlteredCheckpoint, Checkpoint, load_model, read_json
from .fingerprint import file_state, sha256_of
from .models.minicpmv import MiniCPMV
from .shards import DTYPES, TensorRecord, read_header, read_rows, read_tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

PREFIX = "base_model.model."
"""PEFT wraps the model twice; what follows is the name in the checkpoint."""

EMBEDDINGS = ("llm.model.embed_tokens.weight", "llm.lm_head.weight")
"""PEFT saves both unchanged beside the factors when one of them has an adapter."""

PIECE = 4 << 20
"""Values of a merged weight that are computed at once: 32 MB in float64. Smaller pieces are faster on one thread, and
several times slower on two that must wait for each other on a busy machine."""

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?")
_WRAPPED = re.compile(r"\.base_layer\.(?=weight$|bias$)")


@dataclass(frozen=True)
class Factors:
    """The two factors of a module's adapter. Linear: a [r, in], b [out, r]; embedding: a [r, rows], b [columns, r]."""

    a: TensorRecord
    b: TensorRecord
    embedding: bool

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that they change."""
        inputs, outputs = self.a.shape[1], self.b.shape[0]
        return (inputs, outputs) if self.embedding else (outputs, inputs)


class Adapter:
    """A checked adapter folder, which must not change from now on.

    `factors` maps the name of every module with an adapter to its tensors, `saved` the name of every tensor that
    replaces one of the checkpoint to its record.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open and check `folder`; no weight is read. Raises CheckpointError that lists what is wrong."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            found = "is a file" if self.folder.exists() else "not found"
            raise CheckpointError(f"adapter {self.folder}: {found}, expected a folder with {CONFIG} and {WEIGHTS}")
        self._check_files()
        self._states = {path: file_state(path) for path in (self.folder / CONFIG, self.folder / WEIGHTS)}
        expected = f"an adapter folder has {CONFIG} and {WEIGHTS}"
        self.config = LoraConfig.from_json(read_json(self.folder / CONFIG, expected), str(self.folder / CONFIG))
        self.factors: dict[str, Factors] = {}
        self.saved: dict[str, TensorRecord] = {}
        problems = self._sort(read_header(self.folder / WEIGHTS))
        if problems:
            raise CheckpointError(f"{self.folder / WEIGHTS}: " + listed(problems, "; "))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over name and SHA-256 of both files. Reads them."""
        digest = hashlib.sha256()
        for path, state in self._states.items():
            digest.update(f"{sha256_of(path, state)}  {path.name}\n".encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file of the adapter is not what it was when it was opened."""
        for path, state in self._states.items():
            state.check(path, file_state(path))

    def read(self, record: TensorRecord) -> Tensor:
        """The tensor of `record`, one of this adapter's, as stored. Raises CheckpointError."""
        return read_tensor(record, self._states[record.file])

    def read_rows(self, record: TensorRecord, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the tensor of `record`. Raises CheckpointError, or IndexError."""
        return read_rows(record, self._states[record.file], start, stop)

    def _check_files(self) -> None:
        """Refuse a folder with no adapter or several, and pickled weights."""
        try:
            nested = sorted(path.parent.name for path in self.folder.glob(f"*/{CONFIG}"))
            present = {path.name for path in self.folder.iterdir()}
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read: {error.strerror}") from error
        nested = [name for name in nested if not re.fullmatch(r"checkpoint-\d+", name)]  # a trainer's earlier states
        if nested:
            found = [*(["one at the top"] if CONFIG in present else []), *nested]
            raise CheckpointError(
                f"{self.folder}: holds {len(found)} adapters ({listed(found)}), one can be merged; "
                "give the folder of the one that is meant, moved out of this if it is the one at the top"
            )
        if PICKLE in present and WEIGHTS not in present:
            raise CheckpointError(
                f"{self.folder / PICKLE}: pickled files are refused, because unpickling can run any code; "
                f"save the adapter with safe_serialization=True, as {WEIGHTS}"
            )
        for name in (CONFIG, WEIGHTS):
            if name not in present:
                raise CheckpointError(f"{self.folder / name}: not found, an adapter folder has {CONFIG} and {WEIGHTS}")

    def _sort(self, records: Mapping[str, TensorRecord]) -> list[str]:
        """Fill `factors` and `saved` from the file's tensors; return what is wrong."""
        problems: list[str] = []
        sides: dict[str, dict[str, TensorRecord]] = {}
        embeddings: set[str] = set()
        adapters: set[str] = set()
        biases: list[str] = []
        for key, record in records.items():
            shown = ascii(key)[1:-1][:120]
            name = key.removeprefix(PREFIX)
            factor, embedding = _FACTOR.fullmatch(name), _EMBEDDING_FACTOR.fullmatch(name)
            found = factor or embedding
            if name == key:
                problems.append(f"{shown}: expected a name that begins with {PREFIX}")
            elif record.dtype not in DTYPES:
                problems.append(f"{shown} is {record.dtype}, expected one of {', '.join(DTYPES)}")
            elif found is not None:
                adapters.add(found["adapter"] or "")
                embeddings |= {found["module"]} if embedding else set()
                sides.setdefault(found["module"], {})[found["side"]] = record
            elif "lora_magnitude_vector" in name:
                problems.append(f"{shown}: DoRA also changes the length of the rows, which is not supported")
            elif "lora_" in name:
                problems.append(f"{shown}: expected lora_A.weight, lora_B.weight, lora_embedding_A or lora_embedding_B")
            elif name.endswith("bias") and self.config.bias != "none":
                biases.append(shown)
            elif (replaced := _WRAPPED.sub(".", name)) in self.saved:
                problems.append(f"{shown} is there twice, with and without base_layer")
            else:
                self.saved[replaced] = record
        if biases:
            problems.append(
                f"bias is {self.config.bias!r} and {len(biases)} trained biases are there, which are not supported: "
                + listed(biases, limit=3)
            )
        if len(adapters) > 1:
            names = listed(sorted(ascii(name)[1:-1] or "one without a name" for name in adapters))
            problems.append(f"holds {len(adapters)} adapters ({names}), one can be merged; save each of them alone")
        if not sides and not self.saved and not problems:
            problems.append("holds no tensors")
        for module, pair in sides.items():
            self._add(module, pair, module in embeddings, problems)
        return problems

    def _add(self, module: str, pair: Mapping[str, TensorRecord], embedding: bool, problems: list[str]) -> None:
        shown, rank = ascii(module)[1:-1][:120], self.config.rank_of(module)
        missing = [side for side in "AB" if side not in pair]
        if missing:
            problems.append(f"{shown} has no lora_{missing[0]}")
            return
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2:
            problems.append(f"{shown}: lora_A is {list(a.shape)}, lora_B {list(b.shape)}; only matrices are supported")
        elif (a.shape[0], b.shape[1]) != (rank, rank):
            problems.append(
                f"{shown}: lora_A {list(a.shape)} and lora_B {list(b.shape)} have not the rank {rank} of {CONFIG}"
            )
        else:
            self.factors[module] = Factors(a, b, embedding)


class MergedCheckpoint(AlteredCheckpoint):
    """A checkpoint with an adapter merged into it: a `WeightSource`, and what else an export asks of a `Checkpoint`.

    Weights with an adapter are read in float32, all others as they are stored.
    """

    checkpoint: Checkpoint

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        """Check that `adapter` fits `checkpoint`, and that its factors are finite, for which they are read.

        Raises CheckpointError that lists what does not fit.
        """
        super().__init__(checkpoint)
        self.adapter = adapter
        problems = _misfits(checkpoint, adapter)
        if problems:
            raise CheckpointError(
                f"{adapter.folder}: the adapter does not fit {checkpoint.folder}: " + listed(problems, "; ")
            )
        self._check_finite()
        self.tensors: Mapping[str, TensorRecord] = {name: self._record(name) for name in checkpoint.tensors}

    @cached_property
    def sha256(self) -> str:
        """The identity of checkpoint and adapter together. Reads all files."""
        return hashlib.sha256(f"{self.checkpoint.sha256}\n{self.adapter.sha256}\n".encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file of the checkpoint or the adapter is not what it was when it was opened."""
        super().check_unchanged()
        self.adapter.check_unchanged()

    def load_model(self, dtype: torch.dtype = torch.float32) -> MiniCPMV:
        """The reference model with all weights, merged, in `dtype`. Raises CheckpointError."""
        return load_model(self, self.config, f"{self.folder} with {self.adapter.folder}", dtype)

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, merged if it has an adapter, else as stored. Raises CheckpointError; KeyError if unknown."""
        factors = self._factors(name)
        if factors is None:
            saved = self.adapter.saved.get(name)
            return self.checkpoint.tensor(name) if saved is None else self.adapter.read(saved)
        return self._merged(name, factors, 0, self.tensors[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of the tensor `name`; no other row of it is read. Raises as `tensor` does.

        IndexError if it has no such rows.
        """
        factors = self._factors(name)
        if factors is not None:
            return self._merged(name, factors, start, stop)
        return self._stored_rows(name, start, stop)

    def _factors(self, name: str) -> Factors | None:
        return self.adapter.factors.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def _record(self, name: str) -> TensorRecord:
        stored = self.adapter.saved.get(name, self.checkpoint.tensors[name])
        if self._factors(name) is None:
            return replace(stored, name=name)
        return replace(stored, name=name, dtype="F32", nbytes=4 * prod(stored.shape))

    def _stored_rows(self, name: str, start: int, stop: int) -> Tensor:
        saved = self.adapter.saved.get(name)
        return self.checkpoint.rows(name, start, stop) if saved is None else self.adapter.read_rows(saved, start, stop)

    def _merged(self, name: str, factors: Factors, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the merged weight, float32."""
        rows, columns = self.tensors[name].shape
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"tensor {name} [{rows}, {columns}] has no rows {start} to {stop}")
        a = self.adapter.read(factors.a)
        right = self.adapter.read(factors.b).T.double() if factors.embedding else a.double()
        scale = self.adapter.config.scale_of(name.removesuffix(".weight"))
        merged = torch.empty((stop - start, columns), dtype=torch.float32)
        step = max(1, PIECE // columns)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            left = a[:, first:last].T if factors.embedding else self.adapter.read_rows(factors.b, first, last)
            weight = self._stored_rows(name, first, last).double()
            merged[first - start : last - start] = weight.addmm_(left.double(), right, alpha=scale)
        return merged

    def _check_finite(self) -> None:
        damaged = [
            f"{ascii(record.name)[1:-1]}"
            for factors in self.adapter.factors.values()
            for record in (factors.a, factors.b)
            if not bool(torch.isfinite(self.adapter.read(record)).all())
        ]
        if damaged:
            raise CheckpointError(f"{self.adapter.folder}: {len(damaged)} tensors hold NaN or Inf: {listed(damaged)}")


def _misfits(checkpoint: Checkpoint, adapter: Adapter) -> list[str]:
    """Why `adapter` is not one for `checkpoint`: names, kinds, shapes, and what is targeted or saved but not there."""
    with torch.device("meta"):
        model = MiniCPMV(checkpoint.config)
    modules = dict(model.named_modules())
    problems = []
    for module, factors in adapter.factors.items():
        shown, found = ascii(module)[1:-1][:120], modules.get(module)
        if not isinstance(found, (nn.Linear, nn.Embedding)):
            known = f"is a {type(found).__name__}, no linear layer or embedding" if found else "is no module of it"
            problems.append(f"{shown} {known}")
        elif factors.embedding != isinstance(found, nn.Embedding):
            kind = "an embedding" if factors.embedding else "a linear layer"
            problems.append(f"{shown} is a {type(found).__name__}, the adapter has factors of {kind}")
        elif factors.shape != tuple(found.weight.shape):
            problems.append(f"{shown}: factors of {list(factors.shape)} instead of {list(found.weight.shape)}")
        elif not adapter.config.targets(module, isinstance(found, nn.Linear)) and not _is_saved(
            adapter.config, module, modules
        ):
            problems.append(f"{shown} has an adapter but is not among the target_modules")
    lacking = [
        name
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, nn.Embedding))
        if adapter.config.targets(name, isinstance(module, nn.Linear))
        if name not in adapter.factors and f"{name}.weight" not in adapter.saved
    ]
    if lacking:
        problems.append(f"{len(lacking)} of its target_modules have no lora_A and lora_B: {listed(lacking)}")
    return problems + _saved_misfits(checkpoint, adapter, modules)


def _saved_misfits(checkpoint: Checkpoint, adapter: Adapter, modules: Mapping[str, nn.Module]) -> list[str]:
    """What is wrong with the modules that the adapter holds as a whole."""
    problems = []
    for name, record in adapter.saved.items():
        shown, stored = ascii(name)[1:-1][:120], checkpoint.tensors.get(name)
        if stored is None:
            problems.append(f"{shown} is no tensor of it")
        elif stored.shape != record.shape:
            problems.append(f"{shown} is {list(record.shape)} instead of {list(stored.shape)}")
        elif name not in EMBEDDINGS and not _is_saved(adapter.config, name, modules):
            problems.append(f"{shown} is there but belongs to none of the modules_to_save")
    for saved in adapter.config.modules_to_save:
        if not any(name.endswith(saved) for name in modules):
            problems.append(f"modules_to_save names {ascii(saved)[:60]}, which it does not have")
    missing = [
        name for name in checkpoint.tensors if name not in adapter.saved and _is_saved(adapter.config, name, modules)
    ]
    if missing:
        problems.append(f"{len(missing)} tensors of the modules_to_save are missing: {listed(missing)}")
    return problems


def _is_saved(config: LoraConfig, name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether `name`, of a tensor or module, lies in one of the modules_to_save; PEFT compares ends of names."""
    parts = name.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(path in modules and path.endswith(config.modules_to_save) for path in above)
