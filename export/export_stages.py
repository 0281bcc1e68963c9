"""The stages from a checkpoint to verified portable graphs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lensc.backends import registry
from lensc.backends.base import Array, Artifact, Session, Target, file_record
from lensc.backends.bundle import GraphRecord, ParityRecord, ProbeRecord
from lensc.backends.errors import CheckpointError, GraphError, UnavailableError
from lensc.runtime.embedding import SCALES, TABLE, open_table

from .checkpoint import TOKENIZER, WeightSource
from .engines import close, usable
from .memory import Limit
from .models.minicpmv import MiniCPMV
from .models.session import graph_modules
from .models.streamed import streamed_sessions
from .onnx import example_inputs, trace_graph
from .portable import PortableWeights
from .quantize.calibrate import CalibrationRecord, calibrate
from .quantize.calibrated import Calibrated
from .quantize.linears import find_linears
from .quantize.recipe import EMBEDDING
from .quantize.weights import packed_table, quantize_table
from .questions import questions_for
from .smoothed import SmoothedCheckpoint, SmoothingRecord, find_smoothing
from .source import Source
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
"""How many stages `export_graphs` has, besides smoothing and calibration."""

CALIBRATED = "calibrated"
"""The folder of calibrated weights, which are not shipped."""

FACTORS = "smoothing.safetensors"
"""What smoothing divides norms by; not shipped, as it is in the weights."""

QUANTIZED = "torch float32, quantized weights"
"""The name of `Source.quantized_reference` in parity records."""

PORTABLE_ENGINES = (Target("onnxruntime", "cpu"), Target("reference", "cpu"))
"""Who runs the portable graphs for the parity report: the first that is usable here."""

ANSWER_TOKENS = 32
"""Length of the greedy answers that are compared."""

Paths = list[Path]


@dataclass(frozen=True)
class Exported:
    """Paths of `graphs` are relative to the folder of graphs, those of `probes` to the tree."""

    graphs: dict[str, GraphRecord]
    tables: dict[str, str]
    probes: tuple[ProbeRecord, ...]
    parity: tuple[ParityRecord, ...]


def export_graphs(staging: Staging, source: Source, folder: Path) -> Exported:
    """Write the graphs into `folder`, everything else that a bundle needs into the tree of `staging`."""
    key, tree = source.key, staging.tree
    if source.recipe.smooth:
        factors = staging.folder / FACTORS
        run_smooth = partial(_smooth, source, factors, staging.limit)
        source.smoothing = staging.stage("smooth", key, SmoothingRecord, run_smooth)
        source.checkpoint = SmoothedCheckpoint(source.unsmoothed, factors)
    checkpoint = source.checkpoint
    if source.recipe.is_calibrated:
        calibrated = staging.folder / CALIBRATED
        run = partial(_calibrate, source, calibrated, staging.limit)
        source.calibration = staging.stage("calibrate", key, CalibrationRecord, run)
        source.quantize = Calibrated(calibrated)
    if not source.is_streamed:
        # The probes come first: they load the model, which finds weights that are NaN before the long part begins.
        probes = staging.stage("golden probes", key, tuple[ProbeRecord, ...], partial(_probes, source, None, tree))
    tables = staging.stage("embedding table", key, dict[str, str], partial(_table, source, tree))
    names = [TOKENIZER, *([TOKENIZER_CONFIG] if (checkpoint.folder / TOKENIZER_CONFIG).is_file() else [])]
    staging.stage("tokenizer", key, tuple[str, ...], partial(copy_files, checkpoint.folder, tree, names))
    progress = staging.limit.check
    graphs = {
        name: staging.stage(f"export {name}", key, GraphRecord, partial(export_one, source, name, folder, progress))
        for name in GRAPHS
    }
    key = key | {name: record.sha256 for name, record in graphs.items()}
    if source.is_streamed:
        weights = PortableWeights({name: folder / str(record.file) for name, record in graphs.items()}, checkpoint)
        probes = staging.stage("golden probes", key, tuple[ProbeRecord, ...], partial(_probes, source, weights, tree))
        compare = partial(_compare_rows, source, weights)
        parity = staging.stage("compare weights", key, tuple[ParityRecord, ...], compare)
    else:
        verify = partial(_verify, source, graphs, folder, tables, tree)
        parity = staging.stage("verify graphs", key, tuple[ParityRecord, ...], verify)
    return Exported(graphs, tables, probes, parity)


def _smooth(source: Source, path: Path, limit: Limit) -> tuple[SmoothingRecord, Paths]:
    return find_smoothing(source.unsmoothed, source.spec, source.calibration_data, path, limit.check), [path]


def _calibrate(source: Source, folder: Path, limit: Limit) -> tuple[CalibrationRecord, Paths]:
    checkpoint, key = source.checkpoint, json.dumps(source.key)
    data, formats = source.calibration_data, source.formats
    return calibrate(checkpoint, checkpoint.config, source.spec, data, formats, folder, key, limit)


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> tuple[tuple[str, ...], Paths]:
    """A stage that copies the files `names` from `source` to `folder`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return tuple(names), [folder / name for name in names]


