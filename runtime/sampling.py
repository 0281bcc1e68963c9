"""From logits to the next token: greedy, or drawn after the four steps of transformers, in its order.

Order: repetition penalty, temperature, top-k, top-p. The penalty sees generated tokens only, never the prompt, because
the official code generates from embeddings (spec 6.5). Every function returns a new array; a removed token is -inf.
A draw takes its random number from numpy's PCG64, so a seed gives the same text everywhere, but not torch's text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lensc.backends.errors import ExecutionError

F32 = npt.NDArray[np.float32]


def greedy(logits: F32) -> int:
    """The id with the largest of `logits: float32[vocab]`; the smallest such id on a tie."""
    token = int(logits.argmax())
    _check_finite(logits, token)
    return token


def sample(
    logits: F32,
    generated: Sequence[int],
    generator: np.random.Generator,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
) -> int:
    """Draw an id from `logits: float32[vocab]`, given the ids generated so far."""
    _check_finite(logits, int(logits.argmax()))
    scores = warp(
        logits,
        generated,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
    )
    kept = np.flatnonzero(scores > -np.inf)
    chances = np.cumsum(softmax(scores[kept]), dtype=np.float64)
    at = int(np.searchsorted(chances, generator.random() * chances[-1], side="right"))
    return int(kept[min(at, len(kept) - 1)])


def warp(
    logits: F32,
    generated: Sequence[int],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
) -> F32:
    """All four steps in order; `softmax` of the result is the distribution a token is drawn from."""
    scores = penalize(logits, generated, repetition_penalty)
    scores = scale(scores, temperature)
    scores = keep_top_k(scores, top_k)
    return keep_top_p(scores, top_p)


def penalize(scores: F32, generated: Sequence[int], penalty: float) -> F32:
    """Divide positive and multiply negative scores of the ids in `generated` by `penalty`, once per distinct id."""
    if penalty == 1.0 or not len(generated):
        return scores
    ids = np.unique(np.asarray(generated, np.int64))
    seen = scores[ids]
    result = scores.copy()
    result[ids] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return result


def scale(scores: F32, temperature: float) -> F32:
    """Divide by `temperature`."""
    return scores if temperature == 1.0 else scores / np.float32(temperature)


def keep_top_k(scores: F32, k: int) -> F32:
    """Remove every score below the k-th largest; ties with it stay. `k = 0` keeps all."""
    if not 0 < k < len(scores):
        return scores
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    return np.where(scores < least, np.float32(-np.inf), scores)


def keep_top_p(scores: F32, p: float) -> F32:
    """Keep the most likely scores whose probabilities sum to `p` or just above it; never fewer than one."""
    if p >= 1.0:
        return scores
    # Removed scores are left out: they have probability 0, and sorting a vocabulary of 128,000 takes 10 ms.
    kept = np.flatnonzero(scores > -np.inf)
    order = kept[np.argsort(scores[kept], kind="stable")]
    below = np.cumsum(softmax(scores[order])) <= np.float32(1 - p)
    below[-1] = False
    result = scores.copy()
    result[order[below]] = -np.inf
    return result


def softmax(scores: F32) -> F32:
    """Softmax over the last axis, in float32."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def log_softmax(scores: F32) -> F32:
    """Logarithm of the softmax over the last axis, in float32."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _check_finite(logits: F32, largest: int) -> None:
    # argmax returns the first NaN if there is one, so one look is enough.
    if not np.isfinite(logits[largest]):
        raise ExecutionError(f"decoder: logits hold {logits[largest]} at id {largest}, expected finite numbers")
