"""A quick way to train the toy model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gencore import data, plugins
from gencore.train import TrainConfig, Trainer


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here trains small networks."""


@pytest.fixture
def trainer(toy_environment: dict[str, str]) -> Callable[..., Trainer]:
    """``trainer(out, model={...}, plugin="toy", **train settings)``."""

    def make(out: Path, model: dict[str, Any] | None = None, plugin: str = "toy", **train: Any) -> Trainer:
        bars = data.load("bars", split="train")
        found = plugins.load_model(plugin)
        shape = {"image_shape": bars.image_shape, "num_classes": bars.num_classes}
        settings = {"steps": 12, "batch_size": 16, "log_every": 3, "checkpoint_every": 4, **train}
        config = found.config.from_dict({**shape, **(model or {})})
        return Trainer(found, config, bars, TrainConfig.from_dict(settings), out, data_name="bars", progress=False)

    return make
