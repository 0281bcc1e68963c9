"""Quantized bundles: a recipe from the command line to answers, in memory and streamed, continued after an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'lensc[export]'")
import torch
from safetensors.torch import load_file, save_file

import lensc
from lensc.backends._multiples import multiples
from lensc.backends.base import Target
from lensc.backends.bundle import Manifest, load_manifest
from lensc.backends.errors import CheckpointError, GraphError, MemoryLimitError, UnsupportedError, UsageError
from lensc.export import export_stages, writer
from lensc.export.build import build, export_checkpoint
from lensc.export.checkpoint import Checkpoint
from lensc.export.portable import PortableWeights
from lensc.export.quantize.recipe import read_recipe
from lensc.export.quantize.weights import QuantizedWeight, WeightFormat, dequantize, quantize_rtn
from lensc.export.source import Source
from lensc.export.stages import StageEvent
from lensc.export.writer import Quantize
from lensc.runtime.embedding import open_table

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
ORT = Target("onnxruntime", "cpu")
RECIPE = """
format = 1
name = "mine"
[activations]
vision = 8
decoder = 8
[weights]
"vpm.*" = "w8"
"resampler.*" = "w8"
"*.down_proj.weight" = "w8-g32-asym"
"*.up_proj.weight" = "w2-g32"
"llm.model.layers.*" = "w4-g32-s4"
"llm.lm_head.weight" = "w4-g32-asym"
"llm.model.embed_tokens.weight" = "w8"
"""
DOWN = "llm.model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with one layer in each tower and slices of 112 pixels: quick to trace and to verify."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    shutil.copytree(GOLDEN, folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = 1
    config["slice_config"]["scale_resolution"] = 112
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**preprocessor, "scale_resolution": 112}))
    weights = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in weights.items() if ".layers." not in n or ".layers.0." in n}, folder / "model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "mine.toml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def graphs(checkpoint: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graphs") / "g"
    export_checkpoint(checkpoint, out, scheme=recipe)
    return out


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    build(checkpoint, [ORT], out, scheme=recipe)
    return out


def expected(name: str, weight: torch.Tensor, recipe: str) -> torch.Tensor:
    """What the recipe makes of a linear's weight [outputs, inputs]."""
    format = read_recipe(Path(recipe)).format_of(name)
    return weight.float() if format is None else dequantize(quantize_rtn(weight.float(), format))


def test_the_graphs_hold_what_the_recipe_makes_of_every_weight(graphs: Path, checkpoint: Path, recipe: str) -> None:
    source = Checkpoint(checkpoint)
    held = PortableWeights({name: graphs / name / "model.onnx" for name in ("vision", "decoder")}, source)
    lookups = ("embed_tokens.weight", "position_embedding.weight", "resampler.query")
    for name, record in source.tensors.items():
        stored = source.tensor(name).float()
        if name == "resampler.proj":
            wanted = expected(name, stored.T.contiguous(), recipe).T
        elif name.endswith("in_proj_weight"):
            thirds = zip("qkv", stored.chunk(3), strict=True)
            wanted = torch.cat([expected(f"{name}.{letter}", part, recipe) for letter, part in thirds])
        else:
            wanted = stored if stored.ndim != 2 or name.endswith(lookups) else expected(name, stored, recipe)
        assert torch.equal(held.tensor(name), wanted), name
        middle = record.shape[0] // 2
        assert torch.equal(held.rows(name, middle, middle + 1), wanted[middle : middle + 1]), name


def test_the_manifest_says_what_was_done(bundle: Path, recipe: str) -> None:
    manifest = load_manifest(bundle, verify=True)
    assert {a.graph: a.scheme for a in manifest.artifacts} == {"vision": "w8a8", "decoder": "w4a8-g32-s4-mixed"}
    assert manifest.provenance.scheme == "mine" and manifest.metadata["recipe"] == read_recipe(Path(recipe)).to_toml()
    assert manifest.tables.keys() == {"embed_tokens", "embed_tokens.scale"}
    cost = [r for r in manifest.parity if r.tolerance.startswith("none")]
    judged = [r for r in manifest.parity if r not in cost]
    assert len(cost) == 2 and {r.against for r in judged} == {"torch float32, quantized weights"}
    assert {r.target for r in judged} == {"onnx", "onnxruntime:cpu"}
    assert all(s.peak_bytes > 1 << 20 and s.seconds >= 0 for s in manifest.stages)
    assert [s.name for s in manifest.stages][-1] == "verify onnxruntime:cpu"


