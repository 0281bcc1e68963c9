"""Exported files: names, shapes, operators, weights and bytes. What graphs compute is in tests/backends."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'lensc[export]'")
onnx = pytest.importorskip("onnx", reason="pip install 'lensc[export]'")
import onnx_ir as ir
import torch
from torch import Tensor, nn

from lensc.backends.errors import GraphError, StorageError
from lensc.export.data_file import PAGE
from lensc.export.graph import DimRange, Graph, GraphSpec, TensorSpec
from lensc.export.models.config import ModelConfig
from lensc.export.models.minicpmv import MiniCPMV
from lensc.export.models.session import graph_modules
from lensc.export.onnx import OPSET, example_inputs, export_graph, export_model
from lensc.export.passes import inline

WIDTH = 24


class Block(nn.Module):
    """One of everything that once went wrong: equal weights, a bias of zeros, a constant table, `*args`, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.norm_again = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.out = nn.Linear(4 * WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        y = self.out(torch.nn.functional.gelu(self.fc(self.norm(x)), approximate="tanh"))
        y = self.norm_again(y) * torch.arange(WIDTH, dtype=torch.float32, device=x.device) / WIDTH
        return (y, *(torch.cat((row, y[0]), dim=0) for row in rows))


def block_spec() -> GraphSpec:
    return GraphSpec(
        name="block",
        inputs=(
            TensorSpec("x", "float32", ("batch", "tokens", WIDTH)),
            TensorSpec("past.0", "float32", ("past", WIDTH)),
            TensorSpec("past.1", "float32", ("past", WIDTH)),
        ),
        outputs=(
            TensorSpec("y", "float32", ("batch", "tokens", WIDTH)),
            TensorSpec("row.0", "float32", ("past + tokens", WIDTH)),
            TensorSpec("row.1", "float32", ("past + tokens", WIDTH)),
        ),
        states=(),
        dims={"batch": DimRange(1, 1, 8), "tokens": DimRange(1, 1, 64), "past": DimRange(0, 0, 64)},
    )


def block(seed: int) -> Block:
    torch.manual_seed(seed)
    return Block().requires_grad_(False)


def export_block(path: Path, module: nn.Module, **options: Any) -> Graph:
    return export_graph(module, example_inputs(block_spec()), block_spec(), path, **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return export_block(tmp_path_factory.mktemp("block") / "block.onnx", block(0))


def proto(graph: Graph) -> Any:
    return onnx.load(str(graph.path), load_external_data=False)


def dims(value: Any) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


# --- any module ---------------------------------------------------------------------------------------------------


def test_signature_is_the_spec(exported: Graph) -> None:
    graph = proto(exported).graph
    spec = exported.spec
    assert [(v.name, dims(v)) for v in graph.input] == [(t.name, list(t.shape)) for t in spec.inputs]
    assert [v.name for v in graph.output] == [t.name for t in spec.outputs]


def test_parameters_keep_names_shapes_and_values(exported: Graph) -> None:
    """Also where two are equal, or could be folded into something else; those not used are not there."""
    state = block(0).state_dict()
    model = onnx.load(str(exported.path))
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    expected = {name: tensor.numpy() for name, tensor in state.items() if not name.startswith("unused")}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    rest = found.keys() - expected.keys()
    assert rest and all(name.startswith("const_") for name in rest)
    assert all(found[name].size <= WIDTH for name in rest)


def test_file_is_valid_and_of_one_opset(exported: Graph) -> None:
    onnx.checker.check_model(str(exported.path), full_check=True)
    assert [(o.domain, o.version) for o in proto(exported).opset_import] == [("", OPSET)]


def test_operators_are_those_engines_know(exported: Graph) -> None:
    kinds = Counter(n.op_type for n in proto(exported).graph.node)
    assert kinds["LayerNormalization"] == 2 and kinds["Gelu"] == 1 and kinds["MatMul"] == 2


def test_weights_lie_in_one_file_on_pages(exported: Graph) -> None:
    external = [t for t in proto(exported).graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {t.name for t in external} == {"fc.weight", "out.weight"}
    entries = [{e.key: e.value for e in t.external_data} for t in external]
    assert {e["location"] for e in entries} == {"block.onnx.data"}
    assert all(int(e["offset"]) % PAGE == 0 for e in entries)
    assert sorted(p.name for p in exported.path.parent.iterdir()) == ["block.onnx", "block.onnx.data"]


def test_sha256_covers_model_then_data(exported: Graph) -> None:
    content = exported.path.read_bytes() + exported.path.with_name("block.onnx.data").read_bytes()
    assert exported.sha256 == hashlib.sha256(content).hexdigest()


def test_file_names_nobody(exported: Graph) -> None:
    """No path, stack trace, class or version of who built it."""
    model = proto(exported)
    content = exported.path.read_bytes()
    folders = [
        str(folder).encode() for folder in (exported.path.parent, Path(torch.__file__).parent, Path(__file__).parent)
    ]
    for forbidden in (*folders, b"Traceback", b".py", b"torch", b"Block", b"pkg."):
        assert forbidden not in content, forbidden
    assert not model.metadata_props and not model.graph.doc_string and not model.producer_version
    assert all(not n.metadata_props and not n.doc_string for n in model.graph.node)
    assert not any(v.metadata_props for v in model.graph.value_info)


def test_dimensions_are_named_as_in_the_spec(exported: Graph) -> None:
    names = {d for v in proto(exported).graph.value_info for d in dims(v) if isinstance(d, str)}
    assert names <= {"batch", "tokens", "past", "past + tokens", "tokens + past"}


def test_same_weights_same_bytes_other_weights_same_graph(exported: Graph, tmp_path: Path) -> None:
    """The graph does not depend on values, and the values may come from anywhere, one by one."""
    asked: list[str] = []
    with torch.device("meta"):
        empty = Block().requires_grad_(False)

    def weights_of(seed: int) -> Any:
        state = block(seed).state_dict()

        def read(name: str, start: int, stop: int) -> Tensor:
            asked.append(name)
            return state[name][start:stop]

        return read

    same = export_block(tmp_path / "block.onnx", empty, rows=weights_of(0))
    assert same.sha256 == exported.sha256
    assert Counter(asked).most_common(1)[0][1] == 1 and "unused.weight" not in asked
    other = export_block(tmp_path / "block.onnx", empty, rows=weights_of(1))
    assert other.sha256 != exported.sha256
    strip = [t.name for t in proto(other).graph.initializer]
    assert strip == [t.name for t in proto(exported).graph.initializer]
    assert proto(other).graph.node == proto(exported).graph.node


def test_module_is_left_as_it_was(exported: Graph, tmp_path: Path) -> None:
    module = block(0).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    export_block(tmp_path / "block.onnx", module)
    assert module.training
    assert all(p.device.type == "cpu" for p in module.parameters())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("rows", "message"),
    (
        (None, "block: .* has no values; pass `rows`"),
        (lambda name, start, stop: torch.zeros(3, 5), r"expected rows \[.* of floats, got float32\[3, 5\]"),
        (lambda name, start, stop: block(0).state_dict()[name][start:stop].int(), r"of floats, got int32\["),
        (lambda name, start, stop: block(0).state_dict()[name][start:stop] * torch.nan, "holds NaN"),
    ),
    ids=("no values", "shape", "dtype", "NaN"),
)
def test_wrong_weights_are_refused(tmp_path: Path, rows: Any, message: str) -> None:
    with torch.device("meta"):
        empty = Block()
    old = tmp_path / "block.onnx"
    old.write_bytes(b"old")
    with pytest.raises(GraphError, match=message):
        export_block(old, empty, rows=rows)
    assert old.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["block.onnx"]


def test_a_graph_that_is_not_the_spec_is_refused(tmp_path: Path) -> None:
    spec = block_spec()
    outputs = (TensorSpec("y", "float32", ("tokens", "batch", WIDTH)), *spec.outputs[1:])
    with pytest.raises(
        GraphError, match=r"expected output y: float32\[tokens, batch, 24\], traced y: .*\[batch, tokens"
    ):
        export_graph(block(0), example_inputs(spec), dataclasses.replace(spec, outputs=outputs), tmp_path / "b.onnx")
    assert not any(tmp_path.iterdir())


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        export_block(tmp_path / "nowhere" / "block.onnx", block(0))


# --- the model ----------------------------------------------------------------------------------------------------


def tiny_model() -> MiniCPMV:
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "model_type": "minicpmv",
        "hidden_size": 128,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "query_num": 3,
        "drop_vision_last_layer": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 256,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14, "scale_resolution": 56},
        "vision_config": {**vision, "image_size": 70, "patch_size": 14},
    }
    torch.manual_seed(0)
    model = MiniCPMV(ModelConfig.from_json(config)).requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    return export_model(tiny_model(), tmp_path_factory.mktemp("graphs"))


