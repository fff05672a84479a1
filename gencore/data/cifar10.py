"""CIFAR-10 in its binary version (Krizhevsky 2009): ``cifar10:FOLDER``.

Each record of ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin`` is a label, one byte, and 3072 bytes
of pixels: red, green and blue, each 32 rows of 32. ``batches.meta.txt`` has the names of the classes, one a line. The
version in Python's pickles is never read: a pickle may run any program.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gencore.config import Config, field
from gencore.data._names import class_names
from gencore.data.base import DataError, DatasetPlugin, MissingSplitError, Split
from gencore.data.memory import ImageDataset
from gencore.text import counted

_FILES: dict[Split, list[str]] = {
    "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
    "test": ["test_batch.bin"],
}
_NAMES = "batches.meta.txt"
# Where the archive of the binary version puts the files, and the names of files of the other version.
_OWN = "cifar-10-batches-bin"
_PICKLES = ("data_batch_1", "cifar-10-batches-py/data_batch_1")
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True)
class CifarSettings(Config):
    """How the images are read."""

    flip: bool = field(False, doc="mirror half of the training images left to right, others each time")


def load_cifar10(path: Path, split: Split, settings: CifarSettings | None = None) -> ImageDataset:
    """The 50000 training or 10000 test images (3, 32, 32) of 10 classes.

    Args:
        path: the folder of the files, or the one around their folder ``cifar-10-batches-bin``.
        split: ``"train"`` or ``"test"``.
        settings: whether images are mirrored.

    Raises:
        MissingSplitError: there are no files of this split.
        DataError: a file is missing or damaged, or the version is the one in pickles; the message names it.
    """
    folder = _folder(path)
    files = [folder / name for name in _FILES[split]]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        kind = MissingSplitError if len(missing) == len(files) else DataError
        raise kind(f"data set cifar10: {folder} holds no {', '.join(missing)}")
    records = np.concatenate([_records(file) for file in files])
    names = class_names(folder / _NAMES) or _CLASSES
    labels = records[:, 0]
    if (wrong := np.flatnonzero(labels >= len(names))).size:
        at = int(wrong[0])
        raise DataError(
            f"data set cifar10: {folder}: label {at} of the {split} split must be below {len(names)}, but is "
            f"{labels[at]} ({counted(wrong.size, 'such label')})"
        )
    pixels = torch.from_numpy(records[:, 1:].reshape(-1, *_SHAPE))
    notes = [] if folder == path else [f"read from {folder}"]
    flip = settings is not None and settings.flip and split == "train"
    of_classes = torch.from_numpy(labels.astype(np.int64))
    return ImageDataset("cifar10", split, pixels, of_classes, names, notes, flip=flip)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(f"data set cifar10: {path} is not a folder")
    every = [name for names in _FILES.values() for name in names]
    for folder in (path, path / _OWN):
        if any((folder / name).is_file() for name in every):
            return folder
    if any((path / name).is_file() for name in _PICKLES):
        raise DataError(
            f"data set cifar10: {path} holds the version in pickles, which may run any program and are not read; "
            "get the binary version, cifar-10-binary.tar.gz"
        )
    raise DataError(f"data set cifar10: neither {path} nor {path / _OWN} holds {', '.join(every)}")


def _records(file: Path) -> np.ndarray:
    content = file.read_bytes()
    if not content or len(content) % _RECORD:
        what = f"must be records of {_RECORD} bytes, is {len(content)} bytes long"
        raise DataError(f"data set cifar10: {file} {what}")
    return np.frombuffer(content, np.uint8).reshape(-1, _RECORD)


plugin = DatasetPlugin(
    name="cifar10",
    load=load_cifar10,
    needs_path=True,
    summary="CIFAR-10's binary version, 32x32, 60000 images of 10 classes: cifar10:FOLDER",
    settings=CifarSettings,
)
