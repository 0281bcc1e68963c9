"""Is this graph the reference model? Every figure of the parity report comes from here.

Two kinds of evidence, on real pictures and prompts:

    forced  the reference answers, and every call it makes of a graph is repeated on the candidate with the same
            inputs: how far outputs differ, and how often both would choose the same token
    free    the candidate answers on its own, with its own image embeddings and its own KV cache: which token is the
            first to differ. It counts only where the reference was sure: a margin between its first and second choice
            that is within what the tolerance allows decides nothing, and all tokens after it have another history.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lensc.backends.base import Array, Session
from lensc.backends.bundle import ModelSpec, ParityRecord, ProbeRecord
from lensc.backends.errors import GraphError, ParityError, StorageError
from lensc.backends.files import PARTIAL
from lensc.runtime.embedding import EmbeddingTable
from lensc.runtime.picture import MASK, PictureSource
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Tokenizer

from .graph import GraphSpec
from .quantize.scheme import Scheme

TOLERANCES = {
    "image_embeds": 5e-5,
    "key": 5e-5,
    "value": 5e-5,
    "logits": 2e-4,
}
"""Largest absolute difference in float32, by output (`key` is `key.0`, `key.1`, …), for outputs of a root mean square
up to 1; above, in proportion. Recorded runs of the official code on other instruction sets and in float64 stay within
4e-6 (embeddings) and 1.1e-5 (logits, standard deviation 2); wrong variants of the model (other position ids, other
padding, a layer less) move them by 0.4 and more. In between, the limits leave room for the real model's depth."""

EPSILON = 1e-5
"""Allowed on top, relative to each element: 84 roundings of a float32."""

TOLERANCE_TEXT = "f32: image_embeds, key, value 5e-05, logits 2e-04, times max(1, rms), + 1e-05 |ref|"

MIN_SQNR_DB = 20.0
"""Of every output, where products are computed with 8-bit inputs or keys and values are stored in 8 bits. Such
noise is 30 to 40 dB below the signal in either of our graphs; zeros, other layers' weights or a wrong scale leave less than 5."""

INT8_TEXT = f"int8 products or KV cache, or activations of 16 bits: SQNR of every output at least {MIN_SQNR_DB:.0f} dB"

INT8_PROBE = 0.5
"""Largest absolute difference of a golden probe in int8, for outputs of a root mean square up to 1; above, in
proportion. The largest of a million values of noise 30 dB down is 0.16; zeros are off by 3."""

NOT_JUDGED = "none: what the recipe costs"

SURE_MARGIN = 2 * TOLERANCES["logits"]
"""Both choices may move by the tolerance, towards each other."""

PROBE_SIZES = {"slices": 2, "patches": 12, "batch": 2, "tokens": 9, "past": 5, "rows": 8}
"""Sizes of the golden probe: small, but each dimension is one that a graph could get wrong. Logits of random inputs are weak
in some rows, where rounding inputs to 8 bits weighs more: four rows swing from 24 to 37 dB, sixteen stay above 29."""


@dataclass
class Tally:
    """Running sums over all values of one output; `excess` is the worst |difference| / allowed difference."""

    allowed_at_1: float
    max_abs: float = 0.0
    excess: float = 0.0
    reference_power: float = 0.0
    candidate_power: float = 0.0
    error_power: float = 0.0
    product: float = 0.0
    finite: bool = True

    def add(self, reference: Array, candidate: Array) -> None:
        """Count two arrays of the same shape."""
        if not (np.isfinite(candidate).all() and np.isfinite(reference).all()):
            self.finite = False
            return
        if not reference.size:
            return
        ref, got = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
        error = np.abs(ref - got)
        rms = float(np.sqrt(np.mean(ref * ref)))
        allowed = self.allowed_at_1 * max(1.0, rms) + EPSILON * np.abs(ref)
        self.max_abs = max(self.max_abs, float(error.max()))
        self.excess = max(self.excess, float((error / allowed).max()))
        self.reference_power += float(ref @ ref)
        self.candidate_power += float(got @ got)
        self.error_power += float(error @ error)
        self.product += float(ref @ got)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in decibels; infinite for equal values."""
        if self.error_power == 0.0:
            return float("inf")
        return float(10 * np.log10(self.reference_power / self.error_power)) if self.reference_power else -float("inf")

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both, 1 for equal values, also for zeros."""
        if self.error_power == 0.0:
            return 1.0
        norms = float(np.sqrt(self.reference_power * self.candidate_power))
        return self.product / norms if norms else 0.0


