"""The streamed reference gives what the model in memory gives, and shows quantizers what they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'lensc[export]'")
import torch
from torch import Tensor, nn

from lensc.backends.base import Array, Session
from lensc.backends.errors import CheckpointError, ExecutionError, GraphError, UsageError
from lensc.export.checkpoint import Checkpoint
from lensc.export.models import streamed
from lensc.export.models.minicpmv import MiniCPMV
from lensc.export.models.session import graph_modules, torch_sessions
from lensc.export.models.streamed import StreamedModel, streamed_sessions
from lensc.export.verify import Question, make_probes, probe_feeds, verify_model
from lensc.runtime.picture import vision_feeds
from lensc.runtime.prompt import Tokenizer

ROOT = Path(__file__).parents[2]
FOLDERS = {"golden": ROOT / "tests" / "golden" / "checkpoint", "demo": ROOT / "export" / "demo" / "checkpoint"}
IMAGES = ROOT / "tests" / "golden" / "images"

Feeds = dict[str, Array]


@pytest.fixture(scope="module", params=list(FOLDERS))
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return Checkpoint(FOLDERS[request.param])


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> MiniCPMV:
    return checkpoint.load_model()


@pytest.fixture(scope="module")
def reference(model: MiniCPMV) -> dict[str, Session]:
    return torch_sessions(model)


@pytest.fixture(scope="module")
def golden() -> Checkpoint:
    return Checkpoint(FOLDERS["golden"])


@pytest.fixture(scope="module")
def calls(checkpoint: Checkpoint) -> dict[str, list[Feeds]]:
    """Calls of different sizes: the golden probe, two slices of which one is padded; a prompt, a batch after a past."""
    spec = checkpoint.model_spec()
    model = StreamedModel(checkpoint, checkpoint.config)
    generator = np.random.default_rng(0)
    slices = [generator.integers(0, 256, (*size, 3), np.uint8) for size in ((112, 140), (56, 84))]
    batches = vision_feeds(slices, spec.picture, spec.decoder.hidden_size)
    decoder = [decoder_feeds(checkpoint, **sizes) for sizes in ({"tokens": 37}, {"tokens": 4, "past": 61, "batch": 3})]
    return {
        "vision": [probe_feeds(model.specs["vision"]), *(batch.feeds for batch in batches)],
        "decoder": [probe_feeds(model.specs["decoder"]), *decoder],
    }


def decoder_feeds(checkpoint: Checkpoint, tokens: int, past: int = 0, batch: int = 1, rows: int = 2) -> Feeds:
    config, generator = checkpoint.config, np.random.default_rng(tokens)
    shape = (past, batch, config.num_key_value_heads, config.head_dim)
    feeds: Feeds = {
        "inputs_embeds": generator.standard_normal((batch, tokens, config.hidden_size)).astype(np.float32),
        "position_ids": np.arange(past, past + tokens),
        "logit_positions": np.arange(tokens)[-rows:] if rows else np.arange(0),
    }
    for i in range(config.num_hidden_layers):
        feeds[f"past_key.{i}"] = generator.standard_normal(shape).astype(np.float32)
        feeds[f"past_value.{i}"] = generator.standard_normal(shape).astype(np.float32)
    return feeds


def assert_same(got: Mapping[str, Array], expected: Mapping[str, Array], atol: float = 0.0) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_allclose(got[name], array, rtol=0, atol=atol, err_msg=name)


# --- the same as in memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ("vision", "decoder"))
def test_outputs_are_those_of_the_model_in_memory(
    graph: str, checkpoint: Checkpoint, reference: dict[str, Session], calls: dict[str, list[Feeds]]
) -> None:
    model = StreamedModel(checkpoint, checkpoint.config)
    run = {"vision": model.run_vision, "decoder": model.run_decoder}[graph]
    for got, feeds in zip(run(calls[graph]), calls[graph], strict=True):
        assert_same(got, reference[graph].run(feeds))


def test_head_in_pieces(checkpoint: Checkpoint, reference: dict[str, Session], calls: dict[str, list[Feeds]]) -> None:
    pieces: list[str] = []
    model = StreamedModel(
        checkpoint, checkpoint.config, head_bytes=100 * 4 * checkpoint.config.hidden_size, after_block=pieces.append
    )
    for got, feeds in zip(model.run_decoder(calls["decoder"]), calls["decoder"], strict=True):
        assert_same(got, reference["decoder"].run(feeds), atol=1e-5)
    heads = [name for name in pieces if "lm_head" in name]
    assert heads[0] == "llm.lm_head[0:100]" and heads[-1].endswith(f":{checkpoint.config.vocab_size}]")
    assert len(heads) == -(-checkpoint.config.vocab_size // 100)


def test_weights_read_in_pieces(
    checkpoint: Checkpoint,
    reference: dict[str, Session],
    calls: dict[str, list[Feeds]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streamed, "READ_BYTES", 50_000)
    sessions = streamed_sessions(StreamedModel(checkpoint, checkpoint.config))
    for graph, session in sessions.items():
        assert_same(session.run(calls[graph][0]), reference[graph].run(calls[graph][0]))


def test_long_prompt_is_what_the_runtime_feeds_in_chunks(checkpoint: Checkpoint, reference: dict[str, Session]) -> None:
    """With a past, a batch of two and a last chunk that is not full."""
    feeds = decoder_feeds(checkpoint, tokens=50, past=7, batch=2, rows=1)
    (got,) = StreamedModel(checkpoint, checkpoint.config, chunk_tokens=16).run_decoder([feeds])
    fed: dict[str, Array] = {name: array for name, array in feeds.items() if name.startswith("past_")}
    for start in range(0, 50, 16):
        part = slice(start, min(start + 16, 50))
        positions = feeds["position_ids"][part]
        step = {
            "inputs_embeds": np.ascontiguousarray(feeds["inputs_embeds"][:, part]),
            "position_ids": positions,
            "logit_positions": np.array([len(positions) - 1]),
        }
        outputs = reference["decoder"].run(step | fed)
        fed = {name: np.concatenate([rows, outputs[name.removeprefix("past_")]]) for name, rows in fed.items()}
    expected = {"logits": outputs["logits"]}
    expected |= {name.removeprefix("past_"): rows[7:] for name, rows in fed.items()}
    assert_same(got, expected, atol=2e-6)
    assert_same(got, reference["decoder"].run(feeds), atol=2e-5)


def test_positions_that_do_not_increase_are_not_cut(golden: Checkpoint) -> None:
    """Drafts of a tree share positions: what an earlier chunk holds is then not visible to all of a later one."""
    feeds = decoder_feeds(golden, tokens=6)
    feeds["position_ids"] = np.array([0, 1, 2, 2, 1, 3])
    whole, cut = (StreamedModel(golden, golden.config, chunk_tokens=n).run_decoder([feeds])[0] for n in (100, 2))
    assert_same(cut, whole)


def test_only_what_is_wanted(golden: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [decoder_feeds(golden, tokens=n) for n in (3, 4, 5)]
    model = StreamedModel(golden, golden.config)
    full = model.run_decoder(feeds)
    some = model.run_decoder(feeds, [["logits"], ["key.1"], []])
    assert [sorted(outputs) for outputs in some] == [["logits"], ["key.1"], []]
    assert_same(some[0], {"logits": full[0]["logits"]})
    assert_same(some[1], {"key.1": full[1]["key.1"]})

    read: list[str] = []
    monkeypatch.setattr(Checkpoint, "rows", lambda self, name, *a: read.append(name))
    monkeypatch.setattr(Checkpoint, "tensor", counting(read, Checkpoint.tensor))
    nothing = decoder_feeds(golden, tokens=3, rows=0)
    (outputs,) = model.run_decoder([nothing], [["logits"]])
    assert outputs["logits"].shape == (1, 0, golden.config.vocab_size)
    assert read and "llm.lm_head.weight" not in read


def counting(read: list[str], tensor: Callable[[Checkpoint, str], Tensor]) -> Callable[[Checkpoint, str], Tensor]:
    def counted(self: Checkpoint, name: str) -> Tensor:
        read.append(name)
        return tensor(self, name)

    return counted


def test_every_weight_is_read_once_for_all_calls(
    checkpoint: Checkpoint, calls: dict[str, list[Feeds]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(Checkpoint, "tensor", counting(read, Checkpoint.tensor))
    model = StreamedModel(checkpoint, checkpoint.config)
    model.run_vision(calls["vision"])
    model.run_decoder(calls["decoder"])
    assert Counter(read) == Counter(set(checkpoint.tensors) - {"llm.model.embed_tokens.weight"})


def test_no_calls(golden: Checkpoint) -> None:
    model = StreamedModel(golden, golden.config, max_bytes=1 << 30)
    assert model.run_vision([]) == [] and model.run_decoder([]) == []


# --- as sessions --------------------------------------------------------------------------------------------------


def test_sessions_serve_probes_and_generation(golden: Checkpoint, tmp_path: Path) -> None:
    """verify_model runs both sides of every call, free and forced, with past and cache."""
    model = golden.load_model()
    reference, sessions = torch_sessions(model), streamed_sessions(StreamedModel(golden, golden.config))
    tokenizer, table = Tokenizer.from_file(golden.tokenizer), model.llm.model.embed_tokens.weight.numpy()
    questions = [Question("What is this?", (IMAGES / "tiny64.png",))]
    records = verify_model(sessions, reference, golden.model_spec(), tokenizer, table, questions, 3)
    assert [record.sqnr_db for record in records] == [float("inf")] * 2
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert make_probes(sessions, tmp_path / "one") == make_probes(reference, tmp_path / "two")
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_session_writes_into_the_given_arrays(golden: Checkpoint) -> None:
    session = streamed_sessions(StreamedModel(golden, golden.config))["decoder"]
    feeds = decoder_feeds(golden, tokens=3)
    feeds["inputs_embeds"].setflags(write=False)
    logits = np.empty((1, 2, golden.config.vocab_size), np.float32)
    outputs = session.run(feeds, {"logits": logits})
    assert outputs["logits"] is logits
    np.testing.assert_array_equal(logits, session.run(feeds)["logits"])
    with pytest.raises(UsageError, match="missing position_ids"):
        session.run({name: array for name, array in feeds.items() if name != "position_ids"})
    with pytest.raises(UsageError, match=r"logits: .*expected \[1, 2, 1280\]"):
        session.run(feeds, {"logits": logits[:, :1]})
    session.close()
    with pytest.raises(ExecutionError, match="closed"):
        session.run(feeds)


# --- hooks for quantization ---------------------------------------------------------------------------------------


def linears(model: MiniCPMV) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight [out, in] and bias of all linears by the names that `on_linear` gives."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {
        f"{path}.weight": (part.weight, part.bias)
        for path, part in model.named_modules()
        if isinstance(part, nn.Linear)
    }
    patches, attention = model.vpm.embeddings.patch_embedding, model.resampler.attn
    found["vpm.embeddings.patch_embedding.weight"] = (patches.weight.flatten(1), patches.bias)
    for third, weight, bias in zip(
        "qkv", attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
    ):
        found[f"resampler.attn.in_proj_weight.{third}"] = (weight, bias)
    found["resampler.proj"] = (model.resampler.proj.T, None)
    return found


def test_linear_inputs_are_what_the_linears_compute_with(
    checkpoint: Checkpoint, model: MiniCPMV, calls: dict[str, list[Feeds]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix product with a weight in the model in memory is seen, in the same order, with the same input."""
    seen: list[tuple[str, Tensor]] = []
    streams = StreamedModel(checkpoint, checkpoint.config)
    known = linears(model)
    by_address = {weight.data_ptr(): name for name, (weight, _) in known.items()}
    expected: list[tuple[str, Tensor]] = []
    plain = nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        expected.append((by_address[weight.data_ptr()], x.flatten(0, -2).clone()))
        return plain(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", linear)
    for name, (module, spec) in graph_modules(model).items():
        seen.clear(), expected.clear()
        feeds = calls[name][-1]
        outputs = module(*(torch.from_numpy(feeds[t.name]) for t in spec.inputs))
        with monkeypatch.context() as context:
            context.setattr(nn.functional, "linear", plain)
            run = {"vision": streams.run_vision, "decoder": streams.run_decoder}[name]
            run([feeds], on_linear=lambda name, x: seen.append((name, x.clone())))
        if name == "vision":
            proj, x = seen.pop()
            assert proj == "resampler.proj"
            assert torch.equal((x @ model.resampler.proj).view_as(outputs), outputs)
        assert sorted(name for name, _ in seen) == sorted(name for name, _ in expected)
        inputs = dict(expected)
        assert len(inputs) == len(expected)
        for linear_name, x in seen:
            assert torch.equal(x, inputs[linear_name]), linear_name
            assert x.shape[1] == known[linear_name][0].shape[1]


def rounded(weight: Tensor) -> Tensor:
    """Something like 4 bits per row."""
    scale = weight.abs().amax(-1, keepdim=True) / 7 + 1e-9
    return (weight / scale).round() * scale


@pytest.mark.parametrize("in_place", (True, False), ids=("in place", "returned"))
def test_replaced_weights_are_what_the_next_block_sees(
    in_place: bool, checkpoint: Checkpoint, calls: dict[str, list[Feeds]]
) -> None:
    """Sequential calibration: each block is observed with the outputs of the quantized blocks before it."""
    quantized = checkpoint.load_model()
    with torch.no_grad():
        for name, weight in quantized.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.copy_(rounded(weight))
    expected = torch_sessions(quantized)
    blocks: list[str] = []
    inputs: dict[str, list[Tensor]] = {}

    def on_linear(name: str, x: Tensor) -> None:
        inputs.setdefault(name, []).append(x.clone())

    def replace(block: str, state: dict[str, Tensor]) -> Mapping[str, Tensor] | None:
        blocks.append(block)
        assert all(name.startswith(block.partition("[")[0]) for name in state)
        new = {n: rounded(w) for n, w in state.items() if w.ndim == 2 and "embed" not in n}
        if not in_place:
            return new
        for name, weight in new.items():
            state[name].copy_(weight)
        return None

    model = StreamedModel(checkpoint, checkpoint.config)
    for graph, run in (("vision", model.run_vision), ("decoder", model.run_decoder)):
        for got, feeds in zip(run(calls[graph], on_linear=on_linear, replace=replace), calls[graph], strict=True):
            assert_same(got, expected[graph].run(feeds))
    layers = checkpoint.config.num_hidden_layers
    assert blocks[-layers - 2 :] == [
        *(f"llm.model.layers.{i}" for i in range(layers)),
        "llm.model.norm",
        f"llm.lm_head[0:{checkpoint.config.vocab_size}]",
    ]
    assert blocks[0] == "vpm.embeddings" and blocks[-layers - 3] == "resampler"
    # Once per sample: what the second computation of a block sees is not reported.
    assert {len(arrays) for name, arrays in inputs.items() if name.startswith("llm")} == {len(calls["decoder"])}
    assert {len(arrays) for name, arrays in inputs.items() if name.startswith("vpm")} == {len(calls["vision"])}
    # The first linear of layer 1 is observed behind the quantized layer 0.
    seen_by_quantized: list[Tensor] = []
    quantized.llm.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda m, a: seen_by_quantized.append(a[0].flatten(0, 1).clone())
    )
    for feeds in calls["decoder"]:
        expected["decoder"].run(feeds)
    name = "llm.model.layers.1.self_attn.q_proj.weight"
    assert all(torch.equal(a, b) for a, b in zip(inputs[name], seen_by_quantized, strict=True))


