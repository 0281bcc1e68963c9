"""A small decoder on a Snapdragon's NPU, by emulation: what it computes, its cache, its parts, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime_qnn", reason="pip install 'lensc[qnn]'")
pytest.importorskip("onnx_ir", reason="pip install 'lensc[export]'")

from lensc.backends import _qnn_compile, _qnn_form
from lensc.backends import qnn as module
from lensc.backends.base import Array, Artifact, Session, Target
from lensc.backends.errors import CompatibilityError, ExecutionError, PromptError, UnavailableError, UsageError
from lensc.backends.qnn import backend
from lensc.export.graph import Graph

TARGET = Target("qnn", "npu", "sm8650")
CHUNK, CONTEXT = 16, 48
SCHEMES = {"f32": 32, "w8a16": 8, "w4a16-g32": 4}


@dataclasses.dataclass(frozen=True)
class Built:
    """A decoder of `tests/backends/conftest.py` that is compiled."""

    small: Any
    graph: Graph
    bundle: Path
    artifact: Artifact

    def load(self) -> Any:
        return backend.load(self.artifact, self.graph.spec, self.bundle)


def prompt(small: Any, tokens: int, past: int = 0, seed: int = 1, batch: int = 1) -> dict[str, Array]:
    """Feeds of `run`, with random rows of past."""
    generator = np.random.default_rng(seed)
    shape = (past, batch, small.kv_heads, small.head_dim)
    states = {pair.input: generator.standard_normal(shape).astype(np.float32) for pair in small.spec.states}
    embeds = small.embeddings(batch, tokens, seed)
    return {"inputs_embeds": embeds, "position_ids": np.arange(past, past + tokens), **states} | {
        "logit_positions": np.arange(tokens)
    }


@pytest.fixture(scope="module")
def built(small_decoder: Callable[[int], Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The decoder in a scheme for the Snapdragon 8 Gen 3, each once: 16 tokens at a time, a past of 48."""
    kept: dict[str, Built] = {}

    def build(scheme: str) -> Built:
        if scheme not in kept:
            folder = tmp_path_factory.mktemp(scheme)
            small = small_decoder(SCHEMES[scheme])
            graph = dataclasses.replace(small.graph, scheme=scheme, context=CONTEXT)
            if backend.needs_ranges(scheme):
                samples = [prompt(small, 40, seed=seed) for seed in range(4)] + [prompt(small, 20, 20, 5)]
                backend.measure_ranges(graph, samples, folder / "ranges.json")
                graph = dataclasses.replace(graph, ranges=folder / "ranges.json")
            out = folder / "bundle" / "decoder"
            out.mkdir(parents=True)
            kept[scheme] = Built(small, graph, folder / "bundle", backend.compile(graph, TARGET, out))
        return kept[scheme]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_qnn_form, "PREFILL_TOKENS", CHUNK)
        yield build


@pytest.fixture(scope="module")
def session(built: Callable[[str], Built]) -> Iterator[Any]:
    """The one with weights of 8 bits, loaded."""
    loaded = built("w8a16").load()
    yield loaded
    loaded.close()


def sqnr_db(got: Array, reference: Array) -> float:
    error = got.astype(np.float64) - reference
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / (error**2).sum()))


def step(session: Any, cache: Any, embeds: Array) -> Array:
    """Feed tokens behind those in `cache`; the logits of each, float32[batch, tokens, vocab]."""
    tokens = embeds.shape[1]
    positions = np.arange(cache.length, cache.length + tokens)
    feeds = {"inputs_embeds": embeds, "position_ids": positions, "logit_positions": np.arange(tokens)}
    return np.array(session.step(feeds, cache)["logits"])


# --- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "least_db"), [("f32", 50), ("w8a16", 55), ("w4a16-g32", 55)])
def test_prefill_in_chunks_and_single_tokens_give_the_definitions_logits(
    built: Callable[[str], Built], scheme: str, least_db: float
) -> None:
    one = built(scheme)
    loaded = one.load()
    try:
        embeds = one.small.embeddings(1, 24, seed=9)
        cache = loaded.new_cache(24)
        pieces = [embeds[:, :21], embeds[:, 21:22], embeds[:, 22:24]]  # two chunks, the single form, a padded chunk
        got = np.concatenate([step(loaded, cache, piece) for piece in pieces], axis=1)
        assert cache.length == 24
        assert sqnr_db(got, one.small.logits(embeds)) >= least_db
    finally:
        loaded.close()


