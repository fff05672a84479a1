"""The order of the data and the keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gencore.train.order import batch_indices, phase_key


@settings(deadline=None, max_examples=30)
@given(images=st.integers(1, 40), batch_size=st.integers(1, 100), seed=st.integers(0, 2**63 - 1))
def test_every_epoch_is_a_permutation(images, batch_size, seed):
    draws = -(-3 * images // batch_size)
    order = torch.cat([batch_indices(seed, 0, draw, batch_size, images) for draw in range(draws)])
    assert order.dtype == torch.int64
    for epoch in range(3):
        part = order[epoch * images : (epoch + 1) * images]
        assert sorted(part.tolist()) == list(range(images))


def test_order_depends_on_seed_phase_and_epoch_only():
    first = batch_indices(0, 0, 0, 500, 500)
    assert torch.equal(first, batch_indices(0, 0, 0, 500, 500))
    others = [batch_indices(*which, 500, 500) for which in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(not torch.equal(first, other) for other in others)
    assert torch.equal(batch_indices(0, 0, 3, 10, 500), first[30:40])


def test_orders_are_fair():
    # Where image 0 lands in 4,000 epochs of 10 images: chi-square with 9 degrees of freedom, 99.9% quantile 27.9.
    places = torch.tensor([int((batch_indices(5, 0, epoch, 10, 10) == 0).nonzero()) for epoch in range(4000)])
    counts = torch.bincount(places, minlength=10).double()
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="holds no images"):
        batch_indices(0, 0, 0, 1, 0)


def test_keys_differ():
    which = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    keys = {int(phase_key(*each).packed[0]) for each in which}
    assert len(keys) == 5
    assert phase_key(3, 4, 1, 2).packed.tolist() == phase_key(3, 4, 1, 2).packed.tolist()
