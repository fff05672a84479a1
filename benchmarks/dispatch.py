"""``make dispatch``: writes the tables of who runs an op on a GPU from the committed results.

Each of ``benchmarks/results/*.json`` that was measured on a GPU makes an entry in ``gencore/backends/tables/<op>.json``
for its compute capability and each type and direction that it has, in the place of what was there: an expectation, or
older figures. ``gencore/backends/dispatch.py`` says how a call finds its row.

A runner's time is the longer of what a call takes on the GPU and on the host, as calls follow each other; that of the
gradient is what forward and backward take together without forward. Who is not ahead by 5% does not come before our
CUDA kernels: so little does not survive another run.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gencore._ops import OPS
from gencore.backends import dispatch
from gencore.backends.dispatch import Direction, Entry, Measured, Row
from gencore.bench import suite
from gencore.bench.case import AttentionCase, Case
from gencore.bench.results import Report, Result, positive, read
from gencore.files import write_atomically

RESULTS = Path(__file__).parent / "results"
# The candidates of a benchmark that can run an op.
RUNNERS = {"ours, CUDA": "cuda", "ours, Triton": "triton", "ours, cuDNN": "cudnn", "ours, flash": "flash"}
# Each op's benchmark of its forward pass, and that of its gradient, alone or with the forward pass.
BENCHMARKS = {op.stem: op.timed for op in OPS}
_AHEAD = 0.95


def entries(report: Report) -> dict[str, list[Entry]]:
    """What a report on a GPU says of each op: of each type and direction the problems that it measured."""
    told = report.machine
    measured = Measured(
        gpu=told["name"],
        date=report.date[:10],
        commit=report.commit,
        torch=report.versions["torch"],
        triton=report.versions.get("triton", "none"),
    )
    found: dict[str, list[Entry]] = {}
    for op, names in BENCHMARKS.items():
        cases = {str(case): case for benchmark in suite.benchmarks([op]) for case in benchmark.cases}
        seconds = {
            (result.benchmark, result.case, result.dtype): seconds_of(result)
            for result in report.results
            if result.op == op and result.case in cases
        }
        rows: dict[tuple[str, Direction], list[Row]] = defaultdict(list)
        for (benchmark, case, dtype), taken in seconds.items():
            if dtype not in ("float32", "bfloat16"):
                continue
            features = features_of(op, cases[case])
            if benchmark == names[0]:
                rows[dtype, "forward"].append(row(features, taken))
            elif benchmark == names[1]:
                forward = {} if benchmark == "backward" else seconds.get((names[0], case, dtype), {})
                rows[dtype, "backward"].append(row(features, gradient_seconds(taken, forward, benchmark)))
        whole = {key: [one for one in merged(some) if one.order] for key, some in rows.items()}
        found[op] = [
            Entry(tuple(told["capability"]), dtype, direction, measured, "", tuple(some))
            for (dtype, direction), some in whole.items()
            if any(len(one.order) > 1 for one in some)
        ]
    return {op: some for op, some in found.items() if some}


def seconds_of(result: Result) -> dict[str, float]:
    """What a call takes by each runner that computes the same."""
    found = {}
    for candidate in result.candidates:
        name = RUNNERS.get(candidate.name)
        if name is not None and positive(candidate.seconds) and result.agrees(candidate):
            found[name] = max(candidate.seconds, candidate.call_seconds or 0.0)
    return found


def gradient_seconds(taken: Mapping[str, float], forward: Mapping[str, float], benchmark: str) -> dict[str, float]:
    """What the gradient takes by each of ours, where a benchmark has it alone, or with a forward pass that is known."""
    found = {}
    for name in ("cuda", "triton"):
        if name in taken and (benchmark == "backward" or name in forward):
            found[name] = taken[name] - (0.0 if benchmark == "backward" else forward[name])
    # Less than no time is noise: then nothing is known of who is faster.
    return found if all(seconds > 0 for seconds in found.values()) else {}


def features_of(op: str, case: Any) -> dict[str, str | int]:
    """What :func:`gencore.backends.dispatch.features_of` tells of a call with a case's tensors."""
    if isinstance(case, AttentionCase):
        return dispatch.attention_features(case.size, case.queries, case.keys)
    assert isinstance(case, Case)
    layout = "contiguous" if case.layout == "contiguous" else "channels_last"
    if op == "group_norm":
        return dispatch.group_norm_features(case.shape, layout)
    return dispatch.sample_features(case.shape, layout)


def row(features: dict[str, str | int], seconds: Mapping[str, float]) -> Row:
    """The row of a problem, whose runners are in the order of their times, ours by CUDA a little ahead."""
    order = sorted(seconds, key=lambda name: seconds[name] * (_AHEAD if name == "cuda" else 1.0))
    return Row(features, tuple(order), {name: float(f"{seconds[name]:.4g}") for name in seconds})


def merged(rows: Iterable[Row]) -> tuple[Row, ...]:
    """One row for problems that a call cannot tell apart, by the geometric mean of their times."""
    alike: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for one in rows:
        alike[tuple(sorted(one.features.items()))].append(one)
    found = []
    for some in alike.values():
        names = [name for name in some[0].seconds if all(name in other.seconds for other in some)]
        means = {name: statistics.geometric_mean([max(other.seconds[name], 1e-9) for other in some]) for name in names}
        found.append(row(dict(some[0].features), means))
    return tuple(found)


def joined(reports: Iterable[Report]) -> list[Report]:
    """Those of GPUs, oldest first; reports of one commit on one kind of GPU are one, with what each measured last."""
    alike: dict[tuple[str, str], Report] = {}
    for report in sorted(reports, key=lambda report: report.date):
        if report.machine["device"] == "cuda":
            key = report.machine["name"], report.commit
            earlier = alike.pop(key).results if key in alike else ()
            results = {result.name: result for result in (*earlier, *report.results)}
            alike[key] = dataclasses.replace(report, results=tuple(results.values()))
    return list(alike.values())


def combined(before: Iterable[Entry], after: Iterable[Entry]) -> list[Entry]:
    """The entries, of which later ones stand in the place of those for the same GPUs, type and direction."""
    found = {(entry.capability, entry.dtype, entry.direction): entry for entry in (*before, *after)}
    return [found[key] for key in sorted(found)]


def text(found: Iterable[Entry]) -> str:
    """The file of a table: a line for each row."""
    told = []
    for entry in found:
        head = {
            "capability": entry.capability,
            "dtype": entry.dtype,
            "direction": entry.direction,
            "measured": None if entry.measured is None else entry.measured._asdict(),
            "why": entry.why,
        }
        rows = [
            {"features": one.features, "order": one.order} | ({"seconds": one.seconds} if one.seconds else {})
            for one in entry.rows
        ]
        lines = ",\n".join(f"    {json.dumps(one)}" for one in rows)
        told.append(f'  {json.dumps(head)[:-1]}, "rows": [\n{lines}\n  ]}}')
    return '{"entries": [\n' + ",\n".join(told) + "\n]}\n"


def main(names: list[str]) -> int:
    """``names``: of files of results; those that are committed, if there are none."""
    found: dict[str, list[Entry]] = defaultdict(list)
    for report in joined(read(path) for path in names or sorted(RESULTS.glob("*.json"))):
        for op, some in entries(report).items():
            found[op] += some
    for op, some in found.items():
        path = dispatch.FOLDER / f"{op}.json"
        whole = combined(dispatch.read(op, dispatch.FOLDER), some)
        write_atomically(path, text(whole))
        print(f"{path}: {sum(entry.measured is not None for entry in whole)} of {len(whole)} entries are measured")
    if not found:
        print("there are no results of a GPU")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
