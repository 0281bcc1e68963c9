"""Qualcomm AI Hub through its own client, qai-hub 0.56: whatever goes wrong there becomes one line.

Untested against the service: every call here is tested with the real client, but against a server of our own.

Ids of what has been uploaded and of jobs are kept in a file beside the output, so that a second run goes on where a first
one was cut off. The client's token lies where `qai-hub configure` puts it; nothing of it is kept or shown.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lensc.backends.base import Array
from lensc.backends.errors import ExecutionError, InputError, UnavailableError, UsageError
from lensc.backends.files import write_text
from lensc.profiles.profile import nearest

CONFIG_ENV, CONFIG = "QAIHUB_CLIENT_INI", "~/.qai_hub/client.ini"
"""The client's own."""

GET_TOKEN = (
    "sign in at https://workbench.aihub.qualcomm.com, copy the token of Account, Settings, API Token, and run: "
    "qai-hub configure --api_token TOKEN"
)

AGAIN = "run the same command again, it goes on from here"
POLL_S = 10.0
"""Between two questions after a job: the client's own interval."""

NEAREST = 8
JOBS_BYTES = 1 << 20


class JobFailedError(ExecutionError):
    """A job that ended without a result: the same job asked again says the same."""


@dataclass(frozen=True)
class HostedDevice:
    """A device of the service. `chip` is Qualcomm's number, e.g. `sm8650`, or empty."""

    name: str
    os: str
    chip: str

    def __str__(self) -> str:
        return f"{self.name} ({self.os})" if self.os else self.name


@dataclass(frozen=True)
class Profile:
    """Times of single runs in milliseconds, peak memory in bytes (0 if not told), layers by processor."""

    latencies_ms: tuple[float, ...]
    peak_bytes: int
    placement: dict[str, int]

    @property
    def median_ms(self) -> float:
        return median(self.latencies_ms)


def check_ready() -> Path:
    """Return the client's configuration file if it holds a token. Imports nothing and asks nobody.

    Raises UnavailableError that says how to install the client, or how to get and set a token.
    """
    if importlib.util.find_spec("qai_hub") is None:
        raise UnavailableError("qai-hub is not installed; pip install 'lensc[aihub]'")
    path = Path(os.environ.get(CONFIG_ENV, CONFIG)).expanduser()
    if not path.is_file():
        raise UnavailableError(f"no AI Hub token: {path} not found; {GET_TOKEN}")
    config = configparser.ConfigParser()
    try:
        config.read_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        reason = str(error).splitlines()[0]
        raise UnavailableError(f"no AI Hub token: {path} cannot be read ({reason}); {GET_TOKEN}") from error
    absent = [name for name in ("api_url", "web_url", "api_token") if not config.get("api", name, fallback="").strip()]
    if absent:
        raise UnavailableError(f"no AI Hub token: {path} lacks {', '.join(absent)}; {GET_TOKEN}")
    return path


class JobsFile:
    """Ids on the service by a hash of what was asked, in a JSON file that is written anew at each change."""

    def __init__(self, path: Path) -> None:
        """Read `path` if it is there. Raises InputError if it cannot have been written here."""
        self.path = path
        self._ids: dict[str, str] = {}
        try:
            if path.stat().st_size > JOBS_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes")
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not all(isinstance(v, str) and v.isalnum() for v in found.values()):
                raise ValueError("not an object of ids")
            self._ids = found
        except FileNotFoundError:
            pass
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: no list of jobs ({error}); remove it to begin anew") from error

    @staticmethod
    def key(what: str, *parts: str) -> str:
        """`what` in words, and a hash of all that it depends on."""
        return f"{what} {hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"

    def get(self, key: str) -> str | None:
        return self._ids.get(key)

    def put(self, key: str, found: str) -> None:
        """Keep an id. Raises StorageError."""
        self._write({**self._ids, key: found})

    def drop(self, *keys: str) -> None:
        """Forget ids; a file without any is removed."""
        self._write({key: found for key, found in self._ids.items() if key not in keys})

    def _write(self, ids: dict[str, str]) -> None:
        self._ids = ids
        if ids:
            write_text(self.path, json.dumps(ids, indent=1) + "\n")
        else:
            self.path.unlink(missing_ok=True)