def test_scales_are_multiples_where_the_recipe_says_so(graphs: Path, recipe: str) -> None:
    """In the bytes of the portable graph, which engines read."""
    import onnx

    model = onnx.load(str(graphs / "decoder" / "model.onnx"))
    scales = {t.name.removesuffix(".scale"): t for t in model.graph.initializer if t.name.endswith(".scale")}
    formats = read_recipe(Path(recipe)).formats(scales)
    wanted = {name for name, format in formats.items() if format.scale_bits is not None}
    found = {n for n, t in scales.items() if n in formats and multiples(onnx.numpy_helper.to_array(t)) is not None}
    assert found == wanted and len(wanted) == 5  # all of the layer but the up and down projections


def test_query_key_and_value_are_one_product(bundle: Path, graphs: Path) -> None:
    """Their values, and their scales, follow each other in the portable graph's file, which nobody writes again."""
    import onnx

    artifact = next(a for a in load_manifest(bundle).artifacts if a.graph == "decoder")
    model = onnx.load(str(bundle / artifact.files[0].path), load_external_data=False)
    producers = {output: node for node in model.graph.node for output in node.output}
    (attention,) = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert attention.input[0] and list(attention.input[1:3]) == ["", ""]
    product = producers[attention.input[0]]
    sizes = {attribute.name: attribute.i for attribute in attention.attribute}
    rows = {attribute.name: attribute.i for attribute in product.attribute}["N"]
    width = rows // (sizes["num_heads"] + 2 * sizes["kv_num_heads"])
    assert product.op_type == "MatMulNBits" and rows % (sizes["num_heads"] + 2 * sizes["kv_num_heads"]) == 0
    past = next(value for value in model.graph.input if value.name == attention.input[3])
    assert past.type.tensor_type.shape.dim[3].dim_value == width
    portable = onnx.load(str(graphs / "decoder" / "model.onnx"), load_external_data=False)
    entries = {
        t.name.removeprefix("llm.model.layers.0.self_attn."): {e.key: e.value for e in t.external_data}
        for t in portable.graph.initializer
    }
    for suffix in ("", ".scale", ".zero_point"):
        q, k, v = (entries[f"{letter}_proj.weight{suffix}"] for letter in "qkv")
        assert int(q["offset"]) + int(q["length"]) == int(k["offset"])
        assert int(k["offset"]) + int(k["length"]) == int(v["offset"])


def test_a_quantized_bundle_answers(bundle: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (90, 200, 3), np.uint8)
    from PIL import Image

    with lensc.load(bundle) as vlm:
        first = vlm.generate("Read.", [Image.fromarray(picture)], max_new_tokens=8)
        assert len(first.token_ids) == 8 and first.metrics.kv_cache_bytes > 0
        assert vlm.generate("Read.", [Image.fromarray(picture)], max_new_tokens=8).token_ids == first.token_ids
        assert vlm.generate("Read.", num_beams=3, max_new_tokens=6).token_ids


