"""The backend `tensorrt` on a GPU with TensorRT: engines of every type against the portable graph. Never run so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lensc.backends import tensorrt

backend = tensorrt.backend
[PROBE] = backend.probe()
pytestmark = pytest.mark.skipif(not PROBE.usable, reason=f"tensorrt: {PROBE.reason}")

pytest.importorskip("torch", reason="graphs are traced with torch: pip install 'lensc[export]'")
ort = pytest.importorskip("onnxruntime", reason="pip install lensc")

from lensc.backends.base import Array, CachedSession, Session, Target
from lensc.backends.load_options import LoadOptions
from lensc.export.graph import Graph, GraphSpec
from lensc.export.quantize.recipe import PRESETS, Recipe

from .graph_feeds import feeds_of

CALLS = {"vision": ((3, 63), (1, 7), (12, 64)), "decoder": ((1, 70, 0), (1, 1, 9), (3, 2, 5))}

Graphs = Callable[[str, Recipe], tuple[GraphSpec, Path]]

CASES = [
    pytest.param("f32", "f32", "f32", 80.0, id="f32"),
    pytest.param("f32", "f32", "", 45.0, id="f16"),
    pytest.param("f32", "f32", "bf16", 30.0, id="bf16"),
    pytest.param("int4-g32", "w4a16-g32-s4", "", 45.0, id="int4"),
    pytest.param("int4-g32", "w4a16-g32-s4", "streamed", 45.0, id="int4-streamed"),
    pytest.param("int4-g32", "w4a16-g32-s4", "versions", 45.0, id="int4-versions"),
]
"""Recipe, scheme, words of the target, and the least SQNR in dB, as in test_tensorrt_lower.py; float32 sums in another order."""


def expected(model: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def sqnr_db(got: Array, reference: Array) -> float:
    noise = float(((reference.astype(np.float64) - got) ** 2).sum())
    return 10 * np.log10(float((reference.astype(np.float64) ** 2).sum()) / max(noise, 1e-300))


def opened(graph: Graph, words: str, folder: Path, **settings: str) -> Session:
    (folder / graph.spec.name).mkdir(exist_ok=True)
    artifact = backend.compile(graph, Target("tensorrt", "gpu", words), folder / graph.spec.name)
    return backend.load(artifact, graph.spec, folder, LoadOptions(engine=settings))


def check(session: Session, model: Path, least_db: float) -> None:
    """Every call three times: as it is, recorded, replayed."""
    for feeds in feeds_of(session.spec, CALLS):
        reference = expected(model, feeds)
        for _ in range(3):
            got = session.run(feeds)
            for name, value in reference.items():
                assert sqnr_db(got[name], value) > least_db, f"{name}: {sqnr_db(got[name], value):.1f} dB"
    session.close()


@pytest.mark.parametrize(("recipe", "scheme", "words", "least_db"), CASES)
@pytest.mark.parametrize("name", ("vision", "decoder"))
def test_an_engine_computes_what_the_portable_graph_does(
    name: str, recipe: str, scheme: str, words: str, least_db: float, graphs: Graphs, tmp_path: Path
) -> None:
    spec, model = graphs(name, PRESETS[recipe])
    check(opened(Graph(spec, model, scheme, ""), words, tmp_path), model, least_db)


def test_products_of_int8(graphs: Graphs, tmp_path: Path) -> None:
    spec, model = graphs("vision", PRESETS["w8a8-vision"])
    graph = Graph(spec, model, "w8a8", "")
    samples = [{k: v[:1] for k, v in feeds.items()} for feeds in feeds_of(spec, CALLS)]
    backend.measure_ranges(graph, samples, tmp_path / "ranges.json")
    check(opened(dataclasses.replace(graph, ranges=tmp_path / "ranges.json"), "", tmp_path), model, 18.0)


@pytest.mark.parametrize("cuda_graphs", ("on", "off"))
def test_tokens_one_by_one_are_the_prompt_at_once(cuda_graphs: str, graphs: Graphs, tmp_path: Path) -> None:
    """Past a bucket of columns, with a fork and a trim on the way; the cache is written in place."""
    spec, model = graphs("decoder", PRESETS["f32"])
    session = opened(Graph(spec, model, "f32", ""), "f32", tmp_path, cuda_graphs=cuda_graphs)
    assert isinstance(session, CachedSession)
    width = int(spec.input("inputs_embeds").shape[2])
    embeds = np.random.default_rng(0).standard_normal((1, 300, width), np.float32)

    def step(cache: Any, start: int, end: int) -> Array:
        feeds = {"position_ids": np.arange(start, end), "logit_positions": np.array([end - start - 1])}
        return session.step({**feeds, "inputs_embeds": embeds[:, start:end]}, cache)["logits"]

    whole = step(session.new_cache(300), 0, 300)
    cache = session.new_cache(300)
    step(cache, 0, 250)
    for token in range(250, 300):
        one = step(cache, token, token + 1)
    assert sqnr_db(one, whole) > 80
    cache.trim(280)
    forked = cache.fork(1)
    for token in range(280, 300):
        one = step(forked, token, token + 1)
    assert sqnr_db(one, whole) > 80
    session.close()
