"""Loads modules that build.py built, and tells their emulator of tensors."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from cuda_emulation.build import BuildError, compiler


def load(path: Path) -> ModuleType:
    """The Python module in a file. It is in no package, so several of one name can be loaded."""
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Emulator:
    """A loaded module, as ``module``, and the switches of the emulator in it."""

    def __init__(self, path: Path) -> None:
        self.module = load(path)
        self._library = ctypes.CDLL(str(path))
        self._library.register_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
        self._library.set_shared_memory.argtypes = [ctypes.c_size_t]

    def register(self, name: str, memory: Any) -> int:
        """Lets kernels touch a tensor or an array, from its first element to its last; returns its address."""
        if hasattr(memory, "data_ptr"):
            address, item = memory.data_ptr(), memory.element_size()
            strides = [stride * item for stride in memory.stride()]
        else:
            address, item, strides = memory.ctypes.data, memory.itemsize, memory.strides
        if 0 not in memory.shape:
            last = sum((size - 1) * stride for size, stride in zip(memory.shape, strides, strict=True))
            self.register_address(name, address, last + item)
        return address

    def register_address(self, name: str, address: int, size: int) -> None:
        """As ``register``, of ``size`` bytes."""
        self._library.register_buffer(address, size, name.encode())

    def clear(self) -> None:
        """Forgets every registered buffer."""
        self._library.clear_buffers()

    @contextmanager
    def buffers(self, **memory: Any) -> Iterator[None]:
        """Only these tensors or arrays may be touched by kernels inside the context."""
        self.clear()
        for name, value in memory.items():
            self.register(name, value)
        try:
            yield
        finally:
            self.clear()

    def set_schedule(self, seed: int) -> None:
        """0: blocks and threads run in order; else in an order drawn at random from the seed."""
        self._library.set_schedule(seed)

    def set_blocks(self, first: int, count: int) -> None:
        """Of every launch only ``count`` blocks run, from ``first`` on, or from the end if that is negative; 0: all.

        So a kernel's last blocks can be tried on a tensor of gigabytes, most of which nobody touches.
        """
        self._library.set_blocks(ctypes.c_int64(first), ctypes.c_int64(count))

    def set_multiprocessors(self, count: int) -> None:
        """What the device says of itself, for kernels whose grid depends on it. 4 at first."""
        self._library.set_multiprocessors(count)

    def set_shared_memory(self, size: int) -> None:
        """The bytes that a block may ask for, at most and at first the 227 KiB of an H100."""
        self._library.set_shared_memory(size)


# The C++ library too: else the sanitizer does not find what it replaces of it, exceptions above all.
_PRELOADED = ("libasan.so", "libstdc++.so")


def _library(name: str) -> str:
    """Where g++ has a library; only the name if it has none."""
    cxx = compiler()
    if cxx is None:
        return name
    command = [cxx, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def sanitizer_missing() -> str | None:
    """Why modules of the flavour "sanitized" cannot be loaded here; None if they can."""
    if compiler() is None:
        return "there is no g++ to build the emulator with"
    missing = [name for name in _PRELOADED if not Path(_library(name)).is_absolute()]
    return f"g++ has no {' and no '.join(missing)}" if missing else None


def sanitizer_environment() -> dict[str, str]:
    """The environment for a Python process that loads a module of the flavour "sanitized"."""
    missing = sanitizer_missing()
    if missing is not None:
        raise BuildError(missing)
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(map(_library, _PRELOADED)),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
