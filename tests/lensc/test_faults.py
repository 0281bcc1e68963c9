"""Devices that answer wrongly, fail, hang and crash: at load, when they are timed, and in the middle of an answer.

The faults are put into real sessions. What is compared is the answer of an undisturbed run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lensc
from lensc.backends import registry
from lensc.backends.base import Artifact
from lensc.backends.bundle import load_manifest, write_manifest
from lensc.backends.errors import ExecutionError, LensError, ParityError, UsageError
from lensc.runtime import selftest
from lensc.runtime.pipeline import VLM

SCRIPT = Path(__file__).with_name("faulty.py")
faulty: Any = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("faulty", SCRIPT))  # type: ignore[arg-type]
sys.modules["faulty"] = faulty
spec.loader.exec_module(faulty)  # type: ignore[union-attr]

BACKENDS = ("onnxruntime", "native")
OTHER = {"onnxruntime": "native", "native": "onnxruntime", "openvino": "native"}
OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="pip install 'lensc[openvino]'")
QUESTION = "What can be read in the left part of it, and what in the right part? Say all of it, please, word for word."
HANGS_S = 0.2


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 60, 3), dtype=np.uint8))


PICTURES = [picture(1), picture(2)]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"prompt_lookup_num_tokens": 0},
    "guesses": {},
    "draw": {"do_sample": True, "seed": 5},
    "beams": {"num_beams": 3},
}


@pytest.fixture(scope="module")
def undisturbed(bundles: dict[str, Path]) -> Iterator[Callable[..., tuple[int, ...]]]:
    """The tokens of an answer where nothing fails."""
    with lensc.load(bundles["native"], placement="ranked", threads=1) as vlm:
        answers: dict[str, tuple[int, ...]] = {}

        def answer(way: str, images: int = 0, tokens: int = 12) -> tuple[int, ...]:
            key = f"{way} {images} {tokens}"
            if key not in answers:
                vlm.forget()
                found = vlm.generate(QUESTION, PICTURES[:images], max_new_tokens=tokens, **WAYS[way])
                answers[key] = found.token_ids
            return answers[key]

        yield answer


@pytest.fixture
def load(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., VLM]]:
    """A model, planned on the backend of the first of the faults, which it has."""
    opened: list[VLM] = []

    def opening(*faults: Any, **more: Any) -> VLM:
        monkeypatch.setattr(registry, "get", faulty.getter(*faults))
        limits = {f"{fault.backend}:cpu" for fault in faults if fault.kind == "hang"}

        def limit_s(artifact: Artifact, state: str) -> float:
            return HANGS_S if str(artifact.target) in limits else 60.0

        monkeypatch.setattr(selftest, "limit_s", limit_s)
        arguments = {"placement": "ranked", "threads": 1} | more
        opened.append(lensc.load(bundles[faults[0].backend], **arguments))
        return opened[-1]

    yield opening
    for vlm in opened:
        vlm.close()


def where(vlm: VLM) -> dict[str, str]:
    assert vlm.plan is not None
    return {p.graph: str(p.effective) for p in vlm.plan.placements}


# --- at load ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("graph", "kind"),
    [("vision", "zeros"), ("decoder", "nan"), ("vision", "before"), ("decoder", "raise"), ("vision", "hang")],
)
def test_a_wrong_answer_to_the_golden_probe_is_replaced(
    load: Callable[..., VLM], undisturbed: Callable[..., Any], backend: str, graph: str, kind: str
) -> None:
    vlm = load(faulty.Fault(graph, backend, kind))
    other = "decoder" if graph == "vision" else "vision"
    assert where(vlm) == {graph: f"{OTHER[backend]}:cpu", other: f"{backend}:cpu"}
    (event,) = vlm.events
    assert (event.kind, event.graph, event.target) == ("self-test", graph, f"{backend}:cpu")
    assert f"self-test failed: {graph} on {backend}:cpu" in event.text
    assert event.text.endswith(f"; {OTHER[backend]}:cpu takes its place")
    assert vlm.plan is not None and "self-test failed" in vlm.plan[graph].reason
    assert vlm.generate(QUESTION, max_new_tokens=12, **WAYS["greedy"]).token_ids == undisturbed("greedy")


@pytest.mark.parametrize("kind", ["zeros", "hang"])
@pytest.mark.parametrize(
    "arguments",
    [{"selftest": "error"}, {"target": "native:cpu"}, {"target": "vision=native:cpu"}],
    ids=["policy", "requested", "one requested"],
)
def test_it_is_an_error_by_policy_or_where_the_target_was_requested(
    load: Callable[..., VLM], kind: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ParityError, match="self-test failed: vision on native:cpu"):
        load(faulty.Fault("vision", "native", kind), **arguments)


def test_it_is_told_and_used_or_not_even_looked_at(load: Callable[..., VLM], tmp_path: Path) -> None:
    warned = load(faulty.Fault("vision", "native", "zeros"), selftest="warn")
    assert [e.kind for e in warned.events] == ["self-test"] and warned.events[0].text.endswith(
        "it is used all the same"
    )
    assert where(warned)["vision"] == "native:cpu"
    with pytest.raises(LensError, match="or it fails here"):
        load(faulty.Fault("vision", "native", "zeros"), selftest="warn", picture_cache_bytes=1 << 20)
    for off in ("off", False):
        assert load(faulty.Fault("vision", "native", "zeros"), selftest=off).events == ()


def test_a_probe_that_is_never_answered_is_not_used_all_the_same(load: Callable[..., VLM]) -> None:
    vlm = load(faulty.Fault("vision", "native", "hang"), selftest="warn")
    assert where(vlm)["vision"] == "onnxruntime:cpu"
    assert "the golden probe was not answered within" in vlm.events[0].text


def test_an_artifact_that_cannot_be_loaded_is_replaced_by_policy(
    load: Callable[..., VLM], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load(faulty.Fault("decoder", "native", "load"))
    assert where(vlm)["decoder"] == "onnxruntime:cpu"
    assert [(e.kind, e.text) for e in vlm.events] == [
        ("refused", "decoder on native:cpu: the device is busy; onnxruntime:cpu takes its place")
    ]
    with pytest.raises(ExecutionError, match="the device is busy"):
        load(faulty.Fault("decoder", "native", "load"), on_failure="error")
    monkeypatch.setattr(registry, "get", faulty.getter(faulty.Fault("decoder", "onnxruntime", "load")))
    with pytest.raises(ExecutionError, match=r"^the device is busy$"):
        lensc.load(bundle)


def test_where_no_candidate_is_right_all_are_named(load: Callable[..., VLM]) -> None:
    with pytest.raises(ParityError, match=r"vision on native:cpu: .*vision on onnxruntime:cpu: "):
        load(faulty.Fault("vision", "native", "zeros"), faulty.Fault("vision", "onnxruntime", "nan"))


@pytest.mark.parametrize(
    "argument", [{"selftest": "maybe"}, {"on_failure": "no"}, {"placement": "best"}, {"selftest": 2}]
)
def test_policies_that_there_are_not(bundles: dict[str, Path], argument: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected one of"):
        lensc.load(bundles["native"], **argument)


# --- in the middle of an answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["zeros", "nan", "before", "nothing", "raise"])
def test_a_decoder_that_fails_is_replaced_and_the_tokens_are_the_same(
    load: Callable[..., VLM], undisturbed: Callable[..., Any], backend: str, kind: str
) -> None:
    vlm = load(faulty.Fault("decoder", backend, kind, at=6))
    stream = vlm.generate(QUESTION, max_new_tokens=12, stream=True, **WAYS["greedy"])
    pieces = "".join(stream)
    result = stream.result
    assert result.token_ids == undisturbed("greedy") and pieces == result.text
    assert where(vlm) == {"vision": f"{backend}:cpu", "decoder": f"{OTHER[backend]}:cpu"}
    (event,) = vlm.events
    assert (event.kind, event.graph, event.target) == ("failed", "decoder", f"{backend}:cpu")
    assert result.metrics.events == (event,) and event.text in result.metrics.notes
    again = vlm.generate(QUESTION, max_new_tokens=12, **WAYS["greedy"])
    assert again.token_ids == result.token_ids and again.metrics.events == ()
    assert again.metrics.reused_tokens == again.metrics.prompt_tokens - 1, "what was fed again is remembered"


@pytest.mark.parametrize(
    ("way", "at", "backend"),
    [
        *((*how, backend) for how in [("draw", 7), ("beams", 3), ("beams", 5), ("greedy", 2)] for backend in BACKENDS),
        ("guesses", 5, "native"),
        pytest.param("guesses", 5, "openvino", marks=OPENVINO),
        pytest.param("beams", 5, "openvino", marks=OPENVINO),
    ],
)
def test_guesses_draws_and_beams_go_on(
    load: Callable[..., VLM], undisturbed: Callable[..., Any], backend: str, way: str, at: int
) -> None:
    vlm = load(faulty.Fault("decoder", backend, "raise", at=at))
    result = vlm.generate(QUESTION, max_new_tokens=12, **WAYS[way])
    assert result.token_ids == undisturbed(way)
    assert len(result.metrics.events) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["zeros", "nan", "before", "raise"])
def test_a_vision_graph_that_fails_is_replaced_and_what_it_encoded_is_kept(
    load: Callable[..., VLM], undisturbed: Callable[..., Any], backend: str, kind: str
) -> None:
    vlm = load(faulty.Fault("vision", backend, kind, at=3))  # the probe, a slice, and this one
    result = vlm.generate(QUESTION, PICTURES, max_new_tokens=12, **WAYS["greedy"])
    assert result.token_ids == undisturbed("greedy", 2)
    assert where(vlm) == {"vision": f"{OTHER[backend]}:cpu", "decoder": f"{backend}:cpu"}
    assert [(e.kind, e.graph) for e in result.metrics.events] == [("failed", "vision")]


@pytest.mark.parametrize(("graph", "at"), [("vision", 2), ("vision", 3), ("decoder", 2), ("decoder", 3)])
def test_what_fails_while_both_are_at_work_is_replaced(
    load: Callable[..., VLM], undisturbed: Callable[..., Any], graph: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are encoded beside the prompt; the first or second run of a graph behind its probe is the one that fails."""
    monkeypatch.setattr("lensc.runtime.overlap.ROUND", 1)
    vlm = load(faulty.Fault(graph, "native", "raise", at=at), overlap=True)
    result = vlm.generate(QUESTION, PICTURES, max_new_tokens=12, **WAYS["greedy"])
    assert result.token_ids == undisturbed("greedy", 2)
    assert [(e.kind, e.graph) for e in result.metrics.events] == [("failed", graph)]
    assert len([s for s in result.timeline.spans if s.track == "vision"]) == len(result.metrics.image_ms) == 2
    fed = next(s.name for s in result.timeline.spans if s.name.startswith("feed"))
    # where no piece was fed before all was encoded, it is as without overlap
    assert fed == ("feed 128 tokens" if (graph, at) == ("decoder", 2) else "feed 98 tokens")


