"""Programs made of a configuration are those that lowering makes of the graph; random weights are what they claim to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch", reason="graphs are traced with torch: pip install 'lensc[export]'")
pytest.importorskip("onnx", reason="pip install 'lensc[export]'")
import onnx_ir as ir

from lensc.backends._program import Constant, Linear, Place, Program, WeightRecord
from lensc.backends._program_lower import lower
from lensc.bench.checkpoint import SIZES, config_json
from lensc.bench.gpu_program import (
    FREQUENCIES,
    FULL,
    RandomSource,
    decoder_program,
    vision_program,
    weight_bytes,
)
from lensc.export.checkpoint import Checkpoint
from lensc.export.graph import GraphSpec
from lensc.export.models.config import ModelConfig
from lensc.export.models.functions import inverse_frequencies
from lensc.export.models.minicpmv import MiniCPMV
from lensc.export.models.session import graph_modules
from lensc.export.onnx import example_inputs, trace_graph
from lensc.export.quantize.linears import find_linears
from lensc.export.quantize.recipe import PRESETS
from lensc.export.quantize.weights import QuantizedWeight, WeightFormat, quantize_rtn
from lensc.export.writer import write_graph

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
Lowered = Callable[[str, str], tuple[GraphSpec, Program]]


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """Of the golden checkpoint, with one vision layer."""
    whole = Checkpoint(GOLDEN).config
    return dataclasses.replace(whole, vision=dataclasses.replace(whole.vision, num_hidden_layers=1))


@pytest.fixture(scope="module")
def lowered(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A graph of the golden checkpoint in a scheme, exported and lowered."""
    checkpoint = Checkpoint(GOLDEN)
    with torch.device("meta"):
        modules = graph_modules(MiniCPMV(config))
    traced: dict[str, Any] = {}

    def quantize(name: str, rows: Any, format: WeightFormat, start: int) -> QuantizedWeight:
        return quantize_rtn(rows, format, search=False)

    def get(name: str, scheme: str) -> tuple[GraphSpec, Program]:
        module, spec = modules[name]
        if name not in traced:
            traced[name] = trace_graph(module, example_inputs(spec), spec)
        model, parameters = traced[name][0].clone(), traced[name][1]
        folder = tmp_path_factory.mktemp(name)
        formats = PRESETS[scheme].formats(find_linears(model, parameters))
        write_graph(model, folder / "model.onnx", parameters, checkpoint.rows, formats, quantize)
        return spec, lower(ir.load(folder / "model.onnx"), spec, folder / "own.data")

    return get


def bare(item: Any) -> Any:
    """Without what only says where constants lie, and what they are called."""
    if isinstance(item, Place):
        return Place("", 0)
    if isinstance(item, tuple):
        return tuple(bare(part) for part in item)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        parts = {field.name: bare(getattr(item, field.name)) for field in dataclasses.fields(item)}
        named = isinstance(item, Constant | WeightRecord)
        return dataclasses.replace(item, **parts | ({"name": ""} if named else {}))
    return item


@pytest.mark.parametrize("scheme", ("f32", "int4"))
@pytest.mark.parametrize("graph", ("decoder", "vision"))
def test_programs_are_those_of_the_graphs(graph: str, scheme: str, config: ModelConfig, lowered: Lowered) -> None:
    spec, expected = lowered(graph, scheme)
    made_spec, made = (
        decoder_program(config, 2, "f32" if scheme == "f32" else "uint4", 128)
        if graph == "decoder"
        else vision_program(config, "f32" if scheme == "f32" else "int8")
    )
    assert made_spec == spec
    assert (made.graph, made.values, made.inputs, made.outputs) == (
        expected.graph, expected.values, expected.inputs, expected.outputs,
    )  # fmt: skip
    assert bare(made.steps) == bare(expected.steps)
    names = [[step.weight.name for step in program.steps if isinstance(step, Linear)] for program in (made, expected)]
    assert names[0] == names[1]


def test_the_full_size_is_that_of_the_published_model() -> None:
    assert ModelConfig.from_json(config_json(SIZES["full"])) == FULL
    _, program = decoder_program(FULL, 32, "f32")
    assert weight_bytes(program, 2) == 2 * 7_504_658_432
    assert weight_bytes(decoder_program(FULL, 32, "uint4", 128)[1], 2) == 7_504_658_432 * 17 // 32


@pytest.mark.parametrize("kind", ("f32", "uint4", "uint2", "int8"))
def test_random_weights_have_the_spread_of_their_width(kind: Literal["f32", "uint4", "uint2", "int8"]) -> None:
    place = Place("", 0)
    scale = None if kind == "f32" else place
    record = WeightRecord("w", kind, 96, 512, 0 if kind in ("f32", "int8") else 128, place, scale, None, "float")
    source = RandomSource(torch.device("cpu"), 7)
    values = source.values(record)
    assert torch.equal(values, RandomSource(torch.device("cpu"), 7).values(record))
    assert not torch.equal(values, source.values(dataclasses.replace(record, name="v")))
    assert not torch.equal(values, RandomSource(torch.device("cpu"), 8).values(record))
    if kind in ("uint4", "uint2"):
        bits = 4 if kind == "uint4" else 2
        parts = [(values >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        values = torch.stack(parts, -1).reshape(96, 512).float() - 2 ** (bits - 1)
    if kind != "f32":
        scales = source.scale(record)
        assert (scales.shape, scales.dtype) == ((96, record.groups), torch.float32)
        values = values.float() * scales.repeat_interleave(512 // record.groups, 1)
    assert (values.shape, values.dtype) == ((96, 512), torch.float32)
    assert float(values.square().mean()) * 512 == pytest.approx(1, rel=0.05)
    assert source.zero_point(record) is None


def test_rotary_frequencies_are_the_models() -> None:
    source = RandomSource(torch.device("cpu"))
    found = source.constant(Constant(FREQUENCIES, 1, 64, Place("", 0)))
    assert torch.equal(found[0], inverse_frequencies(128, 500000.0, torch.device("cpu")))
