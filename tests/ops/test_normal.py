"""Normal noise: its bits everywhere, its distribution, its contract."""

from __future__ import annotations

import concurrent.futures
import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from kernels import BACKENDS
from scipy import stats
from support import laid_out, normals_of_blocks, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

import gencore
from gencore import Key, ops
from gencore.backends.reference.normal import normal as reference
from gencore.bench import cases

SMALL = cases.small(cases.NOISE)
# For what takes gigabytes: a GPU, if there is one.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bits_of_the_reference(case, dtype, kernels):
    for key in (Key(-3).stream(2**32 - 1).samples(2**33 + 5), Key(torch.arange(case.shape[0]) - 2)):
        drawn = ops.normal(case.shape, key, dtype=dtype, device=kernels.device, memory_format=case.memory_format)
        assert drawn.is_contiguous(memory_format=case.memory_format)
        assert same_bits(drawn, reference(case.shape, key, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 1 << 18), (5, 77_777), (20_000, 7), (3, 4, 129, 131)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bits_for_any_number_of_threads(shape, memory_format, threads, simd_level):
    if memory_format == torch.channels_last and len(shape) != 4:
        pytest.skip("channels_last has four dimensions")
    key = Key(8).samples(3)
    assert same_bits(ops.normal(shape, key, memory_format=memory_format), reference(shape, key))


@pytest.mark.parametrize("split", [(1, 9), (4, 6), (9, 1)])
def test_bits_for_any_split_of_the_batch(split):
    whole = ops.normal((10, 3, 7), Key(5))
    parts = [ops.normal((n, 3, 7), Key(5).samples(first)) for n, first in zip(split, (0, split[0]), strict=True)]
    assert same_bits(whole, torch.cat(parts))


def test_explicit_samples_and_seeds_pick_rows():
    whole = ops.normal((10, 33), Key(5))
    assert same_bits(whole[[7, 0, 7]], ops.normal((3, 33), Key(5).samples([7, 0, 7])))
    requests = ops.normal((2, 33), Key(torch.tensor([5, 6])).samples(torch.tensor([4, 0])))
    assert same_bits(requests[0], whole[4])
    assert same_bits(requests[1], ops.normal((1, 33), Key(6))[0])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_out_of_any_strides_and_offset(dtype, offset, kernels):
    want = reference((4, 6, 5), Key(2), dtype=dtype)
    memory = torch.full((1000,), 9.0, dtype=dtype, device=kernels.device)
    outs = {
        "unaligned": memory[offset : offset + 120].view(4, 6, 5),
        "transposed": torch.empty(6, 4, 5, dtype=dtype, device=kernels.device).transpose(0, 1),
        "strided": torch.empty(4, 6, 10, dtype=dtype, device=kernels.device)[:, :, ::2],
    }
    for name, out in outs.items():
        assert ops.normal((4, 6, 5), Key(2), out=out) is out
        assert same_bits(out, want), name
    untouched = torch.cat((memory[:offset], memory[offset + 120 :]))
    assert torch.equal(untouched, torch.full_like(untouched, 9.0))


def test_out_in_channels_last(kernels):
    case = cases.Case((2, 3, 8, 8), "", layout="channels_last")
    out = laid_out(torch.empty(2, 3, 8, 8, device=kernels.device), case)
    ops.normal((2, 3, 8, 8), Key(1), out=out)
    assert same_bits(out, reference((2, 3, 8, 8), Key(1)))


def test_out_with_a_negative_bit():
    out = torch.zeros(4, 6, dtype=torch.complex64).conj().imag
    assert out.is_neg()
    ops.normal((4, 6), Key(1), out=out)
    assert same_bits(out.clone(), reference((4, 6), Key(1)))


@pytest.mark.parametrize(
    "call",
    [
        lambda out: ops.normal((2, 3), Key(2), out=out),
        lambda out: torch.ops.gencore.normal_(out, Key(2).packed),
    ],
)
def test_autograd_knows_that_out_was_written_over(call):
    out, weight = ops.normal((2, 3), Key(1)), torch.ones(2, 3, requires_grad=True)
    loss = (weight * out).sum()
    call(out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_streams_and_ids_of_tensors_are_taken_modulo():
    for key in (
        Key(1).stream(torch.tensor(2**32 + 3)),
        Key(1).stream(torch.tensor(-1)),
        Key(1).samples(torch.tensor([-1, 5])),
    ):
        assert same_bits(ops.normal((2, 5), key), reference((2, 5), key))
    assert same_bits(ops.normal((2, 5), Key(1).stream(torch.tensor(2**32 + 3))), ops.normal((2, 5), Key(1).stream(3)))


def test_the_default_device_does_not_matter_to_keys():
    program = (
        "import torch; torch.set_default_device('meta'); import gencore\n"
        "print(gencore.ops.normal((2, 2), gencore.Key(3), device='cpu').device, gencore.ops.normal((2, 2)).device)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", "meta"]


def test_threads_of_python():
    want = reference((4, 5000), Key(3))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for drawn in pool.map(lambda _: ops.normal((4, 5000), Key(3)), range(32)):
            assert same_bits(drawn, want)


def test_inference_mode():
    with torch.inference_mode():
        out = torch.empty(2, 3)
        assert same_bits(ops.normal((2, 3), Key(1), out=out), reference((2, 3), Key(1)))


def test_default_key_follows_manual_seed():
    torch.manual_seed(3)
    first = ops.normal((2, 3))
    second = ops.normal((2, 3))
    torch.manual_seed(3)
    assert same_bits(ops.normal((2, 3)), first)
    assert not torch.equal(first, second)


def test_sizes_may_be_numpys():
    assert same_bits(ops.normal((np.int64(2), np.int32(3)), Key(0)), ops.normal((2, 3), Key(0)))


def test_default_dtype_is_torchs():
    torch.set_default_dtype(torch.float64)
    try:
        assert ops.normal((1, 2), Key(0)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------ distribution


@pytest.fixture(scope="module")
def million() -> np.ndarray:
    return ops.normal((1, 1 << 22), Key(2026)).double().numpy().ravel()


def test_moments(million):
    n = len(million)
    # The variance of the k-th sample moment of a normal is (E x^2k - (E x^k)^2) / n; 5 standard deviations.
    for k, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(million**k) - mean) < 5 * np.sqrt(variance / n), f"moment {k}"


def test_kolmogorov_smirnov(million):
    # One of a million fair draws fails at this level; the seed is fixed.
    assert stats.kstest(million, "norm").pvalue > 1e-6
    for word in range(4):
        assert stats.kstest(million[word::4], "norm").pvalue > 1e-6, f"word {word} of the blocks"


def test_extreme_values(million):
    # 2^22 values: the expected extreme is 5.1, its 1e-6 quantiles are 4.5 and 7.2, beyond what exists (6.76).
    assert 4.5 < np.abs(million).max() < 6.77


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((a.flatten().double(), b.flatten().double())))[0, 1].item()


N = 1 << 18
SIX_SIGMA = 6 / np.sqrt(N)


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 33, 63])
def test_keys_of_one_bit_difference_are_independent(bit):
    base = ops.normal((1, N), Key(0))
    others = {"seed": Key(1 << bit), "sample": Key(0).samples(1 << bit) if bit < 63 else None}
    others["stream"] = Key(0).stream(1 << bit) if bit < 32 else None
    others["folded"] = Key(0).fold_in(1 << bit)
    for name, key in others.items():
        if key is not None:
            assert abs(correlation(base, ops.normal((1, N), key))) < SIX_SIGMA, name
            # Squares would show what values of random sign hide.
            assert abs(correlation(base.square(), ops.normal((1, N), key).square())) < SIX_SIGMA, name


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64, 1024])
def test_elements_are_independent(lag):
    x = ops.normal((1, N), Key(4)).flatten()
    assert abs(correlation(x[:-lag], x[lag:])) < SIX_SIGMA
    assert abs(correlation(x[:-lag].square(), x[lag:].square())) < SIX_SIGMA


