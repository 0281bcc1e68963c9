"""OpenVINO on the CPU, and untested on Intel's GPUs and NPUs.

An artifact is the portable graph with the functions of domain `lensc` left as bare calls, and the weights' file as it
is. It is converted where it is loaded: OpenVINO's own format would hold a second copy of the weights, and writing it
reads all of them (4 GB of memory for a decoder of 8 billion int4 weights, and minutes), while the conversion maps them
and takes a second. A vision graph in 8 bits is kept as compiled in the user's cache (`_openvino_kept`).

Weights are packed for the CPU by the first run of a graph. OpenVINO 2026.4 does so with one thread, about 6 ns a weight
of 4 bits (1 ns of 8 bits), and cannot keep what it packed: 40 s for a decoder of 7.5 billion weights on a server's core.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lensc.export.graph import Graph, GraphSpec
from lensc.export.quantize.scheme import Scheme
from lensc.profiles import probe

from ._openvino_cache import OpenVINODecoderSession
from ._openvino_fixed import FixedSession, cannot_be_fixed, shapes_at, sizes_of
from ._openvino_kept import KeptGraph
from ._openvino_lower import BEAMS, FLOAT_PRODUCTS, INT8_PRODUCTS, PAST, lower, read
from ._openvino_session import NAME, OpenVINOSession, Weights, engine, engine_errors
from ._partial import partial_folder
from .base import (
    Artifact,
    Probe,
    Session,
    Target,
    borrow_weights,
    check_compatibility,
    check_interface,
    file_record,
    share_weights,
)
from .errors import ExecutionError, UnavailableError, UnsupportedError
from .load_options import DEFAULTS, PREFILL_CHUNK, Choices, LoadOptions, chunks, settings_of

DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
"""OpenVINO's name of each kind of processor."""

ABSENT = {
    "CPU": "its CPU plugin cannot be loaded",
    "GPU": "needs an Intel GPU and its compute runtime, which OpenVINO's wheel does not contain",
    "NPU": "needs an Intel NPU and its driver, which brings the compiler: OpenVINO's wheel does not contain it",
}

PRECISION, QUANTIZATION, KV_CACHE = (
    "INFERENCE_PRECISION_HINT",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "KV_CACHE_PRECISION",
)
THREADS = "INFERENCE_NUM_THREADS"
CHOICES = {"pinning": ("on", "off"), "blocks": ("default", "static", "auto")}
"""Whether each thread stays on one core; how loops are cut for threads (TBB's partitioner)."""
DECODER_CHOICES = {PREFILL_CHUNK: chunks(2048, 128, 256, 512, 1024)}
"""Attention to a past is ten times slower with several new tokens than attention among them (40 against 300 GFLOP/s of a
core), while memory grows by 0.4 MB a token at full size."""
ATTENTION = "attention"
"""Our own option: the precision of attention's products and softmax."""
PRODUCTS = "products"
"""Our own option: whether inputs are quantized by the graph, see `_openvino_lower.read`."""

IN_FLOAT = {PRODUCTS: FLOAT_PRODUCTS, PRECISION: "f32", QUANTIZATION: "0"}
"""What takes the place of products in int8 where they are not exact."""

LATENCY = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}

QUANTIZATION_GROUPS = (128, 64, 32, 16)
"""Inputs of a product are quantized in groups of that many values: the first of these that fits, which is the fastest.
A product whose weights have other groups, or fewer inputs, would silently be computed in float."""

HELD = frozenset({"Const", "Input", "Output", "MemoryInput", "MemoryOutput"})
"""Nodes of OpenVINO's runtime graph that compute nothing."""


