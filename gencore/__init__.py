"""gencore: fused, reproducible kernels and trainable model plugins for people who build image generators."""

from gencore import ops as ops
from gencore.info import info as info
from gencore.noise import Key as Key

__version__ = "0.1.0"
__all__ = ["Key", "info", "ops"]
