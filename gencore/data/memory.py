"""Data sets of columns: images, their classes, texts and other images. Those here are held in memory."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gencore import ops
from gencore.data._columns import Column, Held
from gencore.data.base import NamedDataset, Split
from gencore.noise import Key
from gencore.spec import LABEL, Batch, Condition, DataSpec
from gencore.text import counted

# One stream of a batch's key per purpose, so that no two draws share noise. The unpaired images of the condition after
# the first use the next ones.
STREAM_FLIP = 0
STREAM_CROP = 1
STREAM_UNPAIRED = 2


class ColumnDataset(NamedDataset):
    """A data set of columns, one row per image.

    Args:
        name: what the data set is called, for titles and logs.
        split: ``"train"`` or ``"test"``.
        images: the images themselves.
        labels: the condition ``label``: (N,) int64, or None.
        class_names: the name of every class.
        notes: what a user should know of how the files were read, a line each.
        conditions: further conditions by name: N strings, or paired images.
        unpaired: images of other domains by name.
        flip: whether half of the images are mirrored left to right, with their paired images, as the key says.
        crop: whether the key says which window of larger images is taken, the same of their paired images.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        images: Column,
        labels: Tensor | None = None,
        class_names: Sequence[str] = (),
        notes: Sequence[str] = (),
        *,
        conditions: Mapping[str, Column | Sequence[str]] | None = None,
        unpaired: Mapping[str, Column] | None = None,
        flip: bool = False,
        crop: bool = False,
    ):
        self.labels, self.flip, self.crop = labels, flip, crop
        self._images, self._conditions, self._unpaired = images, dict(conditions or {}), dict(unpaired or {})
        known = [] if labels is None else [Condition(LABEL, "class", tuple(class_names))]
        for condition, values in self._conditions.items():
            if isinstance(values, Column):
                known.append(Condition(condition, "image", shape=values.shape))
            else:
                known.append(Condition(condition, "text"))
        for condition, others in self._unpaired.items():
            known.append(Condition(condition, "image", shape=others.shape, paired=False))
        super().__init__(name, split, DataSpec(images.shape, tuple(known)), notes)

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Tensor, key: Key | None = None) -> Batch:
        """The images at ``indices`` (B,) int64, float32 in [0, 1], with their conditions.

        Without a key, nothing is mirrored, windows lie in the middle, and the unpaired image of index ``i`` is the one
        at ``i`` modulo their number.
        """
        indices = self._usable([self._images, *self._conditions.values()], indices)
        mirrored = places = None
        if key is not None and self.flip:
            mirrored = ops.uniform((len(indices),), key.stream(STREAM_FLIP)) < 0.5
        if key is not None and self.crop:
            places = ops.uniform((len(indices), 2), key.stream(STREAM_CROP), dtype=torch.float64)
        conditions: dict[str, Tensor | Sequence[str]] = {}
        if self.labels is not None:
            conditions[LABEL] = self.labels[indices]
        for name, values in self._conditions.items():
            if isinstance(values, Column):
                conditions[name] = _floats(values.read(indices, places), mirrored)
            else:
                conditions[name] = tuple(values[i] for i in indices.tolist())
        for number, (name, others) in enumerate(self._unpaired.items()):
            chosen, turned, where = indices % len(others), None, None
            if key is not None:
                draws = ops.uniform((len(indices), 4), key.stream(STREAM_UNPAIRED + number), dtype=torch.float64)
                # The rounded product is below the number: uniform() is at most 1 - 2^-24, and this is float64.
                chosen = (draws[:, 0] * len(others)).long()
                turned = draws[:, 1] < 0.5 if self.flip else None
                where = draws[:, 2:] if self.crop else None
            conditions[name] = _floats(others.read(self._usable([others], chosen), where), turned)
        return Batch(_floats(self._images.read(indices, places), mirrored), conditions)

    def _usable(self, columns: Sequence[Column | Sequence[str]], indices: Tensor) -> Tensor:
        """The rows that are read in place of these, where columns have rows that cannot be."""
        return indices

    def values(self, name: str) -> Tensor | Sequence[str]:
        if name == LABEL and self.labels is not None:
            return self.labels
        found = self._conditions.get(name)
        return super().values(name) if found is None or isinstance(found, Column) else found

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.spec, len(self))).encode())
        if self.labels is not None:
            digest.update(self.labels.cpu().numpy().astype("<i8").tobytes())
        for values in (self._images, *self._conditions.values(), *self._unpaired.values()):
            if isinstance(values, Column):
                for piece in values.pieces():
                    digest.update(piece.cpu().contiguous().numpy().data)
            else:
                digest.update(repr(tuple(values)).encode())
        return digest.hexdigest()


