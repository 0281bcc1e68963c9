"""A bundle's vision graph on a hosted phone: compiled by Qualcomm AI Hub, timed, and held against what is known.

    compile_on     folder of graphs → bundle: the service compiles the vision graph at fixed shapes for a device
    profile_on     bundle → its manifest holds how long the vision graph takes on a device
    infer_on       bundle → its manifest holds how close the device comes, on the golden probe and on pictures

Untested against the service: see `aihub_service`. What ran on a device is marked `measured on DEVICE` in the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lensc.backends.base import Array, Artifact, Target, file_record, sha256_file
from lensc.backends.bundle import (
    MANIFEST,
    Manifest,
    MeasuredRecord,
    ParityRecord,
    load_manifest,
    write_manifest,
)
from lensc.backends.errors import ExecutionError, ManifestError, UnsupportedError, UsageError
from lensc.backends.files import PARTIAL
from lensc.profiles import profile as profiles
from lensc.runtime.picture import PictureSource

from .aihub_package import WriteFixed, interface, interface_of_package, split, unpack, write_package, zip_files
from .aihub_parity import BACKEND, GRAPH, checked_outputs, judge, picture_cases, probe_cases
from .aihub_parity import check_parity as check_parity
from .aihub_service import AGAIN, HostedDevice, JobFailedError, JobsFile, Service, check_ready
from .build import compile_graphs
from .compile_stages import NOT_RUN, portable_graphs
from .provenance import code_key, timestamp
from .stages import Report, StageEvent, Staging

SERVICE = "Qualcomm AI Hub"
LOCAL = "here"
"""Where the bundle without the service's part is made."""

JOBS = ".aihub.json"
"""Suffix of the file of jobs beside an output."""

RUNTIME = "--target_runtime precompiled_qnn_onnx"
"""A context binary and an ONNX file that names it, which is what onnxruntime-qnn loads."""

INT64_IO = "--truncate_64bit_io"
"""The NPU has no int64: such inputs become int32."""

TIMEOUT_S = 3600.0


def compile_on(
    device_name: str,
    graphs: str | Path,
    out: str | Path,
    *,
    write_fixed: WriteFixed,
    targets: Sequence[Target],
    options: str = "",
    timeout_s: float = TIMEOUT_S,
    report: Report | None = None,
    command: str = "",
) -> Manifest:
    """Let the service compile the vision graph of the folder `graphs` for a device, into the bundle `out`.

    All graphs are compiled here for `targets`, one at least. `options` are further options of the service's compiler. Raises
    what `build.compile_graphs` does, UsageError for a device that is not there, UnsupportedError for a chip without a
    profile, ExecutionError for whatever the service or the way to it does. `out` is complete or untouched; what is on
    the service already is used by the next run.
    """
    config = check_ready()
    folder, out = Path(graphs), Path(out)
    if folder.resolve() == out.resolve():
        raise UsageError(f"{out}: is the folder of graphs itself; choose another output folder")
    made = load_manifest(folder, verify=True)
    portable = portable_graphs(folder, made)
    if portable[GRAPH].scheme != "f32":
        raise UnsupportedError(
            f"graph {GRAPH} in {portable[GRAPH].scheme}: the service is given float graphs; export it with --scheme f32"
        )
    with _asking(config, out) as (service, jobs):
        device = service.device(device_name)
        target = target_of(device)
        keys: list[str] = []
        with Staging(out, 4, report) as staging:
            key = {"graphs": sha256_file(folder / MANIFEST), "targets": " ".join(map(str, targets))}
            local = staging.folder / LOCAL
            here = staging.stage(
                "compile here", {**key, **code_key()}, Manifest, partial(_here, folder, targets, local)
            )
            graph = portable[GRAPH]
            key = {"graph": graph.sha256, **code_key()}
            package = staging.folder / "vision.onnx.zip"
            pack = partial(write_package, graph, package, write_fixed)
            sha256, products = staging.stage(f"write {GRAPH} at fixed shapes", key, tuple[str, int], pack)
            key = {"package": sha256, "device": str(device), "options": options, "service": service.url, **code_key()}
            work = partial(
                _compile, service, jobs, package, (sha256, products), device, target, options, staging, timeout_s, keys
            )
            name = f"compile {GRAPH} for {device} on {SERVICE}"
            asked = staging.stage(name, key, Artifact, partial(work, _saying(report, name)))
            manifest = dataclasses.replace(
                here,
                artifacts=(asked, *here.artifacts),
                stages=(*here.stages, *staging.records),
                provenance=dataclasses.replace(here.provenance, command=command, created=timestamp()),
            )

            def finish(bundle: Path) -> Manifest:
                for record in here.files:
                    (bundle / record.path).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(local / record.path, bundle / record.path)
                return write_manifest(bundle, manifest)

            published = staging.publish(finish)
        jobs.drop(*keys)
    return published


