"""Every CUDA source is compiled for the GPUs it is meant for, by the commands of CMake with warnings as errors.

What the kernels use is written to ``build/cuda-resources.txt``. No GPU is needed.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from library import ARCHITECTURES, KEPT_OUTPUT, ROOT, built, configured, has_nvcc

TABLE = ROOT / "build" / "cuda-resources.txt"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Kernels of the emulator's tests, which are to mean the same to nvcc.
PROBES = ROOT / "tests" / "cuda_emulation" / "probes.cu"
SOURCES = [*KERNELS, PROBES]

SPILLING = """
__device__ __noinline__ float scaled(float x) { return 3 * x; }

__global__ void roomy_kernel(float* x) {
  __shared__ float copy[32];
  copy[threadIdx.x] = scaled(x[threadIdx.x]);
  __syncthreads();
  x[threadIdx.x] = copy[31 - threadIdx.x];
}

// Two blocks of 1024 threads leave 32 registers to a thread, which holds 96 values.
__global__ void __launch_bounds__(1024, 2) cramped_kernel(float* x) {
  float kept[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[(95 - i) * 1024 + threadIdx.x] = kept[i];
}
"""

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
FUNCTION = re.compile(r"Function properties for (\S+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Use:
    """What ptxas says that a kernel needs, or a function that a kernel calls: then it tells no registers."""

    stack: int
    spill_stores: int
    spill_loads: int
    registers: int = 0
    shared: int = 0

    def __str__(self) -> str:
        return f"{self.registers or '-':>5} {self.stack:5} {self.spill_stores:6} {self.spill_loads:6} {self.shared:6} |"


Uses = dict[tuple[str, str], Use]


def parsed(log: str) -> Uses:
    """What ``ptxas -v`` said, by architecture and mangled name."""
    uses: Uses = {}
    key = architecture = ""
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            architecture = entry[2]
        elif function := FUNCTION.search(line):
            key = architecture, function[1]
        elif frame := FRAME.search(line):
            uses[key] = Use(*map(int, frame.groups()))
        elif registers := REGISTERS.search(line):
            shared = SHARED.search(line)
            uses[key] = replace(uses[key], registers=int(registers[1]), shared=int(shared[1]) if shared else 0)
    return uses


def spilled(uses: Uses) -> list[str]:
    names = short_names(function for _, function in uses)
    return [
        f"{names[function]} on {architecture}: {use.spill_stores} bytes stored, {use.spill_loads} loaded"
        for (architecture, function), use in uses.items()
        if use.spill_stores or use.spill_loads
    ]


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """Names as in the source, without namespaces and parameters."""
    names = sorted(set(mangled))
    if shutil.which("c++filt") is None:
        return dict(zip(names, names, strict=True))
    shown = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    shown = re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", shown, flags=re.MULTILINE)
    return dict(zip(names, re.sub(r"\(.*$", "", shown, flags=re.MULTILINE).splitlines(), strict=True))


def kernel_names(source: str) -> list[str]:
    # Launch bounds have parentheses, within which there may be others.
    source = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", source)
    return [re.match(r"void\s+(\w+)\(", kernel)[1] for kernel in re.findall(r"__global__\s+([^{;]*)", source)]


class Compiler:
    """Compiles what is no part of the library, as if it were."""

    def __init__(self) -> None:
        commands = json.loads((configured() / "compile_commands.json").read_text())
        self.commands = {Path(entry["file"]): entry["command"] for entry in commands if entry["file"].endswith(".cu")}

    def __call__(self, source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
        like = KERNELS[0]
        words = shlex.split(self.commands[like])
        at = words.index("-c")
        assert words[at : at + 3] == ["-c", str(like), "-o"]
        first = words.index(str(KEPT_OUTPUT)) + 1 if str(KEPT_OUTPUT) in words else 0
        command = [*words[first:at], f"-I{ROOT / 'csrc' / 'cuda'}", "-c", source, "-o", folder / f"{source.stem}.o"]
        return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    if not has_nvcc():
        pytest.skip("nvcc is not installed")
    return Compiler()


@pytest.fixture(scope="module")
def used(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Uses]:
    """What the kernels of each source use."""
    folder = built("gencore_cuda") / "CMakeFiles" / "gencore_cuda.dir" / "csrc" / "cuda"
    logs = {path: (folder / f"{path.name}.o.log").read_text() for path in KERNELS}
    probes = compiler(PROBES, tmp_path_factory.mktemp("probes"))
    assert probes.returncode == 0, probes.stderr
    uses = {path: parsed(log) for path, log in {**logs, PROBES: probes.stdout + probes.stderr}.items()}
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(uses))
    return uses


def table(uses_of: dict[Path, Uses]) -> str:
    lines = ["Registers of a thread, bytes of its stack, bytes it spills; bytes of static shared memory of a block."]
    for path, uses in uses_of.items():
        if not uses:
            continue
        lines += ["", str(path.relative_to(ROOT)), "".join(f"{name:>32} |" for name in ARCHITECTURES)]
        lines.append(" regs stack stores  loads shared |" * len(ARCHITECTURES))
        for function, name in sorted(short_names(key[1] for key in uses).items(), key=lambda pair: pair[1]):
            shown = (str(uses.get((architecture, function), f"{'-':>32} |")) for architecture in ARCHITECTURES)
            lines.append(f"{''.join(shown)} {name}")
    return "\n".join(lines) + "\n"


def test_every_source_belongs_to_the_library(compiler):
    assert sorted(compiler.commands) == KERNELS


def test_every_kernel_is_compiled_for_every_architecture(used):
    on = {architecture: set() for architecture in ARCHITECTURES}
    for path, uses in used.items():
        for (architecture, function), use in uses.items():
            if use.registers:
                on[architecture].add((path.name, function))
    first, *others = on.values()
    assert all(kernels == first for kernels in others)
    for path in [*SOURCES, *(ROOT / "csrc" / "cuda").glob("*.cuh")]:
        for name in kernel_names(path.read_text()):
            # A mangled name has the plain one after its length.
            assert any(f"{len(name)}{name}" in function for _, function in first), f"{path.name}: {name}"


def test_no_kernel_spills_registers(used):
    faults = [fault for uses in used.values() for fault in spilled(uses)]
    assert not faults, "\n".join(faults)


def test_spilled_registers_are_noticed(compiler, tmp_path):
    """What the tests above look for is found where it is."""
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    done = compiler(source, tmp_path)
    assert done.returncode == 0, done.stderr
    uses = parsed(done.stdout + done.stderr)
    names = short_names(function for _, function in uses)
    of = {(architecture, names[function]): use for (architecture, function), use in uses.items()}
    functions = {"roomy_kernel", "cramped_kernel", "scaled"}
    assert set(of) == {(architecture, name) for architecture in ARCHITECTURES for name in functions}
    for architecture in ARCHITECTURES:
        assert of[architecture, "cramped_kernel"].registers == 32
        assert of[architecture, "roomy_kernel"].shared == 32 * 4
    assert [fault.split(":")[0] for fault in spilled(uses)] == [f"cramped_kernel on {name}" for name in ARCHITECTURES]


def test_a_warning_is_an_error(compiler, tmp_path):
    source = tmp_path / "warning.cu"
    source.write_text("__global__ void kernel() { int unused; }\n")
    done = compiler(source, tmp_path)
    assert done.returncode != 0
    assert "unused" in done.stdout + done.stderr
