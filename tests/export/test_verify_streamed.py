"""One pass of the streamed reference says the same of a candidate as answering token by token does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'lensc[export]'")
import torch

from lensc.backends.base import Array, CachedSession, Session
from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import GraphError, ParityError, UsageError
from lensc.export.checkpoint import Checkpoint
from lensc.export.models.minicpmv import MiniCPMV
from lensc.export.models.session import torch_sessions
from lensc.export.models.streamed import StreamedModel
from lensc.export.verify import Question
from lensc.export.verify_streamed import Answers, ask, compare, encode, judge, verify_streamed
from lensc.runtime.decoder import HostCachedSession
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Tokenizer
from lensc.runtime.speculation import Speculation

ROOT = Path(__file__).parents[2]
PICTURES = sorted((ROOT / "export" / "demo" / "pictures").glob("*.png"))
QUESTIONS = (
    Question("Read the text.", (PICTURES[0],)),
    Question("What can you see?"),
    Question("Read the text.", (PICTURES[1], PICTURES[0])),  # a slice that was seen before
)
TOKENS = 20


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """The demo model: trained, so that it is sure of most tokens."""
    return Checkpoint(ROOT / "export" / "demo" / "checkpoint")


@pytest.fixture(scope="module")
def spec(checkpoint: Checkpoint) -> ModelSpec:
    return checkpoint.model_spec()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_file(checkpoint.tokenizer)


@pytest.fixture(scope="module")
def table(checkpoint: Checkpoint) -> Array:
    return checkpoint.tensor("llm.model.embed_tokens.weight").numpy()


@pytest.fixture(scope="module")
def streamed(checkpoint: Checkpoint) -> StreamedModel:
    return StreamedModel(checkpoint, checkpoint.config)


@pytest.fixture(scope="module")
def exact(checkpoint: Checkpoint) -> dict[str, Session]:
    return torch_sessions(checkpoint.load_model())


@pytest.fixture(scope="module")
def exact_answers(exact: dict[str, Session], spec: ModelSpec, tokenizer: Tokenizer, table: Array) -> Answers:
    return ask(exact, spec, tokenizer, table, QUESTIONS, TOKENS)


@pytest.fixture(scope="module")
def rounded(checkpoint: Checkpoint) -> dict[str, Session]:
    """A candidate with weights of five levels per row."""
    model: MiniCPMV = checkpoint.load_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                scale = weight.abs().amax(-1, keepdim=True) / 2.5 + 1e-9
                weight.copy_((weight / scale).round() * scale)
    return torch_sessions(model)


@pytest.fixture(scope="module")
def rounded_answers(rounded: dict[str, Session], spec: ModelSpec, tokenizer: Tokenizer, table: Array) -> Answers:
    return ask(rounded, spec, tokenizer, table, QUESTIONS, TOKENS, probes=False)


def test_the_model_itself_passes(
    streamed: StreamedModel, exact_answers: Answers, spec: ModelSpec, table: Array
) -> None:
    evidence = compare(streamed, exact_answers, spec, table)
    assert evidence.divergences == () and evidence.questions == 3 and evidence.pictures == 3
    assert evidence.vision.max_abs == 0.0, "slices are encoded one by one on both sides"
    assert set(evidence.decoder.outputs) == {"logits", *(f"{kind}.{i}" for kind in ("key", "value") for i in range(4))}
    rows = sum(len(answer.token_ids) for answer in exact_answers.answers)
    assert evidence.decoder.rows == rows + 16, "eight rows of the probe, in a batch of two"
    vision, decoder = judge(evidence, target="reference:cpu")
    assert (vision.graph, decoder.graph) == ("vision", "decoder") and vision.passed and decoder.passed
    assert vision.sqnr_db == float("inf") and decoder.sqnr_db > 110 and decoder.max_abs < 1e-4
    assert decoder.top1_agreement == 1.0 and vision.top1_agreement is None
    assert decoder.first_divergent_token is None and decoder.target == "reference:cpu"
    assert "5e-05" in decoder.tolerance


def test_each_token_is_judged_by_the_logits_that_chose_it(
    exact: dict[str, Session],
    exact_answers: Answers,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    table: Array,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the runtime would gain by guessing: a run that brings several tokens has rows of none of them alone."""
    monkeypatch.setattr(Speculation, "draft", lambda self, most: [1, 2, 3][:most])
    answers = ask(exact, spec, tokenizer, table, QUESTIONS, TOKENS, probes=False).answers
    for answer, before in zip(answers, exact_answers.answers, strict=True):
        assert answer.token_ids == before.token_ids
        np.testing.assert_array_equal(answer.logits.argmax(-1), answer.token_ids)


def test_a_vision_graph_is_judged_alone(
    streamed: StreamedModel,
    exact: dict[str, Session],
    rounded: dict[str, Session],
    rounded_answers: Answers,
    spec: ModelSpec,
    table: Array,
) -> None:
    """Where no decoder can run: one record, with what the whole comparison says of the vision graph."""
    evidence = compare(streamed, encode(exact["vision"], spec, QUESTIONS), spec, table)
    (record,) = judge(evidence)
    assert evidence.decoder is None and record.graph == "vision" and record.sqnr_db == float("inf")
    assert record.pictures == 3 and len(encode(exact["vision"], spec, QUESTIONS).vision_calls) > 1
    alone = encode(rounded["vision"], spec, QUESTIONS)
    assert alone.vision_calls.keys() == rounded_answers.vision_calls.keys()
    with pytest.raises(ParityError, match=r"^onnx does not compute what torch float32 computes: vision"):
        judge(compare(streamed, alone, spec, table))


