"""A decoder layer and a vision layer of the model's true sizes: every engine and every named scheme against torch.

Small models cannot show what depends on a width: tiles and their remainders, sums of 14,336 products, groups of 128 in
rows of 1,152 and 4,304, kernels that are chosen by size. What is quantized is drawn, values and scales, not rounded from
floats, which takes most of the time and changes no operator; schemes that differ in nothing else share a graph.

Where products are of 8-bit inputs the reference is computed twice, the second time with the inputs of every linear
rounded to 8 bits as the engines do it. What that costs is what the engine may cost, too, and twice its power (3 dB): an
engine may round in other groups, and attends in bfloat16 where it is faster (2^-9 of relative error, 20 dB below).
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference model needs torch: pip install 'lensc[export]'")
import torch
from torch import Tensor, nn

import lensc
from lensc.backends import registry
from lensc.backends.base import Array, StaticBackend, Target
from lensc.backends.bundle import load_manifest
from lensc.backends.errors import UnsupportedError
from lensc.bench.checkpoint import SIZES, config_json, write_checkpoint
from lensc.export.checkpoint import Checkpoint
from lensc.export.graph import Graph, GraphSpec
from lensc.export.models.linears import linear_rows
from lensc.export.models.minicpmv import MiniCPMV, Resampler, ResamplerAttention, VisionEmbeddings
from lensc.export.models.session import TorchSession, graph_modules
from lensc.export.onnx import example_inputs, trace_graph
from lensc.export.quantize.grid import LARGEST_MULTIPLE
from lensc.export.quantize.linears import find_linears
from lensc.export.quantize.recipe import PRESETS, Recipe
from lensc.export.quantize.scheme import Scheme
from lensc.export.quantize.weights import QuantizedWeight, WeightFormat, dequantize
from lensc.export.questions import questions_for
from lensc.export.verify import Metrics
from lensc.export.writer import write_graph

ALLOWED_DB = 3.0
"""Twice the power of the noise that rounding inputs makes."""

MAX_MEMORY = 4 << 30
LEAST_DB = 30.0
"""Of logits and image embeddings against the reference with the same weights: the noise of two layers with inputs in 8
bits is 35 dB below them."""

PATCHES = 1024
DECODER_CALLS = ((17, 5), (1, 22))
"""(new tokens, tokens before): engines have a kernel for several rows and another for one."""
GRAPHS = ("vision", "decoder")


def one_layer() -> Any:
    from lensc.export.models.config import ModelConfig

    return dataclasses.replace(ModelConfig.from_json(config_json(SIZES["wide"])), num_hidden_layers=1)


def meta_module(graph: str) -> tuple[nn.Module, GraphSpec]:
    with torch.device("meta"):
        return graph_modules(MiniCPMV(one_layer()))[graph]


def scheme_of(recipe: Recipe, graph: str, names: Iterable[str]) -> Scheme:
    """Without the KV cache's bits: how a cache is stored shows in its rows, and is tested where it is made."""
    return dataclasses.replace(recipe.scheme(graph, names), kv_bits=None)


def alike() -> dict[tuple[str, str], list[str]]:
    """Schemes by what an engine sees of them in each graph: (graph, formats of its linears and of products)."""
    found: dict[tuple[str, str], list[str]] = {}
    for graph in GRAPHS:
        names = [rows.name for n, p in meta_module(graph)[0].state_dict().items() for rows in linear_rows(n, p)]
        for recipe in PRESETS.values():
            if graph == "decoder" and recipe.activations.get(graph) == 16:
                continue  # for an NPU alone: `lensc.bench.qnn`, as emulating a layer of true width takes minutes
            formats = {name: str(recipe.format_of(name)) for name in names}
            found.setdefault((graph, f"{formats} {scheme_of(recipe, graph, names)}"), []).append(recipe.name)
    return found


CASES = sorted(
    ((graph, schemes) for (graph, _), schemes in alike().items()), key=lambda case: (case[0], "f32" not in case[1])
)
"""Float weights first."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A graph of one layer in a file, and what it must compute: `calls` are pairs of inputs and outputs."""

    graph: Graph
    calls: list[tuple[dict[str, Array], dict[str, Array]]]
    rounded: list[dict[str, Array]]
    """Outputs of the same calls with inputs of linears in 8 bits; empty where products are in float."""
    has_two_bits: bool


Makers = Callable[[str], "Maker"]


