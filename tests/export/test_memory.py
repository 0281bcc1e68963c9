"""Sizes are parsed and measured, limits hold, and the streamed reference holds a fraction of the model."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from lensc.backends.errors import MemoryLimitError, UsageError
from lensc.export import memory
from lensc.export.memory import (
    Limit,
    anonymous_bytes,
    available_bytes,
    parse_bytes,
    peak_bytes,
    reset_peak,
    resident_bytes,
    shown,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"

MIB = 1 << 20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def taken(mebibytes: int) -> mmap.mmap:
    """Memory that the system has to find, and gets back: what comes from the heap may lie in a hole that other tests left."""
    block = mmap.mmap(-1, mebibytes * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    return block


# --- amounts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        (" 1.5GiB ", 3 << 29),
        ("500MB", 500_000_000),
        ("64KiB", 65536),
        ("2TB", 2 * 10**12),
        ("17179869184", 1 << 34),
        ("1B", 1),
    ],
)
def test_amounts(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "4G", "4 GiBs", "-4GiB", "+4GiB", "4,5GiB", "1e9", "inf", "nan", "0x10", "4GiB 2MiB", "٤GiB", "4  GiB"],
)
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"is no amount of memory; expected a number and one of B, KB, .*e\.g\. 4GiB"
    ) as e:
        parse_bytes(text)
    assert repr(text) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["0", "0GiB", "0.1B"])
def test_nothing_is_no_amount(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected at least 1 byte"):
        parse_bytes(text)


def test_amounts_are_shown() -> None:
    assert shown(4 << 30) == "4.00 GiB" and shown(3 << 29) == "1.50 GiB" and shown(100 * MIB) == "100 MiB"


# --- what a process takes -----------------------------------------------------------------------------------------


@LINUX
def test_peak_and_resident_size() -> None:
    assert reset_peak()
    before = peak_bytes()
    block = taken(64)
    assert peak_bytes() - before > 60 * MIB and resident_bytes() > 64 * MIB
    del block
    memory.trim()
    assert peak_bytes() - before > 60 * MIB > resident_bytes() - before
    reset_peak()
    assert peak_bytes() - before < 30 * MIB


@LINUX
def test_pages_of_files_are_not_anonymous(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.writelines(bytes(MIB) for _ in range(64))
    anonymous, resident = anonymous_bytes(), resident_bytes()
    with open(tmp_path / "file", "rb") as written, mmap.mmap(written.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: 4 << 10]) == 0
        assert resident_bytes() - resident > 60 * MIB > 20 * MIB > anonymous_bytes() - anonymous
    block = taken(64)
    assert anonymous_bytes() - anonymous > 60 * MIB and block


def test_peak_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """What getrusage says is the same figure, since the start."""
    exact = peak_bytes()
    monkeypatch.setattr(memory, "_status", lambda process, key: None)
    assert peak_bytes() >= exact - MIB and resident_bytes() == peak_bytes()


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A root folder with 10 GiB available and no control groups."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:       16777216 kB\nMemAvailable:   10485760 kB\n")
    return tmp_path


def control_group(root: Path, path: str, version: int, limit: str, usage: int, reclaimable: int) -> None:
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    names = v1 if version == 1 else ("memory.max", "memory.current", "inactive_file")
    folder = root / "sys" / "fs" / "cgroup" / ("memory" if version == 1 else "") / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"cache 5\n{names[2]} {reclaimable}\n")


def test_available_without_limits(machine: Path) -> None:
    assert available_bytes(machine) == 10 << 30


@pytest.mark.parametrize("version", (1, 2))
def test_available_under_a_limit(machine: Path, version: int) -> None:
    line = "4:cpu,memory:/jobs/one\n2:cpuset:/\n" if version == 1 else "0::/jobs/one\n"
    (machine / "proc/self/cgroup").write_text(line)
    assert available_bytes(machine) == 10 << 30, "a group without files limits nothing"
    unlimited = "9223372036854771712" if version == 1 else "max"
    control_group(machine, "jobs/one", version, unlimited, 1 << 30, 0)
    assert available_bytes(machine) == 10 << 30
    control_group(machine, "jobs", version, str(4 << 30), 3 << 30, 1 << 29)
    assert available_bytes(machine) == 3 << 29, "the group around it limits, file cache can be reclaimed"
    control_group(machine, "jobs/one", version, str(1 << 30), 1 << 30, 0)
    assert available_bytes(machine) == 0
    control_group(machine, "jobs/one", version, str(1 << 30), 2 << 30, 0)
    assert available_bytes(machine) == 0, "usage may be above a limit that was lowered"


@pytest.mark.parametrize("version", (1, 2))
def test_available_in_a_container(machine: Path, version: int) -> None:
    """The path is the host's; what is mounted is the container's own group."""
    prefix = "9:memory:" if version == 1 else "0::"
    (machine / "proc/self/cgroup").write_text(f"{prefix}/docker/0123/../45\n")
    control_group(machine, "", version, str(2 << 30), 1 << 30, 0)
    assert available_bytes(machine) == 1 << 30


def test_available_here() -> None:
    assert 0 < available_bytes() < 1 << 50


# --- the promise --------------------------------------------------------------------------------------------------


@LINUX
def test_a_stage_that_takes_too_much() -> None:
    limit = Limit(resident_bytes() + 100 * MIB)
    with limit.stage("small"):
        block = taken(20)
        limit.check()
        del block
    with (
        pytest.raises(MemoryLimitError, match=r"^large: took \d.*iB of memory, --max-memory is \d.*iB; raise it$"),
        limit.stage("large"),
    ):
        block = taken(150)
        del block  # the peak counts, not what is left
        limit.check()
    assert limit.max_bytes is not None
    assert limit.peaks["large"] > limit.max_bytes > limit.peaks["small"]
    assert limit.peak >= limit.peaks["large"] and list(limit.peaks) == ["start", "small", "large"]


@LINUX
def test_the_end_of_a_stage_is_checked() -> None:
    limit = Limit(resident_bytes() + 50 * MIB)
    with pytest.raises(MemoryLimitError, match=r"^once: took"), limit.stage("once"):
        taken(100).close()


@LINUX
def test_a_stage_within_a_stage_counts_for_both() -> None:
    limit = Limit()
    with limit.stage("outer"):
        outer = taken(40)
        del outer
        with limit.stage("inner"):
            pass
    assert limit.peaks["outer"] > limit.peaks["inner"] + 20 * MIB


@LINUX
def test_needs_are_refused_before_work() -> None:
    limit = Limit(resident_bytes() + 100 * MIB)
    limit.require(resident_bytes(), "quantize")
    with pytest.raises(
        MemoryLimitError, match=r"^quantize: needs about 3\.00 GiB of memory, --max-memory is .*; raise it$"
    ):
        limit.require(3 << 30, "quantize")
    with pytest.raises(
        MemoryLimitError, match=r"^quantize: needs about 1024\.00 GiB of memory, this machine has .* free"
    ):
        Limit().require(1 << 40, "quantize")
    room = limit.room
    assert room is not None and 0 < room <= 101 * MIB and Limit().room is None
    assert Limit(1).room == 0


def child(mib: int, seconds: float = 0.0) -> subprocess.Popen[bytes]:
    code = f"import time; block = bytearray(b'x') * ({mib} << 20); time.sleep({seconds})"
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", code])


@LINUX
def test_peak_of_a_child_process() -> None:
    limit = Limit()
    with limit.stage("convert"):
        peak = limit.watch(child(400, 0.2))
    assert 400 * MIB < peak < 450 * MIB and limit.peaks["convert"] >= peak


@LINUX
def test_child_that_takes_too_much_is_killed() -> None:
    limit = Limit(resident_bytes() + 300 * MIB)
    process = child(mib := (limit.max_bytes or 0) // MIB + 100, seconds=60)
    with (
        pytest.raises(MemoryLimitError, match=r"^convert: a child process took .*, --max-memory is .*; raise it$"),
        limit.stage("convert"),
    ):
        limit.watch(process)
    assert process.returncode == -9 and limit.peaks["convert"] > limit.max_bytes > 0 and mib


@LINUX
def test_child_that_ends_at_once_is_measured() -> None:
    """Too short to be seen by looking at it, so the system's own figure counts. In a parent that was never large."""
    code = """
import subprocess, sys
from lensc.export import memory
status = memory._status
memory._status = lambda process, key: status(process, key) if process == "self" else None
limit = memory.Limit(300 << 20)
print(limit.watch(subprocess.Popen([sys.executable, "-I", "-S", "-c", "bytearray(b'x') * (200 << 20)"])))
limit.watch(subprocess.Popen([sys.executable, "-I", "-S", "-c", "bytearray(b'x') * (400 << 20)"]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert 200 * MIB < int(result.stdout) < 250 * MIB
    assert "MemoryLimitError: start: a child process took 4" in result.stderr


# --- the streamed reference ---------------------------------------------------------------------------------------

PASS = """
import json, sys
from lensc.export.checkpoint import Checkpoint
from lensc.export.memory import peak_bytes, reset_peak, resident_bytes
from lensc.export.models.session import torch_sessions
from lensc.export.models.streamed import StreamedModel, streamed_sessions
from lensc.export.verify import probe_feeds

