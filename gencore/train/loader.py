"""The minibatches of a training, in their order: read at once, or ahead of time by processes of their own."""

from __future__ import annotations

import atexit
import os
import pickle
import re
import signal
import time
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import data as torch_data

from gencore.models.base import Phase
from gencore.plugins import reason
from gencore.processes import local_size
from gencore.spec import Batch, Dataset
from gencore.train.errors import TrainingError
from gencore.train.order import batch_indices, data_key

_MOST_WORKERS = 4

# What PyTorch says of a worker that has died.
_DIED = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal: (?P<signal>[^.]*)|exited unexpectedly)")


class Minibatch(NamedTuple):
    """Which minibatch: the ``repetition``-th of the phase of this index in a step, which is its ``draw``-th of all."""

    step: int
    phase: int
    repetition: int
    draw: int


def minibatches(phases: Sequence[Phase], first: int, total: int) -> Iterator[Minibatch]:
    """What the steps ``first`` to ``total - 1`` read."""
    for step in range(first, total):
        for index, phase in enumerate(phases):
            if step % phase.every == 0 and phase.batch_of is None:
                for repetition in range(phase.repeats):
                    yield Minibatch(step, index, repetition, step // phase.every * phase.repeats + repetition)


class _Rows(torch_data.Dataset[Batch]):
    """This process's part of a minibatch, by what it is."""

    def __init__(self, data: Dataset, seed: int, batch_size: int, rows: tuple[int, int]):
        self.data, self.seed, self.batch_size, self.rows = data, seed, batch_size, rows

    def __getitem__(self, which: Minibatch) -> Batch:
        first, last = self.rows
        indices = batch_indices(self.seed, which.phase, which.draw, self.batch_size, len(self.data))[first:last]
        key = data_key(self.seed, which.step, which.phase, which.repetition)
        return self.data.batch(indices, key.samples(first))


class _Traceback(Exception):
    """Where an error was raised in a worker: the cause of the same error in the training's process, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Failure:
    """What a worker gives in place of a minibatch: its error, in a form that surely passes to another process."""

    def __init__(self, error: BaseException):
        self.pickled = _pickled(error)
        self.traceback = "".join(traceback.format_exception(error))

    def error(self) -> BaseException:
        found = pickle.loads(self.pickled)
        found.__cause__ = _Traceback(self.traceback)
        return found


def _pickled(error: BaseException) -> bytes:
    """The error for another process; what cannot go there is stood for by the nearest of its base classes that can."""
    forms: list[Callable[[], BaseException]] = [lambda: error, lambda: type(error)(str(error))]
    forms += [lambda kind=kind: kind(reason(error)) for kind in type(error).__mro__[1:]]  # type: ignore[misc]
    for form in forms:
        try:
            made = form()
            data = pickle.dumps(made)
            # Errors with arguments of their own may be written and not read, or read as others.
            read = pickle.loads(data)
            if type(read) is type(made) and str(made) == str(read) and str(error) in str(read):
                return data
        except Exception:
            continue
    return pickle.dumps(RuntimeError(reason(error)))


class _WorkerRows(_Rows):
    """The same, read by a worker: an error is given and not raised, since a DataLoader would make a long text of it."""

    def __getitem__(self, which: Minibatch) -> Batch | _Failure:  # type: ignore[override]
        try:
            batch = super().__getitem__(which)
            # What cannot be sent to another process would never arrive, and be waited for in vain.
            conditions = {n: v.detach() if isinstance(v, Tensor) else tuple(v) for n, v in batch.conditions.items()}
            return Batch(batch.images.detach(), conditions)
        except (Exception, SystemExit) as error:
            return _Failure(error)


class _Order(torch_data.Sampler[Minibatch]):
    def __init__(self, make: Callable[[], Iterator[Minibatch]]):
        self.make = make

    def __iter__(self) -> Iterator[Minibatch]:
        return self.make()


def read(
    data: Dataset,
    phases: Sequence[Phase],
    *,
    first: int,
    total: int,
    seed: int,
    batch_size: int,
    rows: tuple[int, int],
    workers: int | None,
    device: torch.device,
) -> Generator[Batch, None, None]:
    """The minibatches of the steps from ``first`` on, of each the ``rows`` of this process, on the device.

    Args:
        workers: processes that read ahead, if the data set asks for any; None: as many as there are cores to spare.
            They end when the iterator is closed.

    Raises:
        TrainingError: a worker has died. Other errors are those of the data set, raised where the minibatch is taken.
    """
    if workers is None:
        workers = min(_MOST_WORKERS, max(1, _cores() // local_size() - 1))
    if not workers or not getattr(data, "workers", False):
        source = _Rows(data, seed, batch_size, rows)
        return (source[which].to(device) for which in minibatches(phases, first, total))
    loader = torch_data.DataLoader(
        _WorkerRows(data, seed, batch_size, rows),
        batch_size=None,
        sampler=_Order(lambda: minibatches(phases, first, total)),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_hold_back_signals,
        # Else its seed would be drawn from torch's generator.
        generator=torch.Generator(),
    )
    batches = _from_workers(loader, device)
    _reading.add(batches)
    return batches


def _from_workers(loader: torch_data.DataLoader[Batch], device: torch.device) -> Generator[Batch, None, None]:
    iterator: Any = iter(loader)
    try:
        while (item := _next(iterator)) is not None:
            if isinstance(item, _Failure):
                raise item.error()
            yield item.to(device)
    finally:
        # PyTorch would end the workers when nothing holds the iterator any more, which the traceback of an error may do
        # for long; and would raise an error meanwhile, wherever this process is, whenever a worker ends.
        with suppress(RuntimeError):
            iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()


def _next(iterator: Any) -> Batch | _Failure | None:
    """What comes next, None at the end."""
    try:
        return next(iterator, None)
    except (RuntimeError, OSError, EOFError) as error:
        # The connection to a worker that dies breaks off, which PyTorch may see before it sees that the worker is dead.
        end = time.monotonic() + 1.0
        codes: list[int] = []
        while not codes and time.monotonic() < end:
            with suppress(RuntimeError):
                codes = [worker.exitcode for worker in iterator._workers if worker.exitcode]
                time.sleep(0.01)
        if not codes:
            raise
        told = f"was ended by a signal: {signal.strsignal(-codes[0])}" if codes[0] < 0 else "has ended unexpectedly"
        raise _died(told) from error


# What reads now: a training that is advanced step by step does so until its process ends.
_reading: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Before Python waits for the workers."""
    for batches in tuple(_reading):
        batches.close()


@contextmanager
def watched() -> Iterator[None]:
    """Makes one error of the death of a worker, which PyTorch tells from a signal handler, wherever the process is.

    Raises:
        TrainingError: a worker has died.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TrainingError) or (told := _death(error)) is None:
            raise
        raise _died(told) from error


def _died(told: str) -> TrainingError:
    return TrainingError(
        f"a process that reads images {told}; too little memory is a common cause, fewer train.workers need less"
    )


def _death(error: BaseException | None) -> str | None:
    """How a worker died, if an error or one of its causes tells of it."""
    told = None
    while error is not None:
        if isinstance(error, RuntimeError) and (found := _DIED.search(str(error))):
            if found["signal"]:
                return f"was ended by a signal: {found['signal']}"
            told = "has ended unexpectedly"
        error = error.__cause__ or error.__context__
    return told


def _hold_back_signals(worker: int) -> None:
    """Ctrl-C at a terminal and the SIGTERM of a scheduler reach all processes, and the training's own first finishes
    its step, for which it needs its workers. It ends them itself."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Not ignored for good, so that one that hangs can be ended.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
