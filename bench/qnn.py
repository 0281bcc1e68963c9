"""A graph at full size on its way to an NPU: ranges, compiling, memory, size, nodes off the NPU.

    python -m lensc.bench.qnn CHECKPOINT --graph vision --chip sm8650 [--layers N] [--scheme w8a16-vision] [-o FILE]
    python -m lensc.bench.qnn CHECKPOINT --graph decoder --chip sm8650 [--layers N] [--scheme w8a16] [--context 2048]

CHECKPOINT is one of the official sizes, e.g. made by `lensc.bench.checkpoint`. `--layers` cuts the graph, so that it can be
emulated: a layer of true width takes a minute or more, and its signal to noise is measured against the portable graph in
float32. A decoder's ranges are measured on texts. Times are this machine's; none says anything of a phone.
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
from lensc.export.models.config import ModelConfig
from lensc.export.quantize.calibrate import embedding_rows
from lensc.export.quantize.recipe import resolve
from lensc.export.ranges import PROMPT_TOKENS, prompt_samples, slice_samples
from lensc.export.source import Source
from lensc.export.verify import Tally

EMULATED_TOKENS = 64


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write a record."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.qnn", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--chip", default="sm8650")
    parser.add_argument("--graph", choices=("vision", "decoder"), default="vision")
    parser.add_argument("--layers", type=int, default=None, help="of the graph; default: all")
    parser.add_argument("--context", type=int, default=None, help="of a decoder; default: 2048")
    parser.add_argument("--scheme", default="w8a16-vision")
    parser.add_argument(
        "--samples", type=int, default=None, help="slices or texts of calibration; default: all that are built in"
    )
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
    """Export the graph, measure ranges, compile, and emulate if it is cut."""
    checkpoint = Checkpoint(resolve_checkpoint(options.checkpoint))
    if options.layers is not None:
        checkpoint.config = cut(checkpoint.config, options.graph, options.layers)
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

    record = timed("export_s", lambda: export_one(source, options.graph, folder / "graphs", lambda: None)[0])
    graph = Graph(record.spec, folder / "graphs" / record.file, record.scheme, record.sha256, context=options.context)
    data = calibration_set(source.spec, source.tokenizer)
    if options.graph == "vision":
        samples = slice_samples(graph, source.spec, lambda: data)
    else:
        texts = [sample.ids[:PROMPT_TOKENS] for sample in data.samples if not sample.slices]
        samples = prompt_samples(graph, lambda: [embedding_rows(checkpoint, ids, None) for ids in texts])
    if options.samples is not None:
        samples = samples[-options.samples :]
    if backend.needs_ranges(graph.scheme):
        timed("ranges_s", lambda: backend.measure_ranges(graph, samples, folder / "ranges.json"))
        graph = dataclasses.replace(graph, ranges=folder / "ranges.json")
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    out = folder / "bundle" / options.graph
    out.mkdir(parents=True)
    artifact = timed("compile_s", lambda: backend.compile(graph, target, out))
    result = {
        "target": str(target),
        "graph": options.graph,
        "scheme": artifact.scheme,
        "layers": options.layers or "all",
        **{name: int(artifact.options[name]) for name in ("patches", "context") if name in artifact.options},
        "samples": len(samples),
        **times,
        "binary_bytes": {Path(f.path).name: f.bytes for f in artifact.files if f.path.endswith(".bin")},
        "compiler_peak_bytes": int(artifact.options["compiler_peak_bytes"]),
        "peak_bytes": own_peak,
        "nodes": artifact.placement,
        "multiply_adds": int(artifact.options["multiply_adds"]),
    }
    if options.layers is not None:
        result |= emulate(backend, artifact, graph, folder / "bundle", samples)
    return result


def cut(config: ModelConfig, graph: str, layers: int) -> ModelConfig:
    """The model with so many layers in a graph."""
    if graph == "decoder":
        return dataclasses.replace(config, num_hidden_layers=layers)
    kept = layers + config.drop_vision_last_layer
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_hidden_layers=kept))


def emulate(backend: Any, artifact: Any, graph: Graph, bundle: Path, samples: list[Any]) -> dict[str, Any]:
    """One slice, or a prompt and one more token, by emulation, beside the portable graph in float32 with the weights of the
    recipe.
    """
    import onnxruntime as ort

    os.environ.setdefault("LENSC_QNN_LIMIT_S", "3600")
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = ort.InferenceSession(str(graph.path), settings)
    names = [value.name for value in expected.get_outputs()]
    session = backend.load(artifact, graph.spec, bundle)
    result: dict[str, Any] = {}
    feeds = dict(samples[0])
    if graph.spec.states:
        tokens = min(EMULATED_TOKENS, feeds["inputs_embeds"].shape[1])
        feeds |= {"inputs_embeds": feeds["inputs_embeds"][:, :tokens], "position_ids": np.arange(tokens)}
        feeds["logit_positions"] = np.arange(tokens)[-8:]
    for what in ("slice",) if not graph.spec.states else ("prefill", "decode"):
        wanted = dict(zip(names, expected.run(None, feeds), strict=True))
        started = time.perf_counter()
        got = session.run(feeds)
        result[f"{what}_emulated_s"] = round(time.perf_counter() - started, 1)
        for name, array in wanted.items():
            tally = Tally(1.0)
            tally.add(array, np.asarray(got[name]))
            result[f"{what}_{name}_sqnr_db"] = round(tally.sqnr_db, 1)
        if what == "prefill":
            feeds = {pair.input: wanted[pair.output] for pair in graph.spec.states}
            feeds["inputs_embeds"] = np.ascontiguousarray(samples[0]["inputs_embeds"][:, -1:])
            feeds |= {"position_ids": np.array([tokens]), "logit_positions": np.array([0])}
    session.close()
    return result


if __name__ == "__main__":
    raise SystemExit(main())
