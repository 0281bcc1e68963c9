"""A server on loopback that speaks to the real qai-hub client, and graphs of the golden checkpoint to send to it.

It speaks as much of AI Hub's protocol as the calls of `lensc aihub` need: protobuf over HTTP, uploads in parts to
presigned addresses, datasets as HDF5 in forms, jobs that go through states. Its compiler puts the uploaded ONNX into the
"context binary" and its device runs that in ONNX Runtime, so parity is computed from what really went over the wire.
What the service does beyond the client's source is not known here: `lensc aihub` is untested against the service.
"""

from __future__ import annotations

import copy
import io
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

TOKEN = "right-token"
PART_BYTES = 100_000
S24 = (
    "Samsung Galaxy S24",
    "14",
    ("chipset:qualcomm-snapdragon-8gen3", "chipset:sm8650", "hexagon:v75", "framework:onnx"),
)
DEVICES = (
    S24,
    ("Samsung Galaxy S24", "13", S24[2]),
    ("Samsung Galaxy S25", "15", ("chipset:sm8750", "framework:onnx")),
    ("Samsung Galaxy Tab S8", "12", ("chipset:sm8450", "framework:onnx")),
    ("Google Pixel 3", "10", ("chipset:qualcomm-snapdragon-845",)),
)


KNOWN = ("asked", "models", "files", "jobs", "polls", "datasets", "options")
"""What the server knows, which outlives a test together with the bundle that it compiled."""


@dataclass
class Hub:
    """What the server knows, and how it is to misbehave: names in `faults`, each taken away by who repairs it."""

    url: str = ""
    faults: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    models: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, Any] = field(default_factory=dict)
    polls: dict[str, int] = field(default_factory=dict)
    datasets: dict[str, bytes] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, pattern: str) -> int:
        """How many requests began like `pattern`."""
        return sum(bool(re.match(pattern, one)) for one in self.asked)

    def new(self, kind: str) -> str:
        return f"{kind}{len(self.models) + len(self.jobs) + len(self.datasets):04d}"


