"""The formats of images that are read, and the suffixes of their names."""

from __future__ import annotations

import functools
import posixpath

# The formats of Pillow that pictures of data sets come in, and none that starts another program (PostScript starts
# Ghostscript) or has no decoder of its own. The table does not depend on the version of Pillow: a file whose decoder is
# missing is named, not passed over.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "QOI": (".qoi",),
    "ICO": (".ico",),
    "PCX": (".pcx",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
_BY_SUFFIX = {suffix: format for format, suffixes in FORMATS.items() for suffix in suffixes}
# These have no first bytes of their own: such a file is known by its name alone.
_WITHOUT_SIGNATURE = ("TGA",)
# Those that Pillow can be built without, and how it calls them then.
_FEATURES = {"AVIF": "avif", "WEBP": "webp"}


def suffix(name: str) -> str:
    """``".png"`` of ``a/b.PNG``; ``""`` where there is none."""
    return posixpath.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether the name ends like that of an image."""
    return suffix(name) in _BY_SUFFIX


def candidates(name: str) -> list[str]:
    """The formats that a file of this name may have: its content says which, whatever its suffix."""
    own = _BY_SUFFIX.get(suffix(name))
    return [format for format in _readable() if format not in _WITHOUT_SIGNATURE or format == own]


def missing(name: str) -> str | None:
    """The format that the name's suffix stands for, if this Pillow has no decoder of it."""
    own = _BY_SUFFIX.get(suffix(name))
    return own if own not in _readable() else None


@functools.lru_cache(maxsize=1)
def _readable() -> tuple[str, ...]:
    from PIL import Image, features

    Image.init()
    built = {format for format, feature in _FEATURES.items() if features.check(feature)}
    return tuple(f for f in FORMATS if f in Image.OPEN and (f not in _FEATURES or f in built))
