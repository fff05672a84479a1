"""Kernels that Triton compiles for a GPU when they are first called, or interprets on the CPU if the environment
variable TRITON_INTERPRET is 1 before this is imported. Importing this imports triton.

The ops have the names that the library knows them by."""

import importlib

from gencore._ops import OPS

for _op in OPS:
    _module = importlib.import_module(f"{__name__}.{_op.stem}")
    # What a table chooses among, every backend has.
    _has = {_kernel.name for _kernel in _op.kernels if _kernel.direction is not None or hasattr(_module, _kernel.name)}
    globals().update({_name: getattr(_module, _name) for _name in _has})
