"""The contract every engine fulfils. The protocols are the stable part; helpers live elsewhere.

One backend is one module `backends/<name>.py` with one attribute `backend` that has the four methods of
`Backend`. Compiling needs no device where the vendor's tools allow; running needs no compiler. Vendor SDKs are
imported inside functions, so that listing backends imports none of them.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lensc.export.graph import Graph, GraphSpec

from .errors import CompatibilityError, GraphError, UsageError
from .load_options import DEFAULTS, Choices, LoadOptions

Array = npt.NDArray[Any]

PROCESSORS = ("cpu", "gpu", "npu")

PROBE_TOLERANCE = "probe_tolerance"
"""Key in `Artifact.parity` of how far off a golden probe may be, where the artifact computes less exactly than its graph."""


@dataclass(frozen=True)
class Target:
    """Where an artifact runs: `onnxruntime:cpu`, `qnn:npu:sm8650`. One spelling for flag, log, manifest and key."""

    backend: str
    processor: str
    arch: str = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Parse `backend:processor[:arch]`. Raises UsageError that names the part that is wrong."""
        parts = text.split(":")
        if len(parts) not in (2, 3) or not all(p and p == p.strip() for p in parts):
            raise UsageError(
                f"target {text!r}: expected backend:processor or backend:processor:arch, e.g. onnxruntime:cpu"
            )
        for part in parts:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", part):
                raise UsageError(f"target {text!r}: {part!r} is not a name of letters, digits, _, - and dots")
        if parts[1] not in PROCESSORS:
            raise UsageError(f"target {text!r}: processor {parts[1]!r} is not one of {', '.join(PROCESSORS)}")
        return cls(*parts)

    def __str__(self) -> str:
        return ":".join(p for p in (self.backend, self.processor, self.arch) if p)

    @property
    def slug(self) -> str:
        """The target as a folder name: `onnxruntime-cpu`."""
        return str(self).replace(":", "-")


@dataclass(frozen=True)
class Probe:
    """What a backend says of one processor on this machine, as `lensc devices` prints it."""

    backend: str
    processor: str
    usable: bool
    reason: str
    """Why it is usable ("onnxruntime 1.32.0") or why not, with the command that would help."""
    state: str = "runs here"
    """`runs here`, `emulated` or `untested`."""


@dataclass(frozen=True)
class FileRecord:
    """A file of a bundle: path relative to the bundle (POSIX, no `..`, no links), size and SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A graph compiled for one target.

    `files[0]` is the one to open; all paths are relative to the bundle. `compatibility` holds what must match where it is
    loaded (string to string, e.g. `{"onnxruntime": ">=1.32"}`), `options` what it was compiled with,
    `placement` how many nodes run on which processor (`{"CPUExecutionProvider": 412}`).
    """

    graph: str
    target: Target
    scheme: str
    files: tuple[FileRecord, ...]
    toolchain: dict[str, str]
    options: dict[str, str]
    compatibility: dict[str, str]
    placement: dict[str, int]
    parity: dict[str, float | int | str] = field(default_factory=dict)


