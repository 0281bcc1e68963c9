"""Qualcomm's NPUs: the vision graph as an HTP context binary, compiled ahead of time on a machine without an NPU.

A target is `qnn:npu:<chip>`, the chips being those of `profiles/` that have a `soc_model`. On x86-64 the binary is
executed by emulation, which is evidence of its values and says nothing of its speed; on a device it is untested.

    f32, f16        float16 on the NPU, recorded as the artifact's scheme f16
    w8a16, w8a8     int8 weights with a scale per output; activations of 16 or 8 bits, in ranges measured on pictures
    w4a16-g<size>   weights of 4 bits in groups; activations of 16

Compiling fails unless every node is on the NPU, or is allowed elsewhere by name.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata, util
from pathlib import Path

from lensc.export.graph import Graph, GraphSpec
from lensc.export.quantize.scheme import Scheme
from lensc.profiles import probe

from ._qnn_child import Child, open_session
from ._qnn_chip import check_context, chip, unknown_chip
from ._qnn_compile import compile_context, write_fixed
from ._qnn_lower import cannot_be_lowered, patches_of
from ._qnn_quantize import WIDE_ARCH
from ._qnn_ranges import measure, save_ranges
from ._qnn_session import QnnSession, padded
from .base import Array, Artifact, Probe, Session, Target, check_compatibility, check_interface, file_record
from .errors import ExecutionError, StorageError, UnavailableError, UnsupportedError
from .load_options import DEFAULTS, LoadOptions, settings_of

NAME = "qnn"
PACKAGE = "onnxruntime-qnn"
INSTALL = "pip install 'lensc[qnn]'"

EMULATED_MACHINES = ("x86_64", "amd64")

PROVIDER_OPTIONS = {"backend_type": "htp", "offload_graph_io_quantization": "0"}
"""Quantizing inputs and outputs, too, is the NPU's."""

COMPILER_OPTIONS = {"htp_graph_finalization_optimization_mode": "1"}
"""4 to 6 times faster than the default, for a binary 12 % larger. What it costs on a device is not known."""

FLOAT16 = {"enable_htp_fp16_precision": "1"}

LIMIT_VARIABLE = "LENSC_QNN_LIMIT_S"
LIMIT_S = 120.0
"""The longest that an emulated run may take, unless the variable says another."""

EMULATED_GMACS_S = 0.6
"""Multiply-adds of emulation a second, in 10^9: a SigLIP layer of 1024 tokens has 18e9 and took 28 s."""

GROUPS = (16, 32, 64, 128)


