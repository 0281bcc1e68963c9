"""Open a picture from anywhere and turn it into 8-bit RGB, saying in short notes what was changed on the way.

What happens to each kind of picture (the official model converts with Pillow's `convert("RGB")`; where this file
departs from that, it says so):

- grey, palette, 1-bit, CMYK, YCbCr and the like: converted to RGB;
- alpha and transparent colours: dropped, not blended, so the colour stored under a transparent pixel becomes visible;
- EXIF orientation: ignored, as officially; rotate before (`PIL.ImageOps.exif_transpose`) if that is wanted;
- 16-bit grey: scaled to 8 bits, round(v / 257). Officially such values are clipped at 255, which whitens most pictures;
- 16-bit colour: Pillow's decoder keeps the high byte of each channel;
- 32-bit integers: taken as 16-bit values if they lie in 0...65535, as Pillow stores 16-bit PGM so; otherwise refused;
- floats: refused, because nothing says whether they end at 1, 255 or elsewhere;
- animated or many-paged: the first frame (of a PIL image: the frame it stands at);
- embedded colour profiles: ignored, as officially.

Only raster formats that Pillow decodes itself are opened. Others are refused although Pillow knows them: EPS, for one,
would start Ghostscript on the file.
"""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from lensc.backends.errors import PictureError

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

T = TypeVar("T")

PictureSource = str | Path | bytes | Image.Image | npt.NDArray[Any]

MAX_PIXELS = 89_478_485
"""Largest picture, from the size in its header. It is where Pillow starts to warn (256 MiB as 24-bit RGB); a decoded
picture of this size takes 358 MB, and the model never looks at more than a few megapixels of it."""

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF", "ICO")
"""What is opened. The first six come first because Pillow loads them without importing all its other plugins."""

_EXIF_ORIENTATION = 0x0112
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclass(frozen=True, eq=False)
class RGBPicture:
    """A decoded picture: `image` has mode RGB and original size, `notes` say what was done to get there."""

    image: Image.Image
    name: str
    """The path, or `picture` if it came without one: for messages."""
    notes: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.size

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height


def open_picture(source: PictureSource | RGBPicture) -> RGBPicture:
    """Decode `source` (a path, the bytes of a file, a PIL image or `uint8[height, width, 3]`) into an RGB picture.

    A PIL image or array that is passed in is not modified; an RGB image is not copied either. Raises PictureError, one
    line that names the picture, for what is missing, empty, damaged, too large, not a picture or of a refused kind.
    """
    if isinstance(source, RGBPicture):
        return source
    if isinstance(source, Image.Image):
        return _to_rgb(source, "picture")
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "picture")
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) == 0:
            raise PictureError("picture: 0 bytes; expected the contents of a picture file")
        return _decode(io.BytesIO(source), "picture")
    if not isinstance(source, str | Path):
        raise PictureError(
            f"picture: got {type(source).__name__}; expected a path, bytes, a PIL image or uint8[height, width, 3]"
        )
    return _at_path(source, _decode)


def check_picture(source: str | Path) -> None:
    """Raise what `open_picture` would of a file that is not there, is no picture, or is too large: nothing is decoded."""
    _at_path(source, _check_header)


def check_size(width: int, height: int, name: str = "picture") -> None:
    """Raise PictureError if a picture of this size is empty or larger than MAX_PIXELS."""
    if width < 1 or height < 1:
        raise PictureError(f"{name}: size {width}x{height}; expected at least 1x1 pixels")
    if width * height > MAX_PIXELS:
        raise PictureError(
            f"{name}: {width}x{height} has {width * height:,} pixels, the limit is {MAX_PIXELS:,}; scale it down first"
        )


def _at_path(source: str | Path, read: Callable[[Any, str], T]) -> T:
    """What `read` makes of the open file at `source`, and its name."""
    name = str(source)
    if name.startswith(("http://", "https://")):
        raise PictureError(f"{name}: pictures are not fetched from the network; download it and pass the file")
    try:
        info = Path(source).stat()
        if stat.S_ISDIR(info.st_mode):
            raise PictureError(f"{name}: is a folder; expected a picture file")
        if not stat.S_ISREG(info.st_mode):
            raise PictureError(f"{name}: is not a regular file; expected a picture file")
        if info.st_size == 0:
            raise PictureError(f"{name}: the file is empty; expected a picture")
        with open(source, "rb") as file:
            return read(file, name)
    except FileNotFoundError as error:
        raise PictureError(f"{name}: no such file; expected a picture") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{name!r}: cannot be read ({reason}); expected a picture file") from error


