"""The stages from a checkpoint to verified portable graphs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lensc.backends import registry
from lensc.backends.base import Artifact, Session, Target, file_record
from lensc.backends.bundle import GraphRecord, ModelSpec, ParityRecord, ProbeRecord
from lensc.backends.errors import CheckpointError, TokenizerError, UnavailableError
from lensc.runtime.embedding import SCALES, TABLE, open_table
from lensc.runtime.prompt import Tokenizer

from .checkpoint import TOKENIZER, Checkpoint
from .engines import close, usable
from .graph import GraphSpec
from .models.minicpmv import MiniCPMV
from .models.session import decoder_spec, graph_modules, torch_sessions, vision_spec
from .onnx import THIRDS, example_inputs, trace_graph
from .provenance import code_key
from .quantize.linears import find_linears
from .quantize.recipe import EMBEDDING, Recipe
from .quantize.weights import dequantize, quantize_rows_int8, quantize_rtn
from .questions import questions_for
from .stages import Staging
from .verify import make_probes, min_sqnr_db, verify_model
from .writer import DATA_SUFFIX, write_graph

TABLES = {TABLE: "embed_tokens.npy", SCALES: "embed_tokens.scale.npy"}
"""File names."""

TABLE_PIECE_BYTES = 32 << 20
"""Of float32, at once."""

TOKENIZER_CONFIG = "tokenizer_config.json"
PROBES = "probe"
GRAPHS = ("vision", "decoder")
STAGES = len(GRAPHS) + 4
"""How many stages `export_graphs` has."""

QUANTIZED = "torch float32, quantized weights"
"""The name of `Source.quantized_reference` in parity records."""

PORTABLE_ENGINES = (Target("onnxruntime", "cpu"), Target("reference", "cpu"))
"""Who runs the portable graphs for the parity report: the first that is usable here."""

NOT_LINEAR = ("embed_tokens.weight", "position_embedding.weight", "resampler.query")
"""Matrices that are looked up, not multiplied with."""

ANSWER_TOKENS = 32
"""Length of the greedy answers that are compared."""

Paths = list[Path]


class Source:
    """A checkpoint, and what is made from it once, when the first stage needs it."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        """Check what can be checked without reading weights. Raises CheckpointError or TokenizerError."""
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.spec: ModelSpec = checkpoint.model_spec()
        self.tokenizer = Tokenizer.from_file(checkpoint.tokenizer)
        rows = self.spec.decoder.vocab_size
        if self.tokenizer.vocab_size > rows:
            raise TokenizerError(
                f"{checkpoint.tokenizer}: has {self.tokenizer.vocab_size} tokens, the embedding table has {rows} rows; "
                "take both from the same checkpoint"
            )

    @property
    def graph_bytes(self) -> int:
        """Bytes of both graphs, at most: weights that are no linears stay float32."""
        return sum(self._bytes_of(r.name, r.shape) for r in self.checkpoint.tensors.values() if r.name != EMBEDDING)

    @property
    def table_bytes(self) -> int:
        """Bytes of the embedding table, which is in none of the graphs, at most."""
        return self._bytes_of(EMBEDDING, self.checkpoint.tensors[EMBEDDING].shape)

    @cached_property
    def key(self) -> dict[str, str]:
        """What every stage depends on."""
        return {"checkpoint": self.checkpoint.sha256, "recipe": self.recipe.to_toml(), **code_key()}

    @cached_property
    def reference(self) -> dict[str, Session]:
        """The reference model's sessions; loads all weights."""
        return torch_sessions(self.checkpoint.load_model())

    @cached_property
    def quantized_reference(self) -> dict[str, Session]:
        """The reference model with the weights that the recipe's values stand for: what the graphs must compute."""
        if self.recipe.is_float:
            return self.reference
        model = self.checkpoint.load_model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                for rows in _linear_rows(name, parameter):
                    format = self.recipe.format_of(rows.name)
                    if format is not None:
                        rows.weight.copy_(dequantize(quantize_rtn(rows.weight.contiguous(), format)))
        return torch_sessions(model)

    @cached_property
    def specs(self) -> dict[str, GraphSpec]:
        """The signatures of the graphs."""
        config = self.checkpoint.config
        return {"vision": vision_spec(config), "decoder": decoder_spec(config)}

    @property
    def schemes(self) -> dict[str, str]:
        """The scheme of each graph."""
        with torch.device("meta"):
            model = MiniCPMV(self.checkpoint.config)
        found = {}
        for graph, (module, _) in graph_modules(model).items():
            linears = [r.name for n, p in module.state_dict().items() for r in _linear_rows(n, p)]
            found[graph] = str(self.recipe.scheme(graph, linears))
        return found

    def _bytes_of(self, name: str, shape: tuple[int, ...]) -> int:
        format = self.recipe.format_of(name) if len(shape) == 2 else None
        return 4 * prod(shape) if format is None else format.bytes_for((shape[0], shape[1]))


