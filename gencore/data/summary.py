"""What there is to say of a data set, and what there is to see of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gencore.data.base import NamedDataset, described
from gencore.spec import DataSpec
from gencore.text import counted

# Texts that are shown as an example.
_EXAMPLES = 3


@dataclass(frozen=True)
class Summary:
    """One split of a data set.

    Attributes:
        name, split: of the data set.
        images: their number.
        spec: what it gives.
        class_counts: for each condition of kind ``class``, the number of images of each class.
        texts: for each condition of kind ``text``, the number of those that are not empty, how many of these differ,
            and the first ones.
        fingerprint: of the content.
        notes: what is to be said of the files.
    """

    name: str
    split: str
    images: int
    spec: DataSpec
    class_counts: dict[str, dict[str, int]]
    texts: dict[str, tuple[int, int, list[str]]]
    fingerprint: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return {
            "name": self.name,
            "split": self.split,
            "images": self.images,
            **self.spec.to_dict(),
            "class_counts": self.class_counts,
            "texts": {
                name: {"given": given, "different": different, "first": first}
                for name, (given, different, first) in self.texts.items()
            },
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return f"{counted(self.images, f'{self.split} image')} {described(self.spec)}"


def summary(dataset: NamedDataset) -> Summary:
    """What a data set holds. No image is decoded for it, unless the data set can do nothing without."""
    counts: dict[str, dict[str, int]] = {}
    texts: dict[str, tuple[int, int, list[str]]] = {}
    for condition in dataset.spec.conditions:
        if condition.kind == "class":
            labels = torch.as_tensor(dataset.values(condition.name))
            found = labels.bincount(minlength=len(condition.names)).tolist()
            counts[condition.name] = dict(zip(condition.names, found, strict=True))
        elif condition.kind == "text":
            given = [str(text) for text in dataset.values(condition.name) if text]
            texts[condition.name] = len(given), len(set(given)), given[:_EXAMPLES]
    size = len(dataset)
    return Summary(dataset.name, dataset.split, size, dataset.spec, counts, texts, dataset.fingerprint, dataset.notes)


def examples(dataset: NamedDataset, n: int) -> tuple[Tensor, list[str]]:
    """Images from all over a data set, and what is known of each in words.

    Args:
        n: how many; all, if there are fewer.

    Returns:
        Images (n, C, H, W) in [0, 1], those that are their conditions left of them, and a caption for each.
    """
    n = min(n, len(dataset))
    batch = dataset.batch(torch.arange(n) * len(dataset) // n)
    captions: list[list[str]] = [[] for _ in range(n)]
    beside = []
    for condition in dataset.spec.conditions:
        values = batch.conditions[condition.name]
        if condition.kind == "image" and isinstance(values, Tensor):
            beside.append(values)
        elif condition.kind == "class":
            for caption, label in zip(captions, values, strict=True):
                caption.append(condition.names[int(label)])
        else:
            for caption, text in zip(captions, values, strict=True):
                caption.append(str(text))
    return _side_by_side([*beside, batch.images]), [": ".join(filter(None, caption)) for caption in captions]


def _side_by_side(images: list[Tensor]) -> Tensor:
    """Images (N, C, H, W) of any channels and sizes in one; gray ones become RGB beside RGB, what is lower gets white
    below. Of those with other channels the last one is taken alone."""
    channels = {image.shape[1] for image in images}
    if not channels <= {1, 3}:
        return images[-1]
    height = max(image.shape[2] for image in images)
    same = [image.expand(-1, max(channels), -1, -1) for image in images]
    return torch.cat([functional.pad(image, (0, 0, 0, height - image.shape[2]), value=1.0) for image in same], dim=3)
