"""Whole answers about the demo's pictures on every target, from the picture's file on, whose tokens are those of torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lensc
from lensc.backends.base import Target
from lensc.backends.bundle import load_manifest
from lensc.bench.demo import QUESTIONS
from lensc.bench.reference import reference_vlm
from lensc.runtime.pipeline import VLM

ROUNDS = 10


@pytest.fixture(scope="module")
def vlm(bundle: Path, usable: Target) -> Iterator[VLM]:
    with lensc.load(bundle, str(usable)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(bundle: Path) -> dict[str, tuple[int, ...]]:
    """The tokens of the torch model by picture."""
    pytest.importorskip("torch", reason="the judge is the torch model; pip install 'lensc[export]'")
    from lensc.export.demo import CHECKPOINT, PICTURES

    name = load_manifest(bundle).model.name
    if name != "demo":
        pytest.skip(f"{bundle} is {name}: only the demo model has pictures and a judge")
    with reference_vlm(CHECKPOINT) as judge:
        return {
            picture: judge.generate(question, [PICTURES / picture]).token_ids for picture, question in QUESTIONS.items()
        }


@pytest.mark.parametrize("picture", QUESTIONS)
def test_request(benchmark: Any, vlm: VLM, expected: dict[str, tuple[int, ...]], picture: str) -> None:
    from lensc.export.demo import PICTURES

    def answer() -> tuple[int, ...]:
        return vlm.generate(QUESTIONS[picture], [PICTURES / picture]).token_ids

    assert answer() == expected[picture], f"{picture}: other tokens than torch's"
    benchmark.group = f"request about {picture}"
    benchmark.pedantic(answer, setup=lambda: vlm.forget(pictures=True), rounds=ROUNDS)
