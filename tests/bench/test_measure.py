"""Timing: turns, medians and ratios."""

from __future__ import annotations

import time

import pytest

from gencore.bench.measure import Timing, interleave


def test_candidates_take_turns():
    order: list[str] = []

    def candidate(name):
        def run():
            order.append(name)
            time.sleep(0.001)

        return run

    timings = interleave({"a": candidate("a"), "b": candidate("b")}, rounds=4, round_seconds=0.0)
    assert order[-8:] == ["a", "b"] * 4
    assert all(len(timing.seconds) == 4 for timing in timings.values())
    assert all(timing.median >= 0.001 for timing in timings.values())


def test_the_ratio_is_of_neighbours_in_time():
    # A machine that grows ten times slower half way: the ratio of medians would be off, that of neighbours is not.
    mine, other = Timing((1.0, 1.0, 10.0)), Timing((2.0, 2.0, 20.0))
    assert mine.ratio_of(other) == 2.0
    assert mine.median == 1.0
    with pytest.raises(ValueError):
        mine.ratio_of(Timing((1.0,)))
