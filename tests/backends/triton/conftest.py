"""Triton decides at import whether it interprets its kernels; what it interprets is held to the last bit."""

from __future__ import annotations

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        from backends.triton.interpreter import exact_arithmetic

        exact_arithmetic()
