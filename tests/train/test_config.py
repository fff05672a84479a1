"""The trainer's settings."""

from __future__ import annotations

import dataclasses

import pytest

from gencore.config import ConfigError
from gencore.train import TrainConfig
from gencore.train.config import RESUMABLE


def test_steps_and_epochs():
    assert TrainConfig(epochs=2, batch_size=10).total_steps(images=95, minibatches=1) == 19
    assert TrainConfig(epochs=2, batch_size=10).total_steps(images=95, minibatches=5) == 4
    assert TrainConfig(epochs=2, batch_size=10).total_steps(images=95, minibatches=1 / 4) == 76
    assert TrainConfig(epochs=2, steps=7).total_steps(images=95, minibatches=1) == 7


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
        TrainConfig.from_settings(
            {"batch_size": "1048577", "average.decay": "1", "precision": "float8", "clip": "x", "seed": "-1"}
        )
    assert [fault.split(":")[0] for fault in sorted(caught.value.faults)] == [
        "average.decay", "batch_size", "clip", "precision", "seed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"batch_size": 4, "accumulate": 5}, "accumulate: must be at most batch_size=4, was 5"),
        ({"keep_best": True}, "keep_best: must be false without validate_every"),
        ({"average": {"every": 0}}, "average.every: must be >= 1, was 0"),
        ({"sharding": "half"}, "sharding: must be one of 'none', 'full', was 'half'"),
    ],
)
def test_settings_that_do_not_go_together(settings, fault):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(settings)
    assert list(caught.value.faults) == [fault]


def test_the_settings_of_a_resumed_run_that_may_differ_are_settings():
    assert set(RESUMABLE) <= {field.name for field in dataclasses.fields(TrainConfig)}
