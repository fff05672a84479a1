"""The compiled modules for another machine, whose minutes are better spent than on building: make gpu-artifacts.

They are built here, for the Python and the GPU there, into build/gpu-artifacts, with a note of their sources. There
they are put in their place if they are of the same sources and can be imported; else they are built.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "build" / "gpu-artifacts"
NOTE = "built-from.json"
MODULES = ("_cpu", "_cuda")
_PYTHON_312 = """import sys, sysconfig, pathlib
assert sys.version_info[:2] == (3, 12)
assert (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists()"""


def fingerprint(python: bool = False) -> str:
    """A digest of all that the modules are built from; with the Python code, of all that figures depend on."""
    found = [ROOT / "CMakeLists.txt", ROOT / "setup.py", *(ROOT / "cmake").rglob("*"), *(ROOT / "csrc").rglob("*")]
    if python:
        found += (ROOT / "gencore").rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(found):
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def build(python: str, architectures: str, into: Path | None = None, limit: float | None = None) -> None:
    """Builds both modules with that Python: into a folder, or in their place; within ``limit`` seconds."""
    where = (
        ["--inplace"] if into is None else ["--build-lib", str(into), "--build-temp", str(ROOT / "build/gpu-objects")]
    )
    subprocess.run(
        [python, "setup.py", "--quiet", "build_ext", *where],
        cwd=ROOT,
        env={**os.environ, "GENCORE_CUDA": "on", "GENCORE_CUDA_ARCHITECTURES": architectures},
        check=True,
        timeout=limit,
    )


def importable(folder: Path) -> str | None:
    """Why the modules in a folder cannot be imported here; None if they can."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    program = "\n".join(
        f"""import importlib.util
spec = importlib.util.spec_from_file_location("gencore.{name}", {str(folder / f"{name}{suffix}")!r})
importlib.util.module_from_spec(spec)"""
        for name in MODULES
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def put_in_place(architecture: str) -> str | None:
    """Copies the prebuilt modules to where they belong, for a GPU of that architecture; says why it does not."""
    note = ARTIFACTS / NOTE
    if not note.exists():
        return "there are none"
    told = json.loads(note.read_text())
    if told["fingerprint"] != fingerprint():
        return "they were built from other sources"
    if architecture not in re.split(r"\D+", told["architectures"]):
        return f"they were built for {told['architectures']}"
    reason = importable(ARTIFACTS / "gencore")
    if reason is None:
        for path in (ARTIFACTS / "gencore").glob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"):
            shutil.copy(path, ROOT / "gencore")
    return reason


def commit() -> str:
    """The commit that the artifacts were made at, for a checkout without its history; "unknown" of other sources."""
    note = ARTIFACTS / NOTE
    told = json.loads(note.read_text()) if note.exists() else {}
    return told["commit"] if told.get("all") == fingerprint(python=True) else "unknown"


def python_312() -> str:
    """A Python 3.12 of this machine that can build: the one on the PATH, or one that a version manager keeps."""
    kept = sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12"))
    for candidate in ("python3.12", *map(str, kept)):
        try:
            done = subprocess.run([candidate, "-c", _PYTHON_312], capture_output=True)
        except OSError:
            continue
        if done.returncode == 0:
            return candidate
    raise SystemExit("no Python 3.12 with its headers was found; GPU_PYTHON names the Python to build with")


def main() -> None:
    """Builds the artifacts with GPU_PYTHON (Python 3.12 by default) for GPU_ARCHITECTURES (90a by default)."""
    architectures = os.environ.get("GPU_ARCHITECTURES") or "90a"
    environment = ROOT / "build" / "gpu-python"
    python = str(environment / "bin" / "python")
    subprocess.run([os.environ.get("GPU_PYTHON") or python_312(), "-m", "venv", str(environment)], check=True)
    tools = ["setuptools>=77", "pybind11>=2.13", "cmake>=3.25", "ninja>=1.11"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *tools], check=True)
    shutil.rmtree(ARTIFACTS, ignore_errors=True)
    build(python, architectures, ARTIFACTS)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    note = {
        "fingerprint": fingerprint(),
        "all": fingerprint(python=True),
        "architectures": architectures,
        "commit": commit,
    }
    (ARTIFACTS / NOTE).write_text(json.dumps(note) + "\n")
    for path in sorted((ARTIFACTS / "gencore").iterdir()):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
