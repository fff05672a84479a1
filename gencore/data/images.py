"""A folder or a zip archive of images, class per folder: ``images:some/folder`` or ``images:archive.zip``.

Layouts, with any one folder around all of it::

    cat/1.png dog/2.png                        classes cat and dog; a fixed tenth of each class is the test split
    train/cat/1.png ... test/cat/7.png ...     classes and splits as the folders say
    1.png 2.png                                no classes (also below train/ and test/, or all in one folder)

Splits are called train or training, test or testing, and val, valid, validation or dev, in any case. Where there is no
test split beside train, validation is; beside test it is skipped. Folders that look like splits but are called
otherwise are refused, and so are others beside train, which may be classes or splits; but where all folders hold images
alone and none may be a test split, train is a class, as bus and car are. Folders inside a class belong to it.

Captions come from ``metadata.jsonl`` or ``metadata.csv``, or from a text file beside each image. With metadata, folders
are no classes unless that is asked for; a column may be.

Every image must have the same size, or is given it by the setting ``size``. If all are gray the data set has one
channel, else three. An archive is read in place, never extracted. The split of a layout without train and test goes by
a hash of the file names, so it does not depend on the order of the file system, nor on where the folder lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gencore.config import field
from gencore.data._assembly import PictureSettings, Plan, Row, assembled
from gencore.data._layout import Layout, laid_out
from gencore.data._metadata import DEFAULT_TEXT, Known, known
from gencore.data._pixels import BadImageError, Fit, decoded, header
from gencore.data._sources import Source, opened
from gencore.data.base import DataError, DatasetPlugin, NamedDataset, Split
from gencore.text import LISTED, counted, listed

_NAME = "images"


@dataclass(frozen=True)
class ImageSettings(PictureSettings):
    """How images are read."""

    text: str = field(DEFAULT_TEXT, doc="the column of metadata.jsonl or metadata.csv that holds the captions")
    label: str | None = field(
        None, doc="the column of them that holds the classes; folder: folders are classes though there is metadata"
    )


def load_images(
    path: Path, split: Split, settings: ImageSettings | None = None, *, labelled: bool = True
) -> NamedDataset:
    """The images of a folder or zip archive.

    Args:
        path: the folder or the archive.
        split: ``"train"`` or ``"test"``.
        settings: a common size, what is a caption and a class, and whether images that cannot be read are skipped.
        labelled: whether folders are classes; if not, all images are one data set without labels.

    Raises:
        MissingSplitError: no image is of this split, or none that can be read.
        DataError: nothing to read, two sizes of image, files that are no images; the message names the files.
    """
    check_pillow(_NAME)
    settings = settings or ImageSettings()
    with opened(path, _NAME) as source:
        said = known(source, settings.text, settings.label, settings.skip_bad)
        layout = laid_out(source, said.classes)
        plan = planned(source, layout, said, settings.label, settings.skip_bad, labelled=labelled)
        return assembled(source, split, settings, plan)


def planned(
    source: Source, layout: Layout, said: Known, label: str | None, skip_bad: bool, *, labelled: bool = True
) -> Plan:
    """The plan of images of this layout, of which that is known.

    Args:
        label: the column of the classes, if one is named: every image must have a class then, or is skipped.
        skip_bad, labelled: as :func:`load_images` has them.

    Raises:
        DataError: an image has no class; the message names it.
    """
    notes = [*layout.notes, *said.notes]
    splits = layout.splits
    if said.classes is not None and layout.class_names:
        without = [item.name for items in splits.values() for item in items if item.class_name is None]
        what = f"{counted(len(without), 'image has', 'images have')} no class where others have one" + (
            f", in the column {label}" if label else ""
        )
        if without and not skip_bad:
            how = "--set data.skip_bad=true skips them"
            raise source.error(f": {what}: {listed(without, LISTED)}; {how}", without)
        if without:
            notes.append(f"skipped, as {what}: {listed(without)}")
            splits = {split: [i for i in items if i.class_name is not None] for split, items in splits.items()}
    texts = said.texts or {}
    rows = {
        split: [Row(item.name, class_name=item.class_name, text=texts.get(item.name, "")) for item in items]
        for split, items in splits.items()
    }
    # One folder around all images is no class; one value of a column that is asked for is.
    classes = layout.class_names if labelled and (len(layout.class_names) > 1 or said.classes is not None) else []
    return Plan(rows, class_names=classes, captioned=said.texts is not None, notes=notes)


def check_pillow(name: str) -> None:
    """Raises DataError where Pillow is not installed, which the data set ``name`` needs."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(f"data set {name} needs Pillow: pip install 'gencore[train]'") from error


def read_image(path: Path, channels: int = 1, size: int | None = None) -> Tensor:
    """One picture, (channels, height, width) uint8, read as those of a data set are.

    Args:
        channels: 1 for gray, or 3.
        size: height and width of a square picture, to which the shorter side is resized; the middle is kept.

    Raises:
        DataError: it is no picture that can be read; the message names it.
        OSError: it cannot be opened.
    """
    try:
        with open(path, "rb") as stream:
            found = header(stream, path.name)
            stream.seek(0)
            fit = Fit(size)
            return torch.from_numpy(decoded(stream, path.name, channels, fit, fit.shape(found)).copy())
    except BadImageError as error:
        raise DataError(f"{path} cannot be read as a picture: {error}") from error


plugin = DatasetPlugin(
    name=_NAME,
    load=load_images,
    needs_path=True,
    summary="a folder or zip archive of images, with classes, captions or neither: images:PATH",
    settings=ImageSettings,
)
