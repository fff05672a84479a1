"""Data sets: images and what is known of them, named ``name`` or ``name:path``."""

from gencore.data.base import (
    DATASETS,
    DataError,
    DatasetPlugin,
    MissingSplitError,
    NamedDataset,
    Split,
    absolute_spec,
    check,
    check_same,
    load,
    settings_type,
    showing_progress,
)
from gencore.data.memory import ImageDataset
from gencore.spec import Batch, Condition, Dataset, DataSpec

__all__ = [
    "DATASETS",
    "Batch",
    "Condition",
    "DataError",
    "DataSpec",
    "Dataset",
    "DatasetPlugin",
    "ImageDataset",
    "MissingSplitError",
    "NamedDataset",
    "Split",
    "absolute_spec",
    "check",
    "check_same",
    "load",
    "settings_type",
    "showing_progress",
]
