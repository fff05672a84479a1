from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from gencore.data import DataError
from gencore.data.digits import load_digits, plugin


def test_splits_are_disjoint_and_cover_everything():
    train, test = load_digits(None, "train"), load_digits(None, "test")
    assert (len(train), len(test)) == (1500, 297)
    assert train.spec.image_shape == test.spec.image_shape == (1, 8, 8)
    assert train.spec.num_classes == 10
    ours = torch.cat((train.images, test.images)).flatten(1).numpy()
    labels = torch.cat((train.labels, test.labels)).numpy()
    theirs = sklearn_digits()
    expected = np.rint(theirs.data * (255 / 16)).astype(np.uint8)
    rows = np.lexsort(np.c_[ours, labels].T), np.lexsort(np.c_[expected, theirs.target].T)
    assert np.array_equal(ours[rows[0]], expected[rows[1]])
    assert np.array_equal(labels[rows[0]], theirs.target[rows[1]])
    assert sorted(set(ours.flatten().tolist()))[-1] == 255


def test_split_stays_the_same_for_ever():
    assert load_digits(None, "test").labels[:12].tolist() == EXPECTED
    assert load_digits(None, "test").labels.bincount(minlength=10).min() >= 20


EXPECTED = [4, 0, 5, 5, 1, 2, 4, 0, 1, 8, 9, 4]


def test_takes_no_path():
    with pytest.raises(DataError, match=r"takes no path, got here"):
        load_digits(Path("here"), "train")
    assert plugin.load is load_digits
    assert not plugin.needs_path