def profile_on(
    device_name: str,
    bundle: str | Path,
    *,
    timeout_s: float = TIMEOUT_S,
    report: Report | None = None,
) -> tuple[Manifest, MeasuredRecord]:
    """Time the bundle's vision artifact on a device, with random inputs, and write that into its manifest.

    A former figure for the same device is replaced. Raises what `compile_on` does, and ManifestError for a bundle that
    is damaged or has no artifact for the device's chip.
    """
    config, folder = check_ready(), Path(bundle)
    manifest = load_manifest(folder, verify=True)
    with _asking(config, folder) as (service, jobs):
        device = service.device(device_name)
        artifact = _artifact_for(manifest, device)
        name = f"profile {GRAPH} on {device}"
        say = _saying(report, name)
        model = _on_service(service, jobs, artifact, folder, say)
        key = jobs.key("profile", model, str(device), service.url)
        submit = partial(service.submit_inference, model, device, None, name)
        job = _finished(service, jobs, key, submit, timeout_s, say)
        found = service.profile(job)
        times = sorted(found.latencies_ms)
        record = MeasuredRecord(
            graph=GRAPH,
            target=str(artifact.target),
            device=str(device),
            latency_ms=found.median_ms,
            spread_ms=(times[0], times[-1]),
            runs=len(times),
            peak_bytes=found.peak_bytes,
            placement=found.placement,
            source=f"{SERVICE}, job {job.job_id}",
        )
        same = (record.graph, record.target, record.device)
        now = load_manifest(folder)  # the job took a while
        others = tuple(r for r in now.measured if (r.graph, r.target, r.device) != same)
        written = write_manifest(folder, dataclasses.replace(now, measured=(*others, record)))
        jobs.drop(key)
    return written, record


def infer_on(
    device_name: str,
    bundle: str | Path,
    *,
    pictures: Sequence[PictureSource] = (),
    timeout_s: float = TIMEOUT_S,
    report: Report | None = None,
) -> tuple[Manifest, tuple[ParityRecord, ...]]:
    """Run the golden probe and `pictures` (by default, the built-in golden ones) through the vision artifact on a device.

    The probe is held against what the reference model made of it, pictures against the first of the bundle's other
    vision artifacts that runs here; without one, there is the probe alone. The figures go into the manifest whether they
    pass or not; `check_parity` raises if they do not. Raises what `profile_on` does.
    """
    config, folder = check_ready(), Path(bundle)
    manifest = load_manifest(folder, verify=True)
    spec = manifest.graphs[GRAPH].spec
    cases = [*probe_cases(folder, manifest), *picture_cases(folder, manifest, pictures)]
    if not cases:
        raise ManifestError(f"{folder}: has no golden probe of {GRAPH}, and no artifact of it that runs here")
    with _asking(config, folder) as (service, jobs):
        device = service.device(device_name)
        artifact = _artifact_for(manifest, device)
        fixed = interface(folder / artifact.files[0].path)
        slices = [one for case in cases for one in split(case.feeds, fixed)]
        inputs = {name: [one[name] for one in slices] for name in fixed.inputs}
        name = f"infer {GRAPH} on {device}"
        say = _saying(report, name)
        model = _on_service(service, jobs, artifact, folder, say)
        key = jobs.key(
            "infer", model, str(device), service.url, *(_digest(array) for a in inputs.values() for array in a)
        )
        submit = partial(service.submit_inference, model, device, inputs, name)
        job = _finished(service, jobs, key, submit, timeout_s, say)
        outputs = checked_outputs(service.outputs(job), spec, len(slices), job.job_id)
        records = judge(cases, outputs, str(artifact.target), f"measured on {device}, {SERVICE} job {job.job_id}")
        now = load_manifest(folder)
        ours = {(r.target, r.against) for r in records}
        others = tuple(
            r
            for r in now.parity
            if not ((r.target, r.against) in ours and r.where.startswith(f"measured on {device},"))
        )
        written = write_manifest(folder, dataclasses.replace(now, parity=(*others, *records)))
        jobs.drop(key)
    return written, records


