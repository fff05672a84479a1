"""The step that all samplers share, against the definition in float64, and bit for bit between backends."""

from __future__ import annotations

import pytest
import torch
from kernels import BACKENDS
from support import laid_out, on_cpu, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

from gencore import Key, diffusion, explain, ops
from gencore.backends import cpu
from gencore.backends.reference import diffusion_step as reference
from gencore.bench import cases

CASES = cases.small(cases.DIFFUSION)
# Relative to the sum of the sizes of a result's terms: the longest way from an input to it has five coefficients, ten
# operations and an exponential with its argument, each a rounding or two of 2^-24; binary64 likewise.
ARITHMETIC = {torch.float64: 32 * 2.0**-53}
# The half types round once more, on writing: half a unit in the last of their 8 and 11 bits.
ON_WRITING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Which optional tensors there are: what each sampler uses, and all at once.
USES = {
    "ddpm": ("output",),
    "learned variance": ("output", "learned"),
    "guided": ("output", "second"),
    "multistep": ("output", "history0", "prediction"),
    "noise alone": (),
    "inpainting": ("output", "known"),
    "everything": ("output", "learned", "second", "second_learned", "history0", "history1", "known", "prediction"),
}


def inputs(
    case: cases.Case, dtype: torch.dtype, uses: tuple[str, ...], device: str = "cpu", rows: str = "each"
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, dict]:
    """(x, output, coefficients, keyword arguments)."""
    generator = torch.Generator().manual_seed(0)

    def tensor(channels: int = 1) -> torch.Tensor:
        shape = list(case.shape)
        if channels > 1:
            shape[1] *= channels
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return laid_out(drawn.to(device, dtype), case)

    learned = "learned" in uses and len(case.shape) > 1
    coefficients = torch.rand(case.shape[0], 16, generator=generator, dtype=torch.float64) - 0.3
    coefficients[:, 4] = 1.1
    coefficients[1::3, 11] = 0
    coefficients[2::3, 15] = 0
    if rows == "one":
        coefficients = torch.rand(16, generator=generator, dtype=torch.float64)
    kwargs: dict = {"history": tuple(tensor() for name in ("history0", "history1") if name in uses)}
    if "second" in uses:
        kwargs["second"] = tensor(2 if learned and "second_learned" in uses else 1)
    if "known" in uses:
        kwargs["known"], kwargs["mask"] = tensor(), (tensor() > 0).to(dtype)
    if "prediction" in uses:
        kwargs["prediction"] = tensor()
    output = tensor(2 if learned else 1) if "output" in uses else None
    return tensor(), output, coefficients, kwargs


