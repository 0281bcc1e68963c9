"""A program as the artifact of a target: compiled into the folder of its graph, and opened where it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lensc.export.graph import Graph, GraphSpec

from ._partial import partial_folder
from ._program import Program
from ._program_file import check_spec, interface, read, write
from .base import Artifact, FileRecord, Target, check_compatibility, check_interface, file_record, share_weights
from .errors import ExecutionError, GraphError


def save(
    graph: Graph, target: Target, out: Path, made: Callable[[Path], Program]
) -> tuple[Program, tuple[FileRecord, ...]]:
    """Write the program of `graph` as `<out>/<target>.json`, beside the data files that it names; return it and its files.

    `made` lowers the graph and may write a data file of the target's own, to the path that it is given. Raises
    StorageError, and what `made` does.
    """
    name, own = f"{target.slug}.json", f"{target.slug}.data"
    with partial_folder(out, target) as partial:
        program = made(partial / own)
        write(program, partial / name)
        data = [share_weights(graph.path.parent / file, out) for file in program.files if file != own]
        data += [(partial / file).replace(out / file) for file in program.files if file == own]
        (partial / name).replace(out / name)
        files = tuple(file_record(path, out.parent) for path in (out / name, *data))
    return program, files


def opened(artifact: Artifact, spec: GraphSpec, bundle: Path, found: Mapping[str, str]) -> tuple[Program, Path]:
    """The program of an artifact and its file. `found`: see `check_compatibility`. Raises CompatibilityError, GraphError for
    the program of another graph, ExecutionError.
    """
    check_compatibility(artifact, found)
    path = bundle / artifact.files[0].path
    try:
        program = read(path)
    except GraphError as error:
        raise ExecutionError(str(error)) from error
    check_interface(spec, *interface(program, spec))
    check_spec(program, spec)
    return program, path
