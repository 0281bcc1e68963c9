"""The choice of artifacts: a pure function, so every situation is a few records."""

from __future__ import annotations

import pytest

from lensc.backends.base import Artifact, FileRecord, Probe, Target
from lensc.backends.bundle import (
    DecoderSpec,
    GenerationSpec,
    GraphRecord,
    Manifest,
    ModelSpec,
    PictureSpec,
    Provenance,
)
from lensc.backends.errors import UnavailableError, UsageError
from lensc.export.graph import GraphSpec
from lensc.runtime.plan import parse_devices, plan

CPU, GPU, NPU = (Target.parse(t) for t in ("alpha:cpu", "beta:gpu", "gamma:npu:v75"))
GRAPHS = ("vision", "decoder")


def everywhere(target: Target) -> dict[str, Target]:
    return dict.fromkeys(GRAPHS, target)


USABLE = (
    Probe("alpha", "cpu", True, "alpha 1.2"),
    Probe("beta", "gpu", True, "beta 3.4"),
    Probe("gamma", "npu", True, "gamma 5.6"),
)


def manifest(**targets: list[Target]) -> Manifest:
    """A manifest with one artifact per graph and target, in the order given."""
    spec = ModelSpec(
        "tiny",
        PictureSpec(448, 14, 9, 96, "official", (0.5,) * 3, (0.5,) * 3, 70),
        DecoderSpec(8, 1, 1, 8, 16, 64),
        GenerationSpec((1,)),
    )
    graphs = {g: GraphRecord(GraphSpec(g, (), (), (), {}), "f32", "0" * 64) for g in ("vision", "decoder")}
    artifacts = tuple(
        Artifact(graph, target, "f32", (FileRecord(f"{target.slug}/{graph}.bin", 1, "0" * 64),), {}, {}, {}, {})
        for graph, all_targets in targets.items()
        for target in all_targets
    )
    provenance = Provenance("0", "", "0" * 64, {}, "f32", "2025-01-01")
    return Manifest(1, spec, graphs, artifacts, {}, "tokenizer.json", (), provenance)


def test_every_graph_gets_its_only_artifact() -> None:
    chosen = plan(manifest(vision=[NPU], decoder=[CPU]), USABLE)
    assert [(p.graph, p.effective, p.requested) for p in chosen.placements] == [
        ("vision", NPU, None),
        ("decoder", CPU, None),
    ]
    assert chosen["decoder"].reason == "best usable: runs here, alpha 1.2"


def test_npu_before_gpu_before_cpu_whatever_the_order() -> None:
    for order in ([CPU, GPU, NPU], [NPU, GPU, CPU], [GPU, CPU, NPU]):
        chosen = plan(manifest(vision=order, decoder=order), USABLE)
        assert {p.effective for p in chosen.placements} == {NPU}
    assert "alpha:cpu: usable, ranked lower" in chosen["vision"].reason


def test_the_manifest_s_order_decides_between_equals() -> None:
    other = Target.parse("delta:cpu")
    probes = (*USABLE, Probe("delta", "cpu", True, "delta 1"))
    for order in ([CPU, other], [other, CPU]):
        assert plan(manifest(vision=order, decoder=order), probes)["vision"].effective == order[0]


def test_an_emulated_npu_comes_after_a_real_cpu() -> None:
    probes = (*USABLE[:2], Probe("gamma", "npu", True, "simulator", state="emulated"))
    assert plan(manifest(vision=[NPU, CPU], decoder=[CPU]), probes)["vision"].effective == CPU


def test_an_unusable_one_is_passed_over_and_the_reason_kept() -> None:
    probes = (USABLE[0], Probe("beta", "gpu", False, "libbeta.so not found"))
    chosen = plan(manifest(vision=[GPU, CPU], decoder=[GPU, CPU]), probes)
    assert chosen["vision"].effective == CPU
    assert chosen["vision"].reason == "best usable: runs here, alpha 1.2; beta:gpu: libbeta.so not found"


def test_a_request_is_kept_or_refused_never_replaced() -> None:
    bundle = manifest(vision=[NPU, CPU], decoder=[CPU, GPU])
    chosen = plan(bundle, USABLE, everywhere(CPU))
    assert [(p.requested, p.effective) for p in chosen.placements] == [(CPU, CPU)] * 2
    with pytest.raises(
        UnavailableError, match=r"nothing runs for beta:gpu: graph vision: .*not the requested beta:gpu"
    ):
        plan(bundle, USABLE, everywhere(GPU))


def test_a_request_without_arch_takes_any_one_with_arch_only_its_own() -> None:
    bundle = manifest(vision=[NPU], decoder=[NPU])
    assert plan(bundle, USABLE, everywhere(Target.parse("gamma:npu")))["vision"].effective == NPU
    with pytest.raises(UnavailableError, match="not the requested gamma:npu:v73"):
        plan(bundle, USABLE, everywhere(Target.parse("gamma:npu:v73")))


def test_what_an_engine_refused_is_not_chosen_again() -> None:
    bundle = manifest(vision=[NPU, CPU], decoder=[CPU])
    chosen = plan(bundle, USABLE, refused={("vision", NPU): "built for v73"})
    assert chosen["vision"].effective == CPU
    assert "gamma:npu:v75: built for v73" in chosen["vision"].reason


def test_when_nothing_fits_every_graph_and_every_reason_is_named() -> None:
    probes = (Probe("alpha", "cpu", False, "pip install alpha"),)
    with pytest.raises(UnavailableError) as error:
        plan(manifest(vision=[CPU, GPU], decoder=[]), probes)
    assert str(error.value) == (
        "nothing runs on this machine: graph vision: alpha:cpu: pip install alpha; "
        "beta:gpu: this package knows no gpu of a backend 'beta' | graph decoder: no artifact; "
        "the bundle was built for alpha:cpu, beta:gpu"
    )


def test_a_folder_of_portable_graphs_says_how_to_compile() -> None:
    with pytest.raises(UnavailableError, match="lensc compile"):
        plan(manifest(), USABLE)


def test_each_graph_can_be_asked_for_by_name() -> None:
    bundle = manifest(vision=[NPU, CPU], decoder=[CPU, GPU])
    asked = parse_devices("vision=gamma:npu:v75,decoder=alpha:cpu", GRAPHS)
    chosen = plan(bundle, USABLE, asked)
    assert [(p.requested, p.effective) for p in chosen.placements] == [(NPU, NPU), (CPU, CPU)]
    chosen = plan(bundle, USABLE, parse_devices("vision=alpha:cpu", GRAPHS))
    assert [(p.requested, p.effective) for p in chosen.placements] == [(CPU, CPU), (None, GPU)]
    assert parse_devices("alpha:cpu", GRAPHS) == everywhere(CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("visoin=alpha:cpu", "'visoin=alpha:cpu': expected GRAPH=TARGET, a graph being one of vision, decoder"),
        ("vision=alpha:cpu,beta:gpu", "'beta:gpu': expected GRAPH=TARGET"),
        ("vision=alpha:cpu,vision=beta:gpu", "vision is named twice"),
        ("vision=alpha", "expected backend:processor"),
    ],
)
def test_devices_that_cannot_be_meant_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_devices(text, GRAPHS)
