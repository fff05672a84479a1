"""Group norm's derivatives beyond the gradient by Triton's kernels, in several pieces and in every type."""

from __future__ import annotations

import pytest
import torch
from backends.test_group_norm_derivatives import TOLERANCE, assert_right, defined, derivatives, inputs
from kernels import running
from support import same_bits
from torch import Tensor

from gencore.bench.cases import Case

pytest.importorskip("triton")

from gencore.backends.triton import _group_norm_second as second


@pytest.fixture(name="kernels", params=["pieces", "pieces of several tiles"])
def in_pieces(request, monkeypatch):
    """Cut small tensors as large ones are cut."""
    enough = 2 if request.param == "pieces of several tiles" else 1024
    monkeypatch.setattr(second, "_LIMITS", second._LIMITS._replace(of_tile=64, enough=enough))
    monkeypatch.setattr(second, "_MERGED", 4)
    monkeypatch.setattr(second, "_SUMMED", (2, 2))
    with running("triton") as kernels:
        yield kernels


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 4, 9, 12), "", groups=2),
        Case((1, 10, 9, 5), "", groups=2, layout="channels_last"),
    ],
    ids=str,
)
def test_values_in_pieces(case, activation, kernels):
    given, direction, g = inputs(case, torch.float32, device=kernels.device)
    got = derivatives(case.groups, given, direction, g, activation)
    assert_right(got, defined(case.groups, given, direction, g, activation), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_values_in_other_types(dtype, kernels):
    case = Case((1, 6, 5, 8), "", groups=3, layout="channels_last")
    given, direction, g = inputs(case, dtype, device=kernels.device)
    assert_right(derivatives(3, given, direction, g), defined(3, given, direction, g), TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_do_not_depend_on_the_batch_or_on_addresses(layout, kernels):
    given, direction, g = inputs(Case((2, 4, 9, 8), "", groups=2, layout=layout), torch.float32, device=kernels.device)
    of_samples = (True, False, False, True, True, True)

    def moved(x: Tensor) -> Tensor:
        memory = torch.empty(x.numel() + 1, device=kernels.device)[1:]
        return torch.as_strided(memory, x.shape, x.stride(), 1).copy_(x)

    def part(tensors: list[Tensor]) -> list[Tensor]:
        return [moved(x[1:]) if cut else moved(x) for x, cut in zip(tensors, of_samples, strict=True)]

    whole = derivatives(2, given, direction, g)
    some = derivatives(2, part(given), part(direction), moved(g[1:]))
    for a, b, cut in zip(whole, some, (True, True, *of_samples), strict=True):
        assert not cut or same_bits(a[1:], b)
