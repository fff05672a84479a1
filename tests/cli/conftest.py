"""The command line, called as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from gencore.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here trains small networks."""


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
        assert main(["train", model, *options, "--set", "train.ema=0.9"]) == 0
    return folder
