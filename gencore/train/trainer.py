"""One trainer for every model: it runs the phases that the model lists, and can be killed and go on at any moment.

Order of the data, noise and learning rate are pure functions of the seed and the step (:mod:`gencore.train.order`),
so a checkpoint holds weights, moving average, optimiser state, and nothing of any generator. A run that was killed
and went on has, on the CPU with the same number of threads, the weights of one that was not, bit for bit.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gencore import ops, plugins
from gencore.config import ConfigError
from gencore.files import locked
from gencore.models.base import Batch, GenerativeModel, Loss, ModelConfig, ModelPlugin, Phase
from gencore.noise import Key
from gencore.plugins import build_model
from gencore.progress import Progress
from gencore.train import checkpoint as checkpoints
from gencore.train.checkpoint import Checkpoint, CheckpointError, Run
from gencore.train.config import LENGTH, RESUMABLE, TrainConfig
from gencore.train.interruption import Interrupted, deferred_signals
from gencore.train.log import Meter, MetricsLog
from gencore.train.memory import enough_memory
from gencore.train.order import batch_indices, phase_key

Device = Literal["auto", "cpu", "cuda"]


class TrainingError(RuntimeError):
    """Training cannot begin or go on: the folder holds another run, the loss is not finite, a device is missing."""


class ImageSource(Protocol):
    """What the trainer asks of a data set: its size and content, and minibatches by index."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch: ...


