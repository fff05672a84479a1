"""Fused sampling by Triton's kernels: the bits of the CPU kernels. tests/ops holds both to the definition."""

from __future__ import annotations

import pytest
import torch
from support import laid_out, same_bits

from gencore import Key
from gencore.backends import cpu
from gencore.bench import cases

pytest.importorskip("triton")

from gencore.backends import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = Key(7).stream(3).samples(2**32 - 1)
KL_TOLERANCE = {torch.float64: 1e-13}
CASES = cases.small(cases.REPARAMETERIZE)
# One large case in each other type: the interpreter has no time for all of them in all types.
LARGE = {
    torch.bfloat16: cases.Case((2, 5003), ""),
    torch.float16: cases.Case((1, 1100, 3, 3), "", layout="channels_last"),
    torch.float64: cases.Case((16, 1 << 10), ""),
}


def inputs(case: cases.Case, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(case.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [laid_out(x.to(dtype), case) for x in drawn]


def on(device: str, *args):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]


def assert_same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.stride() == b.stride()
        # The exponential in float64 is another library's: the GPU's, or NumPy's.
        if a.dtype == torch.float64:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-13, atol=1e-13)
        else:
            assert same_bits(a, b)


def check(case: cases.Case, dtype: torch.dtype, key: Key) -> None:
    mu, logvar = inputs(case, dtype)
    packed = key.packed
    z, kl = kernels.reparameterize_kl(*on(DEVICE, mu, logvar), packed, case.draws)
    want_z, want_kl = cpu.ops.reparameterize_kl(mu, logvar, packed, case.draws)
    assert_same([z], [want_z])
    # The order of its sums is another one.
    torch.testing.assert_close(
        kl.cpu(), want_kl, rtol=KL_TOLERANCE.get(dtype, 2e-6), atol=KL_TOLERANCE.get(dtype, 2e-6)
    )
    args = (want_z, want_kl, mu, logvar, packed, case.draws, True)
    assert_same(kernels.reparameterize_backward(*on(DEVICE, *args)), cpu.ops.reparameterize_backward(*args))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_the_cpu_kernels(case):
    check(case, torch.float32, KEY)


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
def test_bits_of_the_cpu_kernels_in_other_types(dtype):
    check(cases.Case((3, 1101), "", draws=2), dtype, Key(torch.arange(3)))
    check(cases.Case((4, 24), ""), dtype, KEY)
    check(cases.Case((2, 5, 6, 6), "", layout="channels_last", draws=2), dtype, KEY)


@pytest.mark.parametrize(("dtype", "case"), LARGE.items(), ids=str)
def test_bits_of_the_cpu_kernels_in_other_types_at_large(dtype, case):
    check(case, dtype, KEY)


@pytest.mark.parametrize("wanted", ["z", "kl", "no mu"])
@pytest.mark.parametrize("draws", [None, 2])
def test_backward_of_what_is_there(wanted, draws):
    mu, logvar = inputs(cases.Case((3, 37), ""), torch.float32)
    z, kl = cpu.ops.reparameterize_kl(mu, logvar, KEY.packed, draws)
    args = {
        "z": (z, None, None, logvar, KEY.packed, draws, True),
        "kl": (None, kl, mu, logvar, KEY.packed, draws, True),
        "no mu": (z, None, None, logvar, KEY.packed, draws, False),
    }[wanted]
    assert_same(kernels.reparameterize_backward(*on(DEVICE, *args)), cpu.ops.reparameterize_backward(*args))


def test_special_values():
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([0.0, -0.0, 1.0, -inf, inf, nan, 180.0, -180.0, -207.0, -230.0, 60.0])
    for dtype in cases.DTYPES:
        mu, logvar = (x.reshape(1, -1) for x in torch.meshgrid(values.to(dtype), values.to(dtype), indexing="ij"))
        g, g_kl = torch.ones_like(mu), torch.ones(1, dtype=torch.promote_types(dtype, torch.float32))
        calls = (
            ("reparameterize", (mu, logvar, KEY.packed)),
            ("reparameterize_kl", (mu[:, ::3], logvar[:, ::3], KEY.packed)),
            ("reparameterize_backward", (g, None, None, logvar, KEY.packed, None, True)),
            ("reparameterize_backward", (g, g_kl, mu, logvar, KEY.packed, None, True)),
        )
        for op, args in calls:
            got = getattr(kernels, op)(*on(DEVICE, *args))
            want = getattr(cpu.ops, op)(*args)
            for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, want)), strict=True):
                tolerance = 0 if dtype != torch.float64 else 1e-13
                torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 50), (2, 2500)])
def test_kl_does_not_depend_on_addresses_or_batch(shape):
    mu, logvar = (x.to(DEVICE) for x in inputs(cases.Case(shape, ""), torch.float32))
    memory = torch.empty(2, mu.numel() + 1, device=DEVICE)[:, 1:]
    for x, at in zip((mu, logvar), memory, strict=True):
        at.copy_(x.flatten())
    want = kernels.reparameterize_kl(mu, logvar, KEY.packed)
    for a, b in zip(kernels.reparameterize_kl(*(x.view(shape) for x in memory), KEY.packed), want, strict=True):
        assert same_bits(a, b)
    part = kernels.reparameterize_kl(mu[1:], logvar[1:], KEY.samples(2**32).packed)
    assert same_bits(part[0], want[0][1:])
    assert same_bits(part[1], want[1][1:])


def test_nothing_to_do():
    for shape in ((0, 4), (3, 0)):
        mu = torch.empty(shape, device=DEVICE)
        z, kl = kernels.reparameterize_kl(mu, mu, KEY.packed, 2)
        assert z.shape == (2, *shape)
        assert torch.equal(kl.cpu(), torch.zeros(shape[0]))
        grads = kernels.reparameterize_backward(z, kl, mu, mu, KEY.packed, 2, True)
        assert [g.shape for g in grads] == [shape, shape]
