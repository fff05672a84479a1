"""The noise of the Triton kernels, bit for bit; what tests/ops holds for every backend is not repeated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import same_bits

from gencore import Key, noise
from gencore.bench import cases

pytest.importorskip("triton")

import triton
import triton.language as tl

from gencore.backends import triton as kernels
from gencore.backends.triton import _fill, _tiles
from gencore.backends.triton.noise import square_root

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = cases.small(cases.NOISE)
KEY = Key(-3).stream(2**32 - 1).samples(2**33 + 5)


@triton.jit
def square_root_kernel(x, out, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + i, square_root(tl.load(x + i)))


def drawn(op: str, case: cases.Case, key: Key, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full(case.shape, 9.0, dtype=dtype, device=DEVICE).to(memory_format=case.memory_format)
    getattr(kernels, op)(out, key.packed)
    return out


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_bits_of_the_reference(case):
    for key in (KEY, Key(torch.arange(case.shape[0]) - 2)):
        assert same_bits(drawn("normal_", case, key), torch.from_numpy(noise.reference_normal(case.shape, key)))
    uniforms = torch.from_numpy(noise.reference_uniform(case.shape, KEY))
    assert same_bits(drawn("uniform_", case, KEY), uniforms)


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
@pytest.mark.parametrize("op", ["normal", "uniform"])
def test_other_types_hold_the_values_rounded(dtype, op):
    shapes = [cases.Case((3, 1021), ""), cases.Case((5, 24), ""), cases.Case((2, 4, 9, 9), "", layout="channels_last")]
    for case in shapes:
        want = torch.from_numpy(getattr(noise, f"reference_{op}")(case.shape, KEY)).to(dtype)
        assert same_bits(drawn(f"{op}_", case, KEY, dtype), want)


@pytest.mark.parametrize("elements", [1, 3, 4, 7, 8, 12, 100, 1023, 1025, 1300])
def test_rows_of_any_length(elements):
    case = cases.Case((3, elements), "")
    assert same_bits(drawn("normal_", case, KEY), torch.from_numpy(noise.reference_normal(case.shape, KEY)))


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_nothing_else_is_written(offset):
    memory = torch.full((400,), 9.0, device=DEVICE)
    out = memory[offset : offset + 99].view(3, 33)
    kernels.normal_(out, KEY.packed)
    assert same_bits(out, torch.from_numpy(noise.reference_normal((3, 33), KEY)))
    assert bool((torch.cat((memory[:offset], memory[offset + 99 :])) == 9).all())


def test_out_of_any_strides():
    out = torch.empty(6, 4, 5, device=DEVICE).transpose(0, 1)
    version = out._version
    kernels.normal_(out, KEY.packed)
    assert same_bits(out, torch.from_numpy(noise.reference_normal((4, 6, 5), KEY)))
    assert out._version > version


def test_key_in_the_memory_of_the_device(monkeypatch):
    def key_arguments(key: torch.Tensor, tensor: torch.Tensor) -> tuple:
        return _tiles.halves(key.to(tensor.device)), 0, 0, 0, False

    monkeypatch.setattr(_fill, "key_arguments", key_arguments)
    for seed in (Key(5), KEY):
        want = torch.from_numpy(noise.reference_normal((4, 9), seed))
        assert same_bits(drawn("normal_", cases.Case((4, 9), ""), seed), want)


def test_keys_of_strided_memory():
    rows = torch.tensor([[1, 2, 3], [4, 5, 6]]).t().contiguous().t()
    key = Key(torch.zeros(2, dtype=torch.int64))
    object.__setattr__(key, "packed", rows)
    assert same_bits(
        drawn("normal_", cases.Case((2, 9), ""), key), torch.from_numpy(noise.reference_normal((2, 9), key))
    )


@pytest.mark.parametrize("rows", [1, 3, 70_000, 1 << 33])
@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("pixels", [1, 7, 20, 1000, 1501, 1 << 12, (1 << 24) - 1])
@pytest.mark.parametrize("channels", [0, 3, 64, 1000])
def test_tiles_cover_every_element(rows, element_size, pixels, channels):
    elements = pixels * max(channels, 1)
    work = _tiles.cut(rows, elements, channels, element_size)
    c = work.constants
    assert work.height * work.width * c["UNIT"] == elements
    (x, y, z), tile = work.grid, c["A"] * c["B"] * c["ITEM"]
    assert x < 1 << 31
    assert max(y, z) < 1 << 16 or rows > 1 << 31
    if channels:
        assert x == -(-pixels // (c["A"] * c["ITEM"])) * -(-channels // c["B"])
        assert c["PARTIAL"] == (pixels % 4 != 0)
    else:
        assert (x - 1) * c["B"] * c["ITEM"] < elements <= x * c["B"] * c["ITEM"]
    rows_per_tile = 1 if channels else c["A"]
    assert rows <= y * z * rows_per_tile < rows + rows_per_tile + z * rows_per_tile
    assert np.log2([tile, c["A"], c["B"], c["num_warps"]]) % 1 == pytest.approx(0)
    assert tile <= 1024
    # The cut of a row is the same in every batch.
    assert c == _tiles.cut(1, elements, channels, element_size).constants


def test_square_root_of_every_mantissa():
    bits = torch.arange(0x3F800000, 0x3F800000 + (1 << 24), dtype=torch.int32)
    # The interpreter is as fast as NumPy if its blocks are large; a GPU has registers for small ones.
    size = 1024 if DEVICE == "cuda" else 1 << 20
    x = bits.view(torch.float32).to(DEVICE)
    root = torch.empty_like(x)
    square_root_kernel[(len(x) // size,)](x, root, SIZE=size, enable_fp_fusion=False)
    # PyTorch's own root in float32 is not correctly rounded on every CPU. Rounding twice does no harm to a root.
    want = torch.from_numpy(np.sqrt(x.cpu().numpy().astype(np.float64)).astype(np.float32))
    assert same_bits(root, want)
    zero = torch.zeros(1, device=DEVICE)
    square_root_kernel[(1,)](zero, root, SIZE=1, enable_fp_fusion=False)
    assert same_bits(root[:1], zero)
