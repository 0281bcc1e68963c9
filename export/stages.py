"""A folder that is built in stages: resumable after a kill at any point, and swapped in whole.

While `out` is built, everything lies in `<out>.partial/` beside it:

    lock            held by the process that builds; the system releases it when the process dies
    journal.jsonl   a line for each finished stage: the key of its inputs, its files with their hashes, its result
    tree/           what becomes `out`
    <work>/         files that stages need and that are not shipped
    old/            the former `out`, from the moment it is moved aside until the new one is in its place

A stage whose key stands in the journal and whose files are intact is not run again. Nothing under `out` is touched
before the last stage is done; then the old folder is moved aside, the new one renamed, the old one deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, TypeVar

from lensc.backends.base import FileRecord
from lensc.backends.bundle import StageRecord, load_manifest, sha256_file
from lensc.backends.codec import decode, encode
from lensc.backends.compiling import listening
from lensc.backends.errors import IntegrityError, ManifestError, StorageError, UsageError
from lensc.backends.files import PARTIAL

from .memory import Limit

T = TypeVar("T")

RESUMABLE = (".data.partial", ".data.partial.journal", ".calibrated.safetensors")
"""Ends of the names of files that a stage goes on with by itself (`data_file`, `quantize.calibrated`), and that are
therefore kept."""

LOCK, JOURNAL, TREE, OLD = "lock", "journal.jsonl", "tree", "old"


@dataclass(frozen=True)
class StageEvent:
    """What is reported of a stage: it starts, it is in a part of its work, which `stage` then names, too, it is done, or its
    former result is kept. `index` counts from 1.
    """

    stage: str
    state: Literal["start", "part", "done", "kept"]
    index: int
    total: int
    seconds: float = 0.0


Report = Callable[[StageEvent], None]


@dataclass(frozen=True)
class _Finished:
    """A line of the journal. Paths of `files` are relative to the staging folder."""

    stage: str
    key: str
    files: tuple[FileRecord, ...]
    result: str
    """The result as JSON text."""
    seconds: float
    peak_bytes: int


def check_replaceable(out: Path) -> None:
    """Raise UsageError unless `out` is absent, an empty folder, or a bundle with nothing else in it."""
    if not out.name:
        raise UsageError(f"{out}: cannot be the output folder, give a path to a new folder")
    if not os.path.lexists(out):
        return
    if Path.cwd().is_relative_to(out.resolve()):
        raise UsageError(f"{out}: is the current folder or one around it; choose another output folder")
    if not out.is_dir():
        raise UsageError(f"{out}: exists and is not a folder; choose another output folder or remove it")
    if not any(out.iterdir()):
        return
    try:
        load_manifest(out)
    except IntegrityError:
        return  # a damaged bundle may be replaced: its files are all listed
    except ManifestError as error:
        raise UsageError(
            f"{out}: exists and is not a bundle that can be replaced ({error}); choose another output folder or remove it"
        ) from error


_HINTS = {
    errno.ENOSPC: "free some space and run again, finished stages are kept",
    errno.EDQUOT: "free some space and run again, finished stages are kept",
    errno.EFBIG: "the file is larger than the system or a limit (ulimit -f) allows",
    errno.EROFS: "choose another output folder",
    errno.EACCES: "choose another output folder",
    errno.EPERM: "choose another output folder",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while files at `path` are read and written into a StorageError of one line."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0)
        raise StorageError(
            f"{error.filename or path}: {error.strerror or error}" + (f"; {hint}" if hint else "")
        ) from error


class Staging:
    """Builds the folder `out` in stages. A context manager: it holds the lock and, unless published, leaves what was made.

    `tree` is the folder that becomes `out`; stages write there or elsewhere under `folder`.
    """

    def __init__(self, out: Path, total: int, report: Report | None = None, limit: Limit | None = None) -> None:
        """`total` is the number of stages, as far as it is known, for the reports; `limit` the memory that none may exceed.

        Raises UsageError if `out` must not be replaced.
        """
        self.limit = limit or Limit()
        self.records: list[StageRecord] = []
        """Time and memory of every stage so far, those of a kept one as they were when it ran."""
        self.out = Path(os.path.abspath(out)).resolve()
        check_replaceable(self.out)
        self.folder = self.out.with_name(self.out.name + PARTIAL)
        self.tree = self.folder / TREE
        self._report = report or (lambda event: None)
        self._total = total
        self._index = 0
        self._lock: IO[str] | None = None
        self._journal: dict[str, _Finished] = {}
        self._used: set[str] = set()

    def __enter__(self) -> Self:
        with storage_errors(self.folder):
            self._lock = _acquire(self.folder, self.out)
            try:
                self._recover()
            except BaseException:
                self._lock.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            if error is not None and [*_files(self.folder)] == [self.folder / LOCK]:
                self._remove()  # it failed before anything was made
            self._lock.close()

    def require(self, nbytes: int) -> None:
        """Raise StorageError unless the disk has room for `nbytes`, counting what is staged already."""
        with storage_errors(self.folder):
            staged = sum(path.stat().st_size for path in _files(self.folder))
            free = shutil.disk_usage(self.folder).free
        if nbytes - staged > free:
            raise StorageError(
                f"{self.out}: about {_shown(nbytes - staged)} are needed, {_shown(free)} are free; "
                "free some space or choose another output folder"
            )

    def stage(
        self, name: str, inputs: Mapping[str, str], kind: type[T], make: Callable[[], tuple[T, Sequence[Path]]]
    ) -> T:
        """Run the stage `name`, or keep what it made in an earlier run from the same `inputs`.

        `make` returns the result, of the type `kind`, and the files it wrote under `folder`. The result must survive
        `backends.codec`. An OSError becomes a StorageError.
        """
        self._index += 1
        self._total = max(self._total, self._index)
        key = hashlib.sha256(json.dumps([name, dict(inputs)], sort_keys=True).encode()).hexdigest()
        before = self._journal.get(name)
        if before is not None and before.key == key and self._intact(before):
            kept = decode(kind, json.loads(before.result), [])
            if kept is not None:
                self._used.update(record.path for record in before.files)
                self.records.append(StageRecord(name, before.seconds, before.peak_bytes))
                self._report(StageEvent(name, "kept", self._index, self._total))
                return kept
        self._report(StageEvent(name, "start", self._index, self._total))
        started = time.perf_counter()
        with storage_errors(self.folder):
            for record in before.files if before is not None else ():
                (self.folder / record.path).unlink(missing_ok=True)
            with self.limit.stage(name), listening(lambda part: self._report_part(name, part)):
                result, paths = make()
            files = tuple(self._record(path) for path in paths)
            seconds = round(time.perf_counter() - started, 2)
            finished = _Finished(name, key, files, json.dumps(encode(result)), seconds, self.limit.peaks[name])
            with open(self.folder / JOURNAL, "a", encoding="utf-8") as journal:
                journal.write(json.dumps(encode(finished)) + "\n")
        self._used.update(record.path for record in files)
        self.records.append(StageRecord(name, seconds, finished.peak_bytes))
        self._report(StageEvent(name, "done", self._index, self._total, time.perf_counter() - started))
        return result

    def _report_part(self, name: str, part: str) -> None:
        self._report(StageEvent(f"{name}: {part}", "part", self._index, self._total))

    def publish(self, finish: Callable[[Path], T]) -> T:
        """Let `finish` complete the tree (the manifest, last), then put it in the place of `out`; return its result."""
        self._index += 1
        name = f"publish {self.out.name}"
        self._report(StageEvent(name, "start", self._index, self._total))
        started = time.perf_counter()
        with storage_errors(self.out):
            self.tree.mkdir(exist_ok=True)
            _prune(self.tree, {self.folder / path for path in self._used})
            result = finish(self.tree)
            check_replaceable(self.out)
            if self.out.exists():
                os.rename(self.out, self.folder / OLD)
                self._report(StageEvent("move the old folder aside", "done", self._index, self._total))
            os.rename(self.tree, self.out)
            self._report(StageEvent("rename the new folder", "done", self._index, self._total))
            self._remove()
        self._report(StageEvent(name, "done", self._index, self._total, time.perf_counter() - started))
        return result

    def discard(self) -> None:
        """Remove all that is staged: what came of it stands elsewhere."""
        with storage_errors(self.folder):
            self._remove()

    def _remove(self) -> None:
        # The lock goes last: who finds it gone finds nothing left to take over.
        _prune(self.folder, {self.folder / LOCK})
        (self.folder / LOCK).unlink()
        try:
            os.rmdir(self.folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # another build has begun in it
                raise

    def _recover(self) -> None:
        """Bring the folder into the state after the last finished stage, and `out` back if it was moved aside."""
        old = self.folder / OLD
        if old.exists():
            if self.out.exists():
                _prune(self.folder, {self.folder / LOCK})
            else:
                os.rename(old, self.out)
        self._journal = {finished.stage: finished for finished in _read_journal(self.folder / JOURNAL)}
        known = {self.folder / record.path for finished in self._journal.values() for record in finished.files}
        known |= {path for path in _files(self.folder) if path.name.endswith(RESUMABLE)}
        _prune(self.folder, known | {self.folder / LOCK, self.folder / JOURNAL})
        self.tree.mkdir(exist_ok=True)

    def _record(self, path: Path) -> FileRecord:
        relative = path.relative_to(self.folder).as_posix()
        return FileRecord(relative, path.stat().st_size, sha256_file(path))

    def _intact(self, finished: _Finished) -> bool:
        for record in finished.files:
            path = self.folder / record.path
            try:
                if path.stat().st_size != record.bytes or sha256_file(path) != record.sha256:
                    return False
            except OSError:
                return False
        return True


def _acquire(folder: Path, out: Path) -> IO[str]:
    """Take the lock of `folder`, made if need be. Raises StorageError if another process holds it."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # Twice, because a build that ends while the folder is listed may show its files but no lock.
            if _is_foreign(folder) and _is_foreign(folder):
                raise UsageError(
                    f"{folder}: exists and was not made by lensc; remove it or choose another output folder"
                )
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (held until the build ends)
        except FileNotFoundError:
            continue  # the build that had it finished just now and removed the folder
        if not _try_lock(file):
            file.seek(0)
            owner = file.read(20).strip()
            file.close()
            raise StorageError(f"{out}: is being built by another process (pid {owner}); wait for it or choose another")
        try:
            same = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
        except FileNotFoundError:
            same = False
        if same:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file
        file.close()


