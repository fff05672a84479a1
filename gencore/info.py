"""What is installed, what was built, and what of it serves here."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import numpy
import torch

from gencore.backends import choice, cpu, cuda


def info() -> dict[str, Any]:
    """Versions, the compiled modules, and what they use on this machine, as JSON can hold it.

    Keys: ``gencore``, ``python``, ``torch``, ``numpy``, ``system``, ``cpu``, ``gpus`` (those that torch can use);
    ``cpu_module`` (compiler, SIMD levels compiled, supported by the CPU and chosen), ``threads``, ``openmp`` (the
    kernels' ``runtime``; ``shared`` says whether it is torch's too, so that both use one pool of threads),
    ``cuda_module`` (``built``, or why not) and ``triton``, each ``available`` or with the ``reason`` why it is not.

    Needs torch and NumPy only, and raises nothing: what is missing is said in the result.
    """
    return {
        "gencore": _version("gencore"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "gpus": _gpus(),
        "cpu_module": _cpu_module(),
        "threads": torch.get_num_threads(),
        "openmp": _openmp(),
        "cuda_module": _cuda_module(),
        "triton": _triton(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _cpu_module() -> dict[str, Any]:
    built = cpu.build_info()
    return {
        "compiler": built["compiler"],
        "simd_compiled": list(built["simd_compiled"]),
        "simd_supported": list(built["simd_supported"]),
        "simd_level": cpu.simd_level(),
    }


def _openmp() -> dict[str, Any]:
    """The OpenMP runtime that answers the kernels, and whether it is the one that answers torch."""
    ours = cpu.openmp_address()
    if not ours:
        return {"runtime": None, "shared": False}
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        theirs = ctypes.cast(torch_library.omp_get_max_threads, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return {"runtime": "unknown", "shared": "unknown"}
    runtime = "unknown"
    for begin, end, path in re.findall(r"^(\w+)-(\w+) \S+ \S+ \S+ \d+ +(/.+)$", maps, re.MULTILINE):
        if int(begin, 16) <= ours < int(end, 16):
            runtime = Path(path).name
    return {"runtime": runtime, "shared": ours == theirs}


def _cuda_module() -> dict[str, Any]:
    return {"built": cpu.build_info()["cuda_module"]} | _serves("cuda", cuda.unavailable())


def _triton() -> dict[str, Any]:
    return {"version": _version("triton")} | _serves("triton", choice.triton_unavailable())


def _serves(backend: choice.Name, reason: str | None) -> dict[str, Any]:
    """Whether a backend serves a GPU of this machine, and else why not the first."""
    if reason is None and torch.cuda.is_available():
        reasons = [choice.refusal(backend, torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
        reason = reasons[0] if all(reasons) else None
    return {"available": True} if reason is None else {"available": False, "reason": reason}


def _gpus() -> list[str]:
    """The GPUs that torch can use."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