class Session(Protocol):
    """A loaded graph, ready to run. Not thread-safe unless the backend says so."""

    @property
    def spec(self) -> GraphSpec: ...

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once and return every output by name.

        An output named in `out` is written into that array, which must be C-contiguous and of the exact shape and
        dtype, and the same array is returned: this is how the KV cache is filled in place. Feeds are not modified.
        Raises ExecutionError if the engine fails, UsageError if a feed does not fit the spec.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds. Running afterwards is an error."""
        ...


class Cache(Protocol):
    """Keys and values of the tokens that a set of sequences of equal length has seen, wherever the engine keeps them."""

    @property
    def batch(self) -> int:
        """How many sequences."""
        ...

    @property
    def length(self) -> int:
        """How many tokens of each are held."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        ...

    @property
    def used_bytes(self) -> int:
        """Bytes that hold tokens."""
        ...

    def trim(self, length: int) -> None:
        """Forget all tokens from `length` on. Raises UsageError if there are not so many."""
        ...

    def fork(self, batch: int) -> Cache:
        """A cache of `batch` sequences that all begin with the tokens of this one. UsageError unless its batch is 1."""
        ...

    def reorder(self, beams: npt.NDArray[np.int64], start: int) -> None:
        """Let sequence i continue sequence `beams[i]`: tokens before `start` are the same in all and stay as they are."""
        ...

    def save(self) -> dict[str, Array]:
        """The tokens as the engine holds them: arrays by name, which may be views of the cache's own."""
        ...

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Hold what `save` of a cache of this kind gave, and nothing else. UsageError if `arrays` are not such."""
        ...


@runtime_checkable
class CachedSession(Session, Protocol):
    """A decoder whose engine keeps the KV cache in a layout of its own, and appends to it in place.

    `run`, which is fed the past and returns the new rows, must compute the same: parity and golden probes use it.
    """

    @property
    def prefill_chunk(self) -> int:
        """How many tokens of a prompt to feed at once: more take memory, or time, and gain nothing."""
        ...

    def new_cache(self, capacity: int, batch: int = 1) -> Cache:
        """An empty cache with room for `capacity` tokens; it may grow up to the model's context."""
        ...

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Run the new tokens of `feeds` after those in `cache`, which then holds them, too.

        `feeds` and the outputs are those of `run` without the states. Raises what `run` does, and PromptError if the
        model's context is full.
        """
        ...


class Backend(Protocol):
    """One engine."""

    name: str

    def probe(self) -> tuple[Probe, ...]:
        """One `Probe` per processor the engine knows. Never raises; says why not."""
        ...

    def supports(self, spec: GraphSpec, scheme: str, target: Target, linear_inputs: Collection[int] = ()) -> str | None:
        """The reason why this graph cannot be compiled for `target`, or None if it can. Pure: touches no device.

        `linear_inputs`: the inputs that linears in `scheme` have, as far as they are known.
        """
        ...

    def compile(self, graph: Graph, target: Target, out: Path) -> Artifact:
        """Compile `graph` into the existing folder `out`, whose parent is the bundle (paths are relative to it).

        All targets of a graph share `out`: files are named after the target, `<target.slug>.<suffix>`, except for the
        portable graph's own data file, put there by `share_weights`, which every target may name among its files.
        Raises UnavailableError, UnsupportedError or ExecutionError.
        """
        ...

    def load(self, artifact: Artifact, spec: GraphSpec, bundle: Path, options: LoadOptions = DEFAULTS) -> Session:
        """Open an artifact of `bundle` on this machine.

        Raises UnavailableError, CompatibilityError, ExecutionError, GraphError if the file holds another graph, or
        UsageError for a setting that the engine has not.
        """
        ...


@runtime_checkable
class TunableBackend(Backend, Protocol):
    """An engine with settings of its own, of which a machine may want other values than the defaults."""

    def choices(self, artifact: Artifact) -> Choices:
        """What `load` can be told about `artifact` on this machine, besides threads. Raises UnavailableError."""
        ...


@runtime_checkable
class StaticBackend(Backend, Protocol):
    """An engine that fixes ranges of activations when it compiles, and maybe shapes; ranges are measured before."""

    graphs: tuple[str, ...]
    """The graphs it compiles where none is named; others are left to other targets."""

    def needs_ranges(self, scheme: str) -> bool:
        """Whether a graph of `scheme` is compiled with ranges of its activations (`Graph.ranges`)."""
        ...

    def measure_ranges(
        self, graph: Graph, samples: Sequence[Mapping[str, Array]], path: Path
    ) -> list[dict[str, Array]]:
        """Write the ranges of all activations of `graph` over `samples`, feeds of one slice or sequence each, to `path`, for
        every target of the backend; return outputs but no states, in float and in fixed shapes. Raises ExecutionError, GraphError.
        """
        ...


def check_feeds(spec: GraphSpec, feeds: Mapping[str, Array]) -> dict[str, int]:
    """Check names, dtypes and shapes of `feeds` against `spec`; return the size of each symbolic dimension.

    Raises UsageError that lists every mismatch, not the first.
    """
    sizes: dict[str, int] = {}
    problems = [f"missing {n}" for n in (t.name for t in spec.inputs) if n not in feeds]
    known = {t.name: t for t in spec.inputs}
    for name, array in feeds.items():
        tensor = known.get(name)
        if tensor is None:
            problems.append(f"unexpected {name}")
            continue
        if array.dtype != np.dtype(tensor.dtype):
            problems.append(f"{tensor}: got dtype {array.dtype}")
        if array.ndim != len(tensor.shape):
            problems.append(f"{tensor}: got shape {list(array.shape)}")
            continue
        for want, got in zip(tensor.shape, array.shape, strict=True):
            if (want != got) if isinstance(want, int) else (sizes.setdefault(want, got) != got):
                problems.append(f"{tensor}: got shape {list(array.shape)}")
                break
    if problems:
        raise UsageError(f"graph {spec.name}: " + "; ".join(problems))
    return sizes


def file_record(path: Path, bundle: Path) -> FileRecord:
    """The record of the file `path` of the folder `bundle`, hashed now. Raises OSError."""
    return FileRecord(path.relative_to(bundle).as_posix(), path.stat().st_size, sha256_file(path))


def share_weights(source: Path, out: Path) -> Path:
    """Put the data file of a graph into `out` under its own name, unless another target did; return its path there.

    A copy and no link, which onnx would refuse to read. Raises OSError.
    """
    shared, partial = out / source.name, out / f"{source.name}.partial"
    if shared.exists() and filecmp.cmp(source, shared, shallow=False):
        return shared
    shutil.copyfile(source, partial)
    os.replace(partial, shared)
    return shared


def borrow_weights(source: Path, folder: Path) -> Path:
    """Let the data file of a graph lie in `folder`, under its own name, for as long as that does; return its path there.

    A link where the file system has them. Raises OSError.
    """
    borrowed = folder / source.name
    try:
        os.link(source, borrowed)
    except OSError:
        shutil.copyfile(source, borrowed)
    return borrowed


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits, read in pieces. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_out(spec: GraphSpec, sizes: Mapping[str, int], out: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """Check the arrays of `out` against `spec` at the `sizes` of a call; return the shape of every output.

    Raises UsageError that lists every array the engine cannot write into, GraphError for an output with a dimension
    that no input has.
    """
    unknown = [f"{t}" for t in spec.outputs for dim in t.shape if isinstance(dim, str) and dim not in sizes]
    if unknown:
        raise GraphError(f"graph {spec.name}: no input gives a dimension of {'; '.join(unknown)}")
    shapes = {t.name: tuple(sizes[d] if isinstance(d, str) else d for d in t.shape) for t in spec.outputs}
    known = {t.name: t for t in spec.outputs}
    problems = []
    for name, array in out.items():
        tensor = known.get(name)
        if tensor is None:
            problems.append(f"unexpected output {name}")
        elif array.dtype != np.dtype(tensor.dtype) or array.shape != shapes[name]:
            problems.append(
                f"{tensor}: expected {list(shapes[name])}, got {array.dtype}{list(array.shape)} to write into"
            )
        elif not (array.flags.c_contiguous and array.flags.writeable):
            problems.append(f"{tensor}: the array to write into is not C-contiguous and writeable")
    if problems:
        raise UsageError(f"graph {spec.name}: " + "; ".join(problems))
    return shapes


def writeable(spec: GraphSpec, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Array]) -> dict[str, Array]:
    """An array for every output of `spec` that has one of the `shapes`: those given, new ones for the others."""
    return {
        t.name: given[t.name] if t.name in given else np.empty(shapes[t.name], t.dtype)
        for t in spec.outputs
        if t.name in shapes
    }


def check_indices(spec: GraphSpec, name: str, ids: Array, rows: int) -> None:
    """Check that the input `name` names only rows that there are. Raises UsageError for one that is not below `rows`."""
    if ids.size and not (ids.min() >= 0 and ids.max() < rows):
        outside = ids.max() if ids.max() >= rows else ids.min()
        raise UsageError(f"graph {spec.name}: {name} has {outside}, expected 0 to {rows - 1}")


def check_continues(spec: GraphSpec, positions: Array, batch: int, cache: Cache) -> None:
    """Check that new tokens of `batch` sequences follow those in a cache that appends. Raises UsageError."""
    past = cache.length
    if batch != cache.batch:
        raise UsageError(f"graph {spec.name}: {batch} sequences fed, the cache has {cache.batch}")
    if not np.array_equal(positions, np.arange(past, past + len(positions))):
        raise UsageError(
            f"graph {spec.name}: position_ids {positions[:8].tolist()}, expected "
            f"{past} to {past + len(positions) - 1}: this engine appends to its cache"
        )


def check_capacity(spec: GraphSpec, capacity: int, batch: int) -> None:
    """Check the size of a new cache against what the graph takes. Raises UsageError."""
    limit = spec.dims["past"].max
    if not 1 <= capacity <= limit:
        raise UsageError(f"KV cache: capacity {capacity}, expected 1 to {limit}")
    if not 1 <= batch <= spec.dims["batch"].max:
        raise UsageError(f"KV cache: batch {batch}, expected 1 to {spec.dims['batch'].max}")


def check_trim(cache: Cache, length: int) -> None:
    """Check the argument of `Cache.trim`. Raises UsageError."""
    if not 0 <= length <= cache.length:
        raise UsageError(f"KV cache: cannot trim to {length}, expected 0 to {cache.length}")


def check_fork(cache: Cache) -> None:
    """Check that a cache can be forked. Raises UsageError."""
    if cache.batch != 1:
        raise UsageError(f"KV cache: cannot fork a batch of {cache.batch}, expected 1")


def check_reorder(cache: Cache, beams: npt.NDArray[np.int64]) -> None:
    """Check the argument of `Cache.reorder`. Raises UsageError."""
    if len(beams) != cache.batch or beams.min() < 0 or beams.max() >= cache.batch:
        raise UsageError(
            f"KV cache: cannot reorder by {beams.tolist()}, expected {cache.batch} indices below {cache.batch}"
        )


def check_restored(expected: Mapping[str, Array], arrays: Mapping[str, Array], axis: int, limit: int) -> int:
    """Check the argument of `Cache.restore` against what the empty cache would save; return how many tokens there are.

    `axis` counts tokens. Raises UsageError.
    """
    lengths = {array.shape[axis] if array.ndim > axis else -1 for array in arrays.values()}
    problems = [f"no {name}" for name in expected if name not in arrays]
    problems += [f"unexpected {name}" for name in arrays if name not in expected]
    for name, empty in expected.items():
        found = arrays.get(name, empty)
        shape = (*empty.shape[:axis], *found.shape[axis : axis + 1], *empty.shape[axis + 1 :])
        if found.dtype != empty.dtype or found.shape != shape:
            problems.append(f"{name} is {found.dtype}{list(found.shape)}, expected {empty.dtype}{list(shape)}")
    if not problems and (len(lengths) != 1 or not 1 <= max(lengths) <= limit):
        problems.append(f"{sorted(lengths)} tokens, expected 1 to {limit}, the same in all")
    if problems:
        raise UsageError("KV cache: these are not its tokens: " + "; ".join(problems[:5]))
    return max(lengths)


def only_on_cpu(target: Target, backend: str) -> str | None:
    """Why `target` is none of a backend that runs on the CPU, whatever its architecture; None if it is its target."""
    if target.backend != backend:
        return f"target {target} is not one of backend {backend}"
    if target.processor != "cpu":
        return f"target {target}: backend {backend} runs on the cpu; expected {backend}:cpu"
    if target.arch:
        return f"target {target}: backend {backend} takes no architecture; expected {backend}:cpu"
    return None


def check_interface(spec: GraphSpec, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Check that a loaded graph has the inputs and outputs of `spec`, by name. Raises GraphError."""
    problems = []
    for kind, found, tensors in (("input", set(inputs), spec.inputs), ("output", set(outputs), spec.outputs)):
        wanted = {t.name for t in tensors}
        problems += [f"no {kind} {name}" for name in sorted(wanted - found)]
        problems += [f"unexpected {kind} {name}" for name in sorted(found - wanted)]
    if problems:
        raise GraphError(f"the file of graph {spec.name} holds another graph: {'; '.join(problems)}; build it again")