class ImageDataset(ColumnDataset):
    """Images of one size, as uint8 in memory, with or without classes and other conditions.

    Args:
        name: what the data set is called, for titles and logs.
        split: ``"train"`` or ``"test"``.
        images: (N, C, H, W) uint8.
        labels: the condition ``label``: (N,) int64 in [0, len(class_names)), or None.
        class_names: the name of every class, all different; empty without labels.
        notes: what a user should know of how the files were read, a line each, such as what was skipped.
        conditions: further conditions by name: N strings, or paired images (N, C, H, W) uint8.
        unpaired: images of other domains by name, (M, C, H, W) uint8.
        flip: whether half of the images are mirrored left to right, with their paired images, as the key says.

    Raises:
        TypeError: a tensor of another dtype, or a name or text that is no string.
        ValueError: shapes, labels or class names that do not fit together, or no image at all.
        ConfigError: conditions that do not fit together, see :class:`gencore.spec.DataSpec`.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        images: Tensor,
        labels: Tensor | None = None,
        class_names: Sequence[str] = (),
        notes: Sequence[str] = (),
        *,
        conditions: Mapping[str, Tensor | Sequence[str]] | None = None,
        unpaired: Mapping[str, Tensor] | None = None,
        flip: bool = False,
    ):
        _check_images("images", images)
        names = _checked_names(class_names)
        self.images = images
        if labels is not None:
            _check_labels(labels, len(images), len(names))
        elif names:
            raise ValueError(f"class_names must be empty without labels, got {counted(len(names), 'name')}")
        of_images = {condition: _column(condition, v, len(images)) for condition, v in (conditions or {}).items()}
        for condition, others in (unpaired or {}).items():
            _check_images(f"unpaired[{condition!r}]", others)
        domains = {condition: Held(others) for condition, others in (unpaired or {}).items()}
        super().__init__(
            name, split, Held(images), labels, names, notes, conditions=of_images, unpaired=domains, flip=flip
        )


def _floats(images: Tensor, mirrored: Tensor | None) -> Tensor:
    """Pixels as float32 in [0, 1], those images mirrored that ``mirrored`` says."""
    if mirrored is not None:
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images.float() / 255


def _check_images(name: str, images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {images.dtype}")
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"{name} must be of shape (N, C, H, W) and not empty, got {tuple(images.shape)}")


def _check_labels(labels: Tensor, images: int, classes: int) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != (images,):
        raise ValueError(f"labels must be of shape ({images},), got {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must be in [0, {classes}), got {low} to {high}")


def _column(name: str, values: Tensor | Sequence[str], images: int) -> Column | Sequence[str]:
    if isinstance(values, str) or len(values) != images:
        got = "a string" if isinstance(values, str) else str(len(values))
        raise ValueError(f"conditions[{name!r}] must be one for each of {counted(images, 'image')}, got {got}")
    if isinstance(values, Tensor):
        _check_images(f"conditions[{name!r}]", values)
        return Held(values)
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise TypeError(f"conditions[{name!r}] must be strings or a tensor, got {wrong[0]!r}")
    return values


def _checked_names(class_names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(class_names, str):
        raise TypeError(f"class_names must be a sequence of names, got the string {class_names!r}")
    names = tuple(class_names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"class_names must be strings, got {name!r} of type {type(name).__name__}")
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"class_names must be distinct, got {name!r} {count} times")
    return tuple(map(str, names))