def choose_device(name: Device = "auto") -> torch.device:
    """The device of that name; ``auto`` is a CUDA device if there is one that gencore has kernels for, else the CPU.

    Raises:
        ValueError: an unknown name.
        TrainingError: ``cuda``, and there is no such device, or there are no kernels for it.
    """
    if name not in get_args(Device):
        raise ValueError(f"device must be one of {', '.join(get_args(Device))}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds none"
        raise TrainingError(f"there is no CUDA device: {why}")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        ops.normal((1, 1), Key(0), device="cuda")
    except ValueError as error:
        if name == "cuda":
            raise TrainingError(f"models cannot run on CUDA: {error}") from error
        return torch.device("cpu")
    return torch.device("cuda")


class Trainer:
    """Trains the model of a plugin on a data set and writes the run's folder.

    Args:
        plugin: which model.
        model_config: its configuration, its ``image_shape`` and ``num_classes`` those of the data set.
        data: the training images.
        config: how to train.
        out: the run's folder, made if it is not there.
        data_name: what :func:`gencore.data.load` takes to load ``data`` again; kept in the run.
        data_settings: the settings that it takes; kept in the run too.
        start: the checkpoint whose weights a new run begins with (its moving average, if it has one). The new run keeps
            a copy, and does not need it later.
        device: ``auto``, ``cpu`` or ``cuda``. No part of the run: it may go on elsewhere.
        progress: whether to show a bar on a terminal, or to write a line every so often where stderr is none.

    Raises:
        TrainingError: the device or TensorBoard is missing.
        CheckpointError: the weights of ``start`` do not fit the model.
        PluginError: the plugin does not build a model that can be trained.
        NotEnoughMemoryError: for the model.
    """

    def __init__(
        self,
        plugin: ModelPlugin,
        model_config: ModelConfig,
        data: ImageSource,
        config: TrainConfig,
        out: Path | str,
        *,
        data_name: str,
        data_settings: Mapping[str, Any] | None = None,
        start: Checkpoint | None = None,
        device: Device = "auto",
        progress: bool = True,
    ):
        self.data, self.config, self.out, self.progress = data, config, Path(out), progress
        self.run = Run(
            model=plugin.name,
            config=model_config.to_dict(),
            data=data_name,
            data_settings=dict(data_settings or {}),
            images=len(data),
            class_names=list(data.class_names),
            fingerprint=data.fingerprint,
            train=config.to_dict(),
            start=None if start is None else str(start.directory.resolve()),
        )
        self.device = choose_device(device)
        # Accelerate keeps its settings for the whole process; a second trainer may have others.
        AcceleratorState._reset_state(reset_partial_state=True)
        precision = "bf16" if config.precision == "bfloat16" else "no"
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision=precision)
        if self.accelerator.num_processes > 1:
            raise TrainingError("training in several processes is not supported yet; start a single one")
        self.board = _board_class() if config.tensorboard else None
        with torch.random.fork_rng(devices=[]), enough_memory(f"the model {plugin.name}"):
            torch.manual_seed(config.seed)
            self.model: GenerativeModel = build_model(plugin, model_config)
            self.model.to(self.device).train()
        if start is not None:
            checkpoints.fill_model(self.model, start.weights(), start.directory)
        phases = _checked_phases(plugin.name, self.model)
        self.optimizers = [_PhaseOptimizer(i, phase, self.model, self.device) for i, phase in enumerate(phases)]
        self.average = None if config.ema is None else _Average(self.model, config.ema)
        self.total_steps = config.total_steps(len(data), max(phase.repeats for phase in phases))
        self.step = 0
        self.seconds = 0.0

    def fit(self, *, resume: bool = False, begin: Callable[[], None] | None = None) -> GenerativeModel:
        """Trains to the last step and returns the model, in evaluation mode. Draws nothing from torch's generators.

        At SIGINT (Ctrl-C), SIGTERM or SIGHUP the step under way is finished and saved first; a second signal ends at
        once.

        Args:
            resume: go on from the newest checkpoint in the folder (from the start, if the run was killed before its
                first, or before anything was written); what the run's settings were must be what they are now, except
                its length (if the learning rate is constant) and what it writes. A run that is as long as asked for
                is left as it is.
            begin: called when the folder is open and nothing is wrong with it, before the first step; not for a run
                that is long enough.

        Raises:
            Interrupted: a signal ended the run, which is saved.
            TrainingError: the folder holds a run already (without ``resume``), another process trains there, or a
                loss or gradient is not finite.
            CheckpointError: the run to go on with is of another model or other images, has other settings, or is
                damaged.
            PluginError: the model's loss raises an error, or is none.
            OSError: the disk is full; the newest checkpoint is whole.
            NotEnoughMemoryError: for a step.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.out / ".lock"))
            except BlockingIOError as error:
                raise TrainingError(f"another process is training in {self.out}") from error
            self._open_run(resume)
            if self.step < self.total_steps:
                if begin is not None:
                    begin()
                devices = [self.device] if self.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices=devices))
                self._train()
        return self.model.eval()

    def _open_run(self, resume: bool) -> None:
        checkpoints.remove_leftovers(self.out)
        found = bool(checkpoints.checkpoints(self.out))
        # A run that came to no checkpoint (it was killed, or failed at once) is nothing that another could harm.
        if found and not resume:
            raise TrainingError(f"{self.out} already holds a run; go on with --resume or choose another folder")
        if resume and (found or (self.out / "run.json").exists()):
            saved_run = checkpoints.read_run(self.out)
            self._refuse_other(self.out, saved_run)
            if saved_run.start and not found:
                raise CheckpointError(
                    f"{self.out} was ended before it kept the weights of {saved_run.start}, with which it began; "
                    "begin it anew, without --resume"
                )
            self.run = dataclasses.replace(self.run, start=saved_run.start)
        if found:
            saved = checkpoints.read(self.out)
            self._refuse_other(saved.directory, saved.run)
            self._restore(saved)
        if self.step < self.total_steps:
            checkpoints.write_run(self.out, self.run)
            if self.run.start and not found:
                # What the run began with is a part of it, wherever it came from.
                self._save()

    def _refuse_other(self, place: Path, saved: Run) -> None:
        if saved.model == self.run.model:
            # An older gencore wrote no settings that came later: the run has their defaults.
            with suppress(ConfigError):
                config = type(self.model.config).from_dict(saved.config).to_dict()
                train = TrainConfig.from_dict(saved.train).to_dict()
                saved = dataclasses.replace(saved, config=config, train=train)
        if differences := saved.differences(self.run, allowed=RESUMABLE):
            raise CheckpointError(f"{place} is of another run: {'; '.join(differences)}")
        longer = saved.differences(self.run, allowed=tuple(name for name in RESUMABLE if name not in LENGTH))
        if longer and self.config.schedule != "constant":
            schedule = self.config.schedule
            raise CheckpointError(f"{place}: the length of a {schedule} schedule cannot change: {'; '.join(longer)}")

    def _restore(self, saved: Checkpoint) -> None:
        checkpoints.fill_model(self.model, saved.tensors("model"), saved.directory)
        if self.average is not None:
            average = saved.tensors("ema")
            checkpoints.check_fit(self.average.tensors, average, saved.directory)
            if (name := checkpoints.not_finite(self.model, average)) is not None:
                raise CheckpointError(f"the moving average in {saved.directory} is of no use: {name} is not finite")
            self.average.load(average)
        tensors = saved.tensors("optimizer")
        try:
            self.seconds = float(saved.state["seconds"])
            for optimizer in self.optimizers:
                optimizer.load(tensors)
                optimizer.meter.load_state(saved.state["meters"][optimizer.phase.name])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the training state in {saved.directory} does not fit the model: {error}") from error
        self.step = saved.step

    def _train(self) -> None:
        started = time.monotonic() - self.seconds
        with ExitStack() as stack:
            log = MetricsLog(self.out / "metrics.jsonl", self.step)
            stack.callback(log.close)
            board = None
            if self.board is not None:
                board = self.board(str(self.out / "tensorboard"), purge_step=self.step + 1)
                stack.callback(board.close)
            progress = stack.enter_context(
                Progress(self.total_steps, self.step, name=self.run.model, unit="step", shown=self.progress)
            )
            ending = stack.enter_context(deferred_signals())
            saved_at = time.monotonic()
            while self.step < self.total_steps:
                with enough_memory(f"a step of {self.run.model} with minibatches of {self.config.batch_size}"):
                    self.advance()
                last = self.step == self.total_steps
                self.seconds = time.monotonic() - started
                signal = ending()
                if last or self.step % self.config.log_every == 0:
                    record = self._record()
                    log.write(record)
                    progress.figures({o.phase.name: record[f"{o.phase.name}/loss"] for o in self.optimizers})
                    if board is not None:
                        for name, value in record.items():
                            board.add_scalar(name, value, self.step)
                if last or signal is not None or self._is_save_due(saved_at):
                    self._refuse_divergence()
                    self._save()
                    saved_at = time.monotonic()
                if signal is not None and not last:
                    raise Interrupted(signal)
                progress.update()

    def _is_save_due(self, saved_at: float) -> bool:
        minutes = self.config.checkpoint_minutes
        late = minutes is not None and time.monotonic() - saved_at >= 60 * minutes
        return late or self.step % self.config.checkpoint_every == 0

    def advance(self) -> None:
        """One step by itself, of every phase: no checkpoint, no line, no file. It seeds torch's generator."""
        config = self.config
        factor = config.learning_rate_factor(self.step, self.total_steps)
        for index, optimizer in enumerate(self.optimizers):
            phase = optimizer.phase
            for repetition in range(phase.repeats):
                draw = self.step * phase.repeats + repetition
                indices = batch_indices(config.seed, index, draw, config.batch_size, len(self.data))
                batch = _moved(self.data.batch(indices), self.device)
                key = phase_key(config.seed, self.step, index, repetition)
                # For what draws from torch's generator, such as dropout: it too depends on seed and step alone.
                # (torch.manual_seed formats a stack trace for every kind of device that it has not started.)
                seed = torch.manual_seed if self.device.type == "cuda" else torch.default_generator.manual_seed
                seed(int(key.packed[0]))
                with plugins.blamed(self.run.model, f"the loss of phase {phase.name!r} at step {self.step + 1}"):
                    with self.accelerator.autocast():
                        loss = _checked_loss(phase.loss(batch, key))
                    optimizer.descend(loss, factor, config.clip, self.step + 1)
                if self.device.type == "cpu":
                    self._refuse_divergence()
        if self.average is not None:
            self.average.update(self.model, self.step)
        self.step += 1

    def _refuse_divergence(self) -> None:
        for optimizer in self.optimizers:
            if (step := optimizer.meter.first_bad_step()) is not None:
                raise self._divergence(f"the loss or gradient of phase {optimizer.phase.name!r}", step)

    def _divergence(self, what: str, step: int) -> TrainingError:
        saved = checkpoints.checkpoints(self.out)
        kept = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        return TrainingError(
            f"{what} is not finite at step {step}; {kept}; a smaller learning rate or train.clip may help"
        )

    def _record(self) -> dict[str, Any]:
        self._refuse_divergence()
        record: dict[str, Any] = {"step": self.step, "seconds": round(self.seconds, 3)}
        for optimizer in self.optimizers:
            name = optimizer.phase.name
            record |= {f"{name}/{metric}": mean for metric, mean in optimizer.meter.means().items()}
            record[f"{name}/learning_rate"] = optimizer.learning_rate
        return record

    def _save(self) -> None:
        tensors: dict[str, dict[str, Tensor]] = {"model": dict(self.model.state_dict())}
        if (name := checkpoints.not_finite(self.model, tensors["model"])) is not None:
            raise self._divergence(f"the weight {name}", self.step)
        if self.average is not None:
            tensors["ema"] = self.average.tensors
        tensors["optimizer"] = {k: v for optimizer in self.optimizers for k, v in optimizer.tensors().items()}
        meters = {optimizer.phase.name: optimizer.meter.state() for optimizer in self.optimizers}
        state = {"seconds": self.seconds, "meters": meters}
        checkpoints.save(self.out, self.run, self.step, tensors, state, self.config.keep)


