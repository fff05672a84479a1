"""What a run came to, and whether two of them came to the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencore.train import Trainer, checkpoint
from gencore.train.log import read_metrics

# What depends on the machine, and not on the run.
_OF_TIME = ("seconds", "images_per_second", "waiting_for_data")


def weights(directory: Path, name: str = "model") -> dict[str, Tensor]:
    return checkpoint.read(directory).tensors(name)


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_runs(a: Path, b: Path) -> None:
    """The newest checkpoints bit for bit, and the metrics."""
    ours, theirs = checkpoint.read(a), checkpoint.read(b)
    assert ours.step == theirs.step
    assert ours.files.keys() == theirs.files.keys()
    for file in ours.files:
        assert_same(ours.tensors(file.removesuffix(".safetensors")), theirs.tensors(file.removesuffix(".safetensors")))
    assert metrics(a) == metrics(b)


def without_time(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in _OF_TIME} for record in records]


def metrics(run: Path) -> list[dict[str, Any]]:
    return without_time(read_metrics(run / "metrics.jsonl"))


def stopping(trainer: Trainer, step: int) -> Trainer:
    """The same trainer, which is interrupted after this step, before it is saved."""
    one_step = trainer.advance

    def advance() -> None:
        if trainer.step == step:
            raise KeyboardInterrupt
        one_step()

    trainer.advance = advance  # type: ignore[method-assign]
    return trainer
