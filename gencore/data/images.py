"""A folder or a zip archive of images, class per folder: ``images:some/folder`` or ``images:archive.zip``.

Layouts, with any one folder around all of it::

    cat/1.png dog/2.png                        classes cat and dog; a fixed tenth of each class is the test split
    train/cat/1.png ... test/cat/7.png ...     classes and splits as the folders say
    1.png 2.png                                no classes (also below train/ and test/, or all in one folder)

Splits are called train or training, test or testing, and val, valid, validation or dev, in any case. Where there is no
test split beside train, validation is; beside test it is skipped. Folders that look like splits but are called
otherwise are refused, and so are others beside train, which may be classes or splits; but where all folders hold images
alone and none may be a test split, train is a class, as bus and car are. Folders inside a class belong to it.

Every image must have the same size, or is given it by the setting ``size``. If all are gray the data set has one
channel, else three. An archive is read in place, never extracted. The split of a layout without train and test goes by
a hash of the file names, so it does not depend on the order of the file system, nor on where the folder lies.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from gencore.config import Config, field
from gencore.data._layout import Item, Layout, laid_out
from gencore.data._pixels import BadImageError, Header, decoded, header, reason_of
from gencore.data._sources import Source, opened
from gencore.data.base import MAX_BYTES, DataError, DatasetPlugin, ImageDataset, MissingSplitError, Split, progress
from gencore.progress import Progress
from gencore.text import LISTED, NAMED, counted, listed, shown

_Read = TypeVar("_Read")

# What the images of a split are called.
_KIND: dict[Split, str] = {"train": "training image", "test": "test image"}


@dataclass(frozen=True)
class ImageSettings(Config):
    """How images are read."""

    size: int | None = field(
        None, ge=1, le=8192, doc="resize the shorter side to this and crop the middle, so that images may have any size"
    )
    skip_bad: bool = field(False, doc="skip images that cannot be read, and say how many")


class _Survey(NamedTuple):
    """What is known before anything is decoded: of both splits, so that they agree whichever is loaded."""

    layout: Layout
    headers: dict[str, Header]
    bad: dict[str, str]


def load_images(
    path: Path, split: Split, settings: ImageSettings | None = None, *, labelled: bool = True
) -> ImageDataset:
    """The images of a folder or zip archive.

    Args:
        path: the folder or the archive.
        split: ``"train"`` or ``"test"``.
        settings: a common size, and whether images that cannot be read are skipped.
        labelled: whether folders are classes; if not, all images are one data set without labels.

    Raises:
        MissingSplitError: no image is of this split, or none that can be read.
        DataError: nothing to read, two sizes of image, files that are no images; the message names the files.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError("data set images needs Pillow: pip install 'gencore[train]'") from error
    # Pillow warns of large images and odd metadata; what matters of it is an error here.
    with warnings.catch_warnings(), opened(path) as source:
        warnings.simplefilter("ignore")
        return _load(source, split, settings or ImageSettings(), labelled)


def _load(source: Source, split: Split, settings: ImageSettings, labelled: bool) -> ImageDataset:
    survey = _surveyed(source)
    if survey.bad and not settings.skip_bad:
        raise _refusal(source, survey, survey.bad, decoded_already=())
    items = survey.layout.splits[split]
    if not items:
        raise source.error(f" has no {_KIND[split]}s", kind=MissingSplitError)
    shape = _common_shape(source, survey, settings.size)
    readable = [item for item in items if item.name not in survey.bad]
    pixels, kept, bad = _decoded(source, split, readable, shape, settings.size)
    if bad and not settings.skip_bad:
        raise _refusal(source, survey, bad, decoded_already={item.name for item in readable})
    bad = {**{item.name: survey.bad[item.name] for item in items if item.name in survey.bad}, **bad}
    class_names = survey.layout.class_names if labelled and len(survey.layout.class_names) > 1 else []
    if lost := _lost(survey, split, kept, class_names):
        kind = DataError if kept else MissingSplitError
        raise source.error(f": {lost} can be read: {listed(bad, LISTED)}", bad, kind)
    labels = None
    if class_names:
        index = {name: i for i, name in enumerate(class_names)}
        labels = torch.tensor([index[item.class_name] for item in kept if item.class_name is not None])
    notes = list(survey.layout.notes)
    if bad:
        notes.append(f"skipped {counted(len(bad), _KIND[split])} that cannot be read: {listed(bad)}")
    if settings.size is not None:
        headers = {item.name: survey.headers[item.name] for item in kept}
        small = {n: f"{h.width}x{h.height}" for n, h in headers.items() if min(h.width, h.height) < settings.size}
        if small:
            below = f"smaller than {settings.size}x{settings.size}"
            notes.append(f"enlarged {counted(len(small), _KIND[split])} {below}: {listed(small)}")
    name = shown(source.where.absolute().stem)
    return ImageDataset(name, split, torch.from_numpy(pixels), labels, class_names, notes)


