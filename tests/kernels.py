"""Every way a kernel can run, for tests that hold all of them to one table of cases.

Where there is a GPU, the CUDA and Triton kernels run on it. Where there is none, the CUDA kernels run in the emulator
of tests/cuda_emulation, and Triton's are interpreted.
"""

from __future__ import annotations

import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_emulation.build import build, compiler
from cuda_emulation.emulator import Emulator
from torch import Tensor

import gencore
from gencore.backends import choice, cpu, cuda

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("cpu-scalar", "cpu-avx2", "cpu-avx512", "cuda", "triton")
# For tests of what stands around the kernels, which takes long and does not depend on the SIMD level.
BACKENDS = ("cpu-scalar", "cuda", "triton")


@dataclass(frozen=True)
class Kernels:
    """Where a test's tensors shall be. ``name`` is one of NAMES, ``backend`` what runs its ops."""

    name: str
    backend: str
    device: str

    @property
    def emulated(self) -> bool:
        """Whether they are a GPU's, on the CPU."""
        return self.backend != "cpu" and self.device == "cpu"

    @property
    def interpreted(self) -> bool:
        """Whether it is Triton's interpreter, which takes tens of milliseconds for a thousand values."""
        return self.backend == "triton" and self.device == "cpu"


@contextmanager
def running(name: str) -> Iterator[Kernels]:
    """Makes every op run on these kernels. Skips the test where there are none."""
    if name.startswith("cpu-"):
        level = name.removeprefix("cpu-")
        if level not in cpu.build_info()["simd_supported"]:
            pytest.skip(f"this processor has no {level}")
        before = cpu.simd_level()
        cpu.set_simd_level(level)
        try:
            yield Kernels(name, "cpu", "cpu")
        finally:
            cpu.set_simd_level(before)
    elif torch.cuda.is_available():
        reason = choice.refusal(name, torch.device("cuda", torch.cuda.current_device()))
        if reason is not None:
            pytest.skip(reason)
        with gencore.backend(name):
            yield Kernels(name, name, "cuda")
    elif name == "cuda":
        with emulated(), gencore.backend("cuda"):
            yield Kernels(name, "cuda", "cpu")
    else:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("the package triton is not installed")
        from backends.triton.interpreter import exact_arithmetic

        exact_arithmetic()
        with gencore.backend("triton"):
            yield Kernels(name, "triton", "cpu")


class EmulatedOps(cuda.CudaOps):
    """The CUDA backend over the emulator, where the memory of the device is that of the CPU."""

    # Whether keys of three words are on the device too, and tables of one row.
    keys_on_device = False
    tables_on_device = False

    def _place(self, tensor: Tensor, workspace: Tensor | None = None) -> Any:
        return 0, None, None if workspace is None else workspace.data_ptr()

    def _is_key_on_device(self, key: Tensor) -> bool:
        return self.keys_on_device or key.dim() == 2

    def _is_on_device(self, table: Tensor, index: Tensor | None) -> bool:
        return self.tables_on_device or index is not None or len(table) != 1


@contextmanager
def emulated() -> Iterator[EmulatedOps]:
    """Puts the emulator in the place of the CUDA module. Kernels may touch the tensors whose addresses they get.

    GENCORE_EMULATOR=sanitized takes the flavour of the emulator of that name.
    """
    watched = _Watched(_emulator(os.environ.get("GENCORE_EMULATOR", "checked")))
    ops = EmulatedOps(watched)

    def data_ptr(tensor: Tensor) -> int:
        watched.asked.append(tensor)
        return address_of(tensor)

    # Another order of blocks and threads for each test, the same every time; in order for a quarter of them.
    watched._emulator.set_schedule(zlib.crc32(os.environ.get("PYTEST_CURRENT_TEST", "").encode()) % 4)
    forget_backends()
    in_its_place = mock.patch.multiple(cuda, load=lambda: ops, refusal=lambda device: None)
    with in_its_place, mock.patch.object(torch.Tensor, "data_ptr", data_ptr):
        try:
            yield ops
        finally:
            watched._emulator.set_schedule(0)
            forget_backends()


def forget_backends() -> None:
    """For tests that put something else in the place of a backend: what serves a device is found out anew."""
    choice._choose.cache_clear()
    choice._choose_with.cache_clear()
    choice._refusal.cache_clear()
    choice.dispatched.cache_clear()


_emulators: dict[str, Emulator] = {}


def _emulator(flavour: str) -> Emulator:
    if flavour not in _emulators:
        if compiler() is None:
            pytest.skip("there is no g++ to build the CUDA emulator with")
        names = {"GENCORE_VERSION": gencore.__version__, "GENCORE_CUDA_COMPILER": "g++"}
        names["GENCORE_CUDA_ARCHITECTURES"] = "emulated"
        module = build(
            sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
            ROOT / "csrc" / "bindings" / "cuda_module.cpp",
            ROOT / "build" / "cuda_emulation",
            flavour,
            definitions=[f'{name}="{value}"' for name, value in names.items()],
        )
        _emulators[flavour] = Emulator(module)
    return _emulators[flavour]


class _Watched:
    """The emulated module, whose kernels may touch the tensors asked for their addresses since the last launch."""

    def __init__(self, emulator: Emulator):
        self._emulator = emulator
        self.asked: list[Tensor] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._emulator.module, name)
        if name in ("build_info", "unusable") or name.endswith("_workspace"):
            return function

        def launch(**args: Any) -> Any:
            for number, tensor in enumerate(self.asked):
                self._emulator.register_address(f"tensor {number}", address_of(tensor), extent(tensor))
            try:
                return function(**args)
            finally:
                self._emulator.clear()
                self.asked.clear()

        return launch


def address_of(tensor: Tensor) -> int:
    return torch._C.TensorBase.data_ptr(tensor)


def extent(tensor: Tensor) -> int:
    """The bytes from the first to the last element of a tensor."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