class Qnn:
    """See `StaticBackend`."""

    name = NAME
    graphs = ("vision",)

    def probe(self) -> tuple[Probe, ...]:
        """One probe, for the NPU: emulated on x86-64, untested elsewhere."""
        problem = _missing()
        if problem:
            return (Probe(NAME, "npu", False, problem, _state()),)
        version = f"{PACKAGE} {metadata.version(PACKAGE)}, QAIRT {_qairt()}"
        if _is_emulated():
            return (Probe(NAME, "npu", True, f"{version}; compiles for every chip, runs by emulation", "emulated"),)
        return (Probe(NAME, "npu", True, version, "untested"),)

    def supports(self, spec: GraphSpec, scheme: str, target: Target, linear_inputs: Collection[int] = ()) -> str | None:
        """The vision graph, in float, or with 8- or 4-bit weights and activations of fixed ranges."""
        if (target.backend, target.processor) != (NAME, "npu"):
            return f"target {target} is not one of backend {NAME}; expected {NAME}:npu:CHIP"
        problem = unknown_chip(target.arch)
        if problem:
            return f"target {target}: {problem}"
        problem = cannot_be_lowered(spec)
        if problem:
            return f"target {target}: graph {spec.name}: {problem}"
        parsed = Scheme.parse(scheme)
        return _unknown_scheme(parsed) or _indivisible(parsed, linear_inputs) or _too_new(parsed, target)

    def needs_ranges(self, scheme: str) -> bool:
        """Every scheme that is not float."""
        return not Scheme.parse(scheme).weights_are_float

    def measure_ranges(self, graph: Graph, samples: Sequence[Mapping[str, Array]], path: Path) -> None:
        """See `StaticBackend`. The graph runs in float on the CPU, a layer at a time."""
        _need_package()
        folder = path.with_name(f"{path.name}.fixed")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            write_fixed(graph, folder / "fixed.onnx", None)
            patches = patches_of(graph.spec)
            fixed = [padded(graph.spec, sample, patches) for sample in samples]
            save_ranges(measure(folder / "fixed.onnx", fixed, probe.machine().cores), path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def compile(self, graph: Graph, target: Target, out: Path) -> Artifact:
        """Write `<out>/<target>.onnx`, the engine's wrapper, and beside it the context binary and where each node is."""
        reason = self.supports(graph.spec, graph.scheme, target)
        if reason:
            raise UnsupportedError(reason)
        _need_package()
        made_for, scheme = chip(target.arch), Scheme.parse(graph.scheme)
        provider = PROVIDER_OPTIONS | COMPILER_OPTIONS | made_for.provider_options
        provider |= FLOAT16 if scheme.weights_are_float else {}
        partial = out / f"{target.slug}.partial"
        name = f"{target.slug}.onnx"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "fixed").mkdir(parents=True)
            source = partial / "fixed" / f"{graph.spec.name}.onnx"
            products = write_fixed(graph, source, made_for)
            compiled = compile_context(source, partial / name, provider, graph.cpu_nodes)
            shutil.rmtree(partial / "fixed")
            check_context(partial / name, made_for, _qairt())
            placement = partial / f"{target.slug}.placement.json"
            placement.write_text(json.dumps(compiled.where, indent=0), encoding="utf-8")
            others = [path for path in sorted(partial.iterdir()) if path.name != name]
            files = [path.replace(out / path.name) for path in others]
            files = [(partial / name).replace(out / name), *files]
            records = tuple(file_record(path, out.parent) for path in files)
        except OSError as error:
            raise StorageError(f"{out}: cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Artifact(
            graph=graph.spec.name,
            target=target,
            scheme="f16" if scheme.weights_are_float else graph.scheme,
            files=records,
            toolchain={PACKAGE: metadata.version(PACKAGE), "qairt": _qairt()},
            options={
                **provider,
                "patches": str(patches_of(graph.spec)),
                "multiply_adds": str(products),
                "compiler_peak_bytes": str(compiled.peak_bytes),
                **({"cpu_nodes": " ".join(graph.cpu_nodes)} if graph.cpu_nodes else {}),
            },
            compatibility={
                "qairt": _qairt(),
                "chip": made_for.name,
                "soc_model": str(made_for.soc_model),
                "htp_arch": str(made_for.htp_arch),
            },
            placement=compiled.counts,
        )

    def load(self, artifact: Artifact, spec: GraphSpec, bundle: Path, options: LoadOptions = DEFAULTS) -> Session:
        """Open a context binary: on x86-64 in a process that emulates, elsewhere in this one (untested).

        Chip and QAIRT are checked before Qualcomm's library sees the file.
        """
        settings_of(options, {}, NAME)
        _need_package()
        wanted = chip(artifact.target.arch)
        found = {"qairt": _qairt(), "chip": wanted.name, **wanted.provider_options}
        check_compatibility(artifact, found)
        path = bundle / artifact.files[0].path
        check_context(path, wanted, _qairt())
        provider = PROVIDER_OPTIONS | wanted.provider_options
        cpu_nodes = artifact.options.get("cpu_nodes", "").split()
        patches = int(artifact.options["patches"])
        if not _is_emulated():
            return _on_device(spec, path, patches, provider, cpu_nodes)
        limit_s = _limit_s()
        expected_s = int(artifact.options["multiply_adds"]) / EMULATED_GMACS_S / 1e9
        if expected_s > limit_s:
            raise UnavailableError(
                f"target {artifact.target}: emulating a slice takes about {expected_s:.0f} s, the limit is {limit_s:.0f} s; "
                f"{LIMIT_VARIABLE}=SECONDS allows more"
            )
        job = {"source": str(path), "provider": provider, "cpu_nodes": cpu_nodes}
        with ExitStack() as stack:
            child = stack.enter_context(Child(str(path), "run", job, limit_s))
            names = set(child.ask({}))
            outputs = {t.name for t in spec.outputs}
            check_interface(spec, names - outputs, names & outputs)
            stack.pop_all()
        return QnnSession(spec, patches, child.ask, child.close)


