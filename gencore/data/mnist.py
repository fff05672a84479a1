"""MNIST and data sets of its format (Fashion-MNIST, KMNIST): IDX files in a folder, gzip-compressed or not.

The IDX format (LeCun, Cortes and Burges 1998): two zero bytes, a type code (8 = unsigned byte), the number of
dimensions, each dimension as a big-endian 32-bit number, then the values in C order.

These files do not say what their classes are called: the setting ``classes`` does, or ``classes.txt`` beside them.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from gencore.config import Config, field
from gencore.data._names import class_names
from gencore.data.base import MAX_BYTES, DataError, DatasetPlugin, MissingSplitError, Split
from gencore.data.memory import ImageDataset
from gencore.text import counted

ENVIRONMENT_VARIABLE = "GENCORE_DATA"

_PREFIX: dict[Split, str] = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 8
_CLASSES = tuple(str(digit) for digit in range(10))
_NAMES = "classes.txt"

# Where torchvision puts the files of the data sets of this format, below its root.
_OWN = "MNIST/raw"
_OTHERS = "*/raw"
_PIECE = 1 << 20


@dataclass(frozen=True)
class MnistSettings(Config):
    """How the images are read."""

    classes: tuple[str, ...] = field(
        (), doc="the names of the classes, such as T-shirt,Trouser,...; else those of classes.txt, one a line; else 0-9"
    )

    def check(self) -> Iterable[str]:
        for name, count in Counter(self.classes).items():
            if count > 1:
                yield f"classes: must be distinct, was {name!r} {count} times"


def load_mnist(path: Path | None, split: Split, settings: MnistSettings | None = None) -> ImageDataset:
    """The 60000 training or 10000 test images (1, 28, 28) with their classes.

    Args:
        path: the folder of ``train-images-idx3-ubyte`` and its siblings, with or without ``.gz``, or torchvision's root
            of it: the files may lie in ``raw`` or ``MNIST/raw`` below, or in ``NAME/raw`` if there is one such folder.
            Without a path, the folder ``mnist`` in the folder that the environment variable GENCORE_DATA names.
        split: ``"train"`` or ``"test"`` (the files called ``t10k``).
        settings: the names of the classes.

    Raises:
        MissingSplitError: there are no files of this split.
        DataError: a file is missing, damaged or of another format; the message names it.
    """
    if path is None:
        root = os.environ.get(ENVIRONMENT_VARIABLE)
        if not root:
            raise DataError(f"data set mnist needs a path (mnist:FOLDER), or {ENVIRONMENT_VARIABLE} set to its parent")
        path = Path(root) / "mnist"
    if not path.is_dir():
        raise DataError(f"data set mnist: {path} is not a folder")
    folder = _folder(path)
    image_file, label_file = _file(folder, split, "images", 3), _file(folder, split, "labels", 1)
    if image_file is None or label_file is None:
        wanted = _names(split, "labels", 1) if image_file else _names(split, "images", 3)
        kind = MissingSplitError if image_file is label_file else DataError
        raise kind(f"data set mnist: {folder} holds no {wanted[0]} (nor {', '.join(wanted[1:])})")
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        ours, theirs = counted(len(images), "image"), counted(len(labels), "label")
        raise DataError(f"{image_file} holds {ours}, but {label_file} holds {theirs}")
    if images.size == 0:
        raise DataError(f"{image_file} holds no pixels: its dimensions are {images.shape}")
    names: Sequence[str] = (settings.classes if settings else ()) or class_names(folder / _NAMES) or _CLASSES
    wrong = np.flatnonzero(labels >= len(names))
    if len(wrong):
        raise DataError(
            f"{label_file}: label {wrong[0]} must be below {len(names)}, but is {labels[wrong[0]]} "
            f"({counted(len(wrong), 'such label')}); data.classes or {_NAMES} names the classes"
        )
    label_tensor = torch.from_numpy(labels.astype(np.int64))
    notes = [] if folder == path else [f"read from {folder}"]
    return ImageDataset("mnist", split, torch.from_numpy(images).unsqueeze(1), label_tensor, names, notes)


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The uint8 array of ``dims`` dimensions in an IDX file; gzip is known by its first bytes, not by the name.

    Raises:
        DataError: not an IDX file, another type or number of dimensions, shorter or longer than its header says.
    """
    with open(path, "rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            if not compressed:
                return _read(raw, path, dims)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _read(stream, path, dims)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: the gzip data are damaged or truncated ({error})") from error


def _read(stream: IO[bytes] | gzip.GzipFile, path: Path, dims: int) -> np.ndarray:
    header = stream.read(4 + 4 * dims)
    magic = header[:4]
    expected = bytes((0, 0, _UNSIGNED_BYTE, dims))
    if magic != expected:
        found = magic.hex() or "nothing"
        raise DataError(f"{path}: an IDX file of {dims} dimensions must begin with {expected.hex()}, not with {found}")
    if len(header) < 4 + 4 * dims:
        raise DataError(f"{path}: the header is truncated after {len(header)} of {4 + 4 * dims} bytes")
    shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4))
    size = 1
    for length in shape:
        size *= length
    if size > MAX_BYTES:
        raise DataError(f"{path}: the header claims {_times(shape)} values, more than the {MAX_BYTES} that are read")
    # One byte more than the header says, to notice what follows; never more, whatever a compressed file holds; and in
    # pieces, so that memory is taken for what is there, not for what a wrong header claims.
    values = bytearray()
    while len(values) <= size:
        piece = stream.read(min(_PIECE, size + 1 - len(values)))
        if not piece:
            break
        values += piece
    if len(values) < size:
        raise DataError(f"{path}: truncated: the header says {_times(shape)} values, but {len(values)} follow")
    if len(values) > size:
        raise DataError(f"{path}: too long: more follows the {_times(shape)} values that the header says")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _times(shape: Sequence[int]) -> str:
    return " x ".join(str(length) for length in shape)


def _folder(path: Path) -> Path:
    """The folder of the files: ``path``, or where torchvision puts them below it."""
    for folder in (path, path / "raw", path / _OWN):
        if _holds_any(folder):
            return folder
    others = [folder for folder in sorted(path.glob(_OTHERS)) if _holds_any(folder)]
    if len(others) > 1:
        raise DataError(f"data set mnist: {path} holds several data sets, name one: {', '.join(map(str, others))}")
    if not others:
        names = ", ".join([*_names("train", "images", 3), *_names("test", "images", 3)])
        raise DataError(
            f"data set mnist: {path} holds none of {names}, and nor does {path / 'raw'}, {path / _OWN} or another "
            f"{path / _OTHERS}"
        )
    return others[0]


def _holds_any(folder: Path) -> bool:
    splits: tuple[Split, ...] = ("train", "test")
    return any(_file(folder, split, *what) for split in splits for what in (("images", 3), ("labels", 1)))


def _file(folder: Path, split: Split, what: str, dims: int) -> Path | None:
    return next((folder / name for name in _names(split, what, dims) if (folder / name).is_file()), None)


def _names(split: Split, what: str, dims: int) -> list[str]:
    return [f"{_PREFIX[split]}-{what}{dot}idx{dims}-ubyte{end}" for dot in "-." for end in ("", ".gz")]


plugin = DatasetPlugin(
    name="mnist",
    load=load_mnist,
    summary="handwritten digits, 28x28 gray, 70000 images; IDX files in mnist:FOLDER or GENCORE_DATA/mnist",
    settings=MnistSettings,
)