def target_of(device: HostedDevice) -> Target:
    """The target of a hosted device's NPU. Raises UnsupportedError if there is no profile of its chip."""
    known = _npus()
    if device.chip not in known:
        chip = device.chip or "that the service does not name"
        near = ", ".join(profiles.nearest(device.chip, known))
        raise UnsupportedError(f"{device}: its chip {chip} has no profile with an NPU; nearest first: {near}")
    return Target(BACKEND, "npu", device.chip)


# --- what is asked of the service -----------------------------------------------------------------------------------


@contextmanager
def _asking(config: Path, out: Path) -> Iterator[tuple[Service, JobsFile]]:
    """The service, and the file of jobs beside `out`; temporary files lie there, too, for as long as they are needed."""
    beside = Path(out).resolve().parent
    beside.mkdir(parents=True, exist_ok=True)
    jobs = JobsFile(beside / (out.resolve().name + JOBS))
    with tempfile.TemporaryDirectory(prefix=f"{out.resolve().name}.aihub", suffix=PARTIAL, dir=beside) as scratch:
        yield Service(config, Path(scratch)), jobs


def _on_service(service: Service, jobs: JobsFile, artifact: Artifact, folder: Path, say: Callable[[str], None]) -> str:
    """The id of an artifact on the service, which compiled it, or is given it."""
    compiled = artifact.options.get("aihub_model")
    if compiled is not None and artifact.options.get("aihub_service") == service.url and service.has_model(compiled):
        return compiled
    say("upload the artifact")
    files = [
        record for record in artifact.files if not record.path.endswith(".json")
    ]  # the client takes model and binary only
    with tempfile.TemporaryDirectory(dir=jobs.path.parent, suffix=PARTIAL) as scratch:
        package = Path(scratch) / "vision.onnx.zip"
        zip_files([folder / record.path for record in files], package)
        hashes = [record.sha256 for record in files]
        return _uploaded(service, jobs, package, jobs.key("artifact", service.url, *hashes))


def _uploaded(service: Service, jobs: JobsFile, package: Path, key: str) -> str:
    model = jobs.get(key)
    if model is None or not service.has_model(model):
        model = service.upload_model(package, GRAPH)
        jobs.put(key, model)
    return model


def _finished(
    service: Service,
    jobs: JobsFile,
    key: str,
    submit: Callable[[], str],
    timeout_s: float,
    say: Callable[[str], None],
) -> Any:
    """The finished job of an earlier run, or of this one. One that failed is forgotten: the next run asks anew."""
    job_id = jobs.get(key)
    if job_id is None:
        say("submit")
        job_id = submit()
        jobs.put(key, job_id)
    try:
        return service.wait(job_id, timeout_s, say)
    except JobFailedError:
        jobs.drop(key)
        raise


def _here(graphs: Path, targets: Sequence[Target], local: Path) -> tuple[Manifest, list[Path]]:
    """A bundle of what can be compiled on this machine."""
    made = compile_graphs(graphs, targets, local)
    return made, [*(local / record.path for record in made.files), local / MANIFEST]