class OpenVINO:
    """See `Backend`."""

    name = NAME

    def probe(self) -> tuple[Probe, ...]:
        """One probe for each of cpu, gpu and npu."""
        try:
            ov = engine()
            with engine_errors(NAME):
                found = {kind: _full_name(ov, device) for kind, device in DEVICES.items()}
        except (UnavailableError, ExecutionError) as error:
            return tuple(Probe(NAME, kind, False, str(error), _state(kind)) for kind in DEVICES)
        version = f"openvino {_version(ov)}"
        return tuple(
            Probe(NAME, kind, True, f"{version}, {name}" if kind != "cpu" else version + _exactly(), _state(kind))
            if name is not None
            else Probe(NAME, kind, False, f"{version} sees no {DEVICES[kind]}: {ABSENT[DEVICES[kind]]}", _state(kind))
            for kind, name in found.items()
        )

    def supports(self, spec: GraphSpec, scheme: str, target: Target, linear_inputs: Collection[int] = ()) -> str | None:
        """Every portable graph on the CPU and the GPU; on the NPU what can run at fixed sizes and in float16."""
        if target.backend != NAME:
            return f"target {target} is not one of backend {NAME}"
        if target.arch:
            return f"target {target}: backend {NAME} takes no architecture; expected {NAME}:{target.processor}"
        if Scheme.parse(scheme).kv_bits == 4:
            return f"scheme {scheme}: backend {NAME} stores the KV cache in 8 or 16 bits; expected kv8, kv16 or no kv"
        if Scheme.parse(scheme).weight_bits == 2:
            nearest = dataclasses.replace(Scheme.parse(scheme), weight_bits=4)
            return f"scheme {scheme}: backend {NAME} reads no weights of 2 bits; the nearest is {nearest}"
        problem = _indivisible(Scheme.parse(scheme), linear_inputs)
        if problem:
            return problem
        if target.processor == "npu":
            problem = cannot_be_fixed(spec)
            if problem:
                return f"target {target}: the NPU runs graphs of fixed sizes, {spec.name} is none: {problem}"
            if Scheme.parse(scheme).activation_bits > 16:
                return f"target {target}: the NPU computes in 16 bits, scheme {scheme} in 32; expected f16 or w8a8"
        return None

    def compile(self, graph: Graph, target: Target, out: Path) -> Artifact:
        """Save `graph`, lowered, as `<out>/<target>.onnx` with its weights; compile it once if the device is here."""
        reason = self.supports(graph.spec, graph.scheme, target)
        if reason:
            raise UnsupportedError(reason)
        ov = engine()
        name = f"{target.slug}.onnx"
        with partial_folder(out, target) as folder:
            sources, group = _save(graph, folder / name)
            options = _options(target, graph, group)
            with engine_errors(str(graph.path)):
                model = read(folder / name, options[ATTENTION], options[PRODUCTS])
                if target.processor == "npu":
                    model.reshape(shapes_at(graph.spec, sizes_of(graph.spec)[0]))
                placement, executed = _try(ov, model, target, options)
            # the weights first: without its graph nobody opens them
            data = [share_weights(source, out) for source in sources]
            os.replace(folder / name, out / name)
            files = tuple(file_record(path, out.parent) for path in (out / name, *data))
        return Artifact(
            graph=graph.spec.name,
            target=target,
            scheme=graph.scheme,
            files=files,
            toolchain={NAME: _version(ov)},
            options=options | executed,
            compatibility={NAME: f">={_version(ov)}"},
            placement=placement,
        )

    def choices(self, artifact: Artifact) -> Choices:
        """See `TunableBackend.choices`. Those of threads are the CPU's."""
        of_decoder = DECODER_CHOICES if artifact.graph == "decoder" else {}
        return of_decoder | (CHOICES if artifact.target.processor == "cpu" else {})

    def load(self, artifact: Artifact, spec: GraphSpec, bundle: Path, options: LoadOptions = DEFAULTS) -> Session:
        """Convert and compile an artifact. Weights are mapped from their file."""
        chosen = settings_of(options, self.choices(artifact), NAME)
        ov = engine()
        check_compatibility(artifact, {NAME: _version(ov)})
        device = DEVICES[artifact.target.processor]
        if _full_name(ov, device) is None:
            raise UnavailableError(f"target {artifact.target}: openvino sees no {device}: {ABSENT[device]}")
        if artifact.options.get(PRODUCTS) == INT8_PRODUCTS and probe.machine().saturates_bytes:
            # its sums would lose what does not fit, and nobody would say so
            artifact = dataclasses.replace(artifact, options=artifact.options | IN_FLOAT)
        properties = _properties(artifact.options) | _engine_properties(chosen)
        if device == "CPU":
            properties[THREADS] = str(probe.machine().cores if options.threads is None else options.threads)
        path = bundle / artifact.files[0].path
        _check_head(path)

        def compiled_with(properties: dict[str, str]) -> Any:
            return _core(ov).compile_model(_read(artifact, spec, path), device, properties)

        weights = Weights([bundle / record.path for record in artifact.files[1:]])
        with engine_errors(str(path)):
            if artifact.target.processor == "npu":
                model = _read(artifact, spec, path)
                return FixedSession(spec, functools.partial(_compile_at, ov, model, device, properties))
            if spec.states:
                return OpenVINODecoderSession(
                    spec, compiled_with(properties), weights, properties[KV_CACHE], int(chosen[PREFILL_CHUNK])
                )
            if artifact.options.get(PRODUCTS) == INT8_PRODUCTS and len(artifact.files) == 2:
                kept = KeptGraph(artifact, bundle, ov.__version__, properties)
                return OpenVINOSession(spec, kept.compiled(_core(ov), compiled_with), weights)
            return OpenVINOSession(spec, compiled_with(properties), weights)


def _indivisible(scheme: Scheme, linear_inputs: Collection[int]) -> str | None:
    """Why weights of so many inputs cannot be read in groups of `scheme`, with the nearest that they can; or None."""
    group = scheme.group_size
    odd = [] if group is None else sorted(inputs for inputs in linear_inputs if inputs > group and inputs % group)
    if group is None or not odd:
        return None
    largest = math.gcd(group, *odd)
    nearest = dataclasses.replace(scheme, group_size=largest) if largest >= QUANTIZATION_GROUPS[-1] else "w8a8"
    return (
        f"scheme {scheme}: backend {NAME} needs groups that divide the inputs, {group} does not divide "
        f"{', '.join(map(str, odd))}; the nearest is {nearest}"
    )


def _exactly() -> str:
    return "; no VNNI: int8 vision is computed in float32" if probe.machine().saturates_bytes else ""


def _state(kind: str) -> str:
    return "runs here" if kind == "cpu" else "untested"


def _version(ov: Any) -> str:
    """The release, without the build."""
    return str(ov.__version__).partition("-")[0]


@functools.cache
def _core(ov: Any) -> Any:
    """The one Core of the process: it loads a plugin once."""
    return ov.Core()


def _full_name(ov: Any, device: str) -> str | None:
    """What OpenVINO calls this machine's first `device`, or None if it sees none."""
    core = _core(ov)
    # several of a kind are listed as GPU.0, GPU.1
    if not any(name.partition(".")[0] == device for name in core.available_devices):
        return None
    return str(core.get_property(device, "FULL_DEVICE_NAME"))


def _options(target: Target, graph: Graph, group: int) -> dict[str, str]:
    """Properties of a graph whose inputs can be quantized in groups of `group`, and our own.

    What the scheme does not reduce is computed in float32, for which OpenVINO has to be told: on a CPU with bfloat16 it
    would choose that. Where products are in 8 bits, attention is in bfloat16 (a quarter of the time of a prefill of
    1024 tokens is saved, and of its noise the 8 bits make twenty times as much), or in float32 on a CPU without it.

    A vision graph in 8 bits is in bfloat16 between its products as well, and quantizes their inputs itself. A decoder
    does not: its steps of one token wait for weights, which that form would read from memory as 8 bits where they are 4,
    and in bfloat16 OpenVINO unpacks them to 16 bits (on a CPU with AMX: half the speed).
    """
    parsed = Scheme.parse(graph.scheme)
    if target.processor == "npu":
        # the compiler decides the rest by itself
        return {"PERFORMANCE_HINT": "LATENCY", ATTENTION: "f32", PRODUCTS: FLOAT_PRODUCTS}
    on_cpu, bits = target.processor == "cpu", parsed.activation_bits
    inside = on_cpu and bits == 8 and not graph.spec.states
    attention = "bf16" if on_cpu and bits == 8 else "f32"
    kv_bits = parsed.kv_bits or (16 if bits == 16 else None)
    return LATENCY | {
        PRECISION: "bf16" if inside else "f16" if bits == 16 and not on_cpu else "f32",
        QUANTIZATION: str(group if bits == 8 else 0),
        KV_CACHE: {8: "u8", 16: "f16"}[kv_bits] if kv_bits else attention,
        ATTENTION: attention,
        PRODUCTS: INT8_PRODUCTS if inside else FLOAT_PRODUCTS,
    }


def _properties(options: Mapping[str, str]) -> dict[str, str]:
    """Those of `options` that are OpenVINO's."""
    return {name: value for name, value in options.items() if name in (*LATENCY, PRECISION, QUANTIZATION, KV_CACHE)}


def _engine_properties(chosen: Mapping[str, str]) -> dict[str, str]:
    """OpenVINO's properties for `CHOICES`: none for a default."""
    properties = {"ENABLE_CPU_PINNING": "NO"} if chosen.get("pinning") == "off" else {}
    blocks = chosen.get("blocks", "default")
    return properties if blocks == "default" else properties | {"TBB_PARTITIONER": blocks.upper()}


