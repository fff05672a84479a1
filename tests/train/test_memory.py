"""Too little memory is one kind of error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gencore.models.base import ModelPlugin
from gencore.plugins import MODELS
from gencore.train import NotEnoughMemoryError
from gencore.train.memory import enough_memory


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(1 << 55),
        lambda: np.empty(1 << 55),
        lambda: nn.Linear(10**18, 10**18),
        lambda: nn.Linear(10**30, 5),
        lambda: [0] * 10**30,
    ],
)
def test_whoever_says_it(ask):
    with pytest.raises(NotEnoughMemoryError, match="not enough memory for the test"), enough_memory("the test"):
        ask()


def test_other_errors_stay(trainer):
    for error in (RuntimeError("shape"), TypeError("none"), OverflowError("too large"), ValueError()):
        with pytest.raises(type(error)), enough_memory("the test"):
            raise error


def test_model_and_step_are_named(trainer, tmp_path):
    def build(config, spec):
        raise MemoryError

    made = trainer(tmp_path / "run")
    plugin = ModelPlugin("toy", "vae", MODELS.load("toy").config, build)
    with pytest.raises(NotEnoughMemoryError, match="not enough memory for the model toy"):
        trainer(tmp_path / "run", plugin=plugin)
    made.begin()
    made.runners[0].loss.loss = lambda step: torch.empty(1 << 55)
    with pytest.raises(NotEnoughMemoryError, match="not enough memory for a step of toy with minibatches of 16"):
        made.fit()
