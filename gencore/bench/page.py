"""The HTML page of a report: one file that needs no network and no script, for any screen and for screen readers.

Here and in charts.py is computed what it shows, down to the words; ``page.html.jinja`` says only where that stands.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from gencore.bench import text
from gencore.bench.charts import (
    Axis,
    Bar,
    bar,
    copies,
    geometric_mean,
    interval,
    ratio_axis,
    remark,
    roofline,
)
from gencore.bench.results import Candidate, Limits, Report, Result, Verdict, positive
from gencore.files import write_atomically

_SECTIONS = {"ops": "Ops", "networks": "Networks", "end to end": "End to end"}
_NONE = text.times(None)

T = TypeVar("T")


def html(report: Report) -> str:
    """The page, complete without JavaScript."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gencore.bench", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(_page(report))
    # A large report has as many blanks as words otherwise.
    return "\n".join(line for line in map(str.strip, page.splitlines()) if line) + "\n"


def write(report: Report, path: Path | str) -> None:
    """Writes the page, whole or not at all."""
    write_atomically(path, html(report))


@dataclass(frozen=True)
class _Row:
    """A candidate in a table."""

    name: str
    seconds: str
    between: str
    ratio: str
    ratio_between: str
    share: str
    peak: str
    call: str
    compile: str
    error: str
    remark: str


@dataclass(frozen=True)
class _Case:
    """A result."""

    anchor: str
    name: str
    case: str
    why: str
    dtype: str
    ours: str
    share: str
    limit: str
    remark: str
    bars: tuple[Bar, ...]
    rows: tuple[_Row, ...]


@dataclass(frozen=True)
class _Chart:
    """A benchmark."""

    anchor: str
    title: str
    axis: Axis
    cases: tuple[_Case, ...]

    @property
    def drawn(self) -> bool:
        """Whether there is any bar."""
        return any(bar.ratio for case in self.cases for bar in case.bars)


@dataclass(frozen=True)
class _Summary:
    """How ours does in many cases; ``marks`` are places on an axis, the mean's and each case's."""

    cases: int
    faster: int
    even: int
    slower: int
    left_out: int
    mean: str
    mean_at: float | None
    share: str
    limited: bool
    marks: tuple[tuple[float, Verdict], ...]


@dataclass(frozen=True)
class _Op:
    anchor: str
    title: str
    summary: _Summary
    charts: tuple[_Chart, ...]


@dataclass(frozen=True)
class _Section:
    anchor: str
    title: str
    ops: tuple[_Op, ...]


@dataclass(frozen=True)
class _Comparison:
    """A result in a list, with its best peer."""

    anchor: str
    name: str
    peer: str
    ratio: str
    between: str
    ours: str
    theirs: str


def _page(report: Report) -> dict[str, Any]:
    anchors = {id(result): f"r{number}" for number, result in enumerate(report.results, 1)}
    pairs = [(result, peer) for result in report.results if (peer := result.best_peer) is not None]
    pairs.sort(key=lambda pair: pair[1].ratio or 1.0)
    lists: dict[Verdict, list[_Comparison]] = {"faster": [], "even": [], "slower": []}
    for result, peer in pairs:
        lists[peer.verdict].append(_comparison(result, peer, anchors[id(result)]))
    overview = ratio_axis(Candidate(peer.name, ratio=peer.ratio) for _, peer in pairs)
    by_dtype = _grouped(report.results, lambda result: result.dtype)
    return {
        "date": _date(report.date),
        "machine_name": str(report.machine.get("name", "unknown machine")),
        "threads": report.machine.get("threads"),
        "commit": report.commit,
        "about": {
            "Machine": _told(report.machine),
            "Versions": _told(report.versions),
            "Settings": _told(report.settings),
        },
        "versions": [f"{name} {version}" for name, version in _told(report.versions)],
        "quick": bool(report.settings.get("quick")),
        "limits": _limits(report.limits),
        "sections": _sections(report.results, overview, anchors),
        "overview": overview,
        "total": _summary(report.results, overview),
        "lists": lists,
        "left_out": [
            (anchors[id(result)], result.name, candidate.name, why)
            for result in report.results
            for candidate in result.candidates
            if (why := remark(result, candidate))
        ],
        "rooflines": [
            found
            for dtype, results in by_dtype.items()
            if (found := roofline(report.limits, dtype, results)) is not None
        ],
    }