def _compile(
    service: Service,
    jobs: JobsFile,
    package: Path,
    made: tuple[str, int],
    device: HostedDevice,
    target: Target,
    options: str,
    staging: Staging,
    timeout_s: float,
    used: list[str],
    say: Callable[[str], None],
) -> tuple[Artifact, list[Path]]:
    """Upload, compile, download and unpack; the artifact, which cannot be checked here."""
    say(f"upload {package.stat().st_size / 1e6:.0f} MB")
    upload = jobs.key("upload", service.url, made[0])
    model = _uploaded(service, jobs, package, upload)
    shapes = interface_of_package(package).inputs
    dtypes = {dtype for dtype, _ in shapes.values()}
    asked = " ".join(filter(None, (RUNTIME, INT64_IO if "int64" in dtypes else "", options)))
    key = jobs.key("compile", model, str(device), asked, service.url)
    used += [upload, key]
    submit = partial(service.submit_compile, model, device, asked, GRAPH)
    job = _finished(service, jobs, key, submit, timeout_s, say)
    with tempfile.TemporaryDirectory(dir=staging.folder) as scratch:
        say("download")
        file, compiled, about = service.download_compiled(job, Path(scratch))
        folder = staging.tree / GRAPH
        folder.mkdir(parents=True, exist_ok=True)
        paths = unpack(file, folder, target.slug)
    told, npu = about.get("qnn_context_bin_soc_model"), _npus()[target.arch]
    if told is not None and told != str(npu.soc_model):
        jobs.drop(key)
        raise ExecutionError(
            f"{SERVICE}: the binary is for SoC model {told}, expected {npu.soc_model} of {target.arch}; {AGAIN}"
        )
    hub = str(getattr(job, "hub_version", "")) or "unknown"
    artifact = Artifact(
        graph=GRAPH,
        target=target,
        scheme="f16",  # what the service makes of floats for an NPU
        files=tuple(file_record(path, staging.tree) for path in paths),
        toolchain={"qai_hub": service.version, SERVICE: hub, **_qairt(about)},
        options={
            "aihub_model": compiled,
            "aihub_service": service.url,
            "device": str(device),
            "options": asked,
            "patches": str(shapes["patches"][1][1]),
            "multiply_adds": str(made[1]),
        },
        compatibility={
            "qairt": _qairt(about).get("qairt", "unknown"),
            "chip": target.arch,
            "soc_model": str(npu.soc_model),
            "htp_arch": str(npu.htp_arch),
        },
        placement={},
        parity={NOT_RUN: f"compiled by {SERVICE}; run lensc aihub infer"},
    )
    return artifact, paths


def _qairt(about: Mapping[str, str]) -> dict[str, str]:
    version = about.get("qairt_sdk_version") or about.get("qnn_sdk_version")
    return {} if version is None else {"qairt": version}


# --- what is known of artifacts and devices -------------------------------------------------------------------------


def _npus() -> dict[str, profiles.Processor]:
    """The NPUs that QNN's compiler has a number for, by the names of the profiles that have them."""
    processors = ((name, p) for name in profiles.names() for p in profiles.get(name).processors)
    return {name: p for name, p in processors if p.kind == "npu" and p.soc_model is not None}


def _artifact_for(manifest: Manifest, device: HostedDevice) -> Artifact:
    """The vision artifact for the device's chip. Raises ManifestError that lists those that there are."""
    target = target_of(device)
    mine = [artifact for artifact in manifest.artifacts if artifact.graph == GRAPH]
    for artifact in mine:
        if artifact.target == target:
            return artifact
    there = ", ".join(str(artifact.target) for artifact in mine) or "none"
    raise ManifestError(
        f"the bundle has no {GRAPH} for {target}, the chip of {device}; it has {there}; "
        f"make one: lensc compile GRAPHS --target {target} -o BUNDLE, or lensc aihub compile"
    )


def _digest(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _saying(report: Report | None, name: str) -> Callable[[str], None]:
    """Reports the state of a job as a stage that has no number of its own."""

    def say(text: str) -> None:
        if report is not None:
            report(StageEvent(f"{name}: {text}", "start", 1, 1))

    return say
