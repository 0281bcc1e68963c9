"""The whole model on a GPU: slices, prompts, tokens, and a picture to the first token, beside the same in plain torch."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lensc.backends._program import Attention, CausalAttention, Linear, Program, count, split
from lensc.backends.bundle import PictureSpec
from lensc.backends.errors import ParityError
from lensc.export.graph import GraphSpec
from lensc.export.models.config import ModelConfig
from lensc.runtime import picture as pictures

from . import gpu_clock, record, turns
from .gpu_clock import Times
from .gpu_parity import vision_feeds
from .gpu_program import RandomSource, decoder_program, vision_program, weight_bytes
from .gpu_torch import TorchDecoder, TorchVision

if TYPE_CHECKING:
    from lensc.backends._cuda_session import CudaDecoderSession, CudaSession

CONTEXTS = (128, 1024, 4096)
STEPS = 16
"""Tokens decoded in a run, which begins at the same context each time."""
ROOM = 64
SIDE = 1344
"""Of a picture that becomes 3 x 3 slices and an overview."""
TEXT_TOKENS = 31
"""Of the prompt of such a picture besides those of its slices: 991 in all."""
PATCHES = 1024
BF16 = torch.bfloat16
EAGER, COMPILED = "torch, bfloat16", "torch.compile, reduce-overhead, bfloat16"

Weight = Literal["f32", "uint4"]
LABELS: dict[Weight, str] = {"f32": "bfloat16", "uint4": "int4"}


def operations(program: Program, sizes: dict[str, int], past: int = 0) -> int:
    """Multiplications and additions of the products of a program; of causal attention those that its mask leaves."""
    total = 0
    for step in program.steps:
        rows = count(program.values[step.y].rows, sizes)
        if isinstance(step, Linear):
            total += 2 * rows * step.weight.outputs * step.weight.inputs
        elif isinstance(step, Attention):
            keys = count(split(program.values[step.k].rows)[1], sizes)
            total += 4 * rows * keys * program.values[step.y].width
        elif isinstance(step, CausalAttention):
            batch, tokens = (count(part, sizes) for part in split(program.values[step.y].rows))
            pairs = batch * (tokens * past + tokens * (tokens + 1) // 2)
            total += 4 * pairs * step.num_heads * step.head_dim
    return total


@dataclass
class Bench:
    """What is measured, on what, and what is loaded for it so far."""

    config: ModelConfig
    repeat: int
    reach: dict[str, float]
    passed: dict[str, bool]
    """By the names of `gpu_parity.CHECKS`."""
    measured: dict[str, list[float]] = field(default_factory=dict)
    """Of ours by row, for rivals that are measured by themselves."""
    bytes_held: dict[Weight, int] = field(default_factory=dict)
    _loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> RandomSource:
        return RandomSource(torch.device("cuda"))

    @property
    def room(self) -> int:
        return CONTEXTS[-1] + ROOM

    def decoder(self, weight: Weight) -> CudaDecoderSession:
        from lensc.backends._cuda_session import CudaDecoderSession

        def make() -> CudaDecoderSession:
            before = torch.cuda.memory_allocated()
            session = CudaDecoderSession(*self.program(weight), self.source, BF16)
            gc.collect()
            self.bytes_held[weight] = torch.cuda.memory_allocated() - before
            return session

        session: CudaDecoderSession = self._once(f"decoder {weight}", make)
        return session

    def program(self, weight: Weight) -> tuple[GraphSpec, Program]:
        return decoder_program(self.config, self.config.num_hidden_layers, weight)

    def torch_decoder(self) -> TorchDecoder:
        layers = self.config.num_hidden_layers
        _, program = self.program("f32")
        made: TorchDecoder = self._once(
            "torch decoder", lambda: TorchDecoder(self.config, program, self.source, BF16, layers, self.room)
        )
        return made

    def vision(self) -> CudaSession:
        from lensc.backends._cuda_session import CudaSession

        session: CudaSession = self._once(
            "vision", lambda: CudaSession(*vision_program(self.config), self.source, BF16)
        )
        return session

    def torch_vision(self) -> TorchVision:
        made: TorchVision = self._once(
            "torch vision", lambda: TorchVision(self.config, vision_program(self.config)[1], self.source, BF16)
        )
        return made

    def release(self) -> None:
        """Free what is loaded."""
        self._loaded.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def require(self, check: str) -> None:
        """Raises ParityError unless that check has passed: what computes something else has no speed."""
        if not self.passed.get(check, False):
            raise ParityError(f"parity of {check} has not passed: nothing is measured")

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._loaded:
            self._loaded[name] = make()
        return self._loaded[name]


# --- the decoder ----------------------------------------------------------------------------------------------------


def decoder(bench: Bench, weight: Weight) -> Iterator[record.Row]:
    """Prefill and decode, as the device needs and as a caller of the session sees it, and memory."""
    label = LABELS[weight]
    bench.require(f"decoder {label}")
    session, rival, width = bench.decoder(weight), bench.torch_decoder(), bench.config.hidden_size
    _, program = bench.program(weight)
    embeds = torch.randn(1, bench.room, width, device="cuda")
    positions = torch.arange(bench.room, device="cuda")
    yield _peak_memory(bench, weight, embeds)
    for context in CONTEXTS:
        cache = session.new_cache(context + ROOM)
        prompt = embeds[:, :context]

        def prefill(cache: Any = cache, prompt: Tensor = prompt) -> None:
            cache.trim(0)
            session.step_on_device(prompt, cache, [prompt.shape[1] - 1])

        def their_prefill(prompt: Tensor = prompt) -> None:
            rival(prompt, positions[: prompt.shape[1]], LAST, 0)

        took = gpu_clock.in_turn({"ours": prefill, "theirs": their_prefill}, bench.repeat)
        needed = operations(program, {"batch": 1, "tokens": context, "rows": 1})
        limit = bench.reach["bfloat16_tops"] * 1e12 / needed * context
        yield _row(bench, f"prefill {context}, {label}", took, context, limit)

        limit = bench.reach["read_gb_s"] * 1e9 / (weight_bytes(program, 2) + cache_bytes(bench.config, context))
        token = embeds[:, :1]

        def decode(cache: Any = cache, context: int = context, token: Tensor = token) -> None:
            cache.trim(context)
            for _ in range(STEPS):
                session.step_on_device(token, cache, [0])

        def their_decode(context: int = context, token: Tensor = token) -> None:
            for i in range(context, context + STEPS):
                rival(token, positions[i : i + 1], LAST, i)

        took = gpu_clock.in_turn({"ours": decode, "theirs": their_decode}, bench.repeat)
        yield _row(bench, f"decode, context {context}, {label}", took, STEPS, limit)

        feeds = [
            {
                "inputs_embeds": token.cpu().numpy(),
                "position_ids": np.array([context + i]),
                "logit_positions": np.array([0]),
            }
            for i in range(STEPS)
        ]

        def answer(cache: Any = cache, context: int = context, feeds: Any = feeds) -> None:
            cache.trim(context)
            for fed in feeds:
                session.step(fed, cache)

        def their_answer(context: int = context, feeds: Any = feeds) -> None:
            for i, fed in enumerate(feeds, context):
                given = torch.from_numpy(fed["inputs_embeds"]).cuda()
                rival(given, positions[i : i + 1], LAST, i).cpu()

        took = gpu_clock.in_turn({"ours": answer, "theirs": their_answer}, bench.repeat, gpu_clock.at_the_caller)
        yield _row(bench, f"decode, context {context}, {label}, numpy to numpy", took, STEPS, limit)


LAST = slice(-1, None)


def cache_bytes(config: ModelConfig, context: int) -> int:
    """Of the keys and values of `context` tokens in bfloat16."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context


