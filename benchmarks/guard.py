"""``make bench-guard``: has an op become slower? Held against the committed results of this kind of machine.

It runs the ops against the peers that need no compiler, and compares how many times as long these take with what they
took then. Exit code 1 if an op lost more than 15%, with a table of what did; 2 if there is nothing to compare with.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gencore.bench import compare, machine, suite
from gencore.bench.results import read
from gencore.cli import main

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def guard(arguments: list[str]) -> int:
    """``arguments`` are those of ``gencore bench``; where they name ops, these are the only ones that are run."""
    here = machine.describe(DEVICE)
    known = {
        path: report for path in sorted(RESULTS.glob("*.json")) if compare.same_machine(here, report := read(path))
    }
    if not known:
        kind = f"{here['name']}, {here['simd_level']}"
        print(f"no results of a machine like this ({kind}) are in {RESULTS}: nothing to hold against", file=sys.stderr)
        return 2
    named = any(argument in suite.OPS + suite.NETWORKS + suite.END_TO_END for argument in arguments)
    older = [option for path in known for option in ("--compare", str(path))]
    threads = str(next(iter(known.values())).machine["threads"])
    options = ["--device", DEVICE, "--threads", threads, "--no-compile", *older]
    return main(["bench", *([] if named else suite.OPS), *options, *arguments])


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
