"""The trainer's settings."""

from __future__ import annotations

import pytest

from gencore.config import ConfigError
from gencore.train import TrainConfig


def test_steps_and_epochs():
    assert TrainConfig(epochs=2, batch_size=10).total_steps(images=95, repeats=1) == 19
    assert TrainConfig(epochs=2, batch_size=10).total_steps(images=95, repeats=5) == 4
    assert TrainConfig(epochs=2, steps=7).total_steps(images=95, repeats=1) == 7


def test_learning_rate():
    constant = TrainConfig(warmup=4)
    assert [constant.learning_rate_factor(step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = TrainConfig(schedule="cosine", warmup=2)
    assert cosine.learning_rate_factor(2, 12) == 1.0
    assert cosine.learning_rate_factor(7, 12) == pytest.approx(0.5)
    assert cosine.learning_rate_factor(12, 12) == pytest.approx(0.0)
    assert TrainConfig(schedule="cosine", warmup=20).learning_rate_factor(20, 20) == 1.0


def test_every_fault_is_reported():
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_strings(
            {"batch_size": "1048577", "ema": "1", "precision": "float16", "clip": "x", "seed": "-1"}
        )
    assert [fault.split(":")[0] for fault in sorted(caught.value.faults)] == [
        "batch_size", "clip", "ema", "precision", "seed",
    ]  # fmt: skip
