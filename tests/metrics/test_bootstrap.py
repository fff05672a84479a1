import math

import numpy as np
import pytest
import torch

from gencore import Key, ops
from gencore.metrics import Estimate, mean_estimate, resampled


def test_every_row_draws_as_many_as_there_are():
    counts = resampled(50, 200, Key(1))
    assert counts.shape == (200, 50)
    assert counts.sum(1).tolist() == [50] * 200
    # Each is left out with (1 - 1/n)^n, 0.364; 10,000 of them have a deviation of 0.005 at most.
    assert (counts == 0).double().mean().item() == pytest.approx((1 - 1 / 50) ** 50, abs=0.02)


def test_draws_depend_on_the_key_alone():
    counts = resampled(9, 5, Key(1))
    assert torch.equal(counts, resampled(9, 5, Key(1)))
    assert torch.equal(counts[:3], resampled(9, 3, Key(1)))
    assert not torch.equal(counts, resampled(9, 5, Key(2)))
    assert resampled(9, 0, Key(1)).shape == (0, 9)


def test_a_mean_has_the_error_that_the_bootstrap_finds():
    values = ops.normal((400,), Key(3), dtype=torch.float64)
    found = mean_estimate(values)
    assert found.value == pytest.approx(values.mean().item(), rel=1e-12)
    drawn = np.random.default_rng(0).choice(values.numpy(), (4000, 400)).mean(1)
    # A deviation of 4,000 figures is off by 1.1%; five times that.
    assert found.standard_error == pytest.approx(drawn.std(), rel=0.06)
    assert math.isnan(mean_estimate(torch.ones(1)).standard_error)


def test_interval():
    low, high = Estimate(3.0, 2.0).interval
    assert (low, high) == (pytest.approx(3 - 3.919928), pytest.approx(3 + 3.919928))
    assert all(map(math.isnan, Estimate(3.0).interval))


def test_refuses():
    with pytest.raises(ValueError, match="n must be at least 1 and replicates at least 0, got 0 and 3"):
        resampled(0, 3, Key(0))
