"""Checkpoint → verified graphs → bundle, in resumable stages.

    export_checkpoint   checkpoint → folder of graphs     golden probes, table, tokenizer, vision, decoder, parity
    compile_graphs      folder of graphs → bundle         each graph for each target, checked with the golden probes
    build               both, and every target's artifacts are verified against the reference model as well

A folder of graphs is a bundle without artifacts. `stages` says what happens when a run is interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from lensc.backends import registry
from lensc.backends.base import Artifact, StaticBackend, Target
from lensc.backends.bundle import FORMAT, MANIFEST, Manifest, ParityRecord, load_manifest, write_manifest
from lensc.backends.errors import CheckpointError, ManifestError, UsageError
from lensc.runtime.prompt import Tokenizer

from . import compile_stages, demo, export_stages
from .adapter import Adapter, MergedCheckpoint
from .calibration import CalibrationSet, calibration_set
from .checkpoint import TOKENIZER, Checkpoint
from .compile_stages import check_compilable, check_supported, compile_target, portable_graphs, verify_target
from .export_stages import TOKENIZER_CONFIG, Exported, copy_files, export_graphs
from .graph import Graph
from .memory import Limit
from .provenance import provenance, timestamp, versions
from .quantize.recipe import Recipe, resolve
from .ranges import Work, backends_with_ranges, check_context, with_ranges, works
from .source import Source
from .stages import Report, Staging

WORK = "graphs"
"""Where `build` keeps the portable graphs, which are not shipped."""

MARGIN_BYTES = 16 << 20
"""For probes, manifests and journals."""


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    scheme: str = "f32",
    adapter: str | Path | None = None,
    calibration: str | Path | None = None,
    max_memory: int | None = None,
    report: Report | None = None,
    command: str = "",
) -> Manifest:
    """Write the verified portable graphs of `checkpoint` (a folder, or `demo`) to the folder `out`.

    `scheme` is the name of a recipe, or the path of one; `adapter` a folder with a LoRA adapter in PEFT's format, merged
    while weights are read; `calibration` a folder of pictures for a recipe that is calibrated (by default, built-in ones);
    no stage may take more than `max_memory` bytes. Raises CheckpointError, TokenizerError, GraphError, ParityError,
    StorageError, MemoryLimitError, or UsageError if `out` must not be replaced. `out` is complete or untouched.
    """
    pictures = None if calibration is None else Path(calibration)
    source = Source(opened(checkpoint, adapter), resolve(scheme), max_memory, pictures)
    total = export_stages.STAGES + source.recipe.smooth + source.recipe.is_calibrated + 1
    with Staging(Path(out), total=total, report=report, limit=Limit(max_memory)) as staging:
        staging.limit.require(source.memory_bytes, "the build")
        staging.require(source.graph_bytes + source.calibrated_bytes + source.table_bytes + MARGIN_BYTES)
        exported = export_graphs(staging, source, staging.tree)
        manifest = _manifest(source, exported, (), staging, command)
        return staging.publish(lambda bundle: write_manifest(bundle, manifest))


def compile_graphs(
    graphs: str | Path,
    targets: Sequence[Target | tuple[str, Target]],
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    cpu_nodes: Sequence[str] = (),
    context: int | None = None,
    max_memory: int | None = None,
    report: Report | None = None,
    command: str = "",
) -> Manifest:
    """Compile the folder `graphs` for every target into the bundle `out`.

    `calibration` is a folder of pictures for targets that fix the ranges of activations; nodes named in `cpu_nodes` may run
    on the CPU where all others must be on an NPU; `context`: tokens of past that a decoder of fixed shapes is made for.
    What can run here is checked with the golden probes. Raises ManifestError if `graphs` is none or damaged,
    UnsupportedError listing every graph that a target cannot take, and what engines raise. `out` is complete or untouched.
    """
    folder = Path(graphs)
    if folder.resolve() == Path(out).resolve():
        raise UsageError(f"{out}: is the folder of graphs itself; choose another output folder")
    if not (folder / MANIFEST).exists():
        raise ManifestError(f"{folder} is not a folder of graphs; make one with lensc export, or check the path")
    made = load_manifest(folder, verify=True)
    portable = portable_graphs(folder, made)
    specs = {name: graph.spec for name, graph in portable.items()}
    work = works(targets)
    check_supported(specs, {name: {graph.scheme: ()} for name, graph in portable.items()}, work)
    check_compilable(work)
    ranged = backends_with_ranges({name: graph.scheme for name, graph in portable.items()}, work)
    if calibration is not None and not ranged:
        raise UsageError(f"--calibration {calibration}: no target of this command looks at pictures; leave it out")
    data = cache(partial(_pictures, made, folder, None if calibration is None else Path(calibration)))
    if ranged:
        data()  # pictures that cannot be read are known before any work
    check_context(context, specs, work)
    portable = {
        name: dataclasses.replace(graph, cpu_nodes=tuple(cpu_nodes), context=context)
        for name, graph in portable.items()
    }
    files = {f.path: f for f in made.files}
    copied = [made.tokenizer, *made.tables.values(), *(probe.file for probe in made.probes)]
    copied = list(dict.fromkeys([*copied, *(name for name in (TOKENIZER_CONFIG,) if name in files)]))
    with Staging(
        Path(out), total=_compile_stages(work) + len(ranged) + 2, report=report, limit=Limit(max_memory)
    ) as staging:
        weights = sum(f.bytes for f in made.files if f.path not in copied)
        staging.require(weights * len(work) + sum(files[name].bytes for name in copied) + MARGIN_BYTES)
        hashes = {name: files[name].sha256 for name in copied}
        staging.stage("copy tables", hashes, tuple[str, ...], lambda: copy_files(folder, staging.tree, copied))
        by_backend = with_ranges(staging, portable, work, made.model, made.tables, data)
        artifacts = tuple(
            a for job in work for a in compile_target(staging, by_backend[job.target.backend], job, made.probes)
        )
        manifest = dataclasses.replace(
            made,
            graphs={name: dataclasses.replace(record, file=None) for name, record in made.graphs.items()},
            artifacts=artifacts,
            stages=(*made.stages, *staging.records),
            provenance=dataclasses.replace(made.provenance, command=command, versions=versions(), created=timestamp()),
            metadata={**made.metadata, "export_command": made.provenance.command},
        )
        return staging.publish(lambda bundle: write_manifest(bundle, manifest))


def build(
    checkpoint: str | Path,
    targets: Sequence[Target | tuple[str, Target]],
    out: str | Path,
    *,
    scheme: str = "f32",
    adapter: str | Path | None = None,
    calibration: str | Path | None = None,
    cpu_nodes: Sequence[str] = (),
    context: int | None = None,
    max_memory: int | None = None,
    report: Report | None = None,
    command: str = "",
) -> Manifest:
    """Export `checkpoint` (a folder, or `demo`) by the recipe `scheme` and compile it for every target into the bundle `out`.

    Artifacts that can run here are verified against the reference model. Raises what `export_checkpoint` and
    `compile_graphs` do. `out` is complete or untouched.
    """
    pictures = None if calibration is None else Path(calibration)
    recipe = resolve(scheme)
    work = works(targets)
    source = Source(opened(checkpoint, adapter), recipe, max_memory, pictures, _measures(recipe, work))
    check_supported(source.specs, source.required_schemes(source.recipe), work)
    check_compilable(work)
    check_context(context, source.specs, work)
    total = (
        export_stages.STAGES
        + source.recipe.smooth
        + source.recipe.is_calibrated
        + _compile_stages(work)
        + len(work)
        + len(backends_with_ranges(source.schemes, work))
        + 1
    )
    with Staging(Path(out), total=total, report=report, limit=Limit(max_memory)) as staging:
        staging.limit.require(source.memory_bytes, "the build")
        graphs = source.graph_bytes * (1 + len(work)) + source.calibrated_bytes
        staging.require(graphs + source.table_bytes + MARGIN_BYTES)
        folder = staging.folder / WORK
        exported = export_graphs(staging, source, folder)
        portable = {
            name: Graph(
                record.spec,
                folder / str(record.file),
                record.scheme,
                record.sha256,
                cpu_nodes=tuple(cpu_nodes),
                context=context,
            )
            for name, record in exported.graphs.items()
        }
        by_backend = with_ranges(staging, portable, work, source.spec, exported.tables, lambda: source.calibration_data)
        artifacts: list[Artifact] = []
        parity: list[ParityRecord] = [*exported.parity]
        for job in work:
            compiled = compile_target(staging, by_backend[job.target.backend], job, exported.probes)
            parity += verify_target(staging, source, job.target, compiled, exported.tables, portable)
            artifacts += compiled
        compiled_only = {name: dataclasses.replace(record, file=None) for name, record in exported.graphs.items()}
        exported = Exported(compiled_only, exported.tables, exported.probes, tuple(parity))
        manifest = _manifest(source, exported, tuple(artifacts), staging, command)
        return staging.publish(lambda bundle: write_manifest(bundle, manifest))


def _compile_stages(work: Sequence[Work]) -> int:
    """How many stages `compile_target` has for all of `work`."""
    return sum(compile_stages.STAGES * len(job.graphs) for job in work)


def _measures(recipe: Recipe, work: Sequence[Work]) -> bool:
    """Whether a target of `work` will be shown pictures."""
    return not recipe.is_float and any(isinstance(registry.get(job.target.backend), StaticBackend) for job in work)


def _pictures(made: Manifest, graphs: Path, folder: Path | None) -> CalibrationSet:
    """What a target is shown that measures ranges: the pictures of `folder`, or those that are built in."""
    tokenizer = Tokenizer.from_file(graphs / made.tokenizer)
    return calibration_set(made.model, tokenizer, folder, is_demo=made.model.name == "demo")


def opened(checkpoint: str | Path, adapter: str | Path | None) -> Checkpoint | MergedCheckpoint:
    """The checkpoint, with the adapter merged into it if there is one. Raises CheckpointError."""
    opened = Checkpoint(resolve_checkpoint(checkpoint))
    return opened if adapter is None else MergedCheckpoint(opened, Adapter(adapter))


def resolve_checkpoint(name: str | Path) -> Path:
    """The folder that `name` means: `demo` is the checkpoint that is shipped with lensc."""
    if str(name) != "demo":
        return Path(name)
    if not demo.CHECKPOINT.is_dir():
        raise CheckpointError(f"demo: {demo.CHECKPOINT} is not part of this installation; give a checkpoint folder")
    return demo.CHECKPOINT


def _manifest(
    source: Source, exported: Exported, artifacts: tuple[Artifact, ...], staging: Staging, command: str
) -> Manifest:
    is_plain = source.recipe.is_float and source.recipe.kv_bits is None
    metadata = {} if is_plain else {"recipe": source.recipe.to_toml()}
    if isinstance(source.unsmoothed, MergedCheckpoint):
        metadata["adapter"] = f"{source.unsmoothed.adapter.folder.name}, sha256 {source.unsmoothed.adapter.sha256}"
    if source.smoothing is not None:
        metadata["smoothing"] = str(source.smoothing)
    if source.calibration is not None:
        metadata["calibration"] = str(source.calibration)
    return Manifest(
        format=FORMAT,
        model=source.spec,
        graphs=exported.graphs,
        artifacts=artifacts,
        tables=exported.tables,
        tokenizer=TOKENIZER,
        files=(),
        provenance=provenance(source.checkpoint.sha256, command, source.recipe.name),
        parity=exported.parity,
        probes=exported.probes,
        stages=tuple(staging.records),
        metadata=metadata,
    )