def definition(x, output, coefficients, key, second=None, history=(), known=None, mask=None, prediction=None):
    """The next x and x0 in float64, and the sizes of their terms."""
    noise = ops.normal(x.shape, key, dtype=torch.float64)
    earlier = [*history, None, None][:2]
    tensors = [None if t is None else t.detach().double() for t in (x, output, second, *earlier, known, mask)]
    y, x0 = reference.diffusion_step(*tensors, coefficients, noise)
    sizes = [None if t is None else t.abs() for t in tensors]
    positive = coefficients.abs()
    # A limit cuts an error as it cuts the value, but never makes one larger.
    positive[..., 4] = float("inf")
    if output is not None and output.shape != x.shape:
        # The exponential's own size.
        n = x.shape[1]
        sizes[1] = torch.cat((sizes[1][:, :n], tensors[1][:, n:]), 1)
        positive[..., 12:14] = coefficients[..., 12:14]
    if mask is not None:
        sizes[6] = tensors[6]
    size_y, size_x0 = reference.diffusion_step(*sizes, positive, noise.abs())
    return y, x0, size_y, size_x0


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_forward(case, dtype, kernels):
    for number, (name, uses) in enumerate(USES.items()):
        if kernels.interpreted and dtype != torch.float32 and name != "everything":
            continue
        key = Key(number).stream(3) if number % 2 else Key(torch.arange(case.shape[0]) + number)
        rows = "one" if number % 3 == 0 else "each"
        x, output, coefficients, kwargs = inputs(case, dtype, uses, kernels.device, rows)
        want, want_x0, size, size_x0 = on_cpu(definition, x, output, coefficients, key, **kwargs)
        y = ops.diffusion_step(x, output, coefficients, key, **kwargs)
        pairs = [(y, want, size)]
        if "prediction" in kwargs:
            pairs.append((kwargs["prediction"], want_x0, size_x0))
        for got, exact, scale in pairs:
            error = (got.cpu().double() - exact).abs()
            bound = ARITHMETIC.get(dtype, 32 * 2.0**-24) * scale + ON_WRITING.get(dtype, 0) * exact.abs() + 2.0**-25
            assert bool((error <= bound).all()), name
            assert got.dtype == dtype
            assert got.is_contiguous(memory_format=case.memory_format)
        on_the_cpu = on_cpu(ops.diffusion_step, x, output, coefficients, key, **kwargs)
        if dtype == torch.float64 and "learned" in uses and kernels.backend != "cpu":
            # In binary64 the exponential is that of each backend's library.
            torch.testing.assert_close(y.cpu(), on_the_cpu, rtol=1e-13, atol=1e-13)
        else:
            assert same_bits(y, on_the_cpu), name
        assert same_bits(ops.diffusion_step(x, output, coefficients.to(kernels.device), key, **kwargs), y), name
        kwargs.pop("prediction", None)
        assert same_bits(ops.diffusion_step(x, output, coefficients, key, **kwargs), y), name
        before = x.clone()
        assert same_bits(ops.diffusion_step(x, output, coefficients, key, out=torch.empty_like(x), **kwargs), y), name
        assert same_bits(x, before), name
        assert ops.diffusion_step(x, output, coefficients, key, out=x, **kwargs) is x, name
        assert same_bits(x, y), name


