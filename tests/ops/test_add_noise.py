"""The forward process, against the definition in float64, and bit for bit between backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels import BACKENDS
from support import laid_out, on_cpu, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

from gencore import Key, diffusion, explain, ops
from gencore.backends import cpu
from gencore.backends.reference import add_noise as reference
from gencore.bench import cases

CASES = cases.small(cases.DIFFUSION)
SCHEDULE = diffusion.linear(50, 1e-3, 0.2)
# Relative to |alpha x0| + |sigma eps|: each coefficient, the product and the sum are rounded, 2^-24 each; binary64 has
# one product more.
ARITHMETIC = {torch.float64: 4 * 2.0**-53}
# The half types round once more, on writing: half a unit in the last of their 8 and 11 bits.
ON_WRITING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def inputs(
    case: cases.Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    t = torch.randint(len(SCHEDULE), case.shape[:1], generator=generator)
    return laid_out(x0.to(device, dtype), case), t.to(device)


def definition(x0, t, key):
    """x_t in float64, and the size of its terms."""
    table, noise = SCHEDULE.add_noise_table(torch.device("cpu")), ops.normal(x0.shape, key, dtype=torch.float64)
    x0, t = x0.detach().cpu().double(), t.cpu()
    return reference.add_noise(x0, table[t], noise), reference.add_noise(x0.abs(), table[t], noise.abs())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_forward(case, dtype, kernels):
    x0, t = inputs(case, dtype, kernels.device)
    for key in (Key(7).stream(3).samples(2**32 - 1), Key(torch.arange(case.shape[0]) - 1)):
        want, size = on_cpu(definition, x0, t, key)
        x_t, eps = ops.add_noise(x0, t, SCHEDULE, key, return_noise=True)
        error = (x_t.cpu().double() - want).abs()
        assert bool((error <= ARITHMETIC.get(dtype, 4 * 2.0**-24) * size + ON_WRITING.get(dtype, 0) * want.abs()).all())
        assert x_t.dtype == dtype
        assert x_t.is_contiguous(memory_format=case.memory_format)
        assert same_bits(x_t, on_cpu(ops.add_noise, x0, t, SCHEDULE, key))
        assert same_bits(eps, ops.normal(case.shape, key, dtype=dtype, device=kernels.device))
        assert same_bits(ops.add_noise(x0, t.int(), SCHEDULE, key), x_t)
        out = torch.empty_like(x0)
        assert ops.add_noise(x0, t, SCHEDULE, key, out=out) is out
        assert same_bits(out, x_t)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_one_step_for_all_samples(dtype, kernels):
    x0, _ = inputs(cases.Case((3, 5), ""), dtype, kernels.device)
    t = torch.full((3,), 7, device=kernels.device)
    want = ops.add_noise(x0, t, SCHEDULE, Key(1))
    assert same_bits(ops.add_noise(x0, 7, SCHEDULE, Key(1)), want)
    assert same_bits(ops.add_noise(x0, np.int64(7), SCHEDULE, Key(1)), want)


@pytest.mark.parametrize("shape", [(3, 30_001), (20_000, 3), (2, 3, 110, 111)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_for_any_threads_and_simd_level(shape, layout, threads, simd_level):
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("channels_last has four dimensions")
    x0, t = inputs(cases.Case(shape, "", layout=layout), torch.float32)
    here = ops.add_noise(x0, t, SCHEDULE, Key(torch.arange(shape[0])))
    torch.set_num_threads(1)
    cpu.set_simd_level("scalar")
    assert same_bits(here, ops.add_noise(x0, t, SCHEDULE, Key(torch.arange(shape[0]))))


def test_bits_for_any_split_of_the_batch_and_layout(kernels):
    x0, t = inputs(cases.Case((6, 4, 9, 9), ""), torch.float32, kernels.device)
    whole = ops.add_noise(x0, t, SCHEDULE, Key(3))
    assert same_bits(ops.add_noise(x0[2:5], t[2:5], SCHEDULE, Key(3).samples(2)), whole[2:5])
    last = ops.add_noise(x0.to(memory_format=torch.channels_last), t, SCHEDULE, Key(3))
    assert same_bits(last, whole)
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_any_strides_and_offset(dtype, kernels):
    base, _ = inputs(cases.Case((6, 10, 8), ""), dtype, kernels.device)
    picture = torch.randn(4, 6, 5, 5, dtype=torch.float64).to(kernels.device, dtype)
    picture = picture.to(memory_format=torch.channels_last)
    memory = torch.randn(1000, dtype=torch.float64).to(kernels.device, dtype)
    views = {
        "transposed": base.transpose(0, 1),
        "sliced": base[::2, 1:, ::3],
        "expanded": base[:1].expand(4, 10, 8),
        "unaligned": memory[1:161].view(4, 40),
        "one dimension": memory[::3],
        "channels of a channels_last": picture[:, 1:4],
    }
    for name, x0 in views.items():
        t = torch.arange(len(x0), device=kernels.device).repeat_interleave(2)[::2] % len(SCHEDULE)
        x_t = ops.add_noise(x0, t, SCHEDULE, Key(1))
        assert same_bits(x_t, ops.add_noise(x0.contiguous(), t.clone(), SCHEDULE, Key(1))), name
        out = (
            torch.zeros(len(x0), *x0.shape[1:-1], 2 * x0.shape[-1], dtype=dtype, device=kernels.device)[..., ::2]
            if x0.dim() > 1
            else torch.zeros(2 * len(x0), dtype=dtype, device=kernels.device)[::2]
        )
        ops.add_noise(x0, t, SCHEDULE, Key(1), out=out)
        assert same_bits(out, x_t), name
    assert x_t.is_contiguous(memory_format=torch.channels_last)


def test_in_place(kernels):
    x0, t = inputs(cases.Case((3, 700), ""), torch.float32, kernels.device)
    want, version = ops.add_noise(x0, t, SCHEDULE, Key(2)), x0._version
    assert ops.add_noise(x0, t, SCHEDULE, Key(2), out=x0) is x0
    assert same_bits(x0, want)
    assert x0._version > version


def test_nan_and_infinity_propagate(kernels):
    inf, nan = float("inf"), float("nan")
    x0 = torch.tensor([[0.0, -0.0, inf, -inf, nan, 1.0]], device=kernels.device)
    x_t = ops.add_noise(x0, 3, SCHEDULE, Key(0))[0].tolist()
    assert x_t[2:4] == [inf, -inf]
    assert x_t[4] != x_t[4]
    assert all(abs(x) < 10 for x in (*x_t[:2], x_t[5]))


def test_a_step_out_of_range_on_the_device(kernels):
    """The CPU's kernels refuse it; the others cannot without waiting, and make its samples NaN."""
    x0, _ = inputs(cases.Case((4, 6), ""), torch.float32, kernels.device)
    t = torch.tensor([3, 50, -1, 4], device=kernels.device)
    if kernels.backend == "cpu":
        with pytest.raises(ValueError, match=r"t must be in \[0, 50\), the steps of the schedule, got 50 for sample 1"):
            ops.add_noise(x0, t, SCHEDULE, Key(0))
        return
    x_t = ops.add_noise(x0.requires_grad_(), t, SCHEDULE, Key(0))
    (grad,) = torch.autograd.grad(x_t.sum(), x0)
    assert grad.isnan().all(1).tolist() == [False, True, True, False]
    x_t, x0 = x_t.detach(), x0.detach()
    assert x_t.isnan().all(1).tolist() == [False, True, True, False]
    assert same_bits(x_t[[0, 3]], ops.add_noise(x0, t.clamp(0, 49), SCHEDULE, Key(0))[[0, 3]])


