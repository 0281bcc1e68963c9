"""The stages from portable graphs to artifacts that are checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lensc.backends import registry
from lensc.backends.base import PROBE_TOLERANCE, Array, Artifact, Session, Target
from lensc.backends.bundle import Manifest, ParityRecord, ProbeRecord, sha256_file
from lensc.backends.compiling import CompilesOnDevice
from lensc.backends.errors import ManifestError, ParityError, UnavailableError, UnsupportedError, UsageError
from lensc.runtime.embedding import open_table

from .checkpoint import WeightSource
from .engines import close, engine_key, load_if_usable, place_of
from .export_stages import ANSWER_TOKENS, GRAPHS, QUANTIZED, Paths
from .graph import Graph, GraphSpec
from .portable import PortableWeights
from .provenance import code_key
from .questions import questions_for
from .ranges import Work
from .source import Source
from .stages import Staging
from .verify import NOT_JUDGED, allowed_of_noise, min_sqnr_db, verify_graph, verify_model
from .verify_streamed import ask, compare, encode, judge

STAGES = 2
"""How many stages `compile_target` has for a graph."""

NOT_RUN = "not_run"
"""Key in `Artifact.parity` of the reason why an artifact was not checked here."""


def portable_graphs(folder: Path, manifest: Manifest) -> dict[str, Graph]:
    """The graphs of a folder. Raises ManifestError unless it has all and each as ONNX."""
    absent = [name for name in GRAPHS if name not in manifest.graphs or manifest.graphs[name].file is None]
    if absent:
        raise ManifestError(
            f"{folder}: has no portable graph {', '.join(absent)}: a compiled bundle does not; "
            "give the folder that lensc export made"
        )
    return {
        name: Graph(record.spec, folder / str(record.file), record.scheme, record.sha256)
        for name, record in manifest.graphs.items()
    }


def check_supported(
    specs: Mapping[str, GraphSpec], schemes: Mapping[str, Mapping[str, Collection[int]]], work: Sequence[Work]
) -> None:
    """Raise before any work if a target is unknown or cannot take a graph in one of its schemes, listing all reasons.

    `schemes`: by graph and scheme the inputs of its linears, as far as they are known.
    """
    if not work:
        raise UsageError("no target; give at least one, e.g. onnxruntime:cpu")
    reasons = [
        f"{name} for {job.target}: {reason}"
        for job in work
        for name in job.graphs
        for scheme, inputs in schemes[name].items()
        if (reason := registry.get(job.target.backend).supports(specs[name], scheme, job.target, inputs)) is not None
    ]
    if reasons:
        raise UnsupportedError("; ".join(dict.fromkeys(reasons)))


def check_compilable(work: Sequence[Work]) -> None:
    """Raise UnavailableError before any work if a target is compiled on its device, which is not here."""
    reasons = [
        reason
        for job in work
        if isinstance(backend := registry.get(job.target.backend), CompilesOnDevice)
        and (reason := backend.cannot_compile(job.target)) is not None
    ]
    if reasons:
        raise UnavailableError("; ".join(dict.fromkeys(reasons)))


def compile_target(
    staging: Staging, graphs: Mapping[str, Graph], work: Work, probes: Sequence[ProbeRecord]
) -> tuple[Artifact, ...]:
    """Compile each graph of `work` into its folder of the tree, which all targets share, and check it with its golden probes."""
    artifacts, target = [], work.target
    for name in work.graphs:
        graph = graphs[name]
        key = {"graph": graph.sha256, "target": str(target), **code_key(), **engine_key(target)}
        if graph.ranges is not None:
            key["ranges"] = sha256_file(graph.ranges)
        if graph.cpu_nodes:
            key["cpu_nodes"] = " ".join(graph.cpu_nodes)
        if graph.context is not None:
            key["context"] = str(graph.context)
        artifact = staging.stage(
            f"compile {name} for {target}", key, Artifact, partial(_compile, graph, target, staging.tree)
        )
        mine = [probe for probe in probes if probe.graph == name]
        key |= {record.path: record.sha256 for record in artifact.files}
        key |= {probe.file: sha256_file(staging.tree / probe.file) for probe in mine}
        check = partial(_check, artifact, graph, staging.tree, mine, staging.limit.room)
        artifacts.append(staging.stage(f"check {name} on {target}", key, Artifact, check))
    return tuple(artifacts)


def verify_target(
    staging: Staging,
    source: Source,
    target: Target,
    artifacts: Sequence[Artifact],
    tables: Mapping[str, str],
    graphs: Mapping[str, Graph],
) -> tuple[ParityRecord, ...]:
    """The parity of a target's artifacts with the reference model of the recipe; none if they cannot run here."""
    key = source.key | {"target": str(target), **engine_key(target)}
    key |= {record.path: record.sha256 for artifact in artifacts for record in artifact.files}
    if source.is_streamed:
        weights = PortableWeights({name: graph.path for name, graph in graphs.items()}, source.checkpoint)
        verify = partial(_verify_streamed, source, weights, target, artifacts, tables, staging)
    else:
        verify = partial(_verify, source, target, artifacts, tables, staging.tree)
    records = staging.stage(f"verify {target}", key, tuple[ParityRecord, ...], verify)
    where = place_of(target)
    return tuple(dataclasses.replace(record, where=where) for record in records)


