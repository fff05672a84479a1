"""``make performance``: writes docs/performance.md, its picture and README's table from the committed results.

Every figure comes from ``benchmarks/results/*.json``; the words around them are in ``performance.md.jinja``. A test
holds that the committed pages are what this writes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import jinja2

from gencore.bench import picture, text
from gencore.bench.results import OURS, Candidate, Report, Result, read
from gencore.bench.terminal import least_memory, limits
from gencore.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, PICTURE, README = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.png", ROOT / "README.md"
BEGIN, END = "<!-- figures: make performance writes them -->", "<!-- end of figures -->"

# The rows of README's table: what it says, and where its figures are.
ROWS = (
    ("`reparameterize` (64,4,64,64)", "reparameterize · forward · 64x4x64x64 · float32"),
    ("forward and backward", "reparameterize · forward and backward · 64x4x64x64 · float32"),
    ("forward and backward of (128,20)", "reparameterize · forward and backward · 128x20 · float32"),
    ("`reparameterize_kl`, forward and backward", "reparameterize · KL, forward and backward · 64x4x64x64 · float32"),
    ("`add_noise` (64,3,64,64)", "add_noise · forward · 64x3x64x64 · float32"),
    ("`diffusion_step`, DDPM (64,3,64,64)", "diffusion_step · DDPM step · 64x3x64x64 · float32"),
    (
        "`denoising_loss` and its gradient, given the noise",
        "denoising_loss · forward and backward · 64x3x64x64 · float32",
    ),
    (
        "noising, loss and its gradient",
        "denoising_loss · with the noising, forward and backward · 64x3x64x64 · float32",
    ),
    ("`group_norm` with SiLU (4,320,64,64)", "group_norm · forward · 4x320x64x64-32groups · float32"),
    ("forward and backward", "group_norm · forward and backward · 4x320x64x64-32groups · float32"),
    ("`attention` (4,8,1024,40)", "attention · forward · 4x8x1024x40-heads · float32"),
    ("in bfloat16", "attention · forward · 4x8x1024x40-heads · bfloat16"),
    ("a U-Net (DDPM's for CIFAR-10), against diffusers", "unet · forward · ddpm-cifar10-8x32x32 · float32"),
)
# Its columns: the names that this kind of peer has.
COLUMNS = (
    ("eager", ("eager", "diffusers")),
    ("`torch.compile`", ("compile", "diffusers, compile")),
    ("compile, fallback RNG", ("compile, fallback RNG",)),
)


def reports() -> list[Report]:
    """Of each machine the newest of the committed reports with what is compiled, or of all; those of CPUs first.

    Further ones, of other processes, tell ``make bench-guard`` how much ratios move by themselves.
    """
    found = [read(path) for path in sorted(RESULTS.glob("*.json"))]
    found.sort(key=lambda report: (bool(report.settings.get("compile")), report.date))
    last = {(report.machine["name"], report.machine["device"]): report for report in found}.values()
    return sorted(last, key=lambda report: (report.machine["device"] != "cpu", report.machine["name"]))


def ratio(result: Result, peer: Candidate) -> str:
    """How many times as long a peer takes, with a word where it is no gain."""
    if peer.failure is not None:
        return "fails"
    shown = text.times(peer.ratio)
    shown = f"**{shown}**" if peer.verdict == "slower" and not peer.name.startswith(OURS) else shown
    return shown if result.agrees(peer) else f"{shown} (differs: {text.error(peer.error)})"


def table(results: Sequence[Result]) -> str:
    """One benchmark's results in Markdown."""
    names = list(dict.fromkeys(peer.name for result in results for peer in result.peers))
    head = ["case", "dtype", OURS, *names, "against the best", "of the floor", "memory"]
    rows = [head, ["---"] * len(head)]
    for result in results:
        found = {peer.name: peer for peer in result.peers}
        best = result.best_peer
        memory, least = text.size(result.ours.peak_bytes), least_memory(result)
        rows.append(
            [
                f"`{result.case}`",
                result.dtype,
                text.seconds(result.ours.seconds) if result.ours.failure is None else "fails",
                *(ratio(result, found[name]) if name in found else "" for name in names),
                "" if best is None else f"{text.interval(best.ratio_interval)}, {best.name}",
                f"{text.share(result.share_of_floor)}, {result.limit}",
                memory if least is None else f"{memory} · {text.size(least)}",
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
        peers = {
            peer.name: peer.call_seconds
            for peer in first.peers
            if peer.call_seconds is not None and not peer.name.startswith(OURS)
        }
        if first.ours.call_seconds is None or not peers:
            continue
        name = min(peers, key=lambda name: peers[name])
        ours = text.seconds(first.ours.call_seconds)
        rows.append(f"| {op}, {benchmark} | {ours} | {text.seconds(peers[name])}, {name} |")
    return "\n".join(rows)


def compilations(report: Report) -> str:
    """What compiling takes with empty caches: of each benchmark and peer the median of its cases."""
    rows = ["| | seconds |", "|---|---|"]
    for (op, benchmark), results in _benchmarks(report.results):
        found: dict[str, list[float]] = {}
        for candidate in (candidate for result in results for candidate in result.candidates):
            if candidate.compile_seconds is not None:
                found.setdefault(candidate.name, []).append(candidate.compile_seconds)
        if found:
            told = (f"{name} {statistics.median(seconds):.1f}" for name, seconds in found.items())
            rows.append(f"| {op}, {benchmark} | {'; '.join(told)} |")
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
    helpers = (table, summary, losses, limits, overheads, compilations)
    environment.globals.update({function.__name__: function for function in helpers}, text=text)
    return environment.get_template("performance.md.jinja").render(reports=found)


def figures(report: Report) -> str:
    """README's table, with what it is of."""
    machine = report.machine
    of = f"{machine['threads']} threads of {machine['name']}, {machine['simd_level']}, torch {report.versions['torch']}"
    lines = ["| | ours | " + " | ".join(name for name, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for (label, _), result in zip(ROWS, rows(report), strict=True):
        cells = []
        for _, names in COLUMNS:
            peer = next((peer for peer in result.peers if peer.name in names), None)
            cells.append("" if peer is None else ratio(result, peer))
        lines.append(f"| {label} | {text.seconds(result.ours.seconds)} | {' | '.join(cells)} |")
    head = "How many times as long PyTorch takes, in turn in one process; in **bold** where it is quicker. Float32 but"
    best = [peer for result in report.results if (peer := result.best_peer) is not None]
    slower = sum(peer.verdict == "slower" for peer in best)
    tail = (
        f"Of all {len(best)} cases ours is slower than the quickest peer in {slower}; "
        "[docs/performance.md](docs/performance.md) lists them."
    )
    return "\n\n".join((f"{head}\nwhere it says otherwise, {of}:", "\n".join(lines), tail))


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
