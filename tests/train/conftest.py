"""A quick way to train the toy model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gencore import data
from gencore.data import NamedDataset
from gencore.models.base import ModelPlugin
from gencore.plugins import MODELS
from gencore.train import TrainConfig, Trainer
from gencore.train.checkpoint import Checkpoint

_ENTRY_POINTS = """\
[gencore.models]
toy-phases = train.toys:phases
toy-nested = train.toys:nested

[gencore.datasets]
lazy-bars = train.toys:lazy_bars
"""


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here trains small networks."""


@pytest.fixture(scope="session")
def environment(toy_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Installs the plugins of ``toys.py`` too, for this process; returns the environment that does so for another."""
    folder = tmp_path_factory.mktemp("trainer")
    info = folder / "gencore_trainer_toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gencore-trainer-toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    sys.path.insert(0, str(folder))
    paths = [str(folder), str(Path(__file__).parent.parent), toy_environment["PYTHONPATH"]]
    return {**toy_environment, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture
def trainer(environment: dict[str, str]) -> Callable[..., Trainer]:
    """``trainer(out, model={...}, plugin="toy", images="bars", **train settings)``."""

    def make(
        out: Path,
        model: dict[str, Any] | None = None,
        plugin: str | ModelPlugin = "toy",
        images: str | NamedDataset = "bars",
        *,
        start: Checkpoint | None = None,
        **train: Any,
    ) -> Trainer:
        found = MODELS.load(plugin) if isinstance(plugin, str) else plugin
        settings = {"steps": 12, "batch_size": 16, "log_every": 3, "checkpoint_every": 4, **train}
        config = TrainConfig.from_dict(settings)
        name = images if isinstance(images, str) else images.name
        training = data.load(images, "train") if isinstance(images, str) else images
        test = None if config.validate_every is None else data.load(name, "test")
        return Trainer(
            found,
            found.config_of(model or {}),
            training,
            config,
            out,
            data_name=name,
            validation=test,
            start=start,
            progress=False,
        )

    return make