class CutError(Exception):
    """The connection is closed at once."""


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.asked.append(f"{method} {path}")
            try:
                if method == "PUT" and "cut_upload" in self.hub.faults:
                    raise CutError
                body = self._body()
                if "cut" in self.hub.faults:
                    raise CutError
                status, kind, content, headers = self._route(method, path, body)
            except CutError:
                self.close_connection = True
                self.connection.close()
                return
        self.send_response(status)
        self.send_header("Content-Type", kind)
        length = len(content)
        if path.startswith("/files/"):
            whole = content
            if "short" in self.hub.faults:  # no length is told, so that the client cannot know
                content, length = content[: len(content) // 2], -1
            if "short_of_length" in self.hub.faults:
                content = content[: len(content) // 2]
            if "flipped" in self.hub.faults:
                middle = len(whole) // 2
                content = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        if length >= 0:
            self.send_header("Content-Length", str(length))
        if length != len(content):
            self.send_header("Connection", "close")
            self.close_connection = True
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _route(self, method: str, path: str, body: bytes) -> tuple[int, str, bytes, dict[str, str]]:
        if path.startswith("/bucket/"):
            self.hub.files[path.removeprefix("/bucket/")] = body
            return 200, "text/plain", b"", {"ETag": f'"{len(body)}"'}
        if path.startswith("/form/"):
            assert "boundary=" in self.headers["Content-Type"]
            mark = b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()
            parts = {}
            for part in body.split(mark)[1:-1]:
                head, _, content = part.partition(b"\r\n\r\n")
                parts[re.search(rb'name="([^"]+)"', head)[1].decode()] = content[:-2]  # type: ignore[index]
            assert parts["policy"] == b"signed"
            self.hub.datasets[path.removeprefix("/form/")] = parts["file"]
            return 204, "text/plain", b"", {}
        if path.startswith("/files/"):
            name = path.removeprefix("/files/")
            return 200, "application/octet-stream", self.hub.files.get(name) or self.hub.datasets[name], {}
        if "html" in self.hub.faults:
            return 200, "text/html", b"<html>Sign in to the hotel's network</html>", {}
        if self.headers.get("Authorization") != f"token {TOKEN}":
            return 401, "application/json", b"{}", {}
        if "limited" in self.hub.faults and method == "POST":
            return 429, "application/json", b'{"detail": "Too many jobs"}', {}
        try:
            answer = self._api(method, path.removeprefix("/api/v1/").strip("/").split("/"), body)
        except KeyError:
            return 404, "application/json", b'{"detail": "Not found."}', {}
        if "cut_after_job" in self.hub.faults and method == "POST" and path.endswith("/jobs/"):
            self.hub.faults.add("cut")
        return 200, "application/x-protobuf", answer.SerializeToString(), {}

    def _api(self, method: str, parts: list[str], body: bytes) -> Any:
        from qai_hub import public_api_pb2 as pb

        hub = self.hub
        match (method, *parts):
            case ("GET", "devices"):
                query = dict(re.findall(r"(\w+)=([^&]*)", urlsplit(self.path).query.replace("+", " ")))
                found = [
                    d for d in DEVICES if query.get("name") in ("", None, d[0]) and query.get("os") in ("", None, d[1])
                ]
                found = found[:1] if query.get("select") == "True" else found
                return pb.DeviceList(devices=[pb.Device(name=n, os=o, attributes=a) for n, o, a in found])
            case ("POST", "models"):
                model = pb.Model.FromString(body)
                model.model_id = hub.new("m")
                hub.models[model.model_id] = model
                return pb.CreateUpdateResponse(id=model.model_id)
            case ("GET", "models", name, "multipart_upload"):
                size = int(re.search(r"file_size=(\d+)", self.path)[1])  # type: ignore[index]
                count = -(-size // PART_BYTES)
                urls = [f"{hub.url}/bucket/{name}.{i}" for i in range(count)]
                urls_pb = pb.FileMultipartUploadURL(urls=urls, upload_id="u", max_part_size=PART_BYTES)
                return pb.FileUploadResponse(multipart_url=urls_pb)
            case ("POST", "models", name, "multipart_upload"):
                etags = pb.FileMultipartUploadComplete.FromString(body).etags
                parts_of = [hub.files.pop(f"{name}.{i}") for i in range(len(etags))]
                assert [f'"{len(part)}"' for part in parts_of] == list(etags)
                hub.files[name] = b"".join(parts_of)
                return pb.CreateUpdateResponse(id=name)
            case ("GET", "models", name):
                return hub.models[name]
            case ("GET", "models", name, "download"):
                url = pb.FileDownloadURL(url=f"{hub.url}/files/{name}", filename="vision.onnx.zip")
                return pb.FileDownloadResponse(url=url)
            case ("POST", "datasets"):
                name = hub.new("d")
                hub.datasets[name] = b""
                return pb.CreateUpdateResponse(id=name)
            case ("GET", "datasets", name, "upload_url"):
                form = pb.FileUploadURL(
                    url=f"{hub.url}/form/{name}", file_field_name="file", fields={"policy": "signed"}
                )
                return pb.FileUploadResponse(url=form)
            case ("PATCH", "datasets", name):
                return pb.CreateUpdateResponse(id=name)
            case ("GET", "datasets", name):
                assert hub.datasets[name]
                return pb.Dataset(dataset_id=name, name=name, permanent=True)
            case ("GET", "datasets", name, "download_data"):
                return pb.FileDownloadResponse(url=pb.FileDownloadURL(url=f"{hub.url}/files/{name}", filename="d.h5"))
            case ("POST", "jobs"):
                return self._new_job(pb.Job.FromString(body))
            case ("GET", "jobs", name):
                return self._job(hub.jobs[name], name)
            case ("GET", "jobs", name, "result"):
                return self._result(hub.jobs[name], name)
        raise KeyError(parts)

    def _new_job(self, job: Any) -> Any:
        from qai_hub import public_api_pb2 as pb

        name = self.hub.new("j")
        if job.WhichOneof("job") == "compile_job":
            made = job.compile_job
            made.compile_job_id = name
            made.device.CopyFrom(made.devices.devices[0])
            self.hub.options.append(made.options)
            target = pb.Model(model_id=f"t{name}", model_type=pb.MODEL_TYPE_ONNX, is_directory=True)
            soc = "69" if "wrong_soc" in self.hub.faults else "57"
            target.metadata.entries[pb.MODEL_METADATA_KEY_QNN_CONTEXT_BIN_SOC_MODEL] = soc
            target.metadata.entries[pb.MODEL_METADATA_KEY_QAIRT_SDK_VERSION] = "2.51.0"
            made.target_model.CopyFrom(target)
            self.hub.models[target.model_id] = target
            self.hub.files[target.model_id] = compile_model(self.hub.files[made.model.model_id])
        else:
            job.inference_job.inference_job_id = name
        job.hub_version = "aihub-2026.11"
        self.hub.jobs[name] = job
        return pb.CreateUpdateResponse(id=name)

    def _job(self, job: Any, name: str) -> Any:
        """Two polls in a working state, then done."""
        from qai_hub import public_api_pb2 as pb

        inner = job.compile_job if job.WhichOneof("job") == "compile_job" else job.inference_job
        polls = self.hub.polls[name] = self.hub.polls.get(name, 0) + 1
        working = pb.JOB_STATE_OPTIMIZING_MODEL if job.HasField("compile_job") else pb.JOB_STATE_PROVISIONING_DEVICE
        inner.job_state = working if polls <= 3 or "stuck" in self.hub.faults else pb.JOB_STATE_DONE
        if "job_fails" in self.hub.faults:
            inner.job_state = pb.JOB_STATE_FAILED
            inner.failure_reason = "Op 'Bucketize'\n  is not supported by QNN."
        return job

    def _result(self, job: Any, name: str) -> Any:
        from qai_hub import public_api_pb2 as pb

        inner = job.inference_job
        result = pb.InferenceJobResult(inference_job_id=name)
        if inner.is_profiling_on:
            layers = [pb.LayerDetail(name=f"l{i}", compute_unit=pb.COMPUTE_UNIT_NPU) for i in range(7)]
            layers.append(pb.LayerDetail(name="l7", compute_unit=pb.COMPUTE_UNIT_CPU))
            detail = pb.ProfileDetail(
                execution_time=55,
                major_version=1,
                minor_version=2,
                layer_details=layers,
                all_execution_times=[] if "no_times" in self.hub.faults else [1865, 109, 82, 55, 57, 55, 56],
            )
            detail.execution_memory.peak.upper = 43 << 20
            if "no_times" in self.hub.faults:
                detail.execution_time = 0
            result.detail.CopyFrom(detail)
        else:
            outputs = run(self.hub.files[inner.model.model_id], self.hub.datasets[inner.dataset.dataset_id])
            if "zeros" in self.hub.faults:
                outputs = {k: [a * 0 for a in arrays] for k, arrays in outputs.items()}
            if "nan" in self.hub.faults:
                outputs = {k: [a * np.nan for a in arrays] for k, arrays in outputs.items()}
            if "too_few" in self.hub.faults:
                outputs = {k: arrays[1:] for k, arrays in outputs.items()}
            data = self.hub.new("d")
            self.hub.datasets[data] = to_h5(outputs)
            result.output_dataset_id = data
        return pb.JobResult(inference_job_result=result)

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_PATCH(self) -> None:
        self._answer("PATCH")


def compile_model(uploaded: bytes) -> bytes:
    """An ONNX file that names a context binary, as the service makes it; the binary is the uploaded model."""
    import onnx
    from onnx import helper

    with zipfile.ZipFile(io.BytesIO(uploaded)) as packed:
        source = onnx.ModelProto.FromString(packed.read(next(n for n in packed.namelist() if n.endswith(".onnx"))))
    node = helper.make_node(
        "EPContext",
        [v.name for v in source.graph.input],
        [v.name for v in source.graph.output],
        domain="com.microsoft",
        ep_cache_context="model.bin",
        embed_mode=0,
    )
    graph = helper.make_graph([node], "compiled", source.graph.input, source.graph.output)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("model.onnx/", b"")
        packed.writestr("model.onnx/model.onnx", helper.make_model(graph).SerializeToString())
        packed.writestr("model.onnx/model.bin", uploaded)
    return buffer.getvalue()


def run(package: bytes, data: bytes) -> dict[str, list[Any]]:
    """What the device computes: the model inside the context binary, on each entry of a dataset."""
    import tempfile

    import h5py
    import onnxruntime
    from qai_hub.util.dataset_entries_converters import h5_to_dataset_entries

    with zipfile.ZipFile(io.BytesIO(package)) as packed:
        binary = packed.read(next(name for name in packed.namelist() if name.endswith(".bin")))
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(io.BytesIO(binary)) as packed:
            packed.extractall(folder)
        session = onnxruntime.InferenceSession(next(path for path in Path(folder).rglob("*.onnx") if path.is_file()))
    with h5py.File(io.BytesIO(data), "r") as file:
        entries = h5_to_dataset_entries(file)
    names = [output.name for output in session.get_outputs()]
    runs = [
        session.run(names, {name: arrays[i] for name, arrays in entries.items()})
        for i in range(len(next(iter(entries.values()))))
    ]
    return {name: [outputs[i] for outputs in runs] for i, name in enumerate(names)}


def to_h5(outputs: dict[str, list[Any]]) -> bytes:
    import h5py
    from qai_hub.util.dataset_entries_converters import dataset_entries_to_h5

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        dataset_entries_to_h5(outputs, file)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def server() -> Iterator[Hub]:
    """The server, at one address for all tests."""
    pytest.importorskip("qai_hub", reason="qai-hub is not installed; pip install 'lensc[aihub]'")
    found = Hub()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": found}))
    listening.daemon_threads = True
    found.url = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    yield found
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server with nothing on it, the client's configuration for it, and shorter waits between the client's retries."""
    vars(server).update(vars(Hub(url=server.url)))
    config = tmp_path / "client.ini"
    address = server.url
    config.write_text(f"[api]\napi_url = {address}\nweb_url = {address}\napi_token = {TOKEN}\nverbose = true\n")
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(config))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.005)))
    return server


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `compiled` keeps: the bundle, and what the server knew when it had made it."""
    return {"folder": tmp_path_factory.mktemp("compiled") / "bundle"}


@pytest.fixture
def compiled(hub: Hub, graphs: Path, tmp_path: Path, once: dict[str, Any]) -> Path:
    """A bundle that the server compiled; it is made once, the server is told what it knew then."""
    from lensc.cli import main

    if "hub" not in once:
        argv = ["aihub", "compile", str(graphs), "-o", str(once["folder"]), "--device", S24[0]]
        assert main(argv) == 0
        once["hub"] = {name: copy.deepcopy(getattr(hub, name)) for name in KNOWN}
    vars(hub).update(copy.deepcopy(once["hub"]))
    return Path(shutil.copytree(once["folder"], tmp_path / "bundle"))


@pytest.fixture
def graphs(made: Any) -> Path:
    """The golden checkpoint's graphs, made once for all tests of the command line."""
    return Path(made.graphs)
