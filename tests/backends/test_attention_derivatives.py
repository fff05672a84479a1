"""The kernels of attention's derivatives, in forward mode and of second order: values, bits, memory."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from attention_bounds import heads_of
from attention_options import KEY, USES, Use, close, small
from kernels import BACKENDS, NAMES, Kernels, running
from support import same_bits
from torch import Tensor

from gencore import _cpu, ops
from gencore.backends import choice
from gencore.bench.cases import AttentionCase
from gencore.ops import _attention as definitions
from gencore.ops import _general_attention as with_options

LEVELS = tuple(name for name in NAMES if name.startswith("cpu-"))
# Those that have these kernels.
WITH_KERNELS = ("cpu-scalar", "cuda", "triton")
SCALE = 0.3
CASES = (
    AttentionCase(1, 1, 1, 1, 1, "one element"),
    AttentionCase(2, 3, 5, 7, 3, "heads shorter than a vector"),
    AttentionCase(1, 2, 70, 130, 40, "tiles with odd tails", layout="tokens"),
    AttentionCase(1, 1, 129, 64, 20, "more queries than keys"),
    AttentionCase(1, 1, 33, 300, 64, "several chunks of keys"),
)
# Relative to the largest value: float64's roundings, and some tens of float32's. Half types are computed in float32:
# their results are rounded, and so is that of the forward pass, which these go on from.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
DIRECTIONS = [(True, True, True), (True, False, False), (False, True, False), (False, False, True), (True, False, True)]


def inputs(case: AttentionCase, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], list[Tensor], Tensor]:
    """q, k, v; a direction; the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    qkv, direction = (case.tensors(dtype, device, generator) for _ in range(2))
    return qkv, direction, torch.randn(qkv[0].shape, generator=generator).to(device, dtype)


def slow(kernels: Kernels) -> bool:
    """Whether it is the emulator, which takes a second for a tile of queries by keys."""
    return kernels.emulated and not kernels.interpreted


def derivatives(
    qkv: list[Tensor], direction: list[Tensor | None], g: Tensor, wanted: tuple[bool, ...] = (True,) * 4
) -> list[Tensor]:
    """d_out, d_lse, and the gradients of the gradients by the kernels."""
    out, lse = choice.kernel("attention", g)(*qkv, SCALE)
    found = [*choice.kernel("attention_jvp", g)(*qkv, out, lse, *direction, SCALE)]
    second = choice.kernel("attention_double_backward", g)
    return [*found, *second(g, *qkv, out, lse, *direction, SCALE, list(wanted))]


def defined(qkv: list[Tensor], direction: list[Tensor | None], g: Tensor) -> list[Tensor]:
    """The same by the definition, in float64."""
    q, k, v, g, *dx = (None if x is None else x.cpu().double() for x in (*qkv, g, *direction))
    return [
        *definitions._definition_jvp(q, k, v, None, None, *dx, SCALE),
        *definitions._definition_double_backward(g, q, k, v, None, None, *dx, SCALE, [True] * 4),
    ]


@pytest.mark.parametrize("kernels", [*LEVELS, "triton"], indirect=True)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, kernels):
    assert_right(case, dtype, kernels, DIRECTIONS)


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    ("case", "dtype", "directions"),
    [
        (AttentionCase(1, 1, 5, 7, 3, "heads shorter than a vector"), torch.float32, DIRECTIONS),
        (AttentionCase(2, 3, 1, 1, 1, "one element"), torch.float64, DIRECTIONS[:1]),
        (AttentionCase(1, 1, 70, 90, 20, "more than a tile", layout="tokens"), torch.float32, DIRECTIONS[:1]),
        (AttentionCase(1, 1, 35, 33, 70, "two parts"), torch.float64, DIRECTIONS[:1]),
        (AttentionCase(1, 1, 10, 9, 70, "two parts"), torch.bfloat16, DIRECTIONS[-1:]),
        (AttentionCase(1, 1, 10, 9, 130, "two parts of the larger size"), torch.float32, DIRECTIONS[:1]),
        (AttentionCase(1, 2, 10, 9, 8, ""), torch.float16, DIRECTIONS[1:2]),
    ],
    ids=str,
)
def test_values_on_cuda(case, dtype, directions, kernels):
    """Fewer of them, as the emulator takes a second for a tile of queries by keys."""
    assert_right(case, dtype, kernels, directions)