def _decode(file: Any, name: str) -> RGBPicture:
    """Decode an open binary file. The size is checked from the header before any pixel is decoded."""
    with _reading(name) as caught, _identified(file, name) as image:
        notes: list[str] = []
        if getattr(image, "is_animated", False):
            notes.append("several frames: only the first is used")
        if any(";16" in str(tile[3]) for tile in image.tile) and not image.mode.startswith("I"):
            notes.append("16-bit channels: only their high byte is used")
        picture = _to_rgb(image, name)
    return RGBPicture(picture.image, name, (*notes, *picture.notes, *caught))


def _check_header(file: Any, name: str) -> None:
    with _reading(name):
        _identified(file, name).close()


def _identified(file: Any, name: str) -> ImageFile:
    """The picture in an open file, of which the header was read and the size checked."""
    Image.preinit()
    try:
        opened = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise PictureError(f"{name}: not a picture, or its header is damaged; expected {', '.join(FORMATS)}") from error
    check_size(*opened.size, name)
    return opened


@contextmanager
def _reading(name: str) -> Iterator[list[str]]:
    """Run Pillow's decoders: its errors become PictureError, its warnings notes in the list that is yielded."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield messages
        except PictureError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise PictureError(f"{name}: {_first_line(error)}; scale the picture down first") from error
        except MemoryError as error:
            raise PictureError(f"{name}: not enough memory to decode it; scale the picture down first") from error
        except Exception as error:  # Pillow's plugins raise almost every built-in type on damaged data
            raise PictureError(
                f"{name}: truncated or damaged ({_first_line(error)}); expected a complete picture file"
            ) from error
        messages.extend(dict.fromkeys(f"decoder: {_first_line(w.message)}" for w in caught))


def _to_rgb(image: Image.Image, name: str) -> RGBPicture:
    check_size(*image.size, name)
    with _reading(name) as caught:
        image.load()
    check_size(*image.size, name)  # an icon's real size is known only here
    notes = list(caught)
    frame = image.tell() if getattr(image, "is_animated", False) else 0
    if frame:
        notes.append(f"several frames: frame {frame} is used")
    notes += _exif_note(image, name)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        notes.append("alpha dropped")
    if image.mode == "RGB":
        return RGBPicture(image, name, tuple(notes))
    if image.mode == "F":
        raise PictureError(f"{name}: floating-point pixels have no known range; convert it to 8 or 16 bits first")
    if image.mode.startswith("I"):
        notes.append("16-bit grey scaled to 8 bits")
        image = _grey16_to_grey8(image, name)
    else:
        notes.append(f"mode {image.mode} converted to RGB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of alpha in a palette; a note says that alpha is dropped
            rgb = image.convert("RGB")
    except ValueError as error:
        raise PictureError(f"{name}: mode {image.mode} cannot become RGB; convert it to RGB first") from error
    return RGBPicture(rgb, name, tuple(notes))


def _grey16_to_grey8(image: Image.Image, name: str) -> Image.Image:
    with _reading(name):
        wide = np.asarray(image)
    low, high = int(wide.min()), int(wide.max())
    if low < 0 or high > 65535:
        raise PictureError(f"{name}: 32-bit pixels {low}...{high} have no known range; convert it to 8 bits first")
    grey = wide.astype(np.uint32)
    grey += 128
    grey //= 257  # together round(v / 257), which takes 65535 to 255
    return Image.fromarray(grey.astype(np.uint8))


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise PictureError(f"picture: array {array.dtype}{list(array.shape)}; expected uint8[height, width, 3]")
    check_size(array.shape[1], array.shape[0])
    return Image.fromarray(np.ascontiguousarray(array))


def _exif_note(image: Image.Image, name: str) -> list[str]:
    try:
        with _reading(name) as caught:
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except PictureError:
        return ["damaged EXIF block ignored"]
    return caught if orientation == 1 else [*caught, f"EXIF orientation {orientation} ignored"]


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip().rstrip(".")
