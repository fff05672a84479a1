"""Compiles the kernels for a GPU that need not be there, and says as JSON what instructions they became.

Run by test_ptx.py in a process of its own, because there Triton must compile what it interprets in the tests' process.
Whatever the ops launch, on tensors on the CPU whose values do not matter, is compiled instead of launched.
"""

from __future__ import annotations

import collections
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from support import laid_out
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gencore import Key
from gencore.backends import triton as ops
from gencore.backends.triton import _fill, reparameterize
from gencore.backends.triton._tiles import halves
from gencore.bench import cases

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
TYPES |= {torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}
INSTRUCTION = re.compile(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)", re.MULTILINE)


def compile_for(capability: int, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    values = dict(zip((p.name for p in kernel.params), args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            # What is specialized on values would be compiled anew for a new seed or shape.
            assert parameter.do_not_specialize, parameter.name
            signature[parameter.name] = parameter.annotation_type
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=values)
    return {
        "kernel": kernel.__name__,
        "constants": {kernel.params[i].name: value for (i,), value in constants.items()},
        "threads": 32 * compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "stack": stack_of(compiled.asm["cubin"]),
        "instructions": collections.Counter(INSTRUCTION.findall(compiled.asm["ptx"])),
    }


def stack_of(cubin: bytes) -> int:
    """The bytes of a thread's stack: what did not fit into its registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1])


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[dict[str, Any]]]:
    """Launches compile instead; the list gets what they became."""
    found: list[dict[str, Any]] = []

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        found.append(compile_for(capability, kernel, args, options))

    with mock.patch.object(triton.JITFunction, "run", run):
        yield found


def key_in_memory(key: torch.Tensor, tensor: torch.Tensor) -> tuple[Any, ...]:
    return halves(key), 0, 0, 0, key.dim() == 2


def launch_all(case: cases.Case, dtype: torch.dtype, key: str) -> None:
    mu = laid_out(torch.empty(case.shape, dtype=dtype), case)
    packed = (Key(torch.zeros(case.shape[0], dtype=torch.int64)) if key == "rows" else Key(0)).packed
    with contextlib.ExitStack() as stack:
        if key == "in memory":
            for module in (_fill, sys.modules[reparameterize.__module__]):
                stack.enter_context(mock.patch.object(module, "key_arguments", key_in_memory))
        ops.normal_(mu, packed)
        ops.uniform_(mu, packed)
        ops.reparameterize(mu, mu, packed)
        z, kl = ops.reparameterize_kl(mu, mu, packed, case.draws)
        ops.reparameterize_backward(z, None, None, mu, packed, case.draws, False)
        ops.reparameterize_backward(z, kl, mu, mu, packed, case.draws, True)


def main(wanted: list[Any]) -> None:
    results = []
    for capability, case, dtype, key in wanted:
        with compiling(capability) as found:
            launch_all(cases.Case(tuple(case["shape"]), "", layout=case["layout"]), getattr(torch, dtype), key)
        results.append(found)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(json.load(sys.stdin))
