"""Calibration block by block: the values are those of the model in memory, nothing is lost, nothing is too large."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'lensc[export]'")
import torch
from torch import Tensor, nn

from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import GraphError, InputError, MemoryLimitError
from lensc.bench import checkpoint as published
from lensc.export.calibration import CalibrationSet, prepare
from lensc.export.checkpoint import Checkpoint
from lensc.export.memory import Limit
from lensc.export.models.config import ModelConfig
from lensc.export.models.linears import linear_rows, linear_shapes, shared_input
from lensc.export.models.minicpmv import MiniCPMV
from lensc.export.models.streamed import StreamedModel
from lensc.export.quantize import calibrate as module
from lensc.export.quantize.calibrate import calibrate, footprint
from lensc.export.quantize.calibrated import Calibrated, block_path
from lensc.export.quantize.gptq import Hessian, quantize_gptq
from lensc.export.quantize.recipe import EMBEDDING, Recipe
from lensc.export.quantize.weights import QuantizedWeight, WeightFormat, dequantize, quantize_rtn
from lensc.export.question_folder import Item
from lensc.export.shards import TensorRecord
from lensc.runtime.picture import vision_feeds
from lensc.runtime.prompt import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
RECIPE = Recipe(
    "r",
    (
        ("vpm.encoder.layers.1.*", "w3-g32-asym"),
        ("*.in_proj_weight.k", "w4-g128"),
        ("resampler.proj", "w4-g64"),
        ("vpm.*", "w8"),
        ("resampler.*", "w8"),
        ("*.v_proj.weight", "w8-g64"),
        (EMBEDDING, "w8"),
        ("llm.*", "w4-g64"),
    ),
    method="gptq",
)
Q0, DOWN0, HEAD = "llm.model.layers.0.self_attn.q_proj.weight", "llm.model.layers.0.mlp.down_proj.weight", "llm.lm_head.weight"  # fmt: skip


class Case:
    """The golden checkpoint with slices of 112 pixels, two pictures and a text, and what all of it is quantized to."""

    def __init__(self) -> None:
        self.checkpoint = Checkpoint(GOLDEN)
        spec = self.checkpoint.model_spec()
        self.spec: ModelSpec = dataclasses.replace(
            spec, picture=dataclasses.replace(spec.picture, scale_resolution=112)
        )
        self.tokenizer = Tokenizer.from_file(self.checkpoint.tokenizer)
        generator = np.random.default_rng(0)
        pictures = [generator.integers(0, 256, (*size, 3), np.uint8) for size in ((90, 120), (100, 210))]
        items = [
            Item("Which?", "the first, of course", (pictures[0],)),
            Item("Which?", "a longer answer about the second one", (pictures[1],)),
            Item("Say something.", "A few words without any picture at all."),
        ]
        self.data: CalibrationSet = prepare("test", items, self.spec, self.tokenizer)
        self.shapes = linear_shapes(self.checkpoint.tensors)
        self.formats: Mapping[str, WeightFormat] = RECIPE.formats([*self.shapes, EMBEDDING])

    def run(self, folder: Path, key: str = "key", limit: Limit | None = None, **more: Any) -> list[Path]:
        formats = more.pop("formats", self.formats)
        config, data = self.checkpoint.config, more.pop("data", self.data)
        record, files = calibrate(
            self.checkpoint, config, self.spec, data, formats, folder, key, limit or Limit(), **more
        )
        assert (record.pictures, record.slices, record.tokens) == (2, data.slices, data.tokens)
        return files


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("calibrated")
    files = case.run(made)
    assert sorted(files) == sorted(made.iterdir())
    return made


def stored(folder: Path, case: Case, name: str) -> QuantizedWeight:
    """The values of a weight; `plain` are rounded where nothing is stored."""
    plain = {
        rows.name: rows.weight for n in case.checkpoint.tensors for rows in linear_rows(n, case.checkpoint.tensor(n))
    }
    return Calibrated(folder)(name, plain[name].float(), case.formats[name], 0)


# --- the values -----------------------------------------------------------------------------------------------------


class InMemory:
    """The whole model in memory, with the weights of `folder` in all blocks that come before `until`."""

    def __init__(self, case: Case, folder: Path, until: str) -> None:
        self.case = case
        self.model: MiniCPMV = case.checkpoint.load_model()
        names = [n for n, _ in self.model.named_parameters()]
        order = [n for n in names if not n.startswith("llm.")] + [n for n in names if n.startswith("llm.")]
        stop = next((i for i, n in enumerate(order) if n.startswith(until)), len(order))
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name in order[:stop]:
                for rows in linear_rows(name, parameters[name]):
                    if rows.name in case.formats:
                        rows.weight.copy_(dequantize(stored(folder, case, rows.name)))

    def seen(self, module: nn.Module, position: int = 0, output: bool = False) -> list[Tensor]:
        """What goes into (or out of) `module` while all samples run, at the positions of the answers for lm_head."""
        found: list[Tensor] = []

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[position].flatten(0, -2))

        def after(_: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
            found.append(result.flatten(0, -2))

        handle = module.register_forward_hook(after) if output else module.register_forward_pre_hook(before)
        try:
            with torch.no_grad():
                self._run()
        finally:
            handle.remove()
        return found

    def _run(self) -> None:
        case, encoder = self.case, self.model.vision_encoder()
        table = self.model.llm.model.embed_tokens.weight
        table = dequantize(quantize_rtn(table, WeightFormat(8), search=False))
        for sample in case.data.samples:
            x = table[torch.from_numpy(sample.ids)]
            if sample.slices:
                (batch,) = vision_feeds(sample.slices, case.spec.picture, case.spec.decoder.hidden_size)
                feeds = [torch.from_numpy(array) for array in batch.feeds.values()]
                for i, (start, stop) in enumerate(sample.image_bounds.tolist()):
                    x[start:stop] = encoder(*(array[i : i + 1] for array in feeds))[0]
            tokens = torch.arange(len(sample.ids))
            self.model.llm(x[None], tokens, tokens[sample.prompt_tokens - 1 :])


def part(model: MiniCPMV, path: str) -> nn.Module:
    found = model.get_submodule(path)
    assert isinstance(found, nn.Module)
    return found


@pytest.mark.parametrize(
    ("name", "path", "position"),
    (
        ("vpm.encoder.layers.1.self_attn.k_proj.weight", "vpm.encoder.layers.1.self_attn.k_proj", 0),
        ("resampler.attn.in_proj_weight.k", "resampler.attn", 1),
        ("llm.model.layers.0.mlp.up_proj.weight", "llm.model.layers.0.mlp.up_proj", 0),
        ("llm.model.layers.1.mlp.down_proj.weight", "llm.model.layers.1.mlp.down_proj", 0),
        (HEAD, "llm.lm_head", 0),
    ),
)
def test_values_are_those_of_gptq_on_the_model_in_memory(
    name: str, path: str, position: int, case: Case, folder: Path
) -> None:
    until = next(block for block in ("vpm.encoder.layers.1", "resampler", "llm.model.layers.0", "llm.model.layers.1", "llm.lm_head") if name.startswith(block))  # fmt: skip
    memory = InMemory(case, folder, until)
    assert_same_values(case, folder, name, memory.seen(part(memory.model, path), position), memory.model)


def test_the_turned_weight_of_the_resampler(case: Case, folder: Path) -> None:
    memory = InMemory(case, folder, "resampler")
    assert_same_values(
        case, folder, "resampler.proj", memory.seen(memory.model.resampler.ln_post, output=True), memory.model
    )


def assert_same_values(case: Case, folder: Path, name: str, seen: list[Tensor], model: MiniCPMV) -> None:
    hessian = Hessian(case.shapes[name][1])
    for x in seen:
        hessian.add(x)
    weight = {rows.name: rows.weight for n, p in model.named_parameters() for rows in linear_rows(n, p)}[name]
    expected, got = quantize_gptq(weight.contiguous(), hessian, case.formats[name]), stored(folder, case, name)
    # sums in another order: a value in a thousand may be rounded to the other side, and moves those after it
    assert float((expected.values != got.values).float().mean()) < 0.01
    torch.testing.assert_close(got.scales, expected.scales, rtol=1e-3, atol=0)
    assert (got.zero_points is None) == (expected.zero_points is None)
    plain = quantize_rtn(weight.contiguous(), case.formats[name])
    assert float((plain.values != got.values).float().mean()) > 0.05


def test_eight_bits_are_rounded_to_nearest(case: Case, folder: Path) -> None:
    calibrated = Calibrated(folder)
    for name in ("vpm.encoder.layers.0.mlp.fc1.weight", "llm.model.layers.0.self_attn.v_proj.weight"):
        weight, format = case.checkpoint.tensor(name).float(), case.formats[name]
        whole, rows = calibrated(name, weight, format, 0), calibrated(name, weight[3:9], format, 3)
        assert torch.equal(whole.values, quantize_rtn(weight, format).values)
        assert torch.equal(whole.values[3:9], rows.values) and torch.equal(whole.scales[3:9], rows.scales)


def test_all_linears_are_there_and_other_weights_are_not(case: Case, folder: Path) -> None:
    calibrated = Calibrated(folder)
    assert set(case.shapes) == set(case.formats) - {EMBEDDING}
    assert set(calibrated._pieces) == {n for n, f in case.formats.items() if f.bits < 8}
    assert "vpm.embeddings.patch_embedding.weight" not in case.shapes


def test_logits_are_nearer_to_the_float_model_than_with_rounding(case: Case, folder: Path) -> None:
    formats = {n: f for n, f in case.formats.items() if n.startswith("llm.") and n != EMBEDDING}

    def logits(change: Callable[[str, Tensor], Tensor] | None) -> Tensor:
        memory = InMemory(case, folder, "llm.")
        with torch.no_grad():
            for name, parameter in memory.model.named_parameters():
                if change is not None and name in formats:
                    parameter.copy_(change(name, parameter))
        return torch.cat(memory.seen(memory.model.llm.lm_head, output=True))

    exact = logits(None)
    rounded = logits(lambda name, weight: dequantize(quantize_rtn(weight, formats[name])))
    calibrated = logits(lambda name, weight: dequantize(stored(folder, case, name)))
    assert float((calibrated - exact).norm()) < 0.8 * float((rounded - exact).norm())


def test_inputs_are_shared_by_name() -> None:
    layer = "llm.model.layers.3"
    one = {shared_input(f"{layer}.self_attn.{p}_proj.weight") for p in "qkv"}
    two = {shared_input(f"{layer}.mlp.{p}_proj.weight") for p in ("gate", "up")}
    alone = (f"{layer}.self_attn.o_proj.weight", f"{layer}.mlp.down_proj.weight", "resampler.attn.in_proj_weight.q",
             "resampler.attn.in_proj_weight.k", "resampler.kv_proj.weight", "vpm.encoder.layers.0.self_attn.out_proj.weight")  # fmt: skip
    assert len(one) == len(two) == 1 and len(one | two) == 2 and [shared_input(name) for name in alone] == [*alone]


# --- interrupted ----------------------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    pass


def test_an_interrupted_calibration_goes_on_at_the_first_missing_block(
    case: Case, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized: list[tuple[int, ...]] = []

    def counted(weight: Tensor, *rest: Any) -> QuantizedWeight:
        quantized.append(tuple(weight.shape))
        return quantize_gptq(weight, *rest)

    monkeypatch.setattr(module, "quantize_gptq", counted)

    def stop_after(last: str) -> Callable[[str], None]:
        def after(block: str) -> None:
            if block == last:
                raise Stopped

        return after

    done: list[set[str]] = []
    for last in ("vpm.encoder.layers.1", "llm.model.layers.0"):
        with pytest.raises(Stopped):
            case.run(tmp_path, after_block=stop_after(last))
        done.append({path.name for path in tmp_path.iterdir()})
    assert len(done[0]) == 1 and "llm.model.layers.0.calibrated.safetensors" in done[1] and done[0] < done[1]
    # a write that was cut off
    (tmp_path / "llm.model.layers.1.calibrated.safetensors.partial").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name in done[1]}
    quantized.clear()
    case.run(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(quantized) == 7  # one layer without v_proj, and lm_head
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    quantized.clear()
    case.run(tmp_path)
    assert quantized == []


def test_another_key_starts_over_and_a_damaged_block_is_made_again(case: Case, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = block_path(tmp_path, "llm.model.layers.1")
    damaged.write_bytes(damaged.read_bytes()[:-10])
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    case.run(tmp_path)
    changed = {path for path, time in kept.items() if path.stat().st_mtime_ns != time}
    assert changed == {damaged} and damaged.read_bytes() == block_path(folder, "llm.model.layers.1").read_bytes()
    (tmp_path / "llm.lm_head-7-9.calibrated.safetensors").write_bytes(damaged.read_bytes())
    case.run(tmp_path, key="other")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    assert all(path.stat().st_mtime_ns != time for path, time in kept.items())


# --- what is read back ----------------------------------------------------------------------------------------------


def test_rows_come_from_any_pieces(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = case.checkpoint.config.hidden_size
    assert StreamedModel.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(StreamedModel.__init__.__kwdefaults__, "head_bytes", 500 * 4 * hidden)
    formats = {HEAD: WeightFormat(4, 64, symmetric=False)}
    files = case.run(tmp_path, formats=formats)
    assert [path.name.split(".calibrated")[0] for path in files] == [
        "llm.lm_head-0-500", "llm.lm_head-500-1000", "llm.lm_head-1000-1280"
    ]  # fmt: skip
    calibrated = Calibrated(tmp_path)
    whole = calibrated(HEAD, torch.empty(1280, hidden), formats[HEAD], 0)
    assert whole.shape == (1280, hidden) and whole.zero_points is not None
    for start, stop in ((0, 1), (499, 501), (480, 1200), (1279, 1280), (1000, 1280)):
        rows = calibrated(HEAD, torch.empty(stop - start, hidden), formats[HEAD], start)
        assert torch.equal(rows.values, whole.values[start:stop]) and torch.equal(rows.scales, whole.scales[start:stop])
        assert rows.zero_points is not None and torch.equal(rows.zero_points, whole.zero_points[start:stop])


def test_what_is_not_there_is_an_error(case: Case, folder: Path) -> None:
    calibrated, rows = Calibrated(folder), torch.empty(4, 256)
    with pytest.raises(
        GraphError, match=r"weight llm\.other: rows 0 to 4 in w4-g64, 256 inputs, are not in .*none of them"
    ):
        calibrated("llm.other", rows, WeightFormat(4, 64), 0)
    with pytest.raises(GraphError, match=rf"weight {Q0}: rows 0 to 4 in w4-g32, .*rows 0 to 256 in w4-g64, 256 inputs"):
        calibrated(Q0, rows, WeightFormat(4, 32), 0)
    with pytest.raises(GraphError, match="rows 254 to 258"):
        calibrated(Q0, rows, WeightFormat(4, 64), 254)
    with pytest.raises(GraphError, match="rows 0 to 4 in w4-g64, 255 inputs"):
        calibrated(Q0, rows[:, 1:], WeightFormat(4, 64), 0)


def test_a_damaged_file_is_an_error(folder: Path, tmp_path: Path) -> None:
    path = block_path(tmp_path, "llm.model.layers.0")
    path.write_bytes(block_path(folder, "llm.model.layers.0").read_bytes()[:1000])
    with pytest.raises(GraphError, match=r"llm\.model\.layers\.0\.calibrated\.safetensors: not a file of calibrated"):
        Calibrated(tmp_path)


# --- refused --------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_known_before_the_work(case: Case, tmp_path: Path) -> None:
    with pytest.raises(
        MemoryLimitError, match=r"calibrate on \d+ slices and \d+ tokens: needs about .* --max-memory is 90 MiB"
    ):
        case.run(tmp_path / "x", limit=Limit(90 << 20))
    assert not (tmp_path / "x").exists()


def test_a_linear_that_no_data_reach_is_an_error(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module.decoder_feeds
    words = dataclasses.replace(case.data, samples=case.data.samples[2:])
    with pytest.raises(
        InputError, match="the calibration data have no picture, but the vision graph is to be calibrated"
    ):
        case.run(tmp_path, data=words)
    # no answer, and no logits asked for: lm_head sees nothing
    monkeypatch.setattr(
        module, "decoder_feeds", lambda *given: [f | {"logit_positions": np.arange(0)} for f in made(*given)]
    )
    with pytest.raises(InputError, match=rf"the calibration data never reach {HEAD}; calibrate"):
        case.run(tmp_path)


class Records:
    """The tensors of the published model, without values."""

    def __init__(self) -> None:
        size = published.SIZES["full"]
        self.config = ModelConfig.from_json(published.config_json(size))
        self.sha256 = "0" * 64
        self.tensors = {n: TensorRecord(n, Path("none"), "F16", s, 0) for n, s in published.shapes(size).items()}

    def tensor(self, name: str) -> Tensor:
        raise AssertionError(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        raise AssertionError(name)


def test_the_published_model_fits_four_gibibytes(case: Case) -> None:
    weights = Records()
    spec = case.spec
    decoder = dataclasses.replace(
        spec.decoder, num_layers=32, hidden_size=4096, vocab_size=128256, num_kv_heads=8, head_dim=128
    )
    # 71 slices of 1024 patches and 14,500 tokens: the built-in set at full size
    sample = dataclasses.replace(case.data.samples[0], ids=np.zeros(14500 // 24, np.int64))
    prompts = module.decoder_feeds([sample] * 24, dataclasses.replace(spec, decoder=decoder))
    patches = np.broadcast_to(np.float32(0), (1, 1024, 588))
    formats = dict.fromkeys(linear_shapes(weights.tensors), WeightFormat(4, 128))
    model = StreamedModel(weights, weights.config)
    needed = footprint(
        model, [{"patches": patches}] * 71, prompts, [["logits"]] * 24, formats, linear_shapes(weights.tensors)
    )
    # the Hessian of down_proj and its factor, and a layer in float32
    assert 2 * 4 * 14336**2 + 4 * 218_112_000 < needed < (4 << 30) - (400 << 20)
