"""From a bundle on disk to a `VLM`: manifest, plan, sessions, self-test."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import cast, get_args

from lensc.backends import registry
from lensc.backends.base import PROBE_TOLERANCE, Probe, Session, Target
from lensc.backends.bundle import Manifest, ModelSpec, VisionPadding, load_manifest
from lensc.backends.errors import CompatibilityError, UnavailableError, UnsupportedError, UsageError
from lensc.backends.load_options import LoadOptions

from . import selftest as golden
from .conversation import Identity
from .embedding import open_table
from .picture_cache import PictureCache
from .pipeline import VLM
from .plan import Plan, parse_devices, plan
from .prompt import Tokenizer
from .sequential import Turns, fits_at_once, in_turn


def load(
    path: str | Path,
    target: str | None = None,
    threads: int | None = None,
    selftest: bool = True,
    vision_padding: str | None = None,
    picture_cache_bytes: int = 0,
    max_memory_bytes: int | None = None,
) -> VLM:
    """Open a bundle; see `lensc.load`."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UsageError(f"threads={threads!r}: expected at least 1, or None for every physical core")
    if vision_padding is not None and vision_padding not in get_args(VisionPadding):
        raise UsageError(f"vision_padding={vision_padding!r}: expected one of {', '.join(get_args(VisionPadding))}")
    if picture_cache_bytes and not selftest:
        raise UsageError("selftest=False with a picture cache: others would trust what was not checked; choose one")
    folder = Path(path)
    manifest = load_manifest(folder)
    requested = None if target is None else parse_devices(target, manifest.graphs)
    for asked in (requested or {}).values():
        if asked.backend not in registry.names():
            raise UsageError(f"target {asked}: backend {asked.backend!r} is not one of {', '.join(registry.names())}")
    spec = manifest.model
    if vision_padding is not None:
        picture = dataclasses.replace(spec.picture, vision_padding=cast(VisionPadding, vision_padding))
        spec = dataclasses.replace(spec, picture=picture)
    tokenizer = Tokenizer.from_file(folder / manifest.tokenizer)
    table = open_table(folder, manifest.tables)

    turns = None
    chosen = None if max_memory_bytes is None else plan(manifest, _probes(manifest), requested)
    if chosen is None or max_memory_bytes is None or fits_at_once(manifest, chosen, max_memory_bytes):
        chosen, sessions = _open_sessions(folder, manifest, requested, threads)
    else:
        turns = Turns(partial(_open_one, folder, manifest, chosen, threads, selftest))
        try:
            sessions = in_turn(turns, {name: record.spec for name, record in manifest.graphs.items()})
        except BaseException:
            turns.close()
            raise
    try:
        if selftest and turns is None:
            _check(folder, manifest, chosen, sessions)
        pictures = _picture_cache(manifest, chosen, spec, picture_cache_bytes) if picture_cache_bytes else None
        identity = _identity(manifest, chosen)
        return VLM(
            spec,
            tokenizer,
            sessions,
            table,
            chosen,
            identity=identity,
            picture_cache=pictures,
            turns=turns,
            max_memory_bytes=max_memory_bytes,
        )
    except BaseException:
        _close(sessions)
        raise


def _open_sessions(
    folder: Path, manifest: Manifest, requested: dict[str, Target] | None, threads: int | None
) -> tuple[Plan, dict[str, Session]]:
    """Load the planned artifacts. One that its engine refuses is planned around, unless it was requested."""
    probes = _probes(manifest)
    refused: dict[tuple[str, Target], str] = {}
    while True:
        chosen = plan(manifest, probes, requested, refused)
        sessions: dict[str, Session] = {}
        try:
            for placement in chosen.placements:
                backend = registry.get(placement.effective.backend)
                spec = manifest.graphs[placement.graph].spec
                sessions[placement.graph] = backend.load(placement.artifact, spec, folder, LoadOptions(threads))
            return chosen, sessions
        except (CompatibilityError, UnavailableError) as error:
            _close(sessions)
            if placement.requested is not None:
                raise
            refused[placement.graph, placement.effective] = str(error)
        except BaseException:
            _close(sessions)
            raise


def _open_one(
    folder: Path, manifest: Manifest, chosen: Plan, threads: int | None, selftest: bool, graph: str
) -> Session:
    """One planned graph, checked by its golden probes each time it is loaded."""
    placement = chosen[graph]
    backend = registry.get(placement.effective.backend)
    session = backend.load(placement.artifact, manifest.graphs[graph].spec, folder, LoadOptions(threads))
    try:
        if selftest:
            _check(folder, manifest, chosen, {graph: session})
    except BaseException:
        session.close()
        raise
    return session


def _check(folder: Path, manifest: Manifest, chosen: Plan, sessions: Mapping[str, Session]) -> None:
    """Run the golden probes of `sessions`. Raises ParityError."""
    noisy = {p.graph: p.artifact.parity for p in chosen.placements}
    tolerances = {g: float(parity[PROBE_TOLERANCE]) for g, parity in noisy.items() if PROBE_TOLERANCE in parity}
    results = golden.run_selftest(manifest.probes, sessions, folder, tolerances)
    golden.check(results, {p.graph: str(p.effective) for p in chosen.placements})


def _identity(manifest: Manifest, chosen: Plan) -> Identity:
    """Whose conversations can be gone on with: the checkpoint's; whose KV caches: those of the same graphs and decoder."""
    decoder = chosen["decoder"]
    options = hashlib.sha256(json.dumps(decoder.artifact.options, sort_keys=True).encode()).hexdigest()
    graphs = {name: record.sha256[:12] for name, record in manifest.graphs.items()}
    made_by = f"decoder {graphs['decoder']} on {decoder.effective} ({options[:8]}) with vision {graphs['vision']}"
    return Identity(manifest.provenance.checkpoint_sha256, made_by)


def _picture_cache(manifest: Manifest, chosen: Plan, spec: ModelSpec, limit_bytes: int) -> PictureCache:
    """What this vision graph made on any engine. Raises UnsupportedError if this engine's parity was not judged."""
    target, graph = str(chosen["vision"].effective), manifest.graphs["vision"]
    if not any(p.graph == "vision" and p.target == target and p.passed for p in manifest.parity):
        raise UnsupportedError(f"picture cache: the bundle holds no passed parity of vision on {target}; leave it out")
    recipe = {"graph": graph.sha256, "scheme": graph.scheme, **dataclasses.asdict(spec.picture)}
    return PictureCache(recipe, (spec.picture.query_num, spec.decoder.hidden_size), limit_bytes)


def _probes(manifest: Manifest) -> list[Probe]:
    """Ask only the backends that the bundle was built for: each probe may import a vendor's SDK."""
    wanted = {a.target.backend for a in manifest.artifacts} & set(registry.names())
    return [probe for name in sorted(wanted) for probe in registry.get(name).probe()]


def _close(sessions: dict[str, Session]) -> None:
    for session in sessions.values():
        session.close()
