"""A run: what it finds of each candidate, and that a peer's failure or another result is said and stops nothing."""

from __future__ import annotations

import math

import pytest
import torch

from gencore.bench import limits, run
from gencore.bench.cases import Case
from gencore.bench.limits import Work
from gencore.bench.results import Limits
from gencore.bench.suite import Task
from gencore.bench.suite.base import Benchmark, Comparison, largest_error

# The bytes that torch wraps a Python number in.
_SCALARS = 64
SETTINGS = run.Settings(rounds=5, budget=0.2, compile=True)


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    """What takes seconds to measure, and is tested by itself."""
    monkeypatch.setattr(limits, "measured", lambda device: Limits(2e11, 1e11, {"float32": 1e12}, 1e9))
    monkeypatch.setattr(limits, "copy_bandwidth", lambda nbytes, threads, device: 1e9)


def task(make, *, dtype=torch.float32, case=None):
    case = case or Case((1000,), "a thousand")
    return Task(Benchmark("op", "use", make, (case,)), case, dtype)


def only(make, settings=SETTINGS, **more):
    (result,) = run.run([task(make, **more)], "cpu", settings).results
    return result


def plus_one(case, dtype, device):
    x = torch.randn(case.shape, dtype=dtype)

    def broken():
        raise RuntimeError("no kernel\nfor this")

    return Comparison(
        {
            "ours": lambda: x + 1,
            "eager": lambda: (x.clone() + 1).clone(),
            "compile": torch.compile(lambda: x + 1),
            "wrong": lambda: x + 1.001,
            "not a number": lambda: x * torch.nan,
            "broken": broken,
        },
        Work(nbytes=2 * x.nbytes, flops=x.numel()),
        largest_error(lambda: x.double() + 1),
        1e-5,
    )


def test_every_candidate_is_measured():
    result = only(plus_one)
    candidates = {candidate.name: candidate for candidate in result.candidates}
    assert list(candidates) == ["ours", "eager", "compile", "wrong", "not a number", "broken"]
    ours, eager, compiled = (candidates[name] for name in ("ours", "eager", "compile"))
    for one in (ours, eager, compiled):
        assert one.interval[0] <= one.seconds <= one.interval[1]
        assert one.ratio_interval[0] <= one.ratio <= one.ratio_interval[1]
        assert 0 < one.call_seconds < 1
        assert one.error < 1e-6
        assert result.agrees(one)
    assert ours.ratio == 1.0
    assert ours.peak_bytes == pytest.approx(4000, abs=_SCALARS)
    assert eager.peak_bytes == pytest.approx(8000, abs=_SCALARS)
    assert compiled.compile_seconds > 0.05
    assert ours.compile_seconds is eager.compile_seconds is None
    assert (result.nbytes, result.flops, result.limit) == (8000, 1000, "memory")
    assert result.floor_seconds == pytest.approx(8e-6)
    assert result.share_of_floor == pytest.approx(8e-6 / ours.seconds)


def test_what_computes_something_else_or_fails_is_told_and_no_best_peer():
    result = only(plus_one)
    candidates = {candidate.name: candidate for candidate in result.candidates}
    assert candidates["wrong"].error == pytest.approx(0.001 / 4, rel=0.5)
    assert candidates["not a number"].error == math.inf
    assert not result.agrees(candidates["wrong"])
    assert not result.agrees(candidates["not a number"])
    assert candidates["broken"].failure == "RuntimeError: no kernel"
    assert candidates["broken"].seconds is None
    assert result.best_peer.name in ("eager", "compile")


def test_ours_that_fails_leaves_a_result():
    def make(case, dtype, device):
        def broken():
            raise ValueError("refused")

        return Comparison({"ours": broken, "eager": lambda: torch.ones(1)}, Work(nbytes=8))

    result = only(make)
    assert result.ours.failure == "ValueError: refused"
    assert result.ours.seconds is None
    assert result.share_of_floor is None
    assert result.best_peer is None


def test_without_the_compiler_what_is_compiled_takes_no_part():
    result = only(plus_one, SETTINGS._replace(compile=False))
    assert "compile" not in {candidate.name for candidate in result.candidates}


def test_the_report_says_what_it_is_of():
    told = run.run([task(plus_one)], "cpu", SETTINGS._replace(compile=False))
    assert told.machine["device"] == "cpu"
    assert told.machine["threads"] == torch.get_num_threads()
    assert told.versions["torch"] == torch.__version__
    assert told.settings == {"rounds": 5, "budget": 0.2, "compile": False, "quick": False, "complete": True}
    assert told.date.endswith("+00:00")


def test_an_interrupted_run_keeps_what_is_there():
    calls = []

    def make(case, dtype, device):
        calls.append(case)
        if len(calls) > 2:  # the first makes its own, and the one of a few elements
            raise KeyboardInterrupt
        return Comparison({"ours": lambda: torch.ones(2)}, Work(nbytes=8))

    with pytest.raises(run.Interrupted) as caught:
        run.run([task(make), task(make)], "cpu", SETTINGS)
    assert len(caught.value.report.results) == 1
    assert not caught.value.report.settings["complete"]


def test_a_case_that_cannot_be_made_is_told_and_the_others_run():
    def make(case, dtype, device):
        if case.shape == (7,):
            raise MemoryError("too large")
        return plus_one(case, dtype, device)

    tasks = [task(make, case=Case((size,), "of that size")) for size in (7, 9)]
    failed, result = run.run(tasks, "cpu", SETTINGS._replace(compile=False)).results
    assert failed.ours.failure == "MemoryError: too large"
    assert (failed.floor_seconds, failed.best_peer, failed.share_of_floor) == (None, None, None)
    assert result.ours.seconds


def test_progress_and_results_are_told_as_they_come():
    told, found = [], []
    run.run([task(plus_one)], "cpu", SETTINGS._replace(compile=False), lambda *args: told.append(args), found.append)
    assert told == [(0, "what the machine can do"), (0, "op · use · 1000 · float32"), (1, "")]
    assert [result.name for result in found] == ["op · use · 1000 · float32"]


def test_the_peak_is_of_one_moment(capfd):
    x = torch.ones(1000)

    def call():
        first = x + 1
        del first
        second = x + 1
        return second + 1

    assert run.peak_bytes(call, "cpu") == pytest.approx(8000, abs=_SCALARS)
    assert run.peak_bytes(lambda: x.sum().item(), "cpu") <= _SCALARS
    # torch's profiler says there that it starts and stops.
    assert capfd.readouterr().err == ""
