import math

import pytest
import torch
from scipy import linalg

from gencore import Key, ops
from gencore.metrics import FRECHET_NAME, frechet_distance, frechet_estimate, moments


def normals(n, size, seed):
    return ops.normal((n, size), Key(seed), dtype=torch.float64)


def mixed(n, size, seed):
    """Correlated features with a mean: those of a network are like that."""
    mixing = normals(size, size, seed + 100) / size**0.5
    return normals(n, size, seed) @ mixing + normals(1, size, seed + 200)


def by_square_root(a, b):
    """The formula as it stands, with a square root of the matrix."""
    means = (a.mean(0) - b.mean(0)).square().sum().item()
    covariance_a, covariance_b = (x.T.cov().reshape(x.shape[1], -1) for x in (a, b))
    root = linalg.sqrtm((covariance_a @ covariance_b).numpy()).real
    return means + (covariance_a.trace() + covariance_b.trace()).item() - 2 * root.trace()


@pytest.mark.parametrize(("n", "m", "size"), [(50, 80, 5), (400, 300, 40), (2, 9, 1)])
def test_is_the_formula(n, m, size):
    a, b = mixed(n, size, 1), mixed(m, size, 2)
    # sqrtm keeps about half the digits of float64 where eigenvalues are close to 0.
    assert frechet_distance(a, b) == pytest.approx(by_square_root(a, b), rel=1e-7)


def test_of_normal_distributions_with_known_moments():
    """One axis each way, whose moments are exact: |m|^2 + sum (s_a - s_b)^2."""
    unit = torch.cat((torch.eye(3), -torch.eye(3))).double() * math.sqrt(5 / 2)  # mean 0, unbiased covariance I
    torch.testing.assert_close(unit.T.cov(), torch.eye(3, dtype=torch.float64))
    scale, mean = torch.tensor([1.0, 3.0, 0.0]).double(), torch.tensor([2.0, 0.0, -1.0]).double()
    # (1 - 1)^2 + (3 - 1)^2 + (0 - 1)^2 + 2^2 + 1^2
    assert frechet_distance(unit * scale + mean, unit) == pytest.approx(10, rel=1e-12)
    assert frechet_distance(unit, unit * scale + mean) == pytest.approx(10, rel=1e-12)


def test_turning_both_changes_nothing():
    a, b = mixed(60, 6, 1), mixed(60, 6, 2)
    rotation, _ = torch.linalg.qr(normals(6, 6, 3))
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_is_zero_for_the_same_features_and_sees_every_change():
    a = mixed(300, 20, 1).float()
    # Rounding of sums of about 40, in float64.
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + 0.1) == pytest.approx(20 * 0.01, rel=1e-4)
    assert frechet_distance(a, a * 1.1) > 0.01


@pytest.mark.parametrize("n", [5, 30])
def test_fewer_samples_than_features(n):
    """The covariances are singular, which is where a square root of their product is lost."""
    a, b = mixed(n, 50, 1), mixed(n, 50, 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    # Each lies in a subspace; with an orthogonal one nothing is in common.
    low, high = torch.cat((a, torch.zeros(n, 50)), 1), torch.cat((torch.zeros(n, 50), b), 1)
    means = a.mean(0).square().sum() + b.mean(0).square().sum()
    expected = means + a.T.cov().trace() + b.T.cov().trace()
    assert frechet_distance(low, high) == pytest.approx(expected.item(), rel=1e-10)


def test_is_too_large_for_few_samples():
    reference = normals(20000, 10, 1)
    few, more = (frechet_distance(normals(n, 10, 2), reference) for n in (100, 1000))
    assert few > 3 * more > 0


def test_features_that_nothing_changes_do_no_harm():
    a, b = mixed(50, 4, 1), mixed(50, 4, 2)
    dead = torch.zeros(50, 3)
    wide = frechet_distance(torch.cat((a, dead), 1), torch.cat((b, dead), 1))
    assert wide == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_its_name_says_that_it_is_not_fid():
    assert FRECHET_NAME == "Fréchet distance, features of the classifier (not FID)"


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), r"features_a must be of shape \(N, D\) with N at least 2, got \(1, 3\)"),
        (torch.zeros(5, 3), torch.zeros(5), r"features_b must be of shape \(N, D\) with N at least 2, got \(5,\)"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "features_b must be of the size of features_a, 3, got 4"),
        (torch.full((5, 3), math.nan), torch.zeros(5, 3), "features_a must be finite, but 15 values are not"),
    ],
)
def test_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


@pytest.mark.parametrize(("n", "size"), [(400, 7), (30, 50)])
def test_moments_come_in_batches(n, size):
    features = mixed(n, size, 1) + 1e4
    found = moments(features.split([1, 0, 3, n - 4]))
    assert found.count == n
    torch.testing.assert_close(found.mean, features.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.covariance, features.T.cov(), rtol=1e-9, atol=1e-9)
    other = mixed(n, size, 2) + 1e4
    expected = frechet_distance(features, other)
    # Of eigenvalues that are 0 half the digits are lost.
    for a, b in ((found, moments([other])), (found, other), (features, moments(other.split(13)))):
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_moments_refuse():
    with pytest.raises(ValueError, match="a covariance needs at least 2 features, got 1"):
        moments([torch.ones(1, 3)])
    with pytest.raises(ValueError, match="a covariance needs at least 2 features, got 0"):
        moments([])
    with pytest.raises(ValueError, match="batch must be of the size of features, 3, got 4"):
        moments([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(ValueError, match="batch must be finite, but 6 values are not"):
        moments([torch.full((2, 3), math.nan)])
    with pytest.raises(ValueError, match="features must be of one size, got 3 and 2"):
        frechet_distance(moments([normals(5, 3, 1)]), normals(5, 2, 1))


def test_the_bootstrap_knows_its_spread():
    """That of distances of 200 independent pairs of sets."""
    sets = [(normals(300, 3, i), 1.3 * normals(300, 3, 1000 + i) + 0.3) for i in range(200)]
    spread = torch.tensor([frechet_distance(*pair) for pair in sets]).std().item()
    found = [frechet_estimate(*pair, replicates=50, key=Key(1)) for pair in sets[:10]]
    assert found[0].value == frechet_distance(*sets[0])
    errors = torch.tensor([each.standard_error for each in found])
    # Either deviation is off by a few in a hundred.
    assert errors.mean().item() == pytest.approx(spread, rel=0.25)
