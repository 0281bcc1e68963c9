"""What the machine at hand is: processor, instruction sets, cores and memory this process may use.

Linux answers from /proc, /sys and the control groups, so that a container's share is seen rather than the host.
Elsewhere the standard library answers what it can; what nobody knows stays empty or None.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from .profile import DeviceProfile, Figure, Processor

ROOT = Path("/")

ISA_FLAGS = (
    # x86-64
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    # AArch64
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
"""The instruction sets that change how fast a model runs, as Linux spells them, oldest first."""

PACKAGES = (
    *(
        "lensc",
        "numpy",
        "onnxruntime",
        "tokenizers",
        "pillow",
        "torch",
        "triton",
        "onnx",
        "openvino",
        "onnxruntime-qnn",
    ),
    "tensorrt",
)
"""Those whose version can change what a model computes, or how fast."""

_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
_FLOAT16 = {"avx512_fp16", "asimdhp"}
_UNLIMITED = 1 << 60
"""Control groups of version 1 write "no limit" as a number near 2^63."""


@dataclass(frozen=True)
class Machine:
    """`cores` are physical cores and `threads` hardware threads this process may run on; `memory_bytes` is the
    smaller of the machine's memory and the process's limit.
    """

    cpu: str
    arch: str
    system: str
    isa: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int | None

    @property
    def saturates_bytes(self) -> bool:
        """Whether products of unsigned and signed bytes are summed two by two in 16 bits, where 2 * 255 * 127 has no room: the
        engines' kernels for x86 without VNNI (`vpmaddubsw`).
        """
        return self.arch in ("x86_64", "AMD64") and not {"avx_vnni", "avx512_vnni"} & {*self.isa}

    def __str__(self) -> str:
        memory = f", {self.memory_bytes / 2**30:.1f} GiB" if self.memory_bytes else ""
        return f"{self.cpu} ({self.arch}), {self.cores} cores, {self.threads} threads{memory}"


def machine(root: Path = ROOT) -> Machine:
    """Look at this machine. `root` is where /proc and /sys are found."""
    info = _cpuinfo(root)
    allowed = _allowed_cpus()
    quota = _cpu_quota(root)
    threads = max(1, min(len(allowed), math.ceil(quota)) if quota else len(allowed))
    flags = set((info.get("flags") or info.get("features") or "").split())
    return Machine(
        cpu=_cpu_name(root, info),
        arch=platform.machine() or "unknown",
        system=f"{platform.system()} {platform.release()}".strip(),
        isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
        cores=min(_physical_cores(root, allowed), threads),
        threads=threads,
        memory_bytes=_memory(root),
    )


def free_memory(root: Path = ROOT) -> tuple[int | None, int | None]:
    """Bytes that could be had now without swapping, and bytes that are swapped out, of the machine; None where the system
    does not say.
    """
    sizes = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if value.split()[1:] == ["kB"]:
            sizes[name] = int(value.split()[0]) << 10
    swapped = sizes["SwapTotal"] - sizes["SwapFree"] if {"SwapTotal", "SwapFree"} <= sizes.keys() else None
    return sizes.get("MemAvailable"), swapped


def busy_s(root: Path = ROOT) -> float | None:
    """Seconds that all processors together were busy since the system started, or taken by other machines on the same
    hardware; None where the system does not say.
    """
    for line in _read(root / "proc/stat").splitlines():
        name, *ticks = line.split()
        if name == "cpu" and len(ticks) >= 8:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, ticks[:8])
            return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return None


def device_profile(found: Machine) -> DeviceProfile:
    """`found` as the profile of a device with one processor, its speed unknown."""
    flags = set(found.isa)
    dtypes = ["float32", "int8"]
    dtypes += ["float16"] if flags & _FLOAT16 else []
    dtypes += ["bfloat16"] if flags & _BFLOAT16 else []
    reference = f"asked of {found.system.split()[0] if found.system else 'the system'}"
    cpu = Processor(
        kind="cpu",
        arch=found.arch,
        dtypes=tuple(sorted(dtypes)),
        features=found.isa,
        cores=Figure(found.cores, "measured", reference),
        memory_bytes=Figure(found.memory_bytes, "measured", reference) if found.memory_bytes else None,
    )
    return DeviceProfile(name="here", title=found.cpu, processors=(cpu,))


def versions() -> dict[str, str]:
    """The versions that matter of what is installed, Python's first."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{name: told for name, told in found.items() if told}}


def version(package: str) -> str:
    """The version of an installed package, empty if it is none: lensc itself is none in a source tree."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def gpu_driver(root: Path = ROOT) -> str:
    """What the NVIDIA driver says of its version, empty where there is none."""
    return _read(root / "proc/driver/nvidia/version").partition("\n")[0]


def _read(path: Path) -> str:
    """The text of a file of /proc or /sys, empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\n\0 ")
    except OSError:
        return ""


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo, keys in lower case."""
    result: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip():
            result.setdefault(key.strip().lower(), value.strip())
    return result


def _cpu_name(root: Path, info: dict[str, str]) -> str:
    board = _read(root / "proc/device-tree/model")
    return info.get("model name") or info.get("hardware") or board or platform.processor() or "unknown CPU"


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _physical_cores(root: Path, allowed: list[int]) -> int:
    """How many distinct cores the allowed hardware threads belong to; each its own where the system does not say."""
    topology = root / "sys/devices/system/cpu"
    siblings = {_read(topology / f"cpu{cpu}/topology/thread_siblings_list") or f"cpu{cpu}" for cpu in allowed}
    return max(1, len(siblings))


def core_speeds(root: Path = ROOT) -> dict[int, int]:
    """A hardware thread of each core that this process may run on, the fastest first, and how fast: as the system rates its
    capacity, else its highest clock in kHz, else 0.
    """
    topology, found = root / "sys/devices/system/cpu", {}
    seen: set[str] = set()
    for cpu in _allowed_cpus():
        core = _read(topology / f"cpu{cpu}/topology/thread_siblings_list") or f"cpu{cpu}"
        rated = _read(topology / f"cpu{cpu}/cpu_capacity") or _read(topology / f"cpu{cpu}/cpufreq/cpuinfo_max_freq")
        if core not in seen:
            seen.add(core)
            found[cpu] = int(rated) if rated.isdigit() else 0
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _groups(root: Path, controller: str) -> list[Path]:
    """The control groups this process is in, innermost first, for version 2 (`controller=""`) or a controller of 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
            group = base / path.lstrip("/")
            return [group, *(parent for parent in group.parents if parent.is_relative_to(base))]
    return []


def _cpu_quota(root: Path) -> float | None:
    """The smallest CPU time limit of all control groups around this process, in CPUs; None without one."""
    quotas = []
    for group in _groups(root, ""):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    for group in _groups(root, "cpu"):
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _memory(root: Path) -> int | None:
    limits = [_read(group / "memory.max") for group in _groups(root, "")]
    limits += [_read(group / "memory.limit_in_bytes") for group in _groups(root, "memory")]
    sizes = [int(limit) for limit in limits if limit.isdigit() and int(limit) < _UNLIMITED]
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            sizes.append(int(line.split()[1]) << 10)
    if not sizes and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes, default=None)
