"""``make performance``: writes docs/performance.md, its picture and README's table from the committed results.

Every figure comes from ``benchmarks/results/*.json``; the words around them are in ``performance.md.jinja``. A test
holds that the committed pages are what this writes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from gencore.bench import picture, text
from gencore.bench.results import OURS, Candidate, Report, Result, read
from gencore.bench.terminal import limits
from gencore.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, PICTURE, README = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.png", ROOT / "README.md"
BEGIN, END = "<!-- figures: make performance writes them -->", "<!-- end of figures -->"

# The rows of README's table: what it says, and where its figures are.
ROWS = (
    ("`reparameterize` (64,4,64,64)", "reparameterize · forward · 64x4x64x64 · float32"),
    ("forward and backward", "reparameterize · forward and backward · 64x4x64x64 · float32"),
    ("`reparameterize_kl`, forward and backward", "reparameterize · KL, forward and backward · 64x4x64x64 · float32"),
    ("`add_noise` (64,3,64,64)", "add_noise · forward · 64x3x64x64 · float32"),
    ("`diffusion_step`, DDPM (64,3,64,64)", "diffusion_step · DDPM step · 64x3x64x64 · float32"),
    ("`group_norm` with SiLU (4,320,64,64)", "group_norm · forward · 4x320x64x64-32groups · float32"),
    ("forward and backward", "group_norm · forward and backward · 4x320x64x64-32groups · float32"),
    ("`attention` (4,8,1024,40)", "attention · forward · 4x8x1024x40-heads · float32"),
    ("in bfloat16", "attention · forward · 4x8x1024x40-heads · bfloat16"),
)
# Its columns: the names that this kind of peer has.
COLUMNS = (
    ("eager", ("eager", "diffusers")),
    ("`torch.compile`", ("compile", "diffusers, compile")),
    ("compile, fallback RNG", ("compile, fallback RNG",)),
)


def reports() -> list[Report]:
    """The committed reports, those of CPUs first."""
    found = [read(path) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda report: (report.machine["device"] != "cpu", report.machine["name"]))


def ratio(result: Result, peer: Candidate) -> str:
    """How many times as long a peer takes, with a word where it is no gain."""
    if peer.failure is not None:
        return "fails"
    shown = text.times(peer.ratio)
    shown = f"**{shown}**" if peer.verdict == "slower" else shown
    return shown if result.agrees(peer) else f"{shown} (differs: {text.error(peer.error)})"


def table(results: Sequence[Result]) -> str:
    """One benchmark's results in Markdown."""
    names = list(dict.fromkeys(peer.name for result in results for peer in result.peers))
    head = ["case", "dtype", OURS, *names, "against the best", "of the floor", "memory"]
    rows = [head, ["---"] * len(head)]
    for result in results:
        found = {peer.name: peer for peer in result.peers}
        best = result.best_peer
        memory = text.size(result.ours.peak_bytes)
        rows.append(
            [
                f"`{result.case}`",
                result.dtype,
                text.seconds(result.ours.seconds) if result.ours.failure is None else "fails",
                *(ratio(result, found[name]) if name in found else "" for name in names),
                "" if best is None else text.interval(best.ratio_interval),
                f"{text.share(result.share_of_floor)}, {result.limit}",
                memory if best is None else f"{memory} · {text.size(best.peak_bytes)}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def summary(report: Report) -> str:
    """Each op in a row: how often ours is faster than the fastest peer, and by how much in the geometric mean."""
    rows = ["| op | cases | faster | as fast | slower | geometric mean |", "|---|---|---|---|---|---|"]
    for op, results in by(report.results, "op"):
        best = [peer for result in results if (peer := result.best_peer) is not None and peer.ratio]
        if not best:
            continue
        said = [peer.verdict for peer in best]
        mean = statistics.geometric_mean([peer.ratio for peer in best if peer.ratio])
        counts = " | ".join(str(said.count(word)) for word in ("faster", "even", "slower"))
        rows.append(f"| {op} | {len(best)} | {counts} | {text.times(mean)}x |")
    return "\n".join(rows)


def losses(report: Report) -> list[tuple[Result, Candidate]]:
    """Where the fastest peer is faster than ours."""
    found = [(result, peer) for result in report.results if (peer := result.best_peer) is not None]
    return [(result, peer) for result, peer in found if peer.verdict == "slower"]


def by(results: Iterable[Result], attribute: str) -> list[tuple[str, list[Result]]]:
    """The results in groups, in the order of the report."""
    return [(key, list(group)) for key, group in groupby(results, key=lambda result: str(getattr(result, attribute)))]


def overheads(report: Report) -> str:
    """What a call takes where there is nearly nothing to compute: once for each benchmark."""
    rows = ["| | ours | the quickest peer |", "|---|---|---|"]
    for (op, benchmark), results in _benchmarks(report.results):
        first = results[0]
        peers = {peer.name: peer.call_seconds for peer in first.peers if peer.call_seconds is not None}
        if first.ours.call_seconds is None or not peers:
            continue
        name = min(peers, key=lambda name: peers[name])
        ours = text.seconds(first.ours.call_seconds)
        rows.append(f"| {op}, {benchmark} | {ours} | {text.seconds(peers[name])}, {name} |")
    return "\n".join(rows)


def _benchmarks(results: Iterable[Result]) -> list[tuple[tuple[str, str], list[Result]]]:
    return [(key, list(group)) for key, group in groupby(results, key=lambda result: (result.op, result.benchmark))]


def page(found: Sequence[Report]) -> str:
    """docs/performance.md."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["benchmarks"] = _benchmarks
    helpers: dict[str, Any] = {
        "table": table, "summary": summary, "losses": losses, "by": by, "limits": limits, "overheads": overheads,
        "text": text,
    }  # fmt: skip
    return environment.get_template("performance.md.jinja").render(reports=found, **helpers)


def figures(report: Report) -> str:
    """README's table, with what it is of."""
    machine = report.machine
    of = f"{machine['threads']} threads of {machine['name']}, {machine['simd_level']}, torch {report.versions['torch']}"
    lines = ["| | ours | " + " | ".join(name for name, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for (label, _), result in zip(ROWS, rows(report), strict=True):
        cells = []
        for _, names in COLUMNS:
            peer = next((peer for peer in result.peers if peer.name in names), None)
            cells.append("" if peer is None or peer.ratio is None else f"{text.times(peer.ratio)}x")
        lines.append(f"| {label} | {text.seconds(result.ours.seconds)} | {' | '.join(cells)} |")
    head = f"How many times as long PyTorch takes, in turn in one process; float32 but where it says otherwise. {of}:"
    return head + "\n\n" + "\n".join(lines)


def rows(report: Report) -> list[Result]:
    """The results of README's table, which its picture shows too."""
    known = {result.name: result for result in report.results}
    if missing := [name for _, name in ROWS if name not in known]:
        raise KeyError(f"README's table wants {missing[0]!r}, which is not in the results")
    return [known[name] for _, name in ROWS]


def readme(found: Sequence[Report]) -> str:
    """README.md with its table anew."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{figures(found[0])}\n\n{END}{after}"


if __name__ == "__main__":
    every = reports()
    write_atomically(PAGE, page(every))
    write_atomically(README, readme(every))
    picture.save(every[0], PICTURE, rows(every[0]))
