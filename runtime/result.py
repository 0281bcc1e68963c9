"""What a generation gives back: the answer with its metrics."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

from .events import Event
from .timeline import Timeline

FinishReason = Literal["stop", "length", "cancelled"]
"""A stop id was generated; max_new_tokens or the context was reached; the caller cancelled."""


@dataclass(frozen=True)
class Metrics:
    """Times, sizes and what happened on the way. Time that the reader of a stream takes is not counted."""

    prepare_ms: float
    """Opening, slicing and resizing the pictures, making the prompt."""
    load_ms: float
    """Loading graphs that had been released to save memory; see `sequential`. 0.0 where all stay loaded."""
    image_ms: tuple[float, ...]
    """Vision encoding per slice, in prompt order; 0.0 where the features came from the cache."""
    slices_from_cache: int
    prefill_ms: float
    """Feeding the prompt, without waiting for pictures."""
    overlap_ms: float
    """For how long pictures were encoded and the prompt was fed at the same time; see `overlap`."""
    ttft_ms: float
    """From the call to the first token. With beams, to the whole answer: none of its tokens is known before."""
    ttft_estimate_ms: float | None
    """What was estimated of it, where there is a `max_ttft_ms`; None without, or if nothing was measured."""
    slices_given_up: int
    """For the sake of `max_ttft_ms`: by so many fewer slices the pictures were cut."""
    decode_tokens_per_s: float | None
    """Tokens after the first, per beam; None if there are none."""
    prompt_tokens: int
    reused_tokens: int
    """Of the prompt: those that the KV cache of an earlier answer held, pictures included; the others were fed."""
    new_tokens: int
    drafted_tokens: int
    """Guessed by prompt lookup and fed behind a token; see `speculation`."""
    accepted_tokens: int
    """Of those: the ones that were then chosen, for which no step was needed."""
    kv_cache_bytes: int
    """Bytes of the keys and values of all tokens that were fed."""
    peak_memory_bytes: int | None
    """Largest resident size of the process since it started; None where the system does not tell."""
    notes: tuple[str, ...]
    """What was converted, resized, cut short or reused."""
    events: tuple[Event, ...] = ()
    """What happened to devices while the answer was made; each is a note, too."""


@dataclass(frozen=True)
class Result:
    """An answer. `token_ids` are all generated ids, with the stop id if one was generated."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    metrics: Metrics
    timeline: Timeline = field(repr=False, compare=False)
    """What the time went to; `timeline.write(path)` makes a file of it that Perfetto shows."""


def peak_memory_bytes() -> int | None:
    """The largest resident size of this process so far."""
    try:
        import resource
    except ImportError:  # Windows has no getrusage
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
