"""The KV cache: views, growth, forks, reordering, and errors that name the limit."""

from __future__ import annotations

import numpy as np
import pytest

from lensc.backends.bundle import DecoderSpec
from lensc.backends.errors import PromptError, UsageError
from lensc.runtime.kv_cache import KVCache

SPEC = DecoderSpec(hidden_size=8, num_layers=2, num_kv_heads=3, head_dim=5, vocab_size=11, context_length=64)


def fill(cache: KVCache, values: list[int]) -> None:
    """Append one row per value; layer i, key or value, sequence b hold distinct numbers."""
    for value in values:
        for at, (_, slot) in enumerate(cache.slots(1).items()):
            slot[...] = value + 1000 * at + 10_000 * np.arange(cache.batch)[None, :, None, None]
        cache.advance(1)


def rows(cache: KVCache, name: str = "past_key.0") -> list[list[int]]:
    return [[int(x) for x in sequence] for sequence in cache.past()[name][:, :, 0, 0].T]


def test_starts_empty_with_the_graph_s_names_and_shapes() -> None:
    cache = KVCache(SPEC, capacity=4, batch=2)
    assert list(cache.past()) == ["past_key.0", "past_value.0", "past_key.1", "past_value.1"]
    assert list(cache.slots(1)) == ["key.0", "value.0", "key.1", "value.1"]
    assert {a.shape for a in cache.past().values()} == {(0, 2, 3, 5)}
    assert {(a.shape, a.dtype) for a in cache.slots(3).values()} == {((3, 2, 3, 5), np.dtype(np.float32))}


def test_views_are_contiguous_and_rows_written_to_slots_become_the_past_without_a_copy() -> None:
    cache = KVCache(SPEC, capacity=8, batch=3)
    fill(cache, [1, 2])
    slot = cache.slots(2)["value.1"]
    cache.advance(2)
    past = cache.past()["past_value.1"]
    assert np.shares_memory(past, slot) and past.flags.c_contiguous and slot.flags.c_contiguous
    assert past.shape == (4, 3, 3, 5)
    assert cache.growths == 0


def test_rows_count_only_after_advance() -> None:
    cache = KVCache(SPEC, capacity=8)
    cache.slots(3)
    assert cache.length == 0
    cache.advance(3)
    assert cache.length == 3


def test_nbytes() -> None:
    cache = KVCache(SPEC, capacity=10, batch=2)
    assert cache.nbytes == 10 * 2 * 3 * 5 * 4 * 2 * 2
    assert cache.used_bytes == 0
    fill(cache, [1])
    assert cache.used_bytes == cache.nbytes // 10


def test_grows_by_doubling_and_keeps_its_rows() -> None:
    cache = KVCache(SPEC, capacity=2)
    fill(cache, list(range(9)))
    assert (cache.capacity, cache.growths) == (16, 3)
    assert rows(cache) == [list(range(9))]
    assert rows(cache, "past_value.1") == [[3000 + i for i in range(9)]]


def test_growth_stops_at_the_context_length() -> None:
    cache = KVCache(SPEC, capacity=40)
    cache.slots(40)
    cache.advance(40)
    cache.slots(24)
    assert cache.capacity == 64
    cache.advance(24)
    with pytest.raises(PromptError, match="65 tokens do not fit: context_length is 64"):
        cache.slots(1)
    assert cache.length == 64


def test_growth_stops_at_a_lower_limit() -> None:
    with pytest.raises(PromptError, match="9 tokens do not fit: limit is 8"):
        KVCache(SPEC, capacity=2, limit=8).slots(9)


def test_trim_forgets_and_overwrites() -> None:
    cache = KVCache(SPEC, capacity=8)
    fill(cache, [1, 2, 3, 4])
    cache.trim(2)
    fill(cache, [9])
    assert rows(cache) == [[1, 2, 9]]


def test_fork_copies_the_rows_to_every_sequence_and_shares_nothing() -> None:
    cache = KVCache(SPEC, capacity=8)
    fill(cache, [1, 2])
    fork = cache.fork(3)
    assert rows(fork) == [[1, 2]] * 3
    fill(fork, [5])
    assert rows(cache) == [[1, 2]]
    assert rows(fork) == [[1, 2, 5], [1, 2, 10_005], [1, 2, 20_005]]


def test_reorder_moves_the_rows_after_the_prompt() -> None:
    cache = KVCache(SPEC, capacity=8)
    fill(cache, [1])
    beams = cache.fork(3)
    fill(beams, [5, 6])
    beams.reorder(np.array([2, 2, 0]), start=1)
    assert rows(beams) == [[1, 20_005, 20_006], [1, 20_005, 20_006], [1, 5, 6]]
    assert rows(beams, "past_value.1") == [[3001, 23_005, 23_006], [3001, 23_005, 23_006], [3001, 3005, 3006]]


def test_reorder_leaves_rows_before_start() -> None:
    beams = KVCache(SPEC, capacity=8, batch=2)
    fill(beams, [1, 2])
    beams.reorder(np.array([1, 0]), start=1)
    assert rows(beams) == [[1, 10_002], [10_001, 2]]


def test_identity_reorder_changes_nothing() -> None:
    beams = KVCache(SPEC, capacity=8, batch=2)
    fill(beams, [1, 2])
    beams.reorder(np.array([0, 1]), start=0)
    assert rows(beams) == [[1, 2], [10_001, 10_002]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KVCache(SPEC, capacity=0), "capacity 0"),
        (lambda: KVCache(SPEC, capacity=65), "context_length 64"),
        (lambda: KVCache(SPEC, capacity=9, limit=8), "limit 8"),
        (lambda: KVCache(SPEC, capacity=8, batch=0), "batch 0"),
        (lambda: KVCache(SPEC, capacity=8).advance(9), "8 of 8 rows are free"),
        (lambda: KVCache(SPEC, capacity=8).trim(1), "expected 0 to 0"),
        (lambda: KVCache(SPEC, capacity=8).trim(-1), "cannot trim to -1"),
        (lambda: KVCache(SPEC, capacity=8, batch=2).fork(2), "batch of 2"),
        (lambda: KVCache(SPEC, capacity=8, batch=2).reorder(np.array([0, 2]), 0), "below 2"),
        (lambda: KVCache(SPEC, capacity=8, batch=2).reorder(np.array([0]), 0), "below 2"),
    ],
)
def test_misuse_is_named(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()  # type: ignore[operator]
