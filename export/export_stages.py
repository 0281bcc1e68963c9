"""The stages from a checkpoint to verified portable graphs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path

import numpy as np
import torch

from lensc.backends import registry
from lensc.backends.base import Array, Artifact, Session, Target, file_record
from lensc.backends.bundle import GraphRecord, ModelSpec, ParityRecord, ProbeRecord
from lensc.backends.errors import TokenizerError, UnavailableError
from lensc.runtime.prompt import Tokenizer

from .checkpoint import TOKENIZER, Checkpoint
from .engines import close, usable
from .models.minicpmv import MiniCPMV
from .models.session import graph_modules, torch_sessions
from .onnx import DATA_SUFFIX, example_inputs, export_graph
from .provenance import code_key
from .questions import questions_for
from .stages import Staging
from .verify import make_probes, verify_model

TABLE = "embed_tokens.npy"
EMBEDDING = "llm.model.embed_tokens.weight"
TOKENIZER_CONFIG = "tokenizer_config.json"
PROBES = "probe"
GRAPHS = ("vision", "decoder")
STAGES = len(GRAPHS) + 4
"""How many stages `export_graphs` has."""

PORTABLE_ENGINES = (Target("onnxruntime", "cpu"), Target("reference", "cpu"))
"""Who runs the portable graphs for the parity report: the first that is usable here."""

ANSWER_TOKENS = 32
"""Length of the greedy answers that are compared."""

Paths = list[Path]


class Source:
    """A checkpoint, and what is made from it once, when the first stage needs it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Check what can be checked without reading weights. Raises CheckpointError or TokenizerError."""
        self.checkpoint = checkpoint
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
        """Bytes of both graphs in float32."""
        return 4 * sum(prod(r.shape) for r in self.checkpoint.tensors.values() if r.name != EMBEDDING)

    @property
    def table_bytes(self) -> int:
        """Bytes of the embedding table, which is in none of the graphs, in float32."""
        return 4 * prod(self.checkpoint.tensors[EMBEDDING].shape)

    @cached_property
    def key(self) -> dict[str, str]:
        """What every stage depends on."""
        return {"checkpoint": self.checkpoint.sha256, **code_key()}

    @cached_property
    def reference(self) -> dict[str, Session]:
        """The reference model's sessions; loads all weights."""
        return torch_sessions(self.checkpoint.load_model())


@dataclass(frozen=True)
class Exported:
    """Paths of `graphs` are relative to the folder of graphs, those of `probes` to the tree."""

    graphs: dict[str, GraphRecord]
    probes: tuple[ProbeRecord, ...]
    parity: tuple[ParityRecord, ...]


def export_graphs(staging: Staging, source: Source, folder: Path) -> Exported:
    """Write the graphs into `folder`, everything else that a bundle needs into the tree of `staging`."""
    key, tree, checkpoint = source.key, staging.tree, source.checkpoint
    # The probes come first: they load the model, which finds weights that are NaN before the long part begins.
    probes = staging.stage("golden probes", key, tuple[ProbeRecord, ...], partial(_probes, source, tree))
    staging.stage("embedding table", key, str, partial(_table, checkpoint, tree))
    names = [TOKENIZER, *([TOKENIZER_CONFIG] if (checkpoint.folder / TOKENIZER_CONFIG).is_file() else [])]
    staging.stage("tokenizer", key, tuple[str, ...], partial(copy_files, checkpoint.folder, tree, names))
    graphs = {
        name: staging.stage(f"export {name}", key, GraphRecord, partial(_trace, source, name, folder))
        for name in GRAPHS
    }
    key = key | {name: record.sha256 for name, record in graphs.items()}
    parity = staging.stage(
        "verify graphs", key, tuple[ParityRecord, ...], partial(_verify, source, graphs, folder, tree)
    )
    return Exported(graphs, probes, parity)


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> tuple[tuple[str, ...], Paths]:
    """A stage that copies the files `names` from `source` to `folder`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return tuple(names), [folder / name for name in names]


def open_table(folder: Path) -> Array:
    """The embedding table in `folder`, memory-mapped."""
    return np.asarray(np.load(folder / TABLE, mmap_mode="r", allow_pickle=False))


def _probes(source: Source, tree: Path) -> tuple[tuple[ProbeRecord, ...], Paths]:
    folder = tree / PROBES
    folder.mkdir(parents=True, exist_ok=True)
    records = make_probes(source.reference, folder)
    records = tuple(dataclasses.replace(record, file=f"{PROBES}/{record.file}") for record in records)
    return records, [tree / record.file for record in records]


def _table(checkpoint: Checkpoint, tree: Path) -> tuple[str, Paths]:
    """The embedding table: as stored where that is float16, else in float32."""
    stored = checkpoint.tensor(EMBEDDING)
    np.save(tree / TABLE, stored.to(torch.float16 if stored.dtype == torch.float16 else torch.float32).numpy())
    return TABLE, [tree / TABLE]


def _trace(source: Source, name: str, folder: Path) -> tuple[GraphRecord, Paths]:
    """Export one graph; its weights are read one by one, while they are written."""
    checkpoint = source.checkpoint
    with torch.device("meta"):
        model = MiniCPMV(checkpoint.config)
    module, spec = graph_modules(model)[name]
    path = folder / name / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = export_graph(module, example_inputs(spec), spec, path, lambda key: checkpoint.tensor(key).float())
    record = GraphRecord(spec, graph.scheme, graph.sha256, f"{name}/{path.name}")
    return record, [path, path.with_name(path.name + DATA_SUFFIX)]


def _verify(
    source: Source, graphs: Mapping[str, GraphRecord], folder: Path, tree: Path
) -> tuple[tuple[ParityRecord, ...], Paths]:
    """Compare the graphs as they are, not optimized, run by the first engine that can."""
    target = _portable_engine()
    sessions: dict[str, Session] = {}
    try:
        for name, record in graphs.items():
            artifact = _as_artifact(name, record, target, folder)
            sessions[name] = registry.get(target.backend).load(artifact, record.spec, folder)
        records = verify_model(
            source.reference,
            sessions,
            source.spec,
            source.tokenizer,
            open_table(tree),
            questions_for(source.spec),
            tokens=ANSWER_TOKENS,
        )
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
