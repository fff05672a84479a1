"""Builds Python modules whose CUDA kernels run on the CPU; README.md says how."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

Flavour = Literal["checked", "sanitized"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"

_RUNTIME = {
    "checked": ["api", "device", "fiber", "hooks", "memory_checked", "module", "scheduler", "warp"],
    "sanitized": ["api", "device", "fiber", "memory_sanitized", "module", "scheduler", "warp"],
}
_COMMON = [
    "-std=c++20",
    "-fPIC",
    "-g1",
    "-ffp-contract=off",
    # Several modules live in one process; what they share must not be shared.
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-gnu-unique",
    # The folder of compilation first, for what names no file; the last that fits counts.
    f"-fdebug-prefix-map={ROOT}=.",
    f"-ffile-prefix-map={ROOT}/=",
]
_KERNEL = {
    # Only the calls that ThreadSanitizer's pass inserts are wanted: hooks.cpp answers them.
    "checked": [
        *("-O1", "-fsanitize=thread,alignment", "--param=tsan-instrument-func-entry-exit=0"),
        *("-fno-builtin-memcpy", "-fno-builtin-memmove", "-fno-builtin-memset"),
        *("-include", str(HERE / "runtime" / "prelude.h")),
    ],
    # Neither null pointers, which AddressSanitizer sees, nor alignment, which the other flavour sees: all of
    # UndefinedBehaviorSanitizer takes more than twice as long to compile.
    "sanitized": [
        *("-Og", "-fsanitize=address,bounds,shift,signed-integer-overflow,integer-divide-by-zero"),
        *("-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    ],
}
_RUNTIME_FLAGS = {"checked": ["-O2"], "sanitized": ["-O2", "-DGENCORE_EMULATION_ADDRESS_SANITIZER"]}
_LINK = {"checked": [], "sanitized": ["-fsanitize=address,undefined"]}


class BuildError(Exception):
    """A compiler's complaint."""


def compiler() -> str | None:
    """The g++ to build with; None if there is none, and then nothing here works."""
    for name in (os.environ.get("CXX", "g++"), "g++"):
        path = shutil.which(name)
        if path is not None and _is_gcc(path):
            return path
    return None


@functools.cache
def _is_gcc(path: str) -> bool:
    """Clang can have the name of g++, but inserts other hooks."""
    command = [path, "-dM", "-E", "-x", "c++", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0 and "__GNUC__" in done.stdout and "__clang__" not in done.stdout


@functools.cache
def _version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


def build(
    sources: Iterable[Path],
    binding: Path,
    folder: Path,
    flavour: Flavour = "checked",
    include: Iterable[Path] = (),
    definitions: Iterable[str] = (),
    name: str = "_cuda",
) -> Path:
    """Compiles ``sources`` (kernels) and ``binding`` (PYBIND11_MODULE of ``name``), and links them with the emulator.

    Returns the module's path, in ``folder / flavour``. What has not changed since the last time is not built again.
    """
    import pybind11

    found = compiler()
    if found is None:
        raise BuildError("there is no g++")
    cxx: str = found
    folder = folder / flavour
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in (HERE / "include", *include, CSRC / "include", CSRC / "cuda")]
    # A -D in a macro that #include expands.
    own = [*_COMMON, *includes, f'-DGENCORE_PTX="{HERE}/include/emulation/ptx.h"', *(f"-D{d}" for d in definitions)]
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    if _has_fma():
        warnings.append("-mfma")
    compilations: list[tuple[Path, list[str]]] = []
    for source in sources:
        compilations.append((Path(source), [*own, *warnings, *_KERNEL[flavour], "-x", "c++"]))
    python = [f"-isystem{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    compilations.append((Path(binding), [*own, *python, "-O1"]))
    for stem in _RUNTIME[flavour]:
        compilations.append((HERE / "runtime" / f"{stem}.cpp", [*own, *warnings, *_RUNTIME_FLAGS[flavour]]))

    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # What takes longest first: the binding, then the kernels.
        compilations.sort(key=lambda item: (item[0].suffix != ".cpp" or item[0].parent.name == "runtime", item[0]))
        objects = list(pool.map(lambda item: _compile(cxx, item[0], item[1], folder), compilations))
        module = folder / (name + sysconfig.get_config_var("EXT_SUFFIX"))
        command = [cxx, "-shared", "-g1", "-Wl,-Bsymbolic", "-Wl,-z,now", *_LINK[flavour], *map(str, objects), "-ldl"]
        stamp = _digest(command, objects)
        record = folder / f"{name}.link"
        if not (module.exists() and record.exists() and record.read_text() == stamp):
            fresh = module.with_suffix(".new")
            _run([*command, "-o", str(fresh)])
            # Another name first: a process that has the old one loaded keeps it.
            os.replace(fresh, module)
            record.write_text(stamp)
    return module


def build_with_nvcc(
    sources: Iterable[Path], binding: Path, folder: Path, include: Iterable[Path] = (), name: str = "_cuda"
) -> Path:
    """The same module for a GPU, to compare the emulator with."""
    import pybind11

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("there is no nvcc")
    folder = folder / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    includes = [*include, CSRC / "include", CSRC / "cuda", sysconfig.get_path("include"), pybind11.get_include()]
    # The two architectures that csrc/cuda must do on, and PTX for later ones.
    architectures = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"]
    command = [nvcc, "-std=c++20", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Werror=all-warnings"]
    command += [f"-gencode={architecture}" for architecture in architectures]
    command += [*(f"-I{path}" for path in includes), *map(str, sources), str(binding), "-o", str(module)]
    _run(command)
    return module


def _has_fma() -> bool:
    if platform.machine() != "x86_64":
        return False
    try:
        return " fma " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _compile(cxx: str, source: Path, flags: list[str], folder: Path) -> Path:
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]
    target = folder / f"{source.stem}-{place}.o"
    record, depfile = target.with_suffix(".json"), target.with_suffix(".d")
    command = [cxx, *flags, "-c", str(source.resolve())]
    if target.exists() and record.exists():
        known = json.loads(record.read_text())
        used = [Path(path) for path in known["files"]]
        if all(path.exists() for path in used) and known["digest"] == _digest(command, used):
            return target
    _run([*command, "-MD", "-MF", str(depfile), "-o", str(target)])
    words = shlex.split(depfile.read_text().replace("\\\n", " "))
    files = [Path(word) for word in words[1:]]
    record.write_text(json.dumps({"files": [str(path) for path in files], "digest": _digest(command, files)}))
    return target


def _digest(command: list[str], files: Iterable[Path]) -> str:
    """Of all that the command's result depends on, the compiler (of one name before and after an update) included."""
    digest = hashlib.sha256("\0".join([_version(command[0]), *command]).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr}")
    if done.stderr:
        raise BuildError(f"{shlex.join(command)}\nwarns:\n{done.stderr}")
