"""The command line, called as a function."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from gencore import metrics
from gencore.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here trains small networks."""


@pytest.fixture(scope="session", autouse=True)
def _one_training_of_a_classifier() -> Iterator[None]:
    """What judges the samples of a data set takes seconds to train, and is the same each time; fewer steps do."""

    train_classifier, known = metrics.train_classifier, {}

    def trained(train: Any, test: Any, **options: Any) -> Any:
        what = train.fingerprint, test.fingerprint, *sorted(options.items())
        if what not in known:
            known[what] = train_classifier(train, test, **{"steps": 500, **options})
        return known[what]

    with mock.patch.object(metrics, "train_classifier", trained):
        yield


@pytest.fixture
def gencore(toy_environment: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``gencore("sample", folder, "-n", 4)`` gives exit code, stdout and stderr."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture(scope="session")
def trained(toy_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, of ``toy`` and ``toy-sampler``; tests do not write to it."""
    folder = tmp_path_factory.mktemp("trained")
    for model in ("toy", "toy-sampler"):
        options = ["--data", "bars", "--out", str(folder / model), "--steps", "30", "--batch-size", "16"]
        assert main(["train", model, *options, "--set", "train.average.decay=0.9"]) == 0
    return folder


@pytest.fixture(scope="session")
def conditioned(toy_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs whose models need a condition: ``toy-translator`` and ``toy-captions``."""
    folder = tmp_path_factory.mktemp("conditioned")
    for model, data in (("toy-translator", "toy-pairs"), ("toy-captions", "toy-texts")):
        options = ["--out", str(folder / model), "--steps", "30", "--batch-size", "16", "--set", "lr=0.1"]
        assert main(["train", model, "--data", data, *options]) == 0
    return folder


@pytest.fixture(scope="session")
def stage(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``toy-stage``, whose first stage was a copy of that of ``trained`` and is gone."""
    folder = tmp_path_factory.mktemp("stage")
    shutil.copytree(trained / "toy", folder / "first")
    options = ["--data", "bars", "--out", str(folder / "run"), "--steps", "6", "--batch-size", "16"]
    assert main(["train", "toy-stage", *options, "--set", f"first={folder / 'first'}"]) == 0
    shutil.rmtree(folder / "first")
    return folder / "run"
