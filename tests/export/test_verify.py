"""Verification passes what is right and names what is wrong; ONNX Runtime meets the recorded official outputs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'lensc[export]'")
import torch

from lensc.backends import registry
from lensc.backends.base import Array, Session, Target
from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import GraphError, ParityError, StorageError
from lensc.backends.load_options import LoadOptions
from lensc.export.checkpoint import Checkpoint
from lensc.export.graph import DimRange, GraphSpec, TensorSpec
from lensc.export.models.minicpmv import MiniCPMV
from lensc.export.models.session import torch_sessions
from lensc.export.onnx import export_model
from lensc.export.verify import (
    SURE_MARGIN,
    TOLERANCES,
    Metrics,
    Question,
    make_probes,
    probe_feeds,
    verify_graph,
    verify_model,
)
from lensc.runtime.picture import slice_picture, vision_feeds
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Tokenizer
from lensc.runtime.speculation import Speculation

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGES = GOLDEN / "images"

Sessions = dict[str, Session]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(GOLDEN / "checkpoint")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> MiniCPMV:
    return checkpoint.load_model()


@pytest.fixture(scope="module")
def reference(model: MiniCPMV) -> Sessions:
    return torch_sessions(model)


@pytest.fixture(scope="module")
def spec(checkpoint: Checkpoint) -> ModelSpec:
    return checkpoint.model_spec()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_file(checkpoint.tokenizer)


@pytest.fixture(scope="module")
def table(model: MiniCPMV) -> Array:
    return model.llm.model.embed_tokens.weight.numpy()


@pytest.fixture(scope="module")
def engine(model: MiniCPMV, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    """The exported graphs in ONNX Runtime."""
    pytest.importorskip("onnx", reason="pip install 'lensc[export]'")
    pytest.importorskip("onnxruntime", reason="pip install lensc")
    backend, target = registry.get("onnxruntime"), Target("onnxruntime", "cpu")
    bundle = tmp_path_factory.mktemp("bundle")
    (bundle / target.slug).mkdir()
    sessions = {}
    for name, graph in export_model(model, tmp_path_factory.mktemp("graphs")).items():
        artifact = backend.compile(graph, target, bundle / target.slug)
        sessions[name] = backend.load(artifact, graph.spec, bundle, LoadOptions(threads=1))
    yield sessions
    for session in sessions.values():
        session.close()


@pytest.fixture(scope="module")
def verify(reference: Sessions, spec: ModelSpec, tokenizer: Tokenizer, table: Array) -> Callable[..., Any]:
    def run(candidate: Mapping[str, Session], *images: str, tokens: int = 4, against: Any = reference) -> Any:
        questions = [Question("What is this?", tuple(IMAGES / name for name in images)), Question("Why?")]
        return verify_model(against, candidate, spec, tokenizer, table, questions, tokens)

    return run


# --- the exported graphs in an engine -----------------------------------------------------------------------------


def test_engine_passes(verify: Callable[..., Any], engine: Sessions) -> None:
    vision, decoder = verify(engine, "sq448.png", "tiny64.png", tokens=12)
    assert (vision.graph, decoder.graph) == ("vision", "decoder")
    assert vision.passed and decoder.passed
    assert vision.max_abs < 2e-5 and decoder.max_abs < 5e-5
    assert vision.sqnr_db > 100 and decoder.sqnr_db > 100
    assert vision.top1_agreement is None and decoder.top1_agreement == 1.0
    assert decoder.first_divergent_token is None
    assert vision.pictures == 2 and vision.target == "onnx" and "5e-05" in vision.tolerance


def test_answers_are_compared_a_token_at_a_time(
    verify: Callable[..., Any], reference: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Margins are counted by runs, so that nothing may be guessed."""
    monkeypatch.setattr(Speculation, "draft", lambda self, most: pytest.fail("guessed"))
    assert all(record.passed for record in verify(reference, tokens=8))


