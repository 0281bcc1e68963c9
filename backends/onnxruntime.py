"""ONNX Runtime on the CPU.

Compiling is graph optimization done once: the artifact is the optimized graph as ONNX with external data, so that
loading only maps the weights and packs them, and one can look at what will run (`lensc inspect`, Netron). Optimized
graphs use operators private to ONNX Runtime, hence an artifact loads on the version that made it or a newer one.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lensc.export.graph import Graph, GraphSpec
from lensc.export.quantize.scheme import Scheme
from lensc.profiles import probe

from ._engine_cores import choices, cpus_of, on_cores, staying_on
from ._onnxruntime_cache import OrtDecoderSession
from ._onnxruntime_lower import LENGTHS, NEW_SCALES, SCALES, TOTAL, WIDEN, lower, present_name
from ._onnxruntime_session import OrtSession, Weights, engine_errors, one_line
from ._partial import partial_folder
from ._portable import model_of
from .base import (
    Artifact,
    Probe,
    Session,
    Target,
    borrow_weights,
    check_compatibility,
    check_interface,
    file_record,
    only_on_cpu,
    share_weights,
)
from .errors import ExecutionError, StorageError, UnavailableError, UnsupportedError
from .load_options import DEFAULTS, PREFILL_CHUNK, Choices, LoadOptions, chunks, settings_of

NAME = "onnxruntime"
INSTALL = "pip install lensc"
PROVIDER = "CPUExecutionProvider"
LEVEL = "extended"
"""Fusions that hold on every CPU; the level above (layout) chooses for the CPU it runs on and gains nothing here,
where the graphs are matrix products and not convolutions."""

EXTERNAL_BYTES = 1024
"""Tensors from this size on go to the external data file."""

NEAREST = "the nearest are groups of 32 or 128 (w8-g128, w4-g32), or w8 with activations of 8 bits"

INT2_GROUPS = (32, 64, 128)
"""In other groups 2 bits are computed in float32, several times slower, whatever is asked for."""

CHOICES = {"spinning": ("on", "off"), "blocks": ("equal", "halving")}
"""Whether a thread that waits for the others spins; whether each takes an equal share of a loop, or small ones towards the
end, which costs more and waits less for a core that somebody else uses."""

DECODER_CHOICES = {PREFILL_CHUNK: chunks(128, 32, 64, 256, 512), **CHOICES}
"""512 tokens at once take 190 MB of buffers at full size, 128 less than 80, and were not faster: 8.0 s against 6.7 for four
layers."""

PAGE = 4096
"""Tensors of the data file begin on a page, so that they can be mapped."""


class OnnxRuntime:
    """See `Backend`."""

    name = NAME

    def probe(self) -> tuple[Probe, ...]:
        """One probe, for the CPU."""
        try:
            ort = _engine()
        except UnavailableError as error:
            return (Probe(NAME, "cpu", False, str(error)),)
        exactly = (
            "; no VNNI: int8 weights are made unsigned when they are loaded" if probe.machine().saturates_bytes else ""
        )
        return (Probe(NAME, "cpu", True, f"onnxruntime {ort.__version__}{exactly}"),)

    def supports(self, spec: GraphSpec, scheme: str, target: Target, linear_inputs: Collection[int] = ()) -> str | None:
        """Every portable graph on the CPU, float or in groups of 16, 32, … inputs; a scale per output with int8 inputs."""
        wrong_target = only_on_cpu(target, NAME)
        if wrong_target:
            return wrong_target
        if Scheme.parse(scheme).kv_bits not in (None, 8):
            nearest = dataclasses.replace(Scheme.parse(scheme), kv_bits=8)
            return f"scheme {scheme}: backend {NAME} keeps the KV cache in float32 or int8; the nearest is {nearest}"
        return _no_kernel(Scheme.parse(scheme))

    def compile(self, graph: Graph, target: Target, out: Path) -> Artifact:
        """Optimize `graph` and save it as `<out>/<target>.onnx`, with a data file of its own or the portable graph's."""
        reason = self.supports(graph.spec, graph.scheme, target)
        if reason:
            raise UnsupportedError(reason)
        ort = _engine()
        name = f"{target.slug}.onnx"
        with partial_folder(out, target) as folder:
            scheme = Scheme.parse(graph.scheme)
            with _disk_for(graph.path, out):
                if scheme.weights_are_float:
                    lowered = folder / "lowered"
                    lowered.mkdir()
                    _save(_lowered(graph, scheme), lowered / name)
                    _optimize(ort, lowered / name, folder / name)
                    shutil.rmtree(lowered)
                else:
                    _save(_lowered(graph, scheme), folder / name)
            placement = _placement(ort, folder / name)
            # the data first: without its model it is never opened
            made = [path for path in sorted(folder.iterdir()) if path.name != name]
            own = f"{name}.data"
            data = [path.replace(out / own) if path.name == own else share_weights(path, out) for path in made]
            os.replace(folder / name, out / name)
            files = tuple(file_record(path, out.parent) for path in (out / name, *data))
        return Artifact(
            graph=graph.spec.name,
            target=target,
            scheme=graph.scheme,
            files=files,
            toolchain={NAME: ort.__version__},
            options=_options_of(scheme),
            compatibility={NAME: f">={ort.__version__}"} | _cpu_requirement(graph.scheme),
            placement=placement,
        )

    def choices(self, artifact: Artifact) -> Choices:
        """See `TunableBackend.choices`."""
        return (DECODER_CHOICES if artifact.graph == "decoder" else CHOICES) | choices()

    def load(self, artifact: Artifact, spec: GraphSpec, bundle: Path, options: LoadOptions = DEFAULTS) -> Session:
        """Open an optimized graph. Weights are mapped from the data file, then packed for the CPU at hand."""
        chosen = settings_of(options, self.choices(artifact), NAME)
        ort = _engine()
        check_compatibility(artifact, {NAME: ort.__version__, "machine": platform.machine()})
        of_session = _options(ort)
        threads = probe.machine().cores if options.threads is None else options.threads
        cpus = cpus_of(chosen, threads)
        of_session.intra_op_num_threads = threads
        of_session.add_session_config_entry("session.intra_op.allow_spinning", str(int(chosen["spinning"] == "on")))
        if chosen["blocks"] == "halving":
            of_session.add_session_config_entry("session.dynamic_block_base", "4")
        if probe.machine().saturates_bytes and _multiplies_bytes(artifact):
            # one of these is the engine's own pass that makes weights unsigned, whose products have room; 10 dB on the demo
            of_session.add_session_config_entry("session.x64quantprecision", "1")
            # another one would give weights that stay DequantizeLinear a zero point of the wrong shape
            of_session.add_session_config_entry("session.qdqisint8allowed", "1")
            of_session.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        # all threads pack: one alone takes twice as long on two cores
        of_session.add_session_config_entry("session.prepack.enable_parallel", "1")
        path, *data = (bundle / file.path for file in artifact.files)
        weights = Weights(data)
        weights.lend(of_session, path)
        with staying_on(cpus), weights.being_packed():
            session = _open(ort, path, of_session)
        inputs, outputs = ([v.name for v in values] for values in (session.get_inputs(), session.get_outputs()))
        if TOTAL not in inputs:
            check_interface(spec, inputs, outputs)
            return on_cores(OrtSession(spec, session, weights), cpus)
        presents = {present_name(pair.input): pair.output for pair in spec.states}
        ours = {LENGTHS, TOTAL, SCALES, NEW_SCALES, WIDEN}
        check_interface(spec, set(inputs) - ours | {"position_ids"}, (presents.get(o, o) for o in set(outputs) - ours))
        decoder = OrtDecoderSession(spec, session, weights, _shrinking(ort), int(chosen[PREFILL_CHUNK]))
        return on_cores(decoder, cpus)


