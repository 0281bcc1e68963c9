"""One candidate, tried in a process of its own: loaded, checked by its golden probes, timed.

A driver that hangs, crashes or prints costs that process and nothing else. What is timed is the part of a typical request that
the graph does. The request: a question of 32 tokens about a picture of 1344 x 1344, which is cut into ten slices, and an answer
of 64 tokens. For vision the figure is one slice of whole size, since the others take as long. For the decoder it is the whole
request, reckoned from a prefill of 64 tokens and some steps: a prompt of ten slices and 32 tokens at that rate, and 64 steps.

    python -m lensc.runtime.trial BUNDLE GRAPH TARGET OPTIONS      a line of JSON: {"ms": …, "text": …} or {"kind": …, "error": …}

OPTIONS are those of `LoadOptions`, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from lensc.backends import registry
from lensc.backends.base import Artifact, Session, Target
from lensc.backends.bundle import Manifest, load_manifest
from lensc.backends.errors import LensError, ParityError
from lensc.backends.load_options import LoadOptions

from . import child
from . import selftest as golden
from .context import Context
from .decoder import Decoder
from .embedding import open_table
from .plan import Timing
from .vision import VisionEncoder

SLICES, TEXT_TOKENS, NEW_TOKENS = 10, 32, 64
"""The request: what `lensc plan` takes for one, with a short answer."""
PREFILL_TOKENS, STEPS = 64, 16
"""What is run of it."""
BUDGET_S, MOST_RUNS = 0.25, 20
"""A short run is repeated for so long, or so often. The fastest counts: what else the machine does only adds to it."""
SLOW_MS = 5e3
"""A first run that takes longer is not repeated, though it prepares what others do not."""

COMMAND = child.python(f"{__package__}.trial")
"""What is started."""


@dataclass(frozen=True)
class Refusal:
    """Why a candidate is out: it computes something else than was verified, or it does not run."""

    kind: Literal["self-test", "refused"]
    text: str


def tried(bundle: Path, artifact: Artifact, state: str, options: LoadOptions) -> Timing | Refusal:
    """What a candidate takes, or why it is out. Raises ExecutionError if no process can be started that would tell."""
    told = json.dumps({"threads": options.threads, "engine": dict(options.engine)})
    words = [str(bundle.absolute()), artifact.graph, str(artifact.target), told]
    answers = child.ask([*COMMAND, *words], golden.limit_s(artifact, state))
    answer = answers.said[-1] if answers.said else {}
    if "ms" in answer:
        return Timing(**answer)
    if "error" in answer:
        return Refusal("self-test" if answer["kind"] == "self-test" else "refused", str(answer["error"]))
    return Refusal("refused", f"its trial {answers.problem or 'said nothing'}")


# --- in the process -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the candidate of the command line."""
    folder, graph, target, options = sys.argv[1:] if arguments is None else arguments
    answer = child.answering()
    try:
        timing = time_candidate(Path(folder), graph, Target.parse(target), LoadOptions(**json.loads(options)))
        answer(dataclasses.asdict(timing))
    except ParityError as error:
        answer({"kind": "self-test", "error": str(error)})
    except (LensError, OSError, MemoryError) as error:
        answer({"kind": "refused", "error": str(error) or type(error).__name__})
    return 0


def time_candidate(folder: Path, graph: str, target: Target, options: LoadOptions) -> Timing:
    """Load, check and time a graph in this process. Raises ParityError, and what engines raise."""
    manifest = load_manifest(folder)
    artifact = next(a for a in manifest.artifacts if (a.graph, a.target) == (graph, target))
    backend = registry.get(target.backend)
    session = backend.load(artifact, manifest.graphs[graph].spec, folder, options)
    try:
        tolerances = golden.tolerances_of(artifact)
        golden.check(golden.run_selftest(manifest.probes, {graph: session}, folder, tolerances), {graph: str(target)})
        return _vision(manifest, session) if graph == "vision" else _decoder(folder, manifest, session)
    finally:
        session.close()


def _vision(manifest: Manifest, session: Session) -> Timing:
    picture = manifest.model.picture
    encoder = VisionEncoder(session, picture, manifest.model.decoder.hidden_size)
    side, random = picture.scale_resolution, np.random.default_rng(0)

    def one_slice() -> None:
        # never seen before, so that it is encoded
        encoder.encode([random.integers(0, 256, (side, side, 3), dtype=np.uint8)])

    ms, spread = _timed(one_slice, _ms(one_slice))
    return Timing(ms, f"{_shown(ms)} ms per slice", spread)


def _decoder(folder: Path, manifest: Manifest, session: Session) -> Timing:
    spec = manifest.model.decoder
    table = open_table(folder, manifest.tables)
    tokens = min(PREFILL_TOKENS, Context.of(session.spec, spec).tokens - STEPS - 1)
    embeds = table.gather(np.random.default_rng(0).integers(0, spec.vocab_size, tokens))
    decoder = Decoder(session, spec, table, tokens + STEPS)

    def prefill() -> None:
        nonlocal decoder
        decoder = Decoder(session, spec, table, tokens + STEPS)
        decoder.prefill(tokens, lambda start, end: embeds[start:end])

    def step() -> None:
        decoder.decode_one_token(np.array([decoder.length % spec.vocab_size]))

    first_ms = _ms(prefill)
    step()
    prefill_ms, prefill_spread = _timed(prefill, first_ms)
    step()
    steps_ms = [_ms(step) for _ in range(STEPS - 1)]
    step_ms = min(steps_ms)
    prompt = SLICES * manifest.model.picture.query_num + TEXT_TOKENS
    ms = prefill_ms / tokens * prompt + step_ms * NEW_TOKENS
    rates = f"prefill {_shown(1e3 * tokens / prefill_ms)} tokens/s, decode {_shown(1e3 / step_ms)}"
    return Timing(ms, f"{_shown(ms)} ms per request ({rates})", max(prefill_spread, median(steps_ms) / step_ms))


def _shown(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _timed(work: Callable[[], None], first_ms: float) -> tuple[float, float]:
    """The fastest run of some, in milliseconds, and how many times as long the median took; `first_ms` is that of the one
    before them.
    """
    times = [first_ms] if first_ms > SLOW_MS else [_ms(work)]
    while sum(times) < BUDGET_S * 1e3 and len(times) < MOST_RUNS:
        times.append(_ms(work))
    return min(times), median(times) / min(times)


def _ms(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    sys.exit(main())
