"""What this machine can do at best, measured in the same run as what is held against it."""

from __future__ import annotations

import functools

import torch

from gencore.backends import cpu
from gencore.bench.measure import interleave

# Vector instructions per value of noise, counted in the code that GCC 12 makes of csrc/cpu/noise.h: 250 and 146 for the
# 64 values of a group at AVX-512, 296 and 184 for 32 at AVX2. Philox alone takes 20 multiplications per 4 values.
_INSTRUCTIONS = {
    ("normal", "avx512"): 250 / 64,
    ("uniform", "avx512"): 146 / 64,
    ("normal", "avx2"): 296 / 32,
    ("uniform", "avx2"): 184 / 32,
}
_MULTIPLICATIONS = 5.0
_LAST_LEVEL_CACHE = 32 << 20


@functools.lru_cache(maxsize=8)
def copy_bandwidth(nbytes: int, threads: int) -> float:
    """Bytes read and written per second by a copy that moves ``nbytes``, half of them in and half of them out."""
    source = torch.ones(max(nbytes // 2, 64), dtype=torch.uint8)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, rounds=15, round_seconds=0.01)["copy"]
    # The best round: a limit is what the machine does undisturbed.
    return 2 * source.numel() / min(timing.seconds)


@functools.lru_cache(maxsize=4)
def _core(level: str) -> tuple[float, float]:
    return cpu.multiplications_per_second(), cpu.vector_instructions_per_second()


def memory_floor(nbytes: int) -> float:
    """Seconds that moving ``nbytes`` takes at the copy bandwidth of a working set of that size.

    Beyond the last-level cache the bandwidth no longer depends on the size, and below a megabyte what is measured would
    be the call of the copy, so the size is held between the two.
    """
    size = min(max(1 << (nbytes - 1).bit_length(), 1 << 20), 2 * _LAST_LEVEL_CACHE)
    return nbytes / copy_bandwidth(size, torch.get_num_threads())


def noise_floor(op: str, values: int) -> tuple[float, str]:
    """Seconds that ``values`` values of noise take at best, and the limit that says so.

    The limits are one core's integer multiplications and its instruction issue, times the threads that the kernels use.
    """
    level = cpu.simd_level()
    multiplications, instructions = _core(level)
    floors = {"integer multiplications": values * _MULTIPLICATIONS / multiplications}
    if (op, level) in _INSTRUCTIONS:
        floors["instruction issue"] = values * _INSTRUCTIONS[op, level] / instructions
    limit = max(floors, key=lambda name: floors[name])
    # As csrc/cpu/tiles.h gives out threads: one for every 16,384 values.
    threads = max(1, min(torch.get_num_threads(), values // 16384))
    return floors[limit] / threads, limit
