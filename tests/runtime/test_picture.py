"""Slices, patches and position ids against an independent implementation and the recorded results of the official code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lensc.backends.bundle import PictureSpec
from lensc.backends.errors import PictureError, UsageError
from lensc.runtime.picture import (
    MASK,
    MAX_PATCHES,
    patchify,
    plan_slices,
    position_ids,
    resampler_pos_embed,
    slice_picture,
    vision_feeds,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = (112, 14, 9)
OFFICIAL = (448, 14, 9)


def _spec(scale: int = 448, patch: int = 14, slices: int = 9, padding: Any = "official") -> PictureSpec:
    half = (0.5, 0.5, 0.5)
    return PictureSpec(scale, patch, slices, 96, padding, half, half, 70)


def _oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slicing_check", GOLDEN / "slicing_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ORACLE = _oracle()


def _sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _strip(patches: np.ndarray) -> np.ndarray:
    """Patches as the official strip: float32[3, 14, 14 * patches]."""
    return patches.reshape(-1, 3, 14, 14).transpose(1, 2, 0, 3).reshape(3, 14, -1)


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- slicing


@pytest.mark.parametrize("shape", [OFFICIAL, SMALL, (448, 14, 4), (448, 14, 1)], ids=lambda s: f"scale{s[0]}-max{s[2]}")
def test_plan_equals_the_independent_implementation(shape: tuple[int, int, int]) -> None:
    spec, draw = _spec(*shape), random.Random(2)
    sizes = [(draw.randint(1, 4000), draw.randint(1, 4000)) for _ in range(15_000)]
    sizes += [(int(10 ** draw.uniform(0, 4)), int(10 ** draw.uniform(0, 3.9))) for _ in range(5_000)]
    refused = 0
    for width, height in sizes:
        want = ORACLE.plan(width, height, shape[2], shape[0])
        try:
            plan = plan_slices(width, height, spec)
        except PictureError:
            refused += 1
            thin = max(width / height, height / width)
            assert thin > (4000 if shape[0] == 448 else shape[0] ** 2 / 9), (width, height)
            continue
        assert want["max_patches"] <= MAX_PATCHES
        got = plan.grid, plan.overview, plan.refine, plan.cell, [(h // 14, w // 14) for w, h in plan.sizes]
        assert got == (want["grid"], want["overview"], want["refine"], want["cell"], want["tgt_sizes"]), (width, height)
    assert refused < 100


def test_plan_equals_the_recorded_table() -> None:
    table = np.load(GOLDEN / "extras/slicing_table.npz")["table"]
    checked = 0
    for width, height, *rest in table.tolist():
        if ORACLE.plan(width, height)["max_patches"] > MAX_PATCHES:
            with pytest.raises(PictureError, match="too thin"):
                plan_slices(width, height, _spec())
            continue
        plan = plan_slices(width, height, _spec())
        got = [*(plan.grid or (0, 0)), *plan.overview, *(plan.refine or (0, 0)), *(plan.cell or (0, 0))]
        assert got == rest, (width, height)
        checked += 1
    assert checked > 4000


# image, grid, overview, refine, cell, rows x columns of the overview's and of the cells' patches
WORKED_EXAMPLES = """
448x448 - 448x448 - - 32x32 -
336x224 - 546x364 - - 26x39 -
800x600 2x2 518x392 1036x784 518x392 28x37 28x37
1344x1344 3x3 448x448 1344x1344 448x448 32x32 32x32
1920x1080 4x2 602x336 1680x952 420x476 24x43 34x30
300x2000 1x4 168x1162 350x2296 350x574 83x12 41x25
64x64 - 448x448 - - 32x32 -
1x1 - 448x448 - - 32x32 -
449x448 2x1 448x448 644x630 322x630 32x32 45x23
1280x720 3x2 602x336 1470x812 490x406 24x43 29x35
1080x1920 2x4 336x602 952x1680 476x420 43x24 30x34
4000x3000 3x3 518x392 1554x1176 518x392 28x37 28x37
896x448 2x1 630x322 896x448 448x448 23x45 32x32
3000x300 6x1 1414x140 3444x350 574x350 10x101 25x41
10000x100 6x1 4396x42 10920x112 1820x112 3x314 8x130
"""


@pytest.mark.parametrize("row", WORKED_EXAMPLES.strip().splitlines(), ids=lambda row: row.split()[0])
def test_worked_example(row: str) -> None:
    pairs = [None if text == "-" else tuple(map(int, text.split("x"))) for text in row.split()]
    source, grid, overview, refine, cell, first, others = pairs
    assert source is not None
    plan = plan_slices(*source, _spec())
    assert (plan.source, plan.grid, plan.overview, plan.refine, plan.cell) == (source, grid, overview, refine, cell)
    patches = [(height // 14, width // 14) for width, height in plan.sizes]
    assert patches == [first] + ([others] * (len(plan.sizes) - 1))


@given(
    width=st.integers(1, 9000),
    height=st.integers(1, 9000),
    scale=st.sampled_from([56, 112, 224, 448]),
    most=st.integers(1, 12),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_properties_of_a_plan(width: int, height: int, scale: int, most: int) -> None:
    try:
        plan = plan_slices(width, height, _spec(scale, slices=most))
    except PictureError as error:
        assert "too thin" in str(error) and max(width / height, height / width) > 300
        return
    assert 1 <= len(plan.sizes) <= most + 1
    assert all(side > 0 and side % 14 == 0 for size in plan.sizes for side in size)
    assert all(w * h <= MAX_PATCHES * 14 * 14 for w, h in plan.sizes)
    assert (plan.grid is None) == (plan.cell is None) == (plan.refine is None)
    assert (plan.grid is None) == (width * height <= scale * scale or most == 1)
    if plan.grid is not None and plan.cell is not None:
        assert plan.refine == (plan.cell[0] * plan.grid[0], plan.cell[1] * plan.grid[1])


@pytest.mark.parametrize("size", [(1, 300_000), (300_000, 1), (10_000_000, 1), (1, 80_000_000), (9_000, 1)], ids=str)
def test_too_thin_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match=f"^receipt.png: {size[0]}x{size[1]} is too thin .*; crop it") as caught:
        plan_slices(*size, _spec(), "receipt.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (9460, 9459), (10**400, 10**400)], ids=lambda s: str(s)[:12])
def test_impossible_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match=r"expected at least 1x1|pixels, the limit is"):
        plan_slices(*size, _spec())


def test_every_shape_up_to_4000_to_1_is_taken() -> None:
    for long in (4000, 8000, 160_000):
        for size in ((long, long // 4000), (long // 4000, long)):
            plan_slices(*size, _spec())


# --- pixels, patches, feeds


CASES = {"tiny64": ["tiny64"], "sq448": ["sq448"], "wide800x600": ["wide800x600"], "multiturn": ["mt449x448"]}


@pytest.mark.parametrize("case", CASES)
def test_pixels_patches_and_ids_equal_the_official_ones(case: str) -> None:
    record, arrays = json.loads((GOLDEN / f"cases/{case}.json").read_text()), np.load(GOLDEN / f"cases/{case}.npz")
    slices = [s for image in CASES[case] for s in slice_picture(GOLDEN / f"images/{image}.png", _spec()).pixels]
    (batch,) = vision_feeds(slices, _spec(), 256)
    patches = batch.feeds["patches"]
    assert np.array_equal(batch.grids, arrays["tgt_sizes"])
    assert patches.shape == (len(slices), arrays["vit_pos_ids"].shape[1], 588)
    offsets = arrays["pixel_sample_offsets"]
    for i, (pixels, want) in enumerate(zip(slices, record["slices"], strict=True)):
        assert pixels.shape == (want["height"], want["width"], 3)
        assert _sha(pixels) == want["u8_hwc_sha256"]
        strip = _strip(patches[i, : want["patches"]])
        assert list(strip.shape) == want["strip_shape"]
        assert _sha(strip) == want["strip_f32_sha256"]
        assert np.array_equal(strip[:, ::5, ::197].ravel(), arrays["pixel_sample"][offsets[i] : offsets[i + 1]])
        assert not patches[i, want["patches"] :].any()
    assert np.array_equal(batch.feeds["position_ids"], np.tile(arrays["vit_pos_ids"][:1], (len(slices), 1)))
    assert not batch.feeds["attention_bias"].any()
    if "pixel_strip_full" in arrays:
        assert np.array_equal(_strip(patches[0]), arrays["pixel_strip_full"])


def test_normalized_bytes() -> None:
    pixels = np.zeros((14, 14, 3), np.uint8)
    pixels[0, 0] = 255, 128, 0
    assert patchify(pixels, _spec())[0, ::196].tolist() == [1.0, np.float32(0.003921628), -1.0]


def test_mean_and_std_are_per_channel() -> None:
    spec = PictureSpec(448, 14, 9, 96, "official", (0.1, 0.2, 0.3), (0.5, 1.0, 2.0), 70)
    patches = patchify(np.full((28, 14, 3), 255, np.uint8), spec)
    want = (np.float32(1) - np.array([0.1, 0.2, 0.3], np.float32)) / np.array([0.5, 1, 2], np.float32)
    assert np.array_equal(patches, np.tile(np.repeat(want, 196), (2, 1)))


def test_position_ids_equal_the_official_ones_for_1_to_1400_patches() -> None:
    recorded = np.load(GOLDEN / "extras/vision_pos_ids_n1_to_1400.npz")
    for i, n in enumerate(recorded["n"].tolist()):
        ids = position_ids(n)
        assert np.array_equal(ids, recorded["ids"][recorded["offsets"][i] : recorded["offsets"][i + 1]]), n
    assert ids.dtype == np.int64
    assert position_ids(1025)[205] == 13 and position_ids(1036)[222] == 14


def test_position_ids_equal_torch_beyond_the_recording() -> None:
    torch = pytest.importorskip("torch")
    boundaries = torch.arange(1 / 70, 1.0, 1 / 70)
    for n in range(1401, MAX_PATCHES + 1, 7):
        coordinates = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(n))
        assert np.array_equal(position_ids(n), torch.bucketize(coordinates, boundaries, right=True).numpy()), n


def test_position_ids_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        position_ids(64)[0] = 1


def test_resampler_position_embedding_equals_the_official_one() -> None:
    recorded = np.load(GOLDEN / "extras/resampler_pos_embed.npz")
    rows, cols, width = recorded["shape_regenerated"].tolist()
    table = resampler_pos_embed(rows, cols, width).reshape(rows, cols, width)
    for (y, x), values in zip(recorded["points_yx"], recorded["values"], strict=True):
        np.testing.assert_allclose(
            table[y, x], values, rtol=0, atol=4e-6
        )  # numpy's powers differ by an ulp without AVX-512, 69 times that in a sine
    wide = resampler_pos_embed(3, 4, 4096).reshape(3, 4, 4096)[2, 3, ::1024]
    np.testing.assert_allclose(wide, [0.14112, -0.98999, 0.90930, -0.41615], atol=1e-5)


def test_masked_feeds() -> None:
    slices = slice_picture(GOLDEN / "images/mt449x448.png", _spec()).pixels
    (batch,) = vision_feeds(slices, _spec(padding="masked"), 32)
    feeds = batch.feeds
    lengths = [rows * cols for rows, cols in batch.grids]
    assert lengths == [1024, 1035, 1035]
    for i, n in enumerate(lengths):
        assert np.array_equal(feeds["position_ids"][i, :n], position_ids(n))
        for bias in ("attention_bias", "key_bias"):
            assert not feeds[bias][i, :n].any() and (feeds[bias][i, n:] == MASK).all()
        assert np.array_equal(feeds["key_pos_embed"][i, :n], resampler_pos_embed(*batch.grids[i], 32))
        assert not feeds["key_pos_embed"][i, n:].any()


def test_official_feeds_mask_the_resampler_only() -> None:
    slices = slice_picture(GOLDEN / "images/mt449x448.png", _spec()).pixels
    (batch,) = vision_feeds(slices, _spec(), 32)
    assert not batch.feeds["attention_bias"].any()
    assert (batch.feeds["key_bias"] == np.float32(MASK)).sum(axis=1).tolist() == [11, 0, 0]
    assert (batch.feeds["position_ids"] == position_ids(1035)).all()


def test_feeds_per_slice() -> None:
    slices = slice_picture(GOLDEN / "images/mt449x448.png", _spec()).pixels
    batches = vision_feeds(slices, _spec(padding="per_slice"), 32)
    (together,) = vision_feeds(slices, _spec(padding="masked"), 32)
    assert [b.grids for b in batches] == [((32, 32),), ((45, 23),), ((45, 23),)]
    for i, batch in enumerate(batches):
        n = batch.feeds["patches"].shape[1]
        assert n == batch.grids[0][0] * batch.grids[0][1]
        for name, array in batch.feeds.items():
            assert np.array_equal(array[0], together.feeds[name][i, :n]), name
    assert vision_feeds([], _spec(), 32) == []


def test_feeds_have_the_types_of_the_graph() -> None:
    (batch,) = vision_feeds([np.zeros((28, 42, 3), np.uint8)], _spec(), 8)
    found = {name: (str(array.dtype), array.shape, array.flags.c_contiguous) for name, array in batch.feeds.items()}
    assert found == {
        "patches": ("float32", (1, 6, 588), True),
        "position_ids": ("int64", (1, 6), True),
        "attention_bias": ("float32", (1, 6), True),
        "key_bias": ("float32", (1, 6), True),
        "key_pos_embed": ("float32", (1, 6, 8), True),
    }


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 4), (0, 28, 3), (27, 28, 3), (28, 15, 3)], ids=str)
def test_bad_slices_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"^slice 1: "):
        vision_feeds([np.zeros((28, 28, 3), np.uint8), np.zeros(shape, np.uint8)], _spec(), 8)


def test_a_small_scale_cuts_into_equal_cells() -> None:
    image = _noise(300, 150)
    sliced = slice_picture(image, _spec(112))
    plan = sliced.plan
    assert plan.grid == (3, 1)
    assert plan.refine is not None and plan.cell is not None and plan.grid is not None
    refined = np.asarray(image.resize(plan.refine, Image.Resampling.BICUBIC))
    cols, rows = plan.grid
    joined = np.block([[[sliced.pixels[1 + y * cols + x]] for x in range(cols)] for y in range(rows)])
    assert np.array_equal(joined, refined)
