"""Timing: turns, medians and ratios."""

from __future__ import annotations

import time

import numpy as np
import pytest

from gencore.bench.measure import Timing, interleave, median_interval


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


def test_the_interval_of_a_median_holds_it_and_narrows_with_more_rounds():
    few, many = (median_interval([1.0 + 0.01 * (7 * i % 11) for i in range(n)]) for n in (11, 1100))
    assert few[0] <= 1.05 <= few[1]
    assert many[0] <= 1.05 <= many[1]
    assert many[1] - many[0] < few[1] - few[0]
    assert median_interval([2.0]) == (2.0, 2.0)
    assert Timing((1.0, 3.0, 2.0)).interval == median_interval((1.0, 3.0, 2.0))


def test_the_interval_covers_the_median_as_often_as_it_says():
    generator = np.random.default_rng(1)
    intervals = [median_interval(generator.exponential(size=31)) for _ in range(200)]
    covered = sum(low <= np.log(2) <= high for low, high in intervals)
    # 95% of 200 are 190; six standard deviations of a binomial are 18.
    assert 172 <= covered <= 200


def test_a_budget_makes_fewer_rounds_but_five():
    for budget, rounds in ((0.0, 5), (1000.0, 8)):
        timings = interleave({"a": lambda: time.sleep(0.001)}, rounds=8, round_seconds=0.0, budget=budget)
        assert len(timings["a"].seconds) == rounds
