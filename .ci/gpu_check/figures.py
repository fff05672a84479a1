"""Times ops on the GPU, the most telling first: figures.py headline|bench REPORT.json.

Triton's kernels are compiled before by several processes, which leave them in its cache. Each result is a line of the
verdicts as soon as it is there, and the report is written anew.

Without a GPU (``--dry``) the kernels of a compute capability of 9.0 are compiled and not run, which takes as long as it
does there, and every case runs once, small, in the emulator.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "backends" / "triton")]

import modules  # noqa: E402
import torch  # noqa: E402
import verdicts  # noqa: E402

from gencore.bench import run, suite, text  # noqa: E402
from gencore.bench.results import OURS, Result, positive, read  # noqa: E402
from gencore.bench.suite import Task  # noqa: E402

SETTINGS = run.Settings(rounds=11, budget=0.4, compile=False)
# In the order in which they are worth the minutes of a GPU.
# What tells most comes first, should time run out.
ORDER = ("attention", *(op for op in reversed(suite.OPS) if op != "attention"))
_CAPABILITY = 90

FORWARD, BOTH = "forward", "forward and backward"
_BF16, _F32 = "bfloat16", "float32"
_LATENTS, _LARGE = "64x4x64x64", "64x16x256x256"


def _each(op: str, benchmarks: Sequence[str], cases: Sequence[str], dtypes: Sequence[str] = (_BF16,)) -> list[str]:
    return [f"{op} · {name} · {case} · {dtype}" for case in cases for name in benchmarks for dtype in dtypes]


# By the names of tasks.
HEADLINE = (
    *_each(
        "attention",
        (FORWARD, BOTH),
        (
            "1x8x4096x64-tokens",
            "1x8x4096x128-tokens",
            "1x8x4096x40-tokens",
            "4x8x1024x80-tokens",
            "4x8x1024x160-tokens",
            "1x1x4096x512-tokens",
            "4x8x1024x64-tokens",
        ),
    ),
    *_each("attention", (FORWARD,), ("2x8x4096by77x40-tokens",)),
    *_each("attention", ("images, forward",), ("2x8x4096x40-contiguous", "2x8x4096x40-channels_last")),
    *_each("attention", ("images, forward",), ("1x1x16384x512-contiguous",)),
    *_each("attention", ("options, forward and backward",), ("4x8x1024x64-heads-causal", "4x8x1024x64-heads-mask")),
    *_each("attention", ("forward mode", "first and second derivative"), ("4x8x1024x80-heads",)),
    *_each(
        "group_norm",
        (FORWARD, BOTH),
        ("4x320x64x64-32groups", "4x320x64x64-channels_last-32groups", "1x128x1024x1024-32groups"),
    ),
    *_each("group_norm", (FORWARD,), ("4x1280x16x16-channels_last-32groups", "1x128x1024x1024-channels_last-32groups")),
    *_each("normal", ("forward into a given tensor",), (_LARGE,), (_F32, _BF16)),
    *_each("normal", ("forward into a given tensor",), (_LATENTS,), (_F32,)),
    *_each("reparameterize", (FORWARD, BOTH), (_LARGE,), (_F32, _BF16)),
    *_each("add_noise", (FORWARD,), (_LARGE,), (_BF16,)),
    *_each("diffusion_step", ("DDPM step",), (_LARGE,), (_F32, _BF16)),
    *_each("denoising_loss", (BOTH,), (_LARGE,), (_F32, _BF16)),
)


def tasks_of(step: str) -> list[Task]:
    """What a step times, in order; bench has what headline has not."""
    every = {task.name: task for task in suite.tasks(ORDER, device="cuda")}
    if step == "headline":
        return [every[name] for name in HEADLINE]
    others = [task for name, task in every.items() if name not in HEADLINE]
    return sorted(others, key=lambda task: ORDER.index(task.benchmark.op))


# -------------------------------------------------------------------------------------------- compiling before


@contextlib.contextmanager
def _compiling_only() -> Iterator[None]:
    """Triton takes tensors on the CPU for those of a GPU, and compiles what it would launch."""
    from ptx import compiling

    from gencore.backends import choice

    with mock.patch.object(choice, "refusal", return_value=None), compiling(_CAPABILITY):
        yield


def compile_for(task: Task, dry: bool) -> str | None:
    """Runs ours on Triton once; says why it could not."""
    from gencore import ops
    from gencore.bench.suite import attention

    try:
        for chosen in (task.case, task.case.shrunk()):
            # Peers are nobody's business here, and PyTorch's kernels for attention are tried when they are made.
            peers = mock.patch.object(attention, "_PINNED", {})
            with _compiling_only() if dry else contextlib.nullcontext(), peers:
                comparison = task.benchmark.make(chosen, task.dtype, "cpu" if dry else "cuda")
                with ops.backend("triton"):
                    comparison.calls[OURS]()
                if not dry:
                    torch.cuda.synchronize()
    except Exception as error:
        return f"{task.name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def compile_some(tasks: Sequence[Task], dry: bool) -> None:
    """What one of the processes compiles; those that cannot be are said, and timed all the same."""
    for task in tasks:
        begin = time.perf_counter()
        fault = compile_for(task, dry)
        if fault is not None:
            print(f"not compiled: {fault}", flush=True)
            verdicts.add(f"compiling {task.name}", "failed", time.perf_counter() - begin, fault)
            if verdicts.is_lost():
                return


def compile_ahead(step: str, tasks: Sequence[Task], dry: bool) -> None:
    """Leaves what the tasks have Triton compile in its cache, by as many processes as the machine is good for.

    What one of them does not come to, for a fault, is compiled when it is timed.
    """
    begin = time.perf_counter()
    workers = max(1, min(12, (os.cpu_count() or 1) - (0 if dry else 2)))
    command = [sys.executable, __file__, step, "-", *(["--dry"] if dry else [])]
    processes = [subprocess.Popen([*command, "--share", f"{number}/{workers}"]) for number in range(workers)]
    failed = sum(process.wait() != 0 for process in processes)
    seconds = time.perf_counter() - begin
    early = f"{failed} of {workers} processes ended early" if failed else ""
    print(f"{len(tasks)} tasks compiled by {workers} processes in {seconds:.1f} s {early}", flush=True)
    verdicts.add("compiling for Triton", "failed" if failed else "passed", seconds, early)


# -------------------------------------------------------------------------------------------- timing


def line(result: Result) -> str:
    """A result in a line: of every candidate the time, of ours the share of the floor."""
    told = [
        f"{candidate.name} {text.seconds(candidate.seconds)}"
        if candidate.failure is None
        else f"{candidate.name} fails"
        for candidate in result.candidates
    ]
    return f"{result.name}: {', '.join(told)}; {text.share(result.share_of_floor)} of the floor ({result.limit})"


def record(result: Result) -> None:
    """Prints a result, and writes its verdict: whether ours and every way to run it computes what it should."""
    ours = [candidate for candidate in result.candidates if candidate.name.startswith(OURS)]
    faults = [
        f"{candidate.name}: {candidate.failure or f'error {candidate.error:.2g}'}"
        for candidate in ours
        if candidate.failure is not None or not result.agrees(candidate)
    ]
    print(line(result), flush=True)
    verdicts.add(
        result.name,
        "failed" if faults else "passed",
        result.ours.seconds or 0.0,
        "; ".join(faults),
        figures={candidate.name: candidate.seconds for candidate in result.candidates if positive(candidate.seconds)},
        floor=result.floor_seconds,
        clock=result.clock,
    )


def timed(step: str, path: Path, tasks: Sequence[Task], first: int) -> None:
    """Runs the tasks on the GPU, from the ``first`` on; after each result the report is written anew, with all that is
    there. What follows a fault is run by another process."""
    results = list(read(path).results) if first else []
    # The machine and its limits, without a result.
    about = run.run([], "cuda", SETTINGS)
    commit = modules.commit() if about.commit == "unknown" else about.commit
    done = first

    def keep(result: Result) -> None:
        nonlocal done
        done += 1
        record(result)
        results.append(result)
        settings = {**about.settings, "complete": done == len(tasks)}
        dataclasses.replace(about, results=tuple(results), settings=settings, commit=commit).write(path)
        if any(candidate.failure for candidate in result.candidates) and verdicts.is_lost():
            raise KeyboardInterrupt

    try:
        run.run(tasks[first:], "cuda", SETTINGS, on_result=keep)
    except run.Interrupted:
        if verdicts.is_lost():
            verdicts.go_on_from(done, [step, str(path)])
        raise


def tried(tasks: Sequence[Task]) -> None:
    """Every task once, small, in the emulator."""
    from kernels import emulated

    from gencore import ops

    for task in tasks:
        with emulated(), ops.backend("cuda"):
            comparison = task.benchmark.make(task.case.shrunk(), task.dtype, "cpu")
            error = comparison.error
            found = 0.0 if error is None else error(comparison.calls[OURS]())
        fine = comparison.tolerance is None or found <= comparison.tolerance
        verdicts.add(task.name, "passed" if fine else "failed", detail="" if fine else f"error {found:.2g}")
        print(f"{task.name}: {'ok' if fine else f'error {found:.2g}'}", flush=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("headline", "bench"))
    parser.add_argument("report", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--from", dest="first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    tasks = tasks_of(given.step)
    if given.share is not None:
        number, workers = map(int, given.share.split("/"))
        return compile_some(tasks[number::workers], given.dry)
    if not given.first:
        compile_ahead(given.step, tasks, given.dry)
    if given.dry:
        return tried(tasks)
    return timed(given.step, given.report, tasks, given.first)


if __name__ == "__main__":
    main(sys.argv[1:])
