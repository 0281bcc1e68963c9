"""Mapped files: in huge pages where the system has them, and refused in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lensc.backends.errors import ExecutionError
from lensc.backends.files import map_file

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not SWITCH.is_file(), reason=f"no {SWITCH}: the system has no transparent huge pages")
def test_huge_pages_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "weights.data"
    path.write_bytes(bytes(4 << 20))
    mapped = map_file(path)
    ranges = Path("/proc/self/smaps").read_text()
    mine = re.search(rf"{re.escape(str(path))}$.*?^VmFlags: ([a-z0-9 ]+)$", ranges, re.MULTILINE | re.DOTALL)
    assert mine and "hg" in mine[1].split()  # hg: huge pages advised, proc(5)
    assert mapped[:] == bytes(4 << 20)


def test_a_file_that_cannot_be_mapped_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.data").touch()
    for name, reason in ("empty.data", "it is empty"), ("missing.data", "No such file or directory"):
        with pytest.raises(ExecutionError, match=f"{name}: cannot be read: {reason}; build the bundle again"):
            map_file(tmp_path / name)
