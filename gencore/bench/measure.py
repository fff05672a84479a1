"""Timing that a noisy machine does not fool: candidates take turns, and ratios are of neighbours in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Candidate = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one figure per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_of(self, other: Timing) -> float:
        """How many times as long the other takes: the median of the ratios round by round."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


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
    candidates: Mapping[str, Candidate], *, rounds: int = 21, round_seconds: float = 0.02, device: str = "cpu"
) -> dict[str, Timing]:
    """Times candidates in turn, A B C A B C, after three calls of each to warm up.

    Args:
        candidates: functions without arguments, by name.
        rounds: how often each is timed.
        round_seconds: a round repeats a short function for about as long, so that neither the clock counts nor what the
            candidate before left behind, such as memory that was given back to the system.
        device: "cpu", timed by the clock, or "cuda", timed by events on the current stream.
    """
    calls = {}
    for name, candidate in candidates.items():
        _seconds(candidate, 3, device)
        calls[name] = max(1, int(round_seconds / _seconds(candidate, 1, device)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            seconds[name].append(_seconds(candidate, calls[name], device))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
