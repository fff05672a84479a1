"""What is interpreted is held to the last bit. tests/conftest.py says when kernels are interpreted."""

from __future__ import annotations

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from backends.triton.interpreter import exact_arithmetic

    exact_arithmetic()
