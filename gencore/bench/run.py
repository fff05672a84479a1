"""Runs benchmarks: every candidate is called, checked, weighed and timed in turn with the others."""

from __future__ import annotations

import contextlib
import datetime
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch

from gencore._torch import fresh_compiler_cache
from gencore.bench import limits, machine, replay
from gencore.bench.limits import Work
from gencore.bench.measure import Timing, interleave, median_interval, quiet_profiler
from gencore.bench.results import OURS, Candidate, Limits, Report, Result
from gencore.bench.suite import Task
from gencore.bench.suite.base import Benchmark, Call, Comparison, is_compiled


class Settings(NamedTuple):
    """How a run measures.

    Attributes:
        rounds: at most, of each comparison.
        budget: seconds that the rounds of a comparison may take; slow candidates are timed in fewer rounds.
        compile: whether what is compiled takes part, which takes a second or more for each.
        quick: whether the run is one of ``--quick``, which the report then says.
    """

    rounds: int = 21
    budget: float = 10.0
    compile: bool = True
    quick: bool = False


class Interrupted(KeyboardInterrupt):
    """A run that was interrupted, with the report of what was there by then."""

    def __init__(self, report: Report):
        super().__init__()
        self.report = report


QUICK = Settings(rounds=9, budget=2.0, compile=False, quick=True)


