"""One trainer for every model: it runs the phases that the model lists, and can be killed and go on at any moment.

Order of the data, noise and learning rate are pure functions of the seed and the step (:mod:`gencore.train.order`),
so a checkpoint holds weights, moving average, optimiser state, and nothing of any generator. A run that was killed
and went on has, on the CPU with the same number of threads, the weights of one that was not, bit for bit. So has a run
in several processes, or one whose minibatches are computed in parts, up to rounding: each image has the noise that it
has in one process.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
import typing
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from gencore import ops, plugins
from gencore.config import ConfigError
from gencore.data import DATASETS, DataError, NamedDataset
from gencore.data.conditions import conditions_for
from gencore.files import locked
from gencore.models.base import GenerativeModel, ModelConfig, ModelPlugin, Step
from gencore.noise import Key
from gencore.plugins import MODELS, build_model
from gencore.processes import OtherProcessError, join, started
from gencore.progress import Progress
from gencore.spec import Batch
from gencore.train import checkpoint as checkpoints
from gencore.train import descent, loader, reports
from gencore.train.batch_norm import synchronized
from gencore.train.checkpoint import Checkpoint, CheckpointError, Run
from gencore.train.config import LENGTH, RESUMABLE, TrainConfig
from gencore.train.descent import Average, Descent, PhaseRunner
from gencore.train.errors import TrainingError
from gencore.train.interruption import Interrupted, deferred_signals
from gencore.train.log import MetricsLog, read_metrics
from gencore.train.measuring import Measuring
from gencore.train.memory import enough_memory
from gencore.train.order import phase_key

Device = Literal["auto", "cpu", "cuda"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: Device = "auto") -> torch.device:
    """The device of that name; ``auto`` is a CUDA device if there is one that gencore has kernels for, else the CPU.

    Of several processes on a machine, each has a CUDA device of its own.

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
    device = torch.device("cuda")
    _, size, local = started()
    if size > 1:
        if local >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local} of this machine has no CUDA device: there are {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        ops.normal((1, 1), Key(0), device=device)
    except ValueError as error:
        if name == "cuda":
            raise TrainingError(f"models cannot run on CUDA: {error}") from error
        return torch.device("cpu")
    return device


class Trainer:
    """Trains the model of a plugin on a data set and writes the run's folder.

    Args:
        plugin: which model.
        model_config: its configuration.
        data: the training images.
        config: how to train.
        out: the run's folder, made if it is not there.
        data_name: what :func:`gencore.data.load` takes to load ``data`` again; kept in the run.
        data_settings: the settings that it takes; kept in the run too.
        validation: the images that ``config.validate_every`` measures the losses on.
        start: the checkpoint whose weights a new run begins with (its moving average, if it has one). The new run keeps
            a copy, and does not need it later.
        device: ``auto``, ``cpu`` or ``cuda``. No part of the run: it may go on elsewhere.
        progress: whether to show a bar on a terminal, or to write a line every so often where stderr is none.

    Raises:
        TrainingError: the device or TensorBoard is missing, or the configuration asks for what is not there.
        PluginError: the plugin does not build a model that can be trained.
        ConfigError: the configuration does not go with the data.
        NotEnoughMemoryError: for the model.
    """

    def __init__(
        self,
        plugin: ModelPlugin,
        model_config: ModelConfig,
        data: NamedDataset,
        config: TrainConfig,
        out: Path | str,
        *,
        data_name: str,
        data_settings: Mapping[str, Any] | None = None,
        validation: NamedDataset | None = None,
        start: Checkpoint | None = None,
        device: Device = "auto",
        progress: bool = True,
    ):
        self.data, self.config, self.out, self.validation = data, config, Path(out), validation
        self.start = start
        self.device = choose_device(device)
        self.processes = join(self.device)
        self.progress = progress and self.processes.is_first
        self._refuse_settings()
        self.run = Run(
            model=plugin.name,
            config=model_config.to_dict(),
            spec=data.spec.to_dict(),
            data=data_name,
            data_settings=dict(data_settings or {}),
            images=len(data),
            fingerprint=data.fingerprint,
            train=config.to_dict(),
            start=None if start is None else str(start.directory.resolve()),
        )
        if config.tensorboard:
            reports.board_class()
        with torch.random.fork_rng(devices=[]), enough_memory(f"the model {plugin.name}"):
            torch.manual_seed(config.seed)
            self.model: GenerativeModel = build_model(plugin, model_config, data.spec)
            self.model.to(self.device).train()
        for name in ("sample_every", "measure_every"):
            if getattr(config, name) is not None and not self.model.can_sample:
                raise TrainingError(f"train.{name} needs a model that generates images, and {plugin.name} does not")
        self._measuring = Measuring.asked_for(config, data, validation, str(self.device))
        self.runners: list[PhaseRunner] = []
        self.descents: list[Descent] = []
        self.average: Average | None = None
        self.total_steps = 0
        self.step = 0
        self.seconds = 0.0
        # Of these seconds, those in which it waited for images.
        self.waited = 0.0
        self._best = math.inf
        self._told = (0, 0.0, 0.0)
        self._batches: Generator[Batch, None, None] | None = None
        self._is_begun = False

    def _refuse_settings(self) -> None:
        config, size = self.config, self.processes.size
        if config.precision == "float16" and self.device.type != "cuda":
            raise TrainingError("train.precision=float16 is for GPUs; bfloat16 runs on the CPU too")
        if config.sharding == "full" and size == 1:
            raise TrainingError(
                "train.sharding=full is for several processes: torchrun --nproc-per-node 2 -m gencore ..."
            )
        if config.sharding == "full" and config.precision == "float16":
            raise TrainingError("train.sharding=full goes with float32 and bfloat16, not with float16")
        if config.batch_size < size * config.accumulate:
            parts = f"{size} processes and {config.accumulate} parts each"
            raise TrainingError(f"train.batch_size must be at least one image for {parts}, was {config.batch_size}")
        if config.validate_every is not None and self.validation is None:
            raise TrainingError("train.validate_every needs test images, and the data set has none")

    def begin(self, saved: Checkpoint | None = None) -> None:
        """Makes what a training needs: of a new run, or of one that goes on from the checkpoint ``saved``.

        :meth:`fit` calls it. By itself, it is for those who call :meth:`advance`.

        Raises:
            TrainingError: it has begun already, and is at another step than ``saved``.
            CheckpointError: the weights of ``start`` or ``saved`` do not fit the model.
            PluginError: the model's ``start`` raises an error, or its phases are none that can be trained.
        """
        if self._is_begun:
            if saved is not None and saved.step != self.step:
                raise TrainingError(
                    f"this trainer is at step {self.step} already, {saved.directory} is not: use a new one for it"
                )
            return
        name, first = self.run.model, saved or self.start
        with torch.random.fork_rng(devices=[]), enough_memory(f"the model {name}"):
            torch.manual_seed(self.config.seed)
            if first is not None:
                checkpoints.adopt_parts(self.model, first.run.parts, first.directory)
            else:
                with plugins.blamed(name, "start()", CheckpointError, DataError, ConfigError):
                    self.model.start(self._load_run, self.data)
        self.model.to(self.device).train()
        if saved is None and self.start is not None:
            checkpoints.fill_model(self.model, self.start.weights(), self.start.directory)
        elif saved is not None:
            checkpoints.fill_model(self.model, saved.tensors("model"), saved.directory)
        self.run = dataclasses.replace(self.run, parts=checkpoints.described_parts(self.model))
        if self.processes.size > 1:
            for tensor in self.model.state_dict().values():
                dist.broadcast(tensor, 0)
            self.model = typing.cast(GenerativeModel, synchronized(self.model, self.device))
        is_sharded = self.config.sharding == "full"
        if is_sharded:
            descent.shard(self.model, self.device)
        self._make_runners(self.model if is_sharded else None)
        if self.config.average is not None:
            self.average = Average(self.model, self.config.average)
        if saved is not None:
            self._restore(saved)
        self._is_begun = True

    def _load_run(self, directory: Path | str) -> GenerativeModel:
        return checkpoints.load_model(directory, device=str(self.device))

    def _make_runners(self, sharded: GenerativeModel | None) -> None:
        with plugins.blamed(self.run.model, "phases()"):
            phases = list(self.model.phases())
            fault = descent.phases_fault(phases, self.model)
        if fault:
            raise MODELS.broken(self.run.model, fault)
        made: dict[int, Descent] = {}
        for index, phase in enumerate(phases):
            if id(phase.optimizer) not in made:
                made[id(phase.optimizer)] = Descent(phase.name, phase.optimizer, self.model, self.device)
            own, scaled = made[id(phase.optimizer)], self.config.precision == "float16"
            runner = PhaseRunner(index, phase, own, self.processes, sharded=sharded, scaled=scaled)
            if self.config.compile:
                runner.compile()
            self.runners.append(runner)
        self.descents = list(made.values())
        if self.processes.size > 1 and sharded is None and self.runners:
            descent.shared(self.runners)
        drawing = [phase.repeats / phase.every for phase in phases if phase.batch_of is None]
        self.total_steps = self.config.total_steps(len(self.data), max(drawing)) if phases else 0

    def fit(self, *, resume: bool = False, begin: Callable[[], None] | None = None) -> GenerativeModel:
        """Trains to the last step and returns the model, in evaluation mode. Draws nothing from torch's generators.

        At SIGINT (Ctrl-C), SIGTERM or SIGHUP the step under way is finished and saved first; a second signal ends at
        once.

        Args:
            resume: go on from the newest checkpoint in the folder (from the start, if the run was killed before its
                first, or before anything was written); what the run's settings were must be what they are now, except
                its length (if the learning rate is constant), what it writes and how it is computed. A run that is as
                long as asked for is left as it is.
            begin: called when the folder is open and nothing is wrong with it, before the first step; not for a run
                that is long enough.

        Raises:
            Interrupted: a signal ended the run, which is saved.
            TrainingError: the folder holds a run already (without ``resume``), another process trains there, or a
                loss or gradient is not finite.
            CheckpointError: the run to go on with is of another model or other images, has other settings, or is
                damaged.
            PluginError: the model's loss raises an error, or is none.
            OtherProcessError: another process of this training has ended.
            OSError: the disk is full; the newest checkpoint is whole.
            NotEnoughMemoryError: for a step.
        """
        with ExitStack() as stack:
            self.processes.by_first(lambda: self._claim(stack, resume))
            self._open_run(resume)
            if self.step < self.total_steps:
                if begin is not None and self.processes.is_first:
                    begin()
                devices = [self.device] if self.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices=devices))
                stack.enter_context(loader.watched())
                self._train()
            # Nobody leaves before all is written.
            self.processes.wait()
        return self.model.eval()

    def _claim(self, stack: ExitStack, resume: bool) -> None:
        if not self.out.exists():
            stack.push(self._leave_no_empty_folder)
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(locked(self.out / ".lock"))
        except BlockingIOError as error:
            raise TrainingError(f"another process is training in {self.out}") from error
        checkpoints.remove_leftovers(self.out)
        # A run that came to no checkpoint (it was killed, or failed at once) is nothing that another could harm.
        if checkpoints.checkpoints(self.out) and not resume:
            raise TrainingError(f"{self.out} already holds a run; go on with --resume or choose another folder")

    def _leave_no_empty_folder(self, kind: type[BaseException] | None, *_: object) -> None:
        """Removes the folder if an error came before anything was written to it but the lock."""
        if kind is not None and [path.name for path in self.out.iterdir()] == [".lock"]:
            shutil.rmtree(self.out, ignore_errors=True)

    def _open_run(self, resume: bool) -> None:
        found = bool(checkpoints.checkpoints(self.out)) if resume else False
        if resume and (found or (self.out / "run.json").exists()):
            saved_run = checkpoints.read_run(self.out)
            self._refuse_other(self.out, saved_run)
            if saved_run.start and not found:
                raise CheckpointError(
                    f"{self.out} was ended before it kept the weights of {saved_run.start}, with which it began; "
                    "begin it anew, without --resume"
                )
            self.run = dataclasses.replace(self.run, start=saved_run.start)
        saved = None
        if found:
            saved = checkpoints.read(self.out)
            self._refuse_other(saved.directory, saved.run)
        self.begin(saved)
        if self.step < self.total_steps or not found:
            self.processes.by_first(lambda: checkpoints.write_run(self.out, self.run))
            if not found and (self.run.start or self.run.parts or not self.total_steps):
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
        if self.average is not None:
            average = saved.tensors("ema")
            checkpoints.check_fit(self.average.tensors, average, saved.directory)
            if (name := checkpoints.not_finite(self.model, average)) is not None:
                raise CheckpointError(f"the moving average in {saved.directory} is of no use: {name} is not finite")
            self.average.load(average)
        tensors = saved.tensors("optimizer")
        try:
            self.seconds = float(saved.state["seconds"])
            for one in self.descents:
                one.load(tensors)
            for runner in self.runners:
                runner.load_state(saved.state["phases"][runner.phase.name])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the training state in {saved.directory} does not fit the model: {error}") from error
        self.step = saved.step
        if self.config.keep_best and self.runners:
            self.processes.by_first(lambda: self._find_best(saved))
            self._best = self.processes.gathered(self._best)[0]

    def _find_best(self, saved: Checkpoint) -> None:
        """The loss of the best checkpoint: of the one that is marked so, or of the last one, if a run that was killed
        came to no mark for it."""
        name = f"validation/{self.runners[0].phase.name}/loss"
        losses = {each["step"]: each.get(name) for each in read_metrics(self.out / "metrics.jsonl")}
        best, last = (losses.get(step) for step in (checkpoints.best_step(self.out), saved.step))
        self._best = math.inf if best is None else best
        if last is not None and last < self._best:
            self._best = last
            checkpoints.mark_best(saved.directory)

    def _train(self) -> None:
        begun = time.monotonic() - self.seconds
        self._told = (self.step, self.seconds, self.waited)
        with ExitStack() as stack:
            stack.callback(self._stop_reading)
            told = self._open_log(stack)
            progress = stack.enter_context(
                Progress(self.total_steps, self.step, name=self.run.model, unit="step", shown=self.progress)
            )
            ending = stack.enter_context(deferred_signals())
            saved_at = time.monotonic()
            while self.step < self.total_steps:
                with enough_memory(f"a step of {self.run.model} with minibatches of {self.config.batch_size}"):
                    self.advance()
                last = self.step == self.total_steps
                self.seconds = time.monotonic() - begun
                signal, is_late = self.processes.largest(ending() or 0, int(self._is_late(saved_at)))
                is_best = self._tell(told, progress, last)
                if last or signal or is_late or is_best or self.step % self.config.checkpoint_every == 0:
                    self._refuse_divergence()
                    self._save(is_best)
                    saved_at = time.monotonic()
                if signal and not last:
                    raise Interrupted(signal)
                progress.update()

    def _open_log(self, stack: ExitStack) -> tuple[MetricsLog | None, reports.Board | None]:
        """What the first process writes to; nothing in the others."""
        if not self.processes.is_first:
            return None, None
        log = MetricsLog(self.out / "metrics.jsonl", self.step)
        stack.callback(log.close)
        board = None
        if self.config.tensorboard:
            board = reports.Board(self.out / "tensorboard", self.step)
            stack.callback(board.close)
        return log, board

    def _tell(self, told: tuple[MetricsLog | None, reports.Board | None], progress: Progress, last: bool) -> bool:
        """Writes and draws what is due after a step; whether it is the best one so far. All processes call it."""
        config, (log, board) = self.config, told
        record: dict[str, Any] = {}
        is_best = False
        if last or self.step % config.log_every == 0:
            record = self.record()
            losses = {name[:-5]: figure for name, figure in record.items() if name.endswith("/loss")}
            progress.figures({**losses, "images/s": record.get("images_per_second", math.nan)})
        if self._is_due(config.validate_every, last):
            found = self._validated()
            first = next(iter(found.values()))
            if config.keep_best and first < self._best:
                is_best, self._best = True, first
            record = {**(record or {"step": self.step, "seconds": round(self.seconds, 3)}), **found}
        if self._measuring is not None and self._is_due(config.measure_every, last):
            with reports.aside(self.model, self.average):
                found = self._measuring(self.model, self.processes, divided=config.sharding == "full")
            record = {**(record or {"step": self.step, "seconds": round(self.seconds, 3)}), **found}
        if record and log is not None:
            log.write(record)
        if record and board is not None:
            board.scalars(record, self.step)
        if self._is_due(config.sample_every, last):
            self._draw(board)
        return is_best

    def _is_due(self, every: int | None, last: bool) -> bool:
        return every is not None and (last or self.step % every == 0)

    def _validated(self) -> dict[str, float]:
        assert self.validation is not None
        config = self.config
        with reports.aside(self.model, self.average):
            return reports.validation_losses(
                self.runners,
                self.model,
                self.validation,
                config.seed,
                config.batch_size,
                self.processes,
                self.autocast(),
                self.total_steps,
            )

    def _draw(self, board: reports.Board | None) -> None:
        config = self.config
        conditions = conditions_for(self.model, self.validation or self.data, config.samples, in_turns=True)
        with reports.aside(self.model, self.average):
            images = reports.sampled(self.model, config.samples, config.seed, conditions, self.processes)
        if self.processes.is_first:
            reports.write_picture(images, self.out / "samples" / f"step-{self.step:08d}.png")
        if board is not None:
            board.picture(images, self.step)

    def _is_late(self, saved_at: float) -> bool:
        minutes = self.config.checkpoint_minutes
        return self.processes.is_first and minutes is not None and time.monotonic() - saved_at >= 60 * minutes

    def advance(self) -> None:
        """One step by itself, of every phase: no checkpoint, no line, no file. It seeds torch's generator."""
        self.begin()
        factor = self.config.learning_rate_factor(self.step, self.total_steps)
        for one in self.descents:
            one.scale_rates(factor)
        drawn: dict[str, Batch] = {}
        for runner in self.runners:
            phase = runner.phase
            if self.step % phase.every:
                continue
            for repetition in range(phase.repeats):
                batch = drawn[phase.batch_of] if phase.batch_of is not None else self._next_batch()
                drawn[phase.name] = batch
                what = f"the loss of phase {phase.name!r} at step {self.step + 1}"
                with plugins.blamed(self.run.model, what, ConfigError, TrainingError, OtherProcessError):
                    self._descend(runner, batch, phase_key(self.config.seed, self.step, runner.index, repetition))
                if self.device.type == "cpu":
                    self._refuse_divergence()
        if self.average is not None:
            self.average.update(self.model, self.step)
        self.step += 1

    def _stop_reading(self) -> None:
        if self._batches is not None:
            # Ends the processes that read ahead.
            self._batches.close()
            self._batches = None

    def _next_batch(self) -> Batch:
        config = self.config
        if self._batches is None:
            self._batches = loader.read(
                self.data,
                [runner.phase for runner in self.runners],
                first=self.step,
                total=max(self.total_steps, self.step + 1),
                seed=config.seed,
                batch_size=config.batch_size,
                rows=self.processes.rows(config.batch_size),
                workers=config.workers,
                device=self.device,
            )
        began = time.monotonic()
        # What goes wrong with files says so itself.
        with DATASETS.blamed(self.run.data.partition(":")[0], "batch()", DataError, TrainingError, OSError):
            batch = next(self._batches, None)
        if batch is None:  # Whoever advances by hand may go on past the end.
            self._batches = None
            return self._next_batch()
        self.waited += time.monotonic() - began
        return batch

    def _descend(self, runner: PhaseRunner, batch: Batch, key: Key) -> None:
        """One step of a phase down its loss for ``batch``, this process's rows of the minibatch, part by part."""
        config, processes = self.config, self.processes
        row = processes.rows(config.batch_size)[0]
        runner.clear()
        for part in range(config.accumulate):
            first, last = part * len(batch) // config.accumulate, (part + 1) * len(batch) // config.accumulate
            share = (last - first) / config.batch_size
            noise = key.samples(row + first)
            # For what draws from torch's generator: it too depends on seed, step and process alone.
            # (torch.manual_seed formats a stack trace for every kind of device that it has not started.)
            seed = torch.manual_seed if self.device.type == "cuda" else torch.default_generator.manual_seed
            seed((int(noise.packed[0]) + row + first) % (1 << 63))
            step = Step(
                batch if config.accumulate == 1 else batch.part(first, last), noise, self.step, self.total_steps
            )
            with self.autocast(), processes.waiting():
                runner.add(step, share, is_last=part == config.accumulate - 1)
        with processes.waiting():
            runner.descend(self.step + 1, config.clip)
            if runner.phase.after is not None:
                with torch.no_grad():
                    runner.phase.after()

    def autocast(self) -> Any:
        """The context that losses are computed in, for ``config.precision``."""
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.config.precision])

    def _refuse_divergence(self) -> None:
        for runner in self.runners:
            if (step := runner.meter.first_bad_step()) is not None:
                raise self._divergence(f"the loss or gradient of phase {runner.phase.name!r}", step)

    def _divergence(self, what: str, step: int) -> TrainingError:
        saved = checkpoints.checkpoints(self.out)
        kept = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        return TrainingError(
            f"{what} is not finite at step {step}; {kept}; a smaller learning rate or train.clip may help"
        )

    def record(self) -> dict[str, Any]:
        """The line of the log for the steps since the last one. All processes call it together."""
        self._refuse_divergence()
        steps, seconds, waited = self._told
        self._told = (self.step, self.seconds, self.waited)
        passed = self.seconds - seconds
        record: dict[str, Any] = {"step": self.step, "seconds": round(self.seconds, 3)}
        if passed > 0:
            record["images_per_second"] = (self.step - steps) * self.config.batch_size / passed
            record["waiting_for_data"] = (self.waited - waited) / passed
        for runner in self.runners:
            name = runner.phase.name
            record |= {f"{name}/{metric}": mean for metric, mean in runner.meter.means(self.processes).items()}
            record[f"{name}/learning_rate"] = runner.descent.learning_rate
        return record

    def _save(self, is_best: bool = False) -> None:
        tensors: dict[str, dict[str, Tensor]] = {"model": _whole(self.model.state_dict())}
        if (name := checkpoints.not_finite(self.model, tensors["model"])) is not None:
            raise self._divergence(f"the weight {name}", self.step)
        if self.average is not None:
            tensors["ema"] = _whole(self.average.tensors)
        tensors["optimizer"] = {k: v for one in self.descents for k, v in one.tensors().items()}
        phases = {runner.phase.name: runner.state() for runner in self.runners}
        state = {"seconds": self.seconds, "total_steps": self.total_steps, "phases": phases}
        arguments = self.out, self.run, self.step, tensors, state, self.config.keep
        self.processes.by_first(lambda: checkpoints.save(*arguments, is_best=is_best))


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: descent.whole(tensor) for name, tensor in tensors.items()}
