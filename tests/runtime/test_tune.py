"""The search for settings: what it finds where times are known, what it makes of noise, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lensc.backends import native, registry
from lensc.backends.base import Array, Artifact, Probe, Session
from lensc.backends.bundle import Manifest, load_manifest
from lensc.backends.errors import ParityError
from lensc.backends.load_options import DEFAULTS, Choices, LoadOptions, settings_of
from lensc.export.graph import GraphSpec
from lensc.profiles import probe
from lensc.runtime import tiny, tune, tune_work
from lensc.runtime.embedding import open_table
from lensc.runtime.tuned import Settings

Cost = Callable[[Settings], float]
CHOICES = {"prefill_chunk": ("32", "8", "16", "64"), "spinning": ("on", "off"), "exact": ("yes", "no")}


class Engine:
    """The native backend with settings: `exact=no` computes something else."""

    name = "native"
    supports = native.backend.supports
    compile = native.backend.compile

    def __init__(self) -> None:
        self.open = 0
        self.loads: list[LoadOptions] = []

    def probe(self) -> tuple[Probe, ...]:
        return native.backend.probe()

    def choices(self, artifact: Artifact) -> Choices:
        return CHOICES if artifact.graph == "decoder" else {"exact": ("yes", "no")}

    def load(self, artifact: Artifact, spec: GraphSpec, bundle: Path, options: LoadOptions = DEFAULTS) -> Session:
        chosen = settings_of(options, self.choices(artifact), self.name)
        self.loads.append(options)
        self.open += 1
        return Counted(native.backend.load(artifact, spec, bundle, LoadOptions(1)), chosen["exact"] == "no", self)


class Counted:
    """A session that may add a tenth of what is there."""

    def __init__(self, session: Session, wrong: bool, engine: Engine) -> None:
        self.spec, self._session, self._wrong, self._engine = session.spec, session, wrong, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        made = self._session.run(feeds, out)
        return {name: array * 1.1 if self._wrong else array for name, array in made.items()}

    def close(self) -> None:
        self._engine.open -= 1
        self._session.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.unpack(tmp_path_factory.mktemp("tiny"))["f32"]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(registry, "get", lambda name: made)
    here = probe.Machine("a CPU", "x86_64", "Linux", (), 4, 4, 8 << 30)
    monkeypatch.setattr(probe, "machine", lambda: here)
    monkeypatch.setattr(probe, "free_memory", lambda: (4 << 30, 0))
    monkeypatch.setattr(tune_work, "RUN_SHARE", 100.0)  # the whole prompt, however busy the machine is
    return made


@pytest.fixture
def search(bundle: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[tune.Found, Any]]:
    """Search with times that are told: outputs are the engine's own."""

    def run(graph: str, cost: Cost, seconds: float = 1000.0) -> tuple[tune.Found, list[tune.Trial]]:
        manifest: Manifest = load_manifest(bundle)
        artifact = next(a for a in manifest.artifacts if (a.graph, str(a.target)) == (graph, "native:cpu"))
        computed = tune.Search._run

        def timed(self: tune.Search, settings: Settings) -> tuple[float, Array]:
            return cost(settings), computed(self, settings)[1]

        monkeypatch.setattr(tune.Search, "_run", timed)
        trials: list[tune.Trial] = []
        table = open_table(bundle, manifest.tables)
        with tune.Search(manifest, bundle, artifact, table, 1.0, trials.append) as made:
            found = made.best(seconds)
            assert engine.open <= 3
        assert engine.open == 0
        return found, trials

    return run


def noise(seed: int, sigma: float) -> Callable[[], float]:
    generator = np.random.default_rng(seed)
    return lambda: float(np.exp(generator.normal(0, sigma)))


def test_it_climbs_to_the_fastest_along_each_coordinate(search: Callable[..., Any], engine: Engine) -> None:
    jitter = noise(1, 0.01)

    def cost(settings: Settings) -> float:
        chunk, threads = int(settings.engine.get("prefill_chunk", 32)), settings.threads or 4
        slow = {"on": 1.0, "off": 0.9}[settings.engine.get("spinning", "on")]
        return (
            100
            * {8: 0.8, 16: 0.85, 32: 1.0, 64: 1.2}[chunk]
            * {1: 2.0, 2: 1.1, 3: 0.9, 4: 1.0}[threads]
            * slow
            * jitter()
        )

    found, trials = search("decoder", cost)
    assert found.settings.engine == {"prefill_chunk": "8", "spinning": "off"} and found.settings.threads == 3
    assert found.times == pytest.approx(1 / (0.8 * 0.9 * 0.9), rel=0.02)
    assert found.interval[0] < found.times < found.interval[1]
    kept = [t.settings for t in trials if t.verdict == "kept" and not t.settings.startswith("draft")]
    assert kept[:3] == ["chunk 16", "chunk 8", "chunk 8, spinning off"]
    assert "threads 2" not in {o for t in trials for o in [t.settings] if t.verdict == "kept"}
    assert len({t.settings for t in trials}) == len(trials) - 1  # only the best is run twice
    # how a prompt is cut needs no session of its own
    assert all("prefill_chunk" not in options.engine for options in engine.loads)