def test_pictures_are_encoded_anew_only_if_they_are_forgotten(
    load: Callable[..., VLM], undisturbed: Callable[..., Any]
) -> None:
    for forgotten in (False, True):
        vlm = load(faulty.Fault("decoder", "native", "raise", at=8), faulty.Fault("vision", "native", "none", at=99))
        vlm.generate(QUESTION, PICTURES, max_new_tokens=4, **WAYS["greedy"])
        if forgotten:
            vlm._vision.forget()
        # its prompt is in the KV cache, which goes with the device
        result = vlm.generate(QUESTION, PICTURES, max_new_tokens=12, **WAYS["greedy"])
        assert result.token_ids == undisturbed("greedy", 2)
        assert [e.graph for e in result.metrics.events] == ["decoder"]


@pytest.mark.parametrize("arguments", [{"on_failure": "error"}, {"target": "native:cpu"}], ids=["policy", "requested"])
def test_a_failure_is_an_error_by_policy_or_where_the_target_was_requested(
    load: Callable[..., VLM], arguments: dict[str, Any]
) -> None:
    for graph, at in (("decoder", 4), ("vision", 2)):
        vlm = load(faulty.Fault(graph, "native", "raise", at=at), **arguments)
        with pytest.raises(ExecutionError, match="the device was lost") as raised:
            vlm.generate(QUESTION, PICTURES[:1], max_new_tokens=12)
        assert type(raised.value) is ExecutionError
        assert where(vlm)[graph] == "native:cpu" and vlm.events == ()


