"""Functions that several tests use."""

from __future__ import annotations

import torch
from torch import Tensor

from gencore.bench.cases import Case


def laid_out(tensor: Tensor, case: Case) -> Tensor:
    """The tensor in the case's memory format."""
    return tensor.to(memory_format=case.memory_format)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: unlike equal(), NaN equals itself and 0 differs from -0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.cpu().contiguous().view(integers), b.cpu().contiguous().view(integers))
