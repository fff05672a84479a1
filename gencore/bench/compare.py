"""A report against an older one, by ratios to peers that ran in turn with ours, never by time.

Times change with the machine's load and its clock; how many times as long a peer takes in the same run does so much
less. What is left of noise is dealt with by intervals, and by measuring again what seems to have lost.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from gencore.bench.results import OURS, Interval, Report, Result

MARGIN = 0.15


@dataclass(frozen=True)
class Change:
    """How ours did against one peer, now and before.

    Attributes:
        name: of the result.
        peer: its name.
        before, now: how many times as long as ours the peer took.
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
    """What became of each result that both reports have, and what only one has.

    Attributes:
        changes: by the result's name, against each peer that both reports have.
        missing: the names of results of the older report that the newer lacks, for whatever reason.
        failed: of ours that ran before and fail or compute something else now.
        warnings: why the two may not be comparable.
    """

    changes: dict[str, tuple[Change, ...]]
    missing: tuple[str, ...]
    failed: tuple[str, ...]
    warnings: tuple[str, ...]

    def lost(self, margin: float = MARGIN) -> dict[str, tuple[Change, ...]]:
        """The results that lost against every one of their peers: one peer alone may have become faster."""
        return {name: found for name, found in self.changes.items() if all(one.lost(margin) for one in found)}

    def gained(self, margin: float = MARGIN) -> dict[str, tuple[Change, ...]]:
        return {name: found for name, found in self.changes.items() if all(one.gained(margin) for one in found)}


def compare(now: Report, before: Report) -> Compared:
    """Compares what both reports have, by the names of results and peers."""
    known = {result.name: result for result in before.results}
    changes, failed = {}, []
    for result in now.results:
        if (old := known.pop(result.name, None)) is None:
            continue
        if old.ours.seconds is not None and (result.ours.seconds is None or not result.agrees(result.ours)):
            failed.append(result.name)
        elif found := _changes(result, old):
            changes[result.name] = found
    return Compared(changes, tuple(known), tuple(failed), tuple(_warnings(now, before)))


def _changes(now: Result, before: Result) -> tuple[Change, ...]:
    peers = {peer.name: peer for peer in before.peers if not peer.name.startswith(OURS)}
    found = []
    for peer in now.peers:
        old = peers.get(peer.name)
        if old is None or not (peer.ratio and old.ratio and peer.ratio_interval and old.ratio_interval):
            continue
        (low, high), (old_low, old_high) = peer.ratio_interval, old.ratio_interval
        interval = (low / old_high if old_high else math.inf, high / old_low if old_low else math.inf)
        found.append(Change(now.name, peer.name, old.ratio, peer.ratio, interval))
    return tuple(found)


def better(one: Result, other: Result) -> Result:
    """Of two measurements of the same, the one in which ours did better against its peers."""

    def against_peers(result: Result) -> float:
        ratios = [peer.ratio for peer in result.peers if peer.ratio and not peer.name.startswith(OURS)]
        return statistics.geometric_mean(ratios) if ratios else 0.0

    return max(one, other, key=against_peers)


def _warnings(now: Report, before: Report) -> list[str]:
    found = []
    for what in ("name", "device", "threads", "simd_level"):
        new, old = now.machine.get(what), before.machine.get(what)
        if new != old:
            found.append(f"the machine's {what.replace('_', ' ')} is {new}, was {old}")
    for package in sorted(now.versions.keys() & before.versions.keys() - {"gencore"}):
        if now.versions[package] != before.versions[package]:
            found.append(f"{package} is {now.versions[package]}, was {before.versions[package]}")
    return found


def same_machine(now: dict[str, object], before: Report) -> bool:
    """Whether ratios of a machine may be held against those of a report: the same kind of it, used alike."""
    return all(now.get(what) == before.machine.get(what) for what in ("name", "device", "threads", "simd_level"))
