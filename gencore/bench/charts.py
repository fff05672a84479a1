"""What the charts of a report show, computed down to the places: verdicts, axes, bars of ratios, rooflines.

Places across are percentages, so that a chart stretches with the screen and its text does not shrink with it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from gencore.bench import text
from gencore.bench.results import OURS, Candidate, Interval, Limits, Result, positive

_ROOFLINE_HEIGHT = 340


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """None where there are none."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.fmean(logs)) if logs else None


@dataclass(frozen=True)
class Tick:
    """A grid line; ``anchor`` says how its label lies to it, ``marked`` that it is the one at 1."""

    at: float
    label: str
    anchor: str
    marked: bool


@dataclass(frozen=True)
class Axis:
    """Logarithmic, from ``low`` to ``high``; places are in percent."""

    low: float
    high: float
    ticks: tuple[Tick, ...]

    def at(self, value: float) -> float:
        place = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return round(100 * min(max(place, 0.0), 1.0), 2)


def axis(values: Iterable[float], low: float, high: float, steps: Sequence[int], label: Callable[[float], str]) -> Axis:
    """An axis over all of ``values`` and at least from ``low`` to ``high``.

    Args:
        steps: where it may be marked within a decade; fewer are, where the axis is long.
    """
    # What lies beyond what was ever measured stands at the end, and does not push the rest together.
    inside = [min(max(value, 1e-18), 1e18) for value in values if positive(value)]
    # A little room, so that no bar touches the end.
    low, high = min([low, *(value / 1.04 for value in inside)]), max([high, *(value * 1.04 for value in inside)])
    decades = math.log10(high) - math.log10(low)
    steps = steps if decades < 2.5 else (1,)
    every = max(1, math.ceil(decades / 6))
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [s * 10.0**e for e in exponents if e % every == 0 for s in steps]
    bare = Axis(low, high, ())
    ticks = []
    for mark in marks:
        if low * 0.999 <= mark <= high * 1.001:
            at = bare.at(mark)
            ticks.append(Tick(at, label(mark), "start" if at < 4 else "end" if at > 96 else "middle", mark == 1))
    return Axis(low, high, tuple(ticks))


def ratio_axis(peers: Iterable[Candidate]) -> Axis:
    """Of how many times as long these take, with their intervals."""
    values = [value for peer in peers if positive(peer.ratio) for value in (*peer.bounds, peer.ratio)]
    return axis(values, 0.5, 2, (1, 2, 5), lambda value: f"{value:,g}")


@dataclass(frozen=True)
class Bar:
    """One peer: how many times as long it takes. Places are in percent; without a ratio there is no bar."""

    peer: str
    kind: str
    ratio: str = ""
    between: str = ""
    mark: str = ""
    remark: str = ""
    left: float = 0
    width: float = 0
    whisker: Interval | None = None


def bar(result: Result, peer: Candidate, axis: Axis) -> Bar:
    """From 1 to the ratio: to the right of 1 where ours is faster."""
    told = remark(result, peer)
    if not positive(peer.ratio):
        return Bar(peer.name, "none", remark=told or "no ratio")
    own, agrees, word = peer.name.startswith(OURS), result.agrees(peer), peer.verdict
    one, at, (low, high) = axis.at(1), axis.at(peer.ratio), peer.bounds
    return Bar(
        peer=peer.name,
        kind="own" if own else word if agrees else "other",
        ratio=f"{text.times(peer.ratio)}\N{MULTIPLICATION SIGN}",
        between=interval(peer.ratio_interval),
        mark="also ours" if own else {"faster": "", "even": "even", "slower": "ours slower"}[word] if agrees else "",
        remark=told,
        left=min(one, at),
        width=round(abs(at - one), 2),
        whisker=(axis.at(low), axis.at(high)) if low < high else None,
    )


def remark(result: Result, candidate: Candidate) -> str:
    """Why a candidate does not count; empty where it does."""
    if candidate.failure is not None:
        return f"failed: {candidate.failure}"
    if not result.agrees(candidate):
        error, allowed = text.error(candidate.error), text.error(result.tolerance)
        return f"not counted, as it computes something else: error {error}, tolerance {allowed}"
    return "not measured" if candidate.seconds is None and candidate.ratio is None else ""


def interval(value: Interval | None) -> str:
    """Empty where it is not known."""
    return text.interval(value) if value is not None and all(map(positive, value)) else ""


@dataclass(frozen=True)
class Point:
    """One result in a roofline, ours and the best peer's."""

    x: float
    y: float
    peer_y: float | None
    title: str
    peer_title: str


@dataclass(frozen=True)
class Roof:
    """A straight piece of it, with the limit that it is."""

    name: str
    label: str
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Roofline:
    """All results of one dtype. Places are in percent across and in pixels down."""

    anchor: str
    dtype: str
    height: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    roofs: tuple[Roof, ...]
    points: tuple[Point, ...]
    note: str
    description: str


