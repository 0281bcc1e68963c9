"""What the machine at hand reaches, measured in under half a minute: its profile under the name `here`.

Memory is read, registers are multiplied, and a layer of each half of the model runs on our own kernels at its true size:
what that reaches is what a prediction for this machine starts from. Where there are no compiled kernels numpy measures
what it can, and the rest is absent.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from lensc.backends.errors import UsageError

from .probe import Machine, device_profile
from .profile import DeviceProfile, Figure, Rates

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

HERE = "here"
"""The profile of this machine."""
READ_BYTES = 1 << 30
"""Read by every thread, several times what the largest cache of a server's share holds."""
POOL_BYTES = 448 << 20
"""The 4-bit weights of four layers of Llama-3-8B: more than the largest cache of a server's share."""
STREAMS = (1, 2, 4, 8)
"""Places at which a thread reads at once: more than one keeps more of the memory's pages open."""
PRODUCT_ROUNDS = 300_000
"""Of a dozen instructions each: 4 to 20 ms."""
PRODUCTS = ("int8", "bfloat16", "float32")
TRIES, RUNS, SECONDS, LONG_SECONDS = 5, 3, 1.2, 2.4
CALLS = 2000

PATCHES, WIDTH, INNER, HEADS = 1024, 1152, 4304, 16
"""A layer of SigLIP and the patches of a slice of 448 x 448."""
HIDDEN, KV, MLP, GROUP, TOKENS, LAYERS = 4096, 1024, 14336, 128, 256, 4
"""A layer of Llama-3-8B, the weights that share a scale, the rows of a prefill, and how many layers follow each other."""
QUERY_HEADS, KV_HEADS, HEAD_DIM, PROMPT = 32, 8, 128, 512
"""Its attention, and the tokens that attend to those before them."""
VISION_LAYER_OPERATIONS = 2 * PATCHES * (4 * WIDTH**2 + 2 * WIDTH * INNER) + 4 * PATCHES**2 * WIDTH
DECODER_LAYER_WEIGHTS = 2 * HIDDEN**2 + 2 * HIDDEN * KV + 3 * HIDDEN * MLP


# --- limits -------------------------------------------------------------------------------------------------------


def bandwidth_gb_s(threads: int, read_bytes: int = READ_BYTES) -> float:
    """DRAM read bandwidth: the best of some sums over random data, of `read_bytes` by every thread at once. By numpy, and
    where there are compiled kernels by one that reads in several places at once.
    """
    data = random_bytes(threads * read_bytes).view(np.int64)
    return max(read_gb_s(data, threads, streams) for streams in (0, *(STREAMS if kernels() else ())))


def read_gb_s(data: npt.NDArray[np.int64], threads: int, streams: int) -> float:
    """How fast every thread reads a share of `data` in so many places at once; 0: by numpy, in one."""
    if streams:
        compiled, shown = kernels(), data.view(np.uint8)
        return data.nbytes / best_s(lambda: compiled.read(shown, streams, threads=threads)) / 1e9
    with ThreadPoolExecutor(threads) as pool:
        shares = np.array_split(data, threads)
        return data.nbytes / best_s(lambda: list(pool.map(np.bitwise_xor.reduce, shares))) / 1e9


def product_gop_s(product: str, threads: int, isa: str = "") -> float | None:
    """Operations of multiplications with additions in registers, 10^9 per second, by the fastest instruction of `isa` (the
    best there is if it is empty) for int8, int16, bfloat16 or float32. None without compiled kernels or such an instruction.
    """
    compiled = kernels()
    operations = compiled.multiply(product, PRODUCT_ROUNDS, isa, threads) if compiled else 0
    if not operations:
        return None
    return float(operations / best_s(lambda: compiled.multiply(product, PRODUCT_ROUNDS, isa, threads)) / 1e9)


def kernels() -> Any:
    """The compiled kernels; None where they are not."""
    try:
        from lensc.kernels import _cpu
    except ImportError:
        return None
    return _cpu


def best_s(work: Callable[[], object]) -> float:
    """The shortest time of some tries, in seconds."""
    return min(_times(work, TRIES))


