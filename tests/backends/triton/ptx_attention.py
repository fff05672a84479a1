"""What the kernels of attention become for a GPU, as ptx.py says it of the others. Run by test_ptx.py."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any
from unittest import mock

import torch
from ptx import compiling

from gencore import Key
from gencore.backends import triton as ops

NAMES = (
    "attention_backward",
    "attention_tangent",
    "attention_double_backward",
    "general_attention",
    "general_attention_backward",
    "general_attention_tangent",
    "general_attention_double_backward",
)
KEY = Key(0).packed


def launch_all(size: int, layout: str, dtype: torch.dtype, warpgroups: bool) -> None:
    shape = (2, 2, size, 256) if layout == "contiguous" else (2, 2, 256, size)
    x = torch.empty(shape, dtype=dtype)
    if layout == "contiguous":
        x = x.transpose(2, 3)
    with contextlib.ExitStack() as stack:
        for name in ("attention", *(f"_{name}" for name in NAMES)):
            module = sys.modules[f"gencore.backends.triton.{name}"]
            stack.enter_context(mock.patch.object(module, "has_warpgroups", return_value=warpgroups))
        out, lse = ops.attention(x, x, x, 0.1)
        ops.attention_backward(x, x, x, x, out, lse, 0.1, [True] * 3)
        ops.attention_jvp(x, x, x, x, lse, x, x, x, 0.1)
        ops.attention_double_backward(x, x, x, x, x, lse, x, x, x, 0.1, [True] * 4)
        lengths, mask = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, 256, 256)
        causal = (None, lengths, None, 0.1, True, 0.0)
        for given in (causal, (mask, None, None, 0.1, False, 0.0), (None, None, KEY, 0.1, False, 0.1)):
            out, lse = ops.general_attention(x, x[:, :1], x[:, :1], *given)
            ops.general_attention_backward(x, x, x[:, :1], x[:, :1], out, lse, *given, [True] * 3)
            if given[0] is not None:
                ops.general_attention_mask_backward(
                    x, x, x[:, :1], x[:, :1], out, lse, *given, [False, False, False, True]
                )
        # All that takes registers.
        given = (mask, lengths, KEY, 0.1, True, 0.1)
        heads = (x, x[:, :1], x[:, :1])
        ops.general_attention_jvp(*heads, x, lse, *heads, *given)
        ops.general_attention_double_backward(x, *heads, x, lse, *heads, *given, [True] * 4)


def main(wanted: list[Any]) -> None:
    results = []
    for capability, size, layout, dtype in wanted:
        with compiling(capability) as found:
            launch_all(size, layout, getattr(torch, dtype), capability // 10 in (9, 10))
        results.append(found)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(json.load(sys.stdin))