def _power(value: float) -> str:
    return f"{value:,.0f}" if 1 <= value < 1e4 else f"{value:g}"


def _round_rate(value: float) -> str:
    """A power of ten."""
    return text.rate(value, "FLOP/s").replace(".00", "").replace(".0", "")


def copies(limits: Limits) -> list[tuple[str, float]]:
    """The bandwidths of a copy by name; on a GPU there is but one."""
    if limits.copy_in_cache == limits.copy_beyond_cache:
        return [("copy", limits.copy_beyond_cache)]
    return [("copy in cache", limits.copy_in_cache), ("copy beyond cache", limits.copy_beyond_cache)]


def roofline(limits: Limits, dtype: str, results: Sequence[Result]) -> Roofline | None:
    """None where no result of the dtype has operations, bytes and a time."""
    timed = [r for r in results if r.flops > 0 and r.nbytes > 0 and positive(r.ours.seconds)]
    if not timed:
        return None
    peak_of = dtype if positive(limits.products.get(dtype)) else "float32"
    peak = limits.products.get(peak_of, math.nan)
    slopes = {name: rate for name, rate in copies(limits) if positive(rate)}
    intensities = [result.flops / result.nbytes for result in timed]
    rates = [result.flops / candidate.seconds for result in timed for candidate in (result.ours, result.best_peer)
             if candidate is not None and positive(candidate.seconds)]  # fmt: skip
    # To the right at least as far as memory no longer counts.
    ridges = [peak / rate for rate in slopes.values() if positive(peak)]
    x = axis(
        [*(i * f for i in intensities for f in (0.8, 1.25)), *(2 * ridge for ridge in ridges)], 0.5, 2, (1,), _power
    )
    tops = [peak] if positive(peak) else [rate * x.high for rate in slopes.values()]
    values = [v for v in (*rates, *tops, *(rate * x.low for rate in slopes.values())) if positive(v)]
    first = values[0] if values else 1.0
    y = axis((v * f for v in values for f in (1 / 1.5, 1.5)), first, first * 2, (1,), _round_rate)

    def down(rate: float) -> float:
        return round(_ROOFLINE_HEIGHT * (1 - y.at(rate) / 100), 1)

    roofs = []
    for name, rate in slopes.items():
        end = min(x.high, peak / rate) if positive(peak) else x.high
        label = f"{name}, {text.rate(rate, 'B/s')}"
        roofs.append(Roof(name.replace(" ", "-"), label, 0, down(rate * x.low), x.at(end), down(rate * end)))
    if positive(peak):
        label = f"products of {peak_of}, {text.rate(peak, 'FLOP/s')}"
        roofs.append(Roof("products", label, x.at(min(ridges, default=x.low)), down(peak), 100, down(peak)))
    return Roofline(
        anchor=f"roofline-{dtype}",
        dtype=dtype,
        height=_ROOFLINE_HEIGHT,
        x_ticks=x.ticks,
        y_ticks=tuple(replace(tick, at=round(_ROOFLINE_HEIGHT * (1 - tick.at / 100), 1)) for tick in y.ticks),
        roofs=tuple(roofs),
        points=tuple(_point(result, x, down) for result in timed),
        note="" if peak_of == dtype else f"Products of {dtype} were not measured; their roof is that of {peak_of}.",
        description=_in_words(timed, intensities),
    )


def _point(result: Result, x: Axis, down: Callable[[float], float]) -> Point:
    def told(candidate: Candidate, seconds: float) -> str:
        return f"{candidate.name}: {result.name}, {text.rate(result.flops / seconds, 'FLOP/s')}"

    peer, seconds = result.best_peer, result.ours.seconds or math.nan
    theirs = peer.seconds if peer is not None and positive(peer.seconds) else None
    return Point(
        x=x.at(result.flops / result.nbytes),
        y=down(result.flops / seconds),
        peer_y=None if theirs is None else down(result.flops / theirs),
        title=told(result.ours, seconds),
        peer_title="" if peer is None or theirs is None else told(peer, theirs),
    )


def _in_words(results: Sequence[Result], intensities: Sequence[float]) -> str:
    rates = [result.flops / (result.ours.seconds or math.nan) for result in results]
    told = (
        f"{len(results)} cases of {text.times(min(intensities))} to {text.times(max(intensities))} operations per "
        f"byte; ours makes {text.rate(min(rates), 'FLOP/s')} to {text.rate(max(rates), 'FLOP/s')}."
    )
    shares = [(share, result) for result in results if positive(share := result.share_of_floor)]
    if shares:
        share, nearest = max(shares, key=lambda pair: pair[0])
        told += f" Nearest to its limit, at {text.share(share)} of it: {nearest.name}."
    return told
