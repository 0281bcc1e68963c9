"""NVIDIA GPUs by TensorRT 11: an engine for each graph, compiled on the kind of GPU that it is for.

Untested: no engine has been compiled or run, as no GPU with TensorRT was at hand. What is checked without one (docs/tensorrt.md):
the ONNX that TensorRT is given, run by another engine against the reference; sessions and KV cache on that same graph; every
call of TensorRT against NVIDIA's own bindings.

    f32, f16             float16, or bfloat16 or float32 if the target says so; recorded as the scheme f16
    at most 4 bits       INT4 weights in groups, products in float16
    w8a8, vision         products of int8, inputs rounded in ranges measured on pictures
    all other weights    floats: TensorRT has no form for them that is smaller; the manifest says which

Targets and their words: `_tensorrt_target`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lensc.export.graph import Graph, GraphSpec
from lensc.export.quantize.scheme import Scheme
from lensc.profiles import probe

from ._partial import partial_folder
from ._ranges import load_ranges, measure, outputs_of, save_ranges
from ._tensorrt_cache import bytes_of
from ._tensorrt_device import Gpu, first_gpu
from ._tensorrt_lower import Lowered, Ranges, write_lowered
from ._tensorrt_target import NAME, Build, Half, engine_spec, found_gpu, present_name, profiles, shapes_key
from .base import (
    Array,
    Artifact,
    Probe,
    Session,
    Target,
    check_compatibility,
    check_interface,
    file_record,
)
from .errors import ExecutionError, UnavailableError, UnsupportedError, UsageError
from .load_options import DEFAULTS, Choices, LoadOptions, settings_of

_log = logging.getLogger("lensc")

VERSION = "11"
"""The major version of TensorRT that it is written for: networks are strongly typed from there on."""

LAYOUT = {"tensorrt layout": "1"}
"""What an artifact needs of the version of lensc that loads it: inputs, outputs and profiles of engines."""

STATE = "untested"

WORKING_BYTES = 1 << 30
"""Of the GPU's memory, for what TensorRT and CUDA take beside weights, scratch and KV cache. Estimated, not measured."""

PREPARE = "prepare it here with `lensc export`, and there run: lensc compile GRAPHS --target {} -o BUNDLE"

CUDA_GRAPHS = "cuda_graphs"
CHOICES: Choices = {CUDA_GRAPHS: ("on", "off")}


