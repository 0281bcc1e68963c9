"""Image embeddings on disk: right, or not used; shared by processes, and never more than was allowed."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lensc.runtime.picture_cache import HASH_BYTES, SUFFIX, PictureCache
from lensc.runtime.pipeline import VLM

SHAPE = (3, 8)
ENTRY = HASH_BYTES + 4 * 3 * 8
RECIPE = {"graph": "a" * 64, "vision_padding": "official"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "lensc" / "pictures"


def features(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(SHAPE, np.float32)


def key(i: int) -> bytes:
    return i.to_bytes(32, "big")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def make(tiny: Any, limit: int = 1 << 20, recipe: Any = RECIPE) -> tuple[VLM, Any]:
    vision = tiny.FakeVision()
    cache = PictureCache(recipe, SHAPE, limit)
    parts = {"vision": vision, "decoder": tiny.FakeDecoder()}
    return VLM(tiny.SPEC, tiny.TOKENIZER, parts, tiny.TABLE, picture_cache=cache), vision


def test_another_process_encodes_nothing(tiny: Any) -> None:
    picture = tiny.picture(56, 30)
    first, vision = make(tiny)
    expected = first.generate("What?", [picture])
    assert vision.runs
    second, vision = make(tiny)
    result = second.generate("What?", [picture])
    assert result.token_ids == expected.token_ids
    assert not vision.runs and result.metrics.slices_from_cache == len(result.metrics.image_ms)
    other, vision = make(tiny, recipe=RECIPE | {"graph": "b" * 64})
    other.generate("What?", [picture])
    assert vision.runs, "what another graph made is not taken"


def test_what_comes_back_is_bit_for_bit_and_the_owner_s_alone(folder: Path) -> None:
    cache = PictureCache(RECIPE, SHAPE, 1 << 20)
    assert cache.get(key(1)) is None
    cache.put(key(1), features(1))
    np.testing.assert_array_equal(PictureCache(RECIPE, SHAPE, 1 << 20).get(key(1)), features(1))
    assert cache.get(key(2)) is None and cache.notes() == []
    (path,) = folder.iterdir()
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_padding_is_part_of_the_key(tiny: Any) -> None:
    """A small picture beside one with larger slices has other features under "official"."""
    small, large = tiny.picture(28, 28), tiny.picture(49, 28, 1)
    alone, _ = make(tiny)
    alone.generate("What?", [small])
    beside, vision = make(tiny)
    result = beside.generate("What?", [small, large])
    assert len(vision.runs) == len(result.metrics.image_ms)
    again, vision = make(tiny)
    assert again.generate("What?", [small, large]).token_ids == result.token_ids and not vision.runs


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data + b"x",
    ],
    ids=["value", "hash", "short", "empty", "long"],
)
def test_a_damaged_entry_is_removed_with_a_note_and_made_anew(tiny: Any, folder: Path, damage: Any) -> None:
    picture = tiny.picture()
    first, _ = make(tiny)
    expected = first.generate("What?", [picture]).token_ids
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    second, vision = make(tiny)
    result = second.generate("What?", [picture])
    assert result.token_ids == expected and len(vision.runs) == 1
    assert [n for n in result.metrics.notes if "was damaged and is removed; the slice is encoded again" in n]
    third, vision = make(tiny)
    assert third.generate("What?", [picture]).token_ids == expected and not vision.runs


def test_the_least_recently_used_go_first(folder: Path) -> None:
    cache = PictureCache(RECIPE, SHAPE, 3 * ENTRY)
    for i in range(3):
        cache.put(key(i), features(i))
        os.utime(cache._path(key(i)), ns=(i, i))
    assert cache.get(key(0)) is not None, "which makes it the latest used"
    cache.put(key(3), features(3))
    assert [cache.get(key(i)) is not None for i in range(4)] == [True, False, True, True]
    small = PictureCache(RECIPE, SHAPE, ENTRY - 1)
    small.put(key(9), features(9))
    assert small.get(key(9)) is None and len(names(folder)) == 3, "what has no room is not written"
    PictureCache(RECIPE, SHAPE, 2 * ENTRY).put(key(4), features(4))
    assert len(names(folder)) == 2


def test_a_full_disk_is_a_note_and_no_cache(tiny: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    vlm, _ = make(tiny)
    expected = tiny.make()[0].generate("What?", [tiny.picture(56, 30)]).token_ids
    result = vlm.generate("What?", [tiny.picture(56, 30)])
    assert result.token_ids == expected
    notes = [n for n in result.metrics.notes if "picture cache" in n]
    assert len(notes) == 1 and "not written: No space left on device; no more pictures are kept" in notes[0]
    assert names(folder) == [], "nothing half written stays"
    assert not [n for n in vlm.generate("What?", [tiny.picture(seed=9)]).metrics.notes if "picture cache" in n]


def test_a_folder_that_cannot_be_is_a_note(tiny: Any, folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file")
    vlm, vision = make(tiny)
    notes = vlm.generate("What?", [tiny.picture()]).metrics.notes
    assert vision.runs and [n for n in notes if "not written: File exists" in n]


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    cache = PictureCache(RECIPE, SHAPE, 1 << 20)
    cache.put(key(0), features(0))
    for name, age in (("old.partial", 7200), ("new.partial", 10)):
        (folder / name).write_text("half")
        then = os.stat(folder / name).st_mtime - age
        os.utime(folder / name, (then, then))
    cache.put(key(1), features(1))
    assert [n for n in names(folder) if not n.endswith(SUFFIX)] == ["new.partial"]


FILL = """
import sys
import numpy as np
from lensc.runtime.picture_cache import PictureCache

cache = PictureCache({"graph": "a"}, (3, 8), int(sys.argv[2]))
features = lambda i: np.random.default_rng(i).standard_normal((3, 8), np.float32)
wrong = 0
for i in np.random.default_rng(int(sys.argv[1])).integers(0, 8, 300).tolist():
    key = i.to_bytes(32, "big")
    found = cache.get(key)
    wrong += found is not None and not np.array_equal(found, features(i))
    cache.put(key, features(i))
print(wrong, cache.notes())
"""
"""Puts and gets at random, and counts what was not as it was put."""


def test_two_processes_on_one_cache(folder: Path) -> None:
    command = [sys.executable, "-P", "-c", FILL]
    running = [
        subprocess.Popen([*command, str(seed), str(4 * ENTRY)], stdout=subprocess.PIPE, text=True) for seed in (1, 2)
    ]
    assert [process.communicate(timeout=60)[0] for process in running] == ["0 []\n", "0 []\n"]
    assert 0 < len(names(folder)) <= 5 and all(n.endswith(SUFFIX) for n in names(folder))