def test_replacement_must_fit(golden: Checkpoint) -> None:
    model = StreamedModel(golden, golden.config)
    feeds = [decoder_feeds(golden, tokens=2)]
    norm = "llm.model.layers.0.input_layernorm.weight"
    with pytest.raises(GraphError, match=rf"block llm.model.layers.0: .*no weight x, {norm} \[3\] instead of \[256\]"):
        model.run_decoder(feeds, replace=lambda block, state: {"x": torch.zeros(1), norm: torch.zeros(3)})


def test_bfloat16_is_near(checkpoint: Checkpoint, calls: dict[str, list[Feeds]]) -> None:
    """For calibration: inputs in bfloat16, weights for the quantizer in float32 as stored."""
    dtypes: set[torch.dtype] = set()
    stored: list[bool] = []

    def replace(block: str, state: dict[str, Tensor]) -> None:
        stored.extend(torch.equal(w, checkpoint.tensor(n).float()) for n, w in state.items())

    plain, fast = (StreamedModel(checkpoint, checkpoint.config, dtype=d) for d in (torch.float32, torch.bfloat16))
    for graph in ("vision", "decoder"):
        results = [
            getattr(plain, f"run_{graph}")(calls[graph]),
            getattr(fast, f"run_{graph}")(calls[graph], on_linear=lambda name, x: dtypes.add(x.dtype), replace=replace),
        ]
        for exact, near in zip(*results, strict=True):
            for name in exact:
                assert near[name].dtype == np.float32
                error = np.linalg.norm(near[name] - exact[name]) / np.linalg.norm(exact[name])
                assert 0 < error < 0.1, name
    assert dtypes == {torch.bfloat16} and all(stored) and len(stored) > 80


