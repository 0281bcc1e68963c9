"""Sessions and KV cache of the backend `tensorrt`, without TensorRT: the graph that it is given is run by ONNX Runtime in the
host's memory, where caches are updated in place as a KVCacheUpdate does. What a session computes is held against the portable
graph, and everything it asks of memory is checked: bounds, what was freed, what was never written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnx", reason="the graph is made with onnx: pip install 'lensc[export]'")
ort = pytest.importorskip("onnxruntime", reason="pip install lensc")

from lensc.backends._tensorrt_cache import TensorRTCache, as_float32, stored
from lensc.backends._tensorrt_lower import write_lowered
from lensc.backends._tensorrt_session import Placed, TensorRTDecoderSession, TensorRTSession, pieces
from lensc.backends._tensorrt_target import Half, Profile, engine_spec, present_name, profiles
from lensc.backends.base import Array, CachedSession
from lensc.backends.errors import ExecutionError, PromptError, UsageError
from lensc.export.graph import GraphSpec

SmallDecoder = Any
"""That of conftest.py."""

ATOL: dict[Half, float] = {"float32": 2e-5, "float16": 2e-2}
FREED = 0xA5
"""What memory holds that was not written: read as a float of any type it is a number, and wrong."""


class HostMemory:
    """See `Device`: memory of the host, each block with its bounds."""

    def __init__(self) -> None:
        self.blocks: dict[int, npt.NDArray[np.uint8]] = {}
        self._host: list[npt.NDArray[np.uint8]] = []

    def allocate(self, nbytes: int) -> int:
        block = np.full(nbytes, FREED, np.uint8)
        self.blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        self.blocks.pop(address)[:] = FREED

    def clear(self, address: int, nbytes: int) -> None:
        self.view(address, nbytes)[:] = 0

    def copy(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        assert width <= to_pitch and width <= source_pitch
        for address, pitch in ((to, to_pitch), (source, source_pitch)):
            if self.holds(address):
                self.view(address, pitch * (rows - 1) + width if rows else 0)
        for row in range(rows):
            ctypes.memmove(to + row * to_pitch, source + row * source_pitch, width)

    def wait(self) -> None:
        pass

    def host_bytes(self, nbytes: int) -> npt.NDArray[np.uint8]:
        self._host.append(np.full(nbytes, FREED, np.uint8))
        return self._host[-1]

    def holds(self, address: int) -> bool:
        """Whether it is the device's."""
        return any(start <= address < start + len(block) for start, block in self.blocks.items())

    def view(self, address: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """The bytes there, which must be of one block."""
        for start, block in self.blocks.items():
            if start <= address and address + nbytes <= start + len(block):
                return block[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address} are of no block")


class OrtEngine:
    """See `Engine`: the lowered graph in ONNX Runtime. Keeps which profile each run was of."""

    def __init__(self, path: Path, spec: GraphSpec, half: Half) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns that it copies caches
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._spec, self._own, self._profiles = spec, engine_spec(spec, half), profiles(spec)
        self.device = HostMemory()
        self.used: list[str] = []
        self.is_closed = False

    def run(self, profile: int, inputs: Mapping[str, Placed], outputs: Mapping[str, Placed]) -> None:
        assert set(inputs) == {t.name for t in self._own.inputs}
        assert set(outputs) == {t.name for t in self._own.outputs}
        chosen = self._profiles[profile]
        for tensor in self._own.inputs:
            low, _, high = chosen.shapes(tensor)
            shape = inputs[tensor.name][1]
            assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)), (chosen.name, tensor, shape)
        self.used.append(chosen.name)
        fed = {t.name: self._array(t.dtype, inputs[t.name]) for t in self._own.inputs}
        made = self._session.run([t.name for t in self._own.outputs], {n: a.copy() for n, a in fed.items()})
        for pair in self._spec.states:
            assert inputs[pair.input] == outputs[present_name(pair.input)], "in place"
        for tensor, array in zip(self._own.outputs, made, strict=True):
            self._array(tensor.dtype, outputs[tensor.name])[:] = array

    def close(self) -> None:
        self.is_closed = True

    def _array(self, dtype: str, placed: Placed) -> Array:
        address, shape = placed
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.device.view(address, nbytes).view(dtype).reshape(shape)


