"""What ops of diffusion share: the coefficients that differ from sample to sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gencore._torch import beside
from gencore.arguments import integer
from gencore.ops._checks import check_dense
from gencore.schedule import Schedule


def check_schedule(schedule: Any) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be a gencore.diffusion.Schedule, got {type(schedule).__name__}; "
            "gencore.diffusion.linear() is that of DDPM"
        )


def check_steps(t: Any, x: Tensor) -> None:
    """``t`` must be a step for each sample of ``x``, or one for all of them; :func:`rows_at` looks how far it goes."""
    if not isinstance(t, Tensor):
        integer("t", t, what="an int or a tensor of int64 or int32")
        return
    check_dense("t", t)
    if t.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"t must be an int or a tensor of int64 or int32, got one of {t.dtype}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must be one step per sample, of shape {tuple(x.shape[:1])}, got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"t must be on the device of the samples, {x.device}, got {t.device}")


def form_of_steps(t: Any) -> Any:
    """What :func:`check_steps` depends on, for a contract to remember: an int has no other form than its type."""
    return int if type(t) is int else t


def rows_at(t: Any, table: Tensor) -> tuple[Tensor, Tensor | None]:
    """The table, and which of its rows each sample takes; the row alone if ``t`` is one int for all samples.

    Whether the values of a tensor ``t`` are in the table is found out by the kernel: on a GPU, looking at them here
    would wait for it.
    """
    if isinstance(t, Tensor):
        return table, t if t.dtype is torch.int64 else t.to(torch.int64)
    steps, t = table.shape[0], integer("t", t)
    if not 0 <= t < steps:
        raise ValueError(f"t must be in [0, {steps}), the steps of the schedule, got {t}")
    return table[t : t + 1], None


def column_of(table: Tensor, t: Tensor | None, column: int, x: Tensor) -> Tensor:
    """A column of the rows that samples take, shaped to be multiplied with ``x``; NaN where ``t`` is out of range."""
    return along_samples(rows_of(table[:, column : column + 1], t, x), x)


def rows_of(table: Tensor, t: Tensor | None, x: Tensor) -> Tensor:
    """The rows that samples take, one for all of them if ``t`` is None; NaN where it is out of range."""
    rows = beside(table.to(x.device), x)
    if t is None:
        return rows
    last = len(rows) - 1
    return torch.where(((t < 0) | (t > last)).unsqueeze(1), torch.nan, rows[t.clamp(0, last)])


def along_samples(values: Tensor, x: Tensor) -> Tensor:
    """One value per sample, shaped to be multiplied with ``x``, in the type that kernels would compute in."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return values.to(kind).reshape(-1, *[1] * (x.dim() - 1))


def widened(output: Any, x: Any) -> Any:
    """What a network under autocast says of a float32 ``x``, in float32."""
    if isinstance(output, Tensor) and isinstance(x, Tensor) and x.dtype == torch.float32:
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    return output
