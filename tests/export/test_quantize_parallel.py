"""Pieces side by side: all of them, each once, the same numbers for any number of threads, errors passed on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from lensc.export.quantize import gptq, weights
from lensc.export.quantize.gptq import Hessian, quantize_gptq
from lensc.export.quantize.parallel import for_each, pieces
from lensc.export.quantize.weights import WeightFormat, dequantize, quantize_rtn


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [(7, 3, [(0, 3), (3, 6), (6, 7)]), (4, 4, [(0, 4)]), (2, 0, [(0, 1), (1, 2)]), (0, 3, [])],
)
def test_pieces(length: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert [(part.start, part.stop) for part in pieces(length, size)] == expected


def test_every_piece_once_and_one_thread_each(threads: int) -> None:
    lock, seen, inside = threading.Lock(), [], set()

    def work(part: slice) -> None:
        with lock:
            seen.append(part.start)
            inside.add(torch.get_num_threads())

    for_each(work, 100, 3)
    assert sorted(seen) == list(range(0, 100, 3))
    assert inside == {1}
    assert torch.get_num_threads() == threads


def test_errors_are_passed_on_and_threads_given_back(threads: int) -> None:
    def work(part: slice) -> None:
        if part.start == 4:
            raise ValueError("piece 4")

    with pytest.raises(ValueError, match="piece 4"):
        for_each(work, 10, 2)
    assert torch.get_num_threads() == threads


def test_results_do_not_depend_on_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", 512)
    monkeypatch.setattr(gptq, "ROWS", 10)
    generator = torch.Generator().manual_seed(0)
    weight, format = torch.randn(48, 64, generator=generator), WeightFormat.parse("w4-g32-asym")
    hessian = Hessian(64)
    hessian.add(torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    factor = hessian.factor()
    for quantize in (lambda w: quantize_rtn(w, format), lambda w: quantize_gptq(w, factor, format)):
        found = quantize(weight)
        torch.set_num_threads(1)
        assert torch.equal(found.values, quantize(weight).values)
        assert torch.equal(dequantize(found), dequantize(quantize(weight)))
        torch.set_num_threads(threads)