@pytest.mark.slow
def test_tails_of_a_hundred_million():
    counts = dict.fromkeys((3.0, 4.0, 5.0, 5.5), 0)
    chunks, size = 25, 1 << 22
    for chunk in range(chunks):
        x = ops.normal((1, size), Key(99).samples(chunk)).abs_()
        for limit in counts:
            counts[limit] += int((x > limit).sum())
    for limit, count in counts.items():
        # A binomial is all but Poisson here; an interval that one of a million fair draws misses.
        low, high = stats.poisson.interval(1 - 1e-6, chunks * size * 2 * stats.norm.sf(limit))
        assert low <= count <= high, f"{count} values beyond {limit}, expected {low} to {high}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cuda", "triton"] if DEVICE == "cuda" else [None])
def test_more_than_two_to_the_31_elements(name):
    for shape in ((3, (1 << 30) + 3), (1, (1 << 31) + 64)):
        with gencore.backend(name) if name else contextlib.nullcontext():
            out = ops.normal(shape, Key(1), dtype=torch.bfloat16, device=DEVICE)
        last, first = shape[0] - 1, shape[1] // 4 - 1024
        want = normals_of_blocks(Key(1), last, first, 1025)[: shape[1] - 4 * first]
        assert same_bits(out[last, 4 * first :], want.bfloat16())
        assert 0.9 < out[last, -(1 << 20) :].float().var() < 1.1
        del out


