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


def guard(arguments: list[str]) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = machine.describe(device)
    known = [path for path in sorted(RESULTS.glob("*.json")) if compare.same_machine(here, read(path))]
    if not known:
        kind = f"{here['name']}, {here['threads']} threads, {here['simd_level']}"
        print(f"no results of a machine like this ({kind}) are in {RESULTS}: nothing to hold against", file=sys.stderr)
        return 2
    ops = [] if any(not argument.startswith("-") for argument in arguments) else suite.OPS
    return main(["bench", *ops, "--device", device, "--no-compile", "--compare", str(known[-1]), *arguments])


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
