"""What the kernels of diffusion become for a GPU, as ptx.py says it of the others. Run by test_ptx.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from ptx import compiling
from support import laid_out

from gencore import Key
from gencore.backends import triton as ops
from gencore.bench import cases


def launch_all(case: cases.Case, dtype: torch.dtype, where: str) -> None:
    """`where` the coefficients are: in a "launch", in "memory", or in memory by an "index"."""
    batch, channels, *rest = case.shape
    x = laid_out(torch.empty(case.shape, dtype=dtype), case)
    pair = laid_out(torch.empty((batch, 2 * channels, *rest), dtype=dtype), case)
    rows = {"launch": 1, "memory": batch, "index": 1000}[where]
    t, key = torch.zeros(batch, dtype=torch.int64) if where == "index" else None, Key(0).packed

    def table(columns: int, rows: int = rows) -> torch.Tensor:
        return torch.zeros(rows, columns, dtype=torch.float64)

    ops.add_noise(x, table(2), t, key, False)
    ops.add_noise(x, table(2), t, key, True)
    for output in (x, pair):
        loss = ops.denoising_loss(output, x, table(8), t, key)
        ops.denoising_loss_backward(loss, output, x, table(8), t, key)
    of_step = table(16, 1 if where == "launch" else batch)
    ops.diffusion_step(x, x, *[None] * 5, of_step, key)
    ops.diffusion_step(x, pair, pair, x, x, x, x, of_step, key, None, torch.empty_like(x))


def main(wanted: list[Any]) -> None:
    results = []
    for capability, case, dtype, where in wanted:
        with compiling(capability) as found:
            launch_all(cases.Case(**(case | {"shape": tuple(case["shape"])}), why=""), getattr(torch, dtype), where)
        results.append(found)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(json.load(sys.stdin))
