"""What `lensc doctor` finds without running a model: the machine, packages and their versions, the folders of the user."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lensc.backends.errors import LensError
from lensc.profiles import probe
from lensc.profiles.folders import cache_folder, profile_folder

from . import console

State = Literal["ok", "missing", "wrong"]

OLDEST_PYTHON = (3, 11)
LEAST_MEMORY_BYTES = 1 << 30
LEAST_DISK_BYTES = 1 << 30
ABANDONED_S = 3600.0
"""A file that was being written so long ago belongs to a process that was killed."""
SHARED_FOLDERS = ("onnxruntime", "numpy", "PIL", "tokenizers", "onnx", "openvino", "torch", "triton", "tensorrt")
"""What is imported: two distributions that both bring it overwrite each other's files."""


@dataclass(frozen=True)
class Line:
    """A line of the report. `missing` is what could be there and is not; `fix` a command, or what else would help."""

    section: str
    name: str
    state: State
    found: str
    fix: str = ""


def machine() -> Iterator[Line]:
    """Python, system, processor, threads, memory."""
    section = "machine"
    version, bits = platform.python_version(), 8 * struct.calcsize("P")
    found = f"{platform.python_implementation()} {version}, {bits} bits"
    right = sys.version_info >= OLDEST_PYTHON and bits == 64 and platform.python_implementation() == "CPython"
    fix = f"install lensc in CPython {'.'.join(map(str, OLDEST_PYTHON))} or newer, of 64 bits"
    yield Line(section, "python", "ok" if right else "wrong", found, "" if right else fix)

    here = probe.machine()
    tried = here.system.startswith("Linux") and here.arch == "x86_64"
    yield Line(section, "system", "ok", f"{here.system}, {here.arch}" + ("" if tried else "; lensc is untested on it"))
    yield Line(section, "processor", "ok", f"{here.cpu}: {', '.join(here.isa) or 'no known extensions'}")
    yield _threads(here)
    yield _memory(here)


def _threads(here: probe.Machine) -> Line:
    of_machine = os.cpu_count() or here.threads
    found = f"{here.cores} cores, {here.threads} threads"
    if here.threads < of_machine:
        found += f" of {of_machine}: the process's affinity or its control group allows no more"
    return Line("machine", "threads", "ok", found)


def _memory(here: probe.Machine) -> Line:
    total, available, swap = here.memory_bytes, *probe.free_memory()
    if total is None:
        return Line("machine", "memory", "ok", "the system does not say how much there is")
    found = console.size(total)
    if available is not None:
        available = min(available, total)
        found += f", {console.size(available)} available"
    found += "" if swap is None else f", {console.size(swap)} swapped out" if swap else ", nothing swapped out"
    if available is not None and available < LEAST_MEMORY_BYTES:
        return Line("machine", "memory", "wrong", found, "close other programs, or give a container more memory")
    return Line("machine", "memory", "ok", found)


# --- packages -----------------------------------------------------------------------------------------------------


def packages() -> Iterator[Line]:
    """lensc's own version and kernels, what it requires, its extras, and distributions that do not go together."""
    section = "packages"
    try:
        required = importlib.metadata.requires("lensc") or []
        version = importlib.metadata.version("lensc")
    except importlib.metadata.PackageNotFoundError:
        yield Line(section, "lensc", "wrong", "runs from a source tree that was never installed", "pip install .")
        return
    yield Line(section, "lensc", "ok", version)
    yield _kernels()
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Line(section, "versions", "missing", "packaging is not installed: not checked", "pip install packaging")
        return
    requirements = [Requirement(text) for text in required]
    own = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    yield _group("required", own, "lensc", must=True)
    extras = [e for e in importlib.metadata.metadata("lensc").get_all("Provides-Extra") or [] if e not in DEVELOPERS]
    for extra in extras:
        of_extra = [r for r in requirements if r not in own and r.marker and r.marker.evaluate({"extra": extra})]
        yield _group(f"extra {extra}", of_extra, f"lensc[{extra}]", must=False)
    yield from _conflicts(requirements)


DEVELOPERS = ("demo", "test", "dev")
"""Extras that nobody needs who uses lensc."""


def _kernels() -> Line:
    try:
        from lensc.kernels import _cpu
    except ImportError as error:
        found = f"the compiled kernels cannot be imported: {' '.join(str(error).split())}"
        return Line("packages", "kernels", "missing", found, "pip install lensc, on a machine with a C++17 compiler")
    best, *others = _cpu.usable_isas()
    wanted = os.environ.get("LENSC_ISA", "")
    found = f"compiled; {wanted or best} is used" + (" because LENSC_ISA says so" if wanted else "")
    if wanted and wanted not in (best, *others):
        return Line(
            "packages",
            "kernels",
            "wrong",
            f"LENSC_ISA={wanted} is not one of {best}, {', '.join(others)}",
            "unset LENSC_ISA",
        )
    return Line("packages", "kernels", "ok", found)


