"""The backend `cuda`: its programs on the GPU if there is one, else in Triton's interpreter; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'lensc[cuda]'")
pytest.importorskip("triton", reason="pip install 'lensc[cuda]'")
pytest.importorskip("onnx_ir", reason="compiling needs onnx: pip install 'lensc[export]'")

from lensc.backends import _cuda_session, cuda
from lensc.backends._cuda_session import CudaDecoderSession
from lensc.backends._cuda_weights import FileSource
from lensc.backends._program_file import read
from lensc.backends.base import Artifact, Target
from lensc.backends.errors import ExecutionError, PromptError, UnavailableError, UnsupportedError, UsageError

Make = Callable[..., CudaDecoderSession]


@pytest.fixture
def make(small_decoder: Callable[[int], Any], tmp_path: Path, device: Any) -> Iterator[Make]:
    """Sessions of the small decoder, by bits and the types that are computed in and cached."""

    def made(bits: int, dtype: Any = torch.float32, kv_dtype: Any = None) -> CudaDecoderSession:
        small = small_decoder(bits)
        folder = tmp_path / f"{bits}"
        folder.mkdir(exist_ok=True)
        artifact = cuda.backend.compile(small.graph, Target("cuda", "gpu"), folder)
        program = read(tmp_path / artifact.files[0].path)
        source = FileSource(folder, program.files, device)
        return CudaDecoderSession(small.spec, program, source, dtype, kv_dtype)

    yield made


def feeds(embeds: np.ndarray, past: int) -> dict[str, np.ndarray]:
    tokens = embeds.shape[1]
    positions = np.arange(past, past + tokens)
    return {"inputs_embeds": embeds, "position_ids": positions, "logit_positions": np.arange(tokens)}


def db(found: np.ndarray, expected: np.ndarray) -> float:
    """SQNR of what was found."""
    noise = ((found.astype(np.float64) - expected) ** 2).sum()
    return float(10 * np.log10((expected**2).sum() / max(noise, 1e-300)))


@pytest.mark.parametrize(
    ("bits", "dtype", "kv_dtype", "least_db"),
    [
        (32, torch.float32, None, 100),
        (4, torch.float32, None, 60),
        (32, torch.bfloat16, None, 35),
        (4, torch.bfloat16, None, 35),
        (32, torch.float32, torch.int8, 35),
    ],
    ids=["f32", "int4-f32", "bf16", "int4-bf16", "f32-kv8"],
)
def test_steps_are_one_long_prompt(
    bits: int, dtype: Any, kv_dtype: Any, least_db: float, make: Make, small_decoder: Callable[[int], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A prefill, tokens, drafts of which some are taken back, more than the cache had room for: as if it was one."""
    monkeypatch.setattr(_cuda_session, "ROUNDED", 4)
    small = small_decoder(bits)
    session = make(bits, dtype, kv_dtype)
    embeds = small.embeddings(1, 16)
    expected = small.logits(embeds)
    cache = session.new_cache(11)
    assert cache.capacity == 12
    got, past = [], 0
    for tokens in (9, 1, 4, 3):
        if tokens == 4:  # what was saved goes on as if nothing had been
            saved, cache = cache.save(), session.new_cache(11)
            cache.restore(saved)
        logits = session.step(feeds(embeds[:, past : past + tokens], past), cache)["logits"]
        got.append(logits)
        if tokens == 4:  # of four drafts two are right
            cache.trim(past + 2)
            got[-1] = logits[:, :2]
            past -= 2
        past += tokens
        assert cache.length == past
    assert past == 15 and cache.capacity == 24
    found = np.concatenate(got, axis=1)
    assert db(found, expected[:, : found.shape[1]]) >= least_db
    again = session.new_cache(5)
    assert again.capacity == 12, "the room that the first cache left when it grew"
    assert db(session.step(feeds(embeds[:, :3], 0), again)["logits"], expected[:, :3]) >= least_db


def test_the_past_goes_in_and_the_new_rows_come_out(make: Make, small_decoder: Callable[[int], Any]) -> None:
    small, session = small_decoder(32), make(32)
    embeds = small.embeddings(2, 13)
    expected = small.logits(embeds)
    empty = np.zeros((0, 2, small.kv_heads, small.head_dim), np.float32)
    first = session.run(feeds(embeds[:, :9], 0) | {pair.input: empty for pair in session.spec.states})
    past = {pair.input: first[pair.output] for pair in session.spec.states}
    second = session.run(feeds(embeds[:, 9:], 9) | past)
    found = np.concatenate([first["logits"], second["logits"]], axis=1)
    assert db(found, expected) >= 100
    assert all(second[pair.output].shape[0] == 4 for pair in session.spec.states)


