"""Too little memory, whoever says so and however."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator

import torch

# What torch and Python say of memory that they cannot have, and of sizes that no memory has.
_SAID = re.compile(
    r"can't allocate memory|not enough memory|Storage size calculation overflowed|Overflow when unpacking|index-sized"
)


class NotEnoughMemoryError(MemoryError):
    """There is not enough memory; the message says for what."""


@contextlib.contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Makes one error of all that Python, NumPy and torch raise when memory is short or a size absurd.

    Raises:
        NotEnoughMemoryError: there is not enough memory for ``what``.
    """
    try:
        yield
    except NotEnoughMemoryError:
        raise
    except Exception as error:
        # What went wrong within a plugin is the cause of the error that names the plugin.
        if not (_is_lack_of_memory(error) or _is_lack_of_memory(error.__cause__)):
            raise
        raise NotEnoughMemoryError(f"not enough memory for {what}") from error


def _is_lack_of_memory(error: BaseException | None) -> bool:
    if isinstance(error, (RuntimeError, TypeError, OverflowError)) and _SAID.search(str(error)):
        return True
    return isinstance(error, (MemoryError, torch.OutOfMemoryError))


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use so far: of the device's tensors, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes, but bytes on macOS.
    return peak if sys.platform == "darwin" else peak << 10