def assert_right(case: AttentionCase, dtype: torch.dtype, kernels: Kernels, directions: Sequence[Any]) -> None:
    qkv, direction, g = inputs(case, dtype, kernels.device)
    for there in directions:
        some = [x if has else None for x, has in zip(direction, there, strict=True)]
        for got, want in zip(derivatives(qkv, some, g), defined(qkv, some, g), strict=True):
            assert got.shape == want.shape
            # What is 0 but for roundings is as exact as what it is the difference of.
            size = max(float(want.abs().max()), 0.1)
            torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=TOLERANCE[dtype] * size)


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
@pytest.mark.parametrize(
    ("use", "dtype"),
    [
        (small(USES["all together"]), torch.float32),
        (small(USES["one head for all"]), torch.float64),
        (small(USES["lengths"])._replace(q=(3, 1, 4, 8), k=(3, 1, 7, 8)), torch.float32),
        (small(USES["longer values"])._replace(size_v=70), torch.bfloat16),
        (small(USES["mask of pairs"]), torch.float16),
        (Use((1, 2, 70, 8), (1, 1, 70, 8), 5, causal=True), torch.float32),
    ],
    ids=str,
)
def test_options(use, dtype, kernels):
    """Against the definition in float64; and only what is wanted is made."""
    tensors, direction = use.tensors(dtype, kernels.device), use.tensors(dtype, kernels.device, seed=1)
    options = use.options(kernels.device)
    key = KEY.packed if use.dropout else None
    settings = (options.get("mask"), options.get("key_lengths"), key, 0.3, use.causal, use.dropout)
    if settings[0] is not None:
        settings = (settings[0].expand(*use.q[:3], use.k[2]), *settings[1:])
    g = torch.randn(*use.q[:3], use.size_v, generator=torch.Generator().manual_seed(2)).to(kernels.device, dtype)
    out, lse = choice.kernel("general_attention", g)(*tensors, *settings)
    found = choice.kernel("general_attention_jvp", g)(*tensors, out, lse, *direction, *settings)
    second = choice.kernel("general_attention_double_backward", g)
    grads = second(g, *tensors, out, lse, *direction, *settings, [True] * 4)

    here = [x.cpu() if isinstance(x, Tensor) else x for x in settings]
    exact = [x.cpu().double() for x in (*tensors, *direction)]
    want = with_options._definition_jvp(*exact[:3], None, None, *exact[3:], *here)
    of_grads = with_options._definition_double_backward(
        g.cpu().double(), *exact[:3], None, None, *exact[3:], *here, [True] * 4
    )
    for one, expected in zip((*found, *grads), (*want, *of_grads), strict=True):
        close(one, expected, dtype)
    for place, one in enumerate(grads):
        some = second(g, *tensors, out, lse, *direction, *settings, [i == place for i in range(4)])
        assert [x is not None for x in some] == [i == place for i in range(4)]
        assert same_bits(some[place], one)
        if use.q[2] > 9 or kernels.interpreted:
            break