def test_where_the_last_candidate_fails_its_failure_is_the_error(load: Callable[..., VLM]) -> None:
    vlm = load(faulty.Fault("decoder", "native", "raise", at=6), faulty.Fault("decoder", "onnxruntime", "nan", at=3))
    with pytest.raises(ExecutionError, match="decoder: logits hold nan"):
        vlm.generate(QUESTION, max_new_tokens=12)
    assert [(e.kind, e.target) for e in vlm.events] == [("failed", "native:cpu")]
    broken = load(faulty.Fault("decoder", "native", "raise", at=6), faulty.Fault("decoder", "onnxruntime", "zeros"))
    for begins in ("nothing runs on this machine", "decoder has failed and nothing takes its place"):
        with pytest.raises(
            LensError, match=rf"^{begins}.*native:cpu: the device was lost; onnxruntime:cpu: self-test failed"
        ):
            broken.generate(QUESTION, max_new_tokens=12)


def test_two_streams_read_in_turns_both_go_on(load: Callable[..., VLM], undisturbed: Callable[..., Any]) -> None:
    vlm = load(faulty.Fault("decoder", "native", "raise", at=9))
    streams = [vlm.generate(QUESTION, max_new_tokens=12, stream=True, **WAYS["greedy"]) for _ in range(2)]
    for _ in zip(*streams, strict=False):
        pass
    for stream in streams:
        for _ in stream:
            pass
        assert stream.result.token_ids == undisturbed("greedy")
    assert len(vlm.events) == 1, "the second finds what the first had loaded"


