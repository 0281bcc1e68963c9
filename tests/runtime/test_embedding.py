"""The embedding table: floats as they are, int8 with a scale per row, 4 bits with scales of groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lensc.backends.base import Array
from lensc.backends.bundle import DecoderSpec
from lensc.backends.errors import GraphError, ManifestError, TokenizerError
from lensc.runtime.embedding import MANY, EmbeddingTable, open_table

SPEC = DecoderSpec(hidden_size=4, num_layers=1, num_kv_heads=1, head_dim=4, vocab_size=6, context_length=8)
FLOATS = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
INTEGERS = np.arange(-12, 12, dtype=np.int8).reshape(6, 4)
SCALES = np.linspace(0.1, 0.6, 6, dtype=np.float32)


@pytest.mark.parametrize("dtype", (np.float16, np.float32))
def test_floats_are_gathered_as_float32(dtype: type) -> None:
    rows = EmbeddingTable.of(FLOATS.astype(dtype)).gather(np.array([5, 0, 5]))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, FLOATS.astype(dtype)[[5, 0, 5]].astype(np.float32))


def test_integers_are_scaled_by_their_row() -> None:
    rows = EmbeddingTable(INTEGERS, SCALES).gather(np.array([1, 4]))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, INTEGERS[[1, 4]] * np.array([[0.2], [0.5]], np.float32), rtol=1e-6)


def packed(groups: int) -> tuple[Array, Array, Array]:
    """A 4-bit table of 6 rows of 4, its scales, and what they stand for."""
    values = np.arange(24, dtype=np.uint8).reshape(6, 4) % 16
    scales = np.linspace(-0.3, 0.6, 6 * groups, dtype=np.float32).reshape(6, groups)
    wanted = (values.astype(np.float32) - 8) * np.repeat(scales, 4 // groups, axis=1)
    return values[:, ::2] | values[:, 1::2] << 4, scales, wanted


@pytest.mark.parametrize("groups", (1, 2))
def test_halves_of_bytes_are_scaled_by_their_group(groups: int) -> None:
    values, scales, wanted = packed(groups)
    table = EmbeddingTable(values, scales)
    table.check(SPEC)
    rows = table.gather(np.array([5, 0, 3, 3]))
    assert rows.dtype == np.float32 and rows.flags.c_contiguous
    np.testing.assert_allclose(rows, wanted[[5, 0, 3, 3]], rtol=1e-6)
    assert table.gather(np.empty(0, np.int64)).shape == (0, 4)


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="only Linux tells what is in memory: no /proc/self/smaps"
)
def test_pages_that_a_prompt_has_read_are_given_back(tmp_path: Path) -> None:
    """Those of a step are not: the next step may need them."""
    values = np.random.default_rng(0).integers(-127, 128, (20_000, 512), np.int8)
    np.save(tmp_path / "table.npy", values)
    np.save(tmp_path / "scales.npy", np.ones(20_000, np.float32))
    table = open_table(tmp_path, {"embed_tokens": "table.npy", "embed_tokens.scale": "scales.npy"})

    def resident_kb() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        start = next(i for i, line in enumerate(lines) if line.endswith("table.npy"))
        return int(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1])

    ids = np.arange(0, 20_000, 500)
    np.testing.assert_array_equal(table.gather(ids), values[ids])
    assert len(ids) >= MANY and resident_kb() == 0
    np.testing.assert_array_equal(table.gather(ids[:1]), values[ids[:1]])
    assert resident_kb() > 0


@pytest.mark.parametrize("ids", ([6], [-1], [0, 99]))
def test_an_id_outside_is_refused(ids: list[int]) -> None:
    with pytest.raises(TokenizerError, match="outside the embedding table of 6 rows"):
        EmbeddingTable.of(FLOATS).gather(np.array(ids))


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        (FLOATS[:5], None, r"float32\[5, 4\], expected .*\[6, 4\]"),
        (FLOATS.astype(np.float64), None, "float64"),
        (INTEGERS, None, "its scales are None"),
        (INTEGERS, SCALES[:5], "expected"),
        (INTEGERS, SCALES.astype(np.float64), "expected"),
        (FLOATS, SCALES, "expected None"),
        (packed(2)[0], None, "its scales are None"),
        (packed(2)[0], SCALES, "expected"),
        (packed(2)[0], np.zeros((6, 3), np.float32), r"expected \(dtype\('float32'\), \(6, 1\)\)"),
        (packed(2)[0][:, :1], packed(2)[1], r"uint8\[6, 1\], expected .*uint8\[6, 2\]"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(values: Array, scales: Array | None, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        EmbeddingTable(values, scales).check(SPEC)


def test_tables_are_mapped_from_the_folder(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", INTEGERS)
    np.save(tmp_path / "s.npy", SCALES)
    table = open_table(tmp_path, {"embed_tokens": "t.npy", "embed_tokens.scale": "s.npy"})
    table.check(SPEC)
    np.testing.assert_array_equal(table.gather(np.arange(6)), INTEGERS * SCALES[:, None])
    (tmp_path / "t.npy").write_bytes(b"no array")
    with pytest.raises(ManifestError, match="cannot be read as npy"):
        open_table(tmp_path, {"embed_tokens": "t.npy"})
    with pytest.raises(ManifestError, match="no embed_tokens"):
        open_table(tmp_path, {})