def _on_device(
    spec: GraphSpec, path: Path, patches: int, provider: Mapping[str, str], cpu_nodes: Sequence[str]
) -> Session:
    """On the NPU of this machine. Untested: nobody has run it."""
    import onnxruntime as ort

    from ._onnxruntime_session import engine_errors

    with engine_errors(str(path)):
        session = open_session(ort, str(path), {**provider, "htp_performance_mode": "burst"}, cpu_nodes)
    outputs = [value.name for value in session.get_outputs()]
    check_interface(spec, [value.name for value in session.get_inputs()], outputs)

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with engine_errors(f"graph {spec.name}"):
            return dict(zip(outputs, session.run(outputs, dict(feeds)), strict=True))

    return QnnSession(spec, patches, run, lambda: None)


def _unknown_scheme(scheme: Scheme) -> str | None:
    """Why a graph of `scheme` has no form on the NPU, with the nearest that has one; None if it has one."""
    if scheme.weights_are_float:
        return None
    nearest = "w4a16-g16" if scheme.weight_bits <= 4 else "w8a16"
    if not scheme.symmetric or scheme.mixed or scheme.scale_bits is not None:
        return f"scheme {scheme}: backend {NAME} takes plain symmetric weights; the nearest is {nearest}"
    if scheme.weight_bits == 8 and scheme.group_size is None and scheme.activation_bits in (8, 16):
        return None
    if scheme.weight_bits == 4 and scheme.group_size in GROUPS and scheme.activation_bits == 16:
        return None
    return f"scheme {scheme}: backend {NAME} takes f32, f16, w8a16, w8a8 and w4a16 in groups; the nearest is {nearest}"


def _indivisible(scheme: Scheme, linear_inputs: Collection[int]) -> str | None:
    """Why weights of so many inputs have no groups of `scheme` on the NPU, or None."""
    odd = [str(inputs) for inputs in sorted(linear_inputs) if scheme.group_size and inputs % scheme.group_size]
    if not odd:
        return None
    return f"scheme {scheme}: backend {NAME} needs groups that divide the inputs, {', '.join(odd)}; the nearest is w4a16-g16"


def _too_new(scheme: Scheme, target: Target) -> str | None:
    """Why the chip has no arithmetic for `scheme`, or None."""
    if chip(target.arch).htp_arch >= WIDE_ARCH or scheme.weight_bits == 8:
        return None
    return f"target {target}: Hexagon before v{WIDE_ARCH} takes no {scheme}: no float16, no groups of 4 bits; expected w8a16 or w8a8"


def _is_emulated() -> bool:
    return platform.machine().lower() in EMULATED_MACHINES


def _state() -> str:
    return "emulated" if _is_emulated() else "untested"


def _missing() -> str | None:
    """Why the engine is not here, or None."""
    if util.find_spec("onnxruntime_qnn") is None or util.find_spec("onnxruntime") is None:
        return f"{PACKAGE} is not installed; {INSTALL}"
    return None


def _need_package() -> None:
    problem = _missing()
    if problem:
        raise UnavailableError(f"backend {NAME} unavailable: {problem}")


def _qairt() -> str:
    """The version of Qualcomm's runtime that the package brings."""
    from onnxruntime_qnn import build_and_package_info

    return str(build_and_package_info.qnn_version)


def _limit_s() -> float:
    """Raises ExecutionError for a variable that is no number of seconds."""
    text = os.environ.get(LIMIT_VARIABLE, str(LIMIT_S))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise ExecutionError(f"{LIMIT_VARIABLE}={text!r}: expected a number of seconds above 0")
    return limit


backend = Qnn()
