"""One graph of a bundle, answering lines on stdin as the rivals of `lensc.bench.rivals` do.

    python -m lensc.bench.serve BUNDLE decoder|vision [--target onnxruntime:cpu] [--threads 2]

The parts are those that `lensc.load` puts together: the plan's artifact, the golden probes, the KV cache, the embedding
table, the picture's slices. Ready means that the probes have passed and that it answers: a first token, or a first slice.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lensc.backends import registry
from lensc.backends.base import Session, Target
from lensc.backends.bundle import Manifest, load_manifest
from lensc.backends.errors import LensError, UnsupportedError
from lensc.profiles import probe
from lensc.runtime.decoder import Decoder
from lensc.runtime.embedding import open_table
from lensc.runtime.selftest import check, run_selftest
from lensc.runtime.vision import VisionEncoder

Answer = dict[str, bool | float | str]

ROOM = 128
"""Tokens a cache has room for beyond the prompt, as the rivals' have."""


def serve(bundle: Path, graph: str, target: Target, threads: int) -> Iterator[Answer]:
    """Answer the lines of stdin."""
    started = time.perf_counter()
    manifest = load_manifest(bundle)
    session = _open(bundle, manifest, graph, target, threads)
    serving = _decoder if graph == "decoder" else _vision
    answer = serving(bundle, manifest, session)
    yield {"ready": True, "load_seconds": time.perf_counter() - started}
    for line in sys.stdin:
        what = line.strip()
        if what == "quit":
            break
        yield {"what": what} | answer(what.split())
    session.close()


def _open(bundle: Path, manifest: Manifest, graph: str, target: Target, threads: int) -> Session:
    """The graph on `target`, its golden probes passed. Raises UnsupportedError if the bundle has none for it."""
    artifact = next((a for a in manifest.artifacts if a.graph == graph and a.target == target), None)
    if artifact is None:
        raise UnsupportedError(f"{bundle}: no {graph} for {target}; build it with --target {target}")
    session = registry.get(target.backend).load(artifact, manifest.graphs[graph].spec, bundle, threads)
    check(run_selftest(manifest.probes, {graph: session}, bundle), {graph: str(target)})
    return session


def _decoder(bundle: Path, manifest: Manifest, session: Session) -> Callable[[list[str]], Answer]:
    spec = manifest.model.decoder
    table = open_table(bundle, manifest.tables)
    decoder = Decoder(session, spec, table, ROOM)
    token = 0

    def prefill(count: int) -> None:
        nonlocal decoder, token
        ids = np.random.default_rng(count).integers(0, spec.vocab_size, count)
        decoder = Decoder(session, spec, table, count + ROOM)
        token = int(decoder.prefill(table.gather(ids)).argmax())

    def decode(count: int) -> None:
        nonlocal token
        for _ in range(count):
            token = int(decoder.decode_one_token(np.array([token]))[0].argmax())

    def answer(words: list[str]) -> Answer:
        run = {"prefill": prefill, "decode": decode}[words[0]]
        started = time.perf_counter()
        run(int(words[1]))
        return {"seconds": time.perf_counter() - started}

    prefill(8)
    return answer


def _vision(bundle: Path, manifest: Manifest, session: Session) -> Callable[[list[str]], Answer]:
    spec = manifest.model.picture
    encoder = VisionEncoder(session, spec, manifest.model.decoder.hidden_size)
    side = spec.scale_resolution
    random = np.random.default_rng(0)

    def one_slice() -> None:
        # never seen before: no encoding is reused
        encoder.encode([random.integers(0, 256, (side, side, 3), dtype=np.uint8)])

    def answer(words: list[str]) -> Answer:
        if words[0] == "sqnr":
            return {"db": _sqnr_db(encoder, Path(words[1]))}
        started = time.perf_counter()
        one_slice()
        return {"seconds": time.perf_counter() - started}

    one_slice()
    return answer


def _sqnr_db(encoder: VisionEncoder, judge: Path) -> float:
    """Of all pictures in `judge` together, against what the model gives for them in float32."""
    with np.load(judge, allow_pickle=False) as arrays:
        expected, pictures = arrays["image_embeds"].astype(np.float64), arrays["pictures"]
    found = np.concatenate([encoder.encode([picture]).embeds for picture in pictures])
    noise = max(float(np.square(found - expected).sum()), sys.float_info.min)
    return 10 * math.log10(float(np.square(expected).sum()) / noise)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until `quit` or the end of stdin."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("graph", choices=("decoder", "vision"))
    parser.add_argument("--target", type=Target.parse, default=Target("onnxruntime", "cpu"))
    parser.add_argument("--threads", type=int, default=probe.machine().cores, help="default: the physical cores")
    options = parser.parse_args(arguments)
    try:
        for answer in serve(options.bundle, options.graph, options.target, options.threads):
            print(json.dumps(answer), flush=True)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