def test_the_past_that_is_fed_counts_and_new_rows_come_back(session: Any, built: Callable[[str], Built]) -> None:
    small = built("w8a16").small
    embeds = small.embeddings(2, 15, seed=4)
    first = prompt(small, 9, batch=2) | {"inputs_embeds": embeds[:, :9]}
    rows = session.run(first)
    second = prompt(small, 6, 9, batch=2) | {"inputs_embeds": embeds[:, 9:]}
    second |= {pair.input: rows[pair.output] for pair in small.spec.states}
    assert sqnr_db(session.run(second)["logits"], small.logits(embeds)[:, 9:]) >= 50


def test_keys_and_values_are_integers_of_two_bytes(session: Any, built: Callable[[str], Built]) -> None:
    cache = session.new_cache(5, 2)
    small = built("w8a16").small
    assert cache.nbytes == 2 * 2 * small.layers * 2 * small.kv_heads * small.head_dim * CONTEXT


def test_the_cache_is_cut_forked_reordered_saved_and_restored(session: Any, built: Callable[[str], Built]) -> None:
    small = built("w8a16").small
    embeds = small.embeddings(1, 9, seed=2)
    cache = session.new_cache(20)
    whole = step(session, cache, embeds)
    cache.trim(5)
    again = step(session, cache, embeds[:, 5:])
    np.testing.assert_allclose(again, whole[:, 5:], atol=np.abs(whole).max() * 1e-3)

    restored = session.new_cache(20)
    restored.restore({name: array.copy() for name, array in cache.save().items()})
    beams = restored.fork(2)
    different = np.concatenate([small.embeddings(1, 1, seed) for seed in (5, 6)])
    step(session, beams, different)
    beams.reorder(np.array([1, 1]), 9)
    last = small.embeddings(1, 1, 7)
    got = step(session, beams, np.concatenate([last, last]))
    np.testing.assert_array_equal(got[0], got[1])
    expected = small.logits(np.concatenate([embeds, different[1:], last], axis=1))[:, -1]
    assert sqnr_db(got[0], expected) >= 50


