"""The bundle format: what is written is read back, and every rule refuses the hostile file made for it.

A file of tests/hostile/manifests is one change to a valid manifest: `set`, `delete`, `copy` and `append` take paths into
it, `replace`, `cut`, `text` and `repeat` work on its text. `rule` is the number in the docstring of backends/bundle.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lensc.backends import bundle as bundles
from lensc.backends import errors
from lensc.backends.bundle import Manifest, load_manifest, sha256_file, write_manifest
from lensc.backends.files import write_text

HOSTILE = sorted((Path(__file__).parents[1] / "hostile/manifests").glob("*.json"))


def step(value: Any, key: str) -> Any:
    return value[int(key)] if isinstance(value, list) else value[key]


def find(document: Any, path: str) -> tuple[Any, Any]:
    """The container and the key of `a/0/b`."""
    *above, last = path.split("/")
    for key in above:
        document = step(document, key)
    return document, int(last) if isinstance(document, list) else last


def change(text: str, case: dict[str, Any]) -> str:
    document = json.loads(text)
    for path in case.get("delete", []):
        container, key = find(document, path)
        del container[key]
    for path, value in case.get("set", {}).items():
        container, key = find(document, path)
        container[key] = value
    if "append" in case:
        document[case["append"][0]].append(case["append"][1])
    if "copy" in case:
        container, key = find(document, case["copy"][0])
        target, last = find(document, case["copy"][1])
        if isinstance(target[last], list):
            target[last].append(copy.deepcopy(container[key]))
        else:
            target[last] = copy.deepcopy(container[key])
    text = case.get("text", json.dumps(document))
    if "replace" in case:
        old, new = case["replace"]
        assert text.count(old) == 1
        text = text.replace(old, new)
    if "repeat" in case:
        text = case["repeat"][0] * case["repeat"][1]
    return text[: case.get("cut")]


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.stem)
def test_hostile_manifest_is_refused(path: Path, bundle: Path) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    manifest = bundle / "manifest.json"
    manifest.write_text(change(manifest.read_text(encoding="utf-8"), case), encoding="utf-8")
    with pytest.raises(errors.ManifestError) as caught:
        load_manifest(bundle, verify=True)
    message = str(caught.value)
    assert type(caught.value).__name__ == case["error"]
    assert case["message"] in message
    assert message.isprintable()
    assert str(manifest) in message


def test_every_rule_has_a_hostile_file() -> None:
    rules = {json.loads(path.read_text(encoding="utf-8"))["rule"] for path in HOSTILE}
    stated = {line[0] for line in (bundles.__doc__ or "").splitlines() if line[1:3] == ". "}
    # Rule 5 is about what lies in the folder: test_folder_is_refused.
    assert rules - {"all"} == stated - {"5"}


def link(folder: Path) -> None:
    (folder / "embed_tokens.npy").rename(folder.parent / "elsewhere")
    (folder / "embed_tokens.npy").symlink_to(folder.parent / "elsewhere")


def linked_folder(folder: Path) -> None:
    (folder / "probes").rename(folder.parent / "elsewhere")
    (folder / "probes").symlink_to(folder.parent / "elsewhere")


def linked_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "elsewhere")
    (folder / "manifest.json").symlink_to(folder.parent / "elsewhere")


def pipe(folder: Path) -> None:
    (folder / "embed_tokens.npy").unlink()
    os.mkfifo(folder / "embed_tokens.npy")


def folder_for_a_file(folder: Path) -> None:
    (folder / "embed_tokens.npy").unlink()
    (folder / "embed_tokens.npy").mkdir()


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes need privileges there")
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (link, "embed_tokens.npy: is a link, expected a plain file"),
        (linked_folder, "probes: is a link, expected a plain file; probes/decoder.npz: listed in files, not in"),
        (linked_manifest, "not a plain file, expected a file of JSON and no link"),
        (pipe, "embed_tokens.npy: is neither a file nor a folder"),
        (folder_for_a_file, "embed_tokens.npy: listed in files, not in the folder"),
        (lambda f: (f / "notes.txt").write_text("x"), "notes.txt: in the folder, not listed in files"),
        (lambda f: (f / "probes/x.partial").write_text("x"), "probes/x.partial: in the folder, not listed"),
        (lambda f: (f / "decoder.onnx").unlink(), "decoder.onnx: listed in files, not in the folder"),
        (lambda f: (f / "manifest.json").unlink(), "is not a bundle; make one with lensc build, or check the path"),
        (lambda f: (f / "manifest.json").write_bytes(b'{"format": "\xff"}'), "not JSON: 'utf-8' codec can't decode"),
        (lambda f: os.truncate(f / "manifest.json", (16 << 20) + 1), "a manifest has at most 16777216"),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("<>"),
)
def test_folder_is_refused(harm: Any, message: str, bundle: Path) -> None:
    harm(bundle)
    with pytest.raises(errors.ManifestError) as caught:
        load_manifest(bundle)
    assert message in str(caught.value)
    assert not isinstance(caught.value, errors.IntegrityError)


@pytest.mark.parametrize("name", ["missing", "bundle/decoder.onnx"])
def test_not_a_folder(name: str, bundle: Path) -> None:
    with pytest.raises(errors.ManifestError, match="is not a bundle"):
        load_manifest(bundle.parent / name)


def test_written_is_read_back(bundle: Path) -> None:
    manifest = load_manifest(bundle, verify=True)
    assert write_manifest(bundle, manifest) == manifest == load_manifest(bundle)
    assert [f.path for f in manifest.files] == sorted(
        path.relative_to(bundle).as_posix()
        for path in bundle.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    )
    assert manifest.file("decoder.onnx").bytes == 5
    assert manifest.parity[0].sqnr_db == math.inf
    assert manifest.graphs["decoder"].spec.input("past_key.0").shape == ("past", "batch", 2, 16)


def test_writing_is_deterministic(bundle: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    write_manifest(bundle, load_manifest(bundle))
    assert (bundle / "manifest.json").read_bytes() == before


def test_size_is_checked_always_and_hash_on_demand(bundle: Path) -> None:
    (bundle / "decoder.onnx").write_bytes(b"GRAPH")
    load_manifest(bundle)
    with pytest.raises(errors.IntegrityError, match=r"decoder\.onnx: sha256 .*; copy or build the bundle again$"):
        load_manifest(bundle, verify=True)
    (bundle / "decoder.onnx").write_bytes(b"graphs")
    with pytest.raises(errors.IntegrityError, match=r"decoder\.onnx: 6 bytes, the manifest says 5"):
        load_manifest(bundle)


def test_many_problems_are_cut(bundle: Path) -> None:
    for i in range(70):
        (bundle / f"{i}.bin").write_bytes(b"")
    with pytest.raises(errors.ManifestError) as caught:
        load_manifest(bundle)
    assert str(caught.value).endswith("; and 20 more")


def test_leftover_of_a_killed_write_is_ignored(bundle: Path) -> None:
    before = load_manifest(bundle)
    (bundle / "manifest.json.partial").write_text("{")
    (bundle / "openvino-cpu.partial").mkdir()
    (bundle / "openvino-cpu.partial/decoder.bin").write_bytes(b"half")
    assert load_manifest(bundle, verify=True) == before
    assert write_manifest(bundle, before) == before


def broken(manifest: Manifest, **changes: Any) -> Manifest:
    return dataclasses.replace(manifest, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "other.json"}, 'tokenizer: "other.json" is not listed in files'),
        ({"metadata": {"a": 1}}, "metadata.a: expected a string, got 1"),
        ({"metadata": {1: "a"}}, "metadata: a key is not a string"),
        ({"metadata": {"a": Path("b")}}, "metadata.a: PosixPath cannot be written"),
        ({"tables": {"embed_tokens": "../x.npy"}}, 'tables.embed_tokens: "../x.npy" is not listed'),
    ],
)
def test_invalid_manifest_is_not_written(changes: dict[str, Any], message: str, bundle: Path) -> None:
    manifest = load_manifest(bundle)
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(errors.ManifestError) as caught:
        write_manifest(bundle, broken(manifest, **changes))
    assert message in str(caught.value)
    assert (bundle / "manifest.json").read_bytes() == before
    assert load_manifest(bundle, verify=True) == manifest


def test_nan_is_not_written(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    parity = dataclasses.replace(manifest.parity[0], max_abs=math.nan)
    with pytest.raises(errors.ManifestError, match=r"parity\[0\]\.max_abs: NaN cannot be written"):
        write_manifest(bundle, broken(manifest, parity=(parity,)))


def test_link_is_not_hashed(bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(bundle)
    (tmp_path / "outside").write_text("secret")
    (bundle / "inside").symlink_to(tmp_path / "outside")
    with pytest.raises(errors.ManifestError, match="inside: is a link"):
        write_manifest(bundle, manifest)


def test_failed_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_text(path, "old")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(errors.StorageError, match=r"file\.json: not written: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
