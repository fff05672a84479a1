"""What modules and schedulers both ask of PyTorch and diffusers, before a call runs on our kernels."""

from __future__ import annotations

import sys
import types
from typing import Any


def original(owner: Any, name: str, qualified: str | None = None) -> Any:
    """The function ``name`` of a module or class, if it is the one defined there; None if it was replaced.

    Our modules are imported by the first call of ``accelerate``, when somebody may have replaced it already. Nothing
    is None, so that whoever compares with it sees a function that was replaced, and lets that one run.
    """
    function = getattr(owner, name, None)
    is_module = isinstance(owner, types.ModuleType)
    if isinstance(function, types.BuiltinFunctionType):
        is_own = function.__name__ == name and (function.__module__ or "").split(".")[0] == "torch"
    else:
        # Wrappers take over names, but not the module whose variables they use.
        home = owner if is_module else sys.modules[owner.__module__]
        qualified = qualified or (name if is_module else f"{owner.__name__}.{name}")
        is_own = (
            getattr(function, "__globals__", None) is vars(home) and getattr(function, "__qualname__", "") == qualified
        )
    return function if is_own else None
