"""Qualcomm's NPUs: graphs as HTP context binaries, compiled ahead of time on a machine without an NPU.

A target is `qnn:npu:<chip>`, the chips being those of `profiles/` that have a `soc_model`. On x86-64 the binary is
executed by emulation, which is evidence of its values and says nothing of its speed; on a device it is untested.

    f32, f16        float16 on the NPU, recorded as the artifact's scheme f16
    w8a16, w8a8     int8 weights with a scale per output; activations of 16 or 8 bits, in ranges measured on pictures
    w4a16-g<size>   weights of 4 bits in groups; activations of 16

A decoder is compiled for a context of fixed size, in forms for many tokens and for one (`_qnn_decoder`); it takes
activations of 16 bits or float16, on Hexagon v73 and later.

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

from ._partial import partial_folder
from ._qnn_child import Child, interface, open_session
from ._qnn_chip import Chip, check_context, chip, unknown_chip
from ._qnn_compile import Compiled, compile_context, compile_decoder, fix, save
from ._qnn_decoder import DecoderLayout, QnnDecoder, fitted
from ._qnn_form import Form, forms, patches_of, range_form
from ._qnn_lower import cannot_be_lowered, rotary_of
from ._qnn_quantize import WIDE_ARCH
from ._qnn_session import QnnSession, padded
from ._ranges import measure, outputs_of, save_ranges
from .base import Array, Artifact, Probe, Session, Target, check_compatibility, check_interface, file_record
from .errors import ExecutionError, UnavailableError, UnsupportedError
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
        """In float, or with 8- or 4-bit weights and activations of fixed ranges."""
        if (target.backend, target.processor) != (NAME, "npu"):
            return f"target {target} is not one of backend {NAME}; expected {NAME}:npu:CHIP"
        problem = unknown_chip(target.arch)
        if problem:
            return f"target {target}: {problem}"
        problem = cannot_be_lowered(spec)
        if problem:
            return f"target {target}: graph {spec.name}: {problem}"
        parsed = Scheme.parse(scheme)
        refusal = _unknown_scheme(parsed) or _indivisible(parsed, linear_inputs) or _too_new(parsed, target)
        return refusal or (_no_decoder(parsed, target) if spec.states else None)

    def needs_ranges(self, scheme: str) -> bool:
        """Every scheme that is not float."""
        return not Scheme.parse(scheme).weights_are_float

    def measure_ranges(
        self, graph: Graph, samples: Sequence[Mapping[str, Array]], path: Path
    ) -> list[dict[str, Array]]:
        """See `StaticBackend`. The graph runs in float on the CPU, a layer at a time."""
        _need_package()
        folder = path.with_name(f"{path.name}.fixed")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        form = range_form(graph.spec)
        try:
            save(fix(graph, form, None).model, folder / "fixed.onnx")
            if graph.spec.states:
                groups, frequencies = rotary_of(graph)
                fixed = [fitted(graph.spec, sample, form, frequencies, groups) for sample in samples]
            else:
                fixed = [padded(graph.spec, sample, form) for sample in samples]
            ranges, outputs = measure(folder / "fixed.onnx", fixed, probe.machine().cores, outputs_of(graph.spec))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        save_ranges(ranges, path)
        return outputs

    def compile(self, graph: Graph, target: Target, out: Path) -> Artifact:
        """Write `<out>/<target>.onnx`, the engine's wrapper, and beside it the context binary and where each node is."""
        reason = self.supports(graph.spec, graph.scheme, target)
        if reason:
            raise UnsupportedError(reason)
        _need_package()
        made_for, scheme = chip(target.arch), Scheme.parse(graph.scheme)
        provider = PROVIDER_OPTIONS | COMPILER_OPTIONS | made_for.provider_options
        provider |= FLOAT16 if scheme.weights_are_float else {}
        with partial_folder(out, target) as partial:
            make = _make_decoder if graph.spec.states else _make_vision
            first, compiled, options = make(graph, made_for, provider, partial, target.slug)
            for wrapper in partial.glob("*.onnx"):
                check_context(wrapper, made_for, _qairt())
            placement = partial / f"{target.slug}.placement.json"
            placement.write_text(json.dumps(compiled.where, indent=0), encoding="utf-8")
            paths = [partial / first, *(path for path in sorted(partial.iterdir()) if path.name != first)]
            records = tuple(file_record(path.replace(out / path.name), out.parent) for path in paths)
        return Artifact(
            graph=graph.spec.name,
            target=target,
            scheme="f16" if scheme.weights_are_float else graph.scheme,
            files=records,
            toolchain={PACKAGE: metadata.version(PACKAGE), "qairt": _qairt()},
            options={
                **provider,
                **options,
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
        layout = DecoderLayout.load(path) if spec.states else None
        emulated = _is_emulated()
        if layout is None:
            wrappers = [path]
        else:
            pairs = layout.emulated if emulated else layout.parts
            wrappers = [path.with_name(name) for pair in pairs for name in pair]
        if emulated:
            _check_time(artifact, layout)
        for wrapper in wrappers:
            check_context(wrapper, wanted, _qairt())
        cpu_nodes = artifact.options.get("cpu_nodes", "").split()
        provider = PROVIDER_OPTIONS | wanted.provider_options
        with ExitStack() as stack:
            engine: Child | _Device
            if emulated:
                sources = [str(wrapper) for wrapper in wrappers]
                job = {"sources": sources, "provider": provider, "cpu_nodes": cpu_nodes}
                engine = stack.enter_context(Child(str(path), "run", job, _limit_s()))
            else:
                engine = _Device(wrappers, provider, cpu_nodes)
            interfaces = engine.interfaces()
            if layout is not None:
                session: Session = QnnDecoder(spec, layout, interfaces, engine.run, engine.close)
            else:
                check_interface(spec, *interfaces[0])
                form = Form(spec.name, {"slices": 1, "patches": int(artifact.options["patches"])})
                session = QnnSession(spec, form, engine.run, engine.close)
            stack.pop_all()
        return session


Made = tuple[str, Compiled, dict[str, str]]
"""The file to open, what went where, and options to record."""


def _make_vision(graph: Graph, made_for: Chip, provider: Mapping[str, str], out: Path, slug: str) -> Made:
    folder, name = out / "fixed", f"{slug}.onnx"
    folder.mkdir()
    fixed = fix(graph, forms(graph.spec)[0], made_for)
    source = save(fixed.model, folder / f"{graph.spec.name}.onnx")
    compiled = compile_context([source], [out / name], provider, graph.cpu_nodes)
    shutil.rmtree(folder)
    return name, compiled, {"patches": str(patches_of(graph.spec)), "multiply_adds": str(fixed.multiply_adds)}


def _make_decoder(graph: Graph, made_for: Chip, provider: Mapping[str, str], out: Path, slug: str) -> Made:
    name = f"{slug}.decoder.json"
    most = EMULATED_GMACS_S * 1e9 * LIMIT_S
    compiled, layout, products = compile_decoder(graph, made_for, provider, out, slug, most)
    layout.save(out / name)
    return name, compiled, {"context": str(layout.context), "multiply_adds": str(products)}


def _check_time(artifact: Artifact, layout: DecoderLayout | None) -> None:
    """Raise UnavailableError if emulating a slice, or a prefill, takes too long."""
    limit_s = _limit_s()
    expected_s = int(artifact.options["multiply_adds"]) / EMULATED_GMACS_S / 1e9
    what = "a slice" if layout is None else f"{layout.tokens} tokens"
    if layout is not None and not layout.emulated:
        raise UnavailableError(
            f"target {artifact.target}: emulating {what} would take about {expected_s:.0f} s, so no binary for it was made; "
            "run it on the device"
        )
    if expected_s > limit_s:
        raise UnavailableError(
            f"target {artifact.target}: emulating {what} takes about {expected_s:.0f} s, the limit is {limit_s:.0f} s; "
            f"{LIMIT_VARIABLE}=SECONDS allows more"
        )


class _Device:
    """Graphs on the NPU of this machine. Untested: nobody has run it."""

    def __init__(self, paths: Sequence[Path], provider: Mapping[str, str], cpu_nodes: Sequence[str]) -> None:
        import onnxruntime as ort

        from ._onnxruntime_session import engine_errors

        self._errors = engine_errors
        options = {**provider, "htp_performance_mode": "burst"}
        with engine_errors(str(paths[0])):
            self._sessions = [open_session(ort, str(path), options, cpu_nodes, len(paths) > 1) for path in paths]
        self._interfaces = [interface(session) for session in self._sessions]

    def interfaces(self) -> list[tuple[list[str], list[str]]]:
        """See `Child.interfaces`."""
        return self._interfaces

    def run(self, index: int, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Child.run`."""
        names = self._interfaces[index][1]
        with self._errors(f"graph {index}"):
            return dict(zip(names, self._sessions[index].run(names, dict(feeds)), strict=True))

    def close(self) -> None:
        """Let go of the sessions."""
        self._sessions = []


def _unknown_scheme(scheme: Scheme) -> str | None:
    """Why a graph of `scheme` has no form on the NPU, with the nearest that has one; None if it has one."""
    if scheme.weights_are_float:
        return None
    nearest = "w4a16-g16" if scheme.weight_bits <= 4 else "w8a16"
    if not scheme.symmetric or scheme.scale_bits is not None:
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


def _no_decoder(scheme: Scheme, target: Target) -> str | None:
    """Why the chip takes no decoder of `scheme`, or None."""
    if chip(target.arch).htp_arch < WIDE_ARCH:
        return f"target {target}: Hexagon before v{WIDE_ARCH} multiplies activations by 8 bits only: no decoder"
    if scheme.activation_bits == 8:
        return f"scheme {scheme}: backend {NAME} takes a decoder with activations of 16 bits; the nearest is w8a16"
    return None


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
