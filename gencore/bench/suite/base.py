"""What a benchmark is: an op in one use, on cases of the one table, with its peers, its floor and its definition."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gencore import ops
from gencore.bench.case import AnyCase as AnyCase
from gencore.bench.limits import Work
from gencore.bench.results import OURS, Section

Call = Callable[[], Any]
# Of a result against the definition in float64, relative to its largest value: as far as it may be off that keeps sums
# and intermediate results in its type. PyTorch's channels_last group norm is off by 5e-5 in float32 where a group has
# millions of values, as it adds them up one by one.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
HALF = (torch.float16, torch.bfloat16)


@dataclass
class Comparison:
    """Ours and its peers on the same tensors, ready to be called.

    Attributes:
        calls: functions without arguments by name, "ours" first. One whose name has "compile" in it compiles when it
            is first called. Names that begin with "ours" are other ways to run ours, and no peers.
        work: the least that must be done.
        error: of what a call returned, how far it is from the definition; left out, nobody looks.
        tolerance: the error up to which a result counts as the same.
        clock: "cpu" where the time of the host counts, though the tensors are on a GPU; "calls" where no graph can have
            them.
    """

    calls: dict[str, Call]
    work: Work
    error: Callable[[Any], float] | None = None
    tolerance: float | None = None
    clock: str | None = None

    def __post_init__(self) -> None:
        assert next(iter(self.calls)) == OURS


@dataclass(frozen=True)
class Benchmark:
    """An op in one use.

    Attributes:
        op: its name, which is its file's in every room; or the network's, the model's.
        name: of the use, such as "forward and backward".
        make: ``make(case, dtype, device)`` gives the comparison; the device may be one that only looks like a GPU.
        cases: of the one table; those are timed that are marked for the kind of device, or for a preset.
        dtypes: by the kind of device, those that are timed unless others are asked for.
        fits: whether a case is one that the benchmark can be of.
        wanted: which of the table's cases are worth their time, and at which of the dtypes.
        section: of the report.
    """

    op: str
    name: str
    make: Callable[[Any, torch.dtype, str], Comparison]
    cases: Sequence[AnyCase]
    dtypes: Mapping[str, Sequence[torch.dtype]] = dataclasses.field(
        default_factory=lambda: {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16)}
    )
    fits: Callable[[Any], bool] = lambda case: True
    wanted: Callable[[Any, torch.dtype], bool] = lambda case, dtype: True
    section: Section = "ops"

    @property
    def slug(self) -> str:
        """The name as a test's name has it."""
        return self.name.replace(" ", "_").replace(",", "")


def is_compiled(name: str) -> bool:
    """Whether the candidate of that name compiles in its first call."""
    return "compile" in name


def on_backends(call: Call, device: str) -> dict[str, Call]:
    """Ours on the kernels of each backend as further candidates, on a GPU, where "ours" is by whom the tables choose.

    The tables are made from their times: see benchmarks/dispatch.py.
    """

    def by(name: Literal["cuda", "triton"]) -> Call:
        def run() -> Any:
            with ops.backend(name):
                return call()

        return run

    return {"ours, CUDA": by("cuda"), "ours, Triton": by("triton")} if device == "cuda" else {}


def largest_error(expected: Callable[[], Any], of: Callable[[Any], Any] | None = None) -> Callable[[Any], float]:
    """The largest deviation from what ``expected`` gives in float64, relative to its largest value, of every tensor.

    What is expected is computed at the first call; a value that is expected as None is not compared. ``of`` takes from
    a result the part that is expected, where the whole would take too long to compute or too much memory.
    """
    known = functools.lru_cache(maxsize=1)(lambda: _tensors(expected()))

    def error(result: Any) -> float:
        found, wanted = _tensors(result if of is None else of(result)), known()
        if len(found) != len(wanted):
            raise ValueError(f"{len(wanted)} tensors were expected, got {len(found)}")
        return max((_error(a, b) for a, b in zip(found, wanted, strict=True) if b is not None), default=0.0)

    return error


def _tensors(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        raise ValueError(f"a tensor of shape {tuple(wanted.shape)} was expected, got {tuple(found.shape)}")
    if wanted.numel() == 0:
        return 0.0
    scale = wanted.abs().max().item() or 1.0
    # A NaN is no number's neighbour.
    error = (found.detach().double() - wanted).abs().max().item() / scale
    return math.inf if math.isnan(error) else error


def judged(tensor: Tensor) -> Tensor:
    """The first samples in float64, one a row, of as many values as noise is judged by."""
    if tensor.dim() < 2:
        return tensor.detach()[:_JUDGED].double()
    samples = max(1, _JUDGED // max(1, tensor[:1].numel()))
    return tensor.detach()[:samples].flatten(1)[:, :_JUDGED].double()


def noise_error(eps: Tensor) -> float:
    """How far noise, such as a result implies it, is from mean 0 and deviation 1, in standard errors of its size.

    Six of them come by chance once in a hundred million times: :data:`NOISE_TOLERANCES`.
    """
    eps = eps.detach().double()
    count = eps.numel()
    if count < 2:
        return 0.0
    mean, deviation = eps.mean().item(), eps.std().item()
    error = max(abs(mean) * count**0.5, abs(deviation - 1) * (2 * count) ** 0.5)
    return math.inf if math.isnan(error) else error


_JUDGED = 1 << 22
# In a half type, peers round the factor that noise is scaled by too, by half a unit in its last place at most: so much
# may the deviation be off, whatever the number of values. That of the results themselves averages out: relative to
# noise as large as they are it adds 3e-6 to the variance in bfloat16, a two-hundredth of a standard error.
NOISE_TOLERANCES = {
    dtype: 6 + (torch.finfo(dtype).eps / 2 * (2 * _JUDGED) ** 0.5 if dtype in HALF else 0)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def bound(functions: Mapping[str, Callable[..., Any]], *args: Any) -> dict[str, Call]:
    """Each function with the same arguments, ready to be called."""
    return {name: functools.partial(function, *args) for name, function in functions.items()}


def gradient_call(function: Callable[..., Any], inputs: Sequence[Tensor], grads: Any) -> Call:
    """Forward and backward: the gradients of ``function(*inputs)`` for the inputs."""
    return lambda: torch.autograd.grad(function(*inputs), inputs, grads)


def double(*tensors: Tensor) -> list[Tensor]:
    """Copies in float64, that a gradient may be asked of where it may be of the tensors."""
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
