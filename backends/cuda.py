"""NVIDIA GPUs wherever torch runs: the program of a graph with our own kernels, no compiler of the vendor's.

The artifact is the program as JSON, as for the backend `native`; weights are read where they lie in the portable graph's
data file. What depends on the GPU is made when it is loaded: weights in the order that its kernels take, kernels compiled
by Triton and NVRTC, CUDA graphs. torch is imported then and not before.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lensc.export.graph import Graph, GraphSpec
from lensc.export.quantize.scheme import Scheme

from ._portable import model_of
from ._program import CausalAttention, Linear, Program
from ._program_artifact import opened, save
from ._program_file import FORMAT
from ._program_lower import lower
from .base import (
    Artifact,
    Probe,
    Session,
    Target,
)
from .errors import UnavailableError, UnsupportedError
from .load_options import DEFAULTS, LoadOptions, settings_of

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("lensc")

NAME = "cuda"
INSTALL = "pip install 'lensc[cuda]'"
OLDEST = (8, 0)
"""Compute capability from which on there are products of bfloat16."""

BFLOAT16 = "bf16"
"""As the architecture of a target: compute in bfloat16 whatever the scheme says."""

PROGRAM = {"cuda program": str(FORMAT)}
"""What an artifact needs of the version of lensc that loads it."""

WORKING_BYTES = 2 << 30
"""Of the GPU's memory, for values, a KV cache and the libraries, beside the weights."""


class Cuda:
    """See `Backend`."""

    name = NAME

    def probe(self) -> tuple[Probe, ...]:
        """One probe, for the first GPU. torch is imported only where there are a driver and a torch."""
        try:
            device = _device()
        except UnavailableError as error:
            return (Probe(NAME, "gpu", False, str(error), "untested"),)
        import torch

        limits = torch.cuda.get_device_properties(device)
        reason = f"{limits.name}, {limits.total_memory / 2**30:.0f} GiB, torch {torch.__version__}"
        return (Probe(NAME, "gpu", True, reason),)

    def supports(self, spec: GraphSpec, scheme: str, target: Target, linear_inputs: Collection[int] = ()) -> str | None:
        """Every portable graph. Weights of other than 4 bits become floats when they are loaded, which `options` says."""
        if target.backend != NAME:
            return f"target {target} is not one of backend {NAME}"
        if target.processor != "gpu":
            return f"target {target}: backend {NAME} runs on the gpu; expected {NAME}:gpu or {NAME}:gpu:{BFLOAT16}"
        if target.arch not in ("", BFLOAT16):
            return f"target {target}: {target.arch!r} is not {BFLOAT16}; expected {NAME}:gpu or {NAME}:gpu:{BFLOAT16}"
        if Scheme.parse(scheme).kv_bits == 4:
            return f"scheme {scheme}: backend {NAME} keeps the KV cache in 8, 16 or 32 bits, not 4"
        return None

    def compile(self, graph: Graph, target: Target, out: Path) -> Artifact:
        """Lower `graph` to a program, `<out>/<target>.json`. Needs neither a GPU nor torch."""
        reason = self.supports(graph.spec, graph.scheme, target)
        if reason:
            raise UnsupportedError(reason)
        scheme = Scheme.parse(graph.scheme)
        program, files = save(graph, target, out, lambda own: lower(model_of(graph.path), graph.spec, own))
        return Artifact(
            graph=graph.spec.name,
            target=target,
            scheme=graph.scheme,
            files=files,
            toolchain=dict(PROGRAM),
            options=_options(scheme, target, program),
            compatibility=dict(PROGRAM),
            placement={"GPU": len(program.steps)},
        )

    def load(self, artifact: Artifact, spec: GraphSpec, bundle: Path, options: LoadOptions = DEFAULTS) -> Session:
        """Put a program's weights on the first GPU. `options.threads` does not matter. Raises UnavailableError, also where they do
        not fit, with what is needed.
        """
        settings_of(options, {}, NAME)
        program, path = opened(artifact, spec, bundle, PROGRAM)
        device = _device()
        scheme, target = Scheme.parse(artifact.scheme), artifact.target
        from ._cuda_session import CudaDecoderSession, CudaSession, gpu_errors
        from ._cuda_weights import FileSource

        dtype = _dtype(scheme, target)
        _check_memory(program, dtype, device, path)
        with gpu_errors():
            source = FileSource(path.parent, program.files, device)
            if spec.states:
                session: CudaSession = CudaDecoderSession(spec, program, source, dtype, _kv_dtype(scheme))
            else:
                session = CudaSession(spec, program, source, dtype)
            source.close()
        for note in session.notes:
            _log.info("%s: %s", path, note)
        return session


def _dtype(scheme: Scheme, target: Target) -> torch.dtype:
    import torch

    return torch.float32 if _products(scheme, target) == "float32" else torch.bfloat16


def _kv_dtype(scheme: Scheme) -> torch.dtype | None:
    import torch

    return torch.int8 if scheme.kv_bits == 8 else None


def _products(scheme: Scheme, target: Target) -> str:
    """What linears are computed in."""
    return "bfloat16" if target.arch == BFLOAT16 or scheme.activation_bits < 32 else "float32"


def _options(scheme: Scheme, target: Target, program: Program) -> dict[str, str]:
    """What the manifest says of how the program computes."""
    products = _products(scheme, target)
    options = {"products": products, "stream": "float32"}
    kinds = sorted({step.weight.kind for step in program.steps if isinstance(step, Linear)} - {"f32", "uint4"})
    if kinds:
        options["weights"] = f"{', '.join(kinds)} become {products} when they are loaded"
    if any(isinstance(step, CausalAttention) for step in program.steps):
        options["kv_cache"] = "int8, a scale per head and token" if scheme.kv_bits == 8 else products
    return options


def _check_memory(program: Program, dtype: torch.dtype, device: torch.device, path: Path) -> None:
    """Raise UnavailableError if the weights of `program` and what comes with them do not fit into the GPU."""
    import torch

    from ._cuda_weights import device_bytes

    needed = sum(device_bytes([step.weight], dtype) for step in program.steps if isinstance(step, Linear))
    free, total = torch.cuda.mem_get_info(device)
    if needed + WORKING_BYTES > free:
        raise UnavailableError(
            f"{path}: its weights take {needed / 2**30:.1f} GiB of a GPU's memory, with {WORKING_BYTES >> 30} GiB to work "
            f"in; {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free here; a scheme of fewer bits takes less, int4 an eighth "
            "of f32"
        )


def _device() -> torch.device:
    """The first GPU. Raises UnavailableError that says what is missing and what would help."""
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(f"{' and '.join(missing)} not installed; {INSTALL}")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UnavailableError("no NVIDIA driver: libcuda.so.1 cannot be loaded") from None
    import torch

    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise UnavailableError(
            f"torch {torch.__version__} sees no NVIDIA GPU ({built}); nvidia-smi shows what the driver sees"
        )
    major, minor = torch.cuda.get_device_capability(0)
    if (major, minor) < OLDEST:
        name = torch.cuda.get_device_name(0)
        raise UnavailableError(
            f"{name} has compute capability {major}.{minor}, expected {OLDEST[0]}.{OLDEST[1]} or newer"
        )
    return torch.device("cuda", 0)


backend = Cuda()