class TensorRT:
    """See `StaticBackend`, `TunableBackend` and `CompilesOnDevice`."""

    name = NAME
    graphs = ("vision", "decoder")

    def probe(self) -> tuple[Probe, ...]:
        """One probe, for the first GPU. TensorRT itself is not loaded; its version is asked of the package."""
        try:
            gpu = first_gpu()
            version = _version()
        except (UnavailableError, ExecutionError) as error:
            reason = str(error).removeprefix(f"backend {NAME} unavailable: ")
            return (Probe(NAME, "gpu", False, reason, STATE),)
        reason = f"TensorRT {version}, {gpu}, CUDA {gpu.driver}; never run on a GPU by those who wrote it"
        return (Probe(NAME, "gpu", True, reason, STATE),)

    def supports(self, spec: GraphSpec, scheme: str, target: Target, linear_inputs: Collection[int] = ()) -> str | None:
        """Every portable graph with symmetric weights and a KV cache of 16 bits."""
        if target.backend != NAME:
            return f"target {target} is not one of backend {NAME}"
        if target.processor != "gpu":
            return f"target {target}: backend {NAME} runs on the gpu; expected {NAME}:gpu"
        try:
            Build.parse(target.arch)
        except UsageError as error:
            return str(error)
        parsed = Scheme.parse(scheme)
        if parsed.kv_bits in (4, 8):
            nearest = dataclasses.replace(parsed, kv_bits=None)
            return f"scheme {scheme}: backend {NAME} keeps the KV cache in 16 bits; the nearest is {nearest}"
        if not parsed.symmetric:
            nearest = dataclasses.replace(parsed, symmetric=True)
            return f"scheme {scheme}: TensorRT takes weights without zero points; the nearest is {nearest}"
        if spec.states and self.needs_ranges(scheme):
            nearest = dataclasses.replace(parsed, group_size=128)
            return (
                f"scheme {scheme}: backend {NAME} has products of int8 for the vision graph only; the nearest for "
                f"{spec.name} is {nearest}, whose weights become floats"
            )
        return None

    def needs_ranges(self, scheme: str) -> bool:
        """For products of int8: weights of 8 bits with a scale per output, and activations of 8 bits."""
        parsed = Scheme.parse(scheme)
        return (parsed.weight_bits, parsed.group_size, parsed.activation_bits) == (8, None, 8)

    def measure_ranges(
        self, graph: Graph, samples: Sequence[Mapping[str, Array]], path: Path
    ) -> list[dict[str, Array]]:
        """See `StaticBackend`. The lowered graph runs in float32 on the CPU, a few nodes at a time; no GPU is needed."""
        folder = path.with_name(f"{path.name}.lowered")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            write_lowered(graph, folder / "lowered.onnx", "float32", has_int8_products=True)
            ranges, outputs = measure(folder / "lowered.onnx", samples, probe.machine().cores, outputs_of(graph.spec))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        save_ranges(ranges, path)
        return outputs

    def cannot_compile(self, target: Target) -> str | None:
        """See `CompilesOnDevice`."""
        try:
            _gpu_to_compile_on(target, Build.parse(target.arch))
        except (UnavailableError, ExecutionError) as error:
            return str(error)
        return None

    def compile(self, graph: Graph, target: Target, out: Path) -> Artifact:
        """Write the engine `<out>/<target>.engine`. Raises UnavailableError without a GPU of the kind that it is for."""
        reason = self.supports(graph.spec, graph.scheme, target)
        if reason:
            raise UnsupportedError(reason)
        if self.needs_ranges(graph.scheme) and graph.ranges is None:
            raise UnsupportedError(f"graph {graph.spec.name}: scheme {graph.scheme} needs ranges of its activations")
        build = Build.parse(target.arch)
        gpu, version = _gpu_to_compile_on(target, build)
        from ._tensorrt_build import compile_engine

        inputs, sizes = engine_spec(graph.spec, build.half).inputs, profiles(graph.spec)
        name = f"{target.slug}.engine"
        with partial_folder(out, target) as partial:
            source = partial / f"{graph.spec.name}.onnx"
            lowered = write_lowered(graph, source, build.half, self.needs_ranges(graph.scheme), _ranges(graph))
            weights = sum(path.stat().st_size for path in partial.iterdir())
            if not build.is_streamed:
                _check_memory(f"{graph.spec.name} for {target}", weights, lowered.parameters, gpu.total_bytes, gpu)
            layers = compile_engine(source, partial / name, inputs, sizes, build, gpu.name)
            os.replace(partial / name, out / name)
        return Artifact(
            graph=graph.spec.name,
            target=target,
            scheme=recorded_scheme(graph.scheme, build.half),
            files=(file_record(out / name, out.parent),),
            toolchain={"TensorRT": version, "CUDA": gpu.driver, "gpu": gpu.name},
            options=options_of(build, lowered, graph.spec),
            compatibility=requirements(build, version, gpu, graph.spec),
            placement={"GPU": layers},
        )

    def choices(self, artifact: Artifact) -> Choices:
        """Whether runs of few tokens, and of slices, are replayed as CUDA graphs."""
        return CHOICES

    def load(self, artifact: Artifact, spec: GraphSpec, bundle: Path, options: LoadOptions = DEFAULTS) -> Session:
        """Put an engine on the first GPU. `options.threads` does not matter.

        TensorRT's version, the GPU, its driver and memory, and the sizes that the engine was compiled for are judged before
        TensorRT sees the file. Raises UnavailableError, also where there is too little memory, with what is needed.
        """
        settings = settings_of(options, CHOICES, NAME)
        build = Build.parse(artifact.target.arch)
        gpu = first_gpu()
        check_compatibility(artifact, found(_version(), gpu, spec))
        path = bundle / artifact.files[0].path
        size = path.stat().st_size if path.is_file() else -1
        if size != artifact.files[0].bytes:
            raise ExecutionError(
                f"{path}: {'is not there' if size < 0 else f'has {size} bytes'}, expected the engine of "
                f"{artifact.files[0].bytes} bytes that was compiled; build the bundle again"
            )
        cache = bytes_of(spec, build.half) if spec.states else 0
        room = gpu.free_bytes - WORKING_BYTES - cache
        if not build.is_streamed:
            parameters = int(artifact.options["parameters"])
            _check_memory(str(path), size + cache, parameters, gpu.free_bytes, gpu)
        return _opened(artifact, spec, path, build, room if build.is_streamed else None, settings)


def _opened(
    artifact: Artifact, spec: GraphSpec, path: Path, build: Build, room: int | None, settings: Mapping[str, str]
) -> Session:
    """A session of the engine at `path`. Raises GraphError if it is not one of `spec`."""
    from ._tensorrt_engine import TensorRTEngine
    from ._tensorrt_session import TensorRTDecoderSession, TensorRTSession

    engine = TensorRTEngine(path, profiles(spec), settings[CUDA_GRAPHS] == "on", room, build.for_versions)
    try:
        check_interface(engine_spec(spec, build.half), *engine.names)
        engine.check_in_place({pair.input: present_name(pair.input) for pair in spec.states})
        for note in engine.notes:
            _log.info("%s: %s", path, note)
        return TensorRTDecoderSession(spec, engine, build.half) if spec.states else TensorRTSession(spec, engine)
    except BaseException:
        engine.close()
        raise


