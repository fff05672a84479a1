"""A folder or a zip archive of images, class per folder: ``images:some/folder`` or ``images:archive.zip``.

Layouts, with any one folder around all of it::

    cat/1.png dog/2.png                        classes cat and dog; a fixed tenth of each class is the test split
    train/cat/1.png ... test/cat/7.png ...     classes and splits as the folders say
    1.png 2.png                                no classes (also below train/ and test/, or all in one folder)

Where there is no ``test`` beside ``train``, ``val``, ``valid`` or ``validation`` is the test split; beside ``test``
they are left out. Any other folder beside ``train`` is refused: it might be a class or a split.

Every image must have the same size. If all are gray the data set has one channel, else three. An archive is read in
place, never extracted. The split of a layout without train and test goes by a hash of the file names, so it does not
depend on the order of the file system, nor on where the folder lies.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from gencore.data.base import MAX_BYTES, DataError, DatasetPlugin, ImageDataset, Split

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")

# An archive's member beyond these is no picture of a data set but an attack or an accident.
_MAX_FILE_BYTES = 256 << 20
_MAX_RATIO = 1000
_MAX_PIXELS = 1 << 26

# What may stand beside the folder "train"; the first that is there is the test split.
_TEST_FOLDERS = ("test", "val", "valid", "validation")

_GRAY_MODES = ("1", "L", "LA")
_COLOR_MODES = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "RGBX", "La", "RGBa")


class _Source(NamedTuple):
    """Where images are read from: the names of its files, and how to read one."""

    where: Path
    names: list[PurePosixPath]
    read: Callable[[PurePosixPath], bytes]


class _Item(NamedTuple):
    name: PurePosixPath
    class_name: str | None


def load_images(path: Path, split: Split, *, labelled: bool = True) -> ImageDataset:
    """The images of a folder or zip archive.

    Args:
        path: the folder or the archive.
        split: ``"train"`` or ``"test"``.
        labelled: whether folders are classes; if not, all images are one data set without labels.

    Raises:
        DataError: nothing to read, two sizes of image, a file that is no image; the message names the files.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError("data set images needs Pillow: pip install 'gencore[train]'") from error
    if path.is_dir():
        return _load(_folder(path), split, labelled)
    if not path.exists():
        raise DataError(f"data set images: {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise DataError(f"data set images: {path} is neither a folder nor a zip archive")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"data set images: {path} is a damaged zip archive: {error}") from error
    with archive:
        return _load(_archive(path, archive), split, labelled)


def _load(source: _Source, split: Split, labelled: bool) -> ImageDataset:
    splits = _splits(source, _without_wrapper(source))
    items = splits[split]
    if not items:
        raise DataError(f"data set images: {source.where} holds no images to {split} with")
    class_names = sorted({item.class_name for both in splits.values() for item in both if item.class_name is not None})
    # The size and the number of channels are those of all images, so that both splits agree whichever is loaded.
    everything = [item.name for both in splits.values() for item in both]
    height, width, channels = _common_shape(source, everything)
    if len(items) * channels * height * width > MAX_BYTES:
        raise DataError(
            f"data set images: {len(items)} images of {height}x{width} need {len(items) * channels * height * width} "
            f"bytes; images are kept in memory, at most {MAX_BYTES} bytes of them"
        )
    pixels = np.empty((len(items), channels, height, width), dtype=np.uint8)
    for row, item in zip(pixels, items, strict=True):
        with _opened(source, item.name) as image:
            array = np.asarray(_converted(image, channels))
            row[...] = array[None] if channels == 1 else array.transpose(2, 0, 1)
    labels = None
    if labelled and len(class_names) > 1:
        index = {name: i for i, name in enumerate(class_names)}
        labels = torch.tensor([index[item.class_name] for item in items if item.class_name is not None])
    name = source.where.stem
    return ImageDataset(name, split, torch.from_numpy(pixels), labels, class_names if labels is not None else ())


def _folder(path: Path) -> _Source:
    names, seen = [], set()
    for parent, folders, files in os.walk(path, followlinks=True):
        # A link to a folder above would be walked for ever.
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        relative = PurePosixPath(Path(parent).relative_to(path).as_posix())
        names += [relative / name for name in files]

    def read(name: PurePosixPath) -> bytes:
        return (path / name).read_bytes()

    return _Source(path, _pictures(names), read)


def _archive(path: Path, archive: zipfile.ZipFile) -> _Source:
    members = {PurePosixPath(info.filename): info for info in archive.infolist() if not info.is_dir()}

    def read(name: PurePosixPath) -> bytes:
        info = members[name]
        if info.file_size > _MAX_FILE_BYTES or info.file_size > _MAX_RATIO * max(info.compress_size, 1024):
            raise DataError(
                f"{path}: {name} claims to unpack {info.compress_size} bytes to {info.file_size}; no image is like that"
            )
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            # RuntimeError: the member is encrypted.
            raise DataError(f"{path}: cannot unpack {name}: {error}") from error

    return _Source(path, _pictures(list(members)), read)


def _pictures(names: list[PurePosixPath]) -> list[PurePosixPath]:
    """The image files, without what file managers leave behind (hidden files, ``__MACOSX``), in one order."""
    return sorted(
        name
        for name in names
        if name.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
    )


def _without_wrapper(source: _Source) -> dict[PurePosixPath, tuple[str, ...]]:
    """Every image's path parts below the one folder, if any, that holds all classes or splits."""
    if not source.names:
        raise DataError(f"data set images: {source.where} holds no images ({', '.join(SUFFIXES)})")
    parts = {name: name.parts for name in source.names}
    while len({part[0] for part in parts.values()}) == 1 and min(map(len, parts.values())) > 2:
        parts = {name: part[1:] for name, part in parts.items()}
    return parts


def _splits(source: _Source, parts: dict[PurePosixPath, tuple[str, ...]]) -> dict[Split, list[_Item]]:
    test_folder = _test_folder(source, {part[0] if len(part) > 1 else "" for part in parts.values()})
    if test_folder is not None:
        found: dict[Split, list[_Item]] = {}
        halves: dict[Split, str] = {"train": "train", "test": test_folder}
        for half, folder in halves.items():
            inside = {name: part[1:] for name, part in parts.items() if part[0] == folder}
            found[half] = _classed(source, inside)
        flat = [folder for half, folder in halves.items() if found[half][0].class_name is None]
        if len(flat) == 1:
            raise DataError(f"data set images: {source.where} has class folders in one split, but not in {flat[0]}")
        return found
    by_class: dict[str | None, list[_Item]] = {}
    for item in _classed(source, parts):
        by_class.setdefault(item.class_name, []).append(item)
    train, test = [], []
    for members in by_class.values():
        hashed = sorted(members, key=lambda item: hashlib.blake2b("/".join(parts[item.name]).encode()).digest())
        count = max(1, round(len(hashed) / 10)) if len(hashed) > 1 else 0
        test += sorted(hashed[:count])
        train += sorted(hashed[count:])
    return {"train": train, "test": test}


def _test_folder(source: _Source, tops: set[str]) -> str | None:
    """The folder of the test images, given those at the top; None if these are classes ("" is an image's own place)."""
    if "train" not in tops or "" in tops:
        return None
    others = sorted(tops - {"train", *_TEST_FOLDERS})
    if others:
        raise DataError(
            f"data set images: {source.where} has folders beside train that may be classes or splits: "
            f"{', '.join(others)}; beside train there may be {', '.join(_TEST_FOLDERS)}"
        )
    return next((folder for folder in _TEST_FOLDERS if folder in tops), None)


def _classed(source: _Source, parts: dict[PurePosixPath, tuple[str, ...]]) -> list[_Item]:
    flat = [name for name, part in parts.items() if len(part) == 1]
    if flat and len(flat) < len(parts):
        raise DataError(f"data set images: {source.where}: {flat[0]} lies beside the class folders, not in one of them")
    return [_Item(name, None if flat else part[0]) for name, part in parts.items()]


def _common_shape(source: _Source, names: list[PurePosixPath]) -> tuple[int, int, int]:
    """Height, width and channels of all images, from their headers."""
    size: tuple[int, int] | None = None
    channels = 1
    for name in names:
        with _opened(source, name) as image:
            if image.mode not in _GRAY_MODES + _COLOR_MODES:
                raise DataError(f"{source.where}: {name} has mode {image.mode}, which is not 8 bits per channel")
            if size is None:
                size, first = image.size, name
            elif image.size != size:
                raise DataError(
                    f"{source.where}: all images must have one size, but {first} is {size[0]}x{size[1]} and {name} is "
                    f"{image.size[0]}x{image.size[1]} (width x height)"
                )
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(f"{source.where}: {name} has {image.width}x{image.height} pixels, over {_MAX_PIXELS}")
            if image.mode not in _GRAY_MODES:
                channels = 3
    assert size is not None  # names is never empty
    return size[1], size[0], channels


@contextmanager
def _opened(source: _Source, name: PurePosixPath) -> Iterator[Image.Image]:
    """The image, not yet decoded; whatever goes wrong with it in the body is a DataError that names it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source.read(name))) as image:
            yield image
    except UnidentifiedImageError as error:
        raise DataError(f"{source.where}: {name} is not an image, or is damaged") from error
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow raises a SyntaxError for a broken PNG.
        raise DataError(f"{source.where}: cannot read {name}: {error}") from error


def _converted(image: Image.Image, channels: int) -> Image.Image:
    """The picture in 8-bit gray or RGB; transparent parts are laid on white."""
    from PIL import Image

    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


plugin = DatasetPlugin(
    name="images",
    load=load_images,
    needs_path=True,
    summary="a folder or zip archive of images, class per folder: images:PATH",
)
