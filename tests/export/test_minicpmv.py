"""The reference model against what the official code computed (tests/golden) and against transformers' classes.

Tolerances are those of tests/golden/README.md for float32, and each wrong variant is shown to miss them, by the amount
that was recorded for it.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lensc.backends.bundle import PictureSpec
from lensc.export.checkpoint import Checkpoint
from lensc.export.models.minicpmv import MiniCPMV
from lensc.runtime.picture import position_ids, slice_picture, vision_feeds

GOLDEN = Path(__file__).parents[1] / "golden"
PICTURE_CASES = ("tiny64", "sq448", "wide800x600", "multiturn")
CASES = (*PICTURE_CASES, "text_only")
STOP = (1025, 1033)

VISION = RESAMPLER = EMBEDS = 5e-5
LOGITS = 2e-4

Record = dict[str, npt.NDArray[Any]]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.cache
def model(dtype: torch.dtype = torch.float32) -> MiniCPMV:
    return Checkpoint(GOLDEN / "checkpoint").load_model(dtype)


@functools.cache
def recorded(name: str) -> Record:
    with np.load(GOLDEN / "cases" / f"{name}.npz") as data:
        return dict(data)


@functools.cache
def described(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((GOLDEN / "cases" / f"{name}.json").read_text())
    return data


def picture_spec(padding: str = "official") -> PictureSpec:
    half = (0.5, 0.5, 0.5)
    return PictureSpec(448, 14, 9, 96, padding, half, half, 70)  # type: ignore[arg-type]


@functools.cache
def feeds(name: str, padding: str = "official") -> list[dict[str, Tensor]]:
    """The inputs of the vision graph for all pictures of a case: one batch, or one per slice."""
    parts = [part for m in described(name)["messages"] for part in np.atleast_1d(m["content"]).tolist()]
    pictures = [GOLDEN / "images" / f"{part[1:]}.png" for part in parts if part.startswith("@")]
    pixels = [p for picture in pictures for p in slice_picture(picture, picture_spec()).pixels]
    return [
        {key: torch.from_numpy(np.array(value)) for key, value in batch.feeds.items()}
        for batch in vision_feeds(pixels, picture_spec(padding), 256)
    ]


def features(batch: dict[str, Tensor], used: MiniCPMV | None = None) -> Tensor:
    vpm = (used or model()).vpm
    out: Tensor = vpm(batch["patches"], batch["position_ids"], batch["attention_bias"])
    return out


def image_embeds(batches: list[dict[str, Tensor]], used: MiniCPMV | None = None) -> Tensor:
    encoder = (used or model()).vision_encoder()
    return torch.cat([encoder(**batch) for batch in batches])


@functools.cache
def official_embeds(name: str) -> Tensor:
    """The picture's rows as the official code computes them."""
    return image_embeds(feeds(name))


def prompt_embeds(name: str, pictures: Tensor | None) -> Tensor:
    """Embeddings of the prompt [1, tokens, D] with the pictures' rows scattered into it."""
    record = recorded(name)
    embeds: Tensor = model().llm.model.embed_tokens(torch.from_numpy(record["input_ids"].astype(np.int64)))
    if pictures is not None:
        for (start, end), rows in zip(record["image_bound"].tolist(), pictures, strict=True):
            embeds[0, start:end] = rows
    return embeds


def case_embeds(name: str) -> Tensor:
    return prompt_embeds(name, official_embeds(name) if name in PICTURE_CASES else None)


def prefill_logits(embeds: Tensor) -> Tensor:
    """Logits of all positions [tokens, vocab]."""
    positions = torch.arange(embeds.shape[1])
    logits: Tensor = model().llm(embeds, positions, positions)[0][0]
    return logits


def greedy(embeds: Tensor, steps: int, chunk: int | None = None) -> tuple[list[int], list[Tensor]]:
    """Ids and logits of greedy decoding with the model's own cache; the prompt goes in `chunk` tokens at a time."""
    llm, cache = model().llm, None
    ids: list[int] = []
    rows: list[Tensor] = []
    length, pending = 0, list(embeds.split(chunk or embeds.shape[1], dim=1))
    while len(ids) < steps and (not ids or ids[-1] not in STOP):
        new = pending.pop(0) if pending else llm.model.embed_tokens(torch.tensor([[ids[-1]]]))
        tokens = new.shape[1]
        positions = torch.arange(length, length + tokens)
        logits, keys, values = llm(new, positions, torch.tensor([tokens - 1]), *(cache or (None, None)))
        if cache is None:
            cache = keys, values
        else:
            cache = tuple([torch.cat(pair) for pair in zip(old, rest, strict=True)] for old, rest in zip(cache, (keys, values), strict=True))  # fmt: skip
        length += tokens
        if not pending:
            rows.append(logits[0, -1])
            ids.append(int(logits[0, -1].argmax()))
    return ids, rows


