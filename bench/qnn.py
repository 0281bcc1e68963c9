"""The vision tower at full size on its way to an NPU: ranges, compiling, memory, size, nodes off the NPU.

    python -m lensc.bench.qnn CHECKPOINT --chip sm8650 [--layers N] [--scheme w8a16-vision] [-o FILE]

CHECKPOINT is one of the official sizes, e.g. made by `lensc.bench.checkpoint`. `--layers` cuts the tower, so that it can be
emulated: a layer of true width takes half a minute, and its signal to noise is measured against the portable graph in
float32. Times are this machine's; none says anything of a phone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from lensc.backends import registry
from lensc.backends.base import StaticBackend, Target
from lensc.export.build import resolve_checkpoint
from lensc.export.calibration import calibration_set
from lensc.export.checkpoint import Checkpoint
from lensc.export.export_stages import export_one
from lensc.export.graph import Graph
from lensc.export.quantize.recipe import resolve
from lensc.export.ranges import range_samples
from lensc.export.source import Source
from lensc.export.verify import Tally


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write a record."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.qnn", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--chip", default="sm8650")
    parser.add_argument("--layers", type=int, default=None, help="of the tower; default: all")
    parser.add_argument("--scheme", default="w8a16-vision")
    parser.add_argument("--slices", type=int, default=None, help="of calibration; default: all of the built-in ones")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.output.parent if options.output else None) as folder:
        record = measure(options, Path(folder))
    text = json.dumps(record, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export the vision graph, measure ranges, compile, and emulate if the tower is cut."""
    checkpoint = Checkpoint(resolve_checkpoint(options.checkpoint))
    if options.layers is not None:
        vision = dataclasses.replace(
            checkpoint.config.vision, num_hidden_layers=options.layers + checkpoint.config.drop_vision_last_layer
        )
        checkpoint.config = dataclasses.replace(checkpoint.config, vision=vision)
    source = Source(checkpoint, resolve(options.scheme), 1 << 33)
    target = Target("qnn", "npu", options.chip)
    backend = registry.get("qnn")
    assert isinstance(backend, StaticBackend)
    times: dict[str, float] = {}

    def timed(what: str, make: Any) -> Any:
        started = time.perf_counter()
        result = make()
        times[what] = round(time.perf_counter() - started, 1)
        print(f"{what}: {times[what]} s", file=sys.stderr, flush=True)
        return result

    record = timed("export_s", lambda: export_one(source, "vision", folder / "graphs", lambda: None)[0])
    graph = Graph(record.spec, folder / "graphs" / record.file, record.scheme, record.sha256)
    data = calibration_set(source.spec, source.tokenizer)
    samples = range_samples(graph, source.spec, data)
    if options.slices is not None:
        samples = samples[-options.slices :]
    if backend.needs_ranges(graph.scheme):
        timed("ranges_s", lambda: backend.measure_ranges(graph, samples, folder / "ranges.json"))
        graph = dataclasses.replace(graph, ranges=folder / "ranges.json")
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    out = folder / "bundle" / "vision"
    out.mkdir(parents=True)
    artifact = timed("compile_s", lambda: backend.compile(graph, target, out))
    result = {
        "target": str(target),
        "scheme": artifact.scheme,
        "layers": checkpoint.config.vision.num_hidden_layers - checkpoint.config.drop_vision_last_layer,
        "patches": int(artifact.options["patches"]),
        "calibration_slices": len(samples),
        **times,
        "binary_bytes": sum(f.bytes for f in artifact.files),
        "compiler_peak_bytes": int(artifact.options["compiler_peak_bytes"]),
        "peak_bytes": own_peak,
        "nodes": artifact.placement,
        "multiply_adds": int(artifact.options["multiply_adds"]),
    }
    if options.layers is not None:
        result |= emulate(backend, artifact, graph, folder / "bundle", samples)
    return result


def emulate(backend: Any, artifact: Any, graph: Graph, bundle: Path, samples: list[Any]) -> dict[str, Any]:
    """One slice by emulation, beside the portable graph in float32 with the weights of the recipe."""
    import onnxruntime as ort

    os.environ.setdefault("LENSC_QNN_LIMIT_S", "3600")
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = ort.InferenceSession(str(graph.path), settings).run(None, dict(samples[0]))[0]
    session = backend.load(artifact, graph.spec, bundle)
    started = time.perf_counter()
    got = session.run(samples[0])["image_embeds"]
    session.close()
    tally = Tally(1.0)
    tally.add(expected, np.asarray(got))
    seconds = round(time.perf_counter() - started, 1)
    return {"sqnr_db": round(tally.sqnr_db, 1), "cosine": tally.cosine, "emulated_s": seconds}


if __name__ == "__main__":
    raise SystemExit(main())
