"""A double of TensorRT and of CUDA that records what it is told and computes nothing.

`make check-tensorrt` holds its classes, functions and enumerations against NVIDIA's bindings.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import numpy as np

ENGINE = b"an engine"
SAID: list[Any] = []
"""What TensorRT and CUDA were told, in order."""
STATE: dict[str, Any] = {}
"""What they answer."""


class Double:
    """The module `tensorrt`."""

    __version__ = "11.4.0.106"

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        STRONGLY_TYPED = 1

    class BuilderFlag(enum.Enum):
        TF32, VERSION_COMPATIBLE, WEIGHT_STREAMING = range(3)

    class HardwareCompatibilityLevel(enum.Enum):
        NONE, AMPERE_PLUS, SAME_COMPUTE_CAPABILITY = range(3)

    class ProfilingVerbosity(enum.Enum):
        LAYER_NAMES_ONLY = 0

    class ExecutionContextAllocationStrategy(enum.Enum):
        USER_MANAGED = 0

    class TensorIOMode(enum.Enum):
        INPUT, OUTPUT = range(2)

    class Dims(tuple[int, ...]):
        pass

    class ILogger:
        class Severity(enum.Enum):
            INTERNAL_ERROR, ERROR, WARNING = range(3)

    class IProgressMonitor:
        pass

    class IStreamWriter:
        pass

    class ParserError:
        def node_operator(self) -> str:
            return "TensorScatter"

        def node_name(self) -> str:
            return "node_7"

        def desc(self) -> str:
            return "no\nsuch thing"

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            pass

        def parse_from_file(self, model: str) -> bool:
            SAID.append(("parse", Path(model).name))
            return not STATE.get("unparsed")

        num_errors = 1

        def get_error(self, index: int) -> Any:
            return Double.ParserError()

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            assert all(isinstance(d, Double.Dims) for d in (min, opt, max))
            self.shapes[input] = (min, opt, max)

    class IHostMemory(bytes):
        pass

    class ITimingCache:
        def serialize(self) -> Any:
            return Double.IHostMemory(b"times")

    class IBuilderConfig:
        progress_monitor: Any = None

        def __init__(self) -> None:
            self.profiles: list[Any] = []
            self.flags: set[Any] = {Double.BuilderFlag.TF32}
            self.hardware_compatibility_level = Double.HardwareCompatibilityLevel.NONE
            STATE["config"] = self

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile.shapes)
            return len(self.profiles) - 1

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            self.flags.discard(flag)

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            return Double.ITimingCache()

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            return True

        def get_timing_cache(self) -> Any:
            return Double.ITimingCache()

    class INetworkDefinition:
        num_layers = 42

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def create_network(self, flags: int) -> Any:
            assert flags == 1 << Double.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            return Double.INetworkDefinition()

        def create_builder_config(self) -> Any:
            return Double.IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return Double.IOptimizationProfile()

        def build_serialized_network_to_stream(self, network: Any, config: Any, writer: Any) -> bool:
            monitor = config.progress_monitor
            monitor.phase_start("Building", None, 2)
            go_on = monitor.step_complete("Building", 0)
            monitor.phase_finish("Building")
            if not go_on:
                return False
            if STATE.get("unbuilt"):
                self._logger.log(Double.ILogger.Severity.WARNING, "a warning")
                self._logger.log(Double.ILogger.Severity.ERROR, "no\nkernel")
                return False
            return bool(writer.write(ENGINE) == len(ENGINE))

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
            if bytes(serialized_engine) != ENGINE:
                self._logger.log(Double.ILogger.Severity.ERROR, "Magic tag does not match")
                return None
            STATE["host_code"] = self.engine_host_code_allowed
            return Double.ICudaEngine()

    class ICudaEngine:
        def __init__(self) -> None:
            self.num_optimization_profiles = STATE.get("profiles", 2)
            self.streamable_weights_size = STATE.get("streamable", 0)
            self.weight_streaming_budget_v2 = self.streamable_weights_size
            self.num_io_tensors = len(STATE["names"])

        def get_tensor_name(self, index: int) -> str:
            return str(STATE["names"][index])

        def get_tensor_mode(self, name: str) -> Any:
            outputs = name.startswith("present_") or name == "logits"
            return Double.TensorIOMode.OUTPUT if outputs else Double.TensorIOMode.INPUT

        def get_aliased_input_tensor(self, name: str) -> str | None:
            return None if STATE.get("copies") else name.replace("present_", "past_")

        def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
            return 1000 * (profile_index + 1)

        def create_execution_context(self, strategy: Any) -> Any:
            assert strategy is Double.ExecutionContextAllocationStrategy.USER_MANAGED
            SAID.append("context")
            return Double.IExecutionContext()

    class IExecutionContext:
        def set_device_memory(self, memory: int, size: int) -> None:
            assert size >= 2000 and size % 256 == 0

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            SAID.append(("profile", profile_index))
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            return name != STATE.get("misshapen")

        def set_tensor_address(self, name: str, memory: int) -> bool:
            return True

        def infer_shapes(self) -> list[str]:
            return []

        def execute_async_v3(self, stream_handle: int) -> bool:
            SAID.append("enqueue")
            return not STATE.get("fails")


class Device:
    """`CudaDevice`, recording."""

    stream = 7

    def __init__(self) -> None:
        self._held: set[int] = set()
        self._next = 1 << 20
        self.is_closed = False
        STATE["device"] = self

    def allocate(self, nbytes: int) -> int:
        self._next += 1 << 20
        self._held.add(self._next)
        return self._next

    def free(self, address: int) -> None:
        self._held.remove(address)

    def clear(self, address: int, nbytes: int) -> None:
        pass

    def copy(self, *args: int) -> None:
        pass

    def wait(self) -> None:
        pass

    def host_bytes(self, nbytes: int) -> Any:
        return np.empty(nbytes, np.uint8)

    def begin_capture(self) -> None:
        SAID.append("begin")

    def end_capture(self) -> Any:
        SAID.append("end")
        return object()

    def launch(self, graph: Any) -> None:
        SAID.append("launch")

    def drop(self, graph: Any) -> None:
        SAID.append("drop")

    def close(self) -> None:
        assert not self._held, "memory that nobody gave back"
        self.is_closed = True
