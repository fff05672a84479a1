"""What a training tells of itself on its way: losses on test images, pictures of samples, TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencore import pictures, plugins
from gencore.models.base import GenerativeModel, Step, checked_images
from gencore.models.modes import evaluating
from gencore.noise import Key
from gencore.processes import Processes
from gencore.spec import Dataset
from gencore.train.descent import Average, PhaseRunner, checked_loss
from gencore.train.errors import TrainingError

# Folded into the seed, so that neither shares noise with the training.
_VALIDATION, _SAMPLES = int.from_bytes(b"validate", "big"), int.from_bytes(b"pictures", "big")
# Of the test images, so many at most are measured.
_MOST_IMAGES = 10_000


@contextmanager
def averaged(model: GenerativeModel, average: Average | None) -> Iterator[None]:
    """Within it, the model has the moving average of its weights, if there is one."""
    if average is None:
        yield
        return
    state = model.state_dict()
    own = {name: state[name].clone() for name in average.tensors}
    try:
        for name, tensor in average.tensors.items():
            state[name].copy_(tensor)
        yield
    finally:
        for name, tensor in own.items():
            state[name].copy_(tensor)


def validation_losses(
    runners: Iterable[PhaseRunner],
    model: GenerativeModel,
    data: Dataset,
    seed: int,
    batch_size: int,
    processes: Processes,
    autocast: AbstractContextManager[Any],
    total_steps: int,
) -> dict[str, float]:
    """The mean loss of each phase on test images, in evaluation mode: the same images and noise at every step."""
    count = min(len(data), _MOST_IMAGES)
    runners = list(runners)
    sums = torch.zeros(len(runners), dtype=torch.float64, device=model.device)
    with evaluating(model):
        for first in range(0, count, batch_size):
            last = min(first + batch_size, count)
            low, high = processes.rows(last - first)
            batch = data.batch(torch.arange(first + low, first + high)).to(model.device)
            for runner in runners if len(batch) else ():
                key = Key(seed).fold_in(_VALIDATION).fold_in(runner.index).samples(first + low)
                with plugins.blamed(model.plugin_name, f"the loss of phase {runner.phase.name!r}"), autocast:
                    loss = checked_loss(model(runner.phase.loss, Step(batch, key, 0, total_steps)))
                sums[runner.index] += loss.value.detach().double() * len(batch)
    means = (processes.summed(sums) / count).tolist()
    return {f"validation/{runner.phase.name}/loss": mean for runner, mean in zip(runners, means, strict=True)}


def sampled(model: GenerativeModel, n: int, seed: int, conditions: Mapping[str, Any]) -> Tensor:
    """``n`` samples on the CPU: at every step those of the same noise."""
    with plugins.blamed(model.plugin_name, "sample()"):
        return checked_images(model.sample(n, Key(seed).fold_in(_SAMPLES), conditions), n, model.spec)


def conditions_of(model: GenerativeModel, data: Dataset, n: int, *, required: bool = False) -> dict[str, Any]:
    """Conditions for ``n`` samples of a model: classes in turns, and those of the data's first images.

    Args:
        required: give those alone that the model cannot do without.
    """
    names = [name for name, need in model.takes.items() if need == "required" or not required]
    given = data.batch(torch.arange(n) % len(data)).conditions if names else {}
    conditions: dict[str, Any] = {}
    for name in names:
        classes = model.spec[name].names
        conditions[name] = torch.arange(n) % len(classes) if classes else given[name]
    return conditions


def write_picture(images: Tensor, path: Path) -> None:
    """A grid of samples as PNG; of a model that has broken down, none."""
    if bool(images.isfinite().all()):
        pictures.save(pictures.grid(images), path)


class Board:
    """The metrics of a training for TensorBoard."""

    def __init__(self, directory: Path, step: int):
        self._writer = board_class()(str(directory), purge_step=step + 1)

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def picture(self, images: Tensor, step: int) -> None:
        if len(images[0]) in (1, 3) and bool(images.isfinite().all()):
            self._writer.add_images("samples", images.clamp(0, 1), step)

    def close(self) -> None:
        self._writer.close()


def board_class() -> Any:
    """TensorBoard's writer.

    Raises:
        TrainingError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError("train.tensorboard needs TensorBoard: pip install 'gencore[tensorboard]'") from error
    return SummaryWriter
