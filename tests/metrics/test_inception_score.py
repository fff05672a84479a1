import math

import pytest
import torch
from scipy.stats import entropy

from gencore import Key, ops
from gencore.metrics import inception_score


def probabilities(n=40, classes=6):
    return torch.softmax(2 * ops.normal((n, classes), Key(5), dtype=torch.float64), 1)


def test_is_the_formula():
    p = probabilities().numpy()
    expected = math.exp(entropy(p, p.mean(0), axis=1).mean())
    assert inception_score(probabilities()).value == pytest.approx(expected, rel=1e-12)


def test_is_the_mean_over_splits():
    p = probabilities().numpy()
    parts = [p[:13], p[13:26], p[26:]]
    scores = [math.exp(entropy(part, part.mean(0), axis=1).mean()) for part in parts]
    found = inception_score(probabilities(), splits=3)
    assert found.value == pytest.approx(sum(scores) / 3, rel=1e-12)
    deviation = math.sqrt(sum((s - sum(scores) / 3) ** 2 for s in scores) / 2)
    assert found.standard_error == pytest.approx(deviation / math.sqrt(3), rel=1e-12)


def test_by_hand():
    sure = torch.eye(4)
    assert inception_score(sure).value == pytest.approx(4)
    # Two of four classes, all the same, and no idea.
    assert inception_score(sure[[0, 0, 1, 1]]).value == pytest.approx(2)
    assert inception_score(sure[[0, 0, 0]]).value == pytest.approx(1)
    assert inception_score(torch.full((5, 4), 0.25)).value == pytest.approx(1)


def test_the_bootstrap_knows_its_spread():
    """Of many independent sets of samples of three classes, sure ones: as their shares vary."""
    labels = (ops.uniform((200, 300), Key(6)) * 3).long()
    scores = torch.tensor([inception_score(torch.eye(3)[row]).value for row in labels])
    found = inception_score(torch.eye(3)[labels[0]], replicates=200, key=Key(7))
    # The score has its maximum here, where the bootstrap of one set is rough: within a factor of 3.
    assert scores.std().item() / 3 < found.standard_error < scores.std().item() * 3


@pytest.mark.parametrize(
    ("p", "options", "message"),
    [
        (torch.zeros(3), {}, r"probabilities must be of shape \(N, classes\), got \(3,\)"),
        (torch.ones(3, 2), {}, "probabilities must be at least 0, and sum to 1 in each row"),
        (torch.full((3, 2), math.nan), {}, "probabilities must be at least 0, and sum to 1 in each row"),
        (torch.eye(3), {"splits": 4}, "splits must be between 1 and the number of samples, 3, got 4"),
        (torch.eye(3), {"replicates": 4}, "key must be given for 4 replicates, got None"),
    ],
)
def test_refuses(p, options, message):
    with pytest.raises(ValueError, match=message):
        inception_score(p, **options)