def check_compatibility(artifact: Artifact, found: Mapping[str, str]) -> None:
    """Check what `artifact` requires against what is `found` here, name by name.

    A requirement `>=1.32.0` is met by that version or a newer one, any other text only by the same text. Raises
    CompatibilityError that lists every requirement that is not met, and the command that rebuilds the artifact.
    """
    problems = []
    for name, wanted in artifact.compatibility.items():
        here = found.get(name)
        if here is None:
            problems.append(f"requirement {name} {wanted} is not known to this version of lensc")
        elif wanted.startswith(">="):
            if _version(here) < _version(wanted[2:]):
                problems.append(f"needs {name} {wanted}, found {here}")
        elif here != wanted:
            problems.append(f"needs {name} {wanted}, found {here}")
    if problems:
        raise CompatibilityError(
            f"{artifact.graph} for {artifact.target}: {'; '.join(problems)}; "
            f"rebuild it here with: lensc compile GRAPHS --target {artifact.target} -o BUNDLE"
        )


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version without trailing zeros, so that 1.32 equals 1.32.0rc1."""
    numbers = re.match(r"(\d+(?:\.\d+)*?)(?:\.0+)*(?![.\d])", text)
    return tuple(int(n) for n in numbers.group(1).split(".")) if numbers else ()
