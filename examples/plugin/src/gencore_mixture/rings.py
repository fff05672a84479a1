"""A data set that needs no files: rings and discs, 16x16, drawn from the noise of a fixed key."""

from __future__ import annotations

from pathlib import Path

import torch

from gencore import Key, ops
from gencore.data import DataError, DatasetPlugin, ImageDataset, Split

SIZE = 16
COUNTS: dict[Split, int] = {"train": 4000, "test": 1000}
FIRST: dict[Split, int] = {"train": 0, "test": 4000}


def load_rings(path: Path | None, split: Split) -> ImageDataset:
    """4000 images to train and 1000 to test, of the classes ring and disc."""
    if path is not None:
        raise DataError(f"data set rings takes no path, got {path}")
    # Image i is a function of sample id i: training and test images are rows of one endless table.
    draws = ops.uniform((COUNTS[split], 4), Key(16).samples(FIRST[split]))
    x, y = (draws[:, i, None, None] * 6 + 4.5 for i in (0, 1))
    radius = draws[:, 2, None, None] * 2 + 2.5
    labels = (draws[:, 3] < 0.5).long()
    axis = torch.arange(SIZE) + 0.5
    distance = torch.hypot(axis[None, None, :] - x, axis[None, :, None] - y)
    disc = (radius - distance + 0.5).clamp(0, 1)  # one pixel of anti-aliasing
    hole = (radius - 1.5 - distance + 0.5).clamp(0, 1)
    images = torch.where(labels[:, None, None] == 1, disc, disc - hole)
    return ImageDataset("rings", split, (images * 255).round().to(torch.uint8)[:, None], labels, ("ring", "disc"))


plugin = DatasetPlugin(name="rings", load=load_rings, summary="rings and discs, 16x16 gray, 5000 images; no files")
