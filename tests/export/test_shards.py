"""Hostile and broken safetensors files: each is refused with one line that names the file and the rule."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lensc.backends.errors import CheckpointError
from lensc.export import shards
from lensc.export.fingerprint import file_state
from lensc.export.shards import DTYPES, listed, read_header, read_rows, read_tensor


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (an object, or raw bytes) and data; `length` overrides the true header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


NESTED = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

HOSTILE = {
    "empty": (b"", "0 bytes, too short"),
    "seven-bytes": (b"1234567", "7 bytes, too short"),
    "header-beyond-file": (safetensors({}, length=500), "header length 500 reaches beyond the file of 10 bytes"),
    "header-over-100-MB": (safetensors({}, length=100_000_001), "over the format's limit of 100000000"),
    "header-length-2-to-64": (safetensors({}, length=2**64 - 1), "over the format's limit"),
    "zero-length": (safetensors(b""), "must begin with '{'"),
    "not-an-object": (safetensors([1, 2]), "must begin with '{'"),
    "leading-space": (safetensors(b" {}"), "must begin with '{'"),
    "garbage-json": (safetensors(b"{garbage"), "not JSON"),
    "cut-json": (safetensors(b'{"a": {"dtype": "F3'), "not JSON"),
    "not-utf8": (safetensors(b'{"\xff": 1}'), "not JSON"),
    "nested": (safetensors(NESTED), "nested too deeply"),
    "huge-integer": (safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "duplicate-key": (safetensors(b'{"a": {}, "a": {}}'), "'a' appears twice"),
    "metadata-number": (safetensors({"__metadata__": {"a": 1}}), "__metadata__ must map strings to strings"),
    "metadata-list": (safetensors({"__metadata__": []}), "__metadata__ must map strings to strings"),
    "tensor-not-object": (safetensors({"a": 7}), "'a' must have exactly dtype, shape and data_offsets"),
    "key-missing": (safetensors({"a": {"dtype": "F32", "shape": []}}), "must have exactly dtype, shape"),
    "key-extra": (safetensors({"a": {**tensor(0, 4), "more": 1}}, b"1234"), "must have exactly dtype, shape"),
    "unknown-dtype": (safetensors({"a": tensor(0, 4, dtype="F33")}, b"1234"), "unknown dtype 'F33'"),
    "dtype-list": (safetensors({"a": {**tensor(0, 4), "dtype": ["F32"]}}, b"1234"), "unknown dtype"),
    "negative-shape": (safetensors({"a": tensor(0, 4, [-1])}, b"1234"), "not a list of sizes"),
    "fraction-shape": (safetensors({"a": {**tensor(0, 4), "shape": [1.0]}}, b"1234"), "not a list of sizes"),
    "bool-shape": (safetensors({"a": {**tensor(0, 4), "shape": [True]}}, b"1234"), "not a list of sizes"),
    "many-dimensions": (safetensors({"a": tensor(0, 4, [1] * 65)}, b"1234"), "not a list of sizes"),
    "shape-overflow": (safetensors({"a": tensor(0, 4, [2**62, 2**62])}, b"1234"), "needs"),
    "shape-too-small": (safetensors({"a": tensor(0, 8, [1])}, b"12345678"), "needs 4 bytes, data_offsets give 8"),
    "offsets-backward": (safetensors({"a": tensor(4, 0, [1])}, b"1234"), "needs 4 bytes, data_offsets give -4"),
    "offsets-negative": (safetensors({"a": {**tensor(0, 4), "data_offsets": [-4, 0]}}, b"1234"), "at least 0"),
    "offsets-one": (safetensors({"a": {**tensor(0, 4), "data_offsets": [0]}}, b"1234"), "two data_offsets"),
    "offsets-2-to-63": (safetensors({"a": {**tensor(0, 4), "data_offsets": [0, 2**63]}}), "two data_offsets"),
    "out-of-range": (safetensors({"a": tensor(0, 400)}, b"1234"), "ends at byte 400 of 4 bytes"),
    "truncated-data": (safetensors({"a": tensor(0, 4), "b": tensor(4, 8)}, b"123456"), "'b' ends at byte 8 of 6 bytes"),
    "overlap": (safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, b"x" * 12), "'b' overlaps tensor 'a'"),
    "same-place": (safetensors({"a": tensor(0, 4), "b": tensor(0, 4)}, b"1234"), "'b' overlaps tensor 'a'"),
    "hole": (safetensors({"a": tensor(0, 4), "b": tensor(8, 12)}, b"x" * 12), "4 unused bytes lie between tensor 'a'"),
    "hole-at-start": (safetensors({"a": tensor(4, 8)}, b"x" * 8), "4 unused bytes lie between the header"),
    "rest": (safetensors({"a": tensor(0, 4)}, b"x" * 9), "5 bytes follow the last tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_with_its_rule(name: str, tmp_path: Path) -> None:
    content, rule = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a valid safetensors file: ")
    assert rule in message
    assert "\n" not in message and len(message) < 400


def test_reads_names_shapes_and_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = {"b": tensor(6, 6, [0, 3], "BF16"), "a": tensor(0, 6, [3, 1], "F16"), "__metadata__": {"format": "pt"}}
    path.write_bytes(safetensors(json.dumps(header).encode() + b"   ", b"x" * 6))
    records = read_header(path)
    assert {n: (r.dtype, r.shape, r.nbytes) for n, r in records.items()} == {
        "a": ("F16", (3, 1), 6),
        "b": ("BF16", (0, 3), 0),
    }


def test_all_problems_are_listed_and_abbreviated(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({f"t{i}": 0 for i in range(50)}))
    with pytest.raises(CheckpointError, match=r"'t0' must.*'t19' must.*and 30 more"):
        read_header(path)


def test_names_with_control_characters_stay_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"evil\n\x1b[31m" + "x" * 10_000: 0}))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_missing_file_folder_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="not a plain file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a plain file"):
        read_header(tmp_path / "pipe.safetensors")


def test_damaged_headers_never_raise_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    good = safetensors({f"layer.{i}.weight": tensor(4 * i, 4 * i + 4) for i in range(5)}, b"x" * 20)
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(good) - 20)] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randint(0, len(good))] if rng.random() < 0.2 else damaged)
        try:
            read_header(path)
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_listed_shows_a_count_beyond_the_limit() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(23)], limit=2) == "0, 1, and 21 more"


# --- weights ------------------------------------------------------------------------------------------------------

SHAPES = [(), (0,), (1,), (7,), (5, 3), (0, 3), (4, 0), (2, 3, 2, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
def test_reads_what_the_library_wrote(dtype: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "READ_BYTES", piece)
    generator = torch.Generator().manual_seed(0)
    written = {f"{shape}": torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in SHAPES}
    path = tmp_path / "model.safetensors"
    save_file(written, path)
    state, records = file_state(path), read_header(path)
    for name, tensor in written.items():
        read = read_tensor(records[name], state)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor) and read.shape == tensor.shape
        for start in range(tensor.shape[0] + 1 if tensor.shape else 0):
            for stop in range(start, tensor.shape[0] + 1):
                rows = read_rows(records[name], state, start, stop)
                assert rows.dtype == tensor.dtype and torch.equal(rows, tensor[start:stop])


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:  # 40 GB with a hole for most of it
        file.write(
            safetensors({"a": {"dtype": "F16", "shape": [20_000_000, 1000], "data_offsets": [0, 40_000_000_000]}})
        )
        begin = file.tell()
        file.seek(begin + 2000 * 10_000_000)
        file.write(torch.arange(2000, dtype=torch.float16).numpy().tobytes())
        file.truncate(begin + 40_000_000_000)
    record = read_header(path)["a"]
    rows = read_rows(record, file_state(path), 10_000_000, 10_000_002)
    assert torch.equal(rows, torch.arange(2000, dtype=torch.float16).reshape(2, 1000))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 6), (6, 6)])
def test_rows_that_are_not_there(start: int, stop: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(5, 2), "scalar": torch.tensor(1.0)}, path)
    records = read_header(path)
    with pytest.raises(IndexError, match=rf"tensor a \[5, 2\] has no rows {start} to {stop}"):
        read_rows(records["a"], file_state(path), start, stop)
    with pytest.raises(IndexError, match=r"tensor scalar \[\] has no rows 0 to 1"):
        read_rows(records["scalar"], file_state(path), 0, 1)


def test_a_dtype_that_is_no_weight(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(5, dtype=torch.int8)}, path)
    with pytest.raises(CheckpointError, match=r"tensor a is I8, expected one of F16, BF16, F32, F64"):
        read_tensor(read_header(path)["a"], file_state(path))


def test_a_file_that_ends_within_a_tensor(tmp_path: Path) -> None:
    """It did not change, so its header was made for another file."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(500)}, path)
    record = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"ends within tensor a; the file is truncated or damaged"):
        read_tensor(record, file_state(path))


def test_a_write_while_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(500)}, path)
    os.utime(path, ns=(1, 1))
    state, record, empty = file_state(path), read_header(path)["a"], torch.empty

    def write_meanwhile(*arguments: object, **options: object) -> torch.Tensor:
        os.utime(path, ns=(2, 2))
        return empty(*arguments, **options)

    monkeypatch.setattr(shards.torch, "empty", write_meanwhile)
    with pytest.raises(CheckpointError, match=r"changed while it was being read: it was written to"):
        read_tensor(record, state)


def test_reading_maps_nothing_and_copies_once(tmp_path: Path) -> None:
    """Peak memory of reading 256 MB: the tensor itself, and less than a tenth more."""
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(safetensors({"a": {"dtype": "F16", "shape": [1 << 27], "data_offsets": [0, 1 << 28]}}))
        file.truncate(file.tell() + (1 << 28))
    script = f"""if True:
        import resource
        from pathlib import Path
        from lensc.export.fingerprint import file_state
        from lensc.export.shards import read_header, read_tensor
        path = Path({str(path)!r})
        read = lambda: read_tensor(read_header(path)["a"], file_state(path))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(3):
            read()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1.1 * (1 << 18)
