"""A lowered graph -> an engine, on the GPU that it is for.

Untested: no line of it has run on a GPU. Its calls are checked against NVIDIA's bindings by `make check-tensorrt`.

What TensorRT measured of kernels is kept in the user's cache, `<cache>/tensorrt/<version>-<gpu>.timing`: the next engine for
the same GPU is compiled in a fraction of the time. A file that does not fit is made anew.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt

from lensc.export.graph import TensorSpec
from lensc.profiles.folders import cache_folder

from ._tensorrt_engine import make_logger
from ._tensorrt_target import Build, Profile
from .compiling import report_part
from .errors import ExecutionError, StorageError, UnsupportedError
from .files import reason, replacing

if TYPE_CHECKING:
    import tensorrt as trt

_log = logging.getLogger("lensc")

FOLDER, SUFFIX = "tensorrt", ".timing"

SHOWN = 4
"""Problems of the parser that are named in an error."""


def compile_engine(
    source: Path, out: Path, inputs: Sequence[TensorSpec], profiles: Sequence[Profile], build: Build, gpu: str
) -> int:
    """Compile the ONNX file `source` into the engine `out`; return how many layers the network has.

    `gpu` names the GPU at hand, for the timing cache. Raises UnsupportedError that names what the parser does not take,
    ExecutionError if TensorRT fails, StorageError if the engine cannot be written.
    """
    import tensorrt as trt

    logger = make_logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise UnsupportedError(f"{source.name}: TensorRT {trt.__version__} does not take it: {_shown(errors)}")
    config = builder.create_builder_config()
    for profile in profiles:
        made = builder.create_optimization_profile()
        for tensor in inputs:
            if any(isinstance(d, str) for d in tensor.shape):
                made.set_shape(tensor.name, *map(trt.Dims, profile.shapes(tensor)))
        if config.add_optimization_profile(made) < 0:
            raise ExecutionError(f"{source.name}: TensorRT does not take profile {profile.name}: {logger.said()}")
    set_options(config, build)
    monitor = make_monitor()
    config.progress_monitor = monitor
    kept = timing_cache_path(trt.__version__, gpu)
    set_timing_cache(config, kept)
    layers = int(network.num_layers)
    _write(builder, network, config, out, logger, monitor)
    save_timing_cache(config, kept)
    return layers


def set_options(config: trt.IBuilderConfig, build: Build) -> None:
    """What a target asks for. Precision is none of it: a strongly typed network computes in what its tensors are."""
    import tensorrt as trt

    levels = trt.HardwareCompatibilityLevel
    if build.is_plus:
        config.hardware_compatibility_level = levels.AMPERE_PLUS
    elif build.capability is not None:
        config.hardware_compatibility_level = levels.SAME_COMPUTE_CAPABILITY
    if build.for_versions:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if build.is_streamed:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if build.half == "float32":
        config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY


def make_monitor() -> Any:
    """A progress monitor that says, by `report_part`, which phase TensorRT is in and how far; phases nest, the outermost and
    the innermost one are named. Ctrl-C ends the build after the step in progress.
    """
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # without TensorRT its types are not known
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[int, int]] = {}
            self.is_interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
            self._phases[phase_name] = (0, int(num_steps))
            report_part(described(self._phases))

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            _, steps = self._phases.get(phase_name, (0, 0))
            self._phases[phase_name] = (int(step) + 1, steps)
            try:
                report_part(described(self._phases))
            except KeyboardInterrupt:  # TensorRT would lose it
                self.is_interrupted = True
            return not self.is_interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)
            report_part(described(self._phases))

    return Monitor()


def described(phases: dict[str, tuple[int, int]]) -> str:
    """Nested phases in one line: `Building engine 2/6, Timing graph nodes 113/420`."""
    shown = list(phases.items())
    shown = shown if len(shown) < 3 else [shown[0], shown[-1]]
    return ", ".join(f"{name} {step}/{steps}" if steps else name for name, (step, steps) in shown)


# --- what was measured ------------------------------------------------------------------------------------------------


def timing_cache_path(version: str, gpu: str) -> Path | None:
    """Where what was measured on such a GPU is kept; None without a home."""
    folder = cache_folder()
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{version}-{gpu}")
    return None if folder is None else folder / FOLDER / (name + SUFFIX)


def set_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> None:
    """Let a build use what is kept at `path`, or begin anew, with a line in the log if the file is damaged."""
    data = b""
    if path is not None:
        with contextlib.suppress(OSError):
            data = path.read_bytes()
    cache = config.create_timing_cache(data)
    if cache is None and data:
        _log.warning("%s is damaged; kernels are timed anew", path)
        cache = config.create_timing_cache(b"")
    if cache is not None and not config.set_timing_cache(cache, ignore_mismatch=False):
        _log.warning("%s is of another GPU or TensorRT; kernels are timed anew", path)


def save_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> None:
    """Keep what a build measured. A cache that cannot be written costs time and nothing else."""
    cache = config.get_timing_cache()
    if path is None or cache is None:
        return
    serialized: Any = cache.serialize()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(memoryview(serialized))
    except OSError as error:
        _log.info("%s: not kept: %s", path, reason(error))


# --- parts ------------------------------------------------------------------------------------------------------------


def _write(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    out: Path,
    logger: Any,
    monitor: Any,
) -> None:
    """Build the engine into a file as it is made: in memory it would stand beside its weights once more."""
    import tensorrt as trt

    failed: list[OSError] = []
    try:
        with open(out, "wb") as file:

            class Writer(trt.IStreamWriter):  # type: ignore[misc]  # as above
                def __init__(self) -> None:
                    trt.IStreamWriter.__init__(self)

                def write(self, data: Any, size: SupportsInt = 0) -> int:
                    try:
                        return file.write(data)
                    except OSError as error:  # TensorRT would lose it
                        failed.append(error)
                        return 0

            writer = Writer()
            done = builder.build_serialized_network_to_stream(network, config, writer)
    except OSError as error:
        failed.append(error)
    if monitor.is_interrupted:
        raise KeyboardInterrupt
    if failed:
        raise StorageError(f"{out.parent}: cannot be written: {failed[0].strerror or failed[0]}") from failed[0]
    if not done:
        raise ExecutionError(f"{out.name}: TensorRT {trt.__version__} cannot compile it: {logger.said()}")


def _shown(errors: Sequence[Any]) -> str:
    """What the parser does not take: the operator, the node, and its words."""
    said = []
    for error in errors:
        where = f"{error.node_operator()} {error.node_name()}".strip()
        said.append(" ".join(f"{where}: {error.desc()}".split()))
    more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return "; ".join(dict.fromkeys(said[:SHOWN])) + more if said else "it says nothing"