def _multiplies_bytes(artifact: Artifact) -> bool:
    """Whether it has products of unsigned inputs and whole bytes of weights: those with a scale per output."""
    return artifact.options.get("products") == "int8" and Scheme.parse(artifact.scheme).group_size is None


def _no_kernel(scheme: Scheme) -> str | None:
    """Why no kernel computes linears of `scheme`, with the nearest that one does; None if one does."""
    size = scheme.group_size
    if scheme.weights_are_float or scheme.is_float:
        return None
    if size is None and (scheme.weight_bits, scheme.symmetric, scheme.activation_bits) != (8, True, 8):
        return f"scheme {scheme}: a scale per output needs symmetric 8-bit weights and activations; {NEAREST}"
    if size is not None and (size < 16 or size & (size - 1)):
        return f"scheme {scheme}: groups of {size}, expected a power of two from 16 on; {NEAREST}"
    if scheme.weight_bits == 2 and size not in INT2_GROUPS:
        nearest = dataclasses.replace(scheme, group_size=64)
        return f"scheme {scheme}: 2 bits in groups of {size} have no int8 product, expected 32, 64 or 128; the nearest is {nearest}"
    return None


def _engine() -> Any:
    """The onnxruntime module. Raises UnavailableError that says how to install it."""
    try:
        import onnxruntime

        return onnxruntime
    except ImportError as error:
        raise UnavailableError(f"backend {NAME} unavailable: {one_line(error)}; {INSTALL}") from error