# --- limits and damage --------------------------------------------------------------------------------------------


def test_too_little_memory_is_known_before_a_weight_is_read(
    golden: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "tensor", lambda *a: pytest.fail("a weight was read"))
    feeds = [decoder_feeds(golden, tokens=n) for n in (3, 400)]
    model = StreamedModel(golden, golden.config, max_bytes=10 << 20)
    with pytest.raises(UsageError, match=r"graph decoder: a pass over 2 samples needs \d+ MiB .*10 MiB is free"):
        model.run_decoder(feeds)
    enough = model.decoder_footprint(feeds, [["logits"]] * 2)
    assert enough.activations == 403 * 256 * 4
    assert enough.outputs == 4 * 1280 * 4
    assert enough.total < model.decoder_footprint(feeds).total
    vision = [probe_feeds(model.specs["vision"])]
    assert model.vision_footprint(vision).outputs == 2 * 96 * 256 * 4
    with pytest.raises(UsageError, match=r"graph vision: a pass over 1 samples needs"):
        StreamedModel(golden, golden.config, max_bytes=100).run_vision(vision)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_damaged_weights(value: float, golden: Checkpoint) -> None:
    class Damaged:
        tensors, sha256 = golden.tensors, "0"

        def tensor(self, name: str) -> Tensor:
            weight = golden.tensor(name)
            if name == "llm.model.layers.1.mlp.up_proj.weight":
                weight[3, 5] = value
            return weight

        def rows(self, name: str, start: int, stop: int) -> Tensor:
            return self.tensor(name)[start:stop]

    model = StreamedModel(Damaged(), golden.config)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight holds NaN or Inf"):
        model.run_decoder([decoder_feeds(golden, tokens=2)])


def test_unknown_outputs_are_refused(golden: Checkpoint) -> None:
    model = StreamedModel(golden, golden.config)
    with pytest.raises(UsageError, match=r"key\.9"):
        model.run_decoder([decoder_feeds(golden, tokens=2)], [["key.9"]])