def run(
    tasks: Sequence[Task],
    device: str = "cpu",
    settings: Settings = Settings(),  # noqa: B008 - a tuple of constants
    on_progress: Callable[[int, str], None] = lambda done, name: None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Runs the tasks one after another on the threads in use, or on the current GPU.

    Args:
        tasks: from :func:`gencore.bench.suite.tasks`.
        device: "cpu" or "cuda".
        settings: how to measure.
        on_progress: is told how many tasks are done, and the name of what comes.
        on_result: is given every result as it is there.

    Raises:
        Interrupted: by Control-C, once the limits are measured.
    """
    on_progress(0, "what the machine can do")
    # Before anything runs: who has lost a GPU cannot be asked about it.
    about = About(limits.measured(device), machine.commit(), machine.describe(device), machine.versions())
    if settings.compile:
        _warm_up_the_compiler()
    runner = _Runner(device, settings)
    results: list[Result] = []
    try:
        with warnings.catch_warnings():
            # What the compiler thinks of the code of peers is nobody's business here.
            warnings.filterwarnings("ignore", module=r"torch\._(dynamo|inductor|functorch)")
            for done, task in enumerate(tasks):
                on_progress(done, task.name)
                results.append(runner.tried(task))
                on_result(results[-1])
    except KeyboardInterrupt:
        raise Interrupted(_report(results, settings, about, complete=False)) from None
    on_progress(len(tasks), "")
    return _report(results, settings, about)


class About(NamedTuple):
    """What a report says beside results."""

    limits: Limits
    commit: str
    machine: dict[str, Any]
    versions: dict[str, str]


def _report(results: Sequence[Result], settings: Settings, about: About, complete: bool = True) -> Report:
    return Report(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        settings={**settings._asdict(), "complete": complete},
        results=tuple(results),
        **about._asdict(),
    )


class _Runner:
    def __init__(self, device: str, settings: Settings):
        self.device, self.settings = device, settings
        self.overheads: dict[tuple[str, str], Mapping[str, float]] = {}

    def tried(self, task: Task) -> Result:
        """The task's result; one that only says why, where it cannot be made: a case that does not fit into memory."""
        try:
            return self.result(task)
        except Exception as failure:
            return self._result(
                task, Comparison({OURS: lambda: None}, Work()), [Candidate(OURS, failure=_in_a_line(failure))]
            )

    def result(self, task: Task) -> Result:
        benchmark = task.benchmark
        # Before, what the benchmarks before have left is freed, so that it is neither counted nor in the way.
        gc.collect()
        torch.manual_seed(0)
        if self.settings.compile:
            # The compiler gives up on a function that was compiled for many shapes.
            torch.compiler.reset()
        comparison = benchmark.make(task.case, task.dtype, self.device)
        calls = {
            name: call for name, call in comparison.calls.items() if self.settings.compile or not is_compiled(name)
        }
        found = {name: self._tried(name, call, comparison) for name, call in calls.items()}
        able = {name: calls[name] for name, candidate in found.items() if candidate.failure is None}
        timings: dict[str, Timing] = {}
        clock: Literal["calls", "graph"] = "calls"
        if OURS in able:
            timings, failures = self._replayed(task, comparison, able)
            if OURS in timings:
                clock = "graph"
                found |= {name: replace(found[name], failure=why) for name, why in failures.items()}
            else:
                timings = interleave(
                    able,
                    rounds=self.settings.rounds,
                    device="cpu" if comparison.clock == "cpu" else self.device,
                    budget=self.settings.budget,
                )
        overheads = self._overheads(benchmark, task) if benchmark.section == "ops" else {}
        return self._result(
            task,
            comparison,
            [
                _timed(candidate, timings.get(name), timings.get(OURS), overheads.get(name))
                for name, candidate in found.items()
            ],
            *limits.floor(comparison.work, task.dtype, self.device),
            clock=clock,
        )

    def _replayed(
        self, task: Task, comparison: Comparison, able: Mapping[str, Call]
    ) -> tuple[dict[str, Timing], dict[str, str]]:
        """What calls take in CUDA graphs, and why others have no graph: where it is an op on a GPU, else nothing."""
        if self.device != "cuda" or comparison.clock or task.benchmark.section != "ops":
            return {}, {}
        turns = [able]
        for _ in range(1, replay.copies(comparison.work.nbytes, replay.cache_bytes())):
            turns.append(task.benchmark.make(task.case, task.dtype, self.device).calls)
        # What is compiled would be compiled for each set of tensors anew.
        calls = {
            name: [turn[name] for turn in (turns[:1] if is_compiled(name) else turns) if name in turn] for name in able
        }
        return replay.timings(calls, rounds=self.settings.rounds, budget=self.settings.budget)

    def _result(
        self,
        task: Task,
        comparison: Comparison,
        candidates: Sequence[Candidate],
        floor: float | None = None,
        limit: str = "",
        clock: Literal["calls", "graph"] = "calls",
    ) -> Result:
        return Result(
            section=task.benchmark.section,
            op=task.benchmark.op,
            benchmark=task.benchmark.name,
            case=str(task.case),
            why=task.case.why,
            presets=tuple(task.case.presets),
            dtype=str(task.dtype).removeprefix("torch."),
            candidates=tuple(candidates),
            nbytes=comparison.work.nbytes,
            flops=comparison.work.flops,
            floor_seconds=floor,
            limit=limit,
            tolerance=comparison.tolerance,
            clock=clock,
        )

    def _tried(self, name: str, call: Call, comparison: Comparison) -> Candidate:
        """The first call, in which what is compiled compiles, and what can be said of a candidate without timing it."""
        try:
            if is_compiled(name):
                with fresh_compiler_cache():
                    begin = time.perf_counter()
                    result = call()
                    self._wait()
                    compiling: float | None = time.perf_counter() - begin
            else:
                result, compiling = call(), None
            error = None if comparison.error is None else comparison.error(result)
            del result
            # NaN compares as no error at all.
            error = math.inf if error is not None and math.isnan(error) else error
            peak = peak_bytes(call, self.device)
        except Exception as failure:
            return Candidate(name, failure=_in_a_line(failure))
        return Candidate(name, compile_seconds=compiling, error=error, peak_bytes=peak)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _overheads(self, benchmark: Benchmark, task: Task) -> Mapping[str, float]:
        """Of each candidate the seconds of a call with tensors of a few elements, by the host's clock.

        Neither the type nor the format changes them, so that they are measured once for a benchmark.
        """
        known = (benchmark.op, benchmark.name)
        if known not in self.overheads:
            calls = benchmark.make(task.case.shrunk(), task.dtype, self.device).calls
            able: dict[str, Call] = {}
            for name, call in calls.items():
                if self.settings.compile or not is_compiled(name):
                    with contextlib.suppress(Exception):
                        call()
                        able[name] = call
            timings = interleave(able, rounds=min(9, self.settings.rounds), round_seconds=0.002, device="cpu")
            self.overheads[known] = {name: timing.median for name, timing in timings.items()}
        return self.overheads[known]


def _timed(candidate: Candidate, timing: Timing | None, ours: Timing | None, overhead: float | None) -> Candidate:
    if timing is None or ours is None:
        return candidate
    mine = candidate.name == OURS
    ratios = ours.ratios_of(timing)
    return Candidate(
        name=candidate.name,
        seconds=timing.median,
        interval=timing.interval,
        ratio=1.0 if mine else statistics.median(ratios),
        ratio_interval=(1.0, 1.0) if mine else median_interval(ratios),
        peak_bytes=candidate.peak_bytes,
        call_seconds=overhead,
        compile_seconds=candidate.compile_seconds,
        error=candidate.error,
    )


def peak_bytes(call: Call, device: str) -> int:
    """The most bytes of tensors that a call holds at once beyond those that were there, its results included.

    What libraries allocate for themselves beside tensors is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with quiet_profiler(), torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        result = call()
    del result
    held = highest = 0
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def _warm_up_the_compiler() -> None:
    """Imports the compiler and has it make ready what it needs once in a process, such as precompiled headers."""
    with contextlib.suppress(Exception):
        torch.compile(lambda x: x + 1)(torch.zeros(64))


def _in_a_line(failure: BaseException) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    text = f"{type(failure).__name__}: {lines[0]}" if lines else type(failure).__name__
    return text if len(text) <= 200 else text[:199] + "…"
