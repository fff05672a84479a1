"""What the kernels become for GPUs: nothing is contracted that shall not be, memory is accessed 16 bytes at a time."""

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

    def __str__(self) -> str:
        return "-".join(("x".join(map(str, self.shape)), self.layout, self.dtype, self.key, f"sm_{self.capability}"))

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
DTYPES = ("float32", "bfloat16", "float16", "float64")
KEYS = ("words", "in memory", "rows")
# Every layout with every type; what reads the key is apart from both.
EVERY = [
    Variant(capability, *layout, dtype, KEYS[number % len(KEYS)])
    for capability in (80, 90)
    for number, (layout, dtype) in enumerate(itertools.product(LAYOUTS, DTYPES), start=capability)
]
SOME = [Variant(80, *LAYOUTS[0], "bfloat16", "words"), Variant(90, *LAYOUTS[3], "float32", "rows")]


def compiled(variants: list[Variant], cache: Path) -> list[list[dict[str, Any]]]:
    wanted = [(v.capability, {"shape": v.shape, "layout": v.layout}, v.dtype, v.key) for v in variants]
    return run("ptx.py", wanted, cache)


def run(script: str, wanted: list[Any], cache: Path) -> list[list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[3]
    paths = [str(root), str(root / "tests"), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
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
    # exp, z or the sum over draws, and the terms of kl or of its gradient. What a kernel is not given is a constant.
    if found["kernel"] == "forward_kernel":
        return noise + elements * (8 + 1 + (0 if "kl" in constants else 2))
    return noise + elements * (8 + 1 + (0 if "grad_kl" in constants else 3))


def check_names(instructions: dict[str, int]) -> None:
    names = " ".join(instructions)
    assert "local" not in names, "a local array is in memory"
    # Without .rn the assembler may contract; .ftz would lose subnormal numbers.
    assert not re.search(r"\b(add|sub|mul|fma)(\.ftz)?\.f(32|64)\b", names)
    assert not re.search(r"\b(add|sub|mul|fma|cvt|min|max)\S*\.ftz", names)
    assert not re.search(r"\b(div|rem)\.[us]64", names)


def check(found: dict[str, Any], variant: Variant) -> None:
    instructions, constants, kernel = found["instructions"], found["constants"], found["kernel"]
    check_names(instructions)
    if kernel == "sum_kernel":
        return
    assert instructions.get("fma.rn.f32", 0) == fused(found, variant)
    if variant.dtype != "float64":
        assert "fma.rn.f64" not in instructions
    elements = constants["A"] * constants["B"] * constants["ITEM"] // found["threads"]
    # 64-bit products of 32-bit numbers, two in each of a block's ten rounds. The compiler finds other ways for a few of
    # them, for the first round's and the last; were they all products of 64-bit numbers, they would cost twice as much.
    products = sum(n for name, n in instructions.items() if name.startswith("mul.wide."))
    assert products >= 14 * elements // 4 * (2 if constants["PARTIAL"] else 1), instructions

    width = variant.shape[1]
    if width * variant.size % 16 == 0:
        tensors = {"fill_kernel": 1, "forward_kernel": 3, "backward_kernel": 3 if "grad_kl" in constants else 5}[kernel]
        vector = "v2.b64" if variant.size == 8 else "v4.b32"
        accesses = {name: n for name, n in instructions.items() if re.match(r"(ld|st)\.global", name)}
        wide = sum(n for name, n in accesses.items() if name.endswith(vector))
        assert wide == tensors * elements * variant.size // 16, accesses
        if variant.layout == "contiguous" and variant.size < 8 and (kernel != "forward_kernel" or "kl" in constants):
            # The noise is made by the threads that want it.
            assert found["shared"] == 0


@pytest.fixture(scope="module")
def some(tmp_path_factory) -> dict[Variant, list[dict[str, Any]]]:
    return dict(zip(SOME, compiled(SOME, tmp_path_factory.mktemp("triton")), strict=True))


@pytest.mark.parametrize("variant", SOME, ids=str)
def test_instructions(variant, some):
    kernels = [found["kernel"] for found in some[variant]]
    assert [kernel for kernel in kernels if kernel != "sum_kernel"] == [
        "fill_kernel", "fill_kernel", "forward_kernel", "forward_kernel", "backward_kernel", "backward_kernel",
    ]  # fmt: skip
    for found in some[variant]:
        check(found, variant)


@pytest.mark.slow
def test_instructions_of_every_variant(tmp_path):
    for variant, results in zip(EVERY, compiled(EVERY, tmp_path), strict=True):
        for found in results:
            check(found, variant)


# Groups in a few pieces, in many pieces of several tiles, whole groups; each in both formats.
GROUP_NORM = [
    (90, {"shape": (4, 320, 64, 64), "groups": 32}, "bfloat16"),
    (90, {"shape": (4, 320, 64, 64), "groups": 32, "layout": "channels_last"}, "float16"),
    (80, {"shape": (1, 256, 256, 256), "groups": 32}, "float32"),
    (90, {"shape": (1, 128, 256, 256), "groups": 1, "layout": "channels_last"}, "bfloat16"),
    (90, {"shape": (1, 64, 8, 8), "groups": 4}, "float32"),
    (80, {"shape": (1, 512, 8, 8), "groups": 8, "layout": "channels_last"}, "bfloat16"),
    (90, {"shape": (1, 64, 40, 40), "groups": 2, "layout": "channels_last"}, "float64"),
]
# How many accesses to tensors each has of each element; one for the first tile of a piece, one for those that follow.
TENSORS = {
    "group_kernel": 2, "pieces_kernel": 1, "apply_kernel": 2, "group_backward_kernel": 3, "pieces_backward_kernel": 2,
    "apply_backward_kernel": 3, "pieces_second_kernel": 2, "apply_second_kernel": 3,
}  # fmt: skip


def test_instructions_of_group_norm(tmp_path):
    seen = set()
    for (_, case, dtype), results in zip(GROUP_NORM, run("ptx_group_norm.py", GROUP_NORM, tmp_path), strict=True):
        size = {"float32": 4, "float64": 8}.get(dtype, 2)
        for found in results:
            instructions, constants, kernel = found["instructions"], found["constants"], found["kernel"]
            seen.add(kernel)
            check_names(instructions)
            if dtype != "float64":
                assert "fma.rn.f64" not in instructions
            if kernel not in TENSORS:
                continue
            elements = constants["A"] * constants["B"] // found["threads"]
            accesses = {name: n for name, n in instructions.items() if re.match(r"(ld|st)\.global", name)}
            wide = sum(n for name, n in accesses.items() if re.search(r"v4\.b32|v2\.b64", name))
            tensors = TENSORS[kernel] + (kernel == "pieces_kernel" and constants["ROUNDS"] > 1)
            assert wide >= tensors * elements * size // 16, (kernel, case, accesses)
            if size == 2:
                assert not any(name.endswith("b16") for name in accesses), (kernel, case, accesses)
    assert seen == {*TENSORS, "merge_kernel", "merge_backward_kernel", "merge_second_kernel", "samples_kernel"}


# Rows of several tiles, several rows in a tile, both formats; where the coefficients are.
DIFFUSION = [
    (90, {"shape": (64, 4, 2, 2)}, "float16", "memory"),
    (80, {"shape": (4, 8, 16, 16), "layout": "channels_last"}, "bfloat16", "launch"),
]
EVERY_DIFFUSION = [
    *DIFFUSION,
    (90, {"shape": (8, 4, 32, 32)}, "float32", "launch"),
    (80, {"shape": (8, 4, 32, 32)}, "bfloat16", "index"),
    (90, {"shape": (4, 4, 16, 16), "layout": "channels_last"}, "float64", "index"),
]


@pytest.mark.parametrize(
    "variants", [DIFFUSION, pytest.param(EVERY_DIFFUSION, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_instructions_of_diffusion(variants, tmp_path):
    for (_, case, dtype, _), results in zip(variants, run("ptx_diffusion.py", variants, tmp_path), strict=True):
        size = {"float32": 4, "float64": 8}.get(dtype, 2)
        kernels = [found["kernel"] for found in results if found["kernel"] != "mean_kernel"]
        losses = ["loss_kernel", "loss_backward_kernel"] * 2
        assert kernels == ["add_noise_kernel"] * 2 + losses + ["step_kernel"] * 2
        for found in results:
            instructions, constants, kernel = found["instructions"], found["constants"], found["kernel"]
            check_names(instructions)
            if kernel == "mean_kernel":
                continue
            learned = constants.get("LEARNED", False)
            if dtype != "float64" and kernel in ("add_noise_kernel", "step_kernel"):
                assert "fma.rn.f64" not in instructions
            elements = constants["A"] * constants["B"] * constants["ITEM"] // found["threads"]
            # What is read and written of each element; with the halves of an output, and each optional tensor.
            tensors = {
                "add_noise_kernel": 2 if "eps" in constants else 3,
                "loss_kernel": 3 if learned else 2,
                "loss_backward_kernel": 5 if learned else 3,
                "step_kernel": 10 if learned else 3,
            }[kernel]
            vector = "v2.b64" if size == 8 else "v4.b32"
            accesses = {name: n for name, n in instructions.items() if re.match(r"(ld|st)\.global", name)}
            wide = sum(n for name, n in accesses.items() if name.endswith(vector))
            assert wide == tensors * elements * size // 16, (kernel, case, accesses)
            # The noise is made by the threads that want it, also behind a branch.
            if constants["A"] == 1 and size < 8 and kernel != "loss_kernel":
                assert found["shared"] == 0


# Heads in two powers of two, and in chunks; tensor cores that read shared memory, and that read registers.
ATTENTION = [(90, 40, "contiguous", "bfloat16"), (80, 256, "channels_last", "float16")]
_SIZES = (1, 8, 32, 40, 64, 80, 96, 128, 160, 192, 256, 320, 512, 1024)
EVERY_ATTENTION = [
    (capability, size, ("contiguous", "channels_last")[(number + capability // 10) % 2], dtype)
    for dtype, sizes in (("bfloat16", _SIZES), ("float16", (40, 160)), ("float32", (20, 160)), ("float64", (20, 160)))
    for capability in (80, 90)
    for number, size in enumerate(sizes)
]
MULTIPLY = {"float32": "fma.rn.f32", "float64": "mma.sync"}


def check_attention(found: dict[str, Any], capability: int, size: int, layout: str, dtype: str) -> None:
    instructions, kernel = found["instructions"], found["kernel"]
    why = (kernel, capability, size, layout, dtype, found["stack"], found["shared"], instructions)
    # The logarithm, of a number of 1 or more, knows no subnormal numbers.
    has_logarithm = kernel in ("attention_kernel", "general_attention_kernel")
    check_names({name: n for name, n in instructions.items() if not has_logarithm or ".ftz" not in name})
    # Where there are no warpgroups, GPUs with 99 KiB are served too.
    assert found["shared"] <= (227 if capability == 90 else 99) << 10, why
    # A few registers too many, of 255 times 4 bytes, which are then read again from the cache.
    assert found["stack"] <= 256, why
    name = MULTIPLY.get(dtype, "wgmma.mma_async" if capability == 90 else "mma.sync")
    if kernel != "delta_kernel":
        assert any(instruction.startswith(name) for instruction in instructions), why
    if size >= 8:
        # 16 bytes at a time, tensors as well as the way through shared memory.
        accesses = {name: n for name, n in instructions.items() if name.startswith("ld.global")}
        # The end of a sample's keys is read one by one where they lie side by side.
        has_lengths = "general" in kernel and "lengths" not in found["constants"]
        assert has_lengths or not any(name.endswith(("b16", "u16")) for name in accesses), why
        wide = sum(n for name, n in accesses.items() if name.endswith(("v4.b32", "v2.b64")))
        # With options the gradient of keys takes every tile of queries as if it were the last, which may end anywhere.
        of_keys = kernel in ("general_keys_kernel", "general_second_keys_kernel")
        assert wide > 0 or (of_keys and layout == "contiguous"), why


def test_instructions_of_attention(tmp_path):
    kernels = {"attention_kernel", "delta_kernel", "keys_kernel", "queries_kernel"}
    kernels |= {"tangent_kernel", "second_keys_kernel", "second_queries_kernel"}
    kernels |= {"general_attention_kernel", "general_keys_kernel", "general_queries_kernel", "general_mask_kernel"}
    kernels |= {"general_tangent_kernel", "general_second_keys_kernel", "general_second_queries_kernel"}
    for variant, results in zip(ATTENTION, run("ptx_attention.py", ATTENTION, tmp_path), strict=True):
        assert {found["kernel"] for found in results} == kernels
        for found in results:
            check_attention(found, *variant)


@pytest.mark.slow
def test_instructions_of_every_attention(tmp_path):
    for variant, results in zip(EVERY_ATTENTION, run("ptx_attention.py", EVERY_ATTENTION, tmp_path), strict=True):
        for found in results:
            check_attention(found, *variant)
