"""Is this graph the reference model, when the reference does not fit into memory? One pass over its weights tells.

`verify` lets the reference answer, one token after the other, and each token needs all of its weights. Here the candidate
answers, on its own, with its own image embeddings and its own KV cache (`ask`); then the reference is given all prompts,
each with the candidate's answer behind it, in one pass (`compare`). Its logits at the positions of the answer say what it
would have chosen there: as long as its choice is the candidate's, both have the same history, so the first difference is
where the answers of both would part.

Between the two steps the candidate is not needed: it can be closed, or have run in another process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lensc.backends.base import Array, Cache, CachedSession, Session
from lensc.backends.bundle import ModelSpec, ParityRecord
from lensc.backends.errors import GraphError, ParityError
from lensc.runtime.embedding import EmbeddingTable
from lensc.runtime.picture import slice_picture
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Prompt, Tokenizer, user_messages
from lensc.runtime.vision import VisionEncoder

from .graph import GraphSpec
from .models.streamed import StreamedModel
from .verify import SURE_MARGIN, TOLERANCE_TEXT, Metrics, Question, probe_feeds

Feeds = Mapping[str, Array]
Outputs = dict[str, Array]

GRAPHS = ("vision", "decoder")


@dataclass(frozen=True, eq=False)
class Answer:
    """A greedy answer: what was asked, what was chosen, and `logits: float32[tokens, vocab]` it was chosen by."""

    prompt: Prompt
    slices: tuple[npt.NDArray[np.uint8], ...]
    token_ids: tuple[int, ...]
    logits: Array


@dataclass(frozen=True, eq=False)
class Answers:
    """What a candidate answered, every call of its vision graph, and its outputs for the golden probes, by graph."""

    answers: tuple[Answer, ...]
    vision_calls: dict[bytes, tuple[Feeds, Outputs]]
    probes: dict[str, Outputs]
    pictures: int


@dataclass(frozen=True)
class Divergence:
    """The first token of the answer to a question that the reference would not have chosen.

    `margin` is by how much the reference prefers its own choice to the second best.
    """

    question: int
    token: int
    margin: float


@dataclass(frozen=True, eq=False)
class Evidence:
    """How close a candidate comes to the reference, end to end: the logits are those after its own image embeddings.

    `decoder` is None if the candidate has only encoded pictures.
    """

    vision: Metrics
    decoder: Metrics | None
    divergences: tuple[Divergence, ...]
    questions: int
    pictures: int


def verify_streamed(
    reference: StreamedModel,
    candidate: Mapping[str, Session],
    spec: ModelSpec,
    tokenizer: Tokenizer,
    embed_table: Array | EmbeddingTable,
    questions: Sequence[Question],
    tokens: int = 32,
    *,
    target: str = "onnx",
    against: str = "torch float32",
    least_sqnr_db: float | None = None,
) -> tuple[ParityRecord, ...]:
    """Ask the graphs `vision` and `decoder` of `candidate`, compare with `reference`, judge; see `judge` for the errors."""
    probes = least_sqnr_db is None
    answers = ask(candidate, spec, tokenizer, embed_table, questions, tokens, probes=probes)
    evidence = compare(reference, answers, spec, embed_table)
    return judge(evidence, target=target, against=against, least_sqnr_db=least_sqnr_db)


def ask(
    candidate: Mapping[str, Session],
    spec: ModelSpec,
    tokenizer: Tokenizer,
    embed_table: Array | EmbeddingTable,
    questions: Sequence[Question],
    tokens: int = 32,
    *,
    probes: bool = True,
) -> Answers:
    """Let `candidate` answer `questions` greedily, with at most `tokens` each.

    With `probes` it runs the inputs of its golden probes, too, which have a past, a batch and several rows of logits, but
    random values: what they say of a quantized graph is not how it does on pictures and words.
    """
    vision = _VisionRecorder(candidate["vision"])
    decoder = _recorder(candidate["decoder"])
    vlm = VLM(spec, tokenizer, {"vision": vision, "decoder": decoder}, embed_table)
    answers = []
    for question in questions:
        decoder.rows.clear()
        request = vlm.prepare(user_messages(question.prompt, question.images))
        ids = vlm.generate(
            question.prompt,
            question.images,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
            prompt_lookup_num_tokens=0,
        ).token_ids
        # the last run of a prefill chooses the first token, and the last token is not fed: one run per token
        logits = np.stack(decoder.rows[len(decoder.rows) - len(ids) :])
        answers.append(Answer(request.prompt, request.slices, ids, logits))
    probed = {name: candidate[name].run(probe_feeds(candidate[name].spec)) for name in GRAPHS} if probes else {}
    return Answers(tuple(answers), vision.calls, probed, sum(len(question.images) for question in questions))


def encode(session: Session, spec: ModelSpec, questions: Sequence[Question]) -> Answers:
    """No answers, but what the vision graph `session` makes of the pictures of `questions`: where no decoder can run."""
    vision = _VisionRecorder(session)
    encoder = VisionEncoder(vision, spec.picture, spec.decoder.hidden_size)
    for question in questions:
        encoder.encode([pixels for image in question.images for pixels in slice_picture(image, spec.picture).pixels])
    return Answers((), vision.calls, {}, sum(len(question.images) for question in questions))


def compare(
    reference: StreamedModel, answers: Answers, spec: ModelSpec, embed_table: Array | EmbeddingTable
) -> Evidence:
    """Compare `answers` with what `reference` makes of the same pictures, prompts and answers.

    Raises UsageError if that needs more memory than the reference is allowed, CheckpointError for damaged weights.
    """
    vision, decoder = Metrics("vision"), Metrics("decoder")
    probes = {name: [probe_feeds(reference.specs[name])] if name in answers.probes else [] for name in GRAPHS}
    calls = list(answers.vision_calls.values())
    expected = reference.run_vision([*probes["vision"], *(feeds for feeds, _ in calls)])
    got = [answers.probes[name] for name in ("vision",) if probes[name]] + [outputs for _, outputs in calls]
    for ours, theirs in zip(expected, got, strict=True):
        vision.add(ours, theirs)
    if not answers.answers:
        return Evidence(vision, None, (), 0, answers.pictures)

    by_call = dict(zip(answers.vision_calls, expected[len(probes["vision"]) :], strict=True))
    encoder = VisionEncoder(_Recalled(reference.specs["vision"], by_call), spec.picture, spec.decoder.hidden_size)
    feeds = [_forced(answer, encoder.encode(answer.slices).embeds, spec, embed_table) for answer in answers.answers]
    everything = [tensor.name for tensor in reference.specs["decoder"].outputs]
    wanted = [everything for _ in probes["decoder"]] + [["logits"] for _ in feeds]
    forced = reference.run_decoder([*probes["decoder"], *feeds], wanted)
    for _ in probes["decoder"]:
        decoder.add(forced.pop(0), answers.probes["decoder"])
    divergences = []
    for question, (answer, outputs) in enumerate(zip(answers.answers, forced, strict=True)):
        decoder.add(outputs, {"logits": answer.logits[None]})
        divergences += _divergence(question, outputs["logits"][0], answer.token_ids)
    return Evidence(vision, decoder, tuple(divergences), len(answers.answers), answers.pictures)


def judge(
    evidence: Evidence, *, target: str = "onnx", against: str = "torch float32", least_sqnr_db: float | None = None
) -> tuple[ParityRecord, ...]:
    """One record per graph that was run. Raises ParityError that lists the figures if a graph is not good enough to be shipped.

    By default the graphs compute in float32: the tolerances of `verify` hold, and no answer may differ where the reference
    is sure. With `least_sqnr_db`, for quantized graphs, every output must be finite and reach that many decibels; where
    answers differ is recorded and decides nothing.
    """
    measured = {"vision": evidence.vision, "decoder": evidence.decoder}
    metrics = {name: graph for name, graph in measured.items() if graph is not None}
    if least_sqnr_db is None:
        tolerance = TOLERANCE_TEXT
        failed = [str(graph) for graph in metrics.values() if not graph.passed]
        sure = [d for d in evidence.divergences if d.margin > SURE_MARGIN]
        if sure:
            failed.append(
                f"decoder: {len(sure)} of {evidence.questions} answers differ where the reference is sure, "
                f"first at token {min(d.token for d in sure)}"
            )
    else:
        tolerance = f"SQNR of image_embeds, key, value and logits at least {least_sqnr_db:g} dB"
        failed = [str(graph) for graph in metrics.values() if not (graph.finite and graph.sqnr_db >= least_sqnr_db)]
    if failed:
        raise ParityError(f"{target} does not compute what {against} computes: {'; '.join(failed)} ({tolerance})")
    first = min((d.token for d in evidence.divergences), default=None)
    return tuple(
        ParityRecord(
            graph=name,
            target=target,
            against=against,
            max_abs=graph.max_abs,
            sqnr_db=graph.sqnr_db,
            cosine=graph.cosine,
            top1_agreement=graph.top1_agreement,
            first_divergent_token=first if name == "decoder" else None,
            pictures=evidence.pictures,
            passed=True,
            tolerance=tolerance,
        )
        for name, graph in metrics.items()
    )


def _forced(answer: Answer, image_embeds: Array, spec: ModelSpec, embed_table: Array | EmbeddingTable) -> Feeds:
    """One decoder call over the prompt and the answer, without its last token, that asks for the answer's logits."""
    prompt, steps = answer.prompt, len(answer.token_ids)
    ids = np.concatenate([prompt.ids, np.array(answer.token_ids[:-1], np.int64)])
    embeds = EmbeddingTable.of(embed_table).gather(ids)
    for (start, stop), rows in zip(prompt.image_bounds.tolist(), image_embeds, strict=True):
        embeds[start:stop] = rows
    nothing = np.empty((0, 1, spec.decoder.num_kv_heads, spec.decoder.head_dim), np.float32)
    states = (f"past_{kind}.{layer}" for layer in range(spec.decoder.num_layers) for kind in ("key", "value"))
    return {
        "inputs_embeds": embeds[None],
        "position_ids": np.arange(len(ids)),
        "logit_positions": np.arange(len(prompt.ids) - 1, len(prompt.ids) - 1 + steps),
        **dict.fromkeys(states, nothing),
    }