@pytest.mark.parametrize("shape", [(3, 30_001), (20_000, 3), (2, 3, 110, 111)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("uses", ["everything", "ddpm"])
def test_bits_for_any_threads_and_simd_level(shape, layout, uses, threads, simd_level):
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("channels_last has four dimensions")
    x, output, coefficients, kwargs = inputs(cases.Case(shape, "", layout=layout), torch.float32, USES[uses])
    kwargs.pop("prediction", None)
    here = ops.diffusion_step(x, output, coefficients, Key(4), **kwargs)
    torch.set_num_threads(1)
    cpu.set_simd_level("scalar")
    assert same_bits(here, ops.diffusion_step(x, output, coefficients, Key(4), **kwargs))


def test_bits_for_any_split_of_the_batch_and_layout(kernels):
    x, output, coefficients, _ = inputs(
        cases.Case((6, 4, 9, 9), ""), torch.float32, USES["learned variance"], kernels.device
    )
    whole = ops.diffusion_step(x, output, coefficients, Key(3))
    part = ops.diffusion_step(x[2:5], output[2:5], coefficients[2:5], Key(3).samples(2))
    assert same_bits(part, whole[2:5])
    for one in (x, x.to(memory_format=torch.channels_last)):
        last = ops.diffusion_step(one, output.to(memory_format=torch.channels_last), coefficients, Key(3))
        assert same_bits(last, whole)
        assert last.stride() == one.stride()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_any_strides_and_offset(dtype, kernels):
    memory = torch.randn(4000, dtype=torch.float64).to(kernels.device, dtype)
    picture = (
        torch.randn(4, 6, 5, 5, dtype=torch.float64).to(kernels.device, dtype).to(memory_format=torch.channels_last)
    )
    unaligned = [memory[i : i + 160].view(4, 2, 20) for i in (1, 203, 405, 607, 809, 1011)]
    doubled = memory[1301:1621].view(4, 4, 20)
    views = {
        "unaligned": (unaligned[0], doubled, *unaligned[1:]),
        "transposed": tuple(t.transpose(0, 1) for t in (unaligned[0], unaligned[1], *unaligned[1:])),
        "sliced": tuple(memory[i : i + 320].view(4, 40, 2)[:, ::2, :1] for i in (1, 401, 801, 1201, 1601, 2001, 2401)),
        "channels of a channels_last": tuple(picture[:, i : i + 3] for i in (0, 1, 2, 3, 0, 1, 2)),
    }
    for name, (x, output, second, history0, history1, known, *_) in views.items():
        rows = torch.rand(len(x), 16, dtype=torch.float64)
        mask = (known[:, :1] > 0).to(dtype)

        def step(dense, rows=rows, output=output, mask=mask, others=(x, second, history0, history1, known), **kwargs):
            x, second, history0, history1, known = (t.contiguous() if dense else t for t in others)
            return ops.diffusion_step(
                x, output.contiguous() if dense else output, rows, Key(1), second=second, history=(history0, history1),
                known=known, mask=mask.expand(known.shape).contiguous() if dense else mask, **kwargs,
            )  # fmt: skip

        y = step(False)
        assert same_bits(y, step(True)), name
        memories = torch.zeros(2, *x.shape[:-1], 2 * x.shape[-1], dtype=dtype, device=kernels.device)
        out, prediction = memories[..., ::2]
        step(False, out=out, prediction=prediction)
        assert same_bits(out, y), name
        want = torch.empty_like(x, memory_format=torch.contiguous_format)
        step(True, prediction=want)
        assert same_bits(prediction, want), name


def test_nan_propagates_and_stays_in_its_element(kernels):
    x, output, coefficients, kwargs = inputs(cases.Case((2, 40), ""), torch.float32, USES["everything"], kernels.device)
    usual = ops.diffusion_step(x, output, coefficients, Key(0), **kwargs)
    for name, tensor in {"x": x, "output": output, "second": kwargs["second"], "history": kwargs["history"][1]}.items():
        kept, tensor[1, 3] = tensor[1, 3].item(), float("nan")
        y = ops.diffusion_step(x, output, coefficients, Key(0), **kwargs)
        assert y.isnan().nonzero().tolist() == [[1, 3]], name
        y[1, 3] = usual[1, 3]
        assert same_bits(y, usual), name
        tensor[1, 3] = kept


def test_infinite_outputs_are_cut(kernels):
    x = torch.zeros(1, 4, device=kernels.device)
    output = torch.tensor([[float("inf"), -float("inf"), 3.0, float("nan")]], device=kernels.device)
    y = ops.diffusion_step(x, output, ops.step_coefficients(limit=1.5, x0=2.0), Key(0))
    # 0 * infinity, of the column `direct`, is NaN as everywhere.
    assert y[0, 2].item() == 3.0
    assert y[0].isnan().tolist() == [True, True, False, True]
    x0 = torch.empty_like(x)
    ops.diffusion_step(x, output, ops.step_coefficients(limit=1.5, x0=2.0), Key(0), prediction=x0)
    assert x0[0, :3].tolist() == [1.5, -1.5, 1.5]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_everything_read_may_be_what_is_written(layout, kernels):
    x, _, coefficients, kwargs = inputs(
        cases.Case((2, 4, 9, 9), "", layout=layout), torch.bfloat16, USES["everything"], kernels.device
    )

    def stepped(x, **where):
        given = {"second": x, "history": (x, x), "known": x, "mask": kwargs["mask"], **where}
        return ops.diffusion_step(x, x, coefficients, Key(3), **given)

    want = stepped(x)
    assert stepped(x, out=x) is x
    assert same_bits(x, want)


def test_known_regions_are_kept_exactly(kernels):
    x, output, _, _ = inputs(cases.Case((2, 3, 8, 8), ""), torch.float32, USES["ddpm"], kernels.device)
    known = torch.rand_like(x)
    mask = torch.zeros(2, 1, 8, 8, device=kernels.device)
    mask[:, :, 2:5] = 1
    y = ops.diffusion_step(x, output, ops.step_coefficients(x=0.3, x0=0.2, noise=0.5), Key(0), known=known, mask=mask)
    assert same_bits(y[:, :, 2:5], known[:, :, 2:5])
    assert not bool((y[:, :, :2] == known[:, :, :2]).any())
    noised = ops.step_coefficients(x=0.3, known=0.6, known_noise=0.8)
    y = ops.diffusion_step(x, None, noised, Key(0), known=known, mask=mask)
    level = ops.add_noise(known, 0, diffusion.Schedule([0.6], [0.8]), Key(0))
    assert same_bits(y[:, :, 2:5], level[:, :, 2:5])


def test_a_network_under_autocast(kernels):
    x, output, coefficients, kwargs = inputs(cases.Case((2, 6), ""), torch.float32, USES["guided"], kernels.device)
    output, second = output.bfloat16(), kwargs["second"].half()
    y = ops.diffusion_step(x, output, coefficients, Key(0), second=second)
    assert same_bits(y, ops.diffusion_step(x, output.float(), coefficients, Key(0), second=second.float()))


def test_negative_views_are_written_right():
    x, output, coefficients, _ = inputs(cases.Case((2, 6), ""), torch.float32, USES["ddpm"])
    out, prediction = (torch.zeros(2, 6, dtype=torch.complex64).conj().imag for _ in range(2))
    assert out.is_neg()
    ops.diffusion_step(x, output, coefficients, Key(0), out=out, prediction=prediction)
    want = torch.empty_like(x)
    assert torch.equal(out, ops.diffusion_step(x, output, coefficients, Key(0), prediction=want))
    assert torch.equal(prediction, want)


def test_a_scale_that_is_not_used_may_overflow():
    x, output, _, _ = inputs(cases.Case((1, 2, 3), ""), torch.float32, USES["learned variance"])
    row = ops.step_coefficients(x=1.0, log_scale=200.0, log_scale_slope=1.0)
    output.requires_grad_()
    y = ops.diffusion_step(x, output, row, Key(0))
    (grad,) = torch.autograd.grad(y.sum(), output)
    assert y.isfinite().all()
    assert grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ whole samples


@pytest.mark.parametrize("learned", [False, True])
def test_guidance_rescale(learned, kernels):
    uses = ("output", "second", *(("learned", "second_learned") if learned else ()))
    x, output, _, kwargs = inputs(cases.Case((3, 4, 5, 5), ""), torch.float32, uses, kernels.device)
    row = ops.step_coefficients(output=7.5, second=-6.5, predict_x=0.5, predict_output=0.2, x0=1.0)
    y = ops.diffusion_step(x, output, row, Key(0), guidance_rescale=0.7, **kwargs).cpu()
    first, second, x = (t[:, :4].cpu().double() for t in (output, kwargs["second"], x))
    guided = 7.5 * first - 6.5 * second
    ratio = first.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    want = 0.5 * x + 0.2 * (0.7 * ratio * guided + 0.3 * guided)
    # Standard deviations of 100 values in float32.
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [float("inf"), 1.0, 1.3])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.995, 1.0])
def test_dynamic_thresholding(limit, quantile, kernels):
    x, output, _, _ = inputs(cases.Case((3, 4, 7), ""), torch.float32, USES["ddpm"], kernels.device)
    row = ops.step_coefficients(predict_x=0.5, predict_output=1.5, limit=limit, x0=1.0)
    y = ops.diffusion_step(x, output, row, Key(0), threshold=quantile).cpu().double()
    x0 = 0.5 * x.cpu().double() + 1.5 * output.cpu().double()
    bound = 1.0 if limit == float("inf") else limit
    cut = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(min=bound)[:, None, None]
    torch.testing.assert_close(y, x0.clamp(-cut, cut) * bound / cut, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 4)])
