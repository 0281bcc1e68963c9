"""A small decoder and a piece of a vision tower as the exporter writes them, made with onnx alone, and what they compute,
in numpy.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lensc.backends.base import Array
from lensc.export.graph import DimRange, Graph, GraphSpec, StatePair, TensorSpec

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"

LAYERS, WIDTH, HEADS, KV_HEADS, DIM, VOCAB = 2, 64, 4, 2, 16, 50
LIMIT = 64
EPSILON = 1e-5
GROUP = 32

Weights = dict[str, Array]


def spec() -> GraphSpec:
    names = [f"{kind}.{i}" for i in range(LAYERS) for kind in ("key", "value")]
    rows = (KV_HEADS, DIM)
    return GraphSpec(
        name="decoder",
        inputs=(
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", WIDTH)),
            TensorSpec("position_ids", "int64", ("tokens",)),
            TensorSpec("logit_positions", "int64", ("rows",)),
            *(TensorSpec(f"past_{name}", "float32", ("past", "batch", *rows)) for name in names),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "rows", VOCAB)),
            *(TensorSpec(name, "float32", ("tokens", "batch", *rows)) for name in names),
        ),
        states=tuple(StatePair(f"past_{name}", name) for name in names),
        dims={
            "batch": DimRange(1, 1, 4),
            "tokens": DimRange(1, 1, LIMIT),
            "rows": DimRange(1, 1, LIMIT),
            "past": DimRange(0, 16, LIMIT),
        },
    )


def frequencies() -> Array:
    return (1.0 / 500000.0 ** (np.arange(0, DIM, 2) / DIM)).astype(np.float32)


def write_decoder(path: Path, bits: int = 32) -> Weights:
    """A decoder without MLPs as the exporter writes it, its weights in 32 bits, 8 with a scale per output, or 4 with one per 32 inputs.

    Returns the weights it stands for.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes: list[Any] = []
    tensors: list[Any] = [numpy_helper.from_array(frequencies(), "frequencies")]
    weights: Weights = {}

    def linear(x: str, name: str, outputs: int, result: str) -> None:
        weight = generator.standard_normal((outputs, WIDTH)).astype(np.float32) * WIDTH**-0.5
        source = name
        if bits == 32:
            tensors.append(numpy_helper.from_array(weight, name))
        elif bits == 8:
            scale = (np.abs(weight).max(1) / 127).astype(np.float32)
            values = np.rint(weight / scale[:, None]).astype(np.int8)
            weight, source = values * scale[:, None], f"{name}.t"
            tensors.extend(
                [numpy_helper.from_array(values.T.copy(), name), numpy_helper.from_array(scale, f"{name}.s")]
            )
            nodes.append(helper.make_node("DequantizeLinear", [name, f"{name}.s"], [source], axis=1))
        else:
            groups = weight.reshape(outputs, WIDTH // GROUP, GROUP)
            scales = np.abs(groups).max(-1, keepdims=True) / 7
            values = np.clip(np.rint(groups / scales), -7, 7)
            weight = (values * scales).astype(np.float32).reshape(outputs, WIDTH)
            unsigned = (values + 8).astype(np.uint8).reshape(outputs, WIDTH)
            packed = unsigned[:, ::2] | unsigned[:, 1::2] << 4
            zeros = np.full(outputs * WIDTH // GROUP // 2, 0x88, np.uint8)
            sizes = [outputs, WIDTH // GROUP]
            tensors.extend(
                [
                    helper.make_tensor(name, TensorProto.UINT4, [outputs, WIDTH], packed.tobytes(), raw=True),
                    numpy_helper.from_array(scales[..., 0].astype(np.float32), f"{name}.scale"),
                    helper.make_tensor(f"{name}.zero", TensorProto.UINT4, sizes, zeros.tobytes(), raw=True),
                ]
            )
            inputs = [name, f"{name}.scale", f"{name}.zero"]
            source = f"{name}.float"
            nodes.append(helper.make_node("DequantizeLinear", inputs, [source], axis=1, block_size=GROUP))
        weights[name] = weight
        if bits != 8:
            nodes.append(helper.make_node("Transpose", [source], [f"{name}.t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [x, f"{name}.t"], [result]))

    def norm(x: str, name: str) -> str:
        weights[name] = (1 + 0.1 * generator.standard_normal(WIDTH)).astype(np.float32)
        tensors.append(numpy_helper.from_array(weights[name], name))
        nodes.append(helper.make_node("RMSNorm", [x, name], [f"{name}.y"], domain="lensc", epsilon=EPSILON))
        return f"{name}.y"

    x = "inputs_embeds"
    for i in range(LAYERS):
        normal = norm(x, f"norm.{i}")
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            linear(normal, f"{name}.{i}", heads * DIM, f"{name}.{i}.y")
        reads = [f"q.{i}.y", f"k.{i}.y", f"v.{i}.y", "position_ids", "frequencies", f"past_key.{i}", f"past_value.{i}"]
        sizes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "head_dim": DIM, "groups": HEADS // KV_HEADS}
        makes = [f"mixed.{i}", f"key.{i}", f"value.{i}"]
        nodes.append(helper.make_node("CausalAttention", reads, makes, domain="lensc", scale=DIM**-0.5, **sizes))
        linear(f"mixed.{i}", f"o.{i}", WIDTH, f"o.{i}.y")
        nodes.append(helper.make_node("Add", [x, f"o.{i}.y"], [f"x.{i}"]))
        x = f"x.{i}"
    nodes.append(helper.make_node("Gather", [x, "logit_positions"], ["picked"], axis=1))
    linear(norm("picked", "norm"), "head", VOCAB, "logits")

    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    infos = [
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in tensors]
        for tensors in (spec().inputs, spec().outputs)
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("lensc", 1)]
    # OpenVINO must never look at the definition: this one is wrong
    identity = [helper.make_node("Identity", ["x"], ["y"])]
    functions = [helper.make_function("lensc", "RMSNorm", ["x", "w"], ["y"], identity, opsets[:1], ["epsilon"])]
    graph = helper.make_graph(nodes, "decoder", *infos, tensors)
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=256)
    return weights


def reference(weights: Weights, embeds: Array) -> Array:
    """Logits of every position, in float64, from the definition; no cache."""

    def norm(x: Array, weight: Array) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight

    def rotate(x: Array) -> Array:
        angles = np.arange(x.shape[1])[:, None, None] * np.tile(frequencies().astype(np.float64), 2)
        turned = np.concatenate([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1)
        return x * np.cos(angles) + turned * np.sin(angles)

    x = embeds.astype(np.float64)
    batch, tokens = x.shape[:2]
    for i in range(LAYERS):
        normal = norm(x, weights[f"norm.{i}"])
        q, k, v = (
            (normal @ weights[f"{n}.{i}"].T).reshape(batch, tokens, heads, DIM)
            for n, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(t, HEADS // KV_HEADS, axis=2) for t in (k, v))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("bhqk,bkhd->bqhd", shares, v).reshape(batch, tokens, HEADS * DIM)
        x = x + mixed @ weights[f"o.{i}"].T
    return norm(x, weights["norm"]) @ weights["head"].T


@dataclass(frozen=True)
class SmallDecoder:
    """The graph, its weights, and the sizes that tests ask about."""

    graph: Graph
    weights: Weights
    layers: int = LAYERS
    width: int = WIDTH
    kv_heads: int = KV_HEADS
    head_dim: int = DIM
    limit: int = LIMIT
    group: int = GROUP

    @property
    def spec(self) -> GraphSpec:
        return self.graph.spec

    def logits(self, embeds: Array) -> Array:
        """Of every position of `embeds: float32[batch, tokens, width]`, in float64."""
        return reference(self.weights, embeds)

    def embeddings(self, batch: int, tokens: int, seed: int = 1) -> Array:
        """Random float32[batch, tokens, width]."""
        return np.random.default_rng(seed).standard_normal((batch, tokens, WIDTH), np.float32)


@pytest.fixture(scope="session")
def small_decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], SmallDecoder]:
    """The decoder with weights of 32, 8 or 4 bits, written once."""
    made: dict[int, SmallDecoder] = {}

    def get(bits: int) -> SmallDecoder:
        if bits not in made:
            path = tmp_path_factory.mktemp(f"decoder{bits}") / "decoder.onnx"
            scheme = "f32" if bits == 32 else f"w{bits}a32-g{GROUP}"
            weights = write_decoder(path, bits)
            made[bits] = SmallDecoder(Graph(spec(), path, scheme, "0" * 64), weights)
        return made[bits]

    return get


MLP = (96, 160, 64)
"""Width of the input, of what is between two products, and of the output."""


@dataclass(frozen=True)
class SmallMlp:
    """Two products with int8 weights, the first with a bias and ReLU, the second the output of the graph `vision`."""

    path: Path
    layers: tuple[tuple[Array, Array], ...]
    width: int = MLP[0]

    @property
    def spec(self) -> GraphSpec:
        rows = ("slices", "patches")
        return GraphSpec(
            name="vision",
            inputs=(TensorSpec("patches", "float32", (*rows, MLP[0])),),
            outputs=(TensorSpec("made", "float32", (*rows, MLP[-1])),),
            states=(),
            dims={"slices": DimRange(1, 1, 9), "patches": DimRange(1, 10, 30)},
        )

    def made(self, patches: Array) -> Array:
        """The output, in float64."""
        (first, bias), (second, _) = self.layers
        made: Array = np.maximum(patches.astype(np.float64) @ first.T + bias, 0) @ second.T
        return made


@pytest.fixture(scope="session")
def small_mlp(tmp_path_factory: pytest.TempPathFactory) -> SmallMlp:
    """Written once, with its weights in a file of their own."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes: list[Any] = []
    tensors: dict[str, Array] = {}
    layers, x = [], "patches"
    for i, (inputs, outputs) in enumerate(itertools.pairwise(MLP)):
        values = generator.integers(-127, 128, (inputs, outputs)).astype(np.int8)
        scales = generator.uniform(0.5, 1.5, outputs).astype(np.float32) / 600
        bias = generator.standard_normal(outputs).astype(np.float32) * (i == 0)
        tensors |= {f"w{i}": values, f"w{i}.scale": scales}
        nodes += [
            helper.make_node("DequantizeLinear", [f"w{i}", f"w{i}.scale"], [f"w{i}.float"], axis=1),
            helper.make_node("MatMul", [x, f"w{i}.float"], ["product" if i == 0 else "made"]),
        ]
        if i == 0:
            tensors["b0"] = bias
            nodes += [helper.make_node("Add", ["product", "b0"], ["sum"]), helper.make_node("Relu", ["sum"], ["relu"])]
            x = "relu"
        layers.append((values.T * scales[:, None].astype(np.float64), bias.astype(np.float64)))
    small = SmallMlp(tmp_path_factory.mktemp("mlp") / "vision.onnx", tuple(layers))
    infos = [
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in tensors_of]
        for tensors_of in (small.spec.inputs, small.spec.outputs)
    ]
    arrays = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "vision", *infos, arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(small.path), save_as_external_data=True, location="vision.onnx.data", size_threshold=100)
    return small


Graphs = Callable[[str, Any], tuple[GraphSpec, Path]]
"""The graph of that name in a recipe: its interface and its file."""


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """One layer of each of the golden model's graphs, traced once and written once for each set of formats."""
    import torch

    from lensc.export.checkpoint import Checkpoint
    from lensc.export.models.minicpmv import MiniCPMV
    from lensc.export.models.session import graph_modules
    from lensc.export.onnx import example_inputs, trace_graph
    from lensc.export.quantize.linears import find_linears
    from lensc.export.quantize.weights import quantize_rtn
    from lensc.export.writer import write_graph

    def quantize(name: str, rows: Any, format: Any, start: int) -> Any:
        """Without the search for the best scales, which takes most of the time."""
        made = quantize_rtn(rows, format, search=False)
        if format.symmetric and not format.is_signed:
            made.scales[:, ::2] *= -1  # as the search does where the largest weight is on the other side
        return made

    checkpoint = Checkpoint(GOLDEN)
    tower = dataclasses.replace(checkpoint.config.vision, num_hidden_layers=1)
    with torch.device("meta"):
        modules = graph_modules(MiniCPMV(dataclasses.replace(checkpoint.config, vision=tower, num_hidden_layers=1)))
    traced: dict[str, tuple[Any, Any]] = {}
    written: dict[str, Path] = {}

    def get(name: str, recipe: Any) -> tuple[GraphSpec, Path]:
        module, spec = modules[name]
        if name not in traced:
            traced[name] = trace_graph(module, example_inputs(spec), spec)
        model, parameters = traced[name][0].clone(), traced[name][1]
        formats = recipe.formats(find_linears(model, parameters))
        key = f"{name} {formats}"
        if key not in written:
            written[key] = tmp_path_factory.mktemp(name) / "model.onnx"
            write_graph(model, written[key], parameters, checkpoint.rows, formats, quantize)
        return spec, written[key]

    return get