@pytest.mark.parametrize("case", ("sq448", "tiny64"))
def test_engine_meets_the_golden_vectors(
    case: str, engine: Sessions, spec: ModelSpec, tokenizer: Tokenizer, table: Array
) -> None:
    golden = np.load(GOLDEN / "cases" / f"{case}.npz")
    record = json.loads((GOLDEN / "cases" / f"{case}.json").read_text(encoding="utf-8"))
    slices = slice_picture(IMAGES / f"{case}.png", spec.picture)
    (batch,) = vision_feeds(slices.pixels, spec.picture, spec.decoder.hidden_size)
    embeds = engine["vision"].run(batch.feeds)["image_embeds"]
    np.testing.assert_allclose(embeds, golden["resampler_out_batched"], atol=5e-5, rtol=0)

    recorder = Recorder(engine["decoder"])
    vlm = VLM(spec, tokenizer, {"vision": engine["vision"], "decoder": recorder}, table)
    (message,) = record["messages"]
    content = message["content"] if isinstance(message["content"], list) else [message["content"]]
    texts = [part for part in content if not part.startswith("@")]
    pictures = [IMAGES / f"{part[1:]}.png" for part in content if part.startswith("@")]
    ids = golden["greedy_ids"]
    result = vlm.generate(texts[0], pictures, max_new_tokens=len(ids))
    assert result.metrics.prompt_tokens == golden["input_ids"].shape[1]
    np.testing.assert_array_equal(result.token_ids, ids)
    logits = np.stack([run[0, -1] for run in recorder.logits])
    np.testing.assert_allclose(logits[0], golden["logits_last"], atol=2e-4, rtol=0)
    first = golden["greedy_logits_first8"]
    np.testing.assert_allclose(logits[: len(first)], first, atol=2e-4, rtol=0)


class Recorder:
    """A Session that keeps the logits of every run."""

    def __init__(self, session: Session) -> None:
        self.spec = session.spec
        self.logits: list[Array] = []
        self._session = session

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        outputs = self._session.run(feeds, out)
        self.logits.append(outputs["logits"].copy())
        return outputs

    def close(self) -> None:
        pass


# --- wrong graphs are caught --------------------------------------------------------------------------------------