def _peak_memory(bench: Bench, weight: Weight, embeds: Tensor) -> record.Row:
    """Weights, cache and what a prompt of the longest context needs besides."""
    session, longest = bench.decoder(weight), CONTEXTS[-1]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cache = session.new_cache(longest + ROOM)
    session.step_on_device(embeds[:, :longest], cache, [longest - 1])
    session.step_on_device(embeds[:, :1], cache, [0])
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before + bench.bytes_held[weight]
    return record.Row(f"peak memory, {longest} tokens, {LABELS[weight]}", "GB", peak / 1e9, parity="pass")


def _row(bench: Bench, what: str, took: Times, tokens: int, limit: float) -> record.Row:
    """Tokens in a second, from milliseconds for `tokens`."""
    ours, theirs = ([1e3 * tokens / ms for ms in took[who]] for who in ("ours", "theirs"))
    bench.measured[what] = ours
    return turns.compared(what, "tokens/s", ours, theirs, EAGER, limit)


# --- pictures -------------------------------------------------------------------------------------------------------


def vision(bench: Bench) -> Iterator[record.Row]:
    """Slices of 448 x 448, one and ten of them at once."""
    bench.require("vision bfloat16")
    session, rival = bench.vision(), bench.torch_vision()
    _, program = vision_program(bench.config)
    for slices in (1, 10):
        feeds = vision_feeds(bench.config, torch.device("cuda"), slices, PATCHES)
        # no key is masked: torch may use the attention that knows no mask
        plain = {**feeds, "attention_bias": None, "key_bias": None}
        works = {
            "ours": lambda feeds=feeds: session.run_on_device(feeds),
            "theirs": lambda plain=plain: rival(**plain),
        }
        took = gpu_clock.in_turn(works, bench.repeat)
        needed = operations(program, {"slices": slices, "patches": PATCHES})
        limit = needed / bench.reach["bfloat16_tops"] / 1e9
        what = f"vision, slices at once: {slices}"
        bench.measured[what] = took["ours"]
        yield turns.compared(what, "ms", took["ours"], took["theirs"], EAGER, limit)