# ------------------------------------------------------------------------------------------------ autograd, compiler


def test_gradcheck(kernels):
    if kernels.interpreted:
        pytest.skip("Triton's interpreter is too slow for numerical gradients")
    x0, t = inputs(cases.Case((3, 2, 3, 3), "", layout="channels_last"), torch.float64, kernels.device)
    x0.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.add_noise(x, t, SCHEDULE, Key(1)), (x0,))
    assert torch.autograd.gradcheck(lambda x: ops.add_noise(x, 5, SCHEDULE, Key(1), return_noise=True)[0], (x0,))


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5, 5)])
def test_opcheck(shape, kernels):
    if kernels.emulated and len(shape) == 2:
        pytest.skip("what the check sees does not depend on what runs the op")
    layout = "channels_last" if len(shape) == 4 else "contiguous"
    x0, t = inputs(cases.Case(shape, "", layout=layout), torch.float32, kernels.device)
    table, key = SCHEDULE.add_noise_table(x0.device), Key(1).packed
    for with_noise in (False, True):
        for x in (x0, x0.detach().requires_grad_()):
            torch.library.opcheck(torch.ops.gencore.add_noise.default, (x, table, t, key, with_noise))
        out = torch.empty_like(x0)
        torch.library.opcheck(torch.ops.gencore.add_noise_out.default, (x0, table[3:4], None, key, with_noise, out))