def test_samples_that_do_not_vary_are_not_rescaled(shape, kernels):
    x = torch.ones(shape, device=kernels.device)
    row = ops.step_coefficients(output=2.0, second=-1.0, x0=1.0)
    y = ops.diffusion_step(x, x, row, Key(0), second=x, guidance_rescale=0.5, threshold=0.5)
    assert same_bits(y, x)


# ------------------------------------------------------------------------------------------------ autograd, compiler


@pytest.mark.parametrize("uses", ["ddpm", "everything", "noise alone"])
def test_gradcheck(uses, kernels):
    if kernels.interpreted:
        pytest.skip("Triton's interpreter is too slow for numerical gradients")
    case = cases.Case((2, 2, 3, 3), "", layout="channels_last")
    x, output, coefficients, kwargs = inputs(case, torch.float64, USES[uses], kernels.device)
    kwargs.pop("prediction", None)
    mask = kwargs.pop("mask", None)
    names = [name for name, value in {"output": output, **kwargs}.items() if isinstance(value, torch.Tensor)]
    leaves = [x, *[output if name == "output" else kwargs[name] for name in names], *kwargs["history"]]

    def step(x, *values):
        given = dict(zip(names, values, strict=False))
        history = values[len(names) :]
        return ops.diffusion_step(
            x, given.pop("output", None), coefficients, Key(1), history=history, mask=mask, **given
        )

    assert torch.autograd.gradcheck(step, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
@pytest.mark.parametrize("uses", list(USES))
def test_opcheck(uses, kernels):
    if kernels.emulated and uses != "everything":
        pytest.skip("what the check sees does not depend on what runs the op")
    x, output, coefficients, kwargs = inputs(
        cases.Case((2, 3, 5, 5), "", layout="channels_last"), torch.float32, USES[uses], kernels.device
    )
    history = [*kwargs["history"], None, None][:2]
    args = (
        x,
        output,
        kwargs.get("second"),
        *history,
        kwargs.get("known"),
        kwargs.get("mask"),
        coefficients,
        Key(1).packed,
    )
    torch.library.opcheck(torch.ops.gencore.diffusion_step.default, args)
    if output is not None:
        wanting = (x.clone().requires_grad_(), output.clone().requires_grad_(), *args[2:])
        torch.library.opcheck(torch.ops.gencore.diffusion_step.default, wanting)
    prediction = torch.empty_like(x) if "prediction" in kwargs else None
    torch.library.opcheck(torch.ops.gencore.diffusion_step_out.default, (*args, torch.empty_like(x), prediction))


def stepped(x, output, coefficients, key):
    y = ops.diffusion_step(x, output, coefficients, key.stream(1))
    return ops.diffusion_step(y.square(), y, coefficients, key, guidance_rescale=0.5, history=(x,))


def test_compiles_whole_and_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stepped, fullgraph=True, backend=counter)
    x, output, coefficients, _ = inputs(cases.Case((4, 6), ""), torch.float32, USES["ddpm"])
    for seed in range(3):
        key, rows = Key(seed).samples(10 * seed), coefficients + seed
        assert torch.equal(compiled(x, output, rows, key), stepped(x, output, rows, key))
    assert counter.frame_count == 1


