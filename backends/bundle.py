"""A bundle: a folder of graphs, artifacts, tables and a tokenizer, described by one `manifest.json`.

A folder of portable graphs, as `lensc export` writes it, is a bundle without artifacts. The rules:

1. `manifest.json` is UTF-8 JSON of at most 16 MiB that decodes into `Manifest`: no unknown, missing or duplicate key.
2. `format` is 1. A larger number is refused by naming both.
3. Paths are relative POSIX paths inside the folder: no `..`, no `.`, no empty part, no backslash, no colon.
4. Every file is listed in `files` with size and SHA-256, and every file in the folder is listed. Only
   `manifest.json` is not, nor what a killed write left under a top-level name that ends in `.partial`.
5. Files are plain files: no links, devices or pipes, and no linked folders.
6. Every path mentioned elsewhere in the manifest is one of `files`, every graph mentioned is one of `graphs`. Several
   artifacts may name one file: targets that take the same bytes share one copy of the weights.
7. Free text lives only in `metadata`, string to string.
8. Counts are at least 1, token ids in the vocabulary, penalties, temperature and times positive, dates ISO 8601.

All problems are reported at once. The manifest is written last, under a temporary name, then renamed.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lensc.export.graph import GraphSpec

from .base import Artifact, FileRecord, file_record
from .base import sha256_file as sha256_file
from .codec import decode, encode, loads, shown
from .errors import FormatTooNewError, IntegrityError, ManifestError, StorageError
from .files import PARTIAL, reason, write_text

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 16 << 20
"""A manifest of 2 graphs and 80 KV pairs is about 100 KB; anything near this limit is not one."""

PATH_CHARACTERS = 1000
"""Less than what every file system takes in one path, 1024 on macOS."""

PROBLEMS_SHOWN = 50

VisionPadding = Literal["official", "masked", "per_slice"]


@dataclass(frozen=True)
class PictureSpec:
    """How a picture becomes slices: sizes in pixels, `pos_grid` is the side of the ViT's position table."""

    scale_resolution: int
    patch_size: int
    max_slice_nums: int
    query_num: int
    vision_padding: VisionPadding
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pos_grid: int


@dataclass(frozen=True)
class DecoderSpec:
    """The sizes of the decoder; `context_length` is the checkpoint's max_position_embeddings."""

    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int


