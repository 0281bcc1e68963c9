"""The data file of a graph: extents, pages, and what an interruption leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lensc.export.data_file import JOURNAL, PAGE, DataFile, Extent

TENSORS = {"a": b"x" * 10, "b": bytes(range(256)) * 40, "c": b"", "d": b"end"}


class StoppedError(Exception):
    pass


def write(path: Path, key: str = "k", stop_at: str = "", made: list[str] | None = None) -> dict[str, Extent]:
    """Write TENSORS in two pieces each; the one called `stop_at` fails in the middle."""
    extents = {}

    def source(name: str) -> Callable[[], Iterator[bytes]]:
        def pieces() -> Iterator[bytes]:
            if made is not None:
                made.append(name)
            yield TENSORS[name][:5]
            if name == stop_at:
                raise StoppedError
            yield TENSORS[name][5:]

        return pieces

    with DataFile(path, key) as file:
        for name in TENSORS:
            extents[name] = file.write(name, source(name))
        file.finish()
    return extents


def test_every_tensor_begins_on_a_page(tmp_path: Path) -> None:
    extents = write(tmp_path / "w.data")
    content = (tmp_path / "w.data").read_bytes()
    for name, extent in extents.items():
        assert extent.offset % PAGE == 0 and extent.name == name
        assert content[extent.offset : extent.offset + extent.bytes] == TENSORS[name]
    assert len(content) == extents["d"].offset + 3
    assert [p.name for p in tmp_path.iterdir()] == ["w.data"]


@pytest.mark.parametrize("stop_at", ("a", "b", "d"))
def test_an_interrupted_file_is_continued(tmp_path: Path, stop_at: str) -> None:
    expected = write(tmp_path / "whole.data")
    with pytest.raises(StoppedError):
        write(tmp_path / "w.data", stop_at=stop_at)
    made: list[str] = []
    assert write(tmp_path / "w.data", made=made) == expected
    assert made == list(TENSORS)[list(TENSORS).index(stop_at) :]
    assert (tmp_path / "w.data").read_bytes() == (tmp_path / "whole.data").read_bytes()
    assert not (tmp_path / f"w.data{JOURNAL}").exists()


def interrupted(path: Path) -> None:
    with pytest.raises(StoppedError):
        write(path, stop_at="d")


def damage_data(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[PAGE + 7] ^= 1
    path.write_bytes(content)


def cut_data(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: PAGE + 5])


def cut_journal(path: Path) -> None:
    journal = path.with_name(path.name + JOURNAL)
    journal.write_text(journal.read_text()[:-150])


def garbage_journal(path: Path) -> None:
    path.with_name(path.name + JOURNAL).write_text('"k"\n[1]\n')


@pytest.mark.parametrize("damage", (damage_data, cut_data, cut_journal, garbage_journal))
def test_what_is_damaged_is_written_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    expected = write(tmp_path / "whole.data")
    interrupted(tmp_path / "w.data")
    damage(tmp_path / "w.data")
    made: list[str] = []
    assert write(tmp_path / "w.data", made=made) == expected and "b" in made
    assert (tmp_path / "w.data").read_bytes() == (tmp_path / "whole.data").read_bytes()


def test_another_key_starts_over(tmp_path: Path) -> None:
    interrupted(tmp_path / "w.data")
    made: list[str] = []
    write(tmp_path / "w.data", key="other", made=made)
    assert made == list(TENSORS)


def test_another_order_keeps_what_came_before(tmp_path: Path) -> None:
    interrupted(tmp_path / "w.data")
    with DataFile(tmp_path / "w.data", "k") as file:
        file.write("a", lambda: pytest.fail("was written"))
        file.write("z", lambda: [b"new"])
        extent = file.write("b", lambda: [TENSORS["b"]])
        file.finish()
    content = (tmp_path / "w.data").read_bytes()
    assert content[extent.offset :] == TENSORS["b"] and content[PAGE : PAGE + 3] == b"new"
