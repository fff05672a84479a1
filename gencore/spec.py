"""What a data set gives: the shape of its images, what is known of each (its conditions), and minibatches of both.

Everything that trains, samples or measures a model knows data by these types alone. A data set is whatever has the
three members of :class:`Dataset`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from gencore.config import Config, field
from gencore.noise import Key

Kind = Literal["class", "image", "text"]

# The conditions of n images by name: classes (n,) int64, images (n, C, H, W), or n strings.
Conditions = Mapping[str, Tensor | Sequence[str]]

# What the conditions of the built-in data sets are called.
LABEL, SOURCE, TEXT = "label", "source", "text"


@dataclass(frozen=True)
class Condition(Config):
    """What is known of an image beside its pixels, and is given to a model that generates such images.

    A minibatch of B images holds, for a condition of kind

    - ``class``: (B,) int64, indices of ``names``;
    - ``image``: (B, *shape) float32 in [0, 1]: another picture of the same, pixel upon pixel, if ``paired``, or else a
      picture of another domain that has nothing to do with the image, drawn independently;
    - ``text``: B strings.
    """

    name: str = field(doc="by which batches and models know it")
    kind: Kind = field()
    names: tuple[str, ...] = field((), doc="class: the name of each class")
    shape: tuple[int, int, int] | None = field(None, ge=1, doc="image: channels, height, width")
    paired: bool = field(True, doc="image: whether it belongs to the image, or is drawn independently of it")

    def check(self) -> Iterable[str]:
        if not self.name:
            yield "name: must not be empty"
        if (self.kind == "class") != bool(self.names):
            yield f"names: must be given for kind='class' and for no other, was {self.names} for {self.kind!r}"
        for name, count in Counter(self.names).items():
            if count > 1:
                yield f"names: must be distinct, was {name!r} {count} times"
        if (self.kind == "image") != (self.shape is not None):
            yield f"shape: must be given for kind='image' and for no other, was {self.shape} for {self.kind!r}"
        if self.kind != "image" and not self.paired:
            yield f"paired: must be true for kind={self.kind!r}"


@dataclass(frozen=True)
class DataSpec(Config):
    """What a data set gives, and so what a model of it generates.

    Raises:
        ConfigError: two conditions of one name, or a paired image of another height or width.
    """

    image_shape: tuple[int, int, int] = field(ge=1, doc="channels, height, width of one image")
    conditions: tuple[Condition, ...] = field((), doc="what is known of each image")

    def check(self) -> Iterable[str]:
        for name, count in Counter(condition.name for condition in self.conditions).items():
            if count > 1:
                yield f"conditions: must have distinct names, was {name!r} {count} times"
        for i, condition in enumerate(self.conditions):
            shape = condition.shape
            if condition.paired and shape is not None and shape[1:] != self.image_shape[1:]:
                ours, theirs = ("x".join(map(str, size[1:])) for size in (self.image_shape, shape))
                yield f"conditions[{i}]: must have the images' height and width, {ours}, if paired, was {theirs}"

    def __contains__(self, name: object) -> bool:
        return any(condition.name == name for condition in self.conditions)

    def __getitem__(self, name: str) -> Condition:
        """The condition of this name.

        Raises:
            KeyError: there is none.
        """
        for condition in self.conditions:
            if condition.name == name:
                return condition
        raise KeyError(name)

    def first(self, kind: Kind) -> Condition | None:
        """The first condition of this kind, or None."""
        return next((condition for condition in self.conditions if condition.kind == kind), None)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes of the first condition of kind ``class``; empty without one."""
        classes = self.first("class")
        return () if classes is None else classes.names

    @property
    def num_classes(self) -> int:
        """How many these are; 0 without classes."""
        return len(self.class_names)


@dataclass(frozen=True, eq=False)
class Batch:
    """One minibatch: ``images`` (B, C, H, W) float32 in [0, 1]; their conditions by name, see :class:`Condition`."""

    images: Tensor
    conditions: Conditions = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor | None:
        """The condition ``label``, (B,) int64; None without it."""
        labels = self.conditions.get(LABEL)
        return labels if isinstance(labels, Tensor) else None

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device. From pinned memory, the copy does not wait."""
        conditions = {name: _moved(values, device) for name, values in self.conditions.items()}
        return Batch(self.images.to(device, non_blocking=True), conditions)

    def pin_memory(self) -> Batch:
        """The same in pinned memory, for :class:`torch.utils.data.DataLoader`."""
        conditions = {n: v.pin_memory() if isinstance(v, Tensor) else v for n, v in self.conditions.items()}
        return Batch(self.images.pin_memory(), conditions)

    def part(self, first: int, last: int) -> Batch:
        """The images ``first`` to ``last - 1`` with their conditions, as views."""
        conditions = {name: values[first:last] for name, values in self.conditions.items()}
        return Batch(self.images[first:last], conditions)


def _moved(values: Tensor | Sequence[str], device: torch.device | str) -> Tensor | Sequence[str]:
    return values.to(device, non_blocking=True) if isinstance(values, Tensor) else values


@runtime_checkable
class Dataset(Protocol):
    """A data set: what it gives, how many images it has, and any minibatch of them.

    ``batch(indices, key)`` gives the images at ``indices`` (B,) int64 with their conditions. Whatever is random in it
    (a flip, a crop, an unpaired image) is a pure function of ``key``: row ``i`` uses the noise of ``key.samples(i)``.
    Without a key nothing is random, and the same indices give the same batch every time.
    """

    @property
    def spec(self) -> DataSpec: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, key: Key | None = None) -> Batch: ...