Opened = tuple[TensorRTDecoderSession, OrtEngine, SmallDecoder]


@pytest.fixture(params=["float32", "float16"])
def opened(
    request: pytest.FixtureRequest, small_decoder: Callable[[int], SmallDecoder], lowered: Callable[[Half], Path]
) -> Iterator[Opened]:
    half: Half = request.param
    small = small_decoder(4)
    engine = OrtEngine(lowered(half), small.spec, half)
    session = TensorRTDecoderSession(small.spec, engine, half)
    yield session, engine, small
    session.close()
    assert engine.is_closed


@pytest.fixture(scope="module")
def lowered(
    small_decoder: Callable[[int], SmallDecoder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Half], Path]:
    """The decoder of conftest.py with int4 weights, as TensorRT is given it."""
    made: dict[Half, Path] = {}

    def get(half: Half) -> Path:
        if half not in made:
            made[half] = tmp_path_factory.mktemp("lowered") / "decoder.onnx"
            write_lowered(small_decoder(4).graph, made[half], half)
        return made[half]

    return get


def step(session: TensorRTDecoderSession, cache: TensorRTCache, embeds: Array, rows: Array | None = None) -> Array:
    """The logits of `rows`, of the last of `embeds` unless given."""
    tokens = embeds.shape[1]
    feeds = {
        "inputs_embeds": embeds,
        "position_ids": np.arange(cache.length, cache.length + tokens),
        "logit_positions": np.array([tokens - 1]) if rows is None else rows,
    }
    return session.step(feeds, cache)["logits"]


def check(session: TensorRTDecoderSession, got: Array, expected: Array) -> None:
    np.testing.assert_allclose(got, expected, atol=ATOL[session._half])


# --- what it computes ---------------------------------------------------------------------------------------------


def test_prompt_and_tokens_give_the_logits_of_the_whole(opened: Opened) -> None:
    """A prompt in the profile for prompts, then tokens, one and several at a time, in the other."""
    session, engine, small = opened
    assert isinstance(session, CachedSession)
    embeds = small.embeddings(2, 40)
    expected = small.logits(embeds)
    cache = session.new_cache(8, 2)
    check(session, step(session, cache, embeds[:, :30], np.array([29, 3])), expected[:, [29, 3]])
    for start, end in ((30, 31), (31, 36), (36, 37), (37, 40)):
        check(session, step(session, cache, embeds[:, start:end])[:, 0], expected[:, end - 1])
    assert cache.length == 40 and engine.used == ["prefill", "decode", "decode", "decode", "decode"]


@pytest.mark.parametrize(("batch", "tokens", "past"), [(1, 7, 0), (3, 1, 9), (2, 20, 5)])
def test_run_takes_the_past_and_gives_new_rows(opened: Opened, batch: int, tokens: int, past: int) -> None:
    session, _, small = opened
    embeds = small.embeddings(batch, past + tokens)
    states = {p.input: np.zeros((0, batch, small.kv_heads, small.head_dim), np.float32) for p in small.spec.states}
    whole = {"inputs_embeds": embeds, "position_ids": np.arange(past + tokens)}
    expected = session.run({**whole, **states, "logit_positions": np.arange(past + tokens)})
    check(session, expected["logits"], small.logits(embeds))
    feeds = {"inputs_embeds": embeds[:, past:], "position_ids": np.arange(past, past + tokens)}
    states = {p.input: expected[p.output][:past] for p in small.spec.states}
    got = session.run({**feeds, **states, "logit_positions": np.arange(tokens)})
    for name, array in got.items():
        assert array.dtype == np.float32
        check(session, array, expected[name][:, past:] if name == "logits" else expected[name][past:])


