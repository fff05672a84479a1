"""How far a long task is: a bar on a terminal; elsewhere, as in a log file, a line every so often."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

# Between two lines where there is no terminal.
SECONDS = 30.0


class Progress:
    """A context manager that shows on stderr how much of a task is done. Its bar needs tqdm.

    Args:
        total: units in all.
        done: units that were done before.
        name: what the task is called.
        unit: what is counted.
        shown: False shows nothing.
        delay: seconds that pass before a bar is shown; a task that takes less shows none.
    """

    def __init__(self, total: int, done: int = 0, *, name: str, unit: str, shown: bool = True, delay: float = 0.0):
        self.total, self.done, self.name, self.unit, self.shown = total, done, name, unit, shown
        self._first, self._figures = done, ""
        self._started = self._told = time.monotonic()
        self._bar: Any = None
        # A notebook is no terminal, and tqdm has a bar of its own for it.
        if shown and ("ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())):
            try:
                from tqdm.auto import tqdm
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    'a progress bar needs the package tqdm: pip install tqdm, or "gencore[train]"', name="tqdm"
                ) from error
            self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, delay=delay)

    def figures(self, values: Mapping[str, float]) -> None:
        """Shows these numbers from now on, such as losses."""
        self._figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures, refresh=False)

    def update(self, count: int = 1) -> None:
        """So many more units are done."""
        self.done += count
        # A terminal that was closed is no reason to end.
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.update(count)
            elif self.shown and time.monotonic() - self._told >= SECONDS and self.done < self.total:
                self._told = time.monotonic()
                print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        rate = (self.done - self._first) / max(time.monotonic() - self._started, 1e-9)
        left = timedelta(seconds=round((self.total - self.done) / rate))
        told = f"{self.name}: {self.unit} {self.done:,} of {self.total:,} ({self.done / self.total:.0%})"
        return f"{told}, {rate:.3g} per second, {left} left" + (f"; {self._figures}" if self._figures else "")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.close()
