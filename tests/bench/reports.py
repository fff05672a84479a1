"""A small report, as a run might leave it: peers that fail, disagree, win or were not measured; no-number figures."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from gencore.bench.results import OURS, Candidate, Limits, Report, Result

HOSTILE = "<script>alert('x & y')</script>"
LIMITS = Limits(
    copy_in_cache=210e9,
    copy_beyond_cache=31.5e9,
    products={"float32": 290e9, "bfloat16": 1180e9},
    normals=2.2e9,
)


def ours(seconds: float | None = 1e-3, **others: Any) -> Candidate:
    """Our figures; the interval is 2% to either side."""
    interval = None if seconds is None else (seconds * 0.98, seconds * 1.02)
    told: dict[str, Any] = {
        "interval": interval, "ratio": 1.0, "ratio_interval": (1.0, 1.0),
        "peak_bytes": 1 << 20, "call_seconds": 3.1e-6, "error": 2e-7,
    }  # fmt: skip
    return Candidate(OURS, seconds, **told | others)


def peer(name: str, ratio: float, seconds: float = 1e-3, spread: float = 0.05, **others: Any) -> Candidate:
    """A peer that takes ``ratio`` times as long as ``seconds``, known to ``spread`` to either side."""
    told: dict[str, Any] = {
        "seconds": seconds * ratio,
        "interval": (seconds * ratio * (1 - spread), seconds * ratio * (1 + spread)),
        "ratio": ratio, "ratio_interval": (ratio * (1 - spread), ratio * (1 + spread)),
        "peak_bytes": 3 << 20, "call_seconds": 9.7e-6, "error": 4e-7,
    }  # fmt: skip
    if name.startswith("compile"):
        told["compile_seconds"] = 7.4
    return Candidate(name, **told | others)


def failed(name: str, failure: str = "RuntimeError: not implemented for 'Half'") -> Candidate:
    return Candidate(name, failure=failure)


def result(op: str, benchmark: str, case: str, *candidates: Candidate, **others: Any) -> Result:
    """A result in section ops, float32, bound by memory; ``others`` are fields of it."""
    told: dict[str, Any] = {
        "section": "ops", "why": "latents of Stable Diffusion", "presets": ("sd15",), "dtype": "float32",
        "nbytes": 8 << 20, "flops": 4 << 20, "floor_seconds": 4e-4, "limit": "memory", "tolerance": 1e-5,
    }  # fmt: skip
    return Result(op=op, benchmark=benchmark, case=case, candidates=candidates, **told | others)


def _results() -> tuple[Result, ...]:
    latents = "64x4x64x64"
    bfloat16: dict[str, Any] = {"dtype": "bfloat16", "tolerance": 1e-2, "nbytes": 4 << 20}
    attention: dict[str, Any] = {"flops": int(6e9), "nbytes": 42 << 20, "limit": "products", "floor_seconds": 21e-3}
    return (
        # Clear wins, one of them with a peer that cannot run.
        result(
            "normal", "into a tensor", latents, ours(3.1e-4), peer("eager", 14.3, 3.1e-4), peer("compile", 52, 3.1e-4),
            flops=0, limit="instruction issue", floor_seconds=1.3e-4,
        ),
        result(
            "normal", "into a tensor", f"{latents}-channels_last", ours(5.7e-4), peer("eager", 42.9, 5.7e-4),
            failed("compile", "BackendCompilerFailed: a generator cannot be traced"),
            flops=0, limit="instruction issue", floor_seconds=1.3e-4,
        ),
        # Even: the interval holds 1.
        result(
            "normal", "into a tensor", "128x20",
            ours(1.2e-5), peer("eager", 1.02, 1.2e-5), peer("compile", 2.5, 1.2e-5),
            why="latents of a small VAE", presets=("vae",), flops=0, nbytes=10240, floor_seconds=6e-7,
        ),
        # The fastest peer computes something else.
        result(
            "group_norm", "forward", "4x320x64x64-32groups", ours(1.4e-3), peer("eager", 2.9, 1.4e-3),
            peer("compile", 1.6, 1.4e-3), peer("Liger-Kernel", 0.71, 1.4e-3, error=0.4),
            flops=42 << 20, nbytes=42 << 20, floor_seconds=1.3e-3,
        ),
        result(
            "group_norm", "forward", "4x320x64x64-32groups", ours(8.1e-4), peer("eager", 4.1, 8.1e-4),
            peer("compile", 2.2, 8.1e-4), **bfloat16 | {"flops": 42 << 20, "nbytes": 21 << 20, "floor_seconds": 6.7e-4},
        ),
        # A loss; there is one more below, and an even case beside it.
        result(
            "group_norm", "forward and backward", "1x32x4x4-32groups", ours(4.4e-5),
            peer("eager", 0.82, 4.4e-5), peer("compile", 1.9, 4.4e-5),
            why="the least that is timed", flops=2048, nbytes=4096, floor_seconds=4e-8, limit="memory",
        ),
        result(
            "attention", "forward", "4x8x1024x1024x40-heads", ours(2.9e-2), peer("eager", 1.4, 2.9e-2),
            peer("eager, copies first", 1.2, 2.9e-2), peer("compile", 1.35, 2.9e-2), **attention,
        ),
        result(
            "attention", "forward", "4x8x1024x1024x40-heads", ours(1.1e-2), peer("eager", 0.93, 1.1e-2, 0.02),
            peer("compile", 0.97, 1.1e-2, 0.06),
            **bfloat16 | attention | {"nbytes": 21 << 20, "floor_seconds": 5.1e-3},
        ),
        # Nothing to hold it against; and a figure that is no number, beside names that a page must not take for markup.
        result("add_noise", "forward", "16x3x256x256", ours(2e-3), floor_seconds=None, limit="", tolerance=None),
        result(
            HOSTILE, "forward", "case & \"quotes\"", ours(None, ratio=None, ratio_interval=None, error=math.nan),
            peer("eager", math.inf, ratio_interval=(math.nan, math.inf), seconds=math.nan), failed("compile", HOSTILE),
            Candidate("never measured"), why=HOSTILE, presets=(), floor_seconds=math.nan,
        ),
        result(
            "unet", "forward", "Stable Diffusion, 64x64 latents, 2 blocks", ours(0.41, peak_bytes=210 << 20),
            peer("eager", 1.3, 0.41, peak_bytes=380 << 20), peer("diffusers", 1.36, 0.41, peak_bytes=390 << 20),
            section="networks", flops=int(9e10), nbytes=400 << 20, floor_seconds=0.31, limit="products",
        ),
        result(
            "ddpm", "training step", "MNIST, 28x28",
            ours(0.098), peer("eager", 1.12, 0.098), peer("compile", 1.03, 0.098),
            section="end to end", flops=0, nbytes=0, floor_seconds=None, limit="", tolerance=None,
        ),
    )  # fmt: skip


def report(**others: Any) -> Report:
    """The report; ``others`` are fields of it."""
    told: dict[str, Any] = {
        "date": "2026-11-21T18:02:11+00:00",
        "commit": "v0.1.0-84-ga349dde",
        "machine": {"name": "AMD EPYC 9575F", "device": "cpu", "threads": 2, "simd_level": "avx512"},
        "versions": {"gencore": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "diffusers": "0.36.0"},
        "settings": {"rounds": 21, "quick": False},
        "limits": LIMITS,
        "results": _results(),
    }
    return Report(**told | others)


def large(results: int = 300) -> Report:
    """The same with so many results, each with a name of its own."""
    plain = [one for one in _results() if one.op != HOSTILE]
    return report(
        results=tuple(
            dataclasses.replace(plain[i % len(plain)], case=f"{plain[i % len(plain)].case}-{i}") for i in range(results)
        )
    )


def single() -> Report:
    """A report of one result."""
    return report(results=_results()[:1])