@pytest.mark.parametrize("kernels", WITH_KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_all_logits_change_by_alike_takes_no_digits(dtype, kernels):
    """Keys with a large common part, moved along queries with one."""
    case = AttentionCase(1, 1, 20, 60, 32, "") if slow(kernels) else AttentionCase(1, 2, 256, 256, 32, "")
    (q, k, v), (dq, dk, dv), g = inputs(case, torch.float32, kernels.device)
    qkv = [x.to(dtype) for x in (q, k + 8, v)]
    direction = [x.to(dtype) for x in (dq + 1, dk, dv)]
    g = g.to(dtype)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.02}[dtype]
    for got, want in zip(derivatives(qkv, direction, g), defined(qkv, direction, g), strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("kernels", WITH_KERNELS, indirect=True)
def test_empty(kernels):
    for batch, heads, queries, keys in ((0, 2, 3, 3), (2, 0, 3, 3), (2, 1, 0, 3), (2, 1, 3, 0)):
        qkv, direction, g = inputs(AttentionCase(batch, heads, queries, keys, 4, ""), torch.float32, kernels.device)
        d_out, _, *grads = derivatives(qkv, direction, g)
        assert all(bool((x == 0).all()) for x in (d_out, *grads))
        assert [x.shape for x in grads] == [g.shape, *(x.shape for x in qkv)]


@pytest.mark.parametrize("kernels", LEVELS, indirect=True)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(1, 1, 500, 150, 40, "one head: threads share its queries"),
        AttentionCase(3, 5, 70, 33, 20, "more heads than threads"),
        AttentionCase(1, 2, 33, 500, 64, "few queries, many keys"),
    ],
    ids=str,
)
def test_bits_for_any_number_of_threads(case, threads, kernels):
    for dtype in (torch.float32, torch.bfloat16):
        qkv, direction, g = inputs(case, dtype)
        here = derivatives(qkv, direction, g)
        torch.set_num_threads(1)
        assert all(same_bits(a, b) for a, b in zip(here, derivatives(qkv, direction, g), strict=True))
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_bits_for_any_simd_level(dtype):
    qkv, direction, g = inputs(AttentionCase(2, 3, 150, 133, 40, "", layout="tokens"), dtype)
    with running("cpu-scalar"):
        want = derivatives(qkv, direction, g)
    for level in _cpu.build_info()["simd_supported"]:
        # The forward pass in bfloat16 has bits of its own there, which these go on from.
        if level != "avx512_bf16" or dtype != torch.bfloat16:
            with running(f"cpu-{level}"):
                got = derivatives(qkv, direction, g)
            assert all(same_bits(a, b) for a, b in zip(got, want, strict=True)), level


@pytest.mark.parametrize("kernels", WITH_KERNELS, indirect=True)
def test_bits_for_any_split_of_the_batch_and_any_strides(kernels):
    case = AttentionCase(3, 1, 10, 9, 5, "") if slow(kernels) else AttentionCase(3, 2, 70, 90, 24, "")
    qkv, direction, g = inputs(case, torch.float32, kernels.device)
    whole = derivatives(qkv, direction, g)
    part = derivatives([x[1:2] for x in qkv], [x[1:2] for x in direction], g[1:2])
    assert all(same_bits(a[1:2], b) for a, b in zip(whole, part, strict=True))

    def scattered(x: Tensor) -> Tensor:
        wide = x.new_empty(*x.shape[:3], 2 * x.shape[3] + 1)
        return wide.permute(0, 1, 3, 2)[:, :, 1::2].transpose(2, 3).copy_(x)

    odd = derivatives([scattered(x) for x in qkv], [scattered(x) for x in direction], scattered(g))
    assert all(same_bits(a, b) for a, b in zip(whole, odd, strict=True))


@pytest.mark.parametrize("kernels", WITH_KERNELS, indirect=True)
def test_only_what_is_wanted_is_made(kernels):
    case = AttentionCase(1, 1, 10, 9, 5, "") if slow(kernels) else AttentionCase(1, 2, 70, 90, 24, "")
    qkv, direction, g = inputs(case, torch.float32, kernels.device)
    whole = derivatives(qkv, direction, g)[2:]
    for place in range(4):
        some = derivatives(qkv, direction, g, tuple(i == place for i in range(4)))[2:]
        assert [x is not None for x in some] == [i == place for i in range(4)]
        assert same_bits(some[place], whole[place])


