"""The guard: it finds what lost against every peer, and is not fooled by one peer, by noise, or by a faster machine."""

from __future__ import annotations

import dataclasses

import pytest
from bench import reports

from gencore.bench import compare
from gencore.bench.results import Candidate, Report, Result


def result_of(
    ratios: dict[str, tuple[float, float]], *, name: str = "op", seconds: float | None = 1.0, **changes
) -> Result:
    """A result of peers with a ratio and half the width of its interval."""
    ours = Candidate("ours", seconds=seconds, interval=(1.0, 1.0), ratio=1.0, ratio_interval=(1.0, 1.0))
    peers = [
        Candidate(peer, seconds=ratio, ratio=ratio, ratio_interval=(ratio - half, ratio + half))
        for peer, (ratio, half) in ratios.items()
    ]
    told = {"floor_seconds": None, **changes}
    return dataclasses.replace(reports.report().results[0], op=name, candidates=(ours, *peers), **told)


def report_of(*results: Result, **machine) -> Report:
    sample = reports.report()
    return dataclasses.replace(sample, results=results, machine=sample.machine | machine)


def lost(now: dict[str, tuple[float, float]], before: dict[str, tuple[float, float]]) -> bool:
    return bool(compare.compare(report_of(result_of(now)), report_of(result_of(before))).lost())


def test_a_loss_is_one_of_more_than_the_margin_outside_of_the_interval():
    assert lost({"a": (1.6, 0.1)}, {"a": (2.0, 0.1)})
    assert not lost({"a": (1.75, 0.01)}, {"a": (2.0, 0.01)})  # 12%
    assert not lost({"a": (1.6, 0.3)}, {"a": (2.0, 0.2)})  # 20%, but the intervals meet
    assert not lost({"a": (2.5, 0.1)}, {"a": (2.0, 0.1)})


def test_a_peer_that_became_faster_is_no_loss_of_ours():
    before = {"a": (2.0, 0.05), "b": (3.0, 0.05)}
    assert not lost({"a": (1.0, 0.05), "b": (3.0, 0.05)}, before)
    assert lost({"a": (1.0, 0.05), "b": (1.5, 0.05)}, before)


def with_floor(ratio, seconds, floor=0.5):
    """Ours takes ``seconds``, and a peer ``ratio`` times as long."""
    ours = dataclasses.replace(result_of({}).ours, seconds=seconds, interval=(seconds, seconds))
    made = result_of({"a": (ratio, 0.05)}, floor_seconds=floor)
    return report_of(dataclasses.replace(made, candidates=(ours, *made.peers)))


def test_what_is_as_near_to_the_floor_as_before_has_not_lost():
    """A peer may take half the time in the next process, where its threads wake up in another way."""
    for seconds, is_lost in ((1.0, False), (1.5, True)):
        found = compare.compare(with_floor(1.0, seconds), with_floor(2.0, 1.0))
        assert bool(found.lost()) == is_lost
        ((_, change),) = found.changes.values()
        assert (change.peer, change.before, change.now) == (compare.FLOOR, 0.5, 0.5 / seconds)
    without_peers = report_of(result_of({}, floor_seconds=0.1))
    assert not compare.compare(without_peers, with_floor(2.0, 1.0)).changes


def test_of_several_older_floors_the_nearest_counts():
    older = with_floor(2.0, 1.0), with_floor(2.0, 2.0)
    assert not compare.compare(with_floor(1.0, 1.5), *older).lost()
    assert compare.compare(with_floor(1.0, 4.0), *older).lost()


def test_a_floor_that_moved_hides_no_loss():
    """On a busy machine a copy may take ten times as long as it did."""
    assert compare.compare(with_floor(1.0, 2.0, floor=5.0), with_floor(2.0, 1.0)).lost()


def test_a_peer_that_wavers_hides_nothing():
    before = {"a": (2.0, 0.05), "b": (3.0, 0.05)}
    assert lost({"a": (1.0, 0.05), "b": (1.5, 1.4)}, before)
    assert not lost({"a": (1.0, 0.9)}, {"a": (2.0, 0.9)})