import torch
torch.set_num_threads(1)
small, large, how = sys.argv[1:]

def run(folder):
    checkpoint = Checkpoint(folder)
    if how == "streamed":
        sessions = streamed_sessions(StreamedModel(checkpoint, checkpoint.config))
    else:
        sessions = torch_sessions(checkpoint.load_model())
    for session in sessions.values():
        session.run(probe_feeds(session.spec))

run(small)  # what torch loads and allocates once
assert reset_peak()
before = resident_bytes()
run(large)
print(json.dumps(peak_bytes() - before))
"""


@pytest.fixture(scope="module")
def mid_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 12 decoder layers, 215 MB in float32; its largest block, the vocabulary aside, has 15 MB."""
    torch = pytest.importorskip("torch", reason="pip install 'lensc[export]'")
    from safetensors.torch import save_file

    from lensc.export.models.config import ModelConfig
    from lensc.export.models.minicpmv import MiniCPMV

    folder = tmp_path_factory.mktemp("mid-size")
    config = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 8000}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MiniCPMV(ModelConfig.from_json(config)).state_dict().items()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul(0.02).half()
    weights = {
        name: noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape)
        for name, shape in shapes.items()
    }
    save_file({name: weight.clone() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


@LINUX
def test_streamed_pass_holds_a_fraction_of_the_model(mid_size: Path) -> None:
    """And the same measurement shows the model where it is held."""
    took = {}
    for how in ("streamed", "in memory"):
        command = [sys.executable, "-c", PASS, str(GOLDEN), str(mid_size), how]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        took[how] = json.loads(result.stdout)
    model = 2 * (mid_size / "model.safetensors").stat().st_size
    assert model > 200_000_000
    assert took["in memory"] > 0.95 * model
    assert took["streamed"] < 0.35 * model, f"{took['streamed'] / MIB:.0f} MiB of {model / MIB:.0f} MiB"