@dataclass(frozen=True)
class _Rows:
    """A linear's weight [outputs, inputs], a view of a parameter."""

    name: str
    weight: Tensor


def _linear_rows(name: str, parameter: Tensor) -> list[_Rows]:
    """The linears whose weights lie in a parameter, under the names they have in the graphs."""
    if parameter.ndim != 2 or name.endswith(NOT_LINEAR):
        return []
    if name.endswith("in_proj_weight"):
        return [_Rows(f"{name}.{third}", part) for third, part in zip(THIRDS, parameter.chunk(3), strict=True)]
    if name == "resampler.proj":
        return [_Rows(name, parameter.T)]
    return [_Rows(name, parameter)]


@dataclass(frozen=True)
class Exported:
    """Paths of `graphs` are relative to the folder of graphs, those of `probes` to the tree."""

    graphs: dict[str, GraphRecord]
    tables: dict[str, str]
    probes: tuple[ProbeRecord, ...]
    parity: tuple[ParityRecord, ...]


def export_graphs(staging: Staging, source: Source, folder: Path) -> Exported:
    """Write the graphs into `folder`, everything else that a bundle needs into the tree of `staging`."""
    key, tree, checkpoint = source.key, staging.tree, source.checkpoint
    # The probes come first: they load the model, which finds weights that are NaN before the long part begins.
    probes = staging.stage("golden probes", key, tuple[ProbeRecord, ...], partial(_probes, source, tree))
    tables = staging.stage("embedding table", key, dict[str, str], partial(_table, source, tree))
    names = [TOKENIZER, *([TOKENIZER_CONFIG] if (checkpoint.folder / TOKENIZER_CONFIG).is_file() else [])]
    staging.stage("tokenizer", key, tuple[str, ...], partial(copy_files, checkpoint.folder, tree, names))
    graphs = {
        name: staging.stage(f"export {name}", key, GraphRecord, partial(_export, source, name, folder))
        for name in GRAPHS
    }
    key = key | {name: record.sha256 for name, record in graphs.items()}
    verify = partial(_verify, source, graphs, folder, tables, tree)
    parity = staging.stage("verify graphs", key, tuple[ParityRecord, ...], verify)
    return Exported(graphs, tables, probes, parity)


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> tuple[tuple[str, ...], Paths]:
    """A stage that copies the files `names` from `source` to `folder`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return tuple(names), [folder / name for name in names]


def _probes(source: Source, tree: Path) -> tuple[tuple[ProbeRecord, ...], Paths]:
    folder = tree / PROBES
    folder.mkdir(parents=True, exist_ok=True)
    int8 = [name for name, scheme in source.schemes.items() if min_sqnr_db(scheme) is not None]
    records = make_probes(source.quantized_reference, folder, int8)
    records = tuple(dataclasses.replace(record, file=f"{PROBES}/{record.file}") for record in records)
    return records, [tree / record.file for record in records]


def _table(source: Source, tree: Path) -> tuple[dict[str, str], Paths]:
    """The embedding table: int8 where the recipe says so, as stored where that is float16, else in float32.

    Written some rows at a time: at full size it has 1 GB as stored.
    """
    checkpoint = source.checkpoint
    record = checkpoint.tensors[EMBEDDING]
    rows, width = record.shape
    int8 = source.recipe.format_of(EMBEDDING) is not None
    dtype = np.int8 if int8 else np.float16 if record.dtype == "F16" else np.float32
    # the files are complete when the stage ends: an interrupted one is not in the journal
    table = np.lib.format.open_memmap(tree / TABLES[TABLE], mode="w+", dtype=dtype, shape=(rows, width))
    scales = np.empty(rows, np.float32)
    step = max(1, TABLE_PIECE_BYTES // (4 * width))
    for start in range(0, rows, step):
        piece = checkpoint.rows(EMBEDDING, start, min(start + step, rows)).float()
        if not bool(torch.isfinite(piece).all()):
            raise CheckpointError(f"{checkpoint.folder}: {EMBEDDING} holds NaN or Inf")
        part = slice(start, start + len(piece))
        if int8:
            values, step_sizes = quantize_rows_int8(piece)
            table[part], scales[part] = values.numpy(), step_sizes.numpy()
        else:
            table[part] = piece.numpy()
    table.flush()
    del table
    names = {TABLE: TABLES[TABLE]}
    if int8:
        np.save(tree / TABLES[SCALES], scales)
        names[SCALES] = TABLES[SCALES]
    return names, [tree / name for name in names.values()]


def _export(source: Source, name: str, folder: Path) -> tuple[GraphRecord, Paths]:
    """Export one graph; its weights are read a few rows at a time, while they are quantized and written."""
    checkpoint = source.checkpoint
    with torch.device("meta"):
        model = MiniCPMV(checkpoint.config)
    module, spec = graph_modules(model)[name]
    path = folder / name / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    traced, parameters = trace_graph(module, example_inputs(spec), spec)
    linears = find_linears(traced, parameters)
    formats = source.recipe.formats(linears)
    sha256 = write_graph(traced, path, parameters, checkpoint.rows, formats, key=json.dumps(source.key))
    scheme = str(source.recipe.scheme(name, linears))
    record = GraphRecord(spec, scheme, sha256, f"{name}/{path.name}")
    return record, [path, path.with_name(path.name + DATA_SUFFIX)]


def _verify(
    source: Source, graphs: Mapping[str, GraphRecord], folder: Path, tables: Mapping[str, str], tree: Path
) -> tuple[tuple[ParityRecord, ...], Paths]:
    """Compare the graphs as they are, not optimized, run by the first engine that can, with the model they came from:
    the one with the recipe's weights. What the recipe costs against the float model is measured as well.
    """
    target = _portable_engine()
    sessions: dict[str, Session] = {}
    try:
        for name, record in graphs.items():
            artifact = _as_artifact(name, record, target, folder)
            sessions[name] = registry.get(target.backend).load(artifact, record.spec, folder)
        table, questions = open_table(tree, tables), questions_for(source.spec)
        asked = (source.spec, source.tokenizer, table, questions, ANSWER_TOKENS)
        if source.recipe.is_float:
            return verify_model(source.reference, sessions, *asked), []
        records = verify_model(source.quantized_reference, sessions, *asked, against=QUANTIZED)
        records += verify_model(source.reference, source.quantized_reference, *asked, target=QUANTIZED, gate=False)
    finally:
        close(sessions)
    return records, []


def _portable_engine() -> Target:
    reasons = []
    for target in PORTABLE_ENGINES:
        here, reason = usable(target)
        if here:
            return target
        reasons.append(f"{target}: {reason}")
    raise UnavailableError("the graphs cannot be verified, no engine runs ONNX here: " + "; ".join(reasons))


def _as_artifact(name: str, record: GraphRecord, target: Target, folder: Path) -> Artifact:
    """The portable graph in the form in which engines load graphs: those above open ONNX files."""
    paths = [folder / str(record.file), folder / f"{record.file}{DATA_SUFFIX}"]
    files = tuple(file_record(path, folder) for path in paths)
    return Artifact(name, target, record.scheme, files, {}, {}, {}, {})