def _divergence(question: int, logits: Array, token_ids: Sequence[int]) -> list[Divergence]:
    """Where the answer `token_ids` leaves what `logits: float32[tokens, vocab]` would choose, if it does."""
    different = np.flatnonzero(logits.argmax(-1) != np.array(token_ids))
    if not len(different):
        return []
    token = int(different[0])
    second, first = np.partition(logits[token], -2)[-2:]
    return [Divergence(question, token, float(first - second))]


# --- sessions that remember ---------------------------------------------------------------------------------------


class _VisionRecorder:
    """A vision Session that keeps every call with its outputs, by the hash of its feeds.

    Equal arrays are kept once: the cells of a picture share their position embedding, 17 MB each at full size.
    """

    def __init__(self, session: Session) -> None:
        self.spec = session.spec
        self.calls: dict[bytes, tuple[Feeds, Outputs]] = {}
        self._session = session
        self._arrays: dict[bytes, Array] = {}

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> Outputs:
        outputs = self._session.run(feeds, out)
        # Copies: an engine may reuse the memory of its outputs, and feeds may be views into larger batches.
        kept = {name: self._kept(array) for name, array in feeds.items()}
        self.calls[_call(feeds)] = kept, {name: np.array(array) for name, array in outputs.items()}
        return outputs

    def _kept(self, array: Array) -> Array:
        digest = _digest(array)
        if digest not in self._arrays:
            self._arrays[digest] = np.array(array)
        return self._arrays[digest]

    def close(self) -> None:
        """Sessions are closed by who opened them."""