def _grouped(items: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _sections(results: Sequence[Result], overview: Axis, anchors: dict[int, str]) -> list[_Section]:
    by_section = _grouped(results, lambda result: result.section)
    found = []
    for section, title in _SECTIONS.items():
        ops: list[_Op] = []
        for op, of_op in _grouped(by_section.get(section, []), lambda result: result.op).items():
            # Numbers, as names may hold anything.
            anchor = f"{section.replace(' ', '-')}-{len(ops) + 1}"
            benchmarks = _grouped(of_op, lambda result: result.benchmark)
            charts = [
                _chart(f"{anchor}-{number}", benchmark, of_benchmark, anchors)
                for number, (benchmark, of_benchmark) in enumerate(benchmarks.items(), 1)
            ]
            ops.append(_Op(anchor, op, _summary(of_op, overview), tuple(charts)))
        if ops:
            found.append(_Section(section.replace(" ", "-"), title, tuple(ops)))
    return found


def _chart(anchor: str, title: str, results: Sequence[Result], anchors: dict[int, str]) -> _Chart:
    axis = ratio_axis(peer for result in results for peer in result.peers)
    cases = (_case(result, axis, anchors[id(result)]) for result in results)
    return _Chart(anchor, title, axis, tuple(cases))


def _case(result: Result, axis: Axis, anchor: str) -> _Case:
    share = text.share(result.share_of_floor)
    return _Case(
        anchor=anchor,
        name=result.name,
        case=result.case,
        why=result.why,
        dtype=result.dtype,
        ours=text.seconds(result.ours.seconds),
        share="" if share == _NONE else share,
        limit=result.limit,
        remark=remark(result, result.ours),
        bars=tuple(bar(result, peer, axis) for peer in result.peers),
        rows=tuple(_row(result, candidate) for candidate in result.candidates),
    )


def _row(result: Result, candidate: Candidate) -> _Row:
    ours = candidate is result.ours
    floor, seconds = result.floor_seconds, candidate.seconds
    known = candidate.interval is not None and all(map(positive, candidate.interval))
    return _Row(
        name=candidate.name,
        seconds=text.seconds(seconds),
        between=" to ".join(map(text.seconds, candidate.interval)) if known and candidate.interval else "",
        ratio=_NONE if ours else _times(candidate.ratio),
        ratio_between="" if ours else interval(candidate.ratio_interval),
        share=text.share(floor / seconds) if floor is not None and positive(seconds) else _NONE,
        peak=text.size(candidate.peak_bytes),
        call=text.seconds(candidate.call_seconds),
        compile=text.seconds(candidate.compile_seconds),
        error=text.error(candidate.error),
        remark=remark(result, candidate),
    )


def _summary(results: Sequence[Result], axis: Axis) -> _Summary:
    peers = [peer for result in results if (peer := result.best_peer) is not None]
    verdicts = [peer.verdict for peer in peers]
    ratios = [peer.ratio for peer in peers if positive(peer.ratio)]
    mean = geometric_mean(ratios)
    shares = [share for result in results if positive(share := result.share_of_floor)]
    return _Summary(
        cases=len(results),
        faster=verdicts.count("faster"),
        even=verdicts.count("even"),
        slower=verdicts.count("slower"),
        left_out=len(results) - len(peers),
        mean=_times(mean),
        mean_at=None if mean is None else axis.at(mean),
        share=text.share(statistics.median(shares)) if shares else _NONE,
        limited=bool(shares),
        marks=tuple((axis.at(ratio), word) for ratio, word in zip(ratios, verdicts, strict=True)),
    )


def _comparison(result: Result, peer: Candidate, anchor: str) -> _Comparison:
    return _Comparison(
        anchor=anchor,
        name=result.name,
        peer=peer.name,
        ratio=_times(peer.ratio),
        between=interval(peer.ratio_interval),
        ours=text.seconds(result.ours.seconds),
        theirs=text.seconds(peer.seconds),
    )


def _limits(limits: Limits) -> list[tuple[str, str]]:
    normals = f"{limits.normals / 1e6:,.0f} million values/s" if positive(limits.normals) else _NONE
    return [
        *((name.capitalize(), text.rate(rate, "B/s")) for name, rate in copies(limits)),
        *((f"Products, {dtype}", text.rate(rate, "FLOP/s")) for dtype, rate in limits.products.items()),
        ("Normal noise", normals),
    ]


def _told(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Facts by name; what is not known or empty is left out."""
    found = []
    for key, value in facts.items():
        name = str(key).removesuffix("_bytes").replace("_", " ")
        if isinstance(value, int) and str(key).endswith("_bytes"):
            value = text.size(value)
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        if value is not None and value != "":
            found.append((name, str(value)))
    return found


def _times(ratio: float | None) -> str:
    known = text.times(ratio)
    return known if known == _NONE else f"{known}\N{MULTIPLICATION SIGN}"


def _date(written: str) -> str:
    try:
        # Python 3.10 does not know Z.
        date = datetime.fromisoformat(written.replace("Z", "+00:00"))
    except ValueError:
        return written
    return f"{date.day} {date:%B %Y, %H:%M}" + (" UTC" if date.utcoffset() is not None else "")
