"""A graph on its way to an NPU: ranges, compiling, memory, size, nodes off the NPU, and what emulating it gives.

    python -m lensc.bench.qnn CHECKPOINT [--graph vision] [--chip sm8650] [--layers N] [--scheme w8a16-vision]
    python -m lensc.bench.qnn CHECKPOINT --graph decoder [--layers N] [--scheme w8a16] [--context 2048]
    python -m lensc.bench.qnn demo --chip all --emulate all

CHECKPOINT is `demo`, or one of the official sizes, e.g. made by `lensc.bench.checkpoint`. `--chip` may be repeated: ranges are
measured once, each chip gets a binary of its own, and each is offered to all others, which must refuse it. `--emulate` runs
a chip's binary on a slice, or on a prompt and one more token, beside the portable graph in float32 with the recipe's
weights; a layer of true width takes a minute or more, and `--layers` cuts the graph. A decoder's ranges are measured on
texts. Times are this machine's; none says anything of a phone.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from lensc.backends import registry
from lensc.backends._qnn_chip import chips
from lensc.backends.base import Array, Artifact, StaticBackend, Target
from lensc.backends.errors import CompatibilityError, ExecutionError, LensError, UsageError
from lensc.export.build import resolve_checkpoint
from lensc.export.checkpoint import Checkpoint
from lensc.export.export_stages import export_one
from lensc.export.graph import Graph
from lensc.export.models.config import ModelConfig
from lensc.export.quantize.calibrate import embedding_rows
from lensc.export.quantize.recipe import resolve
from lensc.export.ranges import PROMPT_TOKENS, prompt_samples, slice_samples
from lensc.export.source import Source
from lensc.export.verify import MIN_SQNR_DB, Tally

from .record import Parity, Row, entry, put, shown

COMMAND = "python -m lensc.bench.qnn"
ALL = "all"
SCHEMES = {"vision": "w8a16-vision", "decoder": "w8a16"}
MAX_MEMORY_BYTES = 8 << 30
READY_LIMIT_S, MEMORY_LIMIT_GB = 600.0, 8.0
"""What we promised ourselves of the whole tower: ranges and compiling, and the most memory of either."""
EMULATED_TOKENS = 64
EMULATION_LIMIT_S = "3600"

T = TypeVar("T")
Samples = Sequence[Mapping[str, Array]]


@dataclass(frozen=True)
class Bench:
    """A graph, what its ranges are measured on, and what making both took."""

    backend: StaticBackend
    graph: Graph
    samples: Samples
    ranges_s: float
    peak_bytes: int


def prepare(options: argparse.Namespace, backend: StaticBackend, folder: Path) -> Bench:
    """Export the graph and measure its ranges."""
    checkpoint = Checkpoint(resolve_checkpoint(options.checkpoint))
    if options.layers is not None:
        checkpoint.config = cut(checkpoint.config, options.graph, options.layers)
    source = Source(checkpoint, resolve(options.scheme), MAX_MEMORY_BYTES)
    record, _ = timed("export", lambda: export_one(source, options.graph, folder / "graphs", lambda: None)[0])
    assert record.file is not None
    graph = Graph(record.spec, folder / "graphs" / record.file, record.scheme, record.sha256, context=options.context)
    samples: Samples
    if options.graph == "vision":
        samples = slice_samples(graph, source.spec, lambda: source.calibration_data)
    else:
        texts = [sample.ids[:PROMPT_TOKENS] for sample in source.calibration_data.samples if not sample.slices]
        samples = prompt_samples(graph, lambda: [embedding_rows(checkpoint, ids, None) for ids in texts])
    if options.samples is not None:
        samples = samples[-options.samples :]
    ranges_s = 0.0
    if backend.needs_ranges(graph.scheme):
        path = folder / "ranges.json"
        _, ranges_s = timed("ranges", lambda: backend.measure_ranges(graph, samples, path))
        graph = dataclasses.replace(graph, ranges=path)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return Bench(backend, graph, samples, ranges_s, peak_bytes)


def compiled(bench: Bench, chip: str, folder: Path) -> tuple[Artifact, list[Row]]:
    """The binary of `chip` in the bundle `folder`, and what it took. Raises UnsupportedError for a node off the NPU."""
    out = folder / bench.graph.spec.name
    out.mkdir(parents=True)
    artifact, seconds = timed(
        f"{chip}, compile", lambda: bench.backend.compile(bench.graph, Target("qnn", "npu", chip), out)
    )
    peak = max(bench.peak_bytes, int(artifact.options["compiler_peak_bytes"]))
    size = sum(file.bytes for file in artifact.files if file.path.endswith(".bin") and ".emulated." not in file.path)
    nodes = artifact.placement
    off = sum(count for where, count in nodes.items() if where != "QNNExecutionProvider")
    promised = bench.graph.spec.name == "vision"
    return artifact, [
        Row(f"{chip}: nodes", "nodes", float(sum(nodes.values()))),
        Row(f"{chip}: off the NPU", "nodes", float(off)),
        Row(f"{chip}: ranges", "s", bench.ranges_s),
        Row(f"{chip}: compile", "s", seconds),
        Row(f"{chip}: both", "s", bench.ranges_s + seconds, limit=READY_LIMIT_S if promised else None),
        Row(f"{chip}: peak memory", "GB", peak / 1e9, limit=MEMORY_LIMIT_GB if promised else None),
        Row(f"{chip}: binary", "MB", size / 1e6),
    ]


def refused(bench: Bench, artifacts: Mapping[str, Artifact], folder: Path) -> None:
    """Offer each binary to every other chip. Raises ExecutionError if one takes it, by its record or by its file."""
    for name, artifact in artifacts.items():
        for other in chips().keys() - {name}:
            target = Target("qnn", "npu", other)
            lie = artifact.compatibility | {"chip": other} | chips()[other].provider_options
            for offered in (
                dataclasses.replace(artifact, target=target),
                dataclasses.replace(artifact, target=target, compatibility=lie),
            ):
                try:
                    bench.backend.load(offered, bench.graph.spec, folder / name)
                except CompatibilityError:
                    continue
                raise ExecutionError(f"{other} took the binary of {name}")


def emulated(bench: Bench, artifact: Artifact, chip: str, bundle: Path) -> Iterator[Row]:
    """One slice, or a prompt and one more token, by emulation, beside the portable graph in float32."""
    import onnxruntime as ort

    spec = bench.graph.spec
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = ort.InferenceSession(str(bench.graph.path), settings)
    names = [value.name for value in expected.get_outputs()]
    feeds = dict(bench.samples[0])
    if spec.states:
        tokens = min(EMULATED_TOKENS, feeds["inputs_embeds"].shape[1])
        feeds |= {"inputs_embeds": feeds["inputs_embeds"][:, :tokens], "position_ids": np.arange(tokens)}
        feeds["logit_positions"] = np.arange(tokens)[-8:]
    session = bench.backend.load(artifact, spec, bundle)
    try:
        for what in ("prefill", "decode") if spec.states else ("slice",):
            wanted = dict(zip(names, expected.run(None, feeds), strict=True))
            got, seconds = timed(f"{chip}, {what} by emulation", partial(session.run, feeds))
            yield Row(f"{chip}: {what} emulated", "s", seconds)
            tallies: dict[str, Tally] = {}
            for name, array in wanted.items():
                tallies.setdefault(name.partition(".")[0], Tally(1.0)).add(array, np.asarray(got[name]))
            for kind, tally in tallies.items():
                found = tally.sqnr_db if tally.finite else -float("inf")
                parity: Parity = "pass" if found >= MIN_SQNR_DB else "fail"
                yield Row(f"{chip}: {what} {kind}", "dB", found if parity == "pass" else None, parity=parity)
            if what == "prefill":
                feeds = {pair.input: wanted[pair.output] for pair in spec.states}
                feeds["inputs_embeds"] = np.ascontiguousarray(bench.samples[0]["inputs_embeds"][:, -1:])
                feeds |= {"position_ids": np.array([tokens]), "logit_positions": np.array([0])}
    finally:
        session.close()


def cut(config: ModelConfig, graph: str, layers: int) -> ModelConfig:
    """The model with so many layers in a graph."""
    if graph == "decoder":
        return dataclasses.replace(config, num_hidden_layers=layers)
    kept = layers + config.drop_vision_last_layer
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_hidden_layers=kept))


def timed(what: str, make: Callable[[], T]) -> tuple[T, float]:
    """What `make` returns, and the seconds it took, which are printed."""
    started = time.perf_counter()
    result = make()
    seconds = time.perf_counter() - started
    print(f"{what}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return result, seconds


def command_of(options: argparse.Namespace) -> str:
    """How the record says that it was made."""
    words = [COMMAND, str(shown(Path(options.checkpoint))), f"--graph {options.graph}", f"--scheme {options.scheme}"]
    for name in ("layers", "context", "samples"):
        value = getattr(options, name)
        words += [f"--{name} {value}"] if value is not None else []
    words += [f"--chip {chip}" for chip in options.chip] + [f"--emulate {chip}" for chip in options.emulate]
    return " ".join(words)


def _expanded(names: Sequence[str], flag: str, known: Sequence[str]) -> list[str]:
    """Chips by name. Raises UsageError for one that is not `known`."""
    strangers = [name for name in names if name not in (*known, ALL)]
    if strangers:
        raise UsageError(f"{flag} {strangers[0]}: expected {ALL} or one of {', '.join(known)}")
    return [*known] if ALL in names else [*dict.fromkeys(names)]


def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    """All rows, chip by chip."""
    made_for = _expanded(options.chip, "--chip", sorted(chips()))
    emulates = _expanded(options.emulate, "--emulate", made_for)
    backend = registry.get("qnn")
    assert isinstance(backend, StaticBackend)
    bench = prepare(options, backend, folder)
    artifacts: dict[str, Artifact] = {}
    rows: list[Row] = []
    for chip in made_for:
        artifacts[chip], of_chip = compiled(bench, chip, folder / chip)
        rows += of_chip
        if chip in emulates:
            rows += emulated(bench, artifacts[chip], chip, folder / chip)
    refused(bench, artifacts, folder)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each figure and write the record; 1 if a binary does not compute what it should."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", help="demo, or the folder of a checkpoint")
    parser.add_argument("--graph", choices=tuple(SCHEMES), default="vision")
    parser.add_argument("--chip", action="append", default=[], help="may be repeated; all: every one (default sm8650)")
    parser.add_argument("--emulate", action="append", default=[], metavar="CHIP", help="run its binary by emulation")
    parser.add_argument("--layers", type=int, help="of the graph (default: all)")
    parser.add_argument("--context", type=int, help="of a decoder (default: 2048)")
    parser.add_argument("--scheme", help="default: w8a16-vision, or w8a16 for a decoder")
    parser.add_argument("--samples", type=int, help="slices or texts of calibration (default: all that are built in)")
    parser.add_argument("--folder", type=Path, help="where temporary files go (default: the system's)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the record here (default: do not)")
    options = parser.parse_args(arguments)
    options.chip = options.chip or ["sm8650"]
    options.scheme = options.scheme or SCHEMES[options.graph]
    for name in ("layers", "context", "samples"):
        count = getattr(options, name)
        if count is not None and count < 1:
            parser.error(f"--{name} {count}: expected at least 1")
    os.environ.setdefault("LENSC_QNN_LIMIT_S", EMULATION_LIMIT_S)
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows = measure(options, Path(folder))
        for row in rows:
            print(f"{row.what}: {'failed' if row.lensc is None else f'{row.lensc:.4g} {row.unit}'}")
        if options.results:
            made = entry("qnn", command_of(options), [row.to_json() for row in rows])
            put(options.results / "qnn.json", made)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return int(any(row.parity == "fail" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
