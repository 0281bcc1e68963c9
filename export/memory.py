"""How much memory a process takes, and the promise that it takes no more than it was given.

The peak is the largest resident size: pages in memory, those of mapped files included, those of the system's file cache
not. Reading a file costs nothing of it, mapping one does.

Freed memory does not always go back to the system. glibc maps every block of 32 MiB or more that does not fit into a hole
of its heap on its own, and unmaps it when it is freed; others come from the heap, which shrinks at its end only. The
weights of a full-size layer are above that limit, so what stays behind after one are its smaller activations, about 0.1 GB
for 1500 tokens; `trim` gives them back in a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lensc.backends.errors import MemoryLimitError, UnavailableError, UsageError

UNITS = {"B": 1}
UNITS |= {f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}
UNITS |= {f"{prefix}iB": 1024**i for i, prefix in enumerate("KMGT", 1)}

POLL_SECONDS = 0.02
"""How often the size of a child process is looked at: it can allocate about 100 MB in that time."""


def parse_bytes(text: str) -> int:
    """The bytes that `text` names: `4GiB`, `3.5 GB`, `4294967296`. Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z]*)", text.strip(), re.ASCII)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match is None or (unit := match[2].lower() or "b") not in units:
        raise UsageError(f"{text!r} is no amount of memory; expected a number and one of {', '.join(UNITS)}, e.g. 4GiB")
    value = round(float(match[1]) * units[unit])
    if value < 1:
        raise UsageError(f"{text!r} is no amount of memory; expected at least 1 byte, e.g. 4GiB")
    return value


def shown(nbytes: int) -> str:
    """`nbytes` for a message: `3.71 GiB`, `12 MiB`."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.0f} MiB"


# --- what a process takes -----------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The largest resident size of this process since it started, or since `reset_peak`. Raises UnavailableError."""
    return _status("self", "VmHWM") or _rusage(children=False)


def peak_bytes_of(process: int) -> int | None:
    """The largest resident size of another process; None where the system does not tell, or if it has ended.

    What getrusage tells a process includes what its parent had when it was started; this does not.
    """
    return _status(str(process), "VmHWM")


def resident_bytes() -> int:
    """The resident size of this process now; where the system does not tell, its largest. Raises UnavailableError."""
    return _status("self", "VmRSS") or _rusage(children=False)


def anonymous_bytes() -> int:
    """The resident size without the pages of files, which the system takes away and brings back as it likes; where it
    does not tell, the resident size. Raises UnavailableError.
    """
    return _status("self", "RssAnon") or resident_bytes()


def reset_peak() -> bool:
    """Let `peak_bytes` begin anew at the present size. False where the system cannot: then it goes on from the start."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Give freed memory back to the system where the C library knows how to (glibc); nothing elsewhere."""
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)


def available_bytes(root: Path = Path("/")) -> int:
    """How much this process can still take: what the machine has free, and what the limits of its control groups leave.

    Pages of the file cache count as free. `root` is where `proc` and `sys` are. Outside of Linux all of the machine's
    memory counts. Raises UnavailableError where the system does not tell.
    """
    free = _meminfo(root / "proc/meminfo")
    if free is None:
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError) as error:
            raise UnavailableError("this system does not tell how much memory it has; give --max-memory") from error
    return max(0, min((free, *_control_groups(root))))


# --- the promise --------------------------------------------------------------------------------------------------


class Limit:
    """The most memory this process may take, in bytes; None measures and forbids nothing.

    `peaks` holds the peak of each stage that has run, that of its child processes included; `start` is what came before
    the first.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.peaks: dict[str, int] = {}
        self._stage = "start"

    @property
    def peak(self) -> int:
        """The largest of all stages, in bytes."""
        return max(self.peaks.values(), default=0)

    @property
    def room(self) -> int | None:
        """What may be allocated on top of what is held now, in bytes; None without a limit."""
        return None if self.max_bytes is None else max(0, self.max_bytes - resident_bytes())

    def require(self, nbytes: int, stage: str) -> None:
        """Raise MemoryLimitError, before any work, if a `stage` that peaks at `nbytes` cannot keep the promise."""
        if self.max_bytes is not None and nbytes > self.max_bytes:
            raise MemoryLimitError(
                f"{stage}: needs about {shown(nbytes)} of memory, --max-memory is {shown(self.max_bytes)}; raise it"
            )
        free = available_bytes() + resident_bytes()
        if nbytes > free:
            raise MemoryLimitError(
                f"{stage}: needs about {shown(nbytes)} of memory, this machine has {shown(free)} free; "
                "end other programs or take a larger machine"
            )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what is done inside as the stage `name`; raise MemoryLimitError at its end if it took too much."""
        self._note(peak_bytes())
        before, self._stage = self._stage, name
        reset_peak()
        try:
            yield
            self.check()
        finally:
            self._note(peak_bytes())
            self._stage = before

    def check(self) -> None:
        """Raise MemoryLimitError if the stage took more than it may. To be called between pieces of work."""
        peak = peak_bytes()
        self._note(peak)
        self._judge(peak, "")

    def watch(self, process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> int:
        """Wait for a child process and return its peak in bytes, which counts as the stage's.

        A child that takes more than the limit is killed. Raises MemoryLimitError then. Its output must not be a pipe that
        somebody has to empty.
        """
        peak, before, own = 0, _rusage(children=True), peak_bytes()
        while True:
            peak = max(peak, peak_bytes_of(process.pid) or 0)
            if self.max_bytes is not None and peak > self.max_bytes:
                process.kill()
                process.wait()
                break
            try:
                process.wait(POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
        # The system's own figure sees the last moment, too, but it is the largest of all children, and a child begins
        # with the size of its parent: it is this child's where it is above both.
        exact = _rusage(children=True)
        peak = max(peak, exact if exact > max(before, own) else 0)
        self._note(peak)
        self._judge(peak, "a child process ")
        return peak

    def _note(self, peak: int) -> None:
        self.peaks[self._stage] = max(peak, self.peaks.get(self._stage, 0))

    def _judge(self, peak: int, who: str) -> None:
        if self.max_bytes is not None and peak > self.max_bytes:
            raise MemoryLimitError(
                f"{self._stage}: {who}took {shown(peak)} of memory, --max-memory is {shown(self.max_bytes)}; raise it"
            )


# --- what the system tells ----------------------------------------------------------------------------------------


def _status(process: str, key: str) -> int | None:
    """A size in bytes from /proc/<process>/status; None if there is none, as for a process that has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    match = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) << 10 if match else None


def _rusage(children: bool) -> int:
    try:
        import resource
    except ImportError as error:  # Windows
        raise UnavailableError(
            "this system does not tell how much memory a process takes; use Linux or macOS"
        ) from error
    peak = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _meminfo(path: Path) -> int | None:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", path.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) << 10 if match else None


def _control_groups(root: Path) -> Iterator[int]:
    """What each memory limit leaves that holds for this process: of its group and of all groups around it.

    Inside a container the path of the group may be the host's, which is not visible; its own is then the root.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            left = _left(folder, *names)
            if left is not None:
                yield left


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """What the limit of one group leaves, the file cache that can be reclaimed included; None without a limit."""
    try:
        most, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
        statistics = (folder / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):  # no such group, or `max`
        return None
    match = re.search(rf"^{reclaimable} (\d+)$", statistics, re.MULTILINE)
    return most - used + (int(match[1]) if match else 0)
