"""Three kernels at the sizes of models, for a profiler that is told where to look: profiled.py [--dry]."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import gencore  # noqa: E402
from gencore import Key, ops  # noqa: E402


def main(device: str, shrink: int) -> None:
    half = {"dtype": torch.bfloat16, "device": device}
    q, k, v = torch.randn(1, 8, 4096 // shrink, 3 * 64, **half).chunk(3, dim=-1)
    x = torch.randn(4, 320, 64 // shrink, 64, **half)
    out = torch.empty(64, 16, 256, 256 // shrink, **half)
    calls = (
        lambda: ops.attention(q, k, v),
        lambda: ops.group_norm(x, 32, activation="silu"),
        lambda: ops.normal(out.shape, Key(0), out=out),
    )
    with gencore.backend("cuda" if device == "cuda" else "cpu"):
        for call in calls:
            call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        for call in calls:
            call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*(("cpu", 16) if "--dry" in sys.argv else ("cuda", 1)))
