"""What can go wrong with a training."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot begin or go on: the folder holds another run, the loss is not finite, a device is missing."""
