"""Functions that several tests use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gencore
from gencore import Key, noise
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


def on_cpu(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """What the CPU kernels make of the same arguments, whatever backend is in force and wherever the tensors are."""

    def moved(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(moved(one) for one in value)
        return value.cpu() if isinstance(value, Tensor) else value

    with gencore.backend("cpu"):
        return op(*moved(args), **{name: moved(value) for name, value in kwargs.items()})


def normals_of_blocks(key: Key, sample: int, first: int, count: int) -> torch.Tensor:
    """The normals of ``count`` blocks of a sample, by the definition."""
    seed, stream, start = (int(word) for word in key.packed)
    blocks = np.arange(first, first + count, dtype=np.uint64)
    identity = (np.uint64(stream), np.uint64(start + sample), np.uint64(0))
    words = noise.philox4x32((blocks, *identity), (np.uint64(seed), np.uint64(0)))
    w0, w1, w2, w3 = (word.astype(np.uint32) for word in np.broadcast_arrays(*words))
    return torch.from_numpy(np.stack((*noise.box_muller(w0, w1), *noise.box_muller(w2, w3)), axis=-1)).flatten()
