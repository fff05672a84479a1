"""What the tests of Triton's diffusion kernels share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from support import laid_out
from torch import Tensor

from gencore import Key
from gencore.backends.triton._coefficients import table_arguments
from gencore.bench import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = Key(7).stream(3).samples(2**32 - 1)
# The interpreter has no time for all large cases in all types; tests/ops has the small ones.
LARGE = [case for case in cases.small(cases.DIFFUSION) if case.elements > 1 << 11]
LARGE_IN_OTHER_TYPES = {
    torch.bfloat16: cases.Case((2, 5003), ""),
    torch.float16: cases.Case((1, 1100, 3, 3), "", layout="channels_last"),
    torch.float64: cases.Case((16, 1 << 10), ""),
}
EVERY_LARGE = [*((torch.float32, case) for case in LARGE), *LARGE_IN_OTHER_TYPES.items()]


def drawn(case: cases.Case, dtype: torch.dtype, number: int, channels: int = 1) -> Tensor:
    """Another tensor for each number, of so many times the case's channels."""
    generator = torch.Generator().manual_seed(number)
    shape = (case.shape[0], channels * case.shape[1], *case.shape[2:]) if channels > 1 else case.shape
    return laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), case)


def on_device(*args):
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in args]


@contextlib.contextmanager
def rows_in_memory(op: str) -> Iterator[None]:
    """Makes the kernel read the coefficients that else are arguments of its launch."""

    def arguments(table, index, tensor):
        return *table_arguments(table, index, tensor), *[0.0] * table.shape[1]

    with mock.patch.object(sys.modules[f"gencore.backends.triton.{op}"], "coefficient_arguments", arguments):
        yield