class Maker:
    """Makes layers, one after the other: traces a graph once, and holds its weights in the same memory all the time."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.module, self.spec = meta_module(name)
        self.traced, self.parameters = trace_graph(self.module, example_inputs(self.spec), self.spec)
        self.checkpoint = checkpoint
        self.state = {key: checkpoint.tensor(key).float() for key in self.module.state_dict()}
        self.rows = {rows.name: rows.weight for key, p in self.state.items() for rows in linear_rows(key, p)}
        self.rounded: set[str] = set()

    def make(self, recipe: Recipe, path: Path) -> Layer:
        graph = self.traced.clone()
        formats = recipe.formats(find_linears(graph, self.parameters))
        assert self.rounded <= formats.keys(), "float weights come first: rounded ones take their place"
        self.rounded |= formats.keys()
        sha256 = write_graph(graph, path, self.parameters, self.checkpoint.rows, formats, self.quantize)
        module, _ = meta_module(self.spec.name)
        module.load_state_dict(self.state, assign=True)
        session = TorchSession(module.requires_grad_(False), self.spec)
        feeds = list(feeds_of(self.spec))
        calls = [(feed, session.run(feed)) for feed in feeds]
        scheme = scheme_of(recipe, self.spec.name, self.rows)
        rounded = []
        if scheme.activation_bits == 8:
            round_inputs(module, scheme.group_size)
            rounded = [session.run(feed) for feed in feeds]
        few = any(format.bits == 2 for format in formats.values())
        return Layer(Graph(self.spec, path, str(scheme), sha256), calls, rounded, few)

    def quantize(self, name: str, rows: Tensor, format: WeightFormat, start: int) -> QuantizedWeight:
        made = drawn(rows, format, [zlib.crc32(name.encode()), start])
        self.rows[name][start : start + len(rows)] = dequantize(made)
        return made


def drawn(rows: Tensor, format: WeightFormat, seed: list[int]) -> QuantizedWeight:
    """Every value of the format equally often, every group with another scale, all together as large as `rows`.

    A symmetric scale is negative in every second group, as where the largest weight is on the other side.
    """
    generator = np.random.Generator(np.random.SFC64(seed))
    (outputs, inputs), levels = rows.shape, 1 + format.highest - format.lowest
    groups = format.groups(inputs)
    values = np.frombuffer(generator.bytes(rows.numel()), np.uint8).reshape(outputs, inputs) & (2**format.bits - 1)
    if format.is_signed:
        values = np.maximum(values.view(np.int8), format.lowest)
    size = (
        float(rows[:8].float().std()) * (12 / (levels**2 - 1)) ** 0.5
    )  # beside the deviation of equally likely levels
    if format.scale_bits is None:
        scales = size * generator.uniform(0.5, 1.5, (outputs, groups))
    else:
        steps = (size / 8 * generator.uniform(0.5, 1.5, (outputs, 1))).astype(np.float32)
        scales = steps.astype(np.float64) * generator.integers(1, LARGEST_MULTIPLE + 1, (outputs, groups))
    if format.symmetric and not format.is_signed:
        scales[:, ::2] *= -1
    middle = levels // 2
    zeros = None if format.symmetric else generator.integers(middle - 1, middle + 2, (outputs, groups), np.uint8)
    return QuantizedWeight(
        torch.from_numpy(values),
        torch.from_numpy(scales.astype(np.float32)),
        None if zeros is None else torch.from_numpy(zeros),
        format,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("full-width") / "wide"
    write_checkpoint(folder, "wide")
    yield Checkpoint(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def makers(checkpoint: Checkpoint) -> Makers:
    """The maker of a graph's layers; that of another graph is let go."""
    return functools.lru_cache(maxsize=1)(functools.partial(Maker, checkpoint))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'+'.join(case[1])}")
def layer(request: pytest.FixtureRequest, makers: Makers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layer]:
    name, schemes = request.param
    folder = tmp_path_factory.mktemp(name)
    yield makers(name).make(PRESETS[schemes[0]], folder / "model.onnx")
    shutil.rmtree(folder)


def feeds_of(spec: GraphSpec) -> Iterator[dict[str, Array]]:
    """Inputs as they are in the model: embeddings of deviation 0.5, patches within ±1, a page of 32 x 32 patches."""
    generator = np.random.default_rng(3)
    if spec.name == "vision":
        shapes = {t.name: [{"slices": 1, "patches": PATCHES}.get(str(d), d) for d in t.shape] for t in spec.inputs}
        yield {
            "patches": generator.uniform(-1, 1, shapes["patches"]).astype(np.float32),
            "position_ids": np.arange(PATCHES)[None],
            "attention_bias": np.zeros(shapes["attention_bias"], np.float32),
            "key_bias": np.zeros(shapes["key_bias"], np.float32),
            "key_pos_embed": generator.uniform(-1, 1, shapes["key_pos_embed"]).astype(np.float32),
        }
        return
    for tokens, past in DECODER_CALLS:
        sizes = {"batch": 1, "tokens": tokens, "past": past}
        feeds: dict[str, Array] = {
            t.name: generator.standard_normal([sizes.get(str(d), d) for d in t.shape]).astype(np.float32) / 2
            for t in spec.inputs
            if t.dtype == "float32"
        }
        yield feeds | {"position_ids": np.arange(past, past + tokens), "logit_positions": np.arange(tokens)}


# --- rounding -------------------------------------------------------------------------------------------------------


def in_8_bits(x: Tensor, group: int | None) -> Tensor:
    """`x` rounded in groups of its last axis, -127 to 127; without groups, 0 to 255 for the whole of it, as
    DynamicQuantizeLinear does."""
    if group is None:
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        step = (high - low) / 255
        return (torch.round(x / step)).clamp(torch.round(low / step), torch.round(high / step)) * step
    grouped = x.unflatten(-1, (-1, group))
    step = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (torch.round(grouped / step) * step).flatten(-2)


