"""What the kernels become for GPUs: nothing is contracted that shall not be, and memory is accessed 16 bytes at a time."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)


class Variant(NamedTuple):
    capability: int
    shape: tuple[int, ...]
    layout: str
    dtype: str
    key: str

    @property
    def size(self) -> int:
        return {"float32": 4, "float64": 8}.get(self.dtype, 2)


LAYOUTS = [
    ((64, 16384), "contiguous"),
    ((128, 20), "contiguous"),
    ((7, 33), "contiguous"),
    ((8, 4, 64, 64), "channels_last"),
    ((2, 3, 9, 9), "channels_last"),
]
EVERY = [
    Variant(capability, *layout, dtype, key)
    for capability, layout, dtype, key in itertools.product(
        (80, 90), LAYOUTS, ("float32", "bfloat16", "float16", "float64"), ("words", "in memory", "rows")
    )
]
SOME = [
    Variant(80, *LAYOUTS[0], "bfloat16", "words"),
    Variant(90, *LAYOUTS[0], "float32", "words"),
    Variant(90, *LAYOUTS[1], "float16", "rows"),
    Variant(80, *LAYOUTS[2], "float32", "in memory"),
    Variant(90, *LAYOUTS[3], "bfloat16", "rows"),
    Variant(90, *LAYOUTS[4], "float64", "words"),
]


def compiled(variants: list[Variant], cache: Path) -> list[list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[3]
    paths = [str(root), str(root / "tests"), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(cache)}
    wanted = [(v.capability, {"shape": v.shape, "layout": v.layout}, v.dtype, v.key) for v in variants]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ptx.py"))],
        input=json.dumps(wanted), capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fused(found: dict[str, Any], variant: Variant) -> int:
    """The fused multiply-adds in float32 that a thread of this kernel shall have."""
    constants = found["constants"]
    elements = constants["A"] * constants["B"] * constants["ITEM"] // found["threads"]
    # 16 for two normals and 2 for the square root between them; blocks that straddle channels are made twice.
    noise = 9 * (2 if constants["PARTIAL"] else 1) * elements
    if found["kernel"] == "fill_kernel":
        return 0 if constants["UNIFORM"] else noise
    if variant.dtype == "float64":
        return noise
    # exp, one for each element of the result; the terms of kl or its gradient.
    if found["kernel"] == "forward_kernel":
        return noise + elements * (8 + 1 + (0 if "kl" in constants else 2))
    return noise + elements * (8 + 1 + (0 if "grad_kl" in constants else 3))


def check(found: dict[str, Any], variant: Variant) -> None:
    instructions, constants = found["instructions"], found["constants"]
    names = " ".join(instructions)
    assert not re.search(r"\b[ls][td]\.local", names)
    # Without .rn the assembler may contract; .ftz would lose subnormal numbers.
    assert not re.search(r"\b(add|sub|mul|fma)(\.ftz)?\.f(32|64)\b|\.(rn|rz|approx)\.ftz\.f64", names)
    assert not re.search(r"\b(add|sub|mul|fma|cvt|min|max)\S*\.ftz", names)
    if found["kernel"] == "sum_kernel":
        return
    assert instructions.get("fma.rn.f32", 0) == fused(found, variant)
    if variant.dtype != "float64":
        assert "fma.rn.f64" not in instructions
    blocks = constants["A"] * constants["B"] * constants["ITEM"] // 4 // found["threads"]
    blocks *= 2 if constants["PARTIAL"] else 1
    # What is the same for a whole tile is multiplied once, or in another way.
    assert 14 * blocks < sum(n for name, n in instructions.items() if re.match(r"mul\.wide\.[us]32", name))
    assert not any(name.startswith(("div.u64", "div.s64", "rem")) for name in instructions)

    whole = variant.shape[1] * (1 if len(variant.shape) > 2 else 1) % (16 // variant.size) == 0
    accesses = {name: n for name, n in instructions.items() if re.match(r"(ld|st)\.global", name)}
    if whole:
        vector = "v2.b64" if variant.size == 8 else "v4.b32"
        bytes_of_tile = constants["A"] * constants["B"] * constants["ITEM"] * variant.size
        expected = bytes_of_tile // 16 // found["threads"]
        tensors = {"fill_kernel": 1, "forward_kernel": 3}.get(found["kernel"])
        if tensors is None:
            tensors = 3 if "grad_kl" in constants else 5
        wide = sum(n for name, n in accesses.items() if name.endswith(vector))
        assert wide == tensors * expected, accesses
        if "channels" not in variant.layout and variant.size != 8 and found["constants"].get("kl", 0) is None:
            assert found["shared"] == 0


@pytest.fixture(scope="module")
def some(tmp_path_factory) -> list[list[dict[str, Any]]]:
    return compiled(SOME, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("number", range(len(SOME)), ids=[f"sm_{v.capability}-{v.dtype}-{v.layout}-{v.key}" for v in SOME])
def test_instructions(number, some):
    kernels = [found["kernel"] for found in some[number]]
    assert [kernel for kernel in kernels if kernel != "sum_kernel"] == [
        "fill_kernel", "fill_kernel", "forward_kernel", "forward_kernel", "backward_kernel", "backward_kernel",
    ]  # fmt: skip
    for found in some[number]:
        check(found, SOME[number])


@pytest.mark.slow
def test_instructions_of_every_variant(tmp_path):
    for variant, results in zip(EVERY, compiled(EVERY, tmp_path), strict=True):
        for found in results:
            check(found, variant)
