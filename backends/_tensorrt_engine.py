"""An engine of TensorRT that is loaded: its contexts, its scratch memory, and CUDA graphs of the runs that come again.

Untested: no line of it has run on a GPU. Its calls are checked against NVIDIA's bindings by `make check-tensorrt`.

A run of a profile that is replayed has a context for each set of shapes, since a recorded graph may read what its context
last computed of its shapes; all contexts share one scratch memory, as runs follow each other in one stream.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._tensorrt_device import CudaDevice
from ._tensorrt_session import Placed
from ._tensorrt_target import Profile
from .errors import ExecutionError, GraphError
from .files import map_file

if TYPE_CHECKING:
    import tensorrt as trt

_log = logging.getLogger("lensc")

GRAPHS = 16
"""Sets of shapes that are kept as CUDA graphs: those that came last."""

SCRATCH_ALIGNMENT = 256

SAID = 400
"""Characters of TensorRT's own words in an error."""


def make_logger() -> Any:
    """A logger for TensorRT: what it says goes to the log `lensc` at the level debug; `said()` is its last error in one line."""
    import tensorrt as trt

    class Logger(trt.ILogger):  # type: ignore[misc]  # without TensorRT its types are not known
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self._errors.append(msg)
            _log.debug("tensorrt: %s", msg)

        def said(self) -> str:
            text = " ".join(" ".join(self._errors[-2:]).split()) or "it says nothing"
            self._errors.clear()
            return text if len(text) <= SAID else text[: SAID - 1] + "…"

    return Logger()


@dataclass
class _Recorded:
    """A context for one set of shapes; where its tensors were when its graph was recorded, and that graph, once it is."""

    context: trt.IExecutionContext
    addresses: tuple[int, ...] = ()
    graph: Any = None


@dataclass
class _Loaded:
    """What of TensorRT has to live as long as an engine."""

    logger: Any
    runtime: trt.Runtime
    engine: trt.ICudaEngine
    contexts: dict[int, trt.IExecutionContext] = field(default_factory=dict)


