"""Tables: nothing is said by colour alone, nothing is cut, and what is narrow gets lines."""

from __future__ import annotations

import io

import pytest
from bench import reports
from rich.console import Console

from gencore.bench import terminal

REPORT = reports.report()


def printed(what, width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for one in what(console):
        console.print(one, markup=False)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [30, 80, 200])
@pytest.mark.parametrize("result", REPORT.results, ids=lambda result: result.op[:12])
def test_every_figure_is_there_at_any_width(result, width):
    told = printed(lambda console: terminal.shown([result], console), width)
    assert "…" not in told
    flat = " ".join(told.split())
    for peer in result.peers:
        if peer.failure is not None:
            assert "failed" in flat
        elif peer.ratio is not None and peer.ratio < 100:
            assert f"{peer.ratio:.2f}x" in flat or f"{peer.ratio:.1f}x" in flat


def test_losses_and_other_results_are_said_in_words():
    told = " ".join(printed(lambda console: [terminal.table(REPORT.results)], 300).split())
    assert "slower" in told
    assert "differs" in told
    assert "even" in told
    lines = terminal.summary(REPORT)
    assert any(line.startswith("  slower: ") for line in lines)
    assert any("gives another result" in note for note in terminal.notes(REPORT.results))
    assert any("failed: " in note for note in terminal.notes(REPORT.results))


def test_the_memory_of_peers_is_that_of_peers_that_compute_the_same():
    result = reports.result(
        "op", "use", "case", reports.ours(), reports.peer("eager", 2.0, peak_bytes=300),
        reports.peer("ours, compiled", 2.0, peak_bytes=1), reports.peer("wrong", 2.0, peak_bytes=2, error=1.0),
    )  # fmt: skip
    assert terminal.least_memory(result) == 300
