"""The hash of a large file is kept while the file stays as it is, and a file that does not is noticed."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from lensc.backends.errors import CheckpointError
from lensc.export import fingerprint
from lensc.export.fingerprint import FileState, file_state, sha256_of
from lensc.profiles import folders
from lensc.profiles.folders import cache_folder

OLD_NS = time.time_ns() - 3600 * 10**9


class Counted:
    """`sha256_file` that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, path: Path) -> str:
        self.calls += 1
        return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Every file counts as large, and the one in `weights` as written an hour ago."""
    counted = Counted()
    monkeypatch.setattr(fingerprint, "sha256_file", counted)
    monkeypatch.setattr(fingerprint, "CACHED_FROM_BYTES", 1)
    monkeypatch.setattr(folders.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint.time, "time", lambda: time.time_ns() / 1e9 + 3600)
    return counted


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    os.utime(path, ns=(OLD_NS, OLD_NS))
    return path


def digest(path: Path) -> str:
    return sha256_of(path, file_state(path))


def test_hash_is_kept_and_is_the_true_one(hashing: Counted, weights: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(weights)
    assert {digest(weights) for _ in range(3)} == {hashlib.sha256(b"weights").hexdigest()} == {digest(link)}
    assert hashing.calls == 1
    kept = json.loads((tmp_path / "cache" / "lensc" / "hashes.json").read_text())
    assert list(kept["files"]) == [str(weights.resolve())]
    assert [path.name for path in (tmp_path / "cache" / "lensc").iterdir()] == ["hashes.json"]


def test_other_contents_of_the_same_size_and_time_are_hashed_again(hashing: Counted, weights: Path) -> None:
    first = digest(weights)
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(OLD_NS, OLD_NS))  # what a copy that preserves times does
    assert digest(weights) == hashlib.sha256(b"WEIGHTS").hexdigest() != first
    weights.with_name("new").write_bytes(b"weIghts")
    os.utime(weights.with_name("new"), ns=(OLD_NS, OLD_NS))
    weights.with_name("new").replace(weights)
    assert digest(weights) == hashlib.sha256(b"weIghts").hexdigest()
    assert hashing.calls == 3


def test_a_file_that_was_just_written_is_not_kept(
    hashing: Counted, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint.time, "time", lambda: time.time_ns() / 1e9)
    weights.write_bytes(b"weights")
    digest(weights)
    digest(weights)
    assert hashing.calls == 2 and not (tmp_path / "cache").exists()


def test_small_files_are_not_kept(
    hashing: Counted, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "CACHED_FROM_BYTES", 8)
    digest(weights)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 2, "files": {}}', '{"format": 1, "files": 7}', "[" * 100_000, "\0", "9" * 5000],
    ids=["empty", "cut", "list", "newer", "number", "deep", "zero", "huge"],
)
def test_a_damaged_cache_is_ignored_and_replaced(text: str, hashing: Counted, weights: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "lensc" / "hashes.json"
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert digest(weights) == digest(weights) == hashlib.sha256(b"weights").hexdigest()
    assert hashing.calls == 1


@pytest.mark.parametrize("value", [None, 7, "", "g" * 64, "0" * 63, ["0" * 64]], ids=repr)
def test_a_damaged_entry_is_ignored(value: object, hashing: Counted, weights: Path, tmp_path: Path) -> None:
    true = digest(weights)
    cache = tmp_path / "cache" / "lensc" / "hashes.json"
    kept = json.loads(cache.read_text())
    kept["files"][str(weights.resolve())]["sha256"] = value
    cache.write_text(json.dumps(kept))
    assert digest(weights) == true and hashing.calls == 2


def test_a_cache_that_cannot_be_written_is_no_failure(hashing: Counted, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    assert digest(weights) == digest(weights) == hashlib.sha256(b"weights").hexdigest()
    assert hashing.calls == 2


def test_a_failed_write_leaves_no_temporary_file(
    hashing: Counted, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fingerprint.os, "replace", full)
    digest(weights)
    assert list((tmp_path / "cache" / "lensc").iterdir()) == []


def test_the_oldest_entries_go(hashing: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "CACHE_ENTRIES", 2)
    for name in "abcab":
        (tmp_path / name).write_bytes(b"x")
        digest(tmp_path / name)
    kept = json.loads((tmp_path / "cache" / "lensc" / "hashes.json").read_text())["files"]
    assert [Path(name).name for name in kept] == ["a", "b"]


def test_a_file_that_changes_while_it_is_hashed(
    hashing: Counted, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = file_state(weights)

    def writing(path: Path) -> str:
        path.write_bytes(b"weights and more")
        return "0" * 64

    monkeypatch.setattr(fingerprint, "sha256_file", writing)
    with pytest.raises(CheckpointError, match=r"changed while it was being read: 7 bytes became 16; .* run again"):
        sha256_of(weights, state)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(CheckpointError, match=r"changed while it was being read"):
        sha256_of(weights, state)


def test_a_file_that_goes_away(weights: Path) -> None:
    state = file_state(weights)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read: No such file"):
        sha256_of(weights, state)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read: No such file"):
        file_state(weights)


def test_inode_and_device_alone_are_no_change(weights: Path) -> None:
    state = FileState.of(weights)
    state.check(weights, FileState(state.size, state.mtime_ns, 1, 2, 3))
    with pytest.raises(CheckpointError, match="it was written to"):
        state.check(weights, FileState(state.size, state.mtime_ns + 1, 1, 2, 3))


def test_cache_folder_of_each_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.Path, "home", lambda: Path("/home/x"))
    for platform, variable, value, expected in (
        ("linux", "XDG_CACHE_HOME", "/var/cache/x", "/var/cache/x/lensc"),
        ("linux", "XDG_CACHE_HOME", "", "/home/x/.cache/lensc"),
        ("linux", "XDG_CACHE_HOME", "relative", "/home/x/.cache/lensc"),
        ("darwin", "XDG_CACHE_HOME", "", "/home/x/Library/Caches/lensc"),
        ("win32", "LOCALAPPDATA", "/local", "/local/lensc"),
        ("win32", "LOCALAPPDATA", "", "/home/x/AppData/Local/lensc"),
    ):
        monkeypatch.setattr(folders.sys, "platform", platform)
        monkeypatch.setenv(variable, value)
        assert cache_folder() == Path(expected)


def test_no_home_no_cache(hashing: Counted, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(folders.Path, "home", homeless)
    assert cache_folder() is None
    assert digest(weights) == digest(weights) and hashing.calls == 2