@pytest.mark.parametrize(("graph", "at"), [("decoder", 5), ("vision", 3)])
def test_graphs_that_take_turns_are_replaced_too(
    load: Callable[..., VLM], undisturbed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, graph: str, at: int
) -> None:
    monkeypatch.setattr("lensc.runtime.sequential.WORK_BYTES", 1000)
    # probes of graphs that are loaded again are runs, too
    vlm = load(faulty.Fault(graph, "native", "raise", at=at), max_memory_bytes=13_000_000)
    assert vlm._turns is not None
    result = vlm.generate(QUESTION, PICTURES, max_new_tokens=12, **WAYS["greedy"])
    assert result.token_ids == undisturbed("greedy", 2)
    assert where(vlm)[graph] == "onnxruntime:cpu"
    assert [(e.kind, e.graph) for e in result.metrics.events] == [("failed", graph)]


def test_a_conversation_belongs_to_the_device_that_finished_it(
    load: Callable[..., VLM], bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vlm = load(faulty.Fault("decoder", "native", "raise", at=6))
    asked = [{"role": "user", "content": QUESTION}]
    said = [*asked, {"role": "assistant", "content": vlm.chat(asked, max_new_tokens=12).text}]
    assert vlm.save(tmp_path / "talk", said) > 0
    assert vlm.restore(tmp_path / "talk").cached_tokens > 0
    monkeypatch.setattr(registry, "get", faulty.REAL)
    with lensc.load(bundles["native"], target="onnxruntime:cpu") as same:
        assert same.restore(tmp_path / "talk").cached_tokens > 0
    with lensc.load(bundles["native"], target="native:cpu") as other:
        restored = other.restore(tmp_path / "talk")
        assert restored.cached_tokens == 0 and "on onnxruntime:cpu" in restored.notes[0]


def test_a_chat_says_what_was_replaced(
    load: Callable[..., VLM], bundles: dict[str, Path], cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "get", faulty.getter(faulty.Fault("decoder", "native", "raise", at=6)))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    shown = cli("chat", bundles["native"], "--placement", "ranked", "--max-new-tokens", 12)
    lines = [line for line in shown.err.splitlines() if "the answer was cut off after 12 tokens" not in line]
    assert (shown.code, lines) == (
        0, ["note: decoder on native:cpu: the device was lost; onnxruntime:cpu takes its place"]
    )  # fmt: skip


def test_a_picture_cache_keeps_only_what_was_judged(
    load: Callable[..., VLM], bundles: dict[str, Path], undisturbed: Callable[..., Any], cache: Path
) -> None:
    pictures = cache.with_name("pictures")
    manifest = load_manifest(bundles["native"])
    (record,) = (r for r in manifest.parity if r.graph == "vision")
    for targets in (["native:cpu", "onnxruntime:cpu"], ["native:cpu"]):
        judged = tuple(dataclasses.replace(record, target=target) for target in targets)
        write_manifest(bundles["native"], dataclasses.replace(manifest, parity=judged))
        try:
            vlm = load(faulty.Fault("vision", "native", "raise", at=3), picture_cache_bytes=1 << 20)
            result = vlm.generate(QUESTION, PICTURES, max_new_tokens=12, **WAYS["greedy"])
        finally:
            write_manifest(bundles["native"], manifest)
        assert result.token_ids == undisturbed("greedy", 2)
        said = [n for n in result.metrics.notes if n.startswith("picture cache: vision was not judged")]
        assert (len(list(pictures.iterdir())), len(said)) == ((2, 0) if len(targets) == 2 else (1, 1))
        shutil.rmtree(pictures)
