"""Searching a recipe: what a group costs is what the model shows, steps are the cheapest, the promise is measured."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'lensc[export]'")
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lensc.backends.base import Target
from lensc.backends.errors import MemoryLimitError, PictureError, UnsupportedError, UsageError
from lensc.export import calibration
from lensc.export import search as search_module
from lensc.export.calibration import CalibrationSet, Sample, prepare
from lensc.export.checkpoint import Checkpoint
from lensc.export.memory import resident_bytes
from lensc.export.models.linears import linear_rows, linear_shapes
from lensc.export.models.session import torch_sessions
from lensc.export.models.streamed import StreamedModel
from lensc.export.quantize.loss import Divergence, Loss, compare_logits, forced_logits, sum_up
from lensc.export.quantize.recipe import EMBEDDING, resolve
from lensc.export.quantize.search import _Judge, descent, recipe_after
from lensc.export.quantize.sensitivity import Cost, Group, find_groups, measure, pattern_of
from lensc.export.quantize.weights import WeightFormat, dequantize, quantize_rtn, quantize_table
from lensc.export.question_folder import Item
from lensc.export.ranges import works
from lensc.export.search import search_recipe
from lensc.export.source import Source
from lensc.export.stages import StageEvent
from lensc.runtime.embedding import EmbeddingTable
from lensc.runtime.prompt import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
ORT = Target("onnxruntime", "cpu")
DOWN = "llm.model.layers.0.mlp.down_proj.weight"
W8, W4 = WeightFormat(8, 64), WeightFormat(4, 64)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (7, 20, 50))
def test_the_divergence_is_that_of_the_distributions_in_whatever_pieces(size: int) -> None:
    ours = tensor(9, 50)
    theirs = ours + 0.1 * tensor(9, 50, seed=1)
    found = Divergence(9)
    for start in range(0, 50, size):
        found.add(ours[:, start : start + size], theirs[:, start : start + size], start)
    p, q = (logits.double().log_softmax(-1) for logits in (ours, theirs))
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-7)
    assert torch.equal(found.choices[0], ours.argmax(-1)) and torch.equal(found.choices[1], theirs.argmax(-1))
    same = Divergence(9)
    same.add(ours, ours)
    assert float(same.kl.max()) < 1e-12


def one_hot(*ids: int) -> Tensor:
    return 9.0 * torch.nn.functional.one_hot(torch.tensor(ids), 6).float()


def sample(*answer: int) -> Sample:
    return Sample((), np.array([0, 1, *answer]), np.empty((0, 2), np.int64), 2)


def test_an_answer_is_lost_where_the_float_model_has_it_and_the_other_has_not() -> None:
    """Of four answers one is kept, one lost at its end, one lost in the middle, one was never right; 5 ends an answer."""
    cases = [
        (sample(3, 4), one_hot(3, 4, 5), one_hot(3, 4, 5)),
        (sample(3), one_hot(3, 5), one_hot(3, 2)),
        (sample(2, 2), one_hot(2, 2, 5), one_hot(2, 1, 5)),
        (sample(4), one_hot(3, 5), one_hot(4, 5)),
        (sample(), one_hot(1), one_hot(2)),
    ]
    found = []
    for _, ours, theirs in cases:
        found.append(Divergence(len(ours)))
        found[-1].add(ours, theirs)
    loss = sum_up(found, [case[0] for case in cases], (5,))
    assert dataclasses.replace(loss, kl=0.0) == Loss(0.0, tokens=11, changed=4, answers=4, right=3, lost=2)
    assert loss.lost_percent == 50 and loss.changed_percent == pytest.approx(400 / 11) and loss.mean_kl > 1


# --- sensitivity ----------------------------------------------------------------------------------------------------


class Case:
    """The golden checkpoint with slices of 112 pixels, two pictures and a text."""

    def __init__(self, folder: Path = GOLDEN) -> None:
        self.checkpoint = Checkpoint(folder)
        spec = self.checkpoint.model_spec()
        self.spec = dataclasses.replace(spec, picture=dataclasses.replace(spec.picture, scale_resolution=112))
        self.tokenizer = Tokenizer.from_file(self.checkpoint.tokenizer)
        self.data = self.samples()

    def samples(self) -> CalibrationSet:
        generator = np.random.default_rng(0)
        pictures = [generator.integers(0, 256, (*size, 3), np.uint8) for size in ((90, 120), (100, 210))]
        items = [
            Item("Which?", "the first, of course", (pictures[0],)),
            Item("Which?", "the second one", (pictures[1],)),
        ]
        return prepare("test", [*items, Item("Say.", "A few words without any picture.")], self.spec, self.tokenizer)

    def groups(self, *patterns: str) -> list[Group]:
        shapes = linear_shapes(self.checkpoint.tensors)
        found = find_groups({**shapes, EMBEDDING: (1280, 256)}, lambda name: (W8, W4))
        return [group for group in found if not patterns or group.pattern in patterns]

    def costs(self, groups: list[Group], exact: bool = True, method: str = "rtn") -> dict[tuple[str, str], float]:
        model = StreamedModel(self.checkpoint, self.checkpoint.config)
        found = measure(
            model, self.checkpoint, self.spec, self.data.samples, groups, method=method, activations={}, exact=exact
        )
        return {(cost.pattern, str(cost.format)): cost.kl for cost in found}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


EACH = (
    "vpm.encoder.layers.0.self_attn.*",
    "resampler.*",
    EMBEDDING,
    "llm.model.layers.0.self_attn.[qkv]_proj.weight",
    "llm.model.layers.1.mlp.down_proj.weight",
    "llm.lm_head.weight",
)


def test_what_a_group_costs_is_the_divergence_of_the_model_that_has_it(case: Case) -> None:
    """Against the whole model in memory, each time with one group rounded."""

    def logits(group: Group | None) -> list[Any]:
        model = case.checkpoint.load_model()
        table = model.llm.model.embed_tokens.weight
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                for rows in linear_rows(name, parameter):
                    if group is not None and rows.name in group.names:
                        rows.weight.copy_(dequantize(quantize_rtn(rows.weight.contiguous(), W4)))
            if group is not None and group.names[0] == EMBEDDING:
                table.copy_(dequantize(quantize_table(table, W4)))
        return forced_logits(
            torch_sessions(model), EmbeddingTable(table.detach().numpy()), case.spec, case.data.samples
        )

    groups = case.groups(*EACH)
    assert len(groups) == len(EACH)
    found, reference = case.costs(groups), logits(None)
    for group in groups:
        wanted = compare_logits(reference, logits(group), case.data.samples, (0,)).mean_kl
        assert wanted > 1e-8 and found[group.pattern, "w4-g64"] == pytest.approx(wanted, rel=0.02), group.pattern
        assert found[group.pattern, "w8-g64"] < found[group.pattern, "w4-g64"] / 20


def test_the_proxy_ranks_as_the_logits_do(case: Case) -> None:
    groups = case.groups()
    exact, proxy = case.costs(groups), case.costs(groups, exact=False)
    assert exact.keys() == proxy.keys() and len(exact) == 2 * len(groups)
    keys = [key for key in exact if "layers" in key[0]]
    ranks = [np.argsort(np.argsort([costs[key] for key in keys])) for costs in (exact, proxy)]
    assert np.corrcoef(ranks[0], ranks[1])[0, 1] > 0.9
    assert all(proxy[key] == pytest.approx(exact[key], rel=1e-6) for key in exact if key[0] in EACH[2:3] + EACH[5:])


def test_calibrated_rounding_costs_less(case: Case) -> None:
    groups = case.groups("llm.model.layers.0.mlp.[gu]*_proj.weight", "llm.model.layers.1.self_attn.[qkv]_proj.weight")
    plain, calibrated = case.costs(groups), case.costs(groups, method="gptq")
    assert all(calibrated[group.pattern, "w4-g64"] < 0.7 * plain[group.pattern, "w4-g64"] for group in groups)


def test_every_linear_is_in_one_group_that_its_pattern_names(case: Case) -> None:
    shapes = linear_shapes(case.checkpoint.tensors)
    format = WeightFormat(8)
    groups = find_groups(shapes, lambda name: (format,))
    assert sorted(name for group in groups for name in group.names) == sorted(shapes)
    for group in groups:
        steps = descent([group], [Cost(group.pattern, format, zero())], shapes)
        recipe = recipe_after(steps, "r", "rtn")
        assert set(recipe.formats(shapes)) == set(group.names) and {pattern_of(n) for n in group.names} == {
            group.pattern
        }
    assert find_groups({DOWN: (64, 96)}, lambda name: (WeightFormat(4, 64),)) == []


# --- steps ----------------------------------------------------------------------------------------------------------


def zero(kl: float = 0.0) -> Loss:
    return Loss(kl, 1, 0, 0, 0, 0)


def test_steps_go_down_where_a_byte_costs_least() -> None:
    shapes = {"llm.a": (64, 64), "llm.b": (64, 64)}
    formats = (WeightFormat(8, 64), WeightFormat(4, 64))
    groups = [Group(name, (name,), formats) for name in shapes]
    costs = [Cost("llm.a", formats[0], zero(1e-6)), Cost("llm.a", formats[1], zero(1e-5)),
             Cost("llm.b", formats[0], zero(1e-4)), Cost("llm.b", formats[1], zero(1.1e-4))]  # fmt: skip
    steps = descent(groups, costs, shapes)
    # of b, eight bits are no step: four cost hardly more
    assert [(s.pattern, str(s.format)) for s in steps] == [
        ("llm.a", "w8-g64"),
        ("llm.a", "w4-g64"),
        ("llm.b", "w4-g64"),
    ]
    assert [s.kl for s in steps] == pytest.approx([1e-6, 9e-6, 1.1e-4])
    assert sum(s.saved_bytes for s in steps) == 2 * (4 * 64 * 64 - formats[1].bytes_for((64, 64)))


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with slices of 112 pixels, and channels in one layer that four bits cannot hold."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    shutil.copytree(GOLDEN, folder, copy_function=shutil.copyfile)
    for name in ("config.json", "preprocessor_config.json"):
        document = json.loads((folder / name).read_text())
        document.get("slice_config", document)["scale_resolution"] = 112
        (folder / name).write_text(json.dumps(document))
    weights = load_file(folder / "model.safetensors")
    weights[DOWN][:, ::32] *= 12
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures and a text are enough."""

    def items(spec: Any) -> Any:
        generator = np.random.default_rng(0)
        yield Item("Which?", "the first, of course", (generator.integers(0, 256, (90, 120, 3), np.uint8),))
        yield Item("Which?", "the second one", (generator.integers(0, 256, (100, 210, 3), np.uint8),))
        yield Item("Say.", "A few words without any picture, but more of them than before.")

    monkeypatch.setattr(calibration, "_built_in", items)