class _Recalled:
    """A vision Session that gives recorded outputs."""

    def __init__(self, spec: GraphSpec, outputs: Mapping[bytes, Outputs]) -> None:
        self.spec = spec
        self._outputs = outputs

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> Outputs:
        try:
            return self._outputs[_call(feeds)]
        except KeyError:
            raise GraphError("graph vision: the candidate was not asked about a slice of its own prompt") from None

    def close(self) -> None:
        """Nothing is held."""


class _DecoderRecorder:
    """A decoder Session that keeps the last row of logits of each run."""

    def __init__(self, session: Session) -> None:
        self.spec = session.spec
        self.rows: list[Array] = []
        self._session = session

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> Outputs:
        return self._keep(self._session.run(feeds, out))

    def close(self) -> None:
        """Sessions are closed by who opened them."""

    def _keep(self, outputs: Outputs) -> Outputs:
        self.rows.append(np.array(outputs["logits"][0, -1]))
        return outputs


class _CachedDecoderRecorder(_DecoderRecorder):
    """The same for an engine that keeps the KV cache: what ships is what is asked."""

    def __init__(self, session: CachedSession) -> None:
        super().__init__(session)
        self._cached = session

    @property
    def prefill_chunk(self) -> int:
        return self._cached.prefill_chunk

    def new_cache(self, capacity: int, batch: int = 1) -> Cache:
        return self._cached.new_cache(capacity, batch)

    def step(self, feeds: Feeds, cache: Cache, out: Mapping[str, Array] | None = None) -> Outputs:
        return self._keep(self._cached.step(feeds, cache, out))


def _recorder(session: Session) -> _DecoderRecorder:
    return _CachedDecoderRecorder(session) if isinstance(session, CachedSession) else _DecoderRecorder(session)


def _digest(array: npt.NDArray[Any]) -> bytes:
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _call(feeds: Feeds) -> bytes:
    return hashlib.sha256(b"".join(_digest(feeds[name]) for name in sorted(feeds))).digest()
