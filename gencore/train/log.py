"""Metrics of a training run: sums on the device between two lines, and the lines of ``metrics.jsonl``."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencore.files import write_atomically
from gencore.processes import Processes


class Meter:
    """Means of a phase's scalars since the last line, kept on the device so that no step waits for it.

    Also remembers the first step whose loss or gradient was not finite. Of several processes, each has its share of the
    sums.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.count = 0
        self._bad_step: Tensor | None = None

    def add(self, step: int, scalars: Mapping[str, Tensor], is_finite: Tensor) -> None:
        """One repetition's scalars; every repetition has the same ones. ``is_finite`` says whether all is well."""
        if self.names and self.names != list(scalars):
            before, now = (", ".join(names) for names in (self.names, scalars))
            raise TypeError(f"its metrics must have the same names at every step, but were {before} and are {now}")
        self.names = list(scalars)
        sums = torch.stack([scalar.float() for scalar in scalars.values()])
        bad = torch.where(is_finite, -1, step)
        self._bad_step = bad if self._bad_step is None else torch.where(self._bad_step < 0, bad, self._bad_step)
        self.sums = sums if self.sums is None else self.sums.to(sums.device) + sums
        self.count += 1

    def first_bad_step(self) -> int | None:
        """The first step with a loss or a gradient that was not finite, or None. Waits for the device."""
        if self._bad_step is None or (step := int(self._bad_step)) < 0:
            return None
        return step

    def means(self, processes: Processes) -> dict[str, float]:
        """The means since the last call; starts anew. All processes call it together."""
        sums = [] if self.sums is None else processes.summed(self.sums).tolist()
        means = {name: total / self.count for name, total in zip(self.names, sums, strict=True)}
        self.names, self.sums, self.count = [], None, 0
        return means

    def state(self, processes: Processes) -> dict[str, Any]:
        """What a checkpoint between two lines must hold, for JSON (float32 sums are exact there). All call it."""
        total = [] if self.sums is None else processes.summed(self.sums.clone()).tolist()
        sums = [x if math.isfinite(x) else None for x in total]
        return {"names": self.names, "sums": sums, "count": self.count}

    def load_state(self, state: Mapping[str, Any], processes: Processes) -> None:
        """Goes on from :meth:`state`: the first process has all of it."""
        self.names, self.count = list(state["names"]), int(state["count"])
        sums = [math.nan if x is None else float(x) for x in state["sums"]]
        kept = sums if processes.is_first else [0.0] * len(sums)
        self.sums = torch.tensor(kept, dtype=torch.float32) if sums else None


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line, each with its ``step``; whole lines only, each step at most once.

    Opening it for a run that goes on from ``step`` drops the lines of later steps, and a line that a crash left half
    written.
    """

    def __init__(self, path: Path, step: int):
        write_atomically(path, "".join(line + "\n" for line in _lines_until(path, step)))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line. Numbers that JSON cannot hold (NaN, infinities) are written as null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Closes the file; what a full disk keeps from being written was reported by :meth:`write` before."""
        # close() tries again what write() could not; that error is known and must not hide the one on its way.
        with contextlib.suppress(OSError):
            self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    return [json.dumps(record) for record in read_metrics(path) if record["step"] <= step]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, without what is no whole record; none if there is no file."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records