def inlined(graph: Graph) -> Any:
    """The graph as an engine without operators for the functions gets it."""
    return ir.to_proto(inline(ir.load(graph.path))).graph


def test_both_graphs_are_written(graphs: dict[str, Graph]) -> None:
    folder = graphs["vision"].path.parent
    names = ["decoder.onnx", "decoder.onnx.data", "vision.onnx", "vision.onnx.data"]
    assert sorted(p.name for p in folder.iterdir()) == names
    for graph in graphs.values():
        onnx.checker.check_model(str(graph.path), full_check=True)
        assert graph.scheme == "f32"


@pytest.mark.parametrize("name", ("vision", "decoder"))
def test_initializers_are_checkpoint_keys(graphs: dict[str, Graph], name: str) -> None:
    prefixes = {"vision": ("vpm.", "resampler."), "decoder": ("llm.",)}[name]
    state = tiny_model().state_dict()
    wanted = {k: list(v.shape) for k, v in state.items() if k.startswith(prefixes) and "embed_tokens" not in k}
    for packed in [k for k in wanted if "in_proj" in k]:  # each third is an initializer of its own
        rows, *rest = wanted.pop(packed)
        wanted |= {f"{packed}.{third}": [rows // 3, *rest] for third in "qkv"}
    found = {t.name: list(t.dims) for t in proto(graphs[name]).graph.initializer if not t.name.startswith("const_")}
    assert found == wanted


def test_inputs_and_outputs_stand_in_the_agreed_order(graphs: dict[str, Graph]) -> None:
    vision, decoder = (proto(graphs[name]).graph for name in ("vision", "decoder"))
    assert [v.name for v in vision.input] == ["patches", "position_ids", "attention_bias", "key_bias", "key_pos_embed"]
    assert [(v.name, dims(v)) for v in vision.output] == [("image_embeds", ["slices", 3, 128])]
    past = ["past_key.0", "past_value.0", "past_key.1", "past_value.1"]
    assert [v.name for v in decoder.input] == ["inputs_embeds", "position_ids", "logit_positions", *past]
    assert [v.name for v in decoder.output] == ["logits", "key.0", "value.0", "key.1", "value.1"]
    assert dims(decoder.input[3]) == ["past", "batch", 2, 32]
    assert dims(decoder.output[0]) == ["batch", "rows", 50]
    assert dims(decoder.output[1]) == ["tokens", "batch", 2, 32]


@pytest.mark.parametrize("name", ("vision", "decoder"))
def test_npus_find_nothing_they_reject(graphs: dict[str, Graph], name: str) -> None:
    """No control flow, sequences, data-dependent shapes, random numbers; no tensor of more than 5 dimensions."""
    model = onnx.helper.make_model(inlined(graphs[name]), opset_imports=[onnx.helper.make_opsetid("", OPSET)])
    graph = model.graph
    allowed = {
        "Add", "Cast", "Concat", "Cos", "Div", "Expand", "Gather", "Gelu", "GreaterOrEqual", "LayerNormalization", "MatMul",
        "Mul", "Neg", "Pow", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt",
        "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
    }  # fmt: skip
    assert {n.op_type for n in graph.node} <= allowed and {n.domain for n in graph.node} == {""}
    inferred = onnx.shape_inference.infer_shapes(model)
    assert max(len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info) <= 5


def test_norms_are_operators_or_the_form_optimizers_know(graphs: dict[str, Graph]) -> None:
    vision = Counter(n.op_type for n in proto(graphs["vision"]).graph.node)
    assert vision["LayerNormalization"] == 2 + 1 + 3 and vision["Gelu"] == 1
    decoder = inlined(graphs["decoder"])
    roots = {n.output[0] for n in decoder.node if n.op_type == "Sqrt"}
    divided = [n for n in decoder.node if n.op_type == "Div" and n.input[1] in roots]
    assert len(divided) == 2 * 2 + 1


def test_cache_is_never_concatenated_nor_repeated(graphs: dict[str, Graph]) -> None:
    """Each past tensor is read by one Transpose (and the first by Shape), which engines fuse into the product."""
    decoder = inlined(graphs["decoder"])
    for pair in graphs["decoder"].spec.states:
        readers = Counter(n.op_type for n in decoder.node if pair.input in n.input)
        assert readers["Transpose"] == 1 and readers.keys() <= {"Transpose", "Shape"}


def test_norms_and_attention_are_calls(graphs: dict[str, Graph]) -> None:
    calls = {name: Counter(n.op_type for n in proto(g).graph.node if n.domain == "lensc") for name, g in graphs.items()}
    assert calls == {"vision": {"Attention": 2}, "decoder": {"RMSNorm": 5, "CausalAttention": 2}}
    definitions = {f.name for g in graphs.values() for f in proto(g).functions}
    assert definitions == {"Attention", "RMSNorm", "CausalAttention"}


def test_what_all_layers_compute_alike_is_computed_once(graphs: dict[str, Graph]) -> None:
    kinds = Counter(n.op_type for n in inlined(graphs["decoder"]).node)
    assert kinds["Cos"] == kinds["Sin"] == kinds["Where"] == kinds["Tile"] == 1


def test_rotary_frequencies_are_those_of_the_reference(graphs: dict[str, Graph]) -> None:
    """Bit for bit: an ulp is a different angle at position 8000."""
    model = onnx.load(str(graphs["decoder"].path))
    constants = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.startswith("const_")]
    exponents = torch.arange(0, 32, 2, dtype=torch.float32) / 32
    expected = (1.0 / 10000.0**exponents).numpy()
    assert any(c.size == 16 and c.dtype == np.float32 and np.array_equal(c.ravel(), expected) for c in constants)


def test_specs_of_the_graphs_hold_the_whole_context(graphs: dict[str, Graph]) -> None:
    decoder, vision = graphs["decoder"].spec, graphs["vision"].spec
    assert decoder.dims["past"].max >= 255 and decoder.dims["tokens"].max == 256 and decoder.dims["past"].min == 0
    assert vision.dims["slices"].max >= 10 and vision.dims["patches"].min == 1
    assert [(p.input, p.output, p.axis) for p in decoder.states][:2] == [
        ("past_key.0", "key.0", 0),
        ("past_value.0", "value.0", 0),
    ]
    modules = graph_modules(tiny_model())
    assert {name: spec for name, (_, spec) in modules.items()} == {name: g.spec for name, g in graphs.items()}