def whole(bench: Bench, weight: Weight) -> Iterator[record.Row]:
    """A picture in memory to the first token: the host's part, upload, slices, prompt. The parts are those of runs that
    wait after each of them.
    """
    bench.require(f"decoder {LABELS[weight]}")
    bench.require("vision bfloat16")
    request = _Request(bench, weight)
    works = {"ours": lambda: request.run(True), "theirs": lambda: request.run(False)}
    took = gpu_clock.in_turn(works, bench.repeat, gpu_clock.at_the_caller)
    name = f"{SIDE} x {SIDE} to the first token, {LABELS[weight]}"
    yield turns.compared(name, "ms", took["ours"], took["theirs"], EAGER)
    parts: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    for _ in range(bench.repeat):
        for ours, found in parts.items():
            for part, ms in request.parts(ours).items():
                found.setdefault(part, []).append(ms)
    for part, times in parts[True].items():
        if part in THE_SAME:
            spread = (min(times), max(times))
            yield record.Row(f"{name}: {part}", "ms", median(times), spread, parity="pass")
        else:
            yield turns.compared(f"{name}: {part}", "ms", times, parts[False][part], EAGER)


THE_SAME = ("slices on the host", "upload")
"""Parts of a request that are the same for both."""


class _Request:
    """A question about a random picture. Text is random embeddings: their lookup is a copy of some rows."""

    def __init__(self, bench: Bench, weight: Weight) -> None:
        from PIL import Image

        config = bench.config
        self._bench, self._weight = bench, weight
        self._spec = PictureSpec(
            scale_resolution=config.scale_resolution,
            patch_size=config.patch_size,
            max_slice_nums=config.max_slice_nums,
            query_num=config.query_num,
            vision_padding="official",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            pos_grid=config.vision.pos_grid,
        )
        random = np.random.default_rng(4)
        self._picture = Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        self._text = random.standard_normal((TEXT_TOKENS, config.hidden_size), np.float32)
        self._first = self._last = -1

    def run(self, ours: bool) -> int:
        """The first token."""
        feeds = self._slices()
        return self._token(self._embeds(self._uploaded(feeds), ours), ours)

    def parts(self, ours: bool) -> dict[str, float]:
        """Milliseconds of each part."""
        found: dict[str, float] = {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            started = time.perf_counter()
            made = work()
            torch.cuda.synchronize()
            found[name] = (time.perf_counter() - started) * 1e3
            return made

        torch.cuda.synchronize()
        feeds = timed(THE_SAME[0], self._slices)
        there = timed(THE_SAME[1], lambda: self._uploaded(feeds))
        embeds = timed("vision", lambda: self._embeds(there, ours))
        timed("prompt and first token", lambda: self._token(embeds, ours))
        return found

    def _slices(self) -> dict[str, Any]:
        cut = pictures.slice_picture(self._picture, self._spec)
        (batch,) = pictures.vision_feeds(cut.pixels, self._spec, self._bench.config.hidden_size)
        return batch.feeds

    def _uploaded(self, feeds: dict[str, Any]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}

    def _embeds(self, feeds: dict[str, Tensor], ours: bool) -> Tensor:
        if ours:
            return self._bench.vision().run_on_device(feeds)["image_embeds"]
        made: Tensor = self._bench.torch_vision()(**{**feeds, "attention_bias": None, "key_bias": None})
        return made

    def _token(self, image_embeds: Tensor, ours: bool) -> int:
        text = torch.from_numpy(self._text).cuda()
        prompt = torch.cat([text[:10], image_embeds.flatten(0, 1).float(), text[10:]])[None]
        tokens = prompt.shape[1]
        if ours:
            session = self._bench.decoder(self._weight)
            logits = session.step_on_device(prompt, session.new_cache(tokens + ROOM), [tokens - 1])
        else:
            logits = self._bench.torch_decoder()(prompt, torch.arange(tokens, device="cuda"), LAST, 0)
        return int(logits.argmax())


# --- torch.compile, in a process of its own -------------------------------------------------------------------------


def compiled(what: Literal["decoder", "vision"], config: ModelConfig, repeat: int) -> Iterator[tuple[str, list[float]]]:
    """What torch.compile reaches, by the names of our rows without their precision. Raises ParityError if what it
    computes is not what the model computes without it.

    The cache that decoding reads is of fixed size and masked at every context: 4160 tokens, 4 % of the weights.
    """
    bench = Bench(config, repeat, {}, {})
    new_step: Any = torch.compiler.cudagraph_mark_step_begin
    options: Any = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
    if what == "vision":
        tower = bench.torch_vision()
        run = torch.compile(tower, **options)
        for slices in (1, 10):
            feeds = vision_feeds(config, torch.device("cuda"), slices, PATCHES)
            given = {**feeds, "attention_bias": None, "key_bias": None}
            _check_compiled(run(**given), tower(**given))
            times = gpu_clock.in_turn({"it": lambda given=given: run(**given)}, repeat, warm=4)["it"]  # type: ignore[misc]
            yield f"vision, slices at once: {slices}", times
        return
    model = bench.torch_decoder()
    embeds = torch.randn(1, bench.room, config.hidden_size, device="cuda")
    positions = torch.arange(bench.room, device="cuda")
    places = torch.split(positions, 1)
    token = torch.compile(lambda x, at: model(x, at, LAST, None), **options)
    model(embeds[:, :128], positions[:128], LAST, 0)
    _check_compiled(token(embeds[:, :1], places[128]), model(embeds[:, :1], places[128], LAST, 128))
    for context in CONTEXTS:

        def decode(context: int = context) -> None:
            for i in range(context, context + STEPS):
                new_step()
                token(embeds[:, :1], places[i])

        times = gpu_clock.in_turn({"it": decode}, repeat, warm=3)["it"]
        yield f"decode, context {context}", [1e3 * STEPS / ms for ms in times]
    tokens = 1024
    prompt = torch.compile(lambda x, at: model(x, at, LAST, 0), **options)
    given_prompt = (embeds[:, :tokens], positions[:tokens])
    _check_compiled(prompt(*given_prompt), model(*given_prompt, LAST, 0))
    times = gpu_clock.in_turn({"it": lambda: prompt(*given_prompt)}, repeat, warm=4)["it"]
    yield f"prefill {tokens}", [1e3 * tokens / ms for ms in times]


LEAST_COMPILED_DB = 25.0
"""Of bfloat16 against bfloat16, through all layers."""


def _check_compiled(found: Tensor, expected: Tensor) -> None:
    db = gpu_clock.sqnr_db(found, expected)
    if db < LEAST_COMPILED_DB:
        raise ParityError(f"torch.compile computes something else: {db:.1f} dB, expected {LEAST_COMPILED_DB}")


def beside_compiled(bench: Bench, what: str, theirs: list[float]) -> Iterator[record.Row]:
    """Our rows that torch.compile has a figure for. They were not measured in turn, so there is no ratio of pairs."""
    unit = "ms" if what.startswith("vision") else "tokens/s"
    names = [what] if unit == "ms" else [f"{what}, {label}" for label in LABELS.values()]
    for name in names:
        ours = bench.measured.get(name)
        if ours:
            spreads = [(min(values), max(values)) for values in (ours, theirs)]
            yield record.Row(
                name, unit, median(ours), spreads[0], rival=COMPILED, rival_value=median(theirs),
                rival_spread=spreads[1], parity="pass",
            )  # fmt: skip
