import math

import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel

from gencore import Key, ops
from gencore.metrics import kernel, kernel_distance


def normals(n, size, seed):
    return ops.normal((n, size), Key(seed), dtype=torch.float64)


def by_scikit_learn(a, b):
    within = []
    for x in (a, b):
        k = polynomial_kernel(x, degree=3, coef0=1)
        within.append((k.sum() - k.trace()) / (len(x) * (len(x) - 1)))
    return sum(within) - 2 * polynomial_kernel(a, b, degree=3, coef0=1).mean()


@pytest.mark.parametrize(("n", "m", "size"), [(40, 30, 5), (2, 9, 1), (70, 70, 12)])
def test_is_the_formula(n, m, size, monkeypatch):
    monkeypatch.setattr(kernel, "_ROWS", 16)
    a, b = normals(n, size, 1), 1.5 * normals(m, size, 2) + 0.3
    assert kernel_distance(a, b).estimate.value == pytest.approx(by_scikit_learn(a, b), rel=1e-12)


def test_by_hand():
    """k(x, y) = (x y + 1)^3 in one dimension."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [-1.0]])
    # k(0, 1) = 1, k(2, -1) = -1; k(0, .) = 1 and 1, k(1, 2) = 27, k(1, -1) = 0.
    assert kernel_distance(a, b).estimate.value == pytest.approx(1 - 1 - 2 * (1 + 1 + 27 + 0) / 4)


def test_its_mean_does_not_depend_on_the_number_of_images():
    """Sets of one distribution: the mean of many is 0, of few images as of more."""
    for n in (5, 20):
        sets = [(normals(n, 3, i), normals(n, 3, 500 + i)) for i in range(400)]
        found = torch.tensor([kernel_distance(*pair).estimate.value for pair in sets])
        # Five standard errors of the mean.
        assert abs(found.mean().item()) < 5 * found.std().item() / math.sqrt(400)


def test_subsets_are_drawn_without_repetition():
    a, b = normals(30, 4, 1), normals(30, 4, 2) * 2
    whole = kernel_distance(a, b).estimate.value
    # Subsets of everything are everything, in another order.
    found = kernel_distance(a, b, subsets=3, subset_size=30, key=Key(0))
    assert (found.estimate.value, found.deviation) == (pytest.approx(whole, rel=1e-12), pytest.approx(0, abs=1e-12))
    found = kernel_distance(a, b, subsets=400, subset_size=10, key=Key(0))
    assert (found.subsets, found.subset_size) == (400, 10)
    assert found.estimate.value == pytest.approx(whole, abs=5 * found.deviation / 20)
    assert found.estimate.standard_error == pytest.approx(found.deviation * math.sqrt(10 / 30))
    assert found == kernel_distance(a, b, subsets=400, subset_size=10, key=Key(0))


def test_the_bootstrap_knows_its_spread():
    """That of distances of 300 independent pairs of sets."""
    sets = [(normals(60, 3, i), 1.3 * normals(60, 3, 1000 + i) + 0.5) for i in range(300)]
    spread = torch.tensor([kernel_distance(*pair).estimate.value for pair in sets]).std().item()
    errors = [kernel_distance(*pair, replicates=50, key=Key(1)).estimate.standard_error for pair in sets[:40]]
    # Of so few images it differs from set to set; its middle is right.
    assert torch.tensor(errors).median().item() == pytest.approx(spread, rel=0.25)


def test_refuses():
    a = normals(5, 3, 1)
    with pytest.raises(ValueError, match=r"features_a must be of shape \(N, D\) with N at least 2, got \(1, 3\)"):
        kernel_distance(a[:1], a)
    with pytest.raises(ValueError, match="features_b must be of the size of features_a, 3, got 2"):
        kernel_distance(a, a[:, :2])
    with pytest.raises(ValueError, match="features_b must be finite, but 1 values are not"):
        kernel_distance(a, torch.where(torch.arange(15).reshape(5, 3) == 4, math.inf, a))
    with pytest.raises(ValueError, match="key must be given for subsets and replicates, got None"):
        kernel_distance(a, a, subsets=3)
    with pytest.raises(ValueError, match="subset_size from 2 to the images of a set, 5, got 3 and 6"):
        kernel_distance(a, a, subsets=3, subset_size=6, key=Key(0))
    with pytest.raises(TypeError, match="features_a must be a tensor, got list"):
        kernel_distance([[1.0]], a)
