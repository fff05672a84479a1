"""Results as tables in a terminal, with colour where there is one, and words and signs that do without."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gencore.bench import text
from gencore.bench.compare import FLOOR, MARGIN, Compared
from gencore.bench.results import OURS, Candidate, Report, Result

# Where no terminal says how wide it is.
_WIDTH = 200


def console(*, stderr: bool = False) -> Console:
    """A console that does not break lines of what is written to a file or a pipe, and knows a sign for every letter."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    found = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDTH)


_STYLES = {"faster": "green", "slower": "bold red", "even": ""}


def table(results: Sequence[Result]) -> Table:
    """One benchmark's results: ours, how many times as long each peer takes, the floor."""
    first = results[0]
    names = list(dict.fromkeys(peer.name for result in results for peer in result.peers))
    made = Table(title=f"{first.op}, {first.benchmark}", title_justify="left", title_style="bold", header_style="")
    made.add_column("case", no_wrap=True)
    for heading in (OURS, *names, "of the floor", "memory", "a call"):
        made.add_column(heading, justify="right")
    for result in results:
        found = {peer.name: peer for peer in result.peers}
        cells = [_peer_cell(result, found[name]) if name in found else Text("") for name in names]
        floor = f"{text.share(result.share_of_floor)}, {result.limit}" if result.floor_seconds else "–"
        made.add_row(
            f"{result.case}\n{result.dtype}",
            _our_cell(result),
            *cells,
            floor,
            _memory(result),
            text.seconds(result.ours.call_seconds),
        )
    return made


def _our_cell(result: Result) -> Text:
    ours = result.ours
    if ours.failure is not None:
        return Text(f"failed\n{ours.failure}", style="bold red")
    cell = Text(text.seconds(ours.seconds))
    if ours.interval is not None:
        cell.append(f"\n{text.seconds(ours.interval[0])} to {text.seconds(ours.interval[1])}", style="dim")
    if not result.agrees(ours):
        cell.append(f"\nwrong: error {text.error(ours.error)}", style="bold red")
    return cell


def _peer_cell(result: Result, peer: Candidate) -> Text:
    if peer.failure is not None:
        return Text("failed", style="dim")
    said = peer.verdict
    # The word too, for whoever sees no colours.
    cell = Text(f"{text.times(peer.ratio)}x{'' if said == 'faster' else f' {said}'}", style=_STYLES[said])
    if peer.ratio_interval is not None:
        cell.append(f"\n{text.interval(peer.ratio_interval)}", style="dim")
    if peer.compile_seconds is not None:
        cell.append(f"\ncompiled in {text.seconds(peer.compile_seconds)}", style="dim")
    if not result.agrees(peer):
        cell.append(f"\ndiffers: {text.error(peer.error)}", style="yellow")
    return cell


def _memory(result: Result) -> str:
    least = least_memory(result)
    return text.size(result.ours.peak_bytes) + ("" if least is None else f"\npeers {text.size(least)}")


def least_memory(result: Result) -> int | None:
    """Of the peers that compute the same."""
    peers = [peer for peer in result.peers if not peer.name.startswith(OURS) and result.agrees(peer)]
    return min((peer.peak_bytes for peer in peers if peer.peak_bytes is not None), default=None)


def shown(results: Sequence[Result], console: Console) -> list[Table | str]:
    """A benchmark's results as a table; where the console is too narrow for it, a line for each candidate."""
    whole = table(results)
    if console.measure(whole).minimum <= console.width and _widest(whole, console) <= console.width:
        return [whole]
    lines = [f"{results[0].op}, {results[0].benchmark}"]
    for result in results:
        lines.append(f"  {result.case}, {result.dtype}")
        for candidate in result.candidates:
            cell = _our_cell(result) if candidate is result.ours else _peer_cell(result, candidate)
            lines.append(f"    {candidate.name}: {', '.join(cell.plain.splitlines())}")
        if result.floor_seconds:
            lines.append(f"    {text.share(result.share_of_floor)} of the floor, {result.limit}")
    return list(lines)


def _widest(whole: Table, console: Console) -> int:
    """What the table takes without breaking a line."""
    return console.measure(whole, options=console.options.update(width=10_000)).maximum


def notes(results: Sequence[Result]) -> list[str]:
    """What does not fit into a table: why candidates failed, and by how much others differ."""
    found = []
    for result in results:
        for candidate in result.candidates:
            if candidate.failure is not None:
                found.append(f"{result.name}: {candidate.name} failed: {candidate.failure}")
            elif not result.agrees(candidate):
                found.append(
                    f"{result.name}: {candidate.name} gives another result, error {text.error(candidate.error)}, "
                    f"where {text.error(result.tolerance)} would be rounding"
                )
    return found


def summary(report: Report) -> list[str]:
    """Wins and losses against the best peer of each result, and every loss by name."""
    best = [(result, peer) for result in report.results if (peer := result.best_peer) is not None]
    said = [peer.verdict for _, peer in best]
    lines = [
        f"Against the fastest peer of each of {len(best)} cases: ours is faster in {said.count('faster')}, "
        f"as fast in {said.count('even')}, slower in {said.count('slower')}."
    ]
    lines += [
        f"  slower: {result.name}: {peer.name} takes {text.times(peer.ratio)} of our time"
        for (result, peer), one in zip(best, said, strict=True)
        if one == "slower"
    ]
    return lines


def limits(report: Report) -> str:
    known = report.limits
    products = ", ".join(f"{dtype} {text.rate(value, 'FLOP/s')}" for dtype, value in known.products.items())
    return (
        f"a copy moves {text.rate(known.copy_in_cache, 'B/s')} in cache, {text.rate(known.copy_beyond_cache, 'B/s')} "
        f"beyond; products {products}; noise {text.rate(known.normals, ' normals/s')}"
    )


def changes(compared: Compared, margin: float = MARGIN) -> Table:
    """What lost and what gained."""
    made = Table(title="against before", title_justify="left", title_style="bold", header_style="")
    for heading in ("", "case", "peer", "ratio before", "ratio now", "change"):
        made.add_column(heading, justify="right" if heading.startswith(("ratio", "change")) else "left")
    for word, style, found in (
        ("lost", "bold red", compared.lost(margin)),
        ("gained", "green", compared.gained(margin)),
    ):
        for name, against in found.items():
            for change in against:
                by = f"{change.factor - 1:+.0%}"
                shown = text.share if change.peer == FLOOR else text.times
                cells = shown(change.before), shown(change.now), by
                made.add_row(Text(word, style=style), name, change.peer, *cells)
    for name in compared.failed:
        made.add_row(Text("fails", style="bold red"), name, "", "", "", "")
    return made
