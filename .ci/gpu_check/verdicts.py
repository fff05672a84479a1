"""What was found out, a JSON line each, written as soon as it is known: a machine may be gone at any moment.

As a plugin of pytest (``-p verdicts``) it writes a line for each test, to the file and of the step that the environment
variables GPU_CHECK_VERDICTS and GPU_CHECK_STEP name.

After a kernel's fault its process can no longer use the GPU. The program then goes on in a fresh process, and pytest in
another worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

FILE, STEP = "GPU_CHECK_VERDICTS", "GPU_CHECK_STEP"
# A step that ran out of time has told nothing of what it did not come to.
WORDS = ("passed", "failed", "unfinished", "skipped")


def add(name: str, verdict: str, seconds: float = 0.0, detail: str = "", **more: Any) -> None:
    """Writes a line of the current step; nothing where no file is named."""
    if FILE in os.environ:
        append(Path(os.environ[FILE]), os.environ[STEP], name, verdict, seconds, detail, **more)


def append(path: Path, step: str, name: str, verdict: str, seconds: float, detail: str, **more: Any) -> None:
    assert verdict in WORDS, verdict
    line = {"step": step, "name": name, "verdict": verdict, "seconds": round(seconds, 3), "detail": detail, **more}
    # One write of a whole line: others append too.
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; the last may be cut off by who was stopped while writing it."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def counts(lines: Iterable[Mapping[str, Any]]) -> str:
    """How many lines have each verdict."""
    found = Counter(line["verdict"] for line in lines)
    return ", ".join(f"{found[word]} {word}" for word in WORDS if found[word]) or "nothing found out"


def is_lost() -> bool:
    """Whether a kernel's fault has left this process without its GPU."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def go_on_from(number: int, arguments: Sequence[str]) -> NoReturn:
    """Runs this program anew, from its ``number``-th task on."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, sys.argv[0], *arguments, "--from", str(number)])


_has_failed = False


def pytest_runtest_protocol(item: Any) -> None:
    # Another worker takes this one's place, and its tests but the one that now begins.
    if _has_failed and "PYTEST_XDIST_WORKER" in os.environ and is_lost():
        os._exit(1)


def pytest_runtest_logreport(report: Any) -> None:
    global _has_failed
    _has_failed = _has_failed or report.failed
    # Workers tell the process that began them, which tells us.
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        detail, verdict = "", report.outcome
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            detail = str(crash.message if crash else report.longrepr)[:500]
            if "crashed while running" in detail:
                verdict = "unfinished"
        elif report.skipped:
            detail = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)[:200]
        add(report.nodeid, verdict, report.duration, detail)
