"""Timing that a noisy machine does not fool: candidates take turns, and ratios are of neighbours in time."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Candidate = Callable[[], object]
_RESAMPLES = 2000
# What a median needs to be one.
_FEWEST_ROUNDS = 5


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median by the percentile bootstrap (Efron 1979), with 2,000 resamples.

    Deterministic. It takes the values as independent: rounds that follow each other on a machine whose speed drifts
    are not quite, so take it for the least that the figure is uncertain by.
    """
    array = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(0).integers(len(array), size=(_RESAMPLES, len(array)))
    low, high = np.percentile(np.median(array[chosen], axis=1), (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one figure per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the median, 95%."""
        return median_interval(self.seconds)

    def ratios_of(self, other: Timing) -> list[float]:
        """How many times as long the other takes, round by round."""
        return [b / a for a, b in zip(self.seconds, other.seconds, strict=True)]

    def ratio_of(self, other: Timing) -> float:
        """How many times as long the other takes: the median of the ratios round by round."""
        return statistics.median(self.ratios_of(other))


@contextlib.contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keeps off stderr what torch's profiler writes there from C++: that it begins and ends, what it did not see."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _seconds(candidate: Candidate, calls: int, device: str) -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(calls):
            candidate()
        return (time.perf_counter() - begin) / calls
    # What the GPU took from the first call to the end of the last; it waits where the calls come too slowly.
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        candidate()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / calls


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    rounds: int = 21,
    round_seconds: float = 0.02,
    device: str = "cpu",
    budget: float = math.inf,
) -> dict[str, Timing]:
    """Times candidates in turn, A B C A B C, after three calls of each to warm up.

    Args:
        candidates: functions without arguments, by name.
        rounds: how often each is timed.
        round_seconds: a round repeats a short function for about as long, so that neither the clock counts nor what the
            candidate before left behind, such as memory that was given back to the system.
        device: "cpu", timed by the clock, or "cuda", timed by events on the current stream.
        budget: seconds that all rounds may take together; there are fewer rounds, but five at least, where they would
            take longer, and only one call to warm up where three would take a tenth of it.
    """
    calls, round_takes = {}, 0.0
    for name, candidate in candidates.items():
        if (once := _seconds(candidate, 1, device)) * 30 < budget:
            _seconds(candidate, 2, device)
            once = _seconds(candidate, 1, device)
        calls[name] = max(1, int(round_seconds / once))
        round_takes += once * calls[name]
    rounds = min(rounds, max(_FEWEST_ROUNDS, int(budget / round_takes))) if budget < math.inf else rounds
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            seconds[name].append(_seconds(candidate, calls[name], device))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