def _probes(source: Source, weights: WeightSource | None, tree: Path) -> tuple[tuple[ProbeRecord, ...], Paths]:
    """The golden probes by the model of the recipe, in memory or, given `weights`, streamed from them."""
    reference = source.quantized_reference if weights is None else streamed_sessions(source.streamed(weights))
    folder = tree / PROBES
    folder.mkdir(parents=True, exist_ok=True)
    int8 = [name for name, scheme in source.schemes.items() if min_sqnr_db(scheme) is not None]
    records = make_probes(reference, folder, int8)
    records = tuple(dataclasses.replace(record, file=f"{PROBES}/{record.file}") for record in records)
    return records, [tree / record.file for record in records]


def _table(source: Source, tree: Path) -> tuple[dict[str, str], Paths]:
    """The embedding table: as the recipe says, or as stored where that is float16, else in float32.

    Written some rows at a time: at full size it has 1 GB as stored.
    """
    checkpoint = source.checkpoint
    record = checkpoint.tensors[EMBEDDING]
    rows, width = record.shape
    format = source.recipe.format_of(EMBEDDING)
    dtype: type[np.generic] = np.float16 if record.dtype == "F16" else np.float32
    if format is not None:
        dtype = np.int8 if format.bits == 8 else np.uint8
    columns = width if format is None or format.bits == 8 else width // 2
    scales: list[Array] = []
    step = max(1, TABLE_PIECE_BYTES // (4 * width))
    # written, not mapped: mapped pages count as memory; an interrupted file is not in the journal
    with open(tree / TABLES[TABLE], "wb") as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": (rows, columns),
        }
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, step):
            piece = checkpoint.rows(EMBEDDING, start, min(start + step, rows)).float()
            if not bool(torch.isfinite(piece).all()):
                raise CheckpointError(f"{checkpoint.folder}: {EMBEDDING} holds NaN or Inf")
            if format is None:
                values: Array = piece.numpy().astype(dtype)
            else:
                values, part = packed_table(quantize_table(piece, format))
                scales.append(part)
            file.write(values.data)
    names = {TABLE: TABLES[TABLE]}
    if format is not None:
        np.save(tree / TABLES[SCALES], np.concatenate(scales))
        names[SCALES] = TABLES[SCALES]
    return names, [tree / name for name in names.values()]


def export_one(source: Source, name: str, folder: Path, check: Callable[[], None]) -> tuple[GraphRecord, Paths]:
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
    sha256 = write_graph(
        traced,
        path,
        parameters,
        checkpoint.rows,
        formats,
        source.quantize,
        key=json.dumps(source.key),
        progress=lambda _: check(),
    )
    scheme = str(source.recipe.scheme(name, linears))
    record = GraphRecord(spec, scheme, sha256, f"{name}/{path.name}")
    return record, [path, path.with_name(path.name + DATA_SUFFIX)]


def _compare_rows(source: Source, weights: PortableWeights) -> tuple[tuple[ParityRecord, ...], Paths]:
    """Compare some rows of every weight in the files with what the recipe makes of the checkpoint's. Raises GraphError.

    This stands in for running the portable graphs of a model that is streamed; its artifacts are run.
    """
    checkpoint = source.checkpoint
    for name, record in checkpoint.tensors.items():
        if name == EMBEDDING:
            continue
        last = record.shape[0] - 1
        for row in sorted({0, last // 3, last}):
            stored = checkpoint.rows(name, row, row + 1).float()
            expected = source.rounded(name, stored, row)
            if expected is not None and not torch.equal(weights.rows(name, row, row + 1), expected):
                raise GraphError(f"weight {name}: row {row} of the graph is not that of the checkpoint; export again")
    return (), []


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
        questions = questions_for(source.spec)
        asked = (source.spec, source.tokenizer, open_table(tree, tables), questions, ANSWER_TOKENS)
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
