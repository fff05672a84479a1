"""What counts as a number where an argument is one, said once for the whole library."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch


def as_int(value: Any) -> int | None:
    """The integer that ``value`` is, one of NumPy's too; None for anything else, also a bool or a tensor.

    What a compiler knows as a symbol stays one.
    """
    if type(value) is int:
        return value
    # A tensor has an index too, but on a GPU the look at it would wait.
    if isinstance(value, (bool, np.bool_, torch.Tensor)):
        return None
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(name: str, value: Any, *, least: int | None = None, what: str = "an int") -> int:
    """``value`` as an int.

    Raises:
        TypeError: it is none; ``what`` says what ``name`` must be.
        ValueError: it is below ``least``.
    """
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