def _compile(graph: Graph, target: Target, tree: Path) -> tuple[Artifact, Paths]:
    folder = tree / graph.spec.name
    folder.mkdir(parents=True, exist_ok=True)
    artifact = registry.get(target.backend).compile(graph, target, folder)
    return artifact, [tree / record.path for record in artifact.files]


def _check(
    artifact: Artifact, graph: Graph, tree: Path, probes: Sequence[ProbeRecord], room: int | None
) -> tuple[Artifact, Paths]:
    """`artifact` with what the golden probes say of it, or why it cannot run here. Raises ParityError."""
    session = load_if_usable(artifact, graph.spec, tree, room)
    if isinstance(session, str):
        return dataclasses.replace(artifact, parity={NOT_RUN: session}), []
    parity: dict[str, float | int | str] = {}
    try:
        for probe in probes:
            with np.load(tree / probe.file, allow_pickle=False) as arrays:
                feeds = {name[3:]: arrays[name] for name in arrays.files if name.startswith("in.")}
                outputs = {name[4:]: arrays[name] for name in arrays.files if name.startswith("out.")}
            metrics = verify_graph(_Recorded(graph.spec, outputs), session, [feeds], min_sqnr_db(artifact.scheme))
            if not metrics.passed:
                raise ParityError(f"{artifact.target} does not compute the golden probe {probe.file}: {metrics}")
            parity = {"probe_max_abs": metrics.max_abs, "probe_sqnr_db": metrics.sqnr_db}
            if artifact.scheme != graph.scheme and min_sqnr_db(graph.scheme) is None:
                parity[PROBE_TOLERANCE] = max(allowed_of_noise(array) for array in outputs.values())
    finally:
        session.close()
    return dataclasses.replace(artifact, parity=parity), []


class _Recorded:
    """A Session that gives recorded outputs, whatever it is fed."""

    def __init__(self, spec: GraphSpec, outputs: Mapping[str, Array]) -> None:
        self.spec = spec
        self._outputs = dict(outputs)

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        return self._outputs

    def close(self) -> None:
        """Nothing is held."""


def _verify(
    source: Source, target: Target, artifacts: Sequence[Artifact], tables: Mapping[str, str], tree: Path
) -> tuple[tuple[ParityRecord, ...], Paths]:
    sessions: dict[str, Session] = {}
    try:
        for artifact in artifacts:
            session = load_if_usable(artifact, source.specs[artifact.graph], tree)
            if isinstance(session, str):
                return (), []
            sessions[artifact.graph] = session
        # where a target has no decoder, the reference's answers about the pictures that it encoded
        candidate = {**source.quantized_reference, **sessions}
        least = {a.graph: least for a in artifacts if (least := min_sqnr_db(a.scheme)) is not None}
        records = verify_model(
            source.quantized_reference,
            candidate,
            source.spec,
            source.tokenizer,
            open_table(tree, tables),
            questions_for(source.spec),
            tokens=ANSWER_TOKENS,
            target=str(target),
            against="torch float32" if source.recipe.is_float else QUANTIZED,
            min_sqnr_db=least,
        )
    finally:
        close(sessions)
    return tuple(record for record in records if record.graph in sessions), []


def _verify_streamed(
    source: Source,
    weights: WeightSource,
    target: Target,
    artifacts: Sequence[Artifact],
    tables: Mapping[str, str],
    staging: Staging,
) -> tuple[tuple[ParityRecord, ...], Paths]:
    """The artifacts answer; then two passes over the weights: those of the recipe judge, those of the checkpoint say what
    the recipe costs. A decoder that cannot run here, or not within the memory limit, leaves the vision graph to be judged.
    """
    sessions: dict[str, Session] = {}
    table = open_table(staging.tree, tables)
    questions = questions_for(source.spec)
    try:
        for artifact in artifacts:
            session = load_if_usable(artifact, source.specs[artifact.graph], staging.tree, staging.limit.room)
            if not isinstance(session, str):
                sessions[artifact.graph] = session
        if "vision" not in sessions:
            return (), []
        if "decoder" in sessions:
            answers = ask(sessions, source.spec, source.tokenizer, table, questions, ANSWER_TOKENS, probes=False)
        else:
            answers = encode(sessions["vision"], source.spec, questions)
    finally:
        close(sessions)
    ran = [artifact for artifact in artifacts if artifact.graph in sessions]
    least = min((least for a in ran if (least := min_sqnr_db(a.scheme)) is not None), default=None)
    float_records = judge(
        compare(source.streamed(source.checkpoint), answers, source.spec, table),
        target=str(target),
        least_sqnr_db=least if source.recipe.is_float else -math.inf,
    )
    if source.recipe.is_float:
        return float_records, []
    evidence = compare(source.streamed(weights), answers, source.spec, table)
    records = judge(evidence, target=str(target), against=QUANTIZED, least_sqnr_db=least)
    return (*records, *(dataclasses.replace(record, tolerance=NOT_JUDGED) for record in float_records)), []
