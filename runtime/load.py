"""From a bundle on disk to a `VLM`: manifest, plan, sessions, self-test."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast, get_args

from lensc.backends import registry
from lensc.backends.base import Probe
from lensc.backends.bundle import Manifest, ModelSpec, PictureSpec, VisionPadding, load_manifest
from lensc.backends.errors import UnsupportedError, UsageError

from .embedding import open_table
from .loader import Loader, Policy
from .picture_cache import PictureCache
from .pipeline import VLM
from .placement import measured
from .plan import parse_devices
from .prompt import Tokenizer
from .sequential import Turns, in_turn

PLACEMENTS = ("measured", "ranked")
"""How a graph with several candidates gets one: by what they take on this machine, or by kind of processor."""


def load(
    path: str | Path,
    target: str | None = None,
    *,
    threads: int | None = None,
    selftest: bool | str = True,
    vision_padding: str | None = None,
    picture_cache_bytes: int = 0,
    max_memory_bytes: int | None = None,
    on_failure: str = "replan",
    placement: str = "measured",
    overlap: bool | None = None,
    tuned: bool = True,
    max_slice_nums: int | None = None,
) -> VLM:
    """Open a bundle; see `lensc.load`."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UsageError(f"threads={threads!r}: expected at least 1, or None for every physical core")
    if vision_padding is not None and vision_padding not in get_args(VisionPadding):
        raise UsageError(f"vision_padding={vision_padding!r}: expected one of {', '.join(get_args(VisionPadding))}")
    if placement not in PLACEMENTS:
        raise UsageError(f"placement={placement!r}: expected one of {', '.join(PLACEMENTS)}")
    policy = Policy.of(selftest, on_failure)
    if picture_cache_bytes and policy.selftest == "off":
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
    if max_slice_nums is not None:
        spec = dataclasses.replace(spec, picture=_coarser(spec.picture, max_slice_nums))
    tokenizer = Tokenizer.from_file(folder / manifest.tokenizer)
    table = open_table(folder, manifest.tables)

    probes = _probes(manifest)
    found = measured(folder, manifest, probes, requested, threads, tuned) if placement == "measured" else None
    loader = Loader(folder, manifest, probes, requested, threads, policy, max_memory_bytes, found, tuned)
    turns = Turns(loader.open) if loader.takes_turns else None
    try:
        specs = {name: record.spec for name, record in manifest.graphs.items()}
        sessions = loader.open_all() if turns is None else in_turn(turns, specs)
    except BaseException:
        if turns is not None:
            turns.close()
        raise
    try:
        pictures = _picture_cache(manifest, loader, spec, picture_cache_bytes) if picture_cache_bytes else None
        return VLM(
            spec,
            tokenizer,
            sessions,
            table,
            loader.plan,
            identity=loader.identity(),
            picture_cache=pictures,
            turns=turns,
            max_memory_bytes=max_memory_bytes,
            loader=loader,
            overlap=overlap,
        )
    except BaseException:
        for session in sessions.values():
            session.close()
        raise


def _picture_cache(manifest: Manifest, loader: Loader, spec: ModelSpec, limit_bytes: int) -> PictureCache:
    """What this vision graph made on any engine. Raises UnsupportedError if this engine's parity was not judged, or its
    golden probe failed.
    """
    if not loader.trusted("vision"):
        target = loader.plan["vision"].effective
        raise UnsupportedError(
            f"picture cache: the bundle holds no passed parity of vision on {target}, or it fails here; leave it out"
        )
    graph = manifest.graphs["vision"]
    recipe = {"graph": graph.sha256, "scheme": graph.scheme, **dataclasses.asdict(spec.picture)}
    return PictureCache(recipe, (spec.picture.query_num, spec.decoder.hidden_size), limit_bytes)


def _coarser(spec: PictureSpec, most: int) -> PictureSpec:
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= spec.max_slice_nums:
        raise UsageError(f"max_slice_nums={most!r}: expected 1 to {spec.max_slice_nums}, which the model was made for")
    return dataclasses.replace(spec, max_slice_nums=most)


def _probes(manifest: Manifest) -> list[Probe]:
    """Ask only the backends that the bundle was built for: each probe may import a vendor's SDK."""
    wanted = {a.target.backend for a in manifest.artifacts} & set(registry.names())
    return [probe for name in sorted(wanted) for probe in registry.get(name).probe()]