class _PhaseOptimizer:
    """A phase with its Adam, its meter, and the names of its parameters in the model."""

    def __init__(self, index: int, phase: Phase, model: nn.Module, device: torch.device):
        self.index, self.phase, self.meter = index, phase, Meter()
        self.parameters = list(phase.parameters)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [names[id(parameter)] for parameter in self.parameters]
        adam = phase.optimizer
        self.learning_rate = adam.lr
        self.adam = torch.optim.AdamW(
            self.parameters,
            lr=adam.lr,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )

    def descend(self, loss: Loss, factor: float, clip: float | None, step: int) -> None:
        """One step of Adam down ``loss``; ``step`` is only what the meter calls it."""
        self.adam.zero_grad(set_to_none=True)
        # Only this phase's parameters: the generator's loss leaves no gradient in the discriminator.
        # (Accelerate's backward would divide the loss by what an environment variable says.)
        torch.autograd.backward(loss.value, inputs=self.parameters)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
        self.meter.add(step, loss.value.detach(), norm, loss.metrics)
        self.learning_rate = self.phase.optimizer.lr * factor
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate
        self.adam.step()

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by phase, parameter and name."""
        return {
            f"{self.phase.name}/{name}/{key}": value
            for name, parameter in zip(self.names, self.parameters, strict=True)
            for key, value in self.adam.state.get(parameter, {}).items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`."""
        state: dict[int, dict[str, Tensor]] = {}
        for i, name in enumerate(self.names):
            prefix = f"{self.phase.name}/{name}/"
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for key, value in found.items():
                if value.dim() and value.shape != self.parameters[i].shape:
                    shapes = f"{tuple(value.shape)} for {tuple(self.parameters[i].shape)}"
                    raise ValueError(f"{prefix}{key} of shape {shapes}")
            # A parameter that never had a gradient has no state.
            if found:
                state[i] = {key: _laid_out_as(self.parameters[i], value) for key, value in found.items()}
        self.adam.load_state_dict({"state": state, "param_groups": self.adam.state_dict()["param_groups"]})


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value`` with the parameter's strides: the fused optimiser takes it that both have the same."""
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


