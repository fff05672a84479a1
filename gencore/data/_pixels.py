"""From the bytes of an image file to its pixels, upright and with 8 bits."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from gencore.data._formats import candidates, missing
from gencore.data._sources import MAX_PIXELS
from gencore.text import shown

if TYPE_CHECKING:
    from PIL import Image

_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112
_WIDTH, _HEIGHT = 256, 257  # tags of TIFF
_MOST = 65535


class BadImageError(Exception):
    """A file is no image that can be read; the message is the reason, without the name."""


Crop = Literal["center", "random", "none"]


class Fit(NamedTuple):
    """How pictures are made to have one size.

    Attributes:
        size: height and width, or None for those of the file.
        crop: ``center``: the shorter side becomes ``size``, the middle is kept; ``random``: the shorter side becomes
            ``size``, all is kept, for a window to be taken later; ``none``: both sides become ``size``.
        half: takes this half of the picture alone, 0 the left one and 1 the right one.
    """

    size: int | None = None
    crop: Crop = "center"
    half: Literal[0, 1] | None = None

    def shape(self, header: Header) -> tuple[int, int]:
        """Height and width of such a picture."""
        width, height = header.width if self.half is None else header.width // 2, header.height
        if self.size is None:
            return height, width
        if self.crop != "random":
            return self.size, self.size
        scale = self.size / min(width, height)
        return max(self.size, round(height * scale)), max(self.size, round(width * scale))

    def fault(self, header: Header) -> str | None:
        """What is wrong with a picture of this header, if anything is."""
        if self.half is not None and header.width % 2:
            return f"{header.width}x{header.height}, whose halves have no equal width"
        height, width = self.shape(header)
        return f"{width}x{height} once resized, over {MAX_PIXELS} pixels" if width * height > MAX_PIXELS else None


class Header(NamedTuple):
    """What is known of an image before it is decoded."""

    width: int
    height: int
    gray: bool


def header(stream: IO[bytes], name: str) -> Header:
    """The size, as it is seen upright, and whether it is gray.

    Raises:
        BadImageError: it is no image that can be read.
    """
    with _identified(stream, name) as image:
        width, height = _upright_size(image, stream)
        if width * height == 0:
            raise BadImageError(f"{width}x{height}, without any pixel")
        if width * height > MAX_PIXELS:
            raise BadImageError(f"{width}x{height}, over {MAX_PIXELS} pixels")
        if image.mode == "F":
            raise BadImageError("floating point numbers, whose range is not known; convert it to 8 or 16 bits")
        return Header(width, height, image.mode in _GRAY_MODES)


def decoded(stream: IO[bytes], name: str, channels: int, fit: Fit, shape: tuple[int, int]) -> np.ndarray:
    """The pixels (channels, height, width), uint8, with 1 channel or 3.

    Args:
        fit: how they are resized.
        shape: height and width, as ``fit`` has them for this image.

    Raises:
        BadImageError: they are damaged or truncated, or of another shape.
    """
    from PIL import Image, ImageOps

    height, width = shape
    with _identified(io.BytesIO(stream.read()), name) as image:
        # A JPEG is decoded at half its size, or a quarter, as long as that is twice what is asked for. The middle
        # between two halves may then lie within a pixel.
        if fit.size is not None and fit.half is None:
            scale = 2 * fit.size / min(image.size)
            image.draft(None, (round(image.width * scale), round(image.height * scale)))
        image.load()
        # TIFF's own decoder has applied and removed the orientation.
        picture = _eight_bits(_upright(image), channels)
        if fit.half is not None:
            middle = picture.width // 2
            picture = picture.crop((middle * fit.half, 0, middle * (fit.half + 1), picture.height))
        if fit.size is not None and fit.crop == "none":
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        elif fit.size is not None:
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
        if picture.size != (width, height):
            raise BadImageError(f"{picture.width}x{picture.height} once decoded, not {width}x{height}")
        pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


@contextlib.contextmanager
def _identified(stream: IO[bytes], name: str) -> Iterator[Image.Image]:
    """The image, not yet decoded. Whatever goes wrong in the body is the file's fault, except too little memory."""
    from PIL import Image, UnidentifiedImageError

    try:
        # Pillow warns of large images and odd metadata; what matters of it is an error here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=candidates(name)) as image:
                yield image
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        if format := missing(name):
            reason = f"{format}, which this installation of Pillow cannot decode"
        else:
            stream.seek(0)
            reason = "no image of a format that is read, or damaged" if stream.read(1) else "an empty file"
        raise BadImageError(reason) from error
    except Exception as error:
        # Damaged files make Pillow's decoders raise nearly anything.
        raise BadImageError(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """One line that says what went wrong with a file."""
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return shown(" ".join(said.split())) or type(error).__name__


def _upright_size(image: Image.Image, stream: IO[bytes]) -> tuple[int, int]:
    """Width and height once the orientation is applied."""
    width, height = image.size
    if image.format == "TIFF":
        # The size that Pillow says is the one before or the one after, as its version may be.
        width, height = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]  # type: ignore[attr-defined]
    if width == height:
        return width, height
    if image.format == "PNG" and _text_behind_pixels(stream):
        image.load()
    return (height, width) if _orientation(image) > 4 else (width, height)


def _text_behind_pixels(stream: IO[bytes]) -> bool:
    """Whether a PNG has chunks behind its pixels that may hold an orientation; if not, the stream is at its end."""
    before = stream.tell()
    stream.seek(8)
    pixels = False
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        pixels = pixels or kind == b"IDAT"
        if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            stream.seek(before)
            return True
        stream.seek(length + 4, io.SEEK_CUR)
    return False


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8 as EXIF says it; 1 where nothing, or nothing that can be read, says so."""
    from PIL import Image

    try:
        # Not the method of PNG, which decodes the pixels to see what is behind them.
        value = Image.Image.getexif(image).get(_ORIENTATION)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image.Image) -> Image.Image:
    """The decoded image as it is to be seen. Pillow has turned a TIFF when decoding, and forgotten its orientation."""
    from PIL import Image

    turn = Image.Transpose
    turns = (
        turn.FLIP_LEFT_RIGHT,
        turn.ROTATE_180,
        turn.FLIP_TOP_BOTTOM,
        turn.TRANSPOSE,
        turn.ROTATE_270,
        turn.TRANSVERSE,
        turn.ROTATE_90,
    )
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(turns[orientation - 2])


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """The picture in 8-bit gray or RGB; transparent parts are laid on white."""
    from PIL import Image

    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        low, high = int(wide.min()), int(wide.max())
        if low < 0 or high > _MOST:
            raise BadImageError(f"integers from {low} to {high}, where 8 or 16 bits can be read")
        transparent = image.info.get("transparency")
        narrow = (wide + 128) // 257
        if isinstance(transparent, int):
            narrow[wide == transparent] = 255
        image = Image.fromarray(narrow.astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")
