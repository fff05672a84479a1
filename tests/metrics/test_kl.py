"""The Kullback-Leibler divergence: closed forms, quadrature, and what each direction seeks."""

import math

import pytest
import torch
from torch.distributions import Categorical, Laplace, MixtureSameFamily, MultivariateNormal, Normal

from gencore.metrics import kl_divergence, nearest_normal


def normal(mean, deviation):
    return Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(deviation, dtype=torch.float64))


def two_modes(weight=0.5):
    weights = torch.tensor([weight, 1 - weight], dtype=torch.float64)
    return MixtureSameFamily(
        Categorical(weights), Normal(torch.tensor([-3.0, 3.0]).double(), torch.tensor([0.5, 0.8]).double())
    )


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        (normal(0.0, 1.0), normal(0.0, 1.0), 0.0),
        # (m_p - m_q)^2 / 2 for equal variances of 1.
        (normal(0.0, 1.0), normal(1.0, 1.0), 0.5),
        # log(s_q / s_p) + s_p^2 / (2 s_q^2) - 1/2.
        (normal(0.0, 1.0), normal(0.0, 2.0), math.log(2) + 1 / 8 - 1 / 2),
        (normal(0.0, 2.0), normal(0.0, 1.0), -math.log(2) + 2 - 1 / 2),
    ],
)
def test_closed_form_and_numbers_agree(p, q, expected):
    assert kl_divergence(p, q) == pytest.approx(expected, abs=1e-12)
    # Simpson's rule has an error of h^4; what lies beyond 12 deviations is below 1e-30.
    assert kl_divergence(p, q, numeric=True) == pytest.approx(expected, abs=1e-9)


def test_without_a_closed_form_it_is_numeric_and_not_symmetric():
    p, q = two_modes(), normal(0.0, 3.0)
    points = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    for a, b in ((p, q), (q, p)):
        expected = torch.trapezoid(a.log_prob(points).exp() * (a.log_prob(points) - b.log_prob(points)), points)
        assert kl_divergence(a, b) == pytest.approx(expected.item(), abs=1e-6)
    assert abs(kl_divergence(p, q) - kl_divergence(q, p)) > 0.1


def test_forward_seeks_the_mean_and_reverse_a_mode():
    p = two_modes()
    forward = nearest_normal(p, "forward")
    assert float(forward.mean) == pytest.approx(0.0, abs=1e-12)
    assert float(forward.stddev) == pytest.approx(float(p.stddev))
    for start, mode, deviation in ((-2.0, -3.0, 0.5), (2.0, 3.0, 0.8)):
        reverse = nearest_normal(p, "reverse", start)
        # The other mode lies nine deviations and more away, and moves neither.
        assert float(reverse.mean) == pytest.approx(mode, abs=1e-2)
        assert float(reverse.stddev) == pytest.approx(deviation, abs=1e-2)
        # All of q lies in a mode that has half of p: KL(q || p) = log 2.
        assert kl_divergence(reverse, p) == pytest.approx(math.log(2), abs=1e-3)
        # Neither direction's normal is better than the other's by its own measure.
        assert kl_divergence(p, forward) < kl_divergence(p, reverse)
        assert kl_divergence(reverse, p) < kl_divergence(forward, p)


def test_reverse_of_a_normal_is_itself():
    found = nearest_normal(normal(2.0, 0.3), "reverse", 1.5)
    assert float(found.mean) == pytest.approx(2.0, abs=1e-4)
    assert float(found.stddev) == pytest.approx(0.3, abs=1e-4)


@pytest.mark.parametrize(
    ("p", "kind", "message"),
    [
        (3.0, TypeError, "p must be a torch.distributions.Distribution, got float"),
        (Normal(torch.zeros(2), 1.0), ValueError, "p must be of one number"),
        (MultivariateNormal(torch.zeros(2), torch.eye(2)), ValueError, "p must be of one number"),
    ],
)
def test_other_things_are_refused(p, kind, message):
    with pytest.raises(kind, match=message):
        kl_divergence(p, Laplace(0.0, 1.0))
    with pytest.raises(ValueError, match="direction must be 'forward' or 'reverse', got 'up'"):
        nearest_normal(normal(0.0, 1.0), "up")