def recorded_scheme(scheme: str, half: Half) -> str:
    """What an engine of a graph in `scheme` is judged and recorded as: what would be computed in 32 bits is in 16."""
    parsed = Scheme.parse(scheme)
    if half == "float32" or parsed.activation_bits < 32:
        return scheme
    bits = 16 if parsed.is_float else parsed.weight_bits
    return str(dataclasses.replace(parsed, weight_bits=bits, activation_bits=16))


def requirements(build: Build, version: str, gpu: Gpu, spec: GraphSpec) -> dict[str, str]:
    """What must match where an engine is loaded that was compiled here, as `check_compatibility` reads it."""
    engine = {"TensorRT": f">={version}", "TensorRT major": version.split(".")[0]} if build.for_versions else {
        "TensorRT": version
    }  # fmt: skip
    driver = {"CUDA driver": f">={gpu.driver.split('.')[0]}.0"}
    return engine | build.requirements(gpu.name, gpu.capability) | driver | {"sizes": shapes_key(spec)} | LAYOUT


def found(version: str, gpu: Gpu, spec: GraphSpec) -> dict[str, str]:
    """What is here, to be compared with `requirements`."""
    here = {"TensorRT": version, "TensorRT major": version.split(".")[0], "CUDA driver": gpu.driver}
    return here | found_gpu(gpu.name, gpu.capability) | {"sizes": shapes_key(spec)} | LAYOUT


def options_of(build: Build, lowered: Lowered, spec: GraphSpec) -> dict[str, str]:
    """What the manifest says of how an engine computes."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(lowered.kinds.items()))
    options = {
        "products": build.half,
        "stream": "float32",
        "weights": kinds,
        "parameters": str(lowered.parameters),
        "tested": "never run on a GPU",
    }
    if spec.states:
        options["kv_cache"] = f"{build.half}, in place, room for the whole context"
    if build.for_versions:
        options["host_code"] = "brings TensorRT's lean runtime, which is run where it is loaded"
    if build.is_streamed:
        options["weights_streamed"] = "what does not fit into the GPU's memory"
    return options


def _gpu_to_compile_on(target: Target, build: Build) -> tuple[Gpu, str]:
    """The GPU and TensorRT's version. Raises UnavailableError that says where and how it can be compiled."""
    try:
        gpu, version = first_gpu(), _version()
    except UnavailableError as error:
        raise UnavailableError(f"{error}; an engine is compiled on its GPU: {PREPARE.format(target)}") from error
    problem = build.wrong_gpu(gpu.capability)
    if problem:
        raise UnavailableError(f"target {target}: {gpu.name} {problem}; {PREPARE.format(target)}")
    return gpu, version


def _version() -> str:
    """TensorRT's version. Raises UnavailableError for one that is none of `VERSION`, or cannot be loaded."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UnavailableError(f"backend {NAME} unavailable: {reason}; pip install 'lensc[tensorrt]'") from error
    version = str(tensorrt.__version__)
    if version.split(".")[0] != VERSION:
        raise UnavailableError(
            f"backend {NAME} unavailable: TensorRT {version}, expected {VERSION}; pip install 'lensc[tensorrt]'"
        )
    return version


def _ranges(graph: Graph) -> Ranges | None:
    return None if graph.ranges is None else load_ranges(graph.ranges)


def _check_memory(what: str, nbytes: int, parameters: int, available: int, gpu: Gpu) -> None:
    """Raise UnavailableError if `nbytes` do not fit into what is `available` of a GPU, with the scheme that would."""
    needed = nbytes + WORKING_BYTES
    if needed > available:
        raise UnavailableError(
            f"{what}: needs {needed / 2**30:.1f} GiB of a GPU's memory, {gpu.name} has {available / 2**30:.1f} of "
            f"{gpu.total_bytes / 2**30:.1f} GiB free; {_would_fit(parameters, available - WORKING_BYTES)}"
        )


def _would_fit(parameters: int, room: int) -> str:
    """Which scheme's weights would fit into `room`."""
    for scheme, nbytes in (("f16", 2 * parameters), ("int4", int(parameters * INT4_BYTES))):
        if nbytes <= room:
            return f"in {scheme} its weights would take {nbytes / 2**30:.1f} GiB"
    return "no scheme would fit: add -streamed to the target, which copies weights in every run"


INT4_BYTES = 0.5 + 2 * 2 / 128
"""A weight of 4 bits with its share of a float16 scale, and of an offset, in groups of 128."""


backend = TensorRT()