def noised(x0, t, key):
    x_t, eps = ops.add_noise(x0, t, SCHEDULE, key.stream(1), return_noise=True)
    return x_t.square() + eps


def test_modes_and_transforms_leave_a_schedule_whole():
    """What is first asked for in inference, or under a transform or fake mode, is kept as if it were not."""
    x0, t = inputs(cases.Case((4, 6), ""), torch.float32)
    want = ops.add_noise(x0, t, SCHEDULE, Key(0))
    schedule = diffusion.linear(50, 1e-3, 0.2)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = ops.add_noise(mode.from_tensor(x0), mode.from_tensor(t), schedule, Key(0))
        assert fake.shape == x0.shape
    with torch.inference_mode():
        assert same_bits(ops.add_noise(x0, t, schedule, Key(0)).clone(), want)
    grad = torch.func.grad(lambda x: ops.add_noise(x, t, diffusion.linear(50, 1e-3, 0.2), Key(0)).sum())(x0)
    x0.requires_grad_()
    x_t, eps = ops.add_noise(x0, t, schedule, Key(0), return_noise=True)
    assert not eps.requires_grad
    assert same_bits(torch.autograd.grad(x_t.sum(), x0)[0], grad)
    with torch.device("meta"):
        assert diffusion.Schedule([0.9, 0.5], [0.1, 0.5]).times.is_cpu


def test_compiles_whole_and_once():
    torch._dynamo.reset()
    ops.add_noise(torch.zeros(1, 1), 0, SCHEDULE, Key(0))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(noised, fullgraph=True, backend=counter)
    for seed in range(3):
        x0, t = inputs(cases.Case((4, 6), ""), torch.float32, seed=seed)
        x0.requires_grad_()
        key = Key(seed).samples(10 * seed)
        values = compiled(x0, t, key), noised(x0, t, key)
        assert torch.equal(*values)
        assert torch.equal(*(torch.autograd.grad(value.sum(), x0)[0] for value in values))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_compiles_with_inductor_and_dynamic_shapes(kernels):
    if kernels.emulated:
        pytest.skip("the compiler sees the same op, whatever runs it")
    torch._dynamo.reset()
    compiled = torch.compile(noised, fullgraph=True, dynamic=True)
    for shape in ((4, 3, 6, 6), (7, 3, 5, 6)):
        x0, t = inputs(cases.Case(shape, "", layout="channels_last"), torch.float32, kernels.device)
        assert torch.allclose(compiled(x0, t, Key(5)), noised(x0, t, Key(5)), rtol=1e-6)