@pytest.mark.parametrize("kernels", WITH_KERNELS, indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_images(layout, kernels):
    """In either memory format: what their heads give, in that format."""
    case = AttentionCase(2, 2, 35, 35, 8, "", layout=layout)
    (image,), (tangent,) = (
        case.tensors(torch.float32, kernels.device, torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )

    def by_heads(image: Tensor) -> Tensor:
        out = ops.attention(*heads_of(image, 2))
        return out.transpose(-1, -2).reshape(2, 16, *image.shape[2:])

    got, want = (torch.func.jvp(op, (image,), (tangent,)) for op in (lambda x: ops.spatial_attention(x, 2), by_heads))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert got[1].is_contiguous(memory_format=case.memory_format)
    both = []
    for op in (lambda x: ops.spatial_attention(x, 2), by_heads):
        leaf = image.detach().requires_grad_()
        (grad,) = torch.autograd.grad(op(leaf).square().sum(), leaf, create_graph=True)
        both.append(torch.autograd.grad(grad, leaf, tangent)[0])
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    assert both[0].is_contiguous(memory_format=case.memory_format)


@pytest.mark.parametrize("kernels", WITH_KERNELS, indirect=True)
def test_nan_stays_in_its_query_and_reaches_the_keys(kernels):
    qkv, direction, g = inputs(AttentionCase(2, 1, 6, 5, 4, ""), torch.float32, kernels.device)
    direction[0][0, 0, 2, 1] = torch.nan
    d_out, d_lse, g_out, g_q, g_k, g_v = derivatives(qkv, direction, g)
    for of_queries in (d_out, d_lse.unsqueeze(-1), g_out, g_q):
        assert bool(of_queries[0, 0, 2].isnan().all())
        assert not bool(of_queries[0, 0, [0, 1, 3, 4, 5]].isnan().any())
    for of_keys in (g_k, g_v):
        assert bool(of_keys[0].isnan().any())
        assert not bool(of_keys[1].isnan().any())


def test_opcheck():
    (q, k, v), (dq, dk, dv), g = inputs(AttentionCase(1, 2, 5, 3, 4, ""), torch.float32)
    out, lse = torch.ops.gencore.attention(q, k, v, SCALE)
    attention = torch.ops.gencore
    for direction in ((dq, dk, dv), (None, dk, None)):
        torch.library.opcheck(attention.attention_jvp.default, (q, k, v, out, lse, *direction, SCALE))
        for wanted in ([True] * 4, [False, True, False, True]):
            args = (g, q, k, v, out, lse, *direction, SCALE, wanted)
            torch.library.opcheck(attention.attention_double_backward.default, args)
    for layout in ("contiguous", "channels_last"):
        case = AttentionCase(1, 2, 6, 6, 4, "", layout=layout)
        (image,), (tangent,) = (case.tensors(torch.float32) for _ in range(2))
        out, lse = attention.spatial_attention(image, 2, SCALE)
        torch.library.opcheck(attention.spatial_attention_jvp.default, (image, out, lse, tangent, 2, SCALE))
        args = (torch.randn_like(out), image, out, lse, tangent, 2, SCALE)
        torch.library.opcheck(attention.spatial_attention_double_backward.default, args)


MEMORY = """
import resource, sys
import torch
from gencore import ops
torch.set_num_threads(1)
image = torch.randn(1, 3 * 8, 128, 128)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

def both(x):
    torch.func.jvp(lambda x: ops.spatial_attention(x, 1), (x,), (x,))
    leaf = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(ops.spatial_attention(leaf, 1).square().sum(), leaf, create_graph=True)
    torch.autograd.grad(grad.square().sum(), leaf)

both(image[..., :8, :8])
before = peak()
both(image)
print(peak() - before)
"""


def test_memory_of_many_tokens():
    """16,384 of them: a byte for each pair would be 256 MB, and probabilities in float32 are 1 GB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 96


def test_a_mean_flow_step_is_that_of_the_definition():
    """Geng et al. 2025, equation 10: the derivative along the flow of a network with attention, and its loss."""
    torch.manual_seed(0)
    proj = torch.nn.Linear(8, 24)

    def network(z: Tensor, t: Tensor, attend) -> Tensor:
        q, k, v = proj(z * (1 + t)).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        return attend(q, k, v).transpose(1, 2).flatten(2)

    z, velocity, t = torch.randn(2, 9, 8), torch.randn(2, 9, 8), torch.rand(2, 1, 1)
    grads = []
    for attend in (ops.attention, lambda *qkv: definitions.reference.attention(*qkv)[0]):
        flow = functools.partial(network, attend=attend)
        u, du = torch.func.jvp(flow, (z, t), (velocity, torch.ones_like(t)))
        loss = (u - (velocity - t * du).detach()).square().mean()
        grads.append((loss.detach(), *torch.autograd.grad(loss, proj.parameters())))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
