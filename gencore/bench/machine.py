"""What a run of the benchmarks ran on: the machine, the versions of what it compared, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import gencore
from gencore.info import info

_PEERS = ("diffusers", "liger-kernel", "xformers", "flash-attn", "triton")


def describe(device: str) -> dict[str, Any]:
    """The machine, as a report has it; nothing in it tells one machine of a kind from another."""
    told = info()
    cpu = told["cpu"] + _family()
    return {
        "name": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "device": device,
        "threads": torch.get_num_threads(),
        "simd_level": told["cpu_module"]["simd_level"],
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": told["gpus"],
        "capability": list(torch.cuda.get_device_capability()) if device == "cuda" else None,
        "system": told["system"],
        "compiler": told["cpu_module"]["compiler"],
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Of gencore, Python, torch and of the peers that are installed."""
    found = {"gencore": gencore.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in _PEERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of the checkout that gencore is imported from, as git describes it."""
    root = Path(gencore.__file__).resolve().parents[1]
    # An installed package may lie within somebody else's checkout.
    if not (root / "gencore").is_dir() or not (root / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _family() -> str:
    """What tells one generation of processors from the next, where virtual machines are sparing with the name."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""
    family, model = (re.search(rf"^{name}\s*:\s*(\d+)$", text, re.MULTILINE) for name in ("cpu family", "model"))
    return f" (family {family[1]}, model {model[1]})" if family and model else ""