class Service:
    """The service, with the token of the client's configuration. Everything raises ExecutionError of one line."""

    def __init__(self, config: Path, scratch: Path) -> None:
        """`config` is what `check_ready` returned; temporary files of the client go into the existing folder `scratch`."""
        from qai_hub import client

        self._module = client
        self._scratch = scratch
        self._config = config
        with self._calls("read the configuration"):
            self._client = client.Client(client.api_utils.load_api_config_from_file(str(config)))
            self._client.set_verbose(False)

    @property
    def url(self) -> str:
        """Which service it is."""
        return str(self._client.config.api_url)

    @property
    def version(self) -> str:
        """That of the client."""
        import qai_hub

        return str(qai_hub.__version__)

    def device(self, name: str) -> HostedDevice:
        """The newest hosted device called `name`. Raises UsageError that lists the nearest names first."""
        with self._calls("list devices"):
            found = self._client.get_devices()
        named = [device for device in found if device.name.casefold() == name.casefold()]
        if not named:
            folded = {str(device.name).casefold(): str(device.name) for device in found}
            near = [folded[known] for known in nearest(name.casefold(), folded)][:NEAREST]
            raise UsageError(
                f"device {name!r}: AI Hub has none of that name; nearest of {len(folded)}: {', '.join(near)}; "
                "all of them: qai-hub list-devices"
            )
        newest = max(named, key=lambda device: [int(n) for n in re.findall(r"\d+", device.os)])
        chips = (str(a).partition(":")[2] for a in newest.attributes if str(a).startswith("chipset:"))
        # beside the number there is a trade name: chipset:qualcomm-snapdragon-8gen3
        chip = next((c.lower() for c in chips if re.fullmatch(r"[a-z]{2,4}\d{4}[a-z]*", c.lower())), "")
        return HostedDevice(str(newest.name), str(newest.os), chip)

    def has_model(self, model_id: str) -> bool:
        """Whether an uploaded or compiled model is still there."""
        with self._calls(f"look for model {model_id}"):
            try:
                self._client.get_model(model_id)
            except self._module.UserError as error:
                if _is_authentication(error):
                    raise
                return False
        return True

    def upload_model(self, path: Path, name: str) -> str:
        """Upload a zipped folder of an ONNX model, return its id."""
        with self._calls(f"upload {name} ({path.stat().st_size / 1e6:.1f} MB)"):
            return str(self._client.upload_model(str(path), name).model_id)

    def submit_compile(self, model_id: str, device: HostedDevice, options: str, name: str) -> str:
        """Ask for a compilation, return the job's id."""
        with self._calls(f"submit the compilation of {name}"):
            model = self._client.get_model(model_id)
            wanted = self._module.Device(device.name, device.os)
            job = self._client.submit_compile_job(model, wanted, name=name, options=options, retry=False)
            return str(job.job_id)

    def submit_inference(
        self, model_id: str, device: HostedDevice, inputs: Mapping[str, Sequence[Array]] | None, name: str
    ) -> str:
        """Ask for a run on `inputs`, or without for a profile on random ones; return the job's id."""
        with self._calls(f"submit {name}"):
            model = self._client.get_model(model_id)
            wanted = self._module.Device(device.name, device.os)
            data = None if inputs is None else {key: list(arrays) for key, arrays in inputs.items()}
            job = self._client.submit_inference_job(model, wanted, data, name=name, retry=False, profile=inputs is None)
            return str(job.job_id)

    def wait(self, job_id: str, timeout_s: float, report: Callable[[str], None]) -> Any:
        """The finished job. `report` is given its state whenever that was asked for.

        Raises JobFailedError with the service's reason, ExecutionError when `timeout_s` is over.
        """
        deadline = time.monotonic() + timeout_s
        with self._calls(f"wait for job {job_id}"):
            try:
                job = self._client.get_job(job_id)
            except self._module.UserError as error:
                if _is_authentication(error):
                    raise
                raise JobFailedError(f"AI Hub: job {job_id} is gone ({_one_line(error)}); {AGAIN}") from error
        while True:
            with self._calls(f"wait for job {job_id}"):
                status = job.get_status()
            if status.success:
                return job
            if status.finished:
                reason = _one_line(status.message or "") or "it gives no reason"
                raise JobFailedError(f"AI Hub: {job.job_type} job {job_id} failed: {reason}; its log: {job.url}")
            report(f"{job.job_type} job {job_id}: {status.code.lower().replace('_', ' ')}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise ExecutionError(
                    f"AI Hub: {job.job_type} job {job_id} is not done after {timeout_s:.0f} s "
                    f"({status.code.lower().replace('_', ' ')}); {AGAIN}, or watch {job.url}"
                )
            time.sleep(min(POLL_S, left))

    def download_compiled(self, job: Any, folder: Path) -> tuple[Path, str, dict[str, str]]:
        """Download what a compile job made into `folder`: the file, the model's id and what the service says of it."""
        with self._calls(f"download the result of job {job.job_id}"):
            model_id = str(job.get_target_model().model_id)
            file = Path(self._client.get_model(model_id).download(str(folder / "compiled")))
            about = self._client.get_model(model_id).metadata
        return file, model_id, {key.name.lower(): str(value) for key, value in about.items()}

    def outputs(self, job: Any) -> dict[str, list[Array]]:
        """What an inference job computed, by the outputs' names, in the order of its inputs."""
        with self._calls(f"download the outputs of job {job.job_id}"):
            data = job.download_output_data()
        if not data:
            raise JobFailedError(f"AI Hub: inference job {job.job_id} left no outputs; its log: {job.url}")
        return {str(name): [np.asarray(array) for array in arrays] for name, arrays in data.items()}

    def profile(self, job: Any) -> Profile:
        """What a profile job measured. The service tells microseconds and bytes."""
        with self._calls(f"download the profile of job {job.job_id}"):
            found = job.download_profile()
        summary = found.get("execution_summary", {})
        times = summary.get("all_inference_times") or [summary.get("estimated_inference_time")]
        if not all(isinstance(t, int) and t > 0 for t in times):
            raise JobFailedError(f"AI Hub: profile job {job.job_id} tells no times; its log: {job.url}")
        memory = summary.get("inference_memory_peak_range") or (0, summary.get("estimated_inference_peak_memory") or 0)
        units = [str(layer["compute_unit"]).lower() for layer in found.get("execution_detail", [])]
        placement = {unit: units.count(unit) for unit in sorted(set(units))}
        return Profile(tuple(t / 1e3 for t in times), int(memory[1]), placement)

    @contextlib.contextmanager
    def _calls(self, what: str) -> Iterator[None]:
        """Turn what the client raises into one line. What it prints is dropped, what it leaves in temporary files, too."""
        import botocore.exceptions
        import requests
        import s3transfer.exceptions
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no types

        before = tempfile.tempdir
        try:
            with tempfile.TemporaryDirectory(dir=self._scratch) as scratch, contextlib.redirect_stdout(io.StringIO()):
                tempfile.tempdir = scratch  # the client forgets some of its files when a call fails
                yield
        except self._module.RateLimitedError as error:
            raise ExecutionError(f"AI Hub: {what}: too many requests; wait, then {AGAIN}") from error
        except self._module.UserError as error:
            if _is_authentication(error):
                raise ExecutionError(
                    f"AI Hub refuses the token of {self._config}: wrong or expired; {GET_TOKEN}"
                ) from error
            raise ExecutionError(f"AI Hub: {what}: {_one_line(error)}") from error
        except (
            self._module.InternalError,
            self._module.APIException,
            requests.exceptions.RequestException,
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
            s3transfer.exceptions.TransferNotDoneError,
            DecodeError,
        ) as error:
            raise ExecutionError(f"AI Hub: {what}: {_one_line(error)}; {AGAIN}") from error
        except (OSError, ValueError, KeyError, AssertionError) as error:  # an answer or a file cut short
            raise ExecutionError(f"AI Hub: {what}: a damaged answer ({_one_line(error)}); {AGAIN}") from error
        finally:
            tempfile.tempdir = before


def _is_authentication(error: Exception) -> bool:
    return str(error).startswith("Failed to authenticate")


def _one_line(text: object) -> str:
    """The client frames messages in boxes of several lines."""
    return " ".join(re.sub(r"[┌┐└┘─]|^\||\|$", " ", str(text), flags=re.MULTILINE).split()).rstrip(".;")