def test_a_cache_holds_what_it_should(opened: Opened) -> None:
    """Trimmed, forked, reordered, saved and restored: each time as if only those tokens had been fed."""
    session, _, small = opened
    embeds = small.embeddings(3, 20)
    cache = session.new_cache(20)
    step(session, cache, embeds[:1, :12])
    assert cache.used_bytes == cache.nbytes // small.limit * 12
    cache.trim(9)
    beams = cache.fork(3)
    assert beams.batch == 3 and beams.length == 9
    shared = np.concatenate([embeds[[0, 0, 0], :9], embeds[:, 9:]], 1)
    check(session, step(session, beams, shared[:, 9:14])[:, 0], small.logits(shared[:, :14])[:, -1])
    beams.reorder(np.array([2, 1, 2]), 9)
    moved = shared[[2, 1, 2]]
    moved[:, 14:] = embeds[:, 14:]
    check(session, step(session, beams, moved[:, 14:16])[:, 0], small.logits(moved[:, :16])[:, -1])
    saved = {name: array.copy() for name, array in beams.save().items()}
    assert all(array.shape == (3, small.kv_heads, 16, small.head_dim) for array in saved.values())
    other = session.new_cache(1, 3)
    other.restore(saved)
    check(session, step(session, other, moved[:, 16:])[:, 0], small.logits(moved)[:, -1])
    with pytest.raises(UsageError, match=r"these are not its tokens: no past_key\.0"):
        other.restore({name: array for name, array in saved.items() if name != "past_key.0"})
    with pytest.raises(UsageError, match="cannot fork a batch of 3"):
        other.fork(2)