def _is_foreign(folder: Path) -> bool:
    """Whether `folder` holds something, but no lock: the lock is the first file of ours and the last."""
    names = os.listdir(folder)
    return bool(names) and LOCK not in names


def _try_lock(file: IO[str]) -> bool:
    if sys.platform == "win32":
        raise UsageError("building needs Linux or macOS: a folder in use cannot be replaced on Windows")
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_journal(path: Path) -> Iterator[_Finished]:
    """The finished stages; reading stops at the first line that a kill or a damage cut."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (FileNotFoundError, UnicodeDecodeError):
        return
    for line in lines:
        try:
            data: Any = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            data = None
        finished = decode(_Finished, data, [])
        if finished is None:
            return
        yield finished


def _files(folder: Path) -> Iterator[Path]:
    for inside, _, names in os.walk(folder):
        yield from (Path(inside) / name for name in names)


def _prune(folder: Path, keep: set[Path]) -> None:
    """Remove every file under `folder` that is not in `keep`, and the folders that are then empty."""
    for inside, folders, names in os.walk(folder, topdown=False):
        for name in names:
            if Path(inside) / name not in keep:
                os.unlink(Path(inside) / name)
        for name in folders:
            path = Path(inside) / name
            if path.is_symlink():
                os.unlink(path)
            elif not any(path.iterdir()):
                path.rmdir()


def _shown(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
