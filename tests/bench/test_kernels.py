"""The benchmark of kernels: what it runs agrees with the references, and what does not has no speed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lensc.backends.errors import UsageError
from lensc.bench import kernel_cases, kernels
from lensc.bench.kernel_cases import ALLOWED, Case, Machine, Pool, Ready
from lensc.profiles.measure import product_gop_s

pytest.importorskip("lensc.kernels._cpu", reason="the compiled kernels are missing")


@pytest.fixture(scope="module")
def machine() -> Machine:
    return kernels.machine_of(None, 2, pool_bytes=4 << 20)


SMALL: dict[str, Callable[[Machine], Ready]] = {
    "streamed": lambda m: kernel_cases._group_linear(m, 96, 256, 4, 32, 2),
    "panels": lambda m: kernel_cases._group_linear(m, 96, 512, 2, 128, 40),
    "channels": lambda m: kernel_cases._channel_linear(m, 100, 72, 63),
    "decode": lambda m: kernel_cases._causal(m, 6, 1, np.dtype(np.float16)),
    "decode-int8": lambda m: kernel_cases._causal(m, 6, 1, np.dtype(np.int8)),
    "prefill": lambda m: kernel_cases._causal(m, 0, 9, np.dtype(np.float16)),
    "rope": lambda m: kernel_cases._rope(m, 5),
    "rms_norm": lambda m: kernel_cases._rows(m, "rms_norm", 64),
    "layer_norm": lambda m: kernel_cases._rows(m, "layer_norm", 64),
    "silu_mul": lambda m: kernel_cases._rows(m, "silu_mul", 64),
    "gelu_tanh": lambda m: kernel_cases._rows(m, "gelu_tanh", 64),
}


@pytest.mark.parametrize("name", SMALL)
def test_kernels_agree_with_their_references(machine: Machine, name: str) -> None:
    ready = SMALL[name](machine)
    ready.run()
    assert kernels.error_of(ready) <= ALLOWED[ready.arithmetic]
    assert ready.amount > 0


def test_names_are_those_of_one_case_each() -> None:
    names = [case.what for case in kernel_cases.cases()]
    assert len(names) == len(set(names)) > 50
    assert not [name for name in names if "128256" in name and "1024 rows" in name]


def test_pieces_follow_each_other_and_begin_anew() -> None:
    pool = Pool(np.arange(256, dtype=np.uint8), np.zeros(0, np.float32))
    pieces = pool.pieces(70)
    assert [int(next(pieces)[0]) for _ in range(3)] == [0, 128, 0]
    with pytest.raises(ValueError, match="a piece of 300 of a pool of 256"):
        next(pool.pieces(300))


def test_float16_of_the_pool_are_numbers() -> None:
    values = Pool.make(1 << 12).values.view(np.float16)
    assert np.isfinite(values).all() and np.abs(values).max() < 2


def ready(found: float, runs: list[int]) -> Ready:
    shown = np.array([found], np.float32), np.array([1.0])
    return Ready("GB/s", 1e9, "bandwidth", lambda: runs.append(1), lambda: shown)


@pytest.mark.parametrize("found", (1.1, np.nan))
def test_a_wrong_kernel_has_no_speed(machine: Machine, found: float, capsys: pytest.CaptureFixture[str]) -> None:
    runs: list[int] = []
    row, _ = kernels.measure(Case("x: y", lambda _: ready(found, runs)), machine, 0)
    assert (row.lensc, row.spread, row.parity, len(runs)) == (None, None, "fail", 1)
    assert "x: y: error" in capsys.readouterr().err


def test_a_speed_is_a_median(machine: Machine) -> None:
    runs: list[int] = []
    row, limit = kernels.measure(Case("x: y", lambda _: ready(1.0, runs)), machine, 0)
    assert row.parity == "pass" and limit == "bandwidth" and len(runs) == 1 + kernels.LEAST_RUNS
    assert row.lensc is not None and row.spread is not None and row.spread[0] <= row.lensc <= row.spread[1]


def test_limits_of_an_instruction_set(machine: Machine) -> None:
    assert product_gop_s("int8", 1, "generic") is None
    best = product_gop_s("int8", 1)
    assert best is None or best > 1
    assert machine.kernels.multiply("float32", 10, "generic") == 0
    assert machine.kernels.multiply("int16", 10, "generic") == 0
    with pytest.raises(ValueError, match="product int4 is not one of"):
        machine.kernels.multiply("int4", 10)


def test_reading_reads_all_of_it(machine: Machine) -> None:
    """What `read` returns is the exclusive or of all words, folded: of whole lines that streams and threads share."""
    words = np.random.default_rng(0).integers(0, 1 << 63, 8 * 24, np.uint64)
    for streams, threads in ((1, 1), (2, 3), (4, 2)):
        assert machine.kernels.read(words.view(np.uint8), streams, threads=threads) == np.bitwise_xor.reduce(words)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(UsageError, match="--isa mmx is not one of"):
        kernels.machine_of("mmx", 1, pool_bytes=1 << 12)