def test_more_rows_than_an_engine_takes_are_run_in_pieces(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    session, engine, small = opened
    embeds = small.embeddings(1, 30)
    small_profile = Profile("prefill", {**session._profiles[-1].sizes, "tokens": (1, 1, 12), "rows": (1, 1, 5)}, False)
    session._profiles = (session._profiles[0], small_profile)
    rows = np.array([29, 0, 1, 2, 3, 4, 5, 6, 28, 28, 0])
    cache = session.new_cache(30)
    check(session, step(session, cache, embeds, rows), small.logits(embeds)[:, rows])
    assert len(engine.used) == 4 and cache.length == 30


# --- what is asked of memory --------------------------------------------------------------------------------------


def test_all_memory_is_given_back(opened: Opened) -> None:
    session, engine, small = opened
    held = len(engine.device.blocks)
    cache = session.new_cache(5)
    step(session, cache, small.embeddings(1, 5))
    forked = cache.fork(2)
    del cache, forked
    used = len(engine.device.blocks)
    places = set()
    for tokens in (20, 3, 9, 20):
        other = session.new_cache(30)
        places.add(other.address(0))
        step(session, other, small.embeddings(1, tokens))
        del other
    assert len(places) == 1, "graphs that point into a cache serve the next one"
    assert len(engine.device.blocks) == used == held + 6, "buffers are used again, grown where they must"
    last = session.new_cache(1)
    session.close()
    assert len(engine.device.blocks) == 1, "of the cache that is still held"
    del last
    assert not engine.device.blocks
    with pytest.raises(ExecutionError, match="the session is closed"):
        session.new_cache(1)


def test_what_was_never_written_is_zero(opened: Opened) -> None:
    """Behind a mask anything would do but NaN, which an attention would spread."""
    session, engine, _ = opened
    cache = session.new_cache(1)
    [block] = [b for b in engine.device.blocks.values() if len(b) == cache.nbytes]
    assert not block.any()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_full_context_is_said(opened: Opened) -> None:
    session, _, small = opened
    cache = session.new_cache(10)
    step(session, cache, small.embeddings(1, 60))
    with pytest.raises(PromptError, match=r"65 tokens do not fit: context_length is 64"):
        step(session, cache, small.embeddings(1, 5))
    check(session, step(session, cache, small.embeddings(1, 64)[:, 60:]), small.logits(small.embeddings(1, 64))[:, -1:])


def test_wrong_feeds_and_caches_are_refused(opened: Opened, small_decoder: Callable[[int], SmallDecoder]) -> None:
    session, _, small = opened
    embeds = small.embeddings(1, 4)
    with pytest.raises(UsageError, match="KV cache: batch 9, backend tensorrt takes at most 4"):
        session.new_cache(1, 9)
    cache = session.new_cache(10)
    feeds = {"inputs_embeds": embeds, "position_ids": np.arange(1, 5), "logit_positions": np.array([0])}
    with pytest.raises(UsageError, match=r"position_ids \[1, 2, 3, 4\], expected 0 to 3"):
        session.step(feeds, cache)
    with pytest.raises(UsageError, match="logit_positions has 4, expected 0 to 3"):
        session.step({**feeds, "position_ids": np.arange(4), "logit_positions": np.array([4])}, cache)
    with pytest.raises(UsageError, match="HostMemory is not a cache of this session"):
        session.step(feeds, HostMemory())  # type: ignore[arg-type]
    assert cache.length == 0


def test_pieces_cover_every_token_and_row_once() -> None:
    profile = Profile("p", {"tokens": (1, 1, 100), "rows": (1, 1, 7)}, False)
    generator = np.random.default_rng(0)
    for tokens in (1, 99, 100, 101, 350):
        positions = np.sort(generator.integers(0, tokens, 23)) if tokens > 1 else np.zeros(7, np.int64)
        found = list(pieces(positions, tokens, profile))
        assert [start for start, _, _ in found] == [0, *(end for _, end, _ in found)][: len(found)]
        assert found[-1][1] == tokens and all(end - start <= 100 and len(rows) <= 7 for start, end, rows in found)
        assert sorted(int(i) for _, _, rows in found for i in rows) == list(range(len(positions)))
    assert [len(rows) for _, _, rows in pieces(np.zeros(0, np.int64), 5, profile)] == [0]
    with pytest.raises(UsageError, match="logit_positions: 8 times 2, expected at most 7 times"):
        list(pieces(np.full(8, 2), 3, profile))


# --- a graph without state ----------------------------------------------------------------------------------------


def test_slices_are_run_in_pieces(small_mlp: Any, tmp_path: Path) -> None:
    from lensc.export.graph import Graph

    spec = small_mlp.spec
    write_lowered(Graph(spec, small_mlp.path, "w8a32", ""), tmp_path / "vision.onnx", "float32")
    engine = OrtEngine(tmp_path / "vision.onnx", spec, "float32")
    session = TensorRTSession(spec, engine)
    one = Profile("slice", {"slices": (1, 1, 1), "patches": (1, 10, 12)}, True)
    many = Profile("slices", {"slices": (2, 4, 4), "patches": (1, 10, 12)}, True)
    large = Profile("any slice", {"slices": (1, 1, 1), "patches": (1, 12, 30)}, False)
    session._profiles = engine._profiles = (one, many, large)
    generator = np.random.default_rng(0)
    for slices, patches, runs in (
        (9, 10, ["slices", "slices", "slice"]),
        (6, 10, ["slices", "slices"]),
        (3, 30, ["any slice"] * 3),
        (1, 1, ["slice"]),
    ):
        engine.used.clear()
        fed = generator.standard_normal((slices, patches, small_mlp.width)).astype(np.float32)
        out = np.empty((slices, patches, 64), np.float32)
        made = session.run({"patches": fed}, {"made": out})["made"]
        assert made is out and engine.used == runs
        np.testing.assert_allclose(made, small_mlp.made(fed), atol=2e-4)
    with pytest.raises(UsageError, match="31 patches, expected at most 30"):
        session.run({"patches": np.zeros((1, 31, small_mlp.width), np.float32)})
    session.close()
    assert engine.is_closed and not engine.device.blocks
    with pytest.raises(ExecutionError, match="the session is closed"):
        session.run({"patches": fed})


# --- types --------------------------------------------------------------------------------------------------------


def test_bfloat16_rounds_to_the_nearest() -> None:
    torch = pytest.importorskip("torch", reason="it knows bfloat16: pip install 'lensc[export]'")
    values = np.concatenate(
        [np.random.default_rng(0).standard_normal(1000), [0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 3e38]]
    ).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    bits = stored(values, "bfloat16")
    np.testing.assert_array_equal(bits, expected.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(as_float32(bits, "bfloat16"), expected.float().numpy())