def _times(work: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def random_bytes(nbytes: int) -> U8:
    """Random bytes that repeat after 32 MiB: making all of them takes longer than what is measured."""
    part = np.random.default_rng(0).integers(0, 1 << 63, (1 << 22) + 9, np.int64)
    return np.resize(part, nbytes // 8).view(np.uint8)


# --- layers of the model on our kernels ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """Layers that can be run: `amount` is what a run computes, in operations, or reads, in bytes."""

    amount: float
    run: Callable[[], object]
    holds: object
    """What the program points to."""

    def rate(self) -> float:
        """10^9 of `amount` per second over some runs after the first, which take at least `SECONDS`: what else the machine
        does is in it, as it is in a request. Where a run is long, fewer do, and they take little more than `LONG_SECONDS`.
        """
        self.run()
        count, took = 0, 0.0
        while took < SECONDS or (count < RUNS and took < LONG_SECONDS):
            took += _times(self.run, 1)[0]
            count += 1
        return self.amount * count / took / 1e9


def vision_layer(compiled: Any, threads: int) -> Layers:
    """A layer of SigLIP in 8 bits over the patches of a slice: norms, six linears, attention, GELU, sums."""
    program = compiled.Program(compiled.usable_isas()[0], threads)
    held: list[Any] = []

    def linear(x: int, inputs: int, outputs: int, residual: int = -1) -> int:
        filled = -(-outputs // 32) * 32 * (-(-inputs // 64) * 64)
        values, scales = random_bytes(filled), np.full(outputs, 1e-4, np.float32)
        sums, bias = np.zeros(outputs, np.int32), np.zeros(outputs, np.float32)
        held.append((values, scales, sums, bias))
        y: int = program.value(0, outputs)
        program.channel_linear(x, values, scales, sums, bias, residual, y)
        return y

    def norm(x: int) -> int:
        weight, bias = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
        held.append((weight, bias))
        y: int = program.value(0, WIDTH)
        program.layer_norm(x, weight, bias, 1e-6, y)
        return y

    x = program.value(0, WIDTH)
    normed, mixed = norm(x), program.value(0, WIDTH)
    q, k, v = (linear(normed, WIDTH, WIDTH) for _ in range(3))
    program.attention(q, None, k, v, mixed, 1, -1, HEADS, (WIDTH // HEADS) ** -0.5, False)
    attended = linear(mixed, WIDTH, WIDTH, x)
    wide, bent = linear(norm(attended), WIDTH, INNER), program.value(0, INNER)
    program.gelu_tanh(wide, bent)
    y = linear(bent, INNER, WIDTH, attended)
    program.output(y)
    program.finish()
    given = np.random.default_rng(1).standard_normal((PATCHES, WIDTH), np.float32)
    bound = [(x, given), (y, np.empty_like(given))]
    return Layers(VISION_LAYER_OPERATIONS, lambda: program.run([PATCHES, 1], bound, [], None, 0, 0, 0), held)


def decoder_layers(compiled: Any, threads: int, rows: int, pool: U8) -> Layers:
    """Layers of Llama-3-8B in 4 bits, groups of 128, without attention. One row reads its weights: `amount` is their
    bytes; more compute: `amount` is operations.
    """
    program = compiled.Program(compiled.usable_isas()[0], threads)
    held: list[Any] = [pool]
    begin = itertools.cycle(range(0, len(pool), DECODER_LAYER_WEIGHTS // 2))
    read = 0

    def linear(x: int, inputs: int, outputs: int, values: Iterator[U8], residual: int = -1) -> int:
        nonlocal read
        scales = np.full((outputs, 1), 1e-3, np.float32)
        multiples = np.random.default_rng(2).integers(1, 16, (outputs, inputs // GROUP), np.int8)
        packed = next(values)[: outputs * inputs // 2]
        held.append((packed, scales, multiples))
        read += packed.nbytes + scales.nbytes + multiples.nbytes
        y: int = program.value(0, outputs)
        program.group_linear(x, packed, scales, None, 4, False, GROUP, True, None, residual, y, multiples)
        return y

    def norm(x: int) -> int:
        weight = np.ones(HIDDEN, np.float32)
        held.append(weight)
        y: int = program.value(0, HIDDEN)
        program.rms_norm(x, weight, 1e-5, y)
        return y

    x = y = program.value(0, HIDDEN)
    for _ in range(LAYERS):
        values = _parts(pool, next(begin))
        normed = norm(y)
        query, *_ = (linear(normed, HIDDEN, width, values) for width in (HIDDEN, KV, KV))
        y = linear(query, HIDDEN, HIDDEN, values, y)
        normed, bent = norm(y), program.value(0, MLP)
        gate, up = (linear(normed, HIDDEN, MLP, values) for _ in range(2))
        program.silu_mul(gate, up, bent)
        y = linear(bent, MLP, HIDDEN, values, y)
    program.output(y)
    program.finish()
    given = np.random.default_rng(3).standard_normal((rows, HIDDEN), np.float32)
    bound = [(x, given), (y, np.empty_like(given))]
    amount = read if rows == 1 else 2 * rows * LAYERS * DECODER_LAYER_WEIGHTS
    return Layers(amount, lambda: program.run([rows], bound, [], None, 0, 0, 0), held)


def _parts(pool: U8, begin: int) -> Iterator[U8]:
    """The pool from `begin` on, a linear's weights after another's."""
    for size in (HIDDEN**2, HIDDEN * KV, HIDDEN * KV, HIDDEN**2, HIDDEN * MLP, HIDDEN * MLP, HIDDEN * MLP):
        yield pool[begin : begin + size // 2]
        begin += size // 2


def prompt_attention(compiled: Any, threads: int) -> Layers:
    """The causal attention of a layer of Llama-3-8B over a prompt, with what is rotated and stored for it in float16."""
    program = compiled.Program(compiled.usable_isas()[0], threads)
    frequencies = (500_000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32)
    widths = (QUERY_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    values = [program.value(0, width) for width in widths]
    y = program.value(0, widths[0])
    program.causal_attention(*values, y, 1, 0, QUERY_HEADS, HEAD_DIM**-0.5, frequencies)
    program.output(y)
    program.finish()
    random = np.random.default_rng(5)
    given = [random.standard_normal((PROMPT, width), np.float32) for width in widths]
    stored = [np.zeros((1, KV_HEADS, PROMPT, HEAD_DIM), np.float16) for _ in range(2)]
    cache = compiled.Caches([stored[0]], [stored[1]], [], [])
    bound = [*zip(values, given, strict=True), (y, np.empty_like(given[0]))]
    operations = 2.0 * QUERY_HEADS * HEAD_DIM * PROMPT**2
    return Layers(operations, lambda: program.run([PROMPT, 1], bound, [], cache, 0, 1, PROMPT), (stored, frequencies))


def float_linear(compiled: Any, threads: int) -> Layers:
    """A product of 256 rows by 4096 x 4096 in float32: by our kernel, by numpy where there is none."""
    random = np.random.default_rng(4)
    weight, x = random.random((HIDDEN, HIDDEN), np.float32), random.random((TOKENS, HIDDEN), np.float32)
    operations = 2 * TOKENS * HIDDEN**2
    if compiled is None:
        return Layers(operations, lambda: x @ weight, None)
    program = compiled.Program(compiled.usable_isas()[0], threads)
    given, made = program.value(0, HIDDEN), program.value(0, HIDDEN)
    program.float_linear(given, weight, None, -1, made)
    program.output(made)
    program.finish()
    bound = [(given, x), (made, np.empty_like(x))]
    return Layers(operations, lambda: program.run([TOKENS], bound, [], None, 0, 0, 0), weight)


def overheads_us(compiled: Any, threads: int) -> dict[str, float]:
    """What calling a program costs, and each step in it: steps that compute next to nothing, in microseconds."""

    def run(steps: int) -> float:
        program = compiled.Program(compiled.usable_isas()[0], threads)
        weight = np.ones(64, np.float32)
        values = [program.value(0, 64) for _ in range(steps + 1)]
        for x, y in itertools.pairwise(values):
            program.rms_norm(x, weight, 1e-5, y)
        program.output(values[-1])
        program.finish()
        given = np.ones((1, 64), np.float32)
        bound = [(values[0], given), (values[-1], np.empty_like(given))]
        return 1e6 * median(_times(lambda: program.run([1], bound, [], None, 0, 0, 0), CALLS // steps))

    one, many = run(1), run(100)
    step = max(0.0, (many - one) / 99)
    return {"call": max(1e-3, one - step), "step": max(1e-3, step)}


# --- the profile --------------------------------------------------------------------------------------------------


def measure(
    found: Machine, threads: int | None = None, report: Callable[[str], None] = lambda _: None
) -> DeviceProfile:
    """The profile of this machine with `threads` threads (by default one for each core), and with one. Takes 1.5 GiB.

    `report` hears what is measured. Raises UsageError if the process may not run so many threads.
    """
    threads = found.cores if threads is None else threads
    if not 1 <= threads <= found.threads:
        raise UsageError(f"--threads {threads}: expected 1 to {found.threads}, the threads this process may run on")
    compiled = kernels()
    profile = device_profile(found)
    cpu = profile.processors[0]
    rates = [rates_of(compiled, count, report) for count in sorted({1, threads})]
    report("overheads")
    most = rates[-1]
    peaks: dict[str, Figure] = {}
    for product in PRODUCTS:
        report(f"{product} in registers")
        if product in cpu.dtypes and (reached := product_gop_s(product, threads)):
            how = f"multiplications with additions in registers, {_threads(threads)}; best of {TRIES}"
            peaks[product] = Figure(_rounded(reached / 1e3), "measured", how)
    costs = overheads_us(compiled, threads) if compiled else {}
    cpu = replace(
        cpu,
        dtypes=tuple(sorted({*cpu.dtypes, *most.achieved_tops})),
        bandwidth_gb_s=most.bandwidth_gb_s,
        peak_tops={name: peak for name, peak in peaks.items() if peak.value >= _reached(most, name)},
        achieved_tops=most.achieved_tops,
        achieved_gb_s=most.achieved_gb_s,
        attention_tops=most.attention_tops,
        overheads_us={
            name: Figure(
                _rounded(value), "measured", f"a {name} of a program of our kernels, {_threads(threads)}; median"
            )
            for name, value in costs.items()
        },
        by_threads=tuple(rates),
    )
    return replace(profile, name=HERE, processors=(cpu,))


def rates_of(compiled: Any, threads: int, report: Callable[[str], None] = lambda _: None) -> Rates:
    """What so many threads reach; `compiled` is that of `kernels()`."""
    of = _threads(threads)
    report(f"memory, {of}")
    nbytes = READ_BYTES // 2 * min(threads, 2)
    data = random_bytes(nbytes).view(np.int64)
    ways = STREAMS if compiled else (0,)
    read = max(read_gb_s(data, threads, streams) for streams in ways)
    del data
    figures: dict[str, Figure] = {}
    streamed: Figure | None = None
    attention: Figure | None = None

    def reached(dtype: str, layers: Layers, what: str) -> None:
        report(f"{what}, {of}")
        figures[dtype] = Figure(_rounded(layers.rate() / 1e3), "measured", f"{what}, {of}; mean of {SECONDS:g} s")

    by = "our kernel" if compiled else "numpy's product, all threads"
    reached("float32", float_linear(compiled, threads), f"256 rows by 4096 x 4096 in float32, {by}")
    if compiled:
        reached("int8", vision_layer(compiled, threads), "a layer of SigLIP in 8 bits, 1024 patches")
        pool = random_bytes(POOL_BYTES)
        many = f"layers of Llama-3-8B in 4 bits, groups of 128, {TOKENS} rows"
        reached("int4", decoder_layers(compiled, threads, TOKENS, pool), many)
        what = "layers of Llama-3-8B in 4 bits, groups of 128, one row"
        report(f"{what}, {of}")
        gb_s = decoder_layers(compiled, threads, 1, pool).rate()
        read = max(read, gb_s)
        del pool
        mixed = f"causal attention of {PROMPT} tokens in a layer of Llama-3-8B"
        report(f"{mixed}, {of}")
        tops = prompt_attention(compiled, threads).rate() / 1e3
        attention = Figure(_rounded(tops), "measured", f"{mixed}, {of}; mean of {SECONDS:g} s")
        streamed = Figure(_rounded(gb_s), "measured", f"{what}, {of}; mean of {SECONDS:g} s")
    how = f"read of {nbytes >> 20} MiB, {of}, in up to {max(ways) or 1} places at once; best of {TRIES}"
    return Rates(threads, Figure(_rounded(read), "measured", how), figures, streamed, attention)


def _reached(rates: Rates, dtype: str) -> float:
    figure = rates.achieved_tops.get(dtype)
    return figure.value if figure else 0.0


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