@pytest.mark.parametrize("seed", range(4))
def test_noise_alone_keeps_the_defaults(seed: int, search: Callable[..., Any]) -> None:
    jitter = noise(seed, 0.1)
    found, _ = search("decoder", lambda settings: 100 * jitter())
    assert found.settings.engine == {} and found.settings.threads is None


def test_what_was_luck_is_not_kept(search: Callable[..., Any]) -> None:
    """A candidate looks better until it is run beside the defaults once more."""
    calls = 0

    def cost(settings: Settings) -> float:
        nonlocal calls
        calls += settings == Settings(3)
        return 50.0 if settings == Settings(3) and calls < 8 else 100.0 + 100 * (settings.threads in (1, 2))

    found, trials = search("vision", cost)
    assert found.settings == Settings()
    assert [t.verdict for t in trials if t.settings == "threads 3"] == ["kept", "no gain"]
    assert trials[-1].reason.endswith("it was luck")


def test_another_result_is_refused_however_fast(search: Callable[..., Any]) -> None:
    found, trials = search("vision", lambda settings: 10.0 if settings.engine.get("exact") == "no" else 100.0)
    assert found.settings == Settings()
    [refused] = [t for t in trials if t.settings == "exact no"]
    assert refused.verdict == "refused" and "image_embeds differs by" in refused.reason


def test_outputs_of_the_work_are_judged_too(search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden probe of a decoder is one run: it does not see how a prompt is cut."""
    timed = tune_work.DecoderWork._timed

    def cut(self: tune_work.DecoderWork, session: Session, chunk: int | None) -> tuple[float, float, Array]:
        prefill_s, step_s, logits = timed(self, session, chunk)
        return prefill_s, step_s, logits + (1 if chunk == 8 else 0)

    monkeypatch.setattr(tune_work.DecoderWork, "_timed", cut)
    found, trials = search("decoder", lambda settings: float(settings.engine.get("prefill_chunk", 32)))
    assert found.settings.engine == {"prefill_chunk": "16"}
    [refused] = [t for t in trials if t.settings == "chunk 8"]
    assert refused.verdict == "refused" and refused.reason.startswith("outputs differ by 1, tolerance")


def test_a_spent_budget_and_a_full_memory_are_said_once(
    search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, trials = search("vision", lambda settings: 100.0, seconds=0.0)
    assert found.settings == Settings()
    assert [(t.verdict, t.reason) for t in trials] == [("not tried", "the budget is spent")]
    monkeypatch.setattr(probe, "free_memory", lambda: (1000, 0))
    _, trials = search("vision", lambda settings: 100.0)
    assert {t.verdict for t in trials} == {"not tried"} and "one more session takes about" in trials[0].reason


def test_without_a_golden_probe_nothing_is_searched(bundle: Path, engine: Engine) -> None:
    import dataclasses

    manifest = dataclasses.replace(load_manifest(bundle), probes=())
    with pytest.raises(ParityError, match="no golden probe of vision: what a setting changes cannot be judged"):
        tune.Search(manifest, bundle, manifest.artifacts[0], open_table(bundle, manifest.tables), 1.0)


def test_the_interval_of_ratios() -> None:
    low, high = tune.interval_of([1.0, 1.1, 1.2])
    error = 2 * 1.2533 * 1.4826 * 0.1 / 3**0.5
    assert (low, high) == pytest.approx((1.1 - error, 1.1 + error))
    assert tune.interval_of([1.5] * 8) == pytest.approx((1.498, 1.502))


def test_graphs_share_the_budget_by_what_they_take_of_a_request() -> None:
    shares = tune.shares({"vision": 100.0, "decoder": 3000.0})
    assert shares == pytest.approx({"vision": 0.125 + 0.75 * 0.25, "decoder": 0.125 + 0.75 * 0.75})
    assert sum(tune.shares({"vision": 1e-6, "decoder": 1.0}).values()) == pytest.approx(1)