def round_inputs(module: nn.Module, group: int | None) -> None:
    """Let every linear of the model compute with inputs of 8 bits."""

    def first(count: int) -> Any:
        return lambda part, inputs: (*(in_8_bits(x, group) for x in inputs[:count]), *inputs[count:])

    for part in module.modules():
        if isinstance(part, nn.Linear | VisionEmbeddings):
            part.register_forward_pre_hook(first(1))
        elif isinstance(part, ResamplerAttention):
            part.register_forward_pre_hook(first(3))
        elif isinstance(part, Resampler):
            part.ln_post.register_forward_hook(lambda part, inputs, output: in_8_bits(output, group))


# --- tests ----------------------------------------------------------------------------------------------------------


def targets() -> list[Any]:
    found = []
    for probe in registry.probes():
        if isinstance(registry.get(probe.backend), StaticBackend):
            continue  # graphs of fixed shapes for a named chip have a file of their own, test_qnn.py
        marks = () if probe.usable else pytest.mark.skip(reason=probe.reason)
        target = Target(probe.backend, probe.processor)
        found.append(pytest.param(target, id=str(target), marks=marks))
    return found


@pytest.mark.parametrize("target", targets())
def test_an_engine_computes_a_layer_of_true_size(layer: Layer, target: Target, tmp_path: Path) -> None:
    backend = registry.get(target.backend)
    (tmp_path / target.slug).mkdir()
    if target.backend == "openvino" and layer.has_two_bits:
        with pytest.raises(UnsupportedError, match="has 2 bits, which openvino does not read"):
            backend.compile(layer.graph, target, tmp_path / target.slug)
        return
    if target.backend == "onnxruntime" and layer.graph.scheme == "w8a16":
        with pytest.raises(UnsupportedError, match=r"a scale per output needs .* or w8 with activations of 8 bits"):
            backend.compile(layer.graph, target, tmp_path / target.slug)
        return
    try:
        artifact = backend.compile(layer.graph, target, tmp_path / target.slug)
        session = backend.load(artifact, layer.graph.spec, tmp_path)
        # numpy has one way to compute, and takes its time for it
        calls = range(1 if target.backend == "reference" else len(layer.calls))
        got = [session.run(layer.calls[i][0]) for i in calls]
        session.close()
    finally:
        shutil.rmtree(tmp_path / target.slug)
    in_float = target.backend == "reference" or not layer.rounded
    for i in calls:
        metrics = compared(layer.calls[i][1], got[i])
        if in_float:
            assert metrics.passed, str(metrics)
            continue
        allowed = compared(layer.calls[i][1], layer.rounded[i])
        for name, tally in metrics.outputs.items():
            least = allowed.outputs[name].sqnr_db - ALLOWED_DB
            assert metrics.finite and tally.sqnr_db >= least, f"{name}: {tally.sqnr_db:.1f} dB, expected {least:.1f}"


def compared(expected: dict[str, Array], got: dict[str, Array]) -> Metrics:
    metrics = Metrics("layer")
    metrics.add(expected, got)
    return metrics


BUILD = """
import sys
from pathlib import Path

from lensc.backends.base import Target
from lensc.export import compile_stages
from lensc.export.build import build
from lensc.export.quantize import grid, weights
from lensc.export.questions import questions_for

weights.SHRINK = {bits: shares[:1] for bits, shares in weights.SHRINK.items()}
grid.STEPS = grid.STEPS[:1]
compile_stages.questions_for = lambda spec: questions_for(spec)[:1]
checkpoint, out, most = sys.argv[1:]
build(Path(checkpoint), [Target("onnxruntime", "cpu")], Path(out), scheme="int4", max_memory=int(most))
"""
"""In a process of its own: what other tests left in this one would count, too."""


def test_a_model_of_true_width_from_checkpoint_to_answer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Built within 4 GiB, in which the model does not fit twice: the reference is streamed. One picture is asked about,
    and on one engine: this takes half a minute.
    """
    out = tmp_path / "bundle"
    command = [sys.executable, "-P", "-c", BUILD, str(checkpoint.folder), str(out), str(MAX_MEMORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(out)
    assert max(stage.peak_bytes for stage in manifest.stages) <= MAX_MEMORY
    judged = [record for record in manifest.parity if not record.tolerance.startswith("none")]
    assert [record.graph for record in judged] == list(GRAPHS)
    assert [str(record) for record in judged if record.sqnr_db < LEAST_DB] == []
    picture = questions_for(manifest.model)[0].images
    with lensc.load(out) as vlm:
        first, again = (vlm.generate("Read the text.", picture, max_new_tokens=4) for _ in range(2))
    assert len(first.token_ids) == 4 and first.token_ids == again.token_ids
    assert (first.metrics.slices_from_cache, again.metrics.slices_from_cache) == (0, 1)
    shutil.rmtree(out)
