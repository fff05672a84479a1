"""gencore: fused, reproducible kernels and trainable model plugins for people who build image generators."""

from gencore import diffusion as diffusion
from gencore import nn as nn
from gencore import ops as ops
from gencore.info import info as info
from gencore.noise import Key as Key
from gencore.ops import backend as backend
from gencore.ops import explain as explain

__version__ = "0.1.0"
__all__ = ["Key", "backend", "diffusion", "explain", "info", "nn", "ops"]