def in_place(x, output, coefficients, key):
    return ops.diffusion_step(x, output, coefficients, key, out=x) * 2


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_compiles_in_place_with_inductor(kernels):
    if kernels.emulated:
        pytest.skip("the compiler sees the same op, whatever runs it")
    torch._dynamo.reset()
    compiled = torch.compile(in_place, fullgraph=True, dynamic=True)
    for shape in ((4, 3, 6, 6), (7, 3, 5, 6)):
        x, output, coefficients, _ = inputs(
            cases.Case(shape, "", layout="channels_last"), torch.float32, USES["ddpm"], kernels.device
        )
        mine = x.clone()
        want = in_place(mine, output, coefficients, Key(5))
        assert torch.equal(compiled(x, output, coefficients, Key(5)), want)
        assert torch.equal(x, mine)


def test_says_which_backend():
    assert "diffusion_step on cpu: cpu" in str(explain(ops.diffusion_step, X, X, ROW))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    rows, elements = 2, (1 << 30) + 3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.zeros(rows, elements, dtype=torch.bfloat16, device=device)
    row = ops.step_coefficients(x=0.5, x0=0.25, noise=1.5)
    ops.diffusion_step(x, x, row, Key(1), out=x)
    # Not the bits: 0 + 1.5 * -0 is 0.
    want = 1.5 * ops.normal((1, elements), Key(1).samples(1), device=device)
    assert torch.equal(x[1], want[0].bfloat16())