def test_a_decoder_in_parts_computes_the_same(
    built: Callable[[str], Built], session: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = built("w8a16")
    monkeypatch.setattr(_qnn_compile, "PART_BYTES", 20_000)
    (tmp_path / "decoder").mkdir()
    artifact = backend.compile(one.graph, TARGET, tmp_path / "decoder")
    layout = json.loads((tmp_path / artifact.files[0].path).read_text())
    assert len(layout["parts"]) == len(layout["emulated"]) >= 2
    parts = backend.load(artifact, one.graph.spec, tmp_path)
    try:
        given = prompt(one.small, 7, 3)
        whole, cut = session.run(given), parts.run(given)
        for name, array in whole.items():
            # the compiler may order sums otherwise: a step of 16 bits here and there
            np.testing.assert_allclose(cut[name], array, atol=np.abs(array).max() * 1e-3, err_msg=name)
    finally:
        parts.close()


# --- what is compiled ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_node_of_both_forms_is_on_the_npu(built: Callable[[str], Built], scheme: str) -> None:
    one = built(scheme)
    assert list(one.artifact.placement) == ["QNNExecutionProvider"]
    [placement] = [record.path for record in one.artifact.files if record.path.endswith(".placement.json")]
    where = json.loads((one.bundle / placement).read_text())
    assert {name.partition("/")[0] for name in where} == {"prefill.0", "decode.0"}
    assert one.artifact.options["context"] == str(CONTEXT)


def test_prefill_and_decode_share_their_weights(tmp_path: Path, small_decoder: Callable[[int], Any]) -> None:
    """In one binary for devices; hosts that emulate cannot load that and have one for each."""
    import onnx
    from onnx import numpy_helper

    small = small_decoder(32)
    model = onnx.load(str(small.graph.path))
    [head] = [tensor for tensor in model.graph.initializer if tensor.name == "head"]
    # weights that outweigh everything else in a binary
    wide = np.random.default_rng(0).standard_normal((20000, small.width)).astype(np.float32)
    head.CopyFrom(numpy_helper.from_array(wide, "head"))
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = len(wide)
    onnx.save(model, str(tmp_path / "wide.onnx"))
    outputs = tuple(
        dataclasses.replace(t, shape=(*t.shape[:2], len(wide))) if t.name == "logits" else t for t in small.spec.outputs
    )
    spec = dataclasses.replace(small.spec, outputs=outputs)
    (tmp_path / "decoder").mkdir()
    graph = Graph(spec, tmp_path / "wide.onnx", "f32", "", context=CONTEXT)
    sizes = {Path(f.path).name: f.bytes for f in backend.compile(graph, TARGET, tmp_path / "decoder").files}
    shared = sum(size for name, size in sizes.items() if name.endswith(".bin") and ".emulated." not in name)
    apart = sum(size for name, size in sizes.items() if name.endswith(".bin") and ".emulated." in name)
    assert shared < 0.65 * apart


def test_a_decoder_too_large_to_be_emulated_has_no_binary_for_it(
    built: Callable[[str], Built], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = built("f32")
    monkeypatch.setattr(module, "EMULATED_GMACS_S", 1e-9)
    (tmp_path / "decoder").mkdir()
    artifact = backend.compile(one.graph, TARGET, tmp_path / "decoder")
    assert not [file for file in artifact.files if ".emulated." in file.path]
    with pytest.raises(UnavailableError, match=f"emulating {CHUNK} tokens would take .* run it on the device"):
        backend.load(artifact, one.graph.spec, tmp_path)


# --- what breaks --------------------------------------------------------------------------------------------------


def test_more_tokens_than_the_context_are_refused(session: Any, built: Callable[[str], Built]) -> None:
    small = built("w8a16").small
    cache = session.new_cache(CONTEXT)
    assert session.spec.dims["past"].max == CONTEXT
    cache.length = CONTEXT - 1
    with pytest.raises(PromptError, match=rf"compiled for a context of {CONTEXT}; .* --context"):
        step(session, cache, small.embeddings(1, 2))
    with pytest.raises(UsageError, match="capacity"):
        session.new_cache(CONTEXT + 1)


def test_a_cache_of_another_engine_is_refused(session: Any, built: Callable[[str], Built]) -> None:
    with pytest.raises(UsageError, match="not a cache of this session"):
        step(session, type("Other", (), {"length": 0, "batch": 1})(), built("w8a16").small.embeddings(1, 1))


def test_a_closed_session_says_so(built: Callable[[str], Built]) -> None:
    one = built("f32")
    loaded: Session = one.load()
    loaded.close()
    with pytest.raises(ExecutionError, match="closed"):
        loaded.run(prompt(one.small, 2))


@pytest.mark.parametrize(
    ("target", "scheme", "reason"),
    [
        ("qnn:npu:qcs6490", "w8a16", "Hexagon before v73 multiplies activations by 8 bits only: no decoder"),
        ("qnn:npu:sm8650", "w8a8", "takes a decoder with activations of 16 bits; the nearest is w8a16"),
    ],
)
def test_what_a_decoder_cannot_be_is_refused(
    small_decoder: Callable[[int], Any], target: str, scheme: str, reason: str
) -> None:
    assert reason in str(backend.supports(small_decoder(32).spec, scheme, Target.parse(target)))


def test_another_chips_binary_is_refused(built: Callable[[str], Built]) -> None:
    one = built("f32")
    renamed = dataclasses.replace(one.artifact, target=Target.parse("qnn:npu:sm8750"))
    with pytest.raises(CompatibilityError, match="chip sm8650, found sm8750"):
        backend.load(renamed, one.graph.spec, one.bundle)


@pytest.mark.parametrize("text", ["", "{}", '{"context": "many"}', "[1"])
def test_a_damaged_layout_is_one_error(built: Callable[[str], Built], tmp_path: Path, text: str) -> None:
    one = built("f32")
    path = tmp_path / one.artifact.files[0].path
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ExecutionError, match=r"no layout of a decoder: .*; build the bundle again"):
        backend.load(one.artifact, one.graph.spec, tmp_path)
