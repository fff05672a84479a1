"""What is timed: one module per op, named as the op is everywhere, and those of whole networks and steps.

Each has a tuple ``BENCHMARKS``. ``gencore bench`` runs them and writes a report; pytest-benchmark runs the same in
``benchmarks/test_ops.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gencore import _ops
from gencore.bench import cases
from gencore.bench.suite.base import AnyCase, Benchmark

OPS = tuple(op.stem for op in _ops.OPS)
NETWORKS = ("unet",)
END_TO_END = ("training",)


@dataclass(frozen=True)
class Task:
    """A benchmark on a case, at a dtype."""

    benchmark: Benchmark
    case: AnyCase
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.benchmark.op} · {self.benchmark.name} · {self.case} · {str(self.dtype).removeprefix('torch.')}"


def benchmarks(names: Sequence[str] = ()) -> list[Benchmark]:
    """Those of the modules named, or of all."""
    every = OPS + NETWORKS + END_TO_END
    if unknown := [name for name in names if name not in every]:
        raise ValueError(f"op must be one of {', '.join(every)}, got {unknown[0]!r}")
    return [
        benchmark
        for name in every
        if not names or name in names
        for benchmark in importlib.import_module(f"gencore.bench.suite.{name}").BENCHMARKS
    ]


def tasks(
    names: Sequence[str] = (),
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (),
    shapes: str | cases.Table = "timed",
    quick: bool = False,
) -> list[Task]:
    """What is to be run.

    Args:
        names: of ops, networks or end-to-end sections; none are all.
        device: "cpu" or "cuda".
        dtypes: instead of those of each benchmark.
        shapes: "timed", the cases that represent the op on this kind of device; a preset of
            :data:`gencore.bench.cases.PRESETS`; "all", both; or a table of the user's own.
        quick: of each benchmark the largest case that takes little time, at its first dtype.

    Raises:
        ValueError: an unknown name, or nothing is left to run.
    """
    found: list[Task] = []
    for benchmark in benchmarks(names):
        of_benchmark = tasks_of(benchmark, device, dtypes, shapes)
        if quick and of_benchmark:
            first = of_benchmark[0]
            light = [task for task in of_benchmark if task.case.elements <= _QUICK and task.dtype == first.dtype]
            of_benchmark = [max(light or [first], key=lambda task: task.case.elements)]
        found += of_benchmark
    if not found:
        raise ValueError(
            f"nothing is left to run: no case of {', '.join(names) or 'any op'} is of shapes {str(shapes)!r}"
        )
    return found


def tasks_of(
    benchmark: Benchmark, device: str, dtypes: Sequence[torch.dtype] = (), shapes: str | cases.Table = "timed"
) -> list[Task]:
    """What is to be run of one benchmark; the arguments are those of :func:`tasks`."""
    usual = tuple(benchmark.dtypes[device])
    return [
        Task(benchmark, case, dtype)
        for case in _chosen(benchmark, shapes, device)
        for dtype in tuple(dtypes) or usual
        # A table and dtypes of the user's own are all wanted.
        if not isinstance(shapes, str) or benchmark.wanted(case, usual[0] if dtypes else dtype)
    ]


_QUICK = 1 << 22


def _chosen(benchmark: Benchmark, shapes: str | cases.Table, device: str) -> list[AnyCase]:
    if not isinstance(shapes, str):
        return [case for case in shapes.of(benchmark.op) if benchmark.fits(case)]
    if shapes not in ("timed", "all", *cases.PRESETS):
        raise ValueError(f"shapes must be timed, all or one of {', '.join(cases.PRESETS)}, got {shapes!r}")
    return [
        case
        for case in benchmark.cases
        if benchmark.fits(case)
        and (
            (shapes != "timed" and (shapes == "all" or shapes in case.presets) and case.presets)
            or (shapes in ("timed", "all") and device in case.timed)
        )
    ]
