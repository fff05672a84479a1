"""What this machine can do at best, measured in the same run as what is held against it."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass

import torch

from gencore.backends import cpu
from gencore.bench.measure import interleave
from gencore.bench.results import Limits

# Vector instructions per value of noise, counted in the code that GCC 12 makes of csrc/cpu/noise.h: 250 and 146 for the
# 64 values of a group at AVX-512, 296 and 184 for 32 at AVX2. Philox alone takes 20 multiplications per 4 values.
_INSTRUCTIONS = {
    ("normal", "avx512"): 250 / 64,
    ("uniform", "avx512"): 146 / 64,
    ("normal", "avx2"): 296 / 32,
    ("uniform", "avx2"): 184 / 32,
}
_MULTIPLICATIONS = 5.0
# Instructions per value in the loop that nvcc 13.0 makes of csrc/cuda/fill.cuh for sm_90, float32, contiguous.
_GPU_INSTRUCTIONS = {"normal": 143 / 4, "uniform": 59 / 4}
# A multiprocessor issues as many, counted per thread.
_GPU_LANES = 128
# From there on a copy's bandwidth no longer depends on its size: several times the last-level cache.
_BEYOND_CACHE = {"cpu": 256 << 20, "cuda": 512 << 20}


@functools.lru_cache(maxsize=8)
def copy_bandwidth(nbytes: int, threads: int, device: str = "cpu") -> float:
    """Bytes read and written per second by a copy that moves ``nbytes``, half of them in and half of them out."""
    source = torch.ones(max(nbytes // 2, 64), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    timing = interleave(copy, rounds=15, round_seconds=0.01, device=device)["copy"]
    # The best round: a limit is what the machine does undisturbed.
    return 2 * source.numel() / min(timing.seconds)


@functools.lru_cache(maxsize=4)
def _core(level: str) -> tuple[float, float]:
    return cpu.multiplications_per_second(), cpu.vector_instructions_per_second()


def memory_floor(nbytes: int, device: str = "cpu") -> float:
    """Seconds that moving ``nbytes`` takes at the copy bandwidth of a working set of that size.

    Far beyond the last-level cache the bandwidth no longer depends on the size, and below a megabyte what is measured
    would be the call of the copy, so the size is held between the two. On a GPU every size is held to the bandwidth of
    its memory, which is what a kernel in the middle of a model sees.
    """
    most = _BEYOND_CACHE[device]
    size = most if device == "cuda" else min(max(1 << (nbytes - 1).bit_length(), 1 << 20), most)
    return nbytes / copy_bandwidth(size, torch.get_num_threads(), device)


@functools.lru_cache(maxsize=16)
def _products_per_second(dtype: torch.dtype, threads: int, level: str, device: str) -> float:
    """Multiplications and additions per second, counted as two, of a large product of matrices."""
    rates = []
    # What has no arithmetic of its own on the processor is converted: its products are float32's at best.
    for kind in {dtype, torch.float32} if device == "cpu" and dtype != torch.float64 else {dtype}:
        if device == "cpu" and kind == torch.float16:
            continue
        size = 1024 if device == "cpu" else 8192
        a, b = torch.randn(2, size, size, device=device).to(kind)
        c = torch.empty_like(a)
        product = {"product": lambda a=a, b=b, c=c: torch.mm(a, b, out=c)}
        timing = interleave(product, rounds=9, round_seconds=0.01, device=device)["product"]
        rates.append(2 * size**3 / min(timing.seconds))
    if device == "cpu" and dtype != torch.float64:
        # The instruction without memory, which a library need not reach.
        rates.append(2 * threads * cpu.multiply_adds_per_second(dtype == torch.bfloat16))
    return max(rates)


def matmul_floor(flops: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """Seconds that so many multiplications and additions of matrices take at the rate of a large square product.

    That is PyTorch's, on the threads in use, or on the CPU what the instruction does in registers, whichever is faster.
    """
    return flops / _products_per_second(dtype, torch.get_num_threads(), cpu.simd_level(), device)


def noise_floor(op: str, values: int, device: str = "cpu") -> tuple[float, str]:
    """Seconds that ``values`` values of noise take at best, and the limit that says so.

    On the CPU the limits are one core's integer multiplications and its instruction issue, times the threads that the
    kernels use; on a GPU the instruction issue of all multiprocessors at the highest clock.
    """
    if device == "cuda":
        return values * _GPU_INSTRUCTIONS[op] / _gpu_instructions_per_second(), "instruction issue"
    level = cpu.simd_level().removesuffix("_bf16")  # which makes noise as the level without it does
    multiplications, instructions = _core(level)
    floors = {"integer multiplications": values * _MULTIPLICATIONS / multiplications}
    if (op, level) in _INSTRUCTIONS:
        floors["instruction issue"] = values * _INSTRUCTIONS[op, level] / instructions
    limit = max(floors, key=lambda name: floors[name])
    # As csrc/cpu/tiles.h gives out threads: one for every 16,384 values.
    threads = max(1, min(torch.get_num_threads(), values // 16384))
    return floors[limit] / threads, limit


@functools.lru_cache(maxsize=1)
def _gpu_instructions_per_second() -> float:
    """Counted per thread, all multiprocessors of the current GPU together, at its highest clock."""
    query = ["nvidia-smi", "-i", "0", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    clock = 1e6 * float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count * _GPU_LANES * clock


@dataclass(frozen=True)
class Work:
    """The least that a computation must do, from which its floor follows.

    Attributes:
        nbytes: read and written.
        values: of noise made.
        products: operations in products of matrices and convolutions, at two for a multiplication and an addition.
        flops: all operations of the formula, an exponential or a root as one, without the making of noise.
        noise: the noise, "normal" or "uniform".
    """

    nbytes: int = 0
    values: int = 0
    products: int = 0
    flops: int = 0
    noise: str = "normal"


def floor(work: Work, dtype: torch.dtype, device: str = "cpu") -> tuple[float, str]:
    """Seconds that the work takes at best, the longest of what its parts do, and the name of the limit."""
    floors = [(memory_floor(work.nbytes, device), "memory")] if work.nbytes else []
    if work.values:
        floors.append(noise_floor(work.noise, work.values, device))
    if work.products:
        floors.append((matmul_floor(work.products, dtype, device), "products"))
    if not floors:
        raise ValueError("work must have bytes, values or products, got none")
    return max(floors)


def measured(device: str = "cpu") -> Limits:
    """The limits of this machine, on the threads in use or the current GPU."""
    beyond = _BEYOND_CACHE[device]
    threads = torch.get_num_threads()
    many = 1 << 24
    return Limits(
        copy_in_cache=copy_bandwidth(1 << 20 if device == "cpu" else beyond, threads, device),
        copy_beyond_cache=copy_bandwidth(beyond, threads, device),
        products={
            str(dtype).removeprefix("torch."): 1 / matmul_floor(1, dtype, device)
            for dtype in (torch.float32, torch.bfloat16)
        },
        normals=many / noise_floor("normal", many, device)[0],
    )
