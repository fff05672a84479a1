"""What contracts remember: the forms of calls that were right, and nothing else."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gencore import Key, diffusion, ops
from gencore.ops import _checks
from gencore.ops._checks import Contract


@pytest.fixture
def contract():
    """One for a tensor, a number and perhaps another tensor; ``asked`` has what the check was asked of."""
    asked = []

    def check(x, number, other=None):
        asked.append((x, number, other))
        _checks.check_tensor("x", x)
        if isinstance(number, bool):
            raise TypeError("number must not be a bool")
        return float(number)

    contract = Contract(check)
    contract.asked = asked
    return contract


def test_a_form_is_asked_once(contract):
    x = torch.zeros(2, 3)
    assert contract.known(x, 1) is None
    assert contract(x, 1) == 1.0
    assert contract.known(torch.ones(2, 3), 1) == (1.0, False)
    assert contract.known(torch.nn.Parameter(x), 1) == (1.0, True)
    with torch.no_grad():
        assert contract.known(torch.nn.Parameter(x), 1) == (1.0, False)
    assert len(contract.asked) == 1


@pytest.mark.parametrize(
    "args",
    [
        (torch.zeros(3, 2), 1),
        (torch.zeros(2, 3, 1), 1),
        (torch.zeros(2, 3, dtype=torch.float64), 1),
        (torch.zeros(2, 3, dtype=torch.int32), 1),
        (torch.zeros(2, 3, device="meta"), 1),
        (torch.zeros(2, 3).to_sparse(), 1),
        (torch.zeros(2, 3, dtype=torch.complex64).conj().imag, 1),
        (torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]), 1),
        (torch.zeros(2, 3), 2),
        (torch.zeros(2, 3), 1.0),
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3), [1]),
        (torch.zeros(2, 3), 1, None),
        (torch.zeros(2, 3), 1, torch.zeros(2)),
        (1, torch.zeros(2, 3)),
        (None, 1),
    ],
    ids=range(16),
)
def test_another_form_is_another_question(contract, args):
    contract(torch.zeros(2, 3), 1)
    assert contract.known(*args) is None


def test_what_no_kernel_can_be_called_with_is_not_remembered(contract):
    for x in (torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, dtype=torch.complex64).conj().imag):
        contract(x, 1)
        assert contract.known(x, 1) is None
    x = torch.zeros(2, 3)
    with FlopCounterMode(display=False):
        contract(x, 1)
        assert contract.known(x, 1) is None
    assert contract.known(x, 1) is None
    torch.vmap(lambda row: contract(row.unsqueeze(0), 1) + row)(x)
    assert contract.known(torch.zeros(1, 3), 1) is None


def test_what_was_refused_is_refused_again(contract):
    contract(torch.zeros(2, 3), 1)
    for _ in range(2):
        with pytest.raises(TypeError, match="bool"):
            contract(torch.zeros(2, 3), True)
        assert contract.known(torch.zeros(2, 3), True) is None


def test_memory_is_bounded(contract, monkeypatch):
    monkeypatch.setattr(_checks, "_MOST", 8)
    for number in range(50):
        contract(torch.zeros(2, 3), number)
        assert contract.known(torch.zeros(2, 3), number) == (number, False)
        assert len(contract._known) <= 8


def test_the_oldest_is_forgotten(contract, monkeypatch):
    monkeypatch.setattr(_checks, "_MOST", 3)
    x = torch.zeros(2, 3)
    for number in range(4):
        contract(x, number)
    assert [contract.known(x, number) is not None for number in range(4)] == [False, True, True, True]


def test_numbers_that_nothing_depends_on_are_not_remembered():
    """A step of the sampler, a weight that changes while training: one form, whatever they are."""
    x, schedule = torch.randn(2, 4), diffusion.linear(10)
    ops.add_noise(x, 0, schedule, Key(0))
    ops.denoising_loss(x, x, 0, schedule, Key(0), bound_weight=0.5)
    contracts = [sys.modules[f"gencore.ops.{op}"]._CONTRACT for op in ("add_noise", "denoising_loss")]
    before = [dict(contract._known) for contract in contracts]
    for t in range(1, 10):
        ops.add_noise(x, t, schedule, Key(0))
        ops.denoising_loss(x, x, t, schedule, Key(0), bound_weight=1 / t)
        ops.variational_bound(torch.cat([x, x], 1), x, t, schedule, Key(0), variance="learned_range")
        ops.denoising_loss(torch.cat([x, x], 1), x, t, schedule, Key(0))
    # The output with a variance is the one form more.
    assert [len(c._known) - len(b) for c, b in zip(contracts, before, strict=True)] == [0, 1]
    for wrong in (True, 10, -1, int, 2.0):
        with pytest.raises((TypeError, ValueError), match="t must be"):
            ops.add_noise(x, wrong, schedule, Key(0))
    for wrong in (True, -1.0, math.inf, math.nan, "1"):
        with pytest.raises((TypeError, ValueError), match="bound_weight must be"):
            ops.denoising_loss(x, x, 1, schedule, Key(0), bound_weight=wrong)


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [
        ((2, 3), (3, 1), False),
        ((2, 3), (1, 2), False),
        ((2, 3), (7, 2), False),
        ((2, 1, 3), (3, 0, 1), False),
        ((2, 3), (1, 1), True),
        ((2, 3), (2, 1), True),
        ((2, 3), (0, 1), True),
        ((4, 2, 2), (3, 2, 1), True),
        ((0, 3), (1, 1), False),
    ],
)
def test_what_lies_in_one_place(shape, strides, overlaps):
    tensor = torch.zeros(64).as_strided(shape, strides)
    assert _checks._may_overlap(tensor) is overlaps
    places = [sum(i * s for i, s in zip(index, strides, strict=True)) for index in np.ndindex(shape)]
    assert (len(set(places)) < len(places)) is overlaps


def test_ops_refuse_what_is_wrong_after_right_calls():
    x, steps = torch.randn(2, 4, 3), ops.step_coefficients(x=1.0)
    for _ in range(2):
        ops.group_norm(x, 1, torch.ones(4))
        with pytest.raises(TypeError, match="num_groups must be an int"):
            ops.group_norm(x, True, torch.ones(4))
        with pytest.raises(TypeError, match="eps must be a number"):
            ops.group_norm(x, 1, torch.ones(4), eps=False)
        with pytest.raises(TypeError, match="weight must have the dtype"):
            ops.group_norm(x, 1, torch.ones(4, dtype=torch.bfloat16))
        ops.reparameterize(x, x, Key(0))
        with pytest.raises(TypeError, match="save_noise must be True or False"):
            ops.reparameterize(x, x, Key(0), save_noise=1)
        with pytest.raises(TypeError, match=r"key must be a gencore\.Key"):
            ops.reparameterize(x, x, 0)
        ops.diffusion_step(x, x, steps, Key(0))
        with pytest.raises(ValueError, match="coefficients must not require a gradient"):
            ops.diffusion_step(x, x, steps.clone().requires_grad_(), Key(0))
        with pytest.raises(TypeError, match=r"history\[0\] must be a tensor"):
            ops.diffusion_step(x, x, steps, Key(0), history=(None,))
        with pytest.raises(TypeError, match="guidance_rescale must be a number"):
            ops.diffusion_step(x, x, steps, Key(0), guidance_rescale=False)


@pytest.mark.parametrize("observer", ["a profiler", "a counter", "a default device"])
def test_tensors_that_overlap_are_refused_whoever_looks_on(observer):
    observers = {
        "a profiler": torch.profiler.profile,
        "a counter": lambda: FlopCounterMode(display=False),
        "a default device": lambda: torch.device("cpu"),
    }
    memory = torch.randn(2, 6, 3)
    with observers[observer](), pytest.raises(ValueError, match="out must"):
        ops.group_norm(memory[:, :4], 2, out=memory[:, 2:])


def test_a_stand_in_for_a_key_is_traced_after_a_right_call():
    x, t, schedule = torch.zeros(2, 4), torch.tensor([0, 1]), diffusion.linear(10)

    class Noising(torch.nn.Module):
        def forward(self, key):
            return ops.add_noise(x, t, schedule, key)

    for _ in range(2):
        graph = torch.fx.symbolic_trace(Noising())
        assert torch.equal(graph(Key(3)), ops.add_noise(x, t, schedule, Key(3)))


class Normed(torch.autograd.Function):
    """Its gradient goes through an op of ours."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return ops.group_norm(grad, 2)


def test_batched_gradients_are_served_in_every_call():
    x, rows = torch.randn(2, 4, 3, requires_grad=True), torch.randn(5, 2, 4, 3)
    want = torch.stack([ops.group_norm(row, 2) for row in rows])
    for _ in range(2):
        (got,) = torch.autograd.grad(Normed.apply(x), x, rows, is_grads_batched=True)
        torch.testing.assert_close(got, want)


def test_what_left_a_transform_is_served_in_every_call():
    x0, t, schedule = torch.randn(2, 4), torch.tensor([0, 1]), diffusion.linear(10)
    left = []

    def remembered(x):
        left.append(x * 2)
        return x.sum()

    torch.func.grad(remembered)(x0)
    want = ops.denoising_loss(x0 * 2, x0, t, schedule, Key(0))
    for leaf in (left[0], left[0].detach().requires_grad_()):
        for _ in range(2):
            torch.testing.assert_close(ops.denoising_loss(leaf, x0, t, schedule, Key(0)).detach(), want)