@pytest.mark.usefixtures("few")
def test_a_search_keeps_its_promise_and_spares_what_is_sensitive(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it was interrupted on the way: it goes on with what it had measured."""
    out = tmp_path / "found.toml"
    told: list[StageEvent] = []
    asked: dict[str, Any] = {"max_loss": 10, "targets": [ORT], "method": "rtn", "report": told.append}
    losses = _Judge.loss

    def once(judge: _Judge, *arguments: Any) -> Loss:
        if [event.state for event in told].count("done") == 3:
            raise KeyboardInterrupt
        return losses(judge, *arguments)

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(_Judge, "loss", once)
        search_recipe(small, out, **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["found.toml.partial"]
    told.clear()
    monkeypatch.setattr("lensc.export.quantize.search.measure", lambda *_, **__: pytest.fail("measured again"))
    found = search_recipe(small, out, command="lensc …", **asked)
    assert [event.state for event in told if event.state != "start"][:4] == ["kept", "kept", "kept", "done"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.toml"]
    assert not found.by_answers and found.exact and found.best.kept and found.best.loss.changed_percent <= 10
    assert any(not one.kept for one in found.tried) and 0.1 < found.best.nbytes / found.float_bytes < 0.6
    assert all(one.nbytes >= found.best.nbytes for one in found.tried if one.kept)
    text = out.read_text()
    recipe = resolve(str(out))
    assert recipe.name == "found" and recipe.activations == {"vision": 8, "decoder": 8}
    assert dict(found.recipe.weights).items() <= dict(recipe.weights).items()
    assert f"# Checkpoint sha256 {Checkpoint(small).sha256}" in text and "# Searched by lensc" in text
    costs = {(cost.pattern, str(cost.format)): cost.kl for cost in found.costs}
    assert costs[DOWN, "w2-g64-s4"] > costs[DOWN, "w4-g128-s4"] and (EMBEDDING, "w4-g64") in costs
    assert f"w4-g128-s4 {1000 * costs[DOWN, 'w4-g128-s4']:.3g}" in next(
        line for line in text.splitlines() if DOWN in line
    )
    others = [kl for (pattern, format), kl in costs.items() if "down_proj" in pattern and format == "w4-g128-s4"]
    assert costs[DOWN, "w4-g128-s4"] == max(others)
    assert [event.index for event in told] == sorted(event.index for event in told)
    assert told[-1].index <= told[-1].total


def test_only_what_all_targets_take_is_tried(small: Path) -> None:
    source, two = Source(Checkpoint(small), resolve("f32"), None), WeightFormat(2, 64)
    assert search_module._usable(source, works([ORT]), DOWN, two)
    assert not search_module._usable(source, works([ORT, Target("openvino", "cpu")]), DOWN, two)
    assert search_module._usable(source, works([ORT, Target("openvino", "cpu")]), DOWN, W4)


@pytest.mark.usefixtures("few")
def test_a_streamed_model_is_searched_by_the_proxy(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated, and measured as a whole all the same."""
    monkeypatch.setattr(Source, "is_streamed", True)
    out = tmp_path / "found.toml"
    # beside what the tests before this one hold
    max_memory = resident_bytes() + (1 << 30)
    found = search_recipe(small, out, max_loss=10, targets=[ORT], max_memory=max_memory)
    assert not found.exact and found.best.kept and found.best.loss.changed_percent <= 10
    assert "in proportion to one trajectory of its block" in out.read_text() and resolve(str(out)).method == "gptq"
    costs = {(cost.pattern, str(cost.format)): cost.kl for cost in found.costs}
    assert costs[DOWN, "w4-g128-s4"] > 3 * costs[DOWN.replace("0", "1"), "w4-g128-s4"]


@pytest.mark.usefixtures("few")
def test_what_no_recipe_keeps_is_an_error_that_says_what_the_least_costs(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lensc.export.quantize.search._Judge.loss", lambda *_: Loss(1.0, 50, 1, 0, 0, 0))
    with pytest.raises(
        UsageError, match=r"--max-loss 0: no recipe keeps it; the first step alone \(.*\) loses 1 of 50 tokens"
    ):
        search_recipe(small, tmp_path / "r.toml", max_loss=0.0, targets=[ORT], method="rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml.partial"]  # for a search that may lose more


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"max_loss": -1.0}, UsageError, "--max-loss -1: expected 0 to 50 points"),
        ({"max_loss": 1000.0}, UsageError, "--max-loss 1000: expected"),
        ({"max_loss": float("nan")}, UsageError, "--max-loss nan: expected"),
        ({"method": "magic"}, UsageError, "--method 'magic': expected one of rtn, gptq"),
        ({"out": "recipe.json"}, UsageError, "a recipe is a .toml file"),
        ({"out": "there.toml"}, UsageError, "there.toml: exists; choose another name or remove it"),
        ({"out": "no/r.toml"}, UsageError, "is not there"),
        ({"calibration": "pictures"}, PictureError, "1 of 1 pictures cannot be read"),
        ({"max_memory": 40 << 20}, MemoryLimitError, "--max-memory is 40 MiB; raise it"),
        ({"targets": [Target("openvino", "npu")]}, UnsupportedError, "the NPU"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], error: type, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lensc.export.quantize.search.measure", lambda *_, **__: pytest.fail("began"))
    Path("there.toml").write_text("mine")
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(b"no picture")
    arguments: dict[str, Any] = {"out": "r.toml", "max_loss": 1.0, "targets": [ORT], **more}
    with pytest.raises(error, match=message):
        search_recipe(small, arguments.pop("out"), **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "there.toml"]
    assert Path("there.toml").read_text() == "mine"