def test_a_faster_machine_is_no_gain():
    slow, fast = result_of({"a": (2.0, 0.1)}, seconds=2.0), result_of({"a": (2.0, 0.1)}, seconds=1.0)
    found = compare.compare(report_of(fast), report_of(slow))
    assert not found.lost()
    assert not found.gained()


def test_what_lies_among_older_ratios_has_not_changed():
    older = [report_of(result_of({"a": (ratio, 0.05)})) for ratio in (2.0, 1.0, 1.4)]
    for ratio, factor in ((1.2, 1.0), (2.0, 1.0), (0.5, 0.5), (4.0, 2.0)):
        found = compare.compare(report_of(result_of({"a": (ratio, 0.05)})), *older)
        ((change,),) = found.changes.values()
        assert change.factor == pytest.approx(factor)
        assert bool(found.lost()) == (factor < 1)
        assert bool(found.gained()) == (factor > 1)


def test_a_gain_is_found():
    found = compare.compare(report_of(result_of({"a": (3.0, 0.1)})), report_of(result_of({"a": (2.0, 0.1)})))
    ((change,),) = found.gained().values()
    assert change.factor == pytest.approx(1.5)
    assert change.interval == pytest.approx((2.9 / 2.1, 3.1 / 1.9))


def test_ours_that_fails_or_is_wrong_now_is_told():
    before = report_of(result_of({"a": (2.0, 0.1)}, tolerance=1e-5))
    broken = result_of({"a": (2.0, 0.1)}, seconds=None)
    wrong = result_of({"a": (2.0, 0.1)}, tolerance=1e-5)
    wrong = dataclasses.replace(wrong, candidates=(dataclasses.replace(wrong.ours, error=0.1), *wrong.peers))
    for now in (broken, wrong):
        found = compare.compare(report_of(now), before)
        assert found.failed == (now.name,)
        assert not found.changes


def test_other_forms_of_ours_and_what_only_one_report_has_are_not_compared():
    before = report_of(result_of({"ours, Triton": (2.0, 0.0)}, name="b"), result_of({"a": (2.0, 0.0)}, name="c"))
    now = report_of(result_of({"ours, Triton": (1.0, 0.0)}, name="b"), result_of({"a": (1.0, 0.0)}, name="d"))
    found = compare.compare(now, before)
    assert not found.changes
    assert [name.split(" ")[0] for name in found.missing] == ["c"]


def test_another_clock_is_another_figure():
    """Replays of a graph leave out what calls one after another have."""
    before, now = (result_of({"a": (ratio, 0.1)}) for ratio in (3.0, 1.0))
    assert compare.compare(report_of(now), report_of(before)).changes
    assert not compare.compare(report_of(dataclasses.replace(now, clock="graph")), report_of(before)).changes
    # What fails now fails by any clock.
    broken = result_of({"a": (2.0, 0.1)}, seconds=None)
    found = compare.compare(report_of(broken), report_of(dataclasses.replace(before, clock="graph")))
    assert found.failed == (broken.name,)


def test_another_machine_is_warned_of():
    found = compare.compare(report_of(threads=2), report_of(threads=4))
    assert found.warnings == ("the machine's threads is 2, was 4",)
    assert compare.same_machine(report_of(name="a").machine, report_of(name="a", threads=4))
    assert not compare.same_machine(report_of(name="a").machine, report_of(name="b"))


def test_the_better_of_two_measurements_is_the_one_of_higher_ratios():
    low, high = result_of({"a": (1.0, 0.1), "b": (3.0, 0.1)}), result_of({"a": (2.0, 0.1), "b": (2.0, 0.1)})
    assert compare.better(low, high) is high
    assert compare.better(high, low) is high


def test_a_failure_is_no_better_measurement_hidden():
    good, failed = result_of({"a": (2.0, 0.1)}), result_of({"a": (9.0, 0.1)}, seconds=None)
    assert compare.better(good, failed) is failed
    assert compare.better(failed, good) is failed