# ------------------------------------------------------------------------------------------------ contract

X = torch.zeros(2, 3)
ROW = ops.step_coefficients(x=1.0)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([1.0], X, ROW), {}, TypeError, "x must be a tensor, got list"),
        ((X, [1.0], ROW), {}, TypeError, "output must be a tensor, got list"),
        (
            (X, X[:, :2], ROW),
            {},
            ValueError,
            r"output must have the shape of x, \(2, 3\), or \(2, 6\) with a variance, got",
        ),
        ((X, X.double(), ROW), {}, TypeError, "output must have the dtype of x, torch.float32, got torch.float64"),
        ((X, torch.zeros(2, 6).double(), ROW), {}, TypeError, "output must have the dtype of x"),
        ((X, X, [1.0]), {}, TypeError, "coefficients must be a tensor, got list; step_coefficients makes one"),
        (
            (X, X, ROW.to_sparse()),
            {},
            ValueError,
            r"coefficients must be a dense \(strided\) tensor, got one of layout",
        ),
        (
            (X, X, torch.nested.nested_tensor([ROW.flatten(), ROW.flatten()[:3]])),
            {},
            ValueError,
            "coefficients must be a dense .* got a nested tensor",
        ),
        ((X, X, ROW.float()), {}, TypeError, "coefficients must be of torch.float64, got torch.float32"),
        (
            (X, X, ROW[:3]),
            {},
            ValueError,
            r"coefficients must be of shape \(16,\), or \(2, 16\) with a row per sample, got",
        ),
        ((X, X, ROW.expand(3, 16)), {}, ValueError, r"coefficients must be .*, got \(3, 16\)"),
        ((X, X, ROW.to("meta")), {}, ValueError, "coefficients must be on the CPU or on cpu, got meta"),
        ((X, X, ROW.clone().requires_grad_()), {}, ValueError, "coefficients must not require a gradient"),
        ((X, X, ROW, 3), {}, TypeError, "key must be a gencore.Key or None, got int"),
        ((X, X, ROW), {"second": X[:1]}, ValueError, "second must have the shape of x"),
        ((X, None, ROW), {"second": X}, ValueError, "output must be given with second, got None"),
        ((X, X, ROW), {"history": X}, TypeError, "history must be a sequence of tensors, got Tensor"),
        ((X, X, ROW), {"history": None}, TypeError, "history must be a sequence of tensors, got NoneType"),
        ((X, X, ROW), {"history": 3}, TypeError, "history must be a sequence of tensors, got int"),
        ((X, X, ROW), {"history": (X, X, X)}, ValueError, "history must hold at most two tensors, got 3"),
        ((X, X, ROW), {"history": (X, X[:1])}, ValueError, r"history\[1\] must have the shape of x"),
        ((X, X, ROW), {"known": X}, ValueError, "mask must be given with known, got None"),
        ((X, X, ROW), {"mask": X}, ValueError, "known must be given with mask, got None"),
        (
            (X, X, ROW),
            {"known": X, "mask": X[:, :2]},
            ValueError,
            r"mask must have a shape that broadcasts to that of x",
        ),
        ((X, X, ROW), {"known": X, "mask": X > 0}, TypeError, "dtype of mask must be one of float32"),
        ((X, X, ROW), {"known": X, "mask": X.double()}, TypeError, "mask must have the dtype of x"),
        ((X, X, ROW), {"guidance_rescale": 1.5}, ValueError, "guidance_rescale must be from 0 to 1, got 1.5"),
        ((X, X, ROW), {"guidance_rescale": "a"}, TypeError, "guidance_rescale must be a number, got str"),
        ((X, X, ROW), {"threshold": 2}, ValueError, "threshold must be from 0 to 1, got 2"),
        ((X, None, ROW), {"threshold": 0.9}, ValueError, "output must be given with guidance_rescale or threshold"),
        (
            (X, None, ROW),
            {"prediction": X.clone()},
            ValueError,
            "output must be given where prediction is to be written",
        ),
        ((X, X, ROW), {"out": X[:1]}, ValueError, "out must have the shape of x"),
        ((X, X, ROW), {"prediction": X[:1]}, ValueError, "prediction must have the shape of x"),
        ((X, X, ROW), {"out": X.view(3, 2).t()}, ValueError, "out must be x itself or lie apart from x in memory"),
        ((X.clone(), X, ROW), {"out": X}, ValueError, "out must be x itself or lie apart from output in memory"),
        ((X.clone(), X.clone(), ROW), {"out": X, "prediction": X}, ValueError, "out must be .* apart from prediction"),
        ((X, X.clone(), ROW), {"prediction": X}, ValueError, "prediction must lie apart from x in memory"),
        ((X, X.clone(), ROW), {"out": X, "prediction": X}, ValueError, "prediction must lie apart from x in memory"),
        ((X.clone().requires_grad_(), X, ROW), {"out": X.clone()}, ValueError, "out must be left out where a gradient"),
    ],
)
def test_says_what_is_wrong(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.diffusion_step(*args, **kwargs)
    assert torch.equal(X, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"sigma": 1.0}, TypeError, "columns must be of output, second, .*, got sigma"),
        ({"x": "much"}, TypeError, "x must be a number or several, got str"),
        ({"x": [1.0, 2.0], "x0": [1.0]}, ValueError, r"x0 must be a number or 2 of them, got shape \(1,\)"),
        ({"x": [[1.0]]}, ValueError, r"x must be a number or one-dimensional, got shape \(1, 1\)"),
    ],
)
def test_coefficients_say_what_is_wrong(columns, error, message):
    with pytest.raises(error, match=message):
        ops.step_coefficients(**columns)


def test_coefficients():
    row = ops.step_coefficients(x=0.25, noise=2)
    named = dict(zip(ops.STEP_COLUMNS, row.tolist(), strict=True))
    ones = ("output", "predict_output", "x0_scale", "known")
    assert all(named.pop(name) == 1 for name in ones)
    assert (named.pop("x"), named.pop("noise"), named.pop("limit")) == (0.25, 2.0, float("inf"))
    assert set(named.values()) == {0.0}
    rows = ops.step_coefficients(x=torch.tensor([1.0, 2.0]), known=0.5)
    assert (rows.shape, rows.dtype) == ((2, 16), torch.float64)
    assert torch.equal(rows[1], ops.step_coefficients(x=2.0, known=0.5))


def test_default_key_follows_manual_seed():
    row = ops.step_coefficients(noise=1.0)
    torch.manual_seed(3)
    first, second = (ops.diffusion_step(X, X, row) for _ in range(2))
    torch.manual_seed(3)
    assert same_bits(ops.diffusion_step(X, X, row), first)
    assert not torch.equal(first, second)