@dataclass
class Metrics:
    """How close a candidate came, by output name, and over how many rows of logits the first choice was equal."""

    graph: str
    min_sqnr_db: float | None = None
    """What every output must reach, instead of the tolerances of float32."""
    outputs: dict[str, Tally] = field(default_factory=dict)
    rows: int = 0
    agreed: int = 0

    def add(self, reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> None:
        """Count the outputs of one call."""
        for name, expected in reference.items():
            kind = name.partition(".")[0]
            if kind not in TOLERANCES:
                raise GraphError(f"graph {self.graph}: output {name} has no tolerance; known: {', '.join(TOLERANCES)}")
            self.outputs.setdefault(name, Tally(TOLERANCES[kind])).add(expected, candidate[name])
            if name == "logits":
                self.rows += int(np.prod(expected.shape[:-1]))
                self.agreed += int((expected.argmax(-1) == candidate[name].argmax(-1)).sum())

    @property
    def finite(self) -> bool:
        """Whether no value was NaN or infinite."""
        return all(t.finite for t in self.outputs.values())

    @property
    def passed(self) -> bool:
        """Whether something was compared and all of it is within tolerance."""
        if not self.outputs or not self.finite:
            return False
        if self.min_sqnr_db is not None:
            return self.sqnr_db >= self.min_sqnr_db
        return all(t.excess <= 1.0 for t in self.outputs.values())

    @property
    def max_abs(self) -> float:
        """Largest absolute difference of any output; NaN if a value was not finite."""
        return max((t.max_abs for t in self.outputs.values()), default=0.0) if self.finite else float("nan")

    @property
    def sqnr_db(self) -> float:
        """The lowest of any output."""
        return min((t.sqnr_db for t in self.outputs.values()), default=float("inf")) if self.finite else float("nan")

    @property
    def cosine(self) -> float:
        """The lowest of any output."""
        return min((t.cosine for t in self.outputs.values()), default=1.0) if self.finite else float("nan")

    @property
    def top1_agreement(self) -> float | None:
        """Share of rows of logits with the same first choice; None for a graph without logits."""
        return self.agreed / self.rows if self.rows else None

    def __str__(self) -> str:
        """The figures, worst output first: by what it must reach."""
        judged = self.min_sqnr_db is not None
        far = {n: (not t.finite, -t.sqnr_db if judged else t.excess) for n, t in self.outputs.items()}
        worst = max(far, key=lambda name: far[name], default=None)
        if worst is None:
            return f"{self.graph}: nothing was compared"
        if not self.finite:
            return f"{self.graph}: {worst} holds NaN or Inf"
        if judged:
            text = f"{self.graph}: {worst} reaches SQNR {self.sqnr_db:.1f} dB of {self.min_sqnr_db:.0f}, max abs "
            text += f"{self.max_abs:.3g}, cosine {self.cosine:.6f}"
        else:
            text = (
                f"{self.graph}: {worst} is {self.outputs[worst].excess:.3g} times the allowed difference off, max abs "
            )
            text += f"{self.max_abs:.3g}, SQNR {self.sqnr_db:.1f} dB, cosine {self.cosine:.6f}"
        return text if self.top1_agreement is None else text + f", top-1 agreement {self.top1_agreement:.4f}"


@dataclass(frozen=True)
class Question:
    """What a model is asked when it is verified: a prompt about pictures, which may be none."""

    prompt: str
    images: tuple[PictureSource, ...] = ()


def min_sqnr_db(scheme: str) -> float | None:
    """What outputs of a graph of `scheme` must reach in an engine; None where the tolerances of float32 apply."""
    parsed = Scheme.parse(scheme)
    return MIN_SQNR_DB if parsed.activation_bits < 32 or parsed.kv_bits is not None else None


def verify_graph(
    reference: Session, candidate: Session, feeds: Iterable[Mapping[str, Array]], min_sqnr_db: float | None = None
) -> Metrics:
    """Run both sessions on all `feeds` and compare every output."""
    pair = _Pair(reference, candidate, min_sqnr_db)
    for feed in feeds:
        pair.run(feed)
    return pair.metrics


def verify_model(
    reference: Mapping[str, Session],
    candidate: Mapping[str, Session],
    spec: ModelSpec,
    tokenizer: Tokenizer,
    embed_table: Array | EmbeddingTable,
    questions: Sequence[Question],
    tokens: int = 32,
    *,
    target: str = "onnx",
    against: str = "torch float32",
    min_sqnr_db: Mapping[str, float] | None = None,
    gate: bool = True,
) -> tuple[ParityRecord, ...]:
    """Compare the graphs `vision` and `decoder` on `questions`, `tokens` of greedy answer each; one record per graph.

    Besides the questions, both run on the inputs of their golden probe, which has a past and several rows of logits.
    Graphs named in `min_sqnr_db` are judged by that, and an answer may then differ; without `gate` nothing is judged.
    Raises ParityError that lists the figures if a graph is not within tolerance: such a graph is not shipped.
    """
    least = min_sqnr_db or {}
    pairs = {name: _Pair(reference[name], candidate[name], least.get(name)) for name in ("vision", "decoder")}
    for name, pair in pairs.items() if gate else ():
        pair.run(probe_feeds(reference[name].spec))
    logits = _Margins(pairs["decoder"])
    forced = VLM(spec, tokenizer, {"vision": pairs["vision"], "decoder": logits}, embed_table)
    free = VLM(spec, tokenizer, candidate, embed_table)
    divergences: list[_Divergence] = []
    for question in questions:
        logits.margins.clear()
        expected = _answer(forced, question, tokens)
        # the last run of a prefill chooses the first token, and the last token is not fed: one run per token
        margins = logits.margins[len(logits.margins) - len(expected) :]
        divergences += _divergence(expected, _answer(free, question, tokens), margins)
    failed = [str(pair.metrics) for pair in pairs.values() if not pair.metrics.passed]
    sure = [] if least else [d for d in divergences if d.margin > SURE_MARGIN]
    if sure:
        failed.append(
            f"decoder: {len(sure)} of {len(questions)} answers differ where the reference is sure, "
            f"first at token {min(d.token for d in sure)}"
        )
    texts = {name: INT8_TEXT if name in least else TOLERANCE_TEXT for name in pairs}
    if failed and gate:
        allowed = "; ".join(dict.fromkeys(texts.values()))
        raise ParityError(f"{target} does not compute what {against} computes: {'; '.join(failed)} ({allowed})")
    first = min((d.token for d in divergences), default=None)
    return tuple(
        ParityRecord(
            graph=name,
            target=target,
            against=against,
            max_abs=pair.metrics.max_abs,
            sqnr_db=pair.metrics.sqnr_db,
            cosine=pair.metrics.cosine,
            top1_agreement=pair.metrics.top1_agreement,
            first_divergent_token=first if name == "decoder" else None,
            pictures=sum(len(q.images) for q in questions),
            passed=True,
            tolerance=texts[name] if gate else NOT_JUDGED,
        )
        for name, pair in pairs.items()
    )


def make_probes(reference: Mapping[str, Session], folder: Path, int8: Collection[str] = ()) -> tuple[ProbeRecord, ...]:
    """Write `probe-<graph>.npz` into the existing `folder` for every graph: tiny inputs and what the reference makes
    of them. The decoder's has a past. Graphs in `int8` may differ more. Paths in the records are relative to `folder`.
    """
    records = []
    for name, session in reference.items():
        feeds = probe_feeds(session.spec)
        outputs = session.run(feeds)
        tolerance = max(_allowed(output, array, name in int8) for output, array in outputs.items())
        arrays = {f"in.{n}": a for n, a in feeds.items()} | {f"out.{n}": a for n, a in outputs.items()}
        path = folder / f"probe-{name}.npz"
        _save(path, arrays)
        records.append(ProbeRecord(name, path.name, tolerance))
    return tuple(records)


def probe_feeds(spec: GraphSpec) -> dict[str, Array]:
    """Small inputs of a fixed seed for the graphs `vision` and `decoder`, and floats for any other input.

    Position ids continue after the past, logits are asked of tokens from the first to the last, the last patches of a slice
    are padding. Patches are flat colours with grain, as pictures are, and position embeddings lie between -1 and 1, as
    sines do: an engine whose activations have fixed ranges is made for those.
    """
    sizes = {name: min(size, spec.dims[name].max) for name, size in PROBE_SIZES.items() if name in spec.dims}
    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = [d if isinstance(d, int) else sizes.get(d, spec.dims[d].min) for d in tensor.shape]
        feeds[tensor.name] = generator.standard_normal(shape).astype(tensor.dtype)
    past, tokens, patches = (sizes.get(name, 0) for name in ("past", "tokens", "patches"))
    if "logit_positions" in feeds:
        feeds["position_ids"] = np.arange(past, past + tokens)
        feeds["logit_positions"] = np.linspace(0, tokens - 1, sizes["rows"]).astype(np.int64)
    if "attention_bias" in feeds:
        feeds["position_ids"] = np.broadcast_to(np.arange(patches), feeds["position_ids"].shape).copy()
        *shape, strip = feeds["patches"].shape
        colours = np.repeat(generator.uniform(-0.9, 0.9, (*shape, 3)), strip // 3, axis=-1)
        feeds["patches"] = np.clip(colours + 0.05 * feeds["patches"], -1, 1).astype(np.float32)
        feeds["key_pos_embed"] = np.sin(3 * feeds["key_pos_embed"])
        feeds["attention_bias"][:] = 0.0
        feeds["key_bias"][:] = np.where(np.arange(patches) < patches - 2, 0.0, MASK)
    return feeds


@dataclass(frozen=True)
class _Divergence:
    """The first token of an answer that differs, and by how much the reference preferred its own."""

    token: int
    margin: float


def _divergence(expected: Sequence[int], got: Sequence[int], margins: Sequence[float]) -> list[_Divergence]:
    """Where `got` leaves `expected`, if it does. `margins` belong to the tokens of `expected`."""
    for i, margin in enumerate(margins):
        if i >= len(got) or got[i] != expected[i]:
            return [_Divergence(i, margin)]
    return []


def _answer(vlm: VLM, question: Question, tokens: int) -> tuple[int, ...]:
    result = vlm.generate(
        question.prompt,
        question.images,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=tokens,
        prompt_lookup_num_tokens=0,  # margins are counted by runs: one for each token
    )
    return result.token_ids


class _Pair:
    """A Session that answers with the reference's outputs, and compares the candidate's on the way."""

    def __init__(self, reference: Session, candidate: Session, min_sqnr_db: float | None = None) -> None:
        self.spec = reference.spec
        self.metrics = Metrics(reference.spec.name, min_sqnr_db)
        self._reference = reference
        self._candidate = candidate

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        expected = self._reference.run(feeds, out)
        self.metrics.add(expected, self._candidate.run(feeds))
        return expected

    def close(self) -> None:
        """Sessions are closed by who opened them."""


class _Margins:
    """A decoder Session that notes by how much the first choice leads the second, in the last row of each run."""

    def __init__(self, session: Session) -> None:
        self.spec = session.spec
        self.margins: list[float] = []
        self._session = session

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        outputs = self._session.run(feeds, out)
        second, first = np.partition(outputs["logits"][0, -1], -2)[-2:]
        self.margins.append(float(first - second))
        return outputs

    def close(self) -> None:
        """Sessions are closed by who opened them."""


def _allowed(output: str, array: Array, int8: bool) -> float:
    """The absolute difference that is allowed everywhere in `array`."""
    return allowed_of_noise(array) if int8 else TOLERANCES[output.partition(".")[0]] * _rms_above_1(array)


def allowed_of_noise(array: Array) -> float:
    """The absolute difference that an engine which rounds activations may have anywhere in `array`."""
    return INT8_PROBE * _rms_above_1(array)


def _rms_above_1(array: Array) -> float:
    values = array.astype(np.float64)
    return max(1.0, float(np.sqrt(np.mean(values * values))))


def _save(path: Path, arrays: Mapping[str, Array]) -> None:
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
