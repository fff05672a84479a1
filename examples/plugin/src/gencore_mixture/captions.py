"""A data set with captions that needs no files: coloured shapes, 16x16 RGB, drawn from the noise of a fixed key."""

from __future__ import annotations

from pathlib import Path

import torch

from gencore import Key, ops
from gencore.data import DataError, DatasetPlugin, ImageDataset, Split
from gencore.spec import TEXT

SIZE = 16
COUNTS: dict[Split, int] = {"train": 4000, "test": 1000}
FIRST: dict[Split, int] = {"train": 0, "test": 4000}
SHAPES = ("disc", "square", "diamond")
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.2, 0.3, 1.0), "yellow": (0.9, 0.9, 0.1)}


def load_shapes(path: Path | None, split: Split) -> ImageDataset:
    """4000 images to train and 1000 to test, with the shape as class and a caption such as "a red disc"."""
    if path is not None:
        raise DataError(f"data set shapes takes no path, got {path}")
    # Image i is a function of sample id i: training and test images are rows of one endless table.
    draws = ops.uniform((COUNTS[split], 5), Key(256).samples(FIRST[split]))
    shape = (draws[:, 0] * len(SHAPES)).long()
    colour = (draws[:, 1] * len(COLOURS)).long()
    x, y = (draws[:, i, None, None] * 6 + 5 for i in (2, 3))
    radius = draws[:, 4, None, None] * 2 + 3
    axis = torch.arange(SIZE) + 0.5
    across, down = (axis[None, None, :] - x).abs(), (axis[None, :, None] - y).abs()
    # The three shapes are the unit balls of three norms.
    distances = torch.stack([torch.hypot(across, down), torch.maximum(across, down), across + down], dim=1)
    inside = (radius - distances[torch.arange(len(shape)), shape] + 0.5).clamp(0, 1)  # one pixel of anti-aliasing
    rgb = torch.tensor(list(COLOURS.values()))[colour]
    images = (inside[:, None] * rgb[:, :, None, None] * 255).round().to(torch.uint8)
    names = list(COLOURS)
    captions = [f"a {names[c]} {SHAPES[s]}" for c, s in zip(colour.tolist(), shape.tolist(), strict=True)]
    return ImageDataset("shapes", split, images, shape, SHAPES, conditions={TEXT: captions})


plugin = DatasetPlugin(name="shapes", load=load_shapes, summary="coloured shapes with captions, 16x16 RGB; no files")