def test_streamed_and_in_memory_make_the_same_bundle(
    checkpoint: Path, recipe: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is read a block at a time; what is shipped has the same bytes, and was judged all the same."""
    monkeypatch.setattr(Source, "is_streamed", True)
    monkeypatch.setattr(Source, "reference", property(lambda self: pytest.fail("was loaded")))
    manifest = build(checkpoint, [ORT], tmp_path / "b", scheme=recipe)
    before = load_manifest(bundle)

    def hashes(manifest: Manifest) -> dict[str, str]:
        return {f.path: f.sha256 for f in manifest.files if "probe" not in f.path}

    assert hashes(manifest) == hashes(before)
    for ours, theirs in zip(manifest.probes, before.probes, strict=True):
        arrays = [np.load(folder / record.file) for folder, record in ((tmp_path / "b", ours), (bundle, theirs))]
        for name in arrays[0].files:
            np.testing.assert_allclose(arrays[0][name], arrays[1][name], rtol=1e-5, atol=1e-5)
    assert [r.tolerance.startswith("none") for r in manifest.parity] == [False, False, True, True]


def writing_with(quantize: Quantize) -> Any:
    """`write_graph` with another `quantize` than it is given."""

    def write(model: Any, path: Path, parameters: Any, rows: Any, formats: Any, _: Quantize, **more: Any) -> str:
        return writer.write_graph(model, path, parameters, rows, formats, quantize, **more)

    return write


def test_a_streamed_build_notices_rows_that_are_not_the_checkpoints(
    checkpoint: Path, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(name: str, rows: torch.Tensor, format: WeightFormat, start: int) -> QuantizedWeight:
        return quantize_rtn(rows * 1.5 if name == DOWN else rows, format)

    monkeypatch.setattr(Source, "is_streamed", True)
    monkeypatch.setattr(export_stages, "write_graph", writing_with(wrong))
    with pytest.raises(GraphError, match=rf"{DOWN}: row 0 of the graph is not that of the checkpoint"):
        export_checkpoint(checkpoint, tmp_path / "g", scheme=recipe)


def test_an_interrupted_quantization_goes_on_at_the_next_weight(
    checkpoint: Path, recipe: str, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized: list[str] = []
    stop = True

    def counted(name: str, rows: torch.Tensor, format: WeightFormat, start: int) -> QuantizedWeight:
        if stop and name == DOWN:
            raise KeyboardInterrupt
        quantized.append(name)
        return quantize_rtn(rows, format)

    monkeypatch.setattr(export_stages, "write_graph", writing_with(counted))
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(checkpoint, tmp_path / "g", scheme=recipe)
    before, stop = set(quantized), False
    quantized.clear()
    events: list[StageEvent] = []
    export_checkpoint(checkpoint, tmp_path / "g", scheme=recipe, report=events.append)
    assert DOWN in quantized and before and not before & set(quantized)
    assert "export vision" in [e.stage for e in events if e.state == "kept"]
    for name in ("vision", "decoder"):
        for file in ("model.onnx", "model.onnx.data"):
            assert (tmp_path / "g" / name / file).read_bytes() == (graphs / name / file).read_bytes()


def test_more_memory_than_allowed_ends_the_build(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MemoryLimitError, match=r"the build: needs about .* of memory, --max-memory is 50 MiB; raise it"
    ):
        export_checkpoint(checkpoint, tmp_path / "g", scheme="int8", max_memory=50 << 20)
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("scheme", ("int3", "no/such.toml"))
def test_an_unknown_scheme_is_refused_before_any_work(checkpoint: Path, scheme: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        export_checkpoint(checkpoint, tmp_path / "g", scheme=scheme)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_the_engine_cannot_run_says_the_nearest(checkpoint: Path, tmp_path: Path) -> None:
    """Before any work, and for every format in the recipe, not the most frequent one of a graph only."""
    path = tmp_path / "r.toml"
    head = '"vpm.encoder.layers.0.self_attn.q_proj.weight"'
    for text in (f'{head} = "w8"\n"vpm.*" = "w8-g32"', f'{head} = "w4-g24"\n"vpm.*" = "w8-g32"', '"vpm.*" = "w8"'):
        path.write_text(f"format = 1\n[weights]\n{text}\n")
        with pytest.raises(UnsupportedError, match=r"vision for onnxruntime:cpu: scheme w.a32.*the nearest are groups"):
            build(checkpoint, [ORT], tmp_path / "b", scheme=str(path))
        assert [entry.name for entry in tmp_path.iterdir()] == ["r.toml"]
    path.write_text('format = 1\n[weights]\n"llm.model.layers.*" = "w4-g48"\n')
    with pytest.raises(
        UnsupportedError, match=r"needs groups that divide the inputs, 48 does not divide .*nearest is w"
    ):
        build(checkpoint, [Target("openvino", "cpu")], tmp_path / "b", scheme=str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.toml"]


def test_two_bits_that_the_engine_computes_slowly_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('format = 1\n[activations]\ndecoder = 8\n[weights]\n"llm.model.*_proj.weight" = "w2-g16"\n')
    with pytest.raises(UnsupportedError, match=r"2 bits in groups of 16 have no int8 product.*nearest is w2a8-g64"):
        build(checkpoint, [ORT], tmp_path / "b", scheme=str(path))


def eight_bit_keys(folder: Path) -> str:
    path = folder / "r.toml"
    recipe = RECIPE.replace('"w2-g32"', '"w4-g32"')  # which OpenVINO reads, too
    path.write_text(recipe.replace("[weights]", "[kv_cache]\nbits = 8\n[weights]"))
    return str(path)


@pytest.mark.parametrize(
    ("engine", "option", "kept"),
    [("onnxruntime", "kv_cache", "int8, a scale per channel from the first tokens of a sequence"),
     ("openvino", "KV_CACHE_PRECISION", "u8")],
)  # fmt: skip
def test_eight_bit_keys_and_values(checkpoint: Path, engine: str, option: str, kept: str, tmp_path: Path) -> None:
    """An engine stores them so, and the manifest says within what."""
    pytest.importorskip(engine, reason=f"pip install 'lensc[{engine}]'")
    target = Target(engine, "cpu")
    manifest = build(checkpoint, [target], tmp_path / "b", scheme=eight_bit_keys(tmp_path))
    (artifact,) = [a for a in manifest.artifacts if a.graph == "decoder"]
    assert artifact.scheme == "w4a8-g32-s4-kv8-mixed" and artifact.options[option] == kept
    judged = [r for r in manifest.parity if r.target == str(target) and r.graph == "decoder"]
    assert (
        judged[0].tolerance.startswith("int8 products or KV cache, or activations of 16 bits: SQNR")
        and judged[0].sqnr_db > 20
    )
    with lensc.load(tmp_path / "b") as vlm:
        result = vlm.generate("Read.", max_new_tokens=8)
    # a byte for each value of 2 rows of 64, for a key and a value in one layer; openvino needs 8 more for a row's range
    assert result.metrics.kv_cache_bytes % (2 * 2 * (64 + 8 * (engine == "openvino"))) == 0


def test_eight_bit_keys_that_an_engine_does_not_have(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="keeps the KV cache in float32; the nearest is w4a8-g32-s4;"):
        build(checkpoint, [Target("reference", "cpu")], tmp_path / "b", scheme=eight_bit_keys(tmp_path))


def test_a_table_of_four_bits_is_what_the_decoder_is_fed(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    table = "llm.model.embed_tokens.weight"
    path.write_text(RECIPE.replace(f'"{table}" = "w8"', f'"{table}" = "w4-g64"'))
    manifest = export_checkpoint(checkpoint, tmp_path / "g", scheme=str(path))
    rows = open_table(tmp_path / "g", manifest.tables).gather(np.arange(1280))
    wanted = dequantize(quantize_rtn(Checkpoint(checkpoint).tensor(table).float(), WeightFormat(4, 64)))
    np.testing.assert_allclose(rows, wanted.numpy(), rtol=1e-6)
    assert sum(f.bytes for f in manifest.files if f.path in manifest.tables.values()) < 1280 * (128 + 16) + 1000
    path.write_text(RECIPE.replace(f'"{table}" = "w8"', f'"{table}" = "w4-g96"'))
    with pytest.raises(UsageError, match="w4-g96: its groups do not divide a row of 256"):
        export_checkpoint(checkpoint, tmp_path / "h", scheme=str(path))


def write_adapter(folder: Path, scale: float) -> Path:
    """A LoRA adapter of rank 2 on the layer's q_proj, in PEFT's format; `scale` 0 changes nothing."""
    generator = torch.Generator().manual_seed(0)
    key = "base_model.model.llm.model.layers.0.self_attn.q_proj"
    folder.mkdir()
    factors = {
        f"{key}.lora_A.weight": torch.randn(2, 256, generator=generator),
        f"{key}.lora_B.weight": torch.randn(256, 2, generator=generator) * scale,
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    config["target_modules"] = r"llm\..*q_proj"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_is_merged_while_weights_stream(checkpoint: Path, recipe: str, graphs: Path, tmp_path: Path) -> None:
    """Of all weights only the one it is for differs, and that is the merged one, rounded once."""
    adapter = write_adapter(tmp_path / "lora", 0.1)
    manifest = export_checkpoint(checkpoint, tmp_path / "g", scheme=recipe, adapter=adapter)
    assert manifest.metadata["adapter"].startswith("lora, sha256 ")
    assert manifest.provenance.checkpoint_sha256 != load_manifest(graphs).provenance.checkpoint_sha256
    source = Checkpoint(checkpoint)
    merged, plain = (
        PortableWeights({name: folder / name / "model.onnx" for name in ("vision", "decoder")}, source)
        for folder in (tmp_path / "g", graphs)
    )
    name = "llm.model.layers.0.self_attn.q_proj.weight"
    assert [n for n in source.tensors if not torch.equal(merged.tensor(n), plain.tensor(n))] == [name]
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"].double() for x in "AB")
    wanted = (source.tensor(name).double() + 4 / 2 * b @ a).float()
    assert torch.equal(merged.tensor(name), expected(name, wanted, recipe))


def test_an_adapter_that_is_none_is_refused_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        export_checkpoint(checkpoint, tmp_path / "g", adapter=tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []
