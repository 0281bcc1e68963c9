"""Our own kernels on the CPU: a program of steps, run by a small executor in C++ (`lensc.kernels`).

The artifact is the program as JSON and its constants. Weights in groups are read where they lie in the portable graph's data
file, which other targets share; what the kernels want otherwise is in a data file of the target's own. Nothing is packed
when an artifact is loaded: files are mapped, and processes that run the same bundle share their pages.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lensc.export.graph import Graph, GraphSpec
from lensc.export.quantize.scheme import Scheme
from lensc.profiles import probe

from ._engine_cores import choices, cpus_of, on_cores, staying_on
from ._native_session import NativeDecoderSession, NativeSession
from ._portable import model_of
from ._program import BITS, CHUNK_BYTES, Attention, CausalAttention, Linear, Program
from ._program_artifact import opened, save
from ._program_file import FORMAT
from ._program_lower import lower
from ._program_reference import NumpySession
from .base import (
    Artifact,
    Probe,
    Session,
    Target,
    only_on_cpu,
)
from .errors import ExecutionError, UnavailableError, UnsupportedError
from .load_options import DEFAULTS, PREFILL_CHUNK, Choices, LoadOptions, chunks, settings_of

_log = logging.getLogger("lensc")

NAME = "native"
INSTALL = "pip install lensc on a machine with a C++17 compiler builds them"

ISA_VARIABLE = "LENSC_ISA"
"""Names the instruction set to use in the place of the best one: amx, avx512, avxvnni, avx2, neon or generic."""

SLOW = "numpy computes, many times slower"

PROGRAM = {"native program": str(FORMAT)}
"""What an artifact needs of the version of lensc that loads it. It runs on every CPU."""


DECODER_CHOICES = {PREFILL_CHUNK: chunks(256, 64, 128, 512, 1024)}
"""Weights pass once for 128 tokens; more at once is a little better for attention and takes memory."""


class Native:
    """See `Backend`."""

    name = NAME

    def probe(self) -> tuple[Probe, ...]:
        """One probe, for the CPU. Without the compiled kernels numpy computes, which is slow and says so."""
        try:
            kernels = _kernels()
            if isinstance(kernels, str):
                return (Probe(NAME, "cpu", True, f"{SLOW}: {kernels}", "emulated"),)
            return (Probe(NAME, "cpu", True, f"kernels for {_isa(kernels)}"),)
        except UnavailableError as error:
            return (Probe(NAME, "cpu", False, str(error)),)

    def supports(self, spec: GraphSpec, scheme: str, target: Target, linear_inputs: Collection[int] = ()) -> str | None:
        """Every portable graph, in float or with weights in groups that a vector can sum."""
        wrong_target = only_on_cpu(target, NAME)
        if wrong_target:
            return wrong_target
        parsed = Scheme.parse(scheme)
        if parsed.kv_bits == 4:
            nearest = dataclasses.replace(parsed, kv_bits=8)
            return f"scheme {scheme}: backend {NAME} keeps the KV cache in 8, 16 or 32 bits; the nearest is {nearest}"
        return _no_kernel(parsed)

    def compile(self, graph: Graph, target: Target, out: Path) -> Artifact:
        """Lower `graph` to a program and save it as `<out>/<target>.json`, with a data file of its own if it needs one."""
        reason = self.supports(graph.spec, graph.scheme, target)
        if reason:
            raise UnsupportedError(reason)
        scheme = Scheme.parse(graph.scheme)

        def made(own: Path) -> Program:
            program = lower(model_of(graph.path), graph.spec, own, scheme.activation_bits)
            _check_groups(program)
            return program

        program, files = save(graph, target, out, made)
        return Artifact(
            graph=graph.spec.name,
            target=target,
            scheme=graph.scheme,
            files=files,
            toolchain=dict(PROGRAM),
            options=_options(scheme, program),
            compatibility=dict(PROGRAM),
            placement={"CPU": len(program.steps)},
        )

    def choices(self, artifact: Artifact) -> Choices:
        """See `TunableBackend.choices`."""
        return (DECODER_CHOICES if artifact.graph == "decoder" else {}) | choices()

    def load(self, artifact: Artifact, spec: GraphSpec, bundle: Path, options: LoadOptions = DEFAULTS) -> Session:
        """Map a program's files and plan it for this CPU."""
        chosen = settings_of(options, self.choices(artifact), NAME)
        program, path = opened(artifact, spec, bundle, PROGRAM)
        scheme = Scheme.parse(artifact.scheme)
        kernels = _kernels()
        if isinstance(kernels, str):
            _log.warning("%s: %s: %s", path, SLOW, kernels)
            try:
                return NumpySession(spec, program, path.parent)
            except OSError as error:
                raise ExecutionError(f"{path}: its data cannot be mapped: {error.strerror or error}") from error
        count = probe.machine().cores if options.threads is None else options.threads
        cpus, isa = cpus_of(chosen, count), _isa(kernels)
        session: Session
        with staying_on(cpus):
            if spec.states:
                chunk = int(chosen[PREFILL_CHUNK])
                session = NativeDecoderSession(spec, program, path.parent, kernels, isa, count, scheme, chunk)
            else:
                session = NativeSession(spec, program, path.parent, kernels, isa, count, scheme)
        return on_cores(session, cpus)


def _no_kernel(scheme: Scheme) -> str | None:
    """Why no kernel computes linears of `scheme` on int8 inputs, with the nearest that one does; None if one does."""
    if scheme.weights_are_float or scheme.activation_bits != 8 or scheme.group_size is None:
        return None
    problem = _no_sum(next(bits for bits in (2, 4, 8) if scheme.weight_bits <= bits), scheme.group_size)
    nearest = dataclasses.replace(scheme, group_size=max(32, 1 << (scheme.group_size.bit_length() - 1)))
    return problem and f"scheme {scheme}: {problem}; the nearest is {nearest}"


def _no_sum(bits: int, group: int) -> str | None:
    """Why no kernel sums groups of `group` weights of `bits` bits; None if one does."""
    size, rest = divmod(group * bits, 8)
    is_part = 4 <= size <= CHUNK_BYTES and not size & (size - 1)
    if not rest and (is_part or size % CHUNK_BYTES == 0):
        return None
    return f"groups of {group} take {group * bits / 8:g} bytes, which vectors of {CHUNK_BYTES} bytes do not sum; expected a power of two"


def _check_groups(program: Program) -> None:
    """Raise UnsupportedError for a weight of a format that no kernel takes: a mixed scheme does not name them all."""
    for step in program.steps:
        if isinstance(step, Linear) and step.weight.activations == "int8" and step.weight.groups > 1:
            problem = _no_sum(BITS[step.weight.kind], step.weight.group)
            if problem:
                raise UnsupportedError(f"weight {step.weight.name}: {problem}")


def _kernels() -> Any | str:
    """The compiled module, or the reason why there is none and what would help."""
    try:
        from lensc.kernels import _cpu
    except ImportError as error:
        return f"the compiled kernels are missing ({' '.join(str(error).split())}); {INSTALL}"
    return _cpu


def _isa(kernels: Any) -> str:
    """The instruction set to use: the best one, or the one that the environment names. Raises UnavailableError if that is
    not here.
    """
    usable: list[str] = kernels.usable_isas()
    wanted = os.environ.get(ISA_VARIABLE) or usable[0]
    if wanted not in usable:
        raise UnavailableError(f"{ISA_VARIABLE}={wanted} is not one of {', '.join(usable)}; name one of them or none")
    return wanted


def _options(scheme: Scheme, program: Program) -> dict[str, str]:
    """What the manifest says of how the program computes."""
    is_int8 = scheme.activation_bits == 8
    options = {"products": "int8" if is_int8 else "float32"}
    if any(isinstance(step, Attention | CausalAttention) for step in program.steps):
        options["attention"] = "bfloat16 where the CPU has tiles, else float32" if is_int8 else "float32"
    if any(isinstance(step, CausalAttention) for step in program.steps):
        cache = {8: "int8, a scale per head and token", 16: "float16"}
        options["kv_cache"] = cache.get(scheme.kv_bits or 0, "float16" if is_int8 else "float32")
    return options


backend = Native()