def _save(graph: Graph, path: Path) -> tuple[list[Path], int]:
    """Write the lowered graph to `path`, with the files of its weights beside it.

    Returns those files, and the groups that inputs can be quantized in. Raises UnavailableError, ExecutionError,
    GraphError.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no types
    except ImportError as error:
        raise UnavailableError(f"backend {NAME} needs onnx to compile; pip install 'lensc[export]'") from error
    try:
        model = onnx.load(str(graph.path), load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise ExecutionError(f"{graph.path}: onnx cannot read it: {' '.join(str(error).split())}") from error
    lower(model, graph.spec)
    group = _quantization_group(model, graph.spec)
    entries = [e for tensor in model.graph.initializer for e in tensor.external_data if e.key == "location"]
    sources = sorted({entry.value for entry in entries})
    strange = [name for name in sources if Path(name).name != name or name == path.name]
    missing = [name for name in sources if not (graph.path.parent / name).is_file()]
    if strange or missing:
        problem = "does not lie beside the graph" if strange else "is missing"
        raise ExecutionError(f"{graph.path}: its weights' file {(strange + missing)[0]!r} {problem}; export it again")
    path.write_bytes(model.SerializeToString(deterministic=True))
    return [borrow_weights(graph.path.parent / name, path.parent) for name in sources], group


def _quantization_group(model: Any, spec: GraphSpec) -> int:
    """The largest of `QUANTIZATION_GROUPS` that divides all groups of weights and is in all inputs; 0 if none does.

    Raises UnsupportedError for weights that OpenVINO cannot read: of 2 bits, or in groups that do not divide the inputs.
    """
    import onnx

    few = next((t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT2), None)
    if few is not None:  # in a graph of several formats, whose scheme names the most frequent one
        raise UnsupportedError(
            f"graph {spec.name}: {few} has 2 bits, which openvino does not read; export it with 4, e.g. w4-g64"
        )
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    groups, smallest = [0], QUANTIZATION_GROUPS[0]
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(shapes.get(node.input[0], ())) != 2:
            continue
        about = {attribute.name: attribute.i for attribute in node.attribute}
        group = about.get("block_size", 0)
        turned = about.get("axis", 1) == 1 and not group
        inputs = shapes[node.input[0]][0 if turned else 1]
        smallest = min(smallest, inputs)
        if group and inputs % group:
            raise UnsupportedError(
                f"graph {spec.name}: {node.input[0]} has {inputs} inputs in groups of {group}; openvino needs groups "
                "that divide the inputs: choose such, or one per output"
            )
        groups.append(group)
    divisor = math.gcd(*groups)
    return next((size for size in QUANTIZATION_GROUPS if divisor % size == 0 and size <= smallest), 0)


def _try(ov: Any, model: Any, target: Target, options: dict[str, str]) -> tuple[dict[str, int], dict[str, str]]:
    """Compile `model` if its device is here, and say how many nodes run on it and in what precision.

    Raises ExecutionError if a decoder's cache is not the plugin's own: each step would copy all of it.
    """
    device = DEVICES[target.processor]
    if _full_name(ov, device) is None:
        return {}, {"executed": f"not compiled here: openvino sees no {device}"}
    compiled = _core(ov).compile_model(model, device, _properties(options))
    nodes = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    nodes = [info for info in nodes if _text(info, "layerType") not in HELD]
    precisions = Counter(_text(info, "runtimePrecision") for info in nodes)
    if device == "CPU" and model.get_variables():
        _check_fused(nodes, len(model.get_variables()) // 2)
    described = ", ".join(f"{count} in {name}" for name, count in sorted(precisions.items()))
    return {device: len(nodes)}, {"executed": described}


def _read(artifact: Artifact, spec: GraphSpec, path: Path) -> Any:
    """The model of an artifact. Raises GraphError if it is not the graph of `spec`."""
    options = artifact.options
    model = read(path, options.get(ATTENTION, "f32"), options.get(PRODUCTS, FLOAT_PRODUCTS))
    _check_interface(model, spec)
    return model


def _compile_at(ov: Any, model: Any, device: str, options: dict[str, str], shapes: Mapping[str, list[int]]) -> Any:
    """A compiled model of inputs of `shapes`. `model` is reshaped: what was compiled before keeps its own."""
    model.reshape(dict(shapes))
    return _core(ov).compile_model(model, device, options)


def _check_fused(nodes: list[Any], layers: int) -> None:
    """Raise ExecutionError unless every layer is one attention that appends to its states."""
    kinds = Counter(_text(info, "layerType") for info in nodes)
    if kinds["ScaledDotProductAttention"] != layers or kinds["RoPE"] != 2 * layers:
        raise ExecutionError(
            f"openvino fused {kinds['ScaledDotProductAttention']} attentions and {kinds['RoPE']} rotations, "
            f"expected {layers} and {2 * layers}: this version knows another form"
        )


def _text(info: Any, name: str) -> str:
    return str(info[name].astype(str)) if name in info else "unknown"


def _check_interface(model: Any, spec: GraphSpec) -> None:
    """Raise GraphError unless `model` has the inputs and outputs of `spec`, where a state stands for a pair of them."""
    pairs = {pair.input: pair.output for pair in spec.states}
    kept = [variable.info.variable_id for variable in model.get_variables()]
    inputs = [name for port in model.inputs for name in port.get_names() if name not in (BEAMS, PAST)]
    outputs = [name for port in model.outputs for name in port.get_names()]
    check_interface(spec, [*inputs, *kept], [*outputs, *(pairs.get(name, name) for name in kept)])


def _check_head(path: Path) -> None:
    """Raise ExecutionError for what is no ONNX file: asked to read one, OpenVINO's other readers print to the screen."""
    try:
        with open(path, "rb") as file:
            head = file.read(1)
    except OSError as error:
        raise ExecutionError(f"{path}: cannot be read: {error.strerror or error}") from error
    if head != b"\x08":  # the ir_version, as protobuf writes it
        raise ExecutionError(f"{path}: not an ONNX file; compile it again")


backend = OpenVINO()