def _decoded(
    source: Source, split: Split, items: list[Item], shape: tuple[int, int, int], size: int | None
) -> tuple[np.ndarray, list[Item], dict[str, str]]:
    """The pixels of those of the items that can be decoded, these items, and why the others cannot."""
    channels, height, width = shape
    bytes_needed = len(items) * channels * height * width
    if bytes_needed > MAX_BYTES:
        raise source.error(
            f": {counted(len(items), 'image')} of {width}x{height} would need {bytes_needed} bytes; images are kept in "
            f"memory, at most {MAX_BYTES} bytes of them"
        )
    pixels = np.empty((len(items), *shape), dtype=np.uint8)
    kept: list[Item] = []
    bad: dict[str, str] = {}
    with _progress(source, split, len(items)) as told:
        for item in items:
            image = _attempt(source, item.name, lambda stream, name: decoded(stream, name, channels, size), bad)
            told.update()
            if image is None:
                continue
            if image.shape == shape:
                pixels[len(kept)] = image
                kept.append(item)
            else:
                bad[item.name] = f"{image.shape[2]}x{image.shape[1]} once decoded, not {width}x{height}"
    return pixels[: len(kept)], kept, bad


def _progress(source: Source, what: str, images: int) -> Progress:
    return progress(images, name=f"reading {shown(source.where.absolute().name)}, {what}", unit="image")


# The survey is that of both splits, and reading one after the other needs it twice.
@functools.lru_cache(maxsize=1)
def _surveyed(source: Source) -> _Survey:
    layout = laid_out(source)
    headers: dict[str, Header] = {}
    bad: dict[str, str] = {}
    names = _names(layout)
    with _progress(source, "headers", len(names)) as told:
        for name in names:
            if name in source.faults:
                bad[name] = source.faults[name]
            elif (found := _attempt(source, name, header, bad)) is not None:
                headers[name] = found
            told.update()
    return _Survey(layout, headers, bad)


def _names(layout: Layout) -> list[str]:
    return [item.name for items in layout.splits.values() for item in items]


def _attempt(source: Source, name: str, read: Callable[[IO[bytes], str], _Read], bad: dict[str, str]) -> _Read | None:
    """What ``read`` makes of the file, or None and the reason in ``bad``."""
    try:
        with source.open(name) as stream:
            return read(stream, name)
    except BadImageError as error:
        bad[name] = str(error)
    except MemoryError:
        raise
    except Exception as error:
        # The system's errors, and those of damaged archives, which are of many kinds.
        bad[name] = reason_of(error)
    return None


def _common_shape(source: Source, survey: _Survey, size: int | None) -> tuple[int, int, int]:
    """Channels, height and width of all images."""
    if not survey.headers:
        number = counted(len(survey.bad), "image")
        raise source.error(f": none of {number} can be read: {listed(survey.bad, LISTED)}", survey.bad)
    channels = 1 if all(found.gray for found in survey.headers.values()) else 3
    if size is not None:
        return channels, size, size
    sizes: dict[tuple[int, int], list[str]] = {}
    for name, found in survey.headers.items():
        sizes.setdefault((found.width, found.height), []).append(name)
    if len(sizes) > 1:
        common = sorted(sizes.items(), key=lambda pair: -len(pair[1]))
        said = [f"{len(n)} {'is' if len(n) == 1 else 'are'} {w}x{h} ({shown(n[0])})" for (w, h), n in common[:NAMED]]
        more = f" and {counted(len(sizes) - NAMED, 'other size')}" if len(sizes) > NAMED else ""
        raise source.error(
            f": all images must have one size (width x height), but {', '.join(said)}{more}; "
            "--set data.size=64 takes images of any size: it resizes and crops them",
            [name for _, names in common[1:] for name in names],
        )
    (width, height) = next(iter(sizes))
    return channels, height, width


def _refusal(source: Source, survey: _Survey, bad: dict[str, str], decoded_already: Container[str]) -> DataError:
    """The error that names all images of both splits that cannot be read, given those that are known."""
    bad = dict(bad)
    names = _names(survey.layout)
    rest = [name for name in names if name not in bad and name not in decoded_already and name not in survey.bad]
    with _progress(source, "to list all bad files", len(rest)) as told:
        for name in rest:
            _attempt(source, name, lambda stream, name: decoded(stream, name, 3, None), bad)
            told.update()
    ordered = {name: bad[name] for name in names if name in bad}
    return source.error(
        f": {len(bad)} of {counted(len(names), 'image')} cannot be read: {listed(ordered, LISTED)}; "
        "--set data.skip_bad=true skips them",
        ordered,
    )


def _lost(survey: _Survey, split: Split, kept: list[Item], class_names: list[str]) -> str | None:
    """What nothing is left of: the split, or a class of it that no other split has either."""
    if not kept:
        return f"no {_KIND[split]}"
    had = {item.class_name for item in survey.layout.splits[split]}
    others = set() if split == "train" else {item.class_name for item in survey.layout.splits["train"]}
    lost = [name for name in class_names if name in had - others - {item.class_name for item in kept}]
    return f"no {_KIND[split]} of {'class' if len(lost) == 1 else 'classes'} {listed(lost, LISTED)}" if lost else None


def read_image(path: Path) -> Tensor:
    """One picture in gray, (1, height, width) uint8, read as those of a data set are.

    Raises:
        DataError: it is no picture that can be read; the message names it.
        OSError: it cannot be opened.
    """
    try:
        with open(path, "rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header(stream, path.name)
            stream.seek(0)
            return torch.from_numpy(decoded(stream, path.name, 1, None).copy())
    except BadImageError as error:
        raise DataError(f"{path} cannot be read as a picture: {error}") from error


plugin = DatasetPlugin(
    name="images",
    load=load_images,
    needs_path=True,
    summary="a folder or zip archive of images, class per folder: images:PATH",
    settings=ImageSettings,
)
