"""Calls in CUDA graphs: tensors take turns, results are kept until their turn, what cannot be captured is said."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gencore.bench import replay, run
from gencore.bench.cases import Case
from gencore.bench.limits import Work
from gencore.bench.measure import Timing
from gencore.bench.suite import Task
from gencore.bench.suite.base import Benchmark, Comparison


@pytest.mark.parametrize(
    ("nbytes", "cache", "wanted"), [(100, 50, 1), (99, 50, 2), (10, 50, 10), (1, 50, 32), (0, 50, 32), (10**9, 50, 1)]
)
def test_there_are_as_many_copies_as_the_cache_wants(nbytes, cache, wanted):
    assert replay.copies(nbytes, cache) == wanted


@pytest.fixture
def captured(monkeypatch):
    """What a capture runs is run, and replays are counted."""
    replays = []

    def run_at_once(calls, warm_up):
        calls()
        return lambda: replays.append(1)

    monkeypatch.setattr(replay, "_captured", run_at_once)
    return replays


def test_calls_take_turns_and_their_results_do_not_share_memory(captured):
    order, alive = [], []

    def call(number):
        def made():
            order.append(number)
            result = torch.empty(1000)
            alive.append(result.data_ptr())
            return result

        return made

    graph = replay.Graph([call(0), call(1), call(2)], repeats=4)
    assert order == [0, 1, 2] * 4
    assert graph.calls == 12
    # Any three that follow each other.
    assert all(len(set(alive[i : i + 3])) == 3 for i in range(len(alive) - 2))
    graph()
    assert len(captured) == 1
    assert len(order) == 12, "a replay calls nothing"


def test_a_replay_is_long_enough_and_its_time_is_shared_out(captured, monkeypatch):
    """A replay of two calls takes 40 us: 50 calls make 2 ms; or 20 ms: they are enough; or nothing: the most calls."""
    seen, takes = {}, {"a": 40e-6, "b": 2e-2, "c": 0.0}

    def interleave(graphs, *, rounds, round_seconds, device, budget):
        assert (round_seconds, device) == (1e-3, "cuda")
        if budget == 0:
            ((name, graph),) = graphs.items()
            assert graph.calls == 2
            return {name: Timing((takes[name],))}
        assert (rounds, budget) == (7, 3.0)
        seen.update({name: graph.calls for name, graph in graphs.items()})
        return {name: Timing((graph.calls * 2.0, graph.calls * 4.0)) for name, graph in graphs.items()}

    monkeypatch.setattr(replay, "interleave", interleave)
    calls = [lambda: None, lambda: None]
    found, failures = replay.timings({"a": calls, "b": calls, "c": calls}, rounds=7, budget=3.0)
    assert seen == {"a": 50, "b": 2, "c": 256}
    assert {name: timing.seconds for name, timing in found.items()} == dict.fromkeys("abc", (2.0, 4.0))
    assert failures == {}


def test_who_cannot_be_captured_is_said(captured, monkeypatch):
    def wrong():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "interleave", lambda graphs, **settings: {name: Timing((1.0,)) for name in graphs})
    found, failures = replay.timings({"ours": [lambda: None], "eager": [wrong]}, rounds=5, budget=1.0)
    assert list(found) == ["ours"]
    assert failures == {"eager": "a CUDA graph cannot have it: operation not permitted when stream is capturing"}


class Made:
    """A benchmark whose comparisons are told apart."""

    def __init__(self, clock=None):
        self.count, self.clock = 0, clock

    def __call__(self, case, dtype, device):
        number, self.count = self.count, self.count + 1
        calls = {name: lambda name=name: (name, number) for name in ("ours", "eager", "compile", "broken")}
        return Comparison(calls, Work(nbytes=100), clock=self.clock)


def replayed(monkeypatch, made, section="ops", device="cuda"):
    """What a runner gives to be replayed, and what it gets."""
    monkeypatch.setattr(replay, "cache_bytes", lambda: 150)
    given = {}

    def timings(candidates, *, rounds, budget):
        given.update({name: [call() for call in calls] for name, calls in candidates.items()})
        return {name: Timing((1e-6,) * rounds) for name in candidates}, {"eager": "no"}

    monkeypatch.setattr(replay, "timings", timings)
    case = Case((1000,), "a thousand")
    task = Task(Benchmark("op", "use", made, (case,), section=section), case, torch.float32)
    comparison = made(case, torch.float32, device)
    able = {name: comparison.calls[name] for name in ("ours", "eager", "compile")}
    runner = run._Runner(device, run.Settings(rounds=3))
    return given, runner._replayed(task, comparison, able)


def test_a_run_replays_the_ops_of_a_gpu(monkeypatch):
    given, (found, failures) = replayed(monkeypatch, Made())
    # Three sets of tensors hold twice the cache; who failed before is not among them.
    assert given == {name: [(name, number) for number in range(3)] for name in ("ours", "eager")} | {
        "compile": [("compile", 0)]
    }
    assert found["ours"].seconds == (1e-6,) * 3
    assert failures == {"eager": "no"}


@pytest.mark.parametrize(
    ("clock", "changed"), [("cpu", {}), (None, {"section": "networks"}), (None, {"device": "cpu"})], ids=str
)
def test_a_run_replays_nothing_else(monkeypatch, clock, changed):
    given, found = replayed(monkeypatch, Made(clock), **changed)
    assert (given, found) == ({}, ({}, {}))


ON_A_GPU = """
import torch
from gencore.bench import replay

tensors = [torch.zeros(1000, device="cuda") for _ in range(3)]
graph = replay.Graph([lambda x=x: x.add_(1) for x in tensors], repeats=2)
before = [x.clone() for x in tensors]
graph()
torch.cuda.synchronize()
assert all(torch.equal(x, old + 2) for x, old in zip(tensors, before, strict=True))

def backward():
    leaf = torch.ones(100, device="cuda", requires_grad=True)
    return torch.autograd.grad((leaf * 3).sum(), leaf)

def refused():
    return tensors[0].item()

current = torch.cuda.current_stream()
found, failures = replay.timings({"refused": [refused], "gradient": [backward]}, rounds=5, budget=1.0)
assert 0 < found["gradient"].median < 1e-3
assert failures.keys() == {"refused"}
# The process is as it was.
assert torch.cuda.current_stream() == current
assert torch.randn(1000, device="cuda").std() > 0.5
"""


@pytest.mark.gpu
def test_on_a_gpu():
    """In a process of its own: a capture that fails may break it."""
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
