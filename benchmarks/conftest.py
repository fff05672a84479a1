"""How every benchmark compares: ours and each peer in turn, the ratios, the floor and our share of it."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gencore
from gencore.bench import limits, machine, suite
from gencore.bench.measure import interleave
from gencore.bench.results import OURS
from gencore.bench.suite.base import Call, Comparison, is_compiled

ROWS: list[tuple[str, float, dict[str, float], float, str, float | None]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gencore")
    group.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what to time: this CPU, or the current GPU"
    )
    group.addoption(
        "--dry-run",
        action="store_true",
        help="run every benchmark of the device once, at a small size, against eager alone: the figures mean nothing. "
        "Where there is no GPU, the emulator of the tests stands in for it",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark with the argument ``task`` runs for all that the suite's are timed at on the device."""
    if "task" not in metafunc.fixturenames:
        return
    kind = metafunc.config.getoption("device")
    tasks = [task for benchmark in suite.benchmarks() for task in suite.tasks_of(benchmark, kind)]
    if metafunc.config.getoption("dry_run"):
        tasks = [dataclasses.replace(task, case=task.case.shrunk()) for task in tasks]
    # Two that are shrunk may be one.
    by_name = {_name(task): task for task in tasks}
    metafunc.parametrize("task", by_name.values(), ids=by_name.keys())


def _name(task: suite.Task) -> str:
    return f"{task.benchmark.op}-{task.benchmark.slug}-{task.case}-{str(task.dtype).removeprefix('torch.')}"


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a benchmark's tensors shall be."""
    wanted = request.config.getoption("device")
    if wanted == "cuda" and not torch.cuda.is_available():
        if not request.config.getoption("dry_run"):
            pytest.skip("torch finds no GPU to use")
        from kernels import running

        with running("cuda") as kernels:
            yield kernels.device
    else:
        yield wanted


class Compare:
    """Runs ours and its peers in turn, and tells pytest-benchmark and the terminal what was found."""

    def __init__(self, benchmark: Any, node: Any, device: str, dry: bool, emulated: bool) -> None:
        self.benchmark, self.node, self.device, self.dry, self.emulated = benchmark, node, device, dry, emulated

    def __call__(self, task: suite.Task) -> None:
        if self.emulated and task.benchmark.section != "ops":
            pytest.skip("a network takes the emulator minutes")
        torch.manual_seed(0)
        comparison = task.benchmark.make(task.case, task.dtype, self.device)
        self.run(comparison, limits.floor(comparison.work, task.dtype, self.device))

    def run(self, comparison: Comparison, floor: tuple[float, str]) -> None:
        """``floor``: seconds, and the name of the limit."""
        calls = {name: call for name, call in comparison.calls.items() if not (self.dry and is_compiled(name))}
        errors, failures = self._tried(calls, comparison)
        calls = {name: call for name, call in calls.items() if name not in failures}
        clock = comparison.clock or self.device
        # Networks take long: there are fewer rounds of them.
        settings = {"rounds": 1, "round_seconds": 0.0, "budget": 0.0} if self.dry else {"budget": 10.0}
        timings = interleave(calls, device=clock, **settings)
        mine, (seconds, limit) = timings[OURS], floor
        ratios = {name: mine.ratio_of(timing) for name, timing in timings.items() if name != OURS}
        nbytes = comparison.work.nbytes
        copied = limits.memory_floor(nbytes, self.device) / mine.median if nbytes else None
        self.benchmark.extra_info.update(
            seconds={name: timing.median for name, timing in timings.items()},
            ratios=ratios,
            errors=errors,
            tolerance=comparison.tolerance,
            failures=failures,
            floor_seconds=seconds,
            limit=limit,
            share_of_floor=seconds / mine.median,
            share_of_copy_bandwidth=copied,
            device=self.device,
            threads=torch.get_num_threads(),
            simd_level=gencore.info()["cpu_module"]["simd_level"],
        )
        ROWS.append((self.node.name, mine.median, ratios, seconds, limit, copied))

        def and_wait() -> None:
            calls[OURS]()
            if clock == "cuda":
                torch.cuda.synchronize()

        iterations = max(1, int(0.005 / mine.median))
        self.benchmark.pedantic(and_wait, rounds=1 if self.dry else 10, iterations=iterations, warmup_rounds=0)

    def _tried(self, calls: dict[str, Call], comparison: Comparison) -> tuple[dict[str, float], dict[str, str]]:
        """How far off each is, and what cannot run; ours must be right."""
        errors, failures = {}, {}
        for name, call in calls.items():
            try:
                result = call()
                if comparison.error is not None:
                    errors[name] = comparison.error(result)
            except Exception as error:
                if name == OURS:
                    raise
                failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        if OURS in errors and comparison.tolerance is not None:
            assert errors[OURS] <= comparison.tolerance
        return errors, failures


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest, device: str) -> Iterator[Compare]:
    """``compare(task)``, or ``compare.run(comparison, floor)`` for what is no task."""
    option = request.config.getoption
    # Before it may be used up by other benchmarks: the compiler gives up on a function compiled for many shapes.
    torch.compiler.reset()
    yield Compare(benchmark, request.node, device, option("dry_run"), device != option("device"))
    torch.compiler.reset()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    terminalreporter.section("ours against peers (times as long as ours), and the floor")
    for name, mine, ratios, floor, limit, copied in ROWS:
        against = "  ".join(f"{peer} {ratio:.2f}x" for peer, ratio in ratios.items())
        terminalreporter.write_line(f"{name:58} {1e6 * mine:10.1f} us   {against}")
        share = f"{'':58} {1e6 * floor:10.1f} us   floor by {limit}: ours is at {floor / mine:.0%} of it"
        share += "" if copied is None else f", at {copied:.0%} of a copy's bandwidth"
        terminalreporter.write_line(share)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info.update(
        gencore=gencore.__version__, commit=machine.commit(), torch=torch.__version__, python=platform.python_version()
    )
    if config.getoption("device") == "cuda":
        told = gencore.info()
        machine_info.update(gpus=told["gpus"], cuda_module=told["cuda_module"], triton=told["triton"])
        machine_info.update(cuda=torch.version.cuda)
