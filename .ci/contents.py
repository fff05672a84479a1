"""Checks what source distributions and wheels hold: contents.py FILE..."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

# By the beginning of a path, and by its end where the name depends on the machine.
SDIST_HOLDS = (
    "setup.py",
    "CMakeLists.txt",
    "Makefile",
    "LICENSE",
    "README.md",
    "cmake/",
    "csrc/cpu/",
    "csrc/cuda/",
    "csrc/include/",
    "gencore/",
    "tests/",
)
WHEEL_HOLDS = (
    "gencore/__init__.py",
    "gencore/_cpu.cpython",
    "gencore/py.typed",
    "gencore/_cpu.pyi",
    "gencore/backends/reference/",
    "gencore/backends/tables/attention.json",
    "gencore/backends/triton/",
    "gencore/bench/page.html.jinja",
    "gencore/models/vae/",
)
# Repair would put the libraries that it copies into gencore.libs/: there must be none.
WHEEL_TOPS = ("gencore/", "gencore-")
CUDA_MODULE = "gencore/_cuda.cpython"


def holds(names: list[str], start: str) -> bool:
    return any(name.startswith(start) for name in names)


def faults_of_wheel(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
    found = [f"holds no {start}" for start in WHEEL_HOLDS if not holds(names, start)]
    found += [f"holds {name}" for name in names if not name.startswith(WHEEL_TOPS)]
    if not any(name.endswith("/LICENSE") for name in names):
        found.append("holds no LICENSE")
    # `make wheels` says by the build tag what it asked for: gencore-VERSION[-TAG]-PYTHON-ABI-PLATFORM.whl
    tag = path.name.split("-")[2]
    if tag == "1cuda" and not holds(names, CUDA_MODULE):
        found.append(f"holds no {CUDA_MODULE}")
    if tag == "0cpu" and holds(names, CUDA_MODULE):
        found.append(f"holds {CUDA_MODULE}")
    return found


def faults_of_sdist(path: Path) -> list[str]:
    with tarfile.open(path) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
    found = [f"holds no {start}" for start in SDIST_HOLDS if not holds(names, start)]
    found += [f"holds {name}" for name in names if name.endswith((".so", ".pyc", ".o"))]
    return found


def faults(path: Path) -> list[str]:
    found = faults_of_wheel(path) if path.suffix == ".whl" else faults_of_sdist(path)
    return [f"{path.name} {fault}" for fault in found]


if __name__ == "__main__":
    wrong = [fault for name in sys.argv[1:] for fault in faults(Path(name))]
    sys.exit("\n".join(wrong) or 0)
