"""Opening pictures of every kind, and every way in which a picture can be bad."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lensc.backends.bundle import PictureSpec
from lensc.backends.errors import PictureError
from lensc.runtime import picture_source
from lensc.runtime.picture import MAX_PIXELS, open_picture, slice_picture
from lensc.runtime.picture_source import check_picture

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = PictureSpec(448, 14, 9, 96, "official", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 70)


def _sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("file", json.loads((GOLDEN / "extras/image_modes.json").read_text()))
def test_modes_equal_the_official_conversion(file: str) -> None:
    want = json.loads((GOLDEN / "extras/image_modes.json").read_text())[file]
    picture = open_picture(GOLDEN / "images" / file)
    assert list(picture.size) == want["size_wh"]
    (pixels,) = slice_picture(picture, SPEC).pixels
    assert _sha(pixels) == want["u8_hwc_sha256"]
    assert pixels[0, 0].tolist() == want["corner_rgb"]


NOTES = {
    "exif_orientation6.png": ("EXIF orientation 6 ignored",),
    "mode_1.png": ("mode 1 converted to RGB",),
    "mode_LA.png": ("alpha dropped", "mode LA converted to RGB"),
    "mode_P.png": ("mode P converted to RGB",),
    "mode_RGBA.png": ("alpha dropped", "mode RGBA converted to RGB"),
    "tiny64.png": (),
}


@pytest.mark.parametrize("file", NOTES)
def test_notes_say_what_was_done(file: str) -> None:
    assert open_picture(GOLDEN / "images" / file).notes == NOTES[file]


def test_notes_say_how_a_picture_was_cut() -> None:
    notes = slice_picture(GOLDEN / "images/mt449x448.png", SPEC).notes
    assert notes == ("449x448 resized to 448x448", "and to 644x630, cut into 2 columns x 1 rows")


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_to_8_bits(file_format: str) -> None:
    wide = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
    picture = open_picture(_encode(Image.fromarray(wide), file_format))
    assert picture.notes == ("16-bit grey scaled to 8 bits",)
    want = np.round(wide / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(picture.image), np.repeat(want[..., None], 3, axis=2))


def test_16_bit_colour_keeps_the_high_byte() -> None:
    row = b"\0" + struct.pack(">3H", 0x12FF, 0x8000, 0xFFFF)
    picture = open_picture(_png(1, 1, zlib.compress(row), bits=16))
    assert picture.notes == ("16-bit channels: only their high byte is used",)
    assert picture.image.getpixel((0, 0)) == (0x12, 0x80, 0xFF)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_used(file_format: str) -> None:
    first, second = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 255))
    options = {"lossless": True} if file_format == "WEBP" else {}
    picture = open_picture(_encode(first, file_format, save_all=True, append_images=[second], **options))
    assert "several frames: only the first is used" in picture.notes
    assert np.array_equal(np.asarray(picture.image), np.asarray(first))


def test_cmyk() -> None:
    image = Image.new("CMYK", (8, 8), (10, 200, 30, 40))
    picture = open_picture(_encode(image, "TIFF"))
    assert picture.notes == ("mode CMYK converted to RGB",)
    assert picture.image.getpixel((0, 0)) == image.convert("RGB").getpixel((0, 0)) != (10, 200, 30)


def test_transparent_palette_is_dropped_without_a_warning() -> None:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0)).convert("P")
    picture = open_picture(_encode(image, "PNG", transparency=bytes([0, 128])))
    assert picture.notes == ("alpha dropped", "mode P converted to RGB")
    assert picture.image.getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG", "JPEG2000", "ICO"])
def test_every_format_is_sliced(file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = Image.new("RGB", (64, 64), (200, 100, 50))
    (pixels,) = slice_picture(_encode(image, file_format, **options), SPEC).pixels
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 2  # JPEG rounds colours


def test_path_bytes_image_and_array_give_the_same_pixels() -> None:
    path = GOLDEN / "images/tiny64.png"
    with Image.open(path) as image:
        sources = [path, str(path), path.read_bytes(), image.copy(), np.asarray(image)]
    hashes = {_sha(slice_picture(source, SPEC).pixels[0]) for source in sources}
    assert len(hashes) == 1
    assert open_picture(open_picture(path)).size == (64, 64)


def test_an_image_that_is_passed_in_is_left_alone() -> None:
    image = Image.new("RGBA", (8, 8), (1, 2, 3, 4))
    array = np.full((8, 8, 3), 7, np.uint8)
    slice_picture(image, SPEC)
    slice_picture(array, SPEC)
    assert image.mode == "RGBA" and image.size == (8, 8) and (array == 7).all()


# --- bad pictures


def _png(width: int, height: int, data: bytes, bits: int = 8) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _refusal(source: Any) -> str:
    with pytest.raises(PictureError) as caught:
        open_picture(source)
    message = str(caught.value)
    assert "\n" not in message and message
    return message


def _refused_path(source: str | Path) -> str:
    """As `_refusal`; nothing has to be decoded to know it."""
    message = _refusal(source)
    with pytest.raises(PictureError) as caught:
        check_picture(source)
    assert str(caught.value) == message
    return message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.txt").write_text("shopping: milk, bread")
    assert _refused_path(tmp_path / "none.png").endswith("none.png: no such file; expected a picture")
    assert _refused_path(tmp_path).endswith("is a folder; expected a picture file")
    assert _refused_path(tmp_path / "empty.png").endswith("the file is empty; expected a picture")
    assert "notes.txt: not a picture" in _refused_path(tmp_path / "notes.txt")
    assert "is not a regular file" in _refused_path("/dev/zero")
    assert "embedded null byte" in _refused_path("a\0b")
    assert "cannot be read (File name too long)" in _refused_path("x" * 5000)
    assert "not fetched from the network" in _refused_path("https://example.org/cat.png")


@pytest.mark.parametrize(
    ("source", "want"),
    [
        (b"", "0 bytes"),
        (b"\0" * 100, "not a picture"),
        (None, "got NoneType"),
        (["a.png"], "got list"),
        (np.zeros((4, 4), np.uint8), r"array uint8\[4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), r"array float32\[4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "size 4x0"),
        (Image.new("RGB", (0, 4)), "size 0x4"),
        (Image.new("F", (4, 4)), "floating-point pixels"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "32-bit pixels 70000...70000"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), "32-bit pixels -1...-1"),
        (Image.new("La", (4, 4)), "mode La cannot become RGB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_things_that_are_no_picture(source: Any, want: str) -> None:
    assert re.search(want, _refusal(source))


def test_postscript_is_never_run() -> None:
    assert "not a picture" in _refusal(_encode(Image.new("RGB", (8, 8)), "EPS"))


@pytest.mark.parametrize("side", [9_500, 13_000, 60_000])
def test_decompression_bomb_is_refused_from_its_header(side: int) -> None:
    message = _refusal(_png(side, side, zlib.compress(b"\0" * 1000)))
    assert "scale" in message and ("pixels, the limit is" in message or "decompression bomb" in message)


def test_the_limit_holds_for_pillows_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "60000x60000 has 3,600,000,000 pixels, the limit is 89,478,485" in _refusal(_png(60_000, 60_000, b""))
    monkeypatch.setattr(picture_source, "MAX_PIXELS", 99)
    assert "10x10" in _refusal(Image.new("RGB", (10, 10)))
    assert MAX_PIXELS == 89_478_485


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_picture_is_refused(file_format: str) -> None:
    data = _encode(_noise(60, 40), file_format)
    for keep in (0.02, 0.3, 0.6, 0.9):
        message = _refusal(data[: int(len(data) * keep)])
        assert "truncated or damaged" in message or "not a picture" in message


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "JPEG2000"])
def test_a_damaged_picture_never_gives_another_error(file_format: str) -> None:
    data, draw = _encode(_noise(33, 32), file_format), random.Random(7)
    opened = 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 3, 30))):
            damaged[draw.randrange(min(len(data), draw.choice((40, 400, len(data)))))] = draw.randrange(256)
        try:
            open_picture(bytes(damaged))
            opened += 1
        except PictureError as error:
            assert "\n" not in str(error)
    assert opened < 60


@pytest.mark.parametrize("block", [b"II*\0\xff\xff\xff\xff" + b"\1" * 20, b"no TIFF header"], ids=["offset", "header"])
def test_a_damaged_exif_block_is_noted(block: bytes) -> None:
    notes = open_picture(_encode(Image.new("RGB", (8, 8)), "PNG", exif=b"Exif\0\0" + block)).notes
    assert "EXIF" in notes[0]
