"""Pictures that are encoded beside the prompt: the same answer, what is wrong is said as without, and the timeline shows it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lensc.backends.base import Target
from lensc.backends.errors import ExecutionError, StorageError
from lensc.runtime.options import resolve
from lensc.runtime.overlap import decide
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import user_messages
from lensc.runtime.sequential import Turns, in_turn
from lensc.runtime.timeline import TRACKS, Span, Timeline

QUESTION = "What is it?"
WAIT_S = 20.0
"""The longest that a fake waits for the other; a test that gets there fails."""


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lensc.runtime.overlap.ROUND", 8)
    monkeypatch.setattr("lensc.runtime.decoder.LEAST_PIECE", 4)


def make(tiny: Any, overlap: bool | None, padding: Any = "official", meet: bool = True) -> tuple[VLM, Any, Any]:
    """A model with what it is made of. Where there is overlap and its graphs are to `meet`, the last slice of five is
    not ready before the decoder is running, and the first run of the decoder does not end before the last slice has begun.
    """
    started, last = threading.Event(), threading.Event()

    class Vision(tiny.FakeVision):  # type: ignore[misc]
        fails_at = 99

        def run(self, feeds: Any, out: Any = None) -> Any:
            if len(self.runs) == self.fails_at:
                raise ExecutionError("the vision engine broke")
            if overlap and meet and len(self.runs) == 4:
                last.set()
                assert started.wait(WAIT_S)
            return super().run(feeds, out)

    def begin() -> None:
        started.set()
        assert not (overlap and meet) or last.wait(WAIT_S)

    spec = dataclasses.replace(tiny.SPEC, picture=dataclasses.replace(tiny.SPEC.picture, vision_padding=padding))
    vision, decoder = Vision(), tiny.FakeDecoder()
    decoder.before_run = begin
    sessions = {"vision": vision, "decoder": decoder}
    return VLM(spec, tiny.TOKENIZER, sessions, tiny.TABLE, overlap=overlap), vision, decoder


def lensc_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lensc-vision")]


@pytest.mark.parametrize("padding", ["official", "masked", "per_slice"])
def test_the_answer_is_the_same(tiny: Any, padding: Any) -> None:
    """With slices of two sizes, of which "official" pads the shorter, and an answer before that is gone on with."""
    with_it, ahead, _ = make(tiny, True, padding)
    without, after, _ = make(tiny, None, padding)
    images = [tiny.picture(49, 28, 1), tiny.picture(56, 56, 2)]
    for prompt in (QUESTION, "And now?"):
        mine = with_it.generate(prompt, images, max_new_tokens=6)
        theirs = without.generate(prompt, images, max_new_tokens=6)
        assert mine.token_ids == theirs.token_ids
        assert mine.metrics.slices_from_cache == theirs.metrics.slices_from_cache
        assert mine.metrics.reused_tokens == theirs.metrics.reused_tokens
        assert (mine.metrics.overlap_ms > 0) == (prompt == QUESTION)
        assert theirs.metrics.overlap_ms == 0
    assert ahead.runs == after.runs and len(ahead.runs) == 8
    assert lensc_threads() == []
    beams = [vlm.generate("Else?", [tiny.picture(56, 56, 9)], num_beams=3).token_ids for vlm in (with_it, without)]
    assert beams[0] == beams[1]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_piece_is_fed_once_its_slices_are_there(tiny: Any, overlap: bool) -> None:
    """And with overlap no later: the first is fed before the fifth slice is there, without it behind the last."""
    vlm, _, _ = make(tiny, overlap)
    messages = user_messages(QUESTION, [tiny.picture(56, 56, 1), tiny.picture(56, 56, 2)])
    starts = vlm.prepare(messages).prompt.image_bounds[:, 0].tolist()
    generation = vlm.begin(vlm.prepare(messages), resolve(tiny.SPEC.generation, max_new_tokens=1))
    generation.prefill()
    spans = generation.timeline.spans
    slices = [s for s in spans if s.track == "vision"]
    pieces = [s for s in spans if s.track == "decoder"]
    assert len(slices) == 10 and len(pieces) > (5 if overlap else 1)
    assert (pieces[0].start_s < slices[4].end_s) == overlap
    assert overlap or pieces[0].start_s >= slices[-1].end_s
    for piece in pieces:
        end = int(piece.details["first"]) + int(piece.name.split()[1])
        assert all(s.end_s <= piece.start_s for s, start in zip(slices, starts, strict=True) if start < end)


def test_an_error_of_the_vision_engine_is_raised_as_it_is(tiny: Any) -> None:
    vlm, vision, decoder = make(tiny, True, meet=False)
    expected = make(tiny, False)[0].generate(QUESTION, [tiny.picture(56, 56)]).token_ids
    vision.fails_at = 4
    with pytest.raises(ExecutionError, match="the vision engine broke"):
        vlm.generate(QUESTION, [tiny.picture(56, 56)])
    assert decoder.tokens and set(decoder.tokens) == {8}, "the beginning was fed before that"
    assert lensc_threads() == []
    vision.fails_at = 99
    assert vlm.generate(QUESTION, [tiny.picture(56, 56)]).token_ids == expected


def test_an_error_of_the_decoder_ends_the_thread(tiny: Any) -> None:
    vlm, vision, decoder = make(tiny, True)

    def fail() -> None:
        raise ExecutionError("the decoder broke")

    begin = decoder.before_run
    decoder.before_run = lambda: (begin(), fail())
    with pytest.raises(ExecutionError, match="the decoder broke"):
        vlm.generate(QUESTION, [tiny.picture(56, 56), tiny.picture(56, 56, 1)])
    assert lensc_threads() == [] and len(vision.runs) < 10


def test_cancelling_stops_both(tiny: Any) -> None:
    """While a slice is encoded that nothing waits for, and while one is waited for: it is the last of them."""
    for stop_after in (0, 1):
        asked = threading.Event()
        vlm, vision, decoder = make(tiny, True, meet=False)
        run = vision.run

        def encode(feeds: Any, out: Any = None, vision: Any = vision, run: Any = run, asked: Any = asked) -> Any:
            if len(vision.runs) == 3:
                assert asked.wait(WAIT_S)
            return run(feeds, out)

        def stop(vision: Any = vision, decoder: Any = decoder, asked: Any = asked, after: int = stop_after) -> bool:
            if len(decoder.tokens) < after or len(vision.runs) < 3:
                return False
            asked.set()
            return True

        vision.run = encode
        images = [tiny.picture(56, 56), tiny.picture(56, 56, 1)]
        result = vlm.generate(QUESTION, images, should_stop=stop)
        assert result.finish_reason == "cancelled" and len(decoder.tokens) <= 4
        assert len(vision.runs) < 10 and lensc_threads() == []
        whole = make(tiny, False)[0].generate(QUESTION, images).token_ids
        assert vlm.generate(QUESTION, images).token_ids == whole, "it can be gone on with"


def test_no_thread_where_nothing_could_be_fed_before_the_last_slice(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, _, _ = make(tiny, True, meet=False)
    monkeypatch.setattr("lensc.runtime.overlap.ThreadPoolExecutor", None)
    assert vlm.generate(QUESTION, [tiny.picture()]).metrics.overlap_ms == 0
    assert vlm.generate(QUESTION).metrics.overlap_ms == 0
    with pytest.raises(TypeError):  # a thread would be asked for
        vlm.generate(QUESTION, [tiny.picture(56, 56)])


def plan_of(vision: str, decoder: str) -> Any:
    return {
        name: SimpleNamespace(effective=Target.parse(text)) for name, text in (("vision", vision), ("decoder", decoder))
    }


@pytest.mark.parametrize(
    ("plan", "turns", "wanted", "on", "reason"),
    [
        (("qnn:npu:sm8650", "native:cpu"), False, None, True, "vision is on qnn:npu:sm8650, the decoder on native:cpu"),
        (("qnn:npu:sm8650", "native:cpu"), False, False, False, "not wanted"),
        (("onnxruntime:cpu", "native:cpu"), False, None, False, "vision and decoder are both on the cpu"),
        (("onnxruntime:cpu", "native:cpu"), False, True, True, "both on the cpu; asked for"),
        (("onnxruntime:cpu", "cuda:gpu"), False, None, True, "the decoder on cuda:gpu"),
        (("qnn:npu:sm8650", "qnn:npu:sm8650"), False, None, False, "both on the npu"),
        (("qnn:npu:sm8650", "native:cpu"), True, True, False, "one graph at a time is loaded, to save memory"),
        (None, False, None, False, "not known"),
    ],
)  # fmt: skip
def test_the_rule(plan: Any, turns: bool, wanted: bool | None, on: bool, reason: str) -> None:
    found = decide(None if plan is None else plan_of(*plan), turns, wanted)
    assert found.on == on and reason in found.reason


def test_graphs_that_take_turns_do_not_overlap_and_say_so(tiny: Any) -> None:
    specs = {"vision": tiny.FakeVision.spec, "decoder": tiny.FakeDecoder().spec}
    turns = Turns(lambda name: tiny.FakeVision() if name == "vision" else tiny.FakeDecoder())
    vlm = VLM(tiny.SPEC, tiny.TOKENIZER, in_turn(turns, specs), tiny.TABLE, turns=turns, overlap=True)
    assert vlm.overlap.reason == "one graph at a time is loaded, to save memory"
    result = vlm.generate(QUESTION, [tiny.picture(56, 56)])
    assert result.metrics.overlap_ms == 0
    said = "pictures are not encoded beside the prompt: one graph at a time is loaded, to save memory"
    assert said in result.metrics.notes
    vlm._overlap = None  # unless it was asked for
    assert said not in vlm.generate(QUESTION, [tiny.picture(56, 56)]).metrics.notes
    assert [s.name for s in result.timeline.spans if s.name.startswith("load ")] == ["load decoder"]


# --- the timeline -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 1}], ids=["greedy", "beams", "drawn"]
)
@pytest.mark.parametrize("overlap", [True, False])
def test_spans_cover_the_time_and_do_not_overlap_on_a_track(tiny: Any, overlap: bool, options: Any) -> None:
    vlm, vision, decoder = make(tiny, overlap, meet=False)
    encode = vision.run
    vision.run = lambda *arguments: (time.sleep(0.002), encode(*arguments))[1]
    decoder.before_run = lambda: time.sleep(0.002)
    covered = 0.0
    for i in range(20):  # a machine that is busy elsewhere pauses anywhere
        images = [tiny.picture(56, 56, 2 * i), tiny.picture(28, 28, 2 * i + 1)]
        started = time.perf_counter()
        timeline = vlm.generate(QUESTION, images, **options).timeline
        ended = time.perf_counter()
        vlm.forget()
        check_tracks(timeline)
        spans = sorted(timeline.spans, key=lambda s: s.start_s)
        assert started <= spans[0].start_s and max(s.end_s for s in spans) <= ended
        covered = max(covered, covered_s(spans) / (ended - started))
        if covered > 0.9:
            break
    assert covered > 0.9


def check_tracks(timeline: Timeline) -> None:
    for track in TRACKS:
        mine = sorted((s.start_s, s.end_s, s.name) for s in timeline.spans if s.track == track)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(mine)), mine


def covered_s(spans: list[Any]) -> float:
    """Of spans in the order in which they begin."""
    covered, until = 0.0, 0.0
    for span in spans:
        covered += max(0.0, span.end_s - max(span.start_s, until))
        until = max(until, span.end_s)
    return covered


def test_every_step_has_a_span(tiny: Any) -> None:
    vlm, _, decoder = make(tiny, False)
    result = vlm.generate(QUESTION, [tiny.picture(56, 56)])
    names = [s.name for s in result.timeline.spans if s.track == "decoder"]
    assert len(names) == len(decoder.tokens)
    steps = [
        1 if n == "step" else 1 + int(n.split()[1]) if n.startswith("verify") else int(n.split()[1]) for n in names
    ]
    assert steps == decoder.tokens


def test_both_ms() -> None:
    timeline = Timeline()
    for track, start_s, end_s in (
        ("vision", 1, 3),
        ("vision", 4, 6),
        ("decoder", 2, 5),
        ("decoder", 7, 8),
        ("host", 0, 9),
    ):
        timeline.note(Span(track, "x", start_s, end_s))
    assert timeline.both_ms("vision", "decoder") == 2e3
    assert timeline.both_ms("decoder", "vision") == 2e3
    assert Timeline().both_ms("vision", "decoder") == 0


def test_the_trace_is_one_that_chrome_reads(tiny: Any, tmp_path: Path) -> None:
    """Its trace event format: https://chromium.googlesource.com/catapult/+/HEAD/tracing/docs, complete and metadata events."""
    vlm, _, _ = make(tiny, True)
    timeline = vlm.generate(QUESTION, [tiny.picture(56, 56)], max_new_tokens=3).timeline
    timeline.titles["vision"] = "vision on qnn:npu:sm8650"
    path = tmp_path / "trace.json"
    path.write_text("before")
    timeline.write(path)
    trace = json.loads(path.read_text())
    threads = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert threads == {0: "host", 1: "vision on qnn:npu:sm8650", 2: "decoder"}
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == len(timeline.spans)
    assert all(e["ts"] >= 0 and e["dur"] >= 0 and e["tid"] in threads and e["pid"] == 1 for e in spans)
    assert [e["ts"] for e in spans] == sorted(e["ts"] for e in spans)
    assert {"slice 1", "feed 8 tokens", "choose", "make the prompt"} <= {e["name"] for e in spans}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StorageError, match="not written: No such file"):
        timeline.write(tmp_path / "none" / "trace.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder: not written"):
        timeline.write(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "trace.json"]
