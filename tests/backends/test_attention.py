"""What kernels of attention promise besides their values: bits that nothing changes, and little memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from attention_bounds import heads_of, inputs
from kernels import BACKENDS, NAMES, running
from support import same_bits
from torch import Tensor

from gencore import _cpu, ops
from gencore.bench.cases import AttentionCase

EVERY = (*NAMES, "cpu-avx512_bf16")
LEVELS = tuple(name for name in EVERY if name.startswith("cpu-"))


def results(tensors: list[Tensor], g: Tensor) -> list[Tensor]:
    """The output, its log-sum-exp and the gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = torch.ops.gencore.attention(*leaves, 0.2)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, g)]


@pytest.mark.parametrize("kernels", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(1, 1, 500, 150, 40, "one head: threads share its queries", layout="tokens"),
        AttentionCase(3, 5, 70, 33, 20, "more heads than threads"),
        AttentionCase(1, 2, 33, 500, 64, "few queries, many keys"),
    ],
    ids=str,
)
def test_bits_for_any_number_of_threads(case, dtype, threads, kernels):
    if kernels.name == "cpu-avx512_bf16" and dtype != torch.bfloat16:
        pytest.skip("the level differs in bfloat16 only")
    tensors = inputs(case, dtype)
    g = torch.randn(case.batch, case.heads, case.queries, case.size).to(dtype)
    here = results(tensors, g)
    assert same_bits(ops.attention(*tensors, scale=0.2), here[0])
    torch.set_num_threads(1)
    for a, b in zip(here, results(tensors, g), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_bits_for_any_simd_level(dtype):
    """All but that of the dot product, which rounds probabilities, in its own dtype."""
    tensors = inputs(AttentionCase(2, 3, 150, 133, 40, "several tiles, none of them full", layout="tokens"), dtype)
    g = torch.randn(2, 3, 150, 40).to(dtype)
    with running("cpu-scalar"):
        want = results(tensors, g)
    for level in _cpu.build_info()["simd_supported"]:
        with running(f"cpu-{level}"):
            same = [same_bits(a, b) for a, b in zip(results(tensors, g), want, strict=True)]
        assert all(same) == (level != "avx512_bf16" or dtype != torch.bfloat16), (level, same)


@pytest.mark.parametrize("kernels", LEVELS, indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_of_images_for_any_number_of_threads(layout, threads, kernels):
    for dtype in (torch.float32, torch.bfloat16):
        (image,) = inputs(AttentionCase(2, 3, 143, 143, 24, "", layout=layout), dtype)
        image.requires_grad_()
        both = []
        for count in (threads, 1):
            torch.set_num_threads(count)
            out = ops.spatial_attention(image, 3)
            both.append((out.detach(), *torch.autograd.grad(out, image, torch.ones_like(out))))
        assert all(same_bits(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("kernels", EVERY, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys", "size"), [(90, 41, 8), (150, 77, 40)], ids=str)
def test_bits_for_any_split(queries, keys, size, dtype, kernels):
    """Of the batch, the heads and the queries: a query's results depend on nothing but itself and its keys."""
    if kernels.emulated and (size, dtype) != ((8, torch.float32) if kernels.interpreted else (40, torch.bfloat16)):
        pytest.skip("the emulator and Triton's interpreter are slow")
    batch, heads = (1, 2) if kernels.emulated else (3, 4)
    case = AttentionCase(batch, heads, queries, keys, size, "", layout="tokens")
    q, k, v = inputs(case, dtype, kernels.device)
    g = torch.randn(q.shape).to(q)
    whole = results([q, k, v], g)
    for some in (slice(0, 1), slice(1, 3)):
        if batch > 1:
            for a, b in zip(results([x[some] for x in (q, k, v)], g[some]), whole, strict=True):
                assert same_bits(a, b[some])
        for a, b in zip(results([x[:, some] for x in (q, k, v)], g[:, some]), whole, strict=True):
            assert same_bits(a, b[:, some])
    if kernels.interpreted:
        return  # NumPy's products are summed up in an order that depends on the place of the row in its tile.
    # Of a part of the queries, the gradients of k and v are others.
    for some in (slice(0, 1), slice(0, 17), slice(17, 33), slice(33, queries), slice(queries - 1, queries)):
        part = results([q[:, :, some], k, v], g[:, :, some])
        assert all(same_bits(a, b[:, :, some]) for a, b in zip(part[:3], whole[:3], strict=True))


@pytest.mark.parametrize("kernels", EVERY, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [20, 32, 40])
def test_bits_for_any_address(size, dtype, kernels):
    """Tensors that are read 16 bytes at a time, at addresses that are not."""
    if kernels.interpreted and (dtype != torch.float32 or size != 20):
        pytest.skip("Triton's interpreter is slow")
    shape = (1, 2, 18, size)
    tensors = inputs(AttentionCase(*shape[:3], 18, size, ""), dtype, kernels.device)
    g = torch.randn_like(tensors[0])

    def shifted(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.numel() + 1, dtype=dtype, device=kernels.device)[1:].view(shape).copy_(tensor)

    here, there = results(tensors, g), results([shifted(tensor) for tensor in tensors], shifted(g))
    assert all(same_bits(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_parts_of_images(kernels):
    """Every other sample, a part of the channels, a window, at any address: as a copy in their memory format."""
    base = torch.randn(4, 30, 6, 5, device=kernels.device)
    memory = torch.randn(2000, device=kernels.device)
    last = base.contiguous(memory_format=torch.channels_last)
    views = {
        "samples": (base[::2], torch.contiguous_format),
        "samples, channels_last": (last[::2], torch.channels_last),
        "channels": (base[:, 5:29], torch.contiguous_format),
        "channels, channels_last": (last[:, 5:29], torch.channels_last),
        "window": (base[:, :24, 1:4, ::2], torch.contiguous_format),
        "window, channels_last": (last[:, :24, 1:, 1:], torch.channels_last),
        "transposed": (base[:, :24].transpose(2, 3), torch.contiguous_format),
        "expanded": (base[:1, :24, :1].expand(2, 24, 3, 5), torch.contiguous_format),
        "unaligned": (memory[1 : 1 + 720].view(2, 24, 3, 5), torch.contiguous_format),
        "unaligned, channels_last": (memory[3 : 3 + 720].view(2, 3, 5, 24).permute(0, 3, 1, 2), torch.channels_last),
    }
    if kernels.interpreted:
        views = {name: views[name] for name in ("channels", "window, channels_last")}
    for name, (view, memory_format) in views.items():
        num_heads = 5 if view.shape[1] == 30 else 2
        leaves = [view.detach().requires_grad_(), view.detach().clone(memory_format=memory_format).requires_grad_()]
        results = []
        for leaf in leaves:
            out = ops.spatial_attention(leaf, num_heads)
            assert out.is_contiguous(memory_format=memory_format), name
            g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(kernels.device)
            (grad,) = torch.autograd.grad(out, leaf, g)
            assert grad.is_contiguous(memory_format=memory_format), name
            results.append((out.detach(), grad))
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), name


@pytest.mark.parametrize("kernels", LEVELS[:1], indirect=True)
@pytest.mark.parametrize("threads", [1, 6], indirect=True)
def test_bits_for_any_split_of_the_batch_with_many_keys(threads, kernels):
    """Enough of them for several parts of the queries' gradient, which one thread adds up or several do."""
    q, k, v = inputs(AttentionCase(9, 2, 70, 1100, 8, ""), torch.float32)
    g = torch.randn_like(q)
    torch.set_num_threads(1)
    whole = results([q, k, v], g)
    torch.set_num_threads(threads)
    for some in (slice(0, 9), slice(0, 1), slice(4, 6)):
        part = results([x[some] for x in (q, k, v)], g[some])
        assert all(same_bits(a, b[some]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_images_whose_strides_say_nothing(kernels):
    """Those of dimensions of one element may be anything, and no format is another for it."""
    base = torch.randn(1200, device=kernels.device)
    views = {
        "tokens as an image": base[:1200].view(2, 25, 24).transpose(1, 2).unsqueeze(-1),
        "a row as a column": base[:480].view(8, 12, 1, 5)[:2].transpose(2, 3),
        "one pixel": base[:48].view(2, 24, 1, 1).as_strided((2, 24, 1, 1), (24, 1, 77, 5)),
        "one sample": base[:240].as_strided((1, 24, 5, 2), (7, 10, 2, 1)),
    }
    for name, view in views.items():
        leaves = [view.detach().requires_grad_(), view.detach().reshape(-1).view(view.shape).requires_grad_()]
        results = []
        for leaf in leaves:
            out = ops.spatial_attention(leaf, 2)
            # A gradient with strides as odd as the image's.
            tokens = out.flatten(2).transpose(1, 2)
            g = torch.arange(tokens.numel(), device=kernels.device).view(tokens.shape) / tokens.numel()
            results.append((out.detach(), *torch.autograd.grad(tokens, leaf, g)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kernels", EVERY, indirect=True)
def test_bits_of_every_run(kernels):
    (image,) = inputs(AttentionCase(1, 2, 35, 35, 20, "", layout="channels_last"), torch.bfloat16, kernels.device)
    if kernels.interpreted:
        image = image[:, :12]
    q, k, v = heads_of(image, 2)
    g = torch.ones_like(q)
    once, again = (results([q, k, v], g) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(once, again, strict=True))


def test_only_arguments_result_and_sums_are_saved():
    q, k, v = (tensor.requires_grad_() for tensor in inputs(AttentionCase(2, 2, 17, 33, 8, ""), torch.float32))
    (image,) = (t.requires_grad_() for t in inputs(AttentionCase(2, 2, 12, 12, 8, "", layout="contiguous"), q.dtype))
    for op, args, lse in ((ops.attention, (q, k, v), (2, 2, 17)), (ops.spatial_attention, (image, 2), (2, 2, 12))):
        saved: list[Tensor] = []

        def pack(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = op(*args)
        known = {tensor.data_ptr() for tensor in (*args, out) if isinstance(tensor, Tensor)}
        assert [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in known] == [lse]


def allocations(function) -> list[int]:
    """The bytes of every tensor that PyTorch allocates meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return [size for event in events if event.name() == "[memory]" and (size := event.nbytes()) > 0]


@pytest.mark.parametrize("kernels", NAMES, indirect=True)
def test_nothing_of_tokens_squared_is_allocated(kernels):
    if kernels.interpreted:
        pytest.skip("Triton's interpreter is slow, and allocates as it likes")
    tokens = 256 if kernels.emulated else 512
    case = AttentionCase(1, 1, tokens, tokens, 8, "", layout="channels_last")
    (image,) = inputs(case, torch.bfloat16, kernels.device)
    q, k, v = (part.detach().requires_grad_() for part in heads_of(image, 1))

    def both_ways() -> None:
        ops.attention(q, k, v).sum().backward()
        ops.spatial_attention(image.requires_grad_(), 1).sum().backward()

    if kernels.device == "cuda":
        both_ways()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_ways()
        assert torch.cuda.max_memory_allocated() - before < 2 * tokens**2
    else:
        sizes = allocations(both_ways)
        assert len(sizes) >= 8
        # One byte for each pair would be more.
        assert max(sizes) < tokens**2


MEMORY = """
import resource, sys
import torch
from gencore import ops
torch.set_num_threads(1)
image = torch.randn(1, 3 * 8, 128, 128, requires_grad=True)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
ops.spatial_attention(image[..., :8, :8], 1).sum().backward()
before = peak()
ops.spatial_attention(image, 1).sum().backward()
print(peak() - before)
"""


def test_memory_of_many_tokens():
    """16,384 of them: a byte for each pair would be 256 MB, and probabilities in float32 are 1 GB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64


@pytest.mark.parametrize("kernels", EVERY, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_key_at_minus_infinity_leaves_the_others_gradients(dtype, kernels):
    """Its logits are minus infinity, its probabilities 0; beyond the last query a tile has zeros, which times infinity
    would be NaN."""
    q, k, v = inputs(AttentionCase(1, 1, 7, 19, 8, ""), dtype, kernels.device)
    q[..., 3] = q[..., 3].abs() + 0.5
    k[:, :, 5, 3] = -torch.inf
    out, _, _, grad_k, grad_v = results([q, k, v], torch.ones_like(q))
    assert bool(out.isfinite().all())
    assert bool(grad_k.isfinite().all())
    assert bool(grad_v.isfinite().all())
    assert not grad_v[:, :, 5].any()


def test_the_module_refuses_what_is_no_attention():
    x, lse = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5)
    tensor = x.data_ptr(), *x.stride()
    shape = _cpu.AttentionShape(batch=2, heads=3, queries=5, keys=5, size=4, key_heads=0, value_size=0)
    right = {"lse": lse.data_ptr(), "dtype": 0, "shape": shape, "scale": 0.5, "options": None, "base": None, "place": 1}
    tensors = dict.fromkeys(("q", "k", "v", "out"), tensor)
    gradients = dict.fromkeys(("grad_out", "grad_q", "grad_k", "grad_v"), tensor) | {"grad_mask": None}
    for function, arguments in (
        (_cpu.attention, right | tensors), (_cpu.attention_backward, right | tensors | gradients),
    ):  # fmt: skip
        for wrong in (
            {"place": 0}, {"dtype": 9}, {"shape": (-1, 3, 5, 5, 4, 0, 0)}, {"shape": (2, 3, 5, 5, 0, 0, 0)},
            {"shape": (2, 3, 5, -5, 4, 0, 0)}, {"shape": (2, 3, 1 << 60, 5, 4, 0, 0)},
            {"shape": (2, 3, 5, 1 << 60, 4, 0, 0)}, *({name: None} for name in tensors),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=r"attention\w*: invalid argument"):
                function(**arguments | wrong)
    assert not x.any()
    assert not lse.any()
