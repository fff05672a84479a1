"""Checks what a source distribution and a wheel hold: contents.py FILE..."""

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
    "csrc/",
    "gencore/",
    "tests/",
)
WHEEL_HOLDS = (
    "gencore/__init__.py",
    "gencore/_cpu.cpython",
    "gencore/py.typed",
    "gencore/_cpu.pyi",
    "gencore/backends/reference/",
    "gencore/models/vae/",
)
WHEEL_TOPS = ("gencore/", "gencore-")


def faults(path: Path) -> list[str]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
        found = [f"holds no {start}" for start in WHEEL_HOLDS if not any(name.startswith(start) for name in names)]
        found += [f"holds {name}" for name in names if not name.startswith(WHEEL_TOPS)]
        if not any(name.endswith("/LICENSE") for name in names):
            found.append("holds no LICENSE")
    else:
        with tarfile.open(path) as sdist:
            names = [name.partition("/")[2] for name in sdist.getnames()]
        found = [f"holds no {start}" for start in SDIST_HOLDS if not any(name.startswith(start) for name in names)]
        found += [f"holds {name}" for name in names if name.endswith((".so", ".pyc", ".o"))]
    return [f"{path.name} {fault}" for fault in found]


if __name__ == "__main__":
    wrong = [fault for name in sys.argv[1:] for fault in faults(Path(name))]
    sys.exit("\n".join(wrong) or 0)
