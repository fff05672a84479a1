"""The linear probe."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from gencore import Key, ops
from gencore.metrics import linear_probe


def classes_of(number, stream):
    """Three classes on the corners of a triangle, with noise beside which the features' units differ by 1e4."""
    labels = torch.arange(number) % 3
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    noise = ops.normal((number, 2), Key(0).stream(stream))
    return (corners[labels] + noise) * torch.tensor([1.0, 1e4]), labels


def test_accuracy_is_that_of_a_logistic_regression():
    known, asked = classes_of(300, 0), classes_of(600, 1)
    found = linear_probe(*known, *asked)
    mean, deviation = known[0].mean(0), known[0].std(0, correction=0)
    standard = [((values - mean) / deviation).double().numpy() for values in (known[0], asked[0])]
    theirs = LogisticRegression(max_iter=1000).fit(standard[0], known[1].numpy())
    assert found == pytest.approx(theirs.score(standard[1], asked[1].numpy()), abs=1 / 600)
    assert 0.8 < found < 1
    # Units change nothing, and neither does a feature that is the same everywhere.
    scaled = [torch.cat((values * 100 + 3, torch.full((len(values), 1), 7.0)), 1) for values in (known[0], asked[0])]
    assert linear_probe(scaled[0], known[1], scaled[1], asked[1]) == pytest.approx(found, abs=1 / 600)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(6, dtype=torch.long)}, "labels must be of at least two classes, got one"),
        ({"features": torch.full((6, 2), math.nan)}, "features must be finite, but 12 values are not"),
        ({"test_features": torch.ones(4, 3)}, "features must be of one size, got 2 and 3"),
        ({"test_labels": torch.ones(3)}, r"test_features must be of shape \(N, D\) with a label each, got \(4, 2\)"),
        ({"penalty": -1.0}, "penalty must be at least 0, got -1.0"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {
        "features": torch.arange(12.0).reshape(6, 2),
        "labels": torch.arange(6) % 2,
        "test_features": torch.ones(4, 2),
        "test_labels": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        linear_probe(**{**arguments, **change})