def test_beams_fork_and_change_places(make: Make, small_decoder: Callable[[int], Any]) -> None:
    small, session = small_decoder(32), make(32)
    embeds = small.embeddings(3, 12)
    embeds[:, :10] = embeds[:1, :10]
    one = session.new_cache(10)
    session.step(feeds(embeds[:1, :10], 0), one)
    three = one.fork(3)
    session.step(feeds(embeds[:, 10:11], 10), three)
    beams = np.array([2, 2, 0])
    three.reorder(beams, 10)
    last = session.step(feeds(embeds[:, 11:], 11), three)["logits"]
    moved = np.concatenate([embeds[beams, :11], embeds[:, 11:]], axis=1)
    assert db(last, small.logits(moved)[:, 11:]) >= 100


def test_a_context_that_is_full_is_refused(make: Make, small_decoder: Callable[[int], Any]) -> None:
    small, session = small_decoder(32), make(32)
    limit = session.spec.dims["past"].max
    cache = session.new_cache(limit)
    session.step(feeds(small.embeddings(1, limit), 0), cache)
    with pytest.raises(PromptError, match=rf"{limit + 1} tokens, the model's context has {limit}"):
        session.step(feeds(small.embeddings(1, 1), limit), cache)
    with pytest.raises(UsageError, match=rf"capacity {limit + 1}, expected 1 to {limit}"):
        session.new_cache(limit + 1)


@pytest.mark.parametrize(
    ("target", "scheme", "message"),
    [
        ("cuda:cpu", "f32", "runs on the gpu; expected cuda:gpu or cuda:gpu:bf16"),
        ("cuda:gpu:sm_90", "f32", "'sm_90' is not bf16; expected"),
        ("cuda:gpu", "w8a8-kv4", "keeps the KV cache in 8, 16 or 32 bits, not 4"),
    ],
)
def test_what_it_does_not_do_is_refused(
    target: str, scheme: str, message: str, small_decoder: Callable[[int], Any]
) -> None:
    reason = cuda.backend.supports(small_decoder(32).spec, scheme, Target.parse(target))
    assert reason is not None and message in reason


def test_the_manifest_says_how_it_computes(small_decoder: Callable[[int], Any], tmp_path: Path) -> None:
    def options(target: str) -> dict[str, str]:
        folder = tmp_path / target.replace(":", "-")
        folder.mkdir()
        return cuda.backend.compile(small_decoder(32).graph, Target.parse(target), folder).options

    assert options("cuda:gpu") == {"products": "float32", "stream": "float32", "kv_cache": "float32"}
    assert options("cuda:gpu:bf16") == {"products": "bfloat16", "stream": "float32", "kv_cache": "bfloat16"}
    with pytest.raises(UnsupportedError, match="expected cuda:gpu"):
        cuda.backend.compile(small_decoder(32).graph, Target("cuda", "cpu"), tmp_path)


def test_without_a_gpu_loading_says_what_is_missing(small_decoder: Callable[[int], Any], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (probe,) = cuda.backend.probe()
    assert not probe.usable and "libcuda.so.1" in probe.reason
    (tmp_path / "decoder").mkdir()
    small = small_decoder(32)
    artifact: Artifact = cuda.backend.compile(small.graph, Target("cuda", "gpu"), tmp_path / "decoder")
    with pytest.raises(UnavailableError, match="no NVIDIA driver"):
        cuda.backend.load(artifact, small.spec, tmp_path)


def test_a_gpu_that_is_too_small_says_what_is_needed(
    small_decoder: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "decoder").mkdir()
    small = small_decoder(32)
    artifact = cuda.backend.compile(small.graph, Target("cuda", "gpu"), tmp_path / "decoder")
    monkeypatch.setattr(cuda, "_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 2 << 30))
    with pytest.raises(UnavailableError, match=r"with 2 GiB to work in; 1\.0 of 2\.0 GiB are free here; .*int4"):
        cuda.backend.load(artifact, small.spec, tmp_path)


def test_what_torch_raises_is_our_error(make: Make, small_decoder: Callable[[int], Any]) -> None:
    """Whoever uses the session goes on elsewhere when the GPU has failed, and looks for this error."""
    session, embeds = make(32), small_decoder(32).embeddings(1, 4)
    cache = session.new_cache(11)
    for raised in (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), RuntimeError("CUDA error: lost")):

        def fails(*_: Any, _raised: Exception = raised, **__: Any) -> Any:
            raise _raised

        session._advance = fails  # type: ignore[method-assign]
        session._capture = fails  # type: ignore[method-assign]
        with pytest.raises(ExecutionError, match=r"^the GPU failed: CUDA (out of memory\. Tried to|error: lost)"):
            session.step(feeds(embeds, 0), cache)
    session.close()