def distance(got: Tensor, expected: npt.NDArray[Any]) -> float:
    assert tuple(got.shape) == expected.shape
    return float((got.double() - torch.from_numpy(expected).double()).abs().max())


# --- goldens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURE_CASES)
def test_vision_features_including_padding_rows(name: str) -> None:
    record, got = recorded(name), features(feeds(name)[0])
    expected_ids = record["vit_pos_ids"]
    assert torch.equal(feeds(name)[0]["position_ids"][0], torch.from_numpy(expected_ids[0].astype(np.int64)))
    if "vit_rows" in record:
        got = got[:, torch.from_numpy(record["vit_rows"].astype(np.int64))]
    assert distance(got, record["vit_out_batched"]) < VISION


@pytest.mark.parametrize("name", PICTURE_CASES)
def test_resampler_batched(name: str) -> None:
    assert distance(official_embeds(name), recorded(name)["resampler_out_batched"]) < RESAMPLER


@pytest.mark.parametrize("padding", ["per_slice", "masked"])
@pytest.mark.parametrize("name", PICTURE_CASES)
def test_resampler_per_slice(name: str, padding: str) -> None:
    """Masked padding must equal no padding; where slices are of one size it equals the official batch as well."""
    record = recorded(name)
    expected = record.get("resampler_out_per_slice", record["resampler_out_batched"])
    assert distance(image_embeds(feeds(name, padding)), expected) < RESAMPLER


@pytest.mark.parametrize("name", CASES)
def test_embeddings_after_scatter(name: str) -> None:
    record, embeds = recorded(name), case_embeds(name)
    rows = embeds[0, torch.from_numpy(record["embeds_rows"].astype(np.int64))]
    assert distance(rows, record["inputs_embeds_rows"]) < EMBEDS
    assert abs(float(embeds.double().sum()) - described(name)["inputs_embeds_sum_f64"]) < 1e-2


@pytest.mark.parametrize("name", CASES)
def test_prefill_logits(name: str) -> None:
    record, logits = recorded(name), prefill_logits(case_embeds(name))
    assert distance(logits[-1], record["logits_last"]) < LOGITS
    assert distance(logits[torch.from_numpy(record["logits_rows"].astype(np.int64))], record["logits_at_rows"]) < LOGITS
    first, second = logits.topk(2).values.unbind(-1)
    clear = first - second > 2 * LOGITS
    same = logits.argmax(-1) == torch.from_numpy(record["argmax_all_positions"].astype(np.int64))
    assert clear.float().mean() > 0.95 and bool(same[clear].all())


@pytest.mark.parametrize("chunk", [None, 50], ids=["whole", "chunks-of-50"])
@pytest.mark.parametrize("name", CASES)
def test_greedy_ids_with_the_models_own_cache(name: str, chunk: int | None) -> None:
    record = recorded(name)
    ids, rows = greedy(case_embeds(name), steps=24, chunk=chunk)
    assert ids == record["greedy_ids"].tolist()
    first = record["greedy_logits_first8"]
    assert distance(torch.stack(rows[: len(first)]), first) < LOGITS
    top = torch.stack(rows).topk(2).values
    assert distance(top[:, 0] - top[:, 1], record["greedy_margin"]) < LOGITS


@pytest.mark.parametrize("name", PICTURE_CASES)
def test_greedy_ids_per_slice(name: str) -> None:
    record = recorded(name)
    embeds = prompt_embeds(name, image_embeds(feeds(name, "per_slice")))
    ids, rows = greedy(embeds, steps=24)
    assert distance(rows[0], record["per_slice_logits_last"]) < LOGITS
    assert ids == record["per_slice_greedy_ids"].tolist()