def _options(ort: Any) -> Any:
    """Options of every session here: nothing is optimized, nothing is kept between runs, errors are exceptions."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # the engine logs an error and raises it too; only what it dies of is left to the log
    options.log_severity_level = 4
    # Sizes change with every call, and patterns are kept for each size seen.
    options.enable_mem_pattern = False
    # threads of an idle session must not spin beside the other session's
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _shrinking(ort: Any) -> Any:
    """Options of a run after which the arena gives its memory back.

    Without an arena every large buffer of a run is mapped and cleared anew, which took half of the time of a full-size
    vision slice; with it, the buffers of the largest prefill would be kept for ever.
    """
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _open(ort: Any, path: Path, options: Any) -> Any:
    with engine_errors(str(path)):
        # with its fallback the engine repeats what failed on other providers, and prints that it does
        return ort.InferenceSession(str(path), options, providers=[PROVIDER], enable_fallback=0)


def _options_of(scheme: Scheme) -> dict[str, str]:
    """What the manifest says of how the graph was compiled, and in what precision it computes."""
    options = {"graph_optimization": LEVEL if scheme.weights_are_float else "lensc"}
    if not scheme.weights_are_float:
        options["products"] = "int8" if scheme.activation_bits == 8 else "float32"
    if scheme.kv_bits == 8:
        options["kv_cache"] = "int8, a scale per channel from the first tokens of a sequence"
    return options


def _lowered(graph: Graph, scheme: Scheme) -> Any:
    """The portable graph with the engine's own operators, its weights where they were."""
    return lower(model_of(graph.path), graph.spec, scheme.activation_bits, scheme.kv_bits)


def _save(model: Any, path: Path) -> None:
    """Write the model. If all its weights are bytes of one file, that file is put beside it; else they are written anew,
    one at a time.

    Norms and biases go into the model itself. They are read in place in every run, and where the system keeps files in
    large pages, each of them would bring in its neighbours, too: 48 MB at full size.
    """
    import onnx_ir as ir

    initializers = model.graph.initializers.values()
    for value in initializers:
        if isinstance(value.const_value, ir.ExternalTensor) and len(value.const_value.shape) == 1:
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
        elif isinstance(value.const_value, ir.LazyTensor) and value.const_value.nbytes <= EXTERNAL_BYTES:
            # made now: once its file is borrowed, nobody may read that
            value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)
    outside = [value for value in initializers if isinstance(value.const_value, ir.ExternalTensor)]
    large = [v for v in initializers if v in outside or v.const_value.nbytes > EXTERNAL_BYTES]
    files = {Path(value.const_value.path) for value in outside}
    if len(files) == 1 and not any(isinstance(value.const_value, ir.LazyTensor) for value in large):
        data = borrow_weights(files.pop(), path.parent)
        for value in outside:
            value.const_value = _external(ir, value, data, value.const_value.offset)
    elif large:
        data = path.with_name(path.name + ".data")
        with open(data, "wb") as file:
            for value in large:
                file.seek(-(-file.tell() // PAGE) * PAGE)
                offset = file.tell()
                file.write(value.const_value.tobytes())
                value.const_value = _external(ir, value, data, offset)
    ir.save(model, path)


def _external(ir: Any, value: Any, data: Path, offset: int) -> Any:
    tensor = value.const_value
    return ir.ExternalTensor(
        data.name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=str(data.parent)
    )


def _optimize(ort: Any, source: Path, saved: Path) -> None:
    options = _options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(saved)
    entries = {
        "session.optimized_model_external_initializers_file_name": f"{saved.name}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": str(EXTERNAL_BYTES),
        # packed weights would be made, then dropped: they fit one CPU
        "session.disable_prepacking": "1",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    _open(ort, source, options)
    _sort_value_info(saved)


def _sort_value_info(path: Path) -> None:
    """The engine writes them in the order of a hash table of addresses, which differs from run to run."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    infos = sorted(model.graph.value_info, key=lambda info: info.name)
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _placement(ort: Any, path: Path) -> dict[str, int]:
    """Nodes per execution provider, as the saved graph is placed when it is loaded."""
    options = _options(ort)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("session.disable_prepacking", "1")
    placed = _open(ort, path, options).get_provider_graph_assignment_info()
    counts: Counter[str] = Counter()
    for part in placed:
        counts[part.ep_name] += len(part.get_nodes())
    return dict(sorted(counts.items()))


def _cpu_requirement(scheme: str) -> dict[str, str]:
    """Quantized operators are fused differently for x86 (uint8 products) and ARM (int8); float graphs are the same."""
    return {} if Scheme.parse(scheme).weights_are_float else {"machine": platform.machine()}


@contextmanager
def _disk_for(source: Path, folder: Path) -> Iterator[None]:
    """A failure to save what is as large as `source` becomes StorageError if there was no room for it.

    The engine names the failed write, not the reason.
    """
    needed = sum(file.stat().st_size for file in source.parent.glob(f"{source.name}*"))
    try:
        yield
    except ExecutionError as error:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise StorageError(
                f"{folder}: no room for the compiled graph: {free / 1e6:.0f} MB free, about {needed / 1e6:.0f} MB needed"
            ) from error
        raise


backend = OnnxRuntime()