class TensorRTEngine:
    """See `_tensorrt_session.Engine`."""

    def __init__(
        self, path: Path, profiles: Sequence[Profile], is_replayed: bool, room: int | None, has_host_code: bool
    ) -> None:
        """Load the engine of `path`. `is_replayed`: record CUDA graphs. `room`: bytes of the GPU's memory that weights may
        take if the engine can stream them; None for all. `has_host_code`: it brings a lean runtime, which is run.

        Raises ExecutionError for a file that is not this TensorRT's engine, and if the GPU has no memory for it.
        """
        self.device = CudaDevice()
        self._path, self._profiles = path, profiles
        self._recorded: dict[tuple[object, ...], _Recorded] = {}
        self._scratch, self._scratch_bytes = 0, 0
        self.notes: list[str] = []
        self._loaded: _Loaded | None = None
        self._is_closed = False
        try:
            self._loaded = self._load(has_host_code)
            self._is_replayed = self._stream_weights(room) and is_replayed
            engine = self._open().engine
            if engine.num_optimization_profiles != len(profiles):
                raise GraphError(
                    f"{path}: has {engine.num_optimization_profiles} profiles, expected {len(profiles)}; compile it again"
                )
            sizes = [int(engine.get_device_memory_size_for_profile_v2(i)) for i in range(len(profiles))]
            self._scratch_bytes = -(-max(sizes) // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
            self._scratch = self.device.allocate(self._scratch_bytes)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[set[str], set[str]]:
        """The names of its inputs, and of its outputs."""
        import tensorrt as trt

        engine = self._open().engine
        found = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = {name for name in found if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        return inputs, set(found) - inputs

    def check_in_place(self, pairs: Mapping[str, str]) -> None:
        """Raise ExecutionError unless each output shares the memory of its input: `pairs` of input and output."""
        engine = self._open().engine
        apart = [output for past, output in pairs.items() if engine.get_aliased_input_tensor(output) != past]
        if apart:
            raise ExecutionError(
                f"{self._path}: {apart[0]} is not written in place, so that every step would need a copy of the cache; "
                "this TensorRT made something else of TensorScatter than a KVCacheUpdate"
            )

    def run(self, profile: int, inputs: Mapping[str, Placed], outputs: Mapping[str, Placed]) -> None:
        """See `Engine.run`. The second run of the same shapes at the same addresses is recorded, the third replays it."""
        if not (self._is_replayed and self._profiles[profile].is_replayed):
            contexts = self._open().contexts
            if profile not in contexts:
                contexts[profile] = self._context(profile)
            self._place(contexts[profile], inputs, outputs)
            self._enqueue(contexts[profile])
            return
        key = (profile, *((name, shape) for name, (_, shape) in inputs.items()))
        addresses = tuple(address for address, _ in (*inputs.values(), *outputs.values()))
        found = self._recorded.pop(key, None)
        if found is None:
            self._make_room()
            found = _Recorded(self._context(profile))
        self._recorded[key] = found  # the last that is given up
        if found.graph is not None and found.addresses == addresses:
            self.device.launch(found.graph)
            return
        self._drop_graph(found)
        self._place(found.context, inputs, outputs)
        if found.addresses != addresses:  # what depends on shapes and addresses must not be recorded
            self._enqueue(found.context)
            found.addresses = addresses
            return
        self.device.begin_capture()
        try:
            self._enqueue(found.context)
        finally:
            found.graph = self.device.end_capture()
        self.device.launch(found.graph)

    def close(self) -> None:
        """Free contexts before the engine, and the engine before its runtime."""
        if self._is_closed:
            return
        self._is_closed = True
        self.device.wait()
        for found in self._recorded.values():
            self._drop_graph(found)
        self._recorded.clear()
        if self._loaded is not None:
            self._loaded.contexts.clear()
            self._loaded = None
        if self._scratch:
            self.device.free(self._scratch)
        self.device.close()

    # --- parts ----------------------------------------------------------------------------------------------------

    def _open(self) -> _Loaded:
        if self._loaded is None:
            raise ExecutionError(f"{self._path}: the engine is closed")
        return self._loaded

    def _load(self, has_host_code: bool) -> _Loaded:
        import tensorrt as trt

        logger = make_logger()
        runtime = trt.Runtime(logger)
        runtime.engine_host_code_allowed = has_host_code
        with map_file(self._path) as mapped:
            engine = runtime.deserialize_cuda_engine(mapped)
        if engine is None:
            raise ExecutionError(
                f"{self._path}: TensorRT {trt.__version__} cannot load it: {logger.said()}; compile it again"
            )
        return _Loaded(logger, runtime, engine)

    def _stream_weights(self, room: int | None) -> bool:
        """Leave weights in the host's memory that do not fit into `room`; whether all are on the GPU."""
        engine = self._open().engine
        size = int(engine.streamable_weights_size)
        if room is None or not size or size <= room:
            return True
        budget = max(0, room)
        if not _set_budget(engine, budget):
            raise ExecutionError(
                f"{self._path}: TensorRT takes no budget of {budget} bytes: {self._open().logger.said()}"
            )
        self.notes.append(
            f"{budget / 2**30:.1f} of {size / 2**30:.1f} GiB of weights are kept on the GPU, the others are copied in every run"
        )
        return False

    def _context(self, profile: int) -> trt.IExecutionContext:
        import tensorrt as trt

        loaded = self._open()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = loaded.engine.create_execution_context(strategy)
        if context is None:
            raise ExecutionError(f"{self._path}: TensorRT makes no context: {loaded.logger.said()}")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        if not context.set_optimization_profile_async(profile, self.device.stream):
            raise ExecutionError(f"{self._path}: TensorRT takes no profile {profile}: {loaded.logger.said()}")
        self.device.wait()
        return context

    def _place(
        self, context: trt.IExecutionContext, inputs: Mapping[str, Placed], outputs: Mapping[str, Placed]
    ) -> None:
        """Tell a context shapes and addresses."""
        problems: Collection[str] = [n for n, (_, shape) in inputs.items() if not context.set_input_shape(n, shape)]
        for name, (address, _) in (*inputs.items(), *outputs.items()):
            if not context.set_tensor_address(name, address):
                problems = [*problems, name]
        missing = context.infer_shapes()
        if problems or missing:
            raise ExecutionError(
                f"{self._path}: TensorRT does not take {', '.join([*problems, *missing])}: {self._open().logger.said()}"
            )

    def _enqueue(self, context: trt.IExecutionContext) -> None:
        if not context.execute_async_v3(self.device.stream):
            raise ExecutionError(f"{self._path}: TensorRT failed: {self._open().logger.said()}")

    def _make_room(self) -> None:
        while len(self._recorded) >= GRAPHS:
            self.device.wait()
            self._drop_graph(self._recorded.pop(next(iter(self._recorded))))

    def _drop_graph(self, found: _Recorded) -> None:
        if found.graph is not None:
            self.device.drop(found.graph)
            found.graph = None


def _set_budget(engine: trt.ICudaEngine, budget: int) -> bool:
    """Whether TensorRT took the budget: its setter says nothing."""
    engine.weight_streaming_budget_v2 = budget
    return int(engine.weight_streaming_budget_v2) == budget
