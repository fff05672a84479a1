"""Data sets: real images as uint8 in memory, named ``name`` or ``name:path``."""

from gencore.data.base import (
    DataError,
    DatasetPlugin,
    ImageDataset,
    MissingSplitError,
    Split,
    absolute_spec,
    check,
    load,
    settings_type,
    showing_progress,
)

__all__ = [
    "DataError",
    "DatasetPlugin",
    "ImageDataset",
    "MissingSplitError",
    "Split",
    "absolute_spec",
    "check",
    "load",
    "settings_type",
    "showing_progress",
]