@dataclass(frozen=True)
class GenerationSpec:
    """Defaults of generation. `num_beams` and `beam_repetition_penalty` are what the official code uses for beams."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int = 0
    max_new_tokens: int = 1024
    top_p: float = 0.8
    top_k: int = 100
    temperature: float = 0.7
    repetition_penalty: float = 1.05
    num_beams: int = 3
    beam_repetition_penalty: float = 1.2


@dataclass(frozen=True)
class ModelSpec:
    """Everything the runtime needs to know of the model besides its graphs."""

    name: str
    picture: PictureSpec
    decoder: DecoderSpec
    generation: GenerationSpec


@dataclass(frozen=True)
class GraphRecord:
    """A graph of the bundle. `file` is its ONNX file, or None where only compiled artifacts are shipped."""

    spec: GraphSpec
    scheme: str
    sha256: str
    file: str | None = None


@dataclass(frozen=True)
class Provenance:
    """Where the bundle comes from. `created` is an ISO 8601 date or time."""

    lensc_version: str
    command: str
    checkpoint_sha256: str
    versions: dict[str, str]
    scheme: str
    created: str


@dataclass(frozen=True)
class ParityRecord:
    """How close `graph` on `target` comes to `against`, over `pictures` pictures.

    `target` is a `Target` spelling, or `onnx` for the portable graph. `sqnr_db` is infinite for equal outputs. `where`:
    `measured on DEVICE`, or `emulated`; empty where the target's own processor computed on the machine that built.
    """

    graph: str
    target: str
    against: str
    max_abs: float
    sqnr_db: float
    cosine: float
    top1_agreement: float | None
    first_divergent_token: int | None
    pictures: int
    passed: bool
    tolerance: str
    where: str = ""


@dataclass(frozen=True)
class ProbeRecord:
    """Golden inputs and outputs of a graph: an npz with arrays `in.<name>` and `out.<name>`.

    `tolerance` is the largest absolute difference an artifact may show.
    """

    graph: str
    file: str
    tolerance: float


@dataclass(frozen=True)
class MeasuredRecord:
    """A run of `graph`'s artifact for `target` on `device`: median, fastest and slowest of `runs` runs, largest memory
    (0 if not told), and how many layers ran on which processor. `source`: who measured, and the job's name there.
    """

    graph: str
    target: str
    device: str
    latency_ms: float
    spread_ms: tuple[float, float]
    runs: int
    peak_bytes: int
    placement: dict[str, int]
    source: str


@dataclass(frozen=True)
class StageRecord:
    """A stage of the build: how long it took, and the largest memory of the process while it ran."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Manifest:
    """All that `manifest.json` says. `tables` maps a table's name to its .npy file."""

    format: int
    model: ModelSpec
    graphs: dict[str, GraphRecord]
    artifacts: tuple[Artifact, ...]
    tables: dict[str, str]
    tokenizer: str
    files: tuple[FileRecord, ...]
    provenance: Provenance
    parity: tuple[ParityRecord, ...] = ()
    probes: tuple[ProbeRecord, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    measured: tuple[MeasuredRecord, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    def file(self, path: str) -> FileRecord:
        """The record of the file `path`; KeyError if it is not listed."""
        return {f.path: f for f in self.files}[path]


def load_manifest(folder: Path, verify: bool = False) -> Manifest:
    """Read and check the manifest of `folder`, and that its files are there with the sizes listed.

    With `verify` every file's SHA-256 is computed too. Raises FormatTooNewError, IntegrityError when only sizes or
    hashes differ, and ManifestError that lists all problems otherwise.
    """
    path = Path(folder) / MANIFEST
    document = _read_json(path)
    if not isinstance(document, dict):
        raise ManifestError(f"{path}: expected a JSON object, got {shown(document)}")
    _check_format(path, document.get("format"))
    problems: list[str] = []
    manifest = decode(Manifest, document, problems)
    if manifest is None:
        raise ManifestError(_message(path, problems))
    problems = _problems(manifest)
    if problems:
        raise ManifestError(_message(path, problems))
    problems, differences = _compare_files(Path(folder), manifest.files, verify)
    if problems:
        raise ManifestError(_message(path, problems + differences))
    if differences:
        raise IntegrityError(_message(path, differences) + "; copy or build the bundle again")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """List and hash the files of `folder`, write its `manifest.json` and return the manifest with `files` filled in.

    Whatever `manifest.files` held is replaced. Raises ManifestError if the result would break a rule of the format,
    StorageError if it cannot be written; in both cases the manifest that was there stays.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    found, problems = _walk(folder)
    if problems:
        raise ManifestError(_message(path, problems))
    try:
        files = tuple(file_record(folder / name, folder) for name in found)
    except OSError as error:
        raise StorageError(f"{path}: not written: {reason(error)}") from error
    manifest = dataclasses.replace(manifest, format=FORMAT, files=files)
    try:
        document = encode(manifest)
    except TypeError as error:
        raise ManifestError(f"{path}: not written: {error}") from error
    if decode(Manifest, document, problems) is not None:
        problems += _problems(manifest)
    if problems:
        raise ManifestError("not written: " + _message(path, problems))
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return manifest


def path_problem(path: str) -> str | None:
    """Why `path` may not stand in a manifest, or None if it may."""
    if not path:
        return "is empty"
    if len(path) > PATH_CHARACTERS:
        return f"has more than {PATH_CHARACTERS} characters"
    if not path.isprintable() or "\\" in path or ":" in path:
        return "holds a backslash, a colon or an unprintable character"
    if path.startswith("/"):
        return "is absolute, expected a path relative to the bundle"
    parts = path.split("/")
    if ".." in parts:
        return "leaves the bundle through .."
    if "." in parts or "" in parts:
        return "has an empty or . part"
    if path == MANIFEST:
        return "is the manifest itself"
    if parts[0].endswith(PARTIAL):
        return f"is a temporary name ({PARTIAL})"
    return None


def _read_json(path: Path) -> object:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ManifestError(f"{path}: not a plain file, expected a file of JSON and no link")
        if path.stat().st_size > MANIFEST_BYTES:
            raise ManifestError(f"{path}: {path.stat().st_size} bytes, a manifest has at most {MANIFEST_BYTES}")
        return loads(path.read_bytes().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(
            f"{path} not found: {path.parent} is not a bundle; make one with lensc build, or check the path"
        ) from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise ManifestError(f"{path}: not JSON: {error}; copy or build the bundle again") from None


def _check_format(path: Path, found: object) -> None:
    if type(found) is not int or found < 1:
        raise ManifestError(f"{path}: format: expected the integer {FORMAT}, got {shown(found)}")
    if found > FORMAT:
        raise FormatTooNewError(
            f"{path}: bundle format {found} is newer than this package reads ({FORMAT}); upgrade lensc"
        )


def _problems(manifest: Manifest) -> list[str]:
    """What the values say that the types allow and the rules do not."""
    problems = [f"files[{i}].path: {shown(f.path)} {reason}" for i, f, reason in _bad_paths(manifest.files)]
    problems += [f"files[{i}].bytes: {f.bytes} is negative" for i, f in enumerate(manifest.files) if f.bytes < 0]
    listed = {f.path: f for f in manifest.files}
    problems += [f"files: {shown(path)} is listed twice" for path in _repeated(f.path for f in manifest.files)]
    problems += [
        f"{at}: {shown(path)} is not listed in files" for at, path in _mentions(manifest) if path not in listed
    ]
    problems += [f"{at}: graph {shown(name)} is not in graphs" for at, name in _graph_names(manifest)]
    problems += [
        f"{at}: expected 64 lowercase hex digits, got {shown(value)}"
        for at, value in _hashes(manifest)
        if len(value) != 64 or set(value) - set("0123456789abcdef")
    ]
    for i, artifact in enumerate(manifest.artifacts):
        if not artifact.files:
            problems.append(f"artifacts[{i}].files: empty, expected the file to open first")
        problems += [
            f"artifacts[{i}].files: {shown(f.path)} has another size or hash than in files"
            for f in artifact.files
            if f.path in listed and listed[f.path] != f
        ]
    pairs = (f"{a.graph} for {a.target}" for a in manifest.artifacts)
    problems += [f"artifacts: {pair} appears twice" for pair in _repeated(pairs)]
    for name, graph in manifest.graphs.items():
        problems += [f"graphs.{name}: {problem}" for problem in _spec_problems(name, graph.spec)]
    return problems + _range_problems(manifest)


def _repeated(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _bad_paths(files: tuple[FileRecord, ...]) -> Iterator[tuple[int, FileRecord, str]]:
    for i, record in enumerate(files):
        reason = path_problem(record.path)
        if reason:
            yield i, record, reason


def _mentions(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "tokenizer", manifest.tokenizer
    yield from ((f"tables.{name}", path) for name, path in manifest.tables.items())
    yield from ((f"graphs.{name}.file", g.file) for name, g in manifest.graphs.items() if g.file is not None)
    yield from ((f"probes[{i}].file", p.file) for i, p in enumerate(manifest.probes))
    yield from ((f"artifacts[{i}].files", f.path) for i, a in enumerate(manifest.artifacts) for f in a.files)


def _graph_names(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for kind in ("artifacts", "parity", "probes", "measured"):
        for i, record in enumerate(getattr(manifest, kind)):
            if record.graph not in manifest.graphs:
                yield f"{kind}[{i}].graph", record.graph


def _hashes(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield from ((f"files[{i}].sha256", f.sha256) for i, f in enumerate(manifest.files))
    yield from ((f"graphs.{name}.sha256", g.sha256) for name, g in manifest.graphs.items())
    yield "provenance.checkpoint_sha256", manifest.provenance.checkpoint_sha256


def _spec_problems(name: str, spec: GraphSpec) -> Iterator[str]:
    if spec.name != name:
        yield f"spec.name: {shown(spec.name)} differs from the key"
    inputs, outputs = [t.name for t in spec.inputs], [t.name for t in spec.outputs]
    for names in (inputs, outputs):
        yield from (f"spec: tensor {shown(n)} appears twice" for n in _repeated(names))
    for tensor in (*spec.inputs, *spec.outputs):
        yield from (
            f"spec: {tensor} has dimension {shown(dim)}, which is not in dims"
            for dim in tensor.shape
            if isinstance(dim, str) and dim not in spec.dims
        )
        yield from (f"spec: {tensor} has a negative dimension" for d in tensor.shape if isinstance(d, int) and d < 0)
    for pair in spec.states:
        if pair.input not in inputs or pair.output not in outputs:
            yield f"spec.states: {shown(pair.input)} to {shown(pair.output)} names no input and output of the graph"
    for symbol, size in spec.dims.items():
        if not 0 <= size.min <= size.opt <= size.max:
            yield f"spec.dims.{symbol}: expected 0 <= min <= opt <= max, got {size.min}, {size.opt}, {size.max}"


def _range_problems(manifest: Manifest) -> list[str]:
    model, problems = manifest.model, list[str]()
    for at, record in (("picture", model.picture), ("decoder", model.decoder)):
        for name, value in vars(record).items():
            if type(value) is int and value < 1:
                problems.append(f"model.{at}.{name}: {value}, expected at least 1")
    if any(s <= 0 for s in model.picture.std):
        problems.append(f"model.picture.std: {list(model.picture.std)}, expected positive numbers")
    generation, vocabulary = model.generation, model.decoder.vocab_size
    for token in (*generation.eos_token_ids, generation.pad_token_id):
        if not 0 <= token < vocabulary:
            problems.append(f"model.generation: token id {token} is outside the vocabulary of {vocabulary}")
    for name in ("max_new_tokens", "num_beams"):
        if getattr(generation, name) < 1:
            problems.append(f"model.generation.{name}: {getattr(generation, name)}, expected at least 1")
    if generation.top_k < 0:
        problems.append(f"model.generation.top_k: {generation.top_k}, expected at least 0")
    if not 0 < generation.top_p <= 1:
        problems.append(f"model.generation.top_p: {generation.top_p}, expected more than 0 and at most 1")
    for name in ("temperature", "repetition_penalty", "beam_repetition_penalty"):
        if not 0 < getattr(generation, name) < float("inf"):
            problems.append(f"model.generation.{name}: {getattr(generation, name)}, expected a positive number")
    for i, timed in enumerate(manifest.measured):
        (low, high), median, runs = timed.spread_ms, timed.latency_ms, timed.runs
        if runs < 1 or timed.peak_bytes < 0 or not 0 < low <= median <= high < float("inf"):
            problems.append(f"measured[{i}]: median {median} ms of {runs} runs from {low} to {high} is no measurement")
    try:
        datetime.datetime.fromisoformat(manifest.provenance.created)
    except ValueError:
        problems.append(f"provenance.created: {shown(manifest.provenance.created)} is not an ISO 8601 date")
    return problems


def _compare_files(folder: Path, files: tuple[FileRecord, ...], verify: bool) -> tuple[list[str], list[str]]:
    """Problems of the folder, and the files whose size or hash differs."""
    found, problems = _walk(folder)
    present, listed = set(found), {f.path for f in files}
    refused = {p.split(":", 1)[0] for p in problems}
    problems += [f"{path}: in the folder, not listed in files" for path in found if path not in listed]
    differences = []
    for record in files:
        if record.path not in present:
            if record.path not in refused:
                problems.append(f"{record.path}: listed in files, not in the folder")
            continue
        try:
            size = (folder / record.path).stat().st_size
            if size != record.bytes:
                differences.append(f"{record.path}: {size} bytes, the manifest says {record.bytes}")
            elif verify and (digest := sha256_file(folder / record.path)) != record.sha256:
                differences.append(f"{record.path}: sha256 {digest[:12]}…, the manifest says {record.sha256[:12]}…")
        except OSError as error:
            problems.append(f"{record.path}: cannot be read: {reason(error)}")
    return problems, differences


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """Relative paths of the plain files under `folder`, sorted, and what is neither file nor folder."""
    found, problems = [], []
    pending = [""]
    while pending:
        inside = pending.pop()
        try:
            entries = list(os.scandir(folder / inside))
        except OSError as error:
            problems.append(f"{inside or folder}: cannot be listed: {reason(error)}")
            continue
        for entry in entries:
            path = inside + entry.name
            if path == MANIFEST or (not inside and entry.name.endswith(PARTIAL)):
                continue
            if entry.is_symlink():
                problems.append(f"{path}: is a link, expected a plain file")
            elif entry.is_dir(follow_symlinks=False):
                pending.append(path + "/")
            elif entry.is_file(follow_symlinks=False):
                found.append(path)
            else:
                problems.append(f"{path}: is neither a file nor a folder")
    return sorted(found), sorted(problems)


def _message(path: Path, problems: list[str]) -> str:
    hidden = len(problems) - PROBLEMS_SHOWN
    return f"{path}: " + "; ".join(problems[:PROBLEMS_SHOWN]) + (f"; and {hidden} more" if hidden > 0 else "")
