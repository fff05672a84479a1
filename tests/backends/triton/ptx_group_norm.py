"""What the kernels of group norm become for a GPU, as ptx.py says it of the others. Run by test_ptx.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from ptx import compiling
from support import laid_out

from gencore.backends import triton as ops
from gencore.bench import cases


def launch_all(case: cases.Case, dtype: torch.dtype) -> None:
    x = laid_out(torch.empty(case.shape, dtype=dtype), case)
    # In a type of their own, so that accesses of the tensors can be told from theirs.
    of = torch.float64 if dtype == torch.float64 else torch.float32
    values = [torch.empty(shape, dtype=of) for shape in [x.shape[1:2]] * 2 + [x.shape[:2]] * 3]
    y, statistics = ops.group_norm(x, case.groups, *values, "silu", 1e-5)
    ops.group_norm_backward(y, x, statistics, case.groups, *values, "silu", [True] * 6)
    direction = (x, *values)
    ops.group_norm_jvp(x, statistics, case.groups, *values, *direction, "silu", 0.0)
    ops.group_norm_double_backward(y, x, statistics, case.groups, *values, *direction, "silu", [True] * 7, 0.0)


def main(wanted: list[Any]) -> None:
    results = []
    for capability, case, dtype in wanted:
        with compiling(capability) as found:
            launch_all(cases.Case(**(case | {"shape": tuple(case["shape"])}), why=""), getattr(torch, dtype))
        results.append(found)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(json.load(sys.stdin))