def test_divergence_is_where_the_free_answers_part(
    streamed: StreamedModel,
    rounded_answers: Answers,
    exact: dict[str, Session],
    spec: ModelSpec,
    tokenizer: Tokenizer,
    table: Array,
) -> None:
    """The independent way: the reference in memory answers token by token, and the answers are laid side by side."""
    rows: list[Array] = []

    class Recorder:
        spec = exact["decoder"].spec

        def run(self, feeds: dict[str, Array], out: dict[str, Array] | None = None) -> dict[str, Array]:
            outputs = exact["decoder"].run(feeds, out)
            rows.append(outputs["logits"][0, -1].copy())
            return outputs

        def close(self) -> None: ...

    vlm = VLM(spec, tokenizer, {"vision": exact["vision"], "decoder": Recorder()}, table)
    expected = []
    for index, (question, answer) in enumerate(zip(QUESTIONS, rounded_answers.answers, strict=True)):
        rows.clear()
        ids = vlm.generate(question.prompt, question.images, max_new_tokens=TOKENS).token_ids
        parts = [i for i, (a, b) in enumerate(zip(ids, answer.token_ids, strict=False)) if a != b]
        if parts:
            row = np.sort(rows[len(rows) - len(ids) :][parts[0]])
            expected.append((index, parts[0], float(row[-1] - row[-2])))
    assert expected, "the candidate must differ for this test to mean anything"
    evidence = compare(streamed, rounded_answers, spec, table)
    found = [(d.question, d.token, d.margin) for d in evidence.divergences]
    assert [f[:2] for f in found] == [e[:2] for e in expected]
    np.testing.assert_allclose([f[2] for f in found], [e[2] for e in expected], atol=1e-3)


def test_quantized_graphs_are_judged_by_their_noise(
    streamed: StreamedModel, rounded_answers: Answers, spec: ModelSpec, table: Array
) -> None:
    evidence = compare(streamed, rounded_answers, spec, table)
    assert set(evidence.vision.outputs) == {"image_embeds"} and set(evidence.decoder.outputs) == {"logits"}
    with pytest.raises(ParityError, match=r"onnx does not compute what torch float32 computes: vision: image_embeds"):
        judge(evidence)
    vision, decoder = judge(evidence, least_sqnr_db=1.0)
    assert 1 < decoder.sqnr_db < 40 and 1 < vision.sqnr_db < 40 and "at least 1 dB" in vision.tolerance
    assert decoder.top1_agreement is not None and 0.2 < decoder.top1_agreement < 1
    assert decoder.first_divergent_token == min(d.token for d in evidence.divergences)
    with pytest.raises(ParityError, match=r"vision: .*decoder: .*at least 90 dB"):
        judge(evidence, least_sqnr_db=90.0)


def test_a_sure_difference_fails_though_logits_are_near(
    streamed: StreamedModel, exact_answers: Answers, spec: ModelSpec, table: Array
) -> None:
    """An engine that computes well and chooses another token: only the answer shows it."""
    first, *rest = exact_answers.answers
    ids = list(first.token_ids)
    ids[-1] = ids[-1] + 1
    wrong = Answers(
        (type(first)(first.prompt, first.slices, tuple(ids), first.logits), *rest),
        exact_answers.vision_calls,
        exact_answers.probes,
        exact_answers.pictures,
    )
    evidence = compare(streamed, wrong, spec, table)
    assert evidence.decoder.passed
    with pytest.raises(ParityError, match=rf"1 of 3 answers differ .*, first at token {len(ids) - 1}"):
        judge(evidence)


def test_engine_with_a_cache_of_its_own(
    streamed: StreamedModel, exact: dict[str, Session], spec: ModelSpec, tokenizer: Tokenizer, table: Array
) -> None:
    cached = HostCachedSession(exact["decoder"], spec.decoder)
    assert isinstance(cached, CachedSession)
    candidate: dict[str, Session] = {"vision": exact["vision"], "decoder": cached}
    records = verify_streamed(streamed, candidate, spec, tokenizer, table, QUESTIONS[:1], 3, target="reference:cpu")
    assert all(record.passed for record in records)


def test_what_does_not_belong_together(
    checkpoint: Checkpoint, streamed: StreamedModel, exact_answers: Answers, spec: ModelSpec, table: Array
) -> None:
    small = StreamedModel(checkpoint, checkpoint.config, max_bytes=1 << 20)
    with pytest.raises(UsageError, match=r"graph vision: a pass over \d+ samples needs"):
        compare(small, exact_answers, spec, table)
    calls = dict(list(exact_answers.vision_calls.items())[1:])
    partial = Answers(exact_answers.answers, calls, exact_answers.probes, exact_answers.pictures)
    with pytest.raises(GraphError, match=r"was not asked about a slice"):
        compare(streamed, partial, spec, table)