def test_says_which_backend():
    assert "add_noise on cpu: cpu" in str(explain(ops.add_noise, torch.zeros(2, 3), 1, SCHEDULE))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    rows, elements = 2, (1 << 30) + 3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x0 = torch.zeros(rows, elements, dtype=torch.bfloat16, device=device)
    ops.add_noise(x0, torch.tensor([0, 49], device=device), SCHEDULE, Key(1), out=x0)
    want = ops.add_noise(torch.zeros_like(x0[:1]), 49, SCHEDULE, Key(1).samples(1))
    assert torch.equal(x0[1], want[0])


# ------------------------------------------------------------------------------------------------ contract

X = torch.zeros(2, 3)
T = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([1.0], T, SCHEDULE), {}, TypeError, "x0 must be a tensor, got list"),
        ((X.long(), T, SCHEDULE), {}, TypeError, "dtype of x0 must be one of float32, .*, got int64"),
        ((X.sum(), T, SCHEDULE), {}, ValueError, "x0 must have at least one dimension"),
        ((X, 1.0, SCHEDULE), {}, TypeError, "t must be an int or a tensor of int64 or int32, got float"),
        (
            (X, T.float(), SCHEDULE),
            {},
            TypeError,
            "t must be an int or a tensor of int64 or int32, got one of torch.float32",
        ),
        ((X, T[:1], SCHEDULE), {}, ValueError, r"t must be one step per sample, of shape \(2,\), got \(1,\)"),
        (
            (X, T + 50, SCHEDULE),
            {},
            ValueError,
            r"t must be in \[0, 50\), the steps of the schedule, got 50 for sample 0",
        ),
        (
            (X, T - 1, SCHEDULE),
            {},
            ValueError,
            r"t must be in \[0, 50\), the steps of the schedule, got -1 for sample 0",
        ),
        ((X, 50, SCHEDULE), {}, ValueError, r"t must be in \[0, 50\), the steps of the schedule, got 50"),
        ((X, T.to("meta"), SCHEDULE), {}, ValueError, "t must be on the device of the samples, cpu, got meta"),
        ((X, T.to_sparse(), SCHEDULE), {}, ValueError, r"t must be a dense \(strided\) tensor, got one of layout"),
        (
            (X, torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]).long(), SCHEDULE),
            {},
            ValueError,
            "t must be a dense .* got a nested tensor",
        ),
        (
            (X, T, SCHEDULE),
            {"out": torch.zeros(4).as_strided((2, 3), (1, 1))},
            ValueError,
            "out must not have several elements in one place",
        ),
        ((X, T, 50), {}, TypeError, "schedule must be a gencore.diffusion.Schedule, got int"),
        ((X, T, SCHEDULE, 3), {}, TypeError, "key must be a gencore.Key or None, got int"),
        ((X, T, SCHEDULE, Key(torch.arange(3))), {}, ValueError, "key must name 2 samples, .*, but names 3"),
        ((X, T, SCHEDULE), {"out": X[:1]}, ValueError, r"out must have the shape of x0, \(2, 3\), got \(1, 3\)"),
        ((X, T, SCHEDULE), {"out": X.double()}, TypeError, "out must have the dtype of x0"),
        ((X, T, SCHEDULE), {"out": X[:1].expand(2, 3)}, ValueError, "out must not have several elements in one place"),
        (
            (X, T, SCHEDULE),
            {"out": X.view(3, 2).t()},
            ValueError,
            "out must be x0 itself or lie apart from x0 in memory",
        ),
        ((X.clone().requires_grad_(), T, SCHEDULE), {"out": X}, ValueError, "out must be left out where a gradient"),
    ],
)
def test_says_what_is_wrong(args, kwargs, error, message):
    before = X.clone()
    with pytest.raises(error, match=message):
        ops.add_noise(*args, **kwargs)
    assert torch.equal(X, before)


def test_default_key_follows_manual_seed():
    torch.manual_seed(3)
    first, second = (ops.add_noise(X, T + 40, SCHEDULE) for _ in range(2))
    torch.manual_seed(3)
    assert same_bits(ops.add_noise(X, T + 40, SCHEDULE), first)
    assert not torch.equal(first, second)
