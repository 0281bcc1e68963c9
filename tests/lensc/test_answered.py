"""The golden probe of a decoder: whole until it was right here once, then its first tokens; wrong ones are found either way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import lensc
from lensc.backends import registry
from lensc.backends.base import Array
from lensc.backends.errors import ParityError
from lensc.profiles import probe
from lensc.runtime import answered

SAID = f"of its golden probe {answered.FIRST_TOKENS} tokens, the whole was right here before"
WHOLE = 9


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lensc" / "answered"


class Watched:
    """A decoder that counts the tokens of its runs, and adds `error` to what it says of tokens from `late` on."""

    def __init__(self, session: Any, seen: list[int], late: int | None, error: float) -> None:
        self._session, self._seen, self._late, self._error = session, seen, late, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self._seen.append(len(feeds["position_ids"]))
        outputs: dict[str, Array] = self._session.run(feeds)
        if self._late is not None:
            for name, array in outputs.items():
                (array[:, self._late :] if name == "logits" else array[self._late :])[...] += self._error
        return outputs


@pytest.fixture
def load(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, list[int]]]:
    """Load the bundle; return why its decoder is where it is, and the tokens of each probe."""
    real = registry.get

    def loaded(late: int | None = None, error: float = 1.0, **arguments: Any) -> tuple[str, list[int]]:
        seen: list[int] = []

        class Backend:
            def __init__(self, name: str) -> None:
                self._real = real(name)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._real, name)

            def load(self, artifact: Any, spec: Any, *more: Any) -> Any:
                session = self._real.load(artifact, spec, *more)
                return Watched(session, seen, late, error) if artifact.graph == "decoder" else session

        monkeypatch.setattr(registry, "get", Backend)
        with lensc.load(bundle, threads=1, **arguments) as vlm:
            assert vlm.plan is not None
            return vlm.plan["decoder"].reason, seen

    return loaded


def test_the_whole_is_asked_for_until_it_was_right_once(load: Callable[..., Any], kept: Path) -> None:
    reason, seen = load()
    assert seen == [WHOLE] and SAID not in reason
    assert len(list(kept.iterdir())) == 1
    for _ in range(2):
        reason, seen = load()
        assert seen == [answered.FIRST_TOKENS] and reason.endswith(SAID)


@pytest.mark.parametrize("late", [0, answered.FIRST_TOKENS, WHOLE - 1])
def test_each_token_of_the_whole_is_compared(load: Callable[..., Any], kept: Path, late: int) -> None:
    with pytest.raises(ParityError, match="decoder on onnxruntime:cpu"):
        load(late, selftest="error")
    assert not kept.exists()  # a wrong answer is not remembered as right


@pytest.mark.parametrize("late", range(answered.FIRST_TOKENS))
def test_the_first_tokens_are_compared_each_time(load: Callable[..., Any], kept: Path, late: int) -> None:
    load()
    with pytest.raises(ParityError, match="decoder on onnxruntime:cpu"):
        load(late, selftest="error")


def test_nan_is_found_among_the_first_tokens(load: Callable[..., Any], kept: Path) -> None:
    load()
    with pytest.raises(ParityError, match="differs by nan"):
        load(0, float("nan"), selftest="error")


def test_with_another_driver_the_whole_is_asked_for(
    load: Callable[..., Any], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    monkeypatch.setattr(probe, "gpu_driver", lambda: "another driver")
    assert load()[1] == [WHOLE]
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"format": 1}'])
def test_a_damaged_record_counts_as_none(load: Callable[..., Any], kept: Path, content: bytes) -> None:
    load()
    (record,) = kept.iterdir()
    record.write_bytes(content)
    assert load()[1] == [WHOLE]
    assert load()[1] == [answered.FIRST_TOKENS]  # written anew


def test_where_nothing_can_be_kept_the_plan_says_so(load: Callable[..., Any], kept: Path) -> None:
    kept.parent.mkdir()
    kept.write_text("a file where the folder would be")
    for _ in range(2):
        reason, seen = load()
        assert seen == [WHOLE]
        assert "was not written" in reason and reason.endswith("the next load asks for the whole golden probe again")


def test_without_probes_nothing_is_kept(load: Callable[..., Any], kept: Path) -> None:
    assert load(selftest="off")[1] == []
    assert not kept.exists()


def test_a_wrong_answer_that_is_only_warned_of_is_not_kept(load: Callable[..., Any], kept: Path) -> None:
    load(0, selftest="warn")
    assert not kept.exists()
    assert load()[1] == [WHOLE]
