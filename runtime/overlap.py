"""Encoding pictures beside feeding the prompt: while a slice is encoded, what stands before it in the prompt is fed.

Where the two graphs run on different processors, a thread encodes slice after slice, and the prompt is fed in pieces whose
bounds depend on nothing but the prompt: a piece waits for the slices that reach into it. So an answer does not depend on
which of the two is faster, and on an engine whose pieces are as long anyway it is the same to the bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from .decoder import Cancelled
from .plan import Plan
from .timeline import Timeline
from .vision import EncodedSlice

ROUND = 32
"""Tokens by which pieces grow: of fewer than 32, a piece would take about as long."""

MARKS = 2
"""Tokens around the embeddings of a slice."""

POLL_S = 0.02
"""How often the caller is asked, while a slice is waited for, whether the answer is still wanted."""


def piece_tokens(query_num: int) -> int:
    """Of a piece of the prompt: those of a slice, rounded up, 128 at full size. More would leave more behind the last slice;
    fewer would have the weights pass more often.
    """
    return -(-(query_num + MARKS) // ROUND) * ROUND


@dataclass(frozen=True)
class Overlap:
    """Whether pictures are encoded beside the prompt, and why, or why not."""

    on: bool
    reason: str


def decide(plan: Plan | None, takes_turns: bool, wanted: bool | None) -> Overlap:
    """The rule: the two graphs overlap if their effective targets name different processors, and both stay loaded.

    On one processor they would share its cores, or its queue. An NPU that is emulated counts as one: its work is done in a
    process of its own. `wanted` says otherwise where both stay loaded; None leaves it to the rule.
    """
    if takes_turns:
        return Overlap(False, "one graph at a time is loaded, to save memory")
    if wanted is False:
        return Overlap(False, "not wanted")
    if plan is None:
        return Overlap(bool(wanted), "asked for" if wanted else "where the graphs run is not known")
    vision, decoder = plan["vision"].effective, plan["decoder"].effective
    if vision.processor != decoder.processor:
        return Overlap(True, f"vision is on {vision}, the decoder on {decoder}")
    same = f"vision and decoder are both on the {vision.processor}"
    return Overlap(bool(wanted), f"{same}; asked for" if wanted else same)


class Pictures:
    """The slices of a prompt, encoded when they are needed, or ahead of that in a thread.

    Whatever the encoder raises is raised to whoever waits. Leaving the context ends the thread, after the run in progress.
    """

    def __init__(
        self, encode: Callable[[Callable[[], bool]], Iterator[EncodedSlice]], ahead: bool, timeline: Timeline
    ) -> None:
        """`encode`, which is asked to stop by what it is given, gives all slices of the prompt, in order."""
        self.encoded: list[EncodedSlice] = []
        self.waited_s = 0.0
        """How long `wait` took in all."""
        self._encode = encode
        self._timeline = timeline
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = ThreadPoolExecutor(1, "lensc-vision") if ahead else None
        self._work: Future[None] | None = None

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._work = self._thread.submit(self._encode_all)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        if self._thread is not None:
            self._thread.shutdown()

    def wait(self, count: int, should_stop: Callable[[], bool]) -> None:
        """Return once the first `count` slices are encoded. Raises Cancelled if they are not wanted anymore."""
        if len(self.encoded) >= count:
            return
        started_s = time.perf_counter()
        if self._work is None:
            self.encoded += self._encode(should_stop)
            self.waited_s += time.perf_counter() - started_s
            return
        with self._changed:
            while len(self.encoded) < count and not self._work.done():
                if should_stop():
                    raise Cancelled
                self._changed.wait(POLL_S)
        if len(self.encoded) < count:
            self._work.result()  # raises what the encoder did
        self.waited_s += self._timeline.add("host", f"wait for slice {count}", started_s) - started_s

    def _encode_all(self) -> None:
        for one in self._encode(lambda: self._stopped):
            with self._changed:
                self.encoded.append(one)
                self._changed.notify_all()