class _Average:
    """The exponential moving average of a model's floating-point state; the rest is copied."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """One step of the average; early on it forgets faster, so that the initial weights are soon gone."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = []
        currents: list[Tensor] = []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.tensors[name])
                currents.append(tensor)
            else:
                self.tensors[name].copy_(tensor)
        get_ema_multi_avg_fn(decay)(averages, currents, None)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from a checkpoint's tensors."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


def _checked_phases(name: str, model: GenerativeModel) -> Sequence[Phase]:
    phases = list(model.phases())
    own = {id(parameter) for parameter in model.parameters()}
    fault = None
    if len({phase.name for phase in phases}) < len(phases):
        fault = f"its model lists two phases of one name: {', '.join(phase.name for phase in phases)}"
    for phase in phases:
        if phase.repeats < 1:
            fault = f"phase {phase.name!r} of its model must have repeats >= 1, but has {phase.repeats}"
        elif not phase.parameters or any(id(parameter) not in own for parameter in phase.parameters):
            fault = f"phase {phase.name!r} of its model must train parameters of the model"
    if fault:
        raise plugins.broken("model", name, fault)
    return phases


def _checked_loss(loss: Loss) -> Loss:
    if not isinstance(loss, Loss) or loss.value.dim() != 0:
        raise TypeError(f"it must be a Loss with a scalar value, but is {loss!r}")
    return loss


def _moved(batch: Batch, device: torch.device) -> Batch:
    labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
    return Batch(batch.images.to(device, non_blocking=True), labels)


def _board_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError("train.tensorboard needs TensorBoard: pip install 'gencore[tensorboard]'") from error
    return SummaryWriter