def test_float16_model_stays_within_its_wider_limits() -> None:
    half, record = model(torch.float16), recorded("sq448")
    batch = {k: v.half() if v.is_floating_point() else v for k, v in feeds("sq448")[0].items()}
    seen = features(batch, half)
    assert seen.dtype == torch.float16 and bool(seen.isfinite().all())
    got = seen[:, torch.from_numpy(record["vit_rows"].astype(np.int64))] if "vit_rows" in record else seen
    assert distance(got, record["vit_out_batched"]) < 3e-2
    pictures = image_embeds([batch], half)
    assert distance(pictures, record["resampler_out_batched"]) < 2e-2
    embeds = prompt_embeds("sq448", pictures.float()).half()
    positions = torch.arange(embeds.shape[1])
    logits = half.llm(embeds, positions, positions[-1:])[0]
    assert distance(logits[0, 0], record["logits_last"]) < 8e-2


# --- wrong variants must be caught, by as much as was recorded ----------------------------------------------------


def grid_ids(rows: int, cols: int) -> npt.NDArray[np.int64]:
    """Two-dimensional position ids, which the released model does not use."""
    return (70 * position_ids(rows)[:, None] + position_ids(cols)[None, :]).reshape(-1)


def assert_missed_by(got: float, recorded_by: float, limit: float) -> None:
    assert got > 1000 * limit
    assert got == pytest.approx(recorded_by, rel=2e-3)


@pytest.mark.parametrize("name", PICTURE_CASES)
def test_two_dimensional_position_ids_are_caught(name: str) -> None:
    record, said = recorded(name), described(name)["ablation_max_abs"]
    wrong = [
        {**batch, "position_ids": torch.from_numpy(grid_ids(rows, cols))[None]}
        for batch, (rows, cols) in zip(feeds(name, "per_slice"), record["tgt_sizes"].tolist(), strict=True)
    ]
    embeds = image_embeds(wrong)
    expected = record.get("resampler_out_per_slice", record["resampler_out_batched"])
    assert_missed_by(distance(embeds, expected), said["2-D vision position ids (per slice): resampler"], RESAMPLER)
    logits = prefill_logits(prompt_embeds(name, embeds))[-1]
    assert_missed_by(distance(logits, record["per_slice_logits_last"]), said["2-D vision position ids: logits"], LOGITS)


@pytest.mark.parametrize("name", PICTURE_CASES)
def test_a_dropped_vision_layer_is_caught(name: str) -> None:
    record, said = recorded(name), described(name)["ablation_max_abs"]
    short = Checkpoint(GOLDEN / "checkpoint").load_model()
    del short.vpm.encoder.layers[-1]
    embeds = image_embeds(feeds(name, "per_slice"), short)
    expected = record.get("resampler_out_per_slice", record["resampler_out_batched"])
    assert_missed_by(distance(embeds, expected), said["last vision layer dropped: resampler"], RESAMPLER)
    logits = prefill_logits(prompt_embeds(name, embeds))[-1]
    missed = distance(logits, record["per_slice_logits_last"])
    assert_missed_by(missed, said["last vision layer dropped: logits"], LOGITS)


@pytest.mark.parametrize("name", ["wide800x600", "multiturn"])
def test_swapped_rows_and_columns_are_caught(name: str) -> None:
    record, said = recorded(name), described(name)["ablation_max_abs"]
    batch = feeds(name)[0]
    half = batch["key_pos_embed"].shape[-1] // 2
    swapped = batch["key_pos_embed"].clone()
    for i, (rows, cols) in enumerate(record["tgt_sizes"].tolist()):
        embed = batch["key_pos_embed"][i, : rows * cols].reshape(rows, cols, -1)
        column, row = embed[0, :, :half], embed[:, 0, half:]
        # the embedding of a grid of cols rows and rows columns; each axis has the same sines and cosines
        turned = torch.cat((row.repeat(cols, 1), column.repeat_interleave(rows, 0)), dim=-1)
        swapped[i, : rows * cols] = turned
    embeds = image_embeds([{**batch, "key_pos_embed": swapped}])
    missed = distance(embeds, record["resampler_out_batched"])
    assert_missed_by(missed, said["resampler tgt h/w swapped: resampler"], RESAMPLER)


def test_unmasked_padding_matters_where_slices_differ_in_size() -> None:
    record, said = recorded("multiturn"), described("multiturn")["ablation_max_abs"]
    embeds = image_embeds(feeds("multiturn", "per_slice"))
    assert_missed_by(distance(embeds, record["resampler_out_batched"]), said["per_slice: resampler"], RESAMPLER)
    logits = prefill_logits(prompt_embeds("multiturn", embeds))[-1]
    assert_missed_by(distance(logits, record["logits_last"]), said["per_slice: logits"], LOGITS)
