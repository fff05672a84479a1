"""Processes that work together, started by torchrun or ``accelerate launch``, which say so in the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Result = TypeVar("_Result")


class OtherProcessError(RuntimeError):
    """Another of the processes that work together has ended or failed, which says why itself."""


@dataclass(frozen=True)
class Processes:
    """All processes that work together, as one of them sees them.

    Attributes:
        rank: the number of this one; 0 writes what is to be written.
        size: how many there are.
        control: the group by which they agree on what to do, on the CPU; None for a single one.
    """

    rank: int = 0
    size: int = 1
    control: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def rows(self, count: int) -> tuple[int, int]:
        """``first`` and ``last``: the rows ``first`` to ``last - 1`` of ``count`` are this process's. Each has as many
        as the others, or one more."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def by_first(self, function: Callable[[], _Result]) -> _Result | None:
        """Calls ``function`` in the first process, while the others wait, and gives its result there, else None.

        Raises:
            OtherProcessError: in the others, if it raised an error in the first.
        """
        if self.size == 1:
            return function()
        result, fault, outcome = None, None, ["", ""]
        if self.is_first:
            try:
                result = function()
            except BaseException as error:
                fault, outcome = error, [type(error).__name__, str(error)]
        with self.waiting():
            dist.broadcast_object_list(outcome, src=0, group=self.control)
        if fault is not None:
            raise fault
        if outcome[0]:
            raise OtherProcessError(f"the first process ended by {outcome[0]}: {outcome[1]}")
        return result

    def largest(self, *values: int) -> list[int]:
        """The largest that any process gives of each of the values."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values)
        with self.waiting():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        self.largest(0)

    def summed(self, values: Tensor) -> Tensor:
        """The sum of the processes' values, in place."""
        if self.size > 1:
            with self.waiting():
                dist.all_reduce(values)
        return values

    def gathered(self, values: Any) -> list[Any]:
        """What each process gives, in their order."""
        if self.size == 1:
            return [values]
        found: list[Any] = [None] * self.size
        with self.waiting():
            dist.all_gather_object(found, values, group=self.control)
        return found

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Turns the error of a connection that broke off, while processes wait for each other, into one of ours."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_broken_connection(error):
                raise
            told = str(error).strip().partition("\n")[0]
            raise OtherProcessError(f"another of the processes has ended ({told})") from error


# A single process, which waits for nobody.
ALONE = Processes()


def _is_broken_connection(error: RuntimeError) -> bool:
    told = str(error)
    words = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "refused", "remote process exited")
    return any(word in told for word in words)


def started() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, as the environment says them; 0, 1, 0 for a single one.

    Raises:
        ValueError: the environment says what cannot be.
    """
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if not 0 <= rank < size:
        raise ValueError(f"RANK must be from 0 to WORLD_SIZE - 1 = {size - 1}, was {rank}")
    return rank, size, _number("LOCAL_RANK", 0)


def local_size() -> int:
    """How many processes there are on this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE", 1)))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} must be a number, was {text!r}")
    return int(text)


# One process may read and decode for long while the others wait.
_PATIENCE = timedelta(hours=2)


def join(device: torch.device) -> Processes:
    """Joins the processes that the environment tells of; a single one needs nothing.

    Tensors are exchanged by NCCL on GPUs and by Gloo on the CPU.
    """
    rank, size, _ = started()
    if size == 1:
        return ALONE
    if not is_joined():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    control = dist.new_group(backend="gloo", timeout=_PATIENCE) if device.type == "cuda" else dist.group.WORLD
    return Processes(rank, size, control)


def is_joined() -> bool:
    """Whether this process works together with others now."""
    return dist.is_available() and dist.is_initialized()


def leave() -> None:
    """Takes leave of the others, once all is done."""
    if is_joined():
        dist.destroy_process_group()
