"""The digits of scikit-learn: 1797 handwritten digits of 8x8 pixels (UCI, Alpaydin and Kaynak 1998); no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gencore.data.base import DataError, DatasetPlugin, Split
from gencore.data.memory import ImageDataset
from gencore.noise import Key, reference_bits

_TRAIN = 1500
# The split is by our own noise: it stays the same with any version of NumPy.
_SPLIT_KEY = Key(1797)


def load_digits(path: Path | None, split: Split) -> ImageDataset:
    """1500 images to train and 297 to test, always the same; intensities 0 to 16 become 0 to 255.

    Raises:
        DataError: a path was given, or scikit-learn is not installed.
    """
    if path is not None:
        raise DataError(f"data set digits comes with scikit-learn and takes no path, got {path}")
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise DataError("data set digits needs scikit-learn: pip install 'gencore[train]'") from error
    bunch = sklearn_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    order = np.argsort(reference_bits((len(images), 1), _SPLIT_KEY)[:, 0], kind="stable")
    chosen = order[:_TRAIN] if split == "train" else order[_TRAIN:]
    labels = bunch.target[chosen].astype(np.int64)
    names = [str(digit) for digit in range(10)]
    return ImageDataset("digits", split, torch.from_numpy(images[chosen]), torch.from_numpy(labels), names)


plugin = DatasetPlugin(
    name="digits",
    load=load_digits,
    summary="handwritten digits, 8x8 gray, 1797 images, from scikit-learn; needs no files",
)