# ------------------------------------------------------------------------------------------------ contract


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.normal(5), TypeError, "shape must be a sequence of ints, got int"),
        (lambda: ops.normal(()), ValueError, "shape must have at least one dimension"),
        (lambda: ops.normal((2, 3.0)), TypeError, "shape must hold ints, got float at position 1"),
        (lambda: ops.normal((2, -1)), ValueError, "shape must hold sizes of at least 0, got -1 at position 1"),
        (lambda: ops.normal((1, 2**35)), ValueError, r"shape must have at most 2\^34 elements per sample"),
        (lambda: ops.normal((2, 3), 7), TypeError, "key must be a gencore.Key or None, got int"),
        (lambda: ops.normal((2, 3), Key(torch.arange(3))), ValueError, "key must name 2 samples, .* names 3"),
        (lambda: ops.normal((2, 3), dtype=torch.int32), TypeError, "dtype must be one of float32, .* got int32"),
        (lambda: ops.normal((2, 3), dtype="float32"), TypeError, "dtype must be a torch.dtype, got str"),
        (lambda: ops.normal((2, 3), memory_format=torch.channels_last), ValueError, "needs 4 dimensions, got 2"),
        (lambda: ops.normal((2, 3), memory_format=torch.preserve_format), ValueError, "memory_format must be"),
        (lambda: ops.normal((2, 3), out=[1]), TypeError, "out must be a tensor, got list"),
        (lambda: ops.normal((2, 3), out=torch.empty(3, 2)), ValueError, r"shape \(2, 3\), got \(3, 2\)"),
        (lambda: ops.normal((2,), out=torch.empty(2, dtype=torch.int64)), TypeError, "dtype of out must be one of"),
        (lambda: ops.normal((2,), dtype=torch.float64, out=torch.empty(2)), ValueError, "dtype must be left out"),
        (lambda: ops.normal((2,), out=torch.empty(2, requires_grad=True)), ValueError, "out must not require"),
        (lambda: ops.normal((2,), device="xla"), ValueError, "device must be one that a backend serves; .* cuda: it"),
        (lambda: ops.normal((2, 2), out=torch.eye(2).to_sparse()), ValueError, "out must be a dense .*sparse_coo"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_opcheck(kernels):
    for out in (torch.empty(4, 10), torch.empty(2, 3, 5, 4).to(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.gencore.normal_.default, (out.to(kernels.device), Key(1).packed))


def test_compiles_whole_and_once():
    def draw(x, key, step):
        return x + ops.normal(x.shape, key.fold_in(step).stream(3)) + ops.normal((x.shape[0], 2), key)[:, :1]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(draw, fullgraph=True, backend=counter)
    x = torch.zeros(6, 5)
    for seed, stream, first in ((1, 2, 3), (4, 5, 6), (2**63, 2**32 - 1, 7)):
        key, step = Key(seed).stream(stream).samples(first), torch.tensor(seed % 1000)
        assert same_bits(compiled(x, key, step), draw(x, key, step))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_compiles_with_inductor_and_dynamic_shapes(kernels):
    if kernels.emulated:
        pytest.skip("the compiler sees the same op, whatever runs it")

    def draw(x, key):
        return x + ops.normal(x.shape, key, device=x.device) * 2

    compiled = torch.compile(draw, fullgraph=True, dynamic=True)
    for batch in (3, 8, 5):
        x = torch.zeros(batch, 7, device=kernels.device)
        assert same_bits(compiled(x, Key(batch)), 2 * reference((batch, 7), Key(batch)))


def test_compiled_without_a_key_draws_anew():
    unkeyed = torch.compile(lambda x: x + ops.normal(x.shape), fullgraph=True)
    torch.manual_seed(1)
    first, second = unkeyed(torch.zeros(3, 7)), unkeyed(torch.zeros(3, 7))
    torch.manual_seed(1)
    assert torch.equal(unkeyed(torch.zeros(3, 7)), first)
    assert not torch.equal(first, second)