def _group(name: str, requirements: Sequence[Any], install: str, must: bool) -> Line:
    """Packages that are installed together."""
    told, absent, wrong = [], [], []
    for requirement in requirements:
        version = _version(requirement.name)
        if version is None:
            absent.append(f"no {requirement.name}")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, expected {requirement.specifier}")
        else:
            told.append(f"{requirement.name} {version}")
    found = ", ".join(wrong + absent + told)
    if wrong:
        return Line("packages", name, "wrong", found, f"pip install --upgrade {shlex.quote(install)}")
    if absent:
        return Line("packages", name, "wrong" if must else "missing", found, f"pip install {shlex.quote(install)}")
    return Line("packages", name, "ok", found)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _conflicts(requirements: Sequence[Any]) -> Iterator[Line]:
    """Distributions that overwrite each other's files, and those whose own requirements are not met."""
    brought = importlib.metadata.packages_distributions()
    for module in SHARED_FOLDERS:
        several = sorted(set(brought.get(module, ())))
        if len(several) > 1:
            found = f"{' and '.join(several)} both bring {module} and overwrite each other's files"
            again = f"pip uninstall -y {' '.join(several)} && pip install --force-reinstall {several[0]}"
            yield Line("packages", module, "wrong", found, again)
    for name, needs, version in unmet([r.name for r in requirements]):
        yield Line("packages", name, "wrong", f"needs {needs}, found {version}", f"pip install '{needs}'")


def unmet(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """(distribution, what it requires, what is installed) for requirements that are not met by another version that is
    there, among the installed distributions `names` and all that they require.
    """
    from packaging.requirements import Requirement

    found, seen, left = [], set(), list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            texts = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, texts):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            version = _version(requirement.name)
            if version is not None and not requirement.specifier.contains(version, prereleases=True):
                found.append((name, f"{requirement.name}{requirement.specifier}", version))
            left.append(requirement.name)
    return found


# --- folders ------------------------------------------------------------------------------------------------------


def folders() -> Iterator[Line]:
    """The user's cache and profile."""
    for name, look in (("cache", _cache), ("profile", _profile), ("tuned", _tuned)):
        try:
            yield look()
        except ImportError as error:  # a package that is required is missing or broken, which is a line of its own
            found = f"not looked at: {' '.join(str(error).split())}"
            yield Line("folders", name, "missing", found, "pip install lensc")


def _cache() -> Line:
    section, folder = "folders", cache_folder()
    if folder is None:
        return Line(section, "cache", "missing", "there is no home folder", "export XDG_CACHE_HOME=FOLDER")
    move = "export XDG_CACHE_HOME=FOLDER, one that can be written"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
        files = [path for path in folder.rglob("*") if path.is_file()]
        states = [(path, path.stat()) for path in files]
    except OSError as error:
        problem = f"{folder}: cannot be written: {error.strerror or error}; graphs are compiled at every load"
        return Line(section, "cache", "wrong", problem, move)
    used = sum(state.st_size for _, state in states)
    found = f"{folder}: {len(files)} files, {console.size(used)}; {console.size(free)} free"
    abandoned = [
        path
        for path, state in states
        if (path.suffix == ".partial" or path.name.startswith("tmp")) and state.st_mtime < time.time() - ABANDONED_S
    ]
    if abandoned:
        found += f"; {len(abandoned)} left by processes that were killed"
        return Line(section, "cache", "wrong", found, f"rm -r {folder} (it is filled again)")
    if free < LEAST_DISK_BYTES:
        return Line(section, "cache", "wrong", found, f"free some space, or {move}")
    return Line(section, "cache", "ok", found)


def _profile() -> Line:
    from lensc.profiles.measure import HERE
    from lensc.profiles.profile import load_profile

    folder = profile_folder()
    path = None if folder is None else folder / f"{HERE}.toml"
    if path is None or not path.is_file():
        return Line("folders", "profile", "missing", "this machine was not measured", "lensc profile")
    try:
        title = load_profile(path).title
    except LensError as error:
        return Line("folders", "profile", "wrong", str(error), "lensc profile")
    here = probe.machine().cpu
    if title != here:
        return Line("folders", "profile", "wrong", f"{path}: of {title}, this is {here}", "lensc profile")
    return Line("folders", "profile", "ok", str(path))


def _tuned() -> Line:
    from lensc.runtime import tuned

    folder = tuned.folder()
    count = 0 if folder is None else len(list(folder.glob("*.json")))
    if not count:
        return Line("folders", "tuned", "missing", "no bundle was tuned here", "lensc tune BUNDLE")
    return Line("folders", "tuned", "ok", f"{folder}: {count} graphs")