def change(model: MiniCPMV, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> MiniCPMV:
    """A copy of `model` with one parameter edited."""
    wrong = copy.deepcopy(model)
    parameter = wrong.get_parameter(name)
    parameter.data = edit(parameter.data.clone())
    return wrong


def one_weight_off(weight: torch.Tensor) -> torch.Tensor:
    weight[3, 5] += 0.05
    return weight


WRONG_WEIGHTS = {
    "one weight of 131072": ("decoder", "llm.model.layers.1.mlp.down_proj.weight", one_weight_off),
    "vision bias dropped": ("vision", "vpm.encoder.layers.1.mlp.fc1.bias", torch.zeros_like),
    "key bias dropped": ("vision", "resampler.attn.in_proj_bias", lambda b: b * (torch.arange(len(b)) >= len(b) // 3)),
    "norm weight dropped": ("decoder", "llm.model.norm.weight", torch.ones_like),
    "rounded to bfloat16": ("decoder", "llm.model.layers.0.self_attn.v_proj.weight", lambda w: w.bfloat16().float()),
    "last position row": ("vision", "vpm.embeddings.position_embedding.weight", lambda w: w.roll(1, 0)),
}


@pytest.mark.parametrize("mistake", WRONG_WEIGHTS)
def test_wrong_weights_are_caught(
    verify: Callable[..., Any], model: MiniCPMV, reference: Sessions, mistake: str
) -> None:
    graph, parameter, edit = WRONG_WEIGHTS[mistake]
    candidate = {**reference, graph: torch_sessions(change(model, parameter, edit))[graph]}
    with pytest.raises(ParityError, match=f"{graph}: .* times the allowed difference off") as caught:
        verify(candidate, "tiny64.png", tokens=2)
    assert "\n" not in str(caught.value) and "SQNR" in str(caught.value)


def swapped(feeds: dict[str, Array]) -> None:
    for name in [n for n in feeds if n.startswith("past_key")]:
        value = name.replace("key", "value")
        feeds[name], feeds[value] = feeds[value], feeds[name]


def shifted(feeds: dict[str, Array]) -> None:
    """Positions that start anew at each run: no difference without a past, and none between the new tokens."""
    feeds["position_ids"] = feeds["position_ids"] - feeds["position_ids"][0]


def blind(feeds: dict[str, Array]) -> None:
    for name in [n for n in feeds if n.startswith("past_")]:
        feeds[name] = feeds[name][:0]


def unmasked(feeds: dict[str, Array]) -> None:
    feeds["key_bias"] = np.zeros_like(feeds["key_bias"])


class Edited:
    """A Session that edits its feeds or its outputs."""

    def __init__(
        self,
        session: Session,
        feeds: Callable[[dict[str, Array]], None] | None = None,
        outputs: Callable[[dict[str, Array]], None] | None = None,
    ) -> None:
        self.spec = session.spec
        self._session = session
        self._feeds = feeds
        self._outputs = outputs

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        given = dict(feeds)
        if self._feeds is not None:
            self._feeds(given)
        outputs = self._session.run(given, out)
        if self._outputs is not None:
            self._outputs(outputs)
        return outputs

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("graph", "edit"),
    (("decoder", swapped), ("decoder", shifted), ("decoder", blind), ("vision", unmasked)),
    ids=("keys and values swapped", "positions of the new rows", "past ignored", "padding seen"),
)
def test_wrong_wiring_is_caught(
    verify: Callable[..., Any], reference: Sessions, graph: str, edit: Callable[[dict[str, Array]], None]
) -> None:
    with pytest.raises(ParityError, match=f"{graph}: "):
        verify({**reference, graph: Edited(reference[graph], edit)}, tokens=3)


@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_values_that_are_not_finite_are_caught(verify: Callable[..., Any], reference: Sessions, value: float) -> None:
    def spoil(outputs: dict[str, Array]) -> None:
        outputs["key.1"] = outputs["key.1"].copy()
        outputs["key.1"][-1, 0, 0, 0] = value

    with pytest.raises(ParityError, match=r"decoder: key\.1 holds NaN or Inf"):
        verify({**reference, "decoder": Edited(reference["decoder"], outputs=spoil)}, tokens=2)


class Preferring:
    """A decoder that in the runs `when`, counted from 1, prefers token 7 by `lead` over what was first."""

    def __init__(self, session: Session, lead: float, when: range = range(1, 10**6)) -> None:
        self.spec = session.spec
        self.runs = 0
        self._session = session
        self._lead = lead
        self._when = when

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        outputs = self._session.run(feeds, out)
        self.runs += 1
        if self.runs in self._when:
            logits = outputs["logits"]
            logits[..., 7] = -np.inf
            logits[..., 7] = logits.max(-1) + self._lead
        return outputs

    def close(self) -> None:
        pass


def test_what_the_candidate_does_alone_is_compared_too(verify: Callable[..., Any], reference: Sessions) -> None:
    """Right in every forced run, wrong from the third token of the first answer of its own."""
    # run 1 is the golden probe, runs 2 to 5 are forced, runs 6 to 9 free
    decoder = Preferring(reference["decoder"], 1.0, range(8, 10))
    with pytest.raises(
        ParityError, match="1 of 2 answers differ where the reference is sure, first at token 2"
    ) as caught:
        verify({**reference, "decoder": decoder})
    assert "allowed difference" not in str(caught.value)


def test_a_token_the_reference_was_unsure_of_is_reported_only(verify: Callable[..., Any], reference: Sessions) -> None:
    unsure = {**reference, "decoder": Preferring(reference["decoder"], SURE_MARGIN / 8)}
    candidate = {**reference, "decoder": Preferring(reference["decoder"], -SURE_MARGIN / 8)}
    _, decoder = verify(candidate, against=unsure)
    assert decoder.passed and decoder.first_divergent_token == 0 and decoder.top1_agreement == 0.0


# --- figures ------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_their_definitions() -> None:
    generator = np.random.default_rng(0)
    ref, noise = generator.standard_normal((2, 50, 40)), generator.standard_normal((2, 50, 40)) * 1e-3
    ref[0, 0] = 0.0
    ref[0, 0, 3] = 1.0
    metrics = Metrics("decoder")
    for part in (0, 1):
        metrics.add({"logits": ref[part]}, {"logits": ref[part] + noise[part]})
    got = ref + noise
    assert metrics.max_abs == pytest.approx(np.abs(noise).max())
    assert metrics.sqnr_db == pytest.approx(10 * np.log10((ref**2).sum() / (noise**2).sum()))
    assert metrics.sqnr_db == pytest.approx(60, abs=0.5)
    assert metrics.cosine == pytest.approx((ref * got).sum() / np.linalg.norm(ref) / np.linalg.norm(got))
    assert metrics.top1_agreement == pytest.approx((ref.argmax(-1) == got.argmax(-1)).mean())
    assert not metrics.passed and "logits is" in str(metrics)


def test_equal_and_opposite_outputs() -> None:
    ref = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    equal, opposite, nothing = Metrics("vision"), Metrics("vision"), Metrics("vision")
    equal.add({"image_embeds": ref}, {"image_embeds": ref.copy()})
    opposite.add({"image_embeds": ref}, {"image_embeds": -ref})
    assert (equal.max_abs, equal.sqnr_db, equal.cosine, equal.passed) == (0.0, float("inf"), 1.0, True)
    assert equal.top1_agreement is None
    assert opposite.cosine == pytest.approx(-1) and opposite.sqnr_db == pytest.approx(-6.02, abs=0.01)
    assert not opposite.passed
    assert not nothing.passed


@pytest.mark.parametrize("scale", (0.1, 1.0, 100.0))
def test_limits_grow_with_the_output_not_shrink(scale: float) -> None:
    ref = np.random.default_rng(0).standard_normal(1000) * scale
    limit = TOLERANCES["image_embeds"] * max(1.0, float(np.sqrt((ref**2).mean())))
    for factor, passed in ((0.9, True), (1.5, False)):
        got = ref.copy()
        got[np.abs(ref).argmin()] += factor * limit
        metrics = Metrics("vision")
        metrics.add({"image_embeds": ref}, {"image_embeds": got})
        assert metrics.passed is passed


def test_worst_output_is_the_one_named() -> None:
    metrics = Metrics("decoder")
    ones = np.ones((1, 4))
    metrics.add(
        {"key.0": ones, "key.1": ones, "logits": ones}, {"key.0": ones, "key.1": ones + 1e-3, "logits": ones + 2e-3}
    )
    assert str(metrics).startswith("decoder: key.1 is")


def test_the_output_that_fails_in_int8_is_named() -> None:
    """Not the one that is furthest beyond the tolerance of float32, which is not what it must reach."""
    metrics, ones = Metrics("decoder", 20.0), np.ones((1, 4), np.float32)
    metrics.add({"value.0": 100 * ones, "logits": ones}, {"value.0": 109 * ones, "logits": 1.2 * ones})
    assert metrics.outputs["value.0"].excess > metrics.outputs["logits"].excess and not metrics.passed
    assert str(metrics).startswith("decoder: logits reaches SQNR 14.0 dB of 20, max abs 9,")


def test_an_output_without_tolerance_is_refused() -> None:
    with pytest.raises(GraphError, match=r"output mask has no tolerance; known: image_embeds"):
        Metrics("vision").add({"mask": np.ones(1)}, {"mask": np.ones(1)})


def test_verify_graph_compares_all_feeds(reference: Sessions, model: MiniCPMV) -> None:
    decoder = reference["decoder"]
    feeds = probe_feeds(decoder.spec)
    assert verify_graph(decoder, decoder, [feeds, feeds]).rows == 2 * 2 * 8
    wrong = torch_sessions(change(model, "llm.model.norm.weight", torch.ones_like))["decoder"]
    assert not verify_graph(decoder, wrong, [feeds]).passed
    assert not verify_graph(decoder, decoder, []).passed


# --- golden probes ------------------------------------------------------------------------------------------------


def test_probes_hold_inputs_and_outputs(reference: Sessions, tmp_path: Path) -> None:
    records = make_probes(reference, tmp_path)
    assert [(r.graph, r.file) for r in records] == [("vision", "probe-vision.npz"), ("decoder", "probe-decoder.npz")]
    for record in records:
        session = reference[record.graph]
        with np.load(tmp_path / record.file, allow_pickle=False) as file:
            arrays = dict(file)
        names = [f"in.{t.name}" for t in session.spec.inputs] + [f"out.{t.name}" for t in session.spec.outputs]
        assert list(arrays) == names
        outputs = session.run({n.removeprefix("in."): a for n, a in arrays.items() if n.startswith("in.")})
        assert all(np.isfinite(a).all() for a in outputs.values())
        for name, array in outputs.items():
            np.testing.assert_array_equal(array, arrays[f"out.{name}"])
        assert 5e-5 <= record.tolerance < 2e-3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["probe-decoder.npz", "probe-vision.npz"]


def test_probes_are_the_same_each_time(reference: Sessions, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert make_probes(reference, tmp_path / "a") == make_probes(reference, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_probe_has_a_past_padding_and_several_rows(reference: Sessions) -> None:
    decoder, vision = probe_feeds(reference["decoder"].spec), probe_feeds(reference["vision"].spec)
    past = decoder["past_key.0"].shape[0]
    assert past > 0 and decoder["position_ids"].tolist() == list(range(past, past + 9))
    assert decoder["logit_positions"].tolist() == [0, 1, 2, 3, 4, 5, 6, 8]
    assert not vision["attention_bias"].any() and (vision["key_bias"] != 0).any(axis=1).all()


def test_probe_fits_a_graph_of_fixed_sizes() -> None:
    spec = GraphSpec(
        name="decoder",
        inputs=(TensorSpec("inputs_embeds", "float32", ("batch", "tokens", 4)),),
        outputs=(),
        states=(),
        dims={"batch": DimRange(1, 1, 1), "tokens": DimRange(1, 1, 2)},
    )
    assert probe_feeds(spec)["inputs_embeds"].shape == (1, 2, 4)


def test_probes_that_cannot_be_written_are_a_storage_error(reference: Sessions, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        make_probes(reference, tmp_path / "nowhere")
