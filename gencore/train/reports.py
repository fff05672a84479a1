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
from gencore.processes import OtherProcessError, Processes
from gencore.spec import Dataset
from gencore.train.descent import Average, PhaseRunner, checked_loss
from gencore.train.errors import TrainingError

# Folded into the seed, so that neither shares noise with the training.
_VALIDATION, _SAMPLES = int.from_bytes(b"validate", "big"), int.from_bytes(b"pictures", "big")
# Of the test images, so many at most are measured.
_MOST_IMAGES = 10_000


@contextmanager
def aside(model: GenerativeModel, average: Average | None) -> Iterator[None]:
    """Within it, what is computed leaves no trace in the training, and the model has the moving average of its weights,
    if there is one."""
    own: dict[str, Tensor] = {}
    try:
        if average is not None:
            state = _divided_state(model)
            own = {name: state[name].clone() for name in average.tensors}
            for name, tensor in average.tensors.items():
                state[name].copy_(tensor)
        yield
    finally:
        state = _divided_state(model)
        for name, tensor in own.items():
            state[name].copy_(tensor)


def _divided_state(model: GenerativeModel) -> dict[str, Tensor]:
    """The model's state. Weights that a forward without a backward has put together are divided again before."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]
    return model.state_dict()


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
    """The mean loss of each phase on test images, in evaluation mode: the same images and noise at every step.

    It is the loss of the last step, so that figures of a loss that changes with the steps can be compared.
    """
    count = min(len(data), _MOST_IMAGES)
    runners = list(runners)
    sums = torch.zeros(len(runners), dtype=torch.float64, device=model.device)
    with evaluating(model):
        for first in range(0, count, batch_size):
            last = min(first + batch_size, count)
            low, high = processes.rows(last - first)
            # A process without a row of its own is needed all the same, where the weights are divided.
            rows = torch.arange(first + low, max(first + high, first + low + 1)) % count
            batch = data.batch(rows).to(model.device)
            for runner in runners:
                key = Key(seed).fold_in(_VALIDATION).fold_in(runner.index).samples(first + low)
                what = f"the loss of phase {runner.phase.name!r}"
                with plugins.blamed(model.plugin_name, what, OtherProcessError), processes.waiting(), autocast:
                    loss = checked_loss(model(runner.phase.loss, Step(batch, key, total_steps - 1, total_steps)))
                sums[runner.index] += loss.value.detach().double() * (high - low)
    means = (processes.summed(sums) / count).tolist()
    return {f"validation/{runner.phase.name}/loss": mean for runner, mean in zip(runners, means, strict=True)}


def sampled(model: GenerativeModel, n: int, seed: int, conditions: Mapping[str, Any], processes: Processes) -> Tensor:
    """``n`` samples on the CPU: at every step those of the same noise."""
    what = plugins.blamed(model.plugin_name, "sample()", OtherProcessError)
    with what, processes.waiting():
        return checked_images(model.sample(n, Key(seed).fold_in(_SAMPLES), conditions), n, model.spec)


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
