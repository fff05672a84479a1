"""A report against older ones, by ratios to peers that ran in turn with ours, never by time.

Times change with the machine's load and its clock; how many times as long a peer takes in the same run does so much
less. What is left of noise is dealt with by intervals, and by measuring again what seems to have lost.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gencore.bench.results import OURS, Interval, Report, Result, positive

MARGIN = 0.15
# Among the peers, the limits of the machine, which are measured in the same run too.
FLOOR = "the floor"
_STEADY = 1.3


@dataclass(frozen=True)
class Change:
    """How ours did against one peer, now and before.

    Attributes:
        name: of the result.
        peer: its name, or :data:`FLOOR`.
        before, now: how many times as long as ours the peer took; of several older ratios the nearest.
        factor: now over before: below 1 ours lost.
        interval: of the factor, from the ends of both ratios' intervals.
    """

    name: str
    peer: str
    before: float
    now: float
    interval: Interval

    @property
    def factor(self) -> float:
        return self.now / self.before

    def lost(self, margin: float = MARGIN) -> bool:
        """Whether ours lost more than ``margin``, and the interval has no room for none at all."""
        return self.factor < 1 - margin and self.interval[1] < 1

    def gained(self, margin: float = MARGIN) -> bool:
        """The same the other way."""
        return self.factor > 1 / (1 - margin) and self.interval[0] > 1


@dataclass(frozen=True)
class Compared:
    """What became of each result that a report shares with older ones, and what only one has.

    Attributes:
        changes: by the result's name, against each peer that both have.
        missing: the names of older results that the newer report lacks, for whatever reason.
        failed: of ours that ran before and fail or compute something else now.
        warnings: why the two may not be comparable.
    """

    changes: dict[str, tuple[Change, ...]]
    missing: tuple[str, ...]
    failed: tuple[str, ...]
    warnings: tuple[str, ...]

    def lost(self, margin: float = MARGIN) -> dict[str, tuple[Change, ...]]:
        """The results that lost against all their peers that are sure: one peer alone may have become faster."""
        return {
            name: all_ for name, all_ in self.changes.items() if all(one.lost(margin) for one in _sure(all_, margin))
        }

    def gained(self, margin: float = MARGIN) -> dict[str, tuple[Change, ...]]:
        """The same the other way."""
        return {
            name: all_ for name, all_ in self.changes.items() if all(one.gained(margin) for one in _sure(all_, margin))
        }


def _sure(changes: tuple[Change, ...], margin: float) -> list[Change]:
    """Without the peers whose interval is wider than the margin, so that one that wavers hides nothing."""
    narrow = [one for one in changes if one.interval[0] >= one.interval[1] * (1 - margin)]
    return [one for one in changes if one in narrow or one.peer == FLOOR or not narrow]


def compare(now: Report, *before: Report) -> Compared:
    """Compares what a report has with older ones, by the names of results and peers.

    Several older reports, of several processes, tell how much a ratio moves from one to the next: the way that memory
    and threads fell stays with a process, and no interval of one run knows of it. What lies among the older ratios has
    not changed; what lies beyond is compared with the nearest.
    """
    changes, failed, known = {}, [], {result.name for report in before for result in report.results}
    for result in now.results:
        older = [old for report in before for old in report.results if old.name == result.name]
        known.discard(result.name)
        if any(old.ours.seconds is not None for old in older) and not _works(result):
            failed.append(result.name)
        # Replays of a graph leave out what calls one after another have.
        elif found := _changes(result, [old for old in older if old.clock == result.clock]):
            changes[result.name] = found
    warnings = dict.fromkeys(warning for report in before for warning in _warnings(now, report))
    return Compared(changes, tuple(sorted(known)), tuple(failed), tuple(warnings))


def _works(result: Result) -> bool:
    return result.ours.seconds is not None and result.agrees(result.ours)


def _changes(now: Result, before: Sequence[Result]) -> tuple[Change, ...]:
    found = []
    for peer in now.peers:
        older = [
            (old.ratio, old.bounds)
            for result in before
            for old in result.peers
            if old.name == peer.name and positive(old.ratio) and not old.name.startswith(OURS)
        ]
        if positive(peer.ratio) and older:
            found.append(_change(now, peer.name, (peer.ratio, peer.bounds), older))
    floors = [known for result in before if (known := _of_the_floor(result))]
    if found and floors and (known := _of_the_floor(now)) and _is_steady(now, before):
        found.append(_change(now, FLOOR, known, floors))
    return tuple(found)


def _is_steady(now: Result, before: Sequence[Result]) -> bool:
    """Whether the floor itself is what it was, as on a busy machine it is not, where it would hide a loss."""
    older = [result.floor_seconds for result in before if positive(result.floor_seconds)]
    floor = now.floor_seconds
    return positive(floor) and min(older) / _STEADY <= floor <= max(older) * _STEADY


Known = tuple[float, Interval]


def _of_the_floor(result: Result) -> Known | None:
    """The share of the floor that ours reaches, which stands for a peer that never wavers."""
    floor, ours = result.floor_seconds, result.ours
    if not positive(floor) or not positive(ours.seconds) or ours.interval is None:
        return None
    low, high = ours.interval
    return floor / ours.seconds, (floor / high, floor / low)


def _change(now: Result, peer: str, found: Known, older: Sequence[Known]) -> Change:
    ratio, (low, high) = found
    nearest = min(max(ratio, min(old for old, _ in older)), max(old for old, _ in older))
    interval = low / max(bounds[1] for _, bounds in older), high / min(bounds[0] for _, bounds in older)
    return Change(now.name, peer, nearest, ratio, interval)


def better(one: Result, other: Result) -> Result:
    """Of two measurements of the same, that in which ours did better against its peers; but a failure goes first."""

    def against_peers(result: Result) -> float:
        if not _works(result):
            return math.inf
        peers = [peer for peer in result.peers if not peer.name.startswith(OURS) and result.agrees(peer)]
        ratios = [peer.ratio for peer in peers if positive(peer.ratio)]
        return statistics.geometric_mean(ratios) if ratios else 0.0

    return max(one, other, key=against_peers)


def _warnings(now: Report, before: Report) -> list[str]:
    found = []
    for what in ("name", "device", "threads", "simd_level"):
        new, old = now.machine.get(what), before.machine.get(what)
        if new != old:
            found.append(f"the machine's {what.replace('_', ' ')} is {new}, was {old}")
    for what in ("quick", "rounds"):
        if now.settings.get(what) != before.settings.get(what):
            found.append(f"{what} is {now.settings.get(what)}, was {before.settings.get(what)}")
    for package in sorted(now.versions.keys() & before.versions.keys() - {"gencore"}):
        if now.versions[package] != before.versions[package]:
            found.append(f"{package} is {now.versions[package]}, was {before.versions[package]}")
    return found


def same_machine(now: Mapping[str, Any], before: Report) -> bool:
    """Whether ratios of a machine may be held against those of a report: it is of the same kind."""
    return all(now.get(what) == before.machine.get(what) for what in ("name", "device", "simd_level"))
