"""A bundle, or one graph of it, answering lines on stdin as the rivals of `lensc.bench.rivals` do.

    python -m lensc.bench.serve BUNDLE decoder|vision|whole [--target onnxruntime:cpu] [--threads 2]

The parts of a graph are those that `lensc.load` puts together: the plan's artifact, the golden probes, the KV cache, the
embedding table, the picture's slices. Ready means that the probes have passed and that it answers: a first token, or a first
slice. Besides the lines that every rival answers:

    verify 8       {"what": "verify 8", "seconds": 0.3}           a step of 8 tokens with their logits, forgotten again
    vision [COUNT] {"what": "vision", "seconds": 0.9}             so many slices of 448 x 448, by default one
    sqnr JUDGE     {"what": "sqnr …", "db": 31.2}                 the pictures of `judge.npz` against float32
    request SIDE   {"what": "request 1344", "seconds": 19.1,      of the whole bundle: a question about a picture of
                    "tokens": 991, "slices": 10}                  SIDE x SIDE pixels, to the first token of the answer
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

import lensc
from lensc.backends import registry
from lensc.backends.base import Session, Target
from lensc.backends.bundle import Manifest, load_manifest
from lensc.backends.errors import LensError, UnsupportedError
from lensc.backends.load_options import LoadOptions
from lensc.profiles import probe
from lensc.runtime.answered import check_probe
from lensc.runtime.decoder import Decoder
from lensc.runtime.embedding import open_table
from lensc.runtime.pipeline import VLM
from lensc.runtime.result import Metrics
from lensc.runtime.vision import VisionEncoder

Answer = dict[str, bool | float | str]

QUESTION = "What is in the picture?"

ROOM = 128
"""Tokens a cache has room for beyond the prompt, as the rivals' have."""


def serve(bundle: Path, what: str, target: Target, threads: int) -> Iterator[Answer]:
    """Answer the lines of stdin."""
    started = time.perf_counter()
    with ExitStack() as stack:
        if what == "whole":
            answer = _whole(stack.enter_context(lensc.load(bundle, str(target), threads=threads)))
        else:
            manifest = load_manifest(bundle)
            session = opened(bundle, manifest, what, target, threads)
            stack.callback(session.close)
            answer = GRAPHS[what](bundle, manifest, session)
        yield {"ready": True, "load_seconds": time.perf_counter() - started}
        for line in sys.stdin:
            asked = line.strip()
            if asked == "quit":
                break
            yield {"what": asked} | answer(asked.split())


def opened(bundle: Path, manifest: Manifest, graph: str, target: Target, threads: int) -> Session:
    """The graph on `target`, its golden probes passed. Raises UnsupportedError if the bundle has none for it."""
    artifact = next((a for a in manifest.artifacts if a.graph == graph and a.target == target), None)
    if artifact is None:
        raise UnsupportedError(f"{bundle}: no {graph} for {target}; build it with --target {target}")
    backend, options = registry.get(target.backend), LoadOptions(threads)
    session = backend.load(artifact, manifest.graphs[graph].spec, bundle, options)
    check_probe(bundle, manifest, artifact, session, backend.probe(), options)
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
        token = int(decoder.prefill(count, lambda start, end: table.gather(ids[start:end])).argmax())

    def decode(count: int) -> None:
        nonlocal token
        for _ in range(count):
            token = int(decoder.decode_one_token(np.array([token]))[0].argmax())

    def verify(count: int) -> None:
        length = decoder.cache.length
        ids = np.random.default_rng(length).integers(0, spec.vocab_size, count)
        decoder.run(table.gather(ids)[None], np.arange(count)).argmax(-1)
        decoder.cache.trim(length)

    def answer(words: list[str]) -> Answer:
        run = {"prefill": prefill, "decode": decode, "verify": verify}[words[0]]
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

    def run(slices: int) -> None:
        # never seen before: no encoding is reused
        encoder.encode(list(random.integers(0, 256, (slices, side, side, 3), dtype=np.uint8)))

    def answer(words: list[str]) -> Answer:
        if words[0] == "sqnr":
            return {"db": _sqnr_db(encoder, Path(words[1]))}
        count = int(words[1]) if len(words) > 1 else 1
        started = time.perf_counter()
        run(count)
        return {"seconds": time.perf_counter() - started}

    run(1)
    return answer


GRAPHS = {"decoder": _decoder, "vision": _vision}
"""What answers the lines for a graph whose session is open."""


def _whole(vlm: VLM) -> Callable[[list[str]], Answer]:
    random = np.random.default_rng(0)

    def request(side: int) -> Metrics:
        picture = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        return vlm.generate(QUESTION, [picture], max_new_tokens=1).metrics

    def answer(words: list[str]) -> Answer:
        metrics = request(int(words[1]))
        seconds = metrics.ttft_ms / 1e3
        return {"seconds": seconds, "tokens": metrics.prompt_tokens, "slices": len(metrics.image_ms)}

    request(vlm.spec.picture.scale_resolution)
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
    parser.add_argument("what", choices=("decoder", "vision", "whole"))
    parser.add_argument("--target", type=Target.parse, default=Target("onnxruntime", "cpu"))
    parser.add_argument("--threads", type=int, default=probe.machine().cores, help="default: the physical cores")
    options = parser.parse_args(arguments)
    try:
        for answer in serve(options.bundle, options.what, options.target, options.threads):
            print(json.dumps(answer), flush=True)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
