"""The graphs of a bundle on every target, after their golden probes: a slice, a prompt of 128 tokens, 32 tokens of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lensc.backends.base import Target
from lensc.backends.bundle import load_manifest
from lensc.bench import serve
from lensc.profiles import probe

ROUNDS = 20
Ask = Callable[[list[str]], serve.Answer]


@pytest.fixture(scope="module")
def ask(request: pytest.FixtureRequest, bundle: Path, usable: Target) -> Iterator[Ask]:
    """The graph `request.param`, open on the target, its probe passed."""
    manifest = load_manifest(bundle)
    session = serve.opened(bundle, manifest, request.param, usable, probe.machine().cores)
    yield serve.GRAPHS[request.param](bundle, manifest, session)
    session.close()


@pytest.mark.parametrize("ask", ["vision"], indirect=True)
def test_slice(benchmark: Any, ask: Ask) -> None:
    benchmark.group = "slice of 448 x 448"
    benchmark.pedantic(ask, (["vision"],), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("ask", ["decoder"], indirect=True)
def test_prefill(benchmark: Any, ask: Ask) -> None:
    benchmark.group = "prefill of 128 tokens"
    benchmark.pedantic(ask, (["prefill", "128"],), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("ask", ["decoder"], indirect=True)
def test_decode(benchmark: Any, ask: Ask) -> None:
    benchmark.group = "decode of 32 tokens behind 32"

    def prompt() -> None:
        ask(["prefill", "32"])

    benchmark.pedantic(ask, (["decode", "32"],), setup=prompt, rounds=ROUNDS, warmup_rounds=1)
