"""What a data set is, and how one is named: ``digits``, ``mnist:some/folder``, ``images:some/archive.zip``."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gencore import plugins
from gencore.models.base import Batch

Split = Literal["train", "test"]

# Images are kept in memory; beyond this many bytes of pixels a loader should refuse rather than swap.
MAX_BYTES = 32 << 30


class DataError(ValueError):
    """A data set cannot be read: the message names the file (or the option) and what is wrong with it."""


class ImageDataset:
    """Images of one size, as uint8 in memory, with a class label each or none.

    Args:
        name: what the data set is called, for titles and logs.
        split: ``"train"`` or ``"test"``.
        images: (N, C, H, W) uint8.
        labels: (N,) int64 in [0, len(class_names)), or None.
        class_names: the name of every class; empty without labels.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes, labels or class names that do not fit together, or no image at all.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        images: Tensor,
        labels: Tensor | None = None,
        class_names: Sequence[str] = (),
    ):
        check_split(split)
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {images.dtype}")
        if images.dim() != 4 or images.numel() == 0:
            raise ValueError(f"images must be of shape (N, C, H, W) and not empty, got {tuple(images.shape)}")
        if labels is None:
            if class_names:
                raise ValueError(f"class_names must be empty without labels, got {len(class_names)} names")
        else:
            if labels.dtype != torch.int64:
                raise TypeError(f"labels must be int64, got {labels.dtype}")
            if labels.shape != images.shape[:1]:
                raise ValueError(f"labels must be of shape ({len(images)},), got {tuple(labels.shape)}")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(class_names):
                raise ValueError(f"labels must be in [0, {len(class_names)}), got {low} to {high}")
        self.name = name
        self.split: Split = split
        self.images = images
        self.labels = labels
        self.class_names = tuple(class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None]:
        """One image (C, H, W), float32 in [0, 1], and its class, or None."""
        label = None if self.labels is None else int(self.labels[index])
        return self.images[index].float() / 255, label

    def batch(self, indices: Tensor) -> Batch:
        """The images at ``indices`` (B,) int64, float32 in [0, 1], with their labels, or None."""
        labels = None if self.labels is None else self.labels[indices]
        return Batch(self.images[indices].float() / 255, labels)

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.image_shape)
        return f"<{self.name} {self.split}: {len(self)} images {shape}, {self.num_classes or 'no'} classes>"


@dataclass(frozen=True)
class DatasetPlugin:
    """What an entry point of the group ``gencore.datasets`` names: how a data set is called and read.

    ``load(path, split)`` gets the path of ``name:path``, or None when there was none; with ``needs_path`` there always
    is one. It must return the same images in the same order every time, and raise :class:`DataError` for what is wrong
    with the files.
    """

    name: str
    load: Callable[[Any, Split], ImageDataset]  # Any: Path | None, or Path with needs_path
    needs_path: bool = False
    summary: str = ""


def load(spec: str, split: Split) -> ImageDataset:
    """The data set that ``spec`` names, ``name`` or ``name:path``.

    Raises:
        PluginError: no such data set, or its plugin is broken.
        DataError: the files are missing or wrong, or the data set needs a path and got none.
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec must be a string, name or name:path, got {type(spec).__name__}")
    check_split(split)
    name, colon, path = spec.partition(":")
    plugin = plugins.load_dataset(name)
    if colon and not path:
        raise DataError(f"the path after {name}: must not be empty")
    if plugin.needs_path and not path:
        raise DataError(f"data set {name} needs a path: {name}:PATH")
    try:
        dataset = plugin.load(Path(path).expanduser() if path else None, split)
    except DataError:
        raise
    except OSError as error:
        where = error.filename or path or name
        raise DataError(f"data set {name}: cannot read {where}: {error.strerror or error}") from error
    except (Exception, SystemExit) as error:
        raise plugins.broken("dataset", name, plugins.reason(error)) from error
    if not isinstance(dataset, ImageDataset):
        raise plugins.broken("dataset", name, f"load must return an ImageDataset, got {type(dataset).__name__}")
    return dataset


def check_split(split: str) -> None:
    """Raises ValueError unless ``split`` is ``"train"`` or ``"test"``."""
    if split not in typing.get_args(Split):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
