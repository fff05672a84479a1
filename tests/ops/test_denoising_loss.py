"""The training loss and its gradient, against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernels import BACKENDS
from support import laid_out, on_cpu, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

from gencore import Key, diffusion, explain, ops
from gencore.backends import cpu
from gencore.backends.reference import denoising_loss as reference
from gencore.bench import cases
from gencore.schedule import posterior

CASES = cases.small(cases.DIFFUSION)
SCHEDULE = diffusion.linear(50, 1e-3, 0.2)
CPU = torch.device("cpu")
# Units of the arithmetic, relative to the sizes of the terms: a coefficient, a product, a sum and a difference, all
# squared, for an element; 64 sums of 1,024 terms in 16 lanes for their mean. The bound's exponentials have arguments
# that are rounded too, of a size that the scale below counts in.
UNIT = {torch.float64: 2.0**-53}
ELEMENT, MEAN = 16, 128
# The half types round once more, on writing: half a unit in the last of their 8 and 11 bits.
ON_WRITING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def inputs(case, dtype, learned, device="cpu", seed=0):
    """(output, x0, t), where some samples are at t = 0, for 8-bit data."""
    generator = torch.Generator().manual_seed(seed)
    shape = list(case.shape)
    x0 = torch.randint(0, 256, shape, generator=generator).double() / 127.5 - 1
    if learned:
        shape[1] *= 2
    output = torch.randn(shape, generator=generator, dtype=torch.float64)
    t = torch.randint(len(SCHEDULE), case.shape[:1], generator=generator)
    t[::3] = 0
    return laid_out(output.to(device, dtype), case), laid_out(x0.to(device, dtype), case), t.to(device)


def table_of(parameterization, weighting="simple", variance=None, bound_weight=0.0):
    return SCHEDULE.loss_table(CPU, parameterization, weighting, 5.0, variance, bound_weight)


def scale_of(output, x0, table, t, noise):
    """The sizes of what each element's term is made of, for the error, the bound and the prediction alone; and
    what the definition's own differences of probabilities lose, in units of 2^-53."""
    rows = table[t].reshape(-1, 8, *[1] * (x0.dim() - 1)).unbind(1)
    of_x0, of_noise, weight, bound_weight, moved, middle, half_range, true = rows
    prediction, place = output.chunk(2, 1) if output.shape != x0.shape else (output, torch.zeros_like(output))
    size = prediction.abs() + of_x0.abs() * x0.abs() + of_noise.abs() * noise.abs()
    log_variance = middle + half_range * place
    gap = torch.where(true.isinf(), torch.zeros_like(place), log_variance - true)
    sharpness = 1 + log_variance.abs() + gap.abs()
    apart = (moved * size).square() * torch.exp(-log_variance)
    bound = bound_weight * sharpness * (1 + gap.abs() + torch.exp(-gap) + apart)
    # A bin's probability changes with its place in deviations, times that place.
    bound = torch.where(true.isinf(), bound_weight * (30 + 8 * apart), bound)
    error = prediction - of_x0 * x0 - of_noise * noise
    probability = torch.exp(-reference.decoder_nll(x0, x0 + moved * error, log_variance))
    lost = torch.where(true.isinf(), bound_weight * (1 + 8 * apart) / probability, torch.zeros_like(bound))
    return weight * size.square(), bound, weight * size, lost


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_forward_and_backward(case, dtype, kernels):
    ways = [(False, "eps", "simple"), (False, "v", "min_snr")]
    if len(case.shape) > 1:
        ways.append((True, "eps", "simple"))
    for learned, parameterization, weighting in ways:
        output, x0, t = inputs(case, dtype, learned, kernels.device)
        key = Key(torch.arange(case.shape[0]) - 1) if learned else Key(7).stream(3).samples(2**32 - 1)
        settings = {"parameterization": parameterization, "weighting": weighting}
        weight = 0.02
        variance, scaled = ("learned_range", weight * 50 / math.log(2)) if learned else (None, 0.0)
        table = table_of(parameterization, weighting, variance, scaled)
        noise = on_cpu(ops.normal, case.shape, key, dtype=torch.float64)
        output64 = output.cpu().double().contiguous().requires_grad_()
        x064, t64 = x0.cpu().double().contiguous(), t.cpu()
        want = reference.denoising_loss(output64, x064, table[t64], noise)

        output.requires_grad_()
        loss = ops.denoising_loss(output, x0, t, SCHEDULE, key, bound_weight=weight, **settings)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if case.elements == 0:
            assert loss.isnan().all() if case.shape[0] else loss.shape == (0,)
            continue
        of_error, of_bound, of_slope, lost = scale_of(output64.detach(), x064, table, t64, noise)
        unit = UNIT.get(dtype, 2.0**-24)
        of_sample = (MEAN * unit * (of_error + of_bound) + 2.0**-53 * lost).reshape(len(x064), -1).mean(1)
        assert bool(((loss.cpu().double() - want).abs() <= of_sample).all())

        g = torch.rand(case.shape[:1], dtype=loss.dtype) + 0.5
        (grad,) = torch.autograd.grad(loss, output, g.to(kernels.device))
        (grad64,) = torch.autograd.grad(want, output64, g.double())
        assert grad.dtype == dtype
        assert grad.is_contiguous(memory_format=case.memory_format)
        per_element = (g.double() / math.prod(case.shape[1:])).reshape(-1, *[1] * (len(case.shape) - 1))
        size = 2 * ELEMENT * unit * per_element * of_slope
        if learned:
            of_place = per_element * table[t64, 6].reshape(per_element.shape)
            size = torch.cat((size, of_place * (ELEMENT * unit * of_bound + 2.0**-53 * lost)), 1)
        error = (grad.cpu().double() - grad64).abs()
        smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-149
        # The CPU writes prediction - target, and its multiple in the same place.
        writings = 1 if learned or kernels.backend != "cpu" else 2
        allowed = size + writings * ON_WRITING.get(dtype, 0) * grad64.abs() + smallest
        assert bool((error <= allowed).all()), (error / allowed).max()


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v", "velocity"])
@pytest.mark.parametrize("weighting", ["simple", "snr", "min_snr"])
def test_loss_is_what_the_papers_say(parameterization, weighting):
    """For a network that errs by e in x0, the loss is a weight of the paper's times e^2, whatever it predicts."""
    schedule = diffusion.flow(50) if parameterization == "velocity" else SCHEDULE
    x0, t, key = torch.rand(20, 6, dtype=torch.float64), torch.arange(0, 50, 2)[:20], Key(3)
    x_t, eps = ops.add_noise(x0, t, schedule, key, return_noise=True)
    alpha, sigma = schedule.alpha[t, None], schedule.sigma[t, None]
    wrong = x0 + 0.1
    noise = (x_t - alpha * wrong) / sigma
    output = {"eps": noise, "x0": wrong, "v": alpha * noise - sigma * wrong, "velocity": noise - wrong}[
        parameterization
    ]
    loss = ops.denoising_loss(output, x0, t, schedule, key, parameterization=parameterization, weighting=weighting)
    snr = (alpha / sigma).square()[:, 0]
    of_x0 = {"snr": snr, "min_snr": snr.clamp(max=5.0)}
    target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0}[parameterization]
    want = 0.01 * of_x0[weighting] if weighting in of_x0 else (output - target).square().mean(1)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)


def test_weights_of_ones_own():
    output, x0, t = inputs(cases.Case((6, 8), ""), torch.float32, False)
    weights = torch.rand(50)
    plain = ops.denoising_loss(output, x0, t, SCHEDULE, Key(1))
    weighed = ops.denoising_loss(output, x0, t, SCHEDULE, Key(1), weighting=weights)
    torch.testing.assert_close(weighed, weights[t] * plain)
    gammas = [ops.denoising_loss(output, x0, t, SCHEDULE, Key(1), weighting="min_snr", gamma=g) for g in (1.0, 9.0)]
    assert not torch.equal(*gammas)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_variational_bound(variance, kernels):
    """Against the divergence of two normal distributions, and the probability of a bin, as torch computes them."""
    learned = variance == "learned_range"
    output, x0, t = inputs(cases.Case((9, 2, 5), ""), torch.float64, learned, kernels.device)
    bound = ops.variational_bound(output, x0, t, SCHEDULE, Key(1), variance=variance).cpu()
    output, x0, t = output.cpu(), x0.cpu(), t.cpu()
    eps = ops.normal(x0.shape, Key(1), dtype=torch.float64) if kernels.backend == "cpu" else None
    if eps is None:
        eps = on_cpu(ops.normal, x0.shape, Key(1), dtype=torch.float64)
    betas, small, of_x0, of_x_t = (c[t, None, None] for c in posterior(SCHEDULE.alphas_cumprod))
    alpha, sigma = SCHEDULE.alpha[t, None, None], SCHEDULE.sigma[t, None, None]
    x_t = alpha * x0 + sigma * eps
    prediction, place = output.chunk(2, 1) if learned else (output, None)
    guess = (x_t - sigma * prediction) / alpha
    first = posterior(SCHEDULE.alphas_cumprod)[1][1]
    low = torch.where(t[:, None, None] == 0, first, small)
    spread = {"fixed_small": low, "fixed_large": torch.where(t[:, None, None] == 0, first, betas)}.get(variance)
    if learned:
        spread = torch.exp((place + 1) / 2 * betas.log() + (1 - place) / 2 * low.log())
    p = torch.distributions.Normal(of_x0 * guess + of_x_t * x_t, spread.expand(x0.shape).sqrt())
    later = t > 0
    q = torch.distributions.Normal((of_x0 * x0 + of_x_t * x_t)[later], small.expand(x0.shape)[later].sqrt())
    at = torch.distributions.Normal(p.loc[later], p.scale[later])
    torch.testing.assert_close(
        bound[later], torch.distributions.kl_divergence(q, at).mean((1, 2)), rtol=1e-9, atol=1e-12
    )
    above, below = p.cdf(x0 + 1 / 255), p.cdf(x0 - 1 / 255)
    above, below = torch.where(x0 > 0.999, 1.0, above), torch.where(x0 < -0.999, 0.0, below)
    nll = -torch.log((above - below).clamp(min=1e-12)).mean((1, 2))
    # Here the tails' differences lose digits, up to one of the 1e-16 that stands beside 1e-12.
    torch.testing.assert_close(bound[~later], nll[~later], rtol=1e-4, atol=1e-6)


def test_hybrid_loss_trains_the_variance_alone_by_the_bound(kernels):
    output, x0, t = inputs(cases.Case((4, 3, 5), ""), torch.float32, True, kernels.device)
    output.requires_grad_()
    losses = [ops.denoising_loss(output, x0, t, SCHEDULE, Key(1), bound_weight=weight) for weight in (0.0, 0.001, 0.1)]
    grads = [torch.autograd.grad(loss.sum(), output)[0] for loss in losses]
    assert all(same_bits(grad[:, :3], grads[0][:, :3]) for grad in grads)
    assert not grads[0][:, 3:].any()
    torch.testing.assert_close(grads[2][:, 3:], 100 * grads[1][:, 3:], rtol=1e-5, atol=0)
    bound = ops.variational_bound(output, x0, t, SCHEDULE, Key(1), variance="learned_range")
    torch.testing.assert_close(losses[2] - losses[0], 0.1 * 50 / math.log(2) * bound, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 30_001), (20_000, 3), (2, 3, 110, 111)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_for_any_threads_and_simd_level(shape, layout, dtype, threads, simd_level):
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("channels_last has four dimensions")
    output, x0, t = inputs(cases.Case(shape, "", layout=layout), dtype, True)
    output.requires_grad_()

    def run():
        loss = ops.denoising_loss(output, x0, t, SCHEDULE, Key(torch.arange(shape[0])))
        return loss.detach(), torch.autograd.grad(loss.sum(), output)[0]

    here = run()
    torch.set_num_threads(1)
    cpu.set_simd_level("scalar")
    assert all(same_bits(a, b) for a, b in zip(here, run(), strict=True))


def test_bits_for_any_split_of_the_batch(kernels):
    output, x0, t = inputs(cases.Case((6, 4, 9, 9), ""), torch.float32, True, kernels.device)
    whole = ops.denoising_loss(output, x0, t, SCHEDULE, Key(3))
    part = ops.denoising_loss(output[2:5], x0[2:5], t[2:5], SCHEDULE, Key(3).samples(2))
    assert same_bits(part, whole[2:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_and_offset(dtype, kernels):
    memory = torch.randn(4000, dtype=torch.float64).to(kernels.device, dtype)
    picture = (
        torch.randn(4, 6, 5, 5, dtype=torch.float64).to(kernels.device, dtype).to(memory_format=torch.channels_last)
    )
    views = {
        "unaligned": (memory[1:161].view(4, 40), memory[333:493].view(4, 40)),
        "unaligned, learned": (memory[1:321].view(4, 4, 20), memory[333:493].view(4, 2, 20)),
        "sliced": (memory[:640].view(4, 80, 2)[:, ::2, 0], memory[640:1280].view(4, 80, 2)[:, ::2, 1]),
        "expanded": (memory[:40].expand(4, 40), memory[40:80].expand(4, 40)),
        "one channel of channels_last": (picture[:, :2], picture[:, 2:3]),
        "formats that differ": (picture, picture[:, :3].contiguous()),
        "channels of a channels_last": (picture[:, 1:3], picture[:, 3:5]),
    }
    t = torch.tensor([0, 3, 20, 49], device=kernels.device)
    for name, (output, x0) in views.items():
        pairs = [(o.detach().requires_grad_(), x) for o, x in ((output, x0), (output.contiguous(), x0.contiguous()))]
        losses = [ops.denoising_loss(o, x, t, SCHEDULE, Key(1)) for o, x in pairs]
        # Sums are taken in the order of memory: between formats they differ by roundings.
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0, msg=name)
        g = torch.linspace(1, 2, 8, device=kernels.device)[::2]
        assert same_bits(*(torch.autograd.grad(loss, o, g)[0] for loss, (o, _) in zip(losses, pairs, strict=True))), (
            name
        )


def test_nan_propagates_and_stays_in_its_sample(kernels):
    output, x0, t = inputs(cases.Case((3, 2, 50), ""), torch.float32, True, kernels.device)
    for tensor in (output, x0):
        tensor[1, 1, 3] = float("nan")
        loss = ops.denoising_loss(output, x0, t, SCHEDULE, Key(1), parameterization="v")
        assert loss.isnan().tolist() == [False, True, False]
        tensor[1, 1, 3] = 0.5


def test_a_step_out_of_range_on_the_device(kernels):
    """The CPU's kernels refuse it; the others cannot without waiting, and make its loss and gradient NaN."""
    output, x0, _ = inputs(cases.Case((4, 6), ""), torch.float32, False, kernels.device)
    t = torch.tensor([3, 50, -1, 4], device=kernels.device)
    if kernels.backend == "cpu":
        with pytest.raises(ValueError, match=r"t must be in \[0, 50\), the steps of the schedule, got 50 for sample 1"):
            ops.denoising_loss(output, x0, t, SCHEDULE, Key(0))
        return
    output.requires_grad_()
    loss = ops.denoising_loss(output, x0, t, SCHEDULE, Key(0))
    assert loss.isnan().tolist() == [False, True, True, False]
    (grad,) = torch.autograd.grad(loss.sum(), output)
    assert grad.isnan().all(1).tolist() == [False, True, True, False]


# ------------------------------------------------------------------------------------------------ autograd, compiler


@pytest.mark.parametrize("learned", [False, True])
def test_gradcheck(learned, kernels):
    if kernels.interpreted:
        pytest.skip("Triton's interpreter is too slow for numerical gradients")
    output, x0, t = inputs(cases.Case((3, 2, 3, 3), "", layout="channels_last"), torch.float64, learned, kernels.device)
    if not learned:
        leaves = (output.requires_grad_(), x0.requires_grad_())
        assert torch.autograd.gradcheck(
            lambda o, x: ops.denoising_loss(o, x, t, SCHEDULE, Key(1), parameterization="v"), leaves
        )
        return
    # The prediction has no gradient of the bound, by intent, so only that for the variance can be checked.
    prediction, place = output[:, :2].clone(), output[:, 2:].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: ops.denoising_loss(torch.cat((prediction, v), 1), x0, t, SCHEDULE, Key(1), bound_weight=1.0), (place,)
    )


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
@pytest.mark.parametrize("learned", [False, True])
def test_opcheck(learned, kernels):
    if kernels.emulated and not learned:
        pytest.skip("what the check sees does not depend on what runs the op")
    case = cases.Case((2, 3, 5, 5), "", layout="channels_last")
    output, x0, t = inputs(case, torch.float32, learned, kernels.device)
    table = table_of("eps", variance="learned_range" if learned else None, bound_weight=0.1).to(kernels.device)
    key = Key(1).packed
    for one in (output, output.clone().requires_grad_()):
        torch.library.opcheck(torch.ops.gencore.denoising_loss.default, (one, x0, table, t, key, None))
    torch.library.opcheck(torch.ops.gencore.denoising_loss.default, (one, x0, table, t, key, torch.randn_like(x0)))
    grad = torch.ones(2, device=kernels.device)
    torch.library.opcheck(torch.ops.gencore.denoising_loss_backward.default, (grad, output, x0, table, t, key, None))


def test_nothing_of_the_noise_is_saved_or_made():
    output, x0, t = inputs(cases.Case((8, 1000), ""), torch.float32, False)
    output.requires_grad_()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = ops.denoising_loss(output, x0, t, SCHEDULE, Key(0))
    large = [tensor for tensor in saved if tensor.numel() >= 8000]
    assert [tensor.data_ptr() for tensor in large[:2]] == [output.data_ptr(), x0.data_ptr()]
    (error,) = large[2:]
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.denoising_loss(output.detach(), x0, t, SCHEDULE, Key(0))
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) < 1000
    # The gradient's place is there: the forward pass left in it what it is a multiple of.
    (grad,) = torch.autograd.grad(loss.sum(), output)
    assert grad.data_ptr() == error.data_ptr()


def test_hooks_of_saved_tensors_move_all_that_is_saved():
    """Offloading and checkpointing: what the forward pass left comes back from where the hook put it."""
    output, x0, t = inputs(cases.Case((3, 2, 5, 5), ""), torch.float32, False)
    output.requires_grad_()
    (want,) = torch.autograd.grad(ops.denoising_loss(output, x0, t, SCHEDULE, Key(1)).sum(), output)
    put_away: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> int:
        put_away.append(tensor.clone())
        return len(put_away) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda place: put_away[place].clone()):
        loss = ops.denoising_loss(output, x0, t, SCHEDULE, Key(1))
    assert not any(isinstance(value, torch.Tensor) for value in loss.grad_fn.__dict__.values())
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
        assert same_bits(grad, want)
    loss = torch.utils.checkpoint.checkpoint(ops.denoising_loss, output, x0, t, SCHEDULE, Key(1), use_reentrant=False)
    assert same_bits(torch.autograd.grad(loss.sum(), output)[0], want)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5, 7), (3, 5, 16, 16), (3, 30_001)], ids=str)
def test_noise_that_is_given(shape, dtype, kernels):
    """It takes the place of what the key says: of the same bits where it was not rounded."""
    for learned in (False, True):
        for layout in ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",):
            output, x0, t = inputs(cases.Case(shape, "", layout=layout), dtype, learned, kernels.device)
            memory_format = cases.Case(shape, "", layout=layout).memory_format
            _, noise = ops.add_noise(x0, t, SCHEDULE, Key(3), return_noise=True)
            assert noise.is_contiguous(memory_format=memory_format)
            output.requires_grad_()
            given = ops.denoising_loss(output, x0, t, SCHEDULE, noise=noise, parameterization="v")
            (grad,) = torch.autograd.grad(given.sum(), output)
            if dtype in (torch.float32, torch.float64):
                made = ops.denoising_loss(output, x0, t, SCHEDULE, Key(3), parameterization="v")
                assert same_bits(given, made)
                assert same_bits(grad, torch.autograd.grad(made.sum(), output)[0])
            table = table_of("v", variance="learned_range" if learned else None, bound_weight=0.001 * 50 / math.log(2))
            wide = output.detach().cpu().double().requires_grad_()
            want = reference.denoising_loss(wide, x0.cpu().double(), table[t.cpu()], noise.cpu().double())
            torch.testing.assert_close(given.detach().cpu().double(), want.detach(), rtol=1e-4, atol=1e-6)
            (grad64,) = torch.autograd.grad(want.sum(), wide)
            size = grad64.abs().max().item()
            # The definition's own differences of probabilities lose digits.
            tolerance = {torch.float64: 1e-7, torch.float32: 1e-5}.get(dtype, 4 * ON_WRITING.get(dtype, 0))
            smallest = 2.0**-24 if dtype == torch.float16 else 0
            torch.testing.assert_close(
                grad.cpu().double(), grad64, rtol=tolerance, atol=1e-2 * tolerance * size + smallest
            )


def test_gradient_for_the_noise():
    output, x0, t = inputs(cases.Case((3, 2, 5), ""), torch.float64, False)
    leaves = (output.requires_grad_(), x0.requires_grad_(), torch.randn_like(output).requires_grad_())

    def loss(output, x0, noise):
        return ops.denoising_loss(output, x0, t, SCHEDULE, noise=noise, parameterization="v")

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_passes_of_one_graph(dtype):
    """The first takes what the forward pass left; others, and those that are differentiated, make the noise again."""
    output, x0, t = inputs(cases.Case((3, 2, 5, 5), "", layout="channels_last"), dtype, False)
    output.requires_grad_()
    g = torch.tensor([1.0, -2.0, 0.5])
    loss = ops.denoising_loss(output, x0, t, SCHEDULE, Key(1))
    first, second = (torch.autograd.grad(loss, output, g, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, second, rtol=0 if dtype == torch.float32 else 2 * ON_WRITING[dtype], atol=0)
    again = ops.denoising_loss(output, x0, t, SCHEDULE, Key(1))
    (differentiable,) = torch.autograd.grad(again, output, g, create_graph=True)
    assert same_bits(differentiable.detach(), second)
    assert differentiable.requires_grad
    several = ops.denoising_loss(output, x0, t, SCHEDULE, Key(1))
    (batched,) = torch.autograd.grad(several, output, torch.eye(3), is_grads_batched=True)
    torch.testing.assert_close((g.view(3, 1, 1, 1, 1) * batched).sum(0).to(dtype), second)


def test_what_was_changed_since_the_forward_pass_is_noticed():
    output, x0, t = inputs(cases.Case((3, 8), ""), torch.float32, False)
    doubled = 2 * output.requires_grad_()
    loss = ops.denoising_loss(doubled, x0, t, SCHEDULE, Key(1))
    doubled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def trained(output, x0, t, key):
    x_t = ops.add_noise(x0, t, SCHEDULE, key)
    return ops.denoising_loss(output * x_t, x0, t, SCHEDULE, key, parameterization="v").mean()


def test_compiles_whole_and_once():
    torch._dynamo.reset()
    trained(*inputs(cases.Case((1, 1), ""), torch.float32, False), Key(0))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(trained, fullgraph=True, backend=counter)
    for seed in range(3):
        output, x0, t = inputs(cases.Case((4, 6), ""), torch.float32, False, seed=seed)
        output.requires_grad_()
        values = compiled(output, x0, t, Key(seed)), trained(output, x0, t, Key(seed))
        assert torch.equal(*values)
        assert torch.equal(*(torch.autograd.grad(value, output)[0] for value in values))
    assert counter.frame_count == 1


@pytest.mark.parametrize("bound", [False, True])
def test_compiles_whole_with_a_new_schedule(bound):
    torch._dynamo.reset()
    output, x0, t = inputs(cases.Case((4, 2, 3), ""), torch.float32, True)
    schedule = diffusion.linear(50, 1e-3, 0.2)

    def run(output, x0, t, key):
        if bound:
            return ops.variational_bound(output, x0, t, schedule, key, variance="learned_range")
        return ops.denoising_loss(output, x0, t, schedule, key)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(output, x0, t, Key(1)), run(output, x0, t, Key(1)))


def test_tables_do_not_pile_up():
    output, x0, t = inputs(cases.Case((4, 6), ""), torch.float32, False)
    schedule = diffusion.linear(50)
    for gamma in range(1, 100):
        ops.denoising_loss(output, x0, t, schedule, Key(0), weighting="min_snr", gamma=gamma)
    assert len(schedule._tables) < 20


def test_nan_of_data_that_the_target_does_not_hold_is_not_read(kernels):
    output, _, t = inputs(cases.Case((3, 50), ""), torch.float32, False, kernels.device)
    x0 = torch.full_like(output, float("nan"))
    assert ops.denoising_loss(output, x0, t, SCHEDULE, Key(1)).isfinite().all()


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_compiles_with_inductor_and_dynamic_shapes(kernels):
    if kernels.emulated:
        pytest.skip("the compiler sees the same op, whatever runs it")
    torch._dynamo.reset()
    compiled = torch.compile(trained, fullgraph=True, dynamic=True)
    for shape in ((4, 3, 6, 6), (7, 3, 5, 6)):
        case = cases.Case(shape, "", layout="channels_last")
        output, x0, t = inputs(case, torch.float32, False, kernels.device)
        assert torch.allclose(compiled(output, x0, t, Key(5)), trained(output, x0, t, Key(5)), rtol=1e-5)


def test_autocast():
    output, x0, t = inputs(cases.Case((4, 6), ""), torch.bfloat16, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.denoising_loss(output, x0, t, SCHEDULE, Key(0)).dtype == torch.float32
    # What a network says there of float32 data.
    output.requires_grad_()
    loss = ops.denoising_loss(output, x0.float(), t, SCHEDULE, Key(0))
    assert same_bits(loss, ops.denoising_loss(output.float(), x0.float(), t, SCHEDULE, Key(0)))
    assert torch.autograd.grad(loss.sum(), output)[0].dtype == torch.bfloat16


def test_says_which_backend():
    assert "denoising_loss on cpu: cpu" in str(explain(ops.denoising_loss, X, X, T, SCHEDULE, KEY))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    rows, elements = 2, (1 << 30) + 3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x0 = torch.zeros(rows, elements, dtype=torch.bfloat16, device=device)
    loss = ops.denoising_loss(x0, x0, torch.tensor([0, 49], device=device), SCHEDULE, Key(1))
    # The mean square of 2^30 standard normals.
    assert torch.allclose(loss.cpu(), torch.ones(2), atol=1e-3)


# ------------------------------------------------------------------------------------------------ contract

X = torch.zeros(2, 3)
T = torch.zeros(2, dtype=torch.int64)
KEY = Key(0)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([1.0], X, T, SCHEDULE, KEY), {}, TypeError, "model_output must be a tensor, got list"),
        ((X, [1.0], T, SCHEDULE, KEY), {}, TypeError, "x0 must be a tensor, got list"),
        (
            (X[:, :2], X, T, SCHEDULE, KEY),
            {},
            ValueError,
            r"model_output must have the shape of x0, \(2, 3\), or \(2, 6\) with",
        ),
        ((X[:, 0], X[:, :1], T, SCHEDULE, KEY), {}, ValueError, "model_output must have the shape of x0"),
        (
            (X[:1, 0], X[:, 0], T, SCHEDULE, KEY),
            {},
            ValueError,
            r"model_output must have the shape of x0, \(2,\), got \(1,\)",
        ),
        (
            (X.double(), X, T, SCHEDULE, KEY),
            {},
            TypeError,
            "model_output must have the dtype of x0, torch.float32, got",
        ),
        ((X, X, T[:1], SCHEDULE, KEY), {}, ValueError, r"t must be one step per sample, of shape \(2,\), got \(1,\)"),
        ((X, X, T + 50, SCHEDULE, KEY), {}, ValueError, r"t must be in \[0, 50\), .* got 50 for sample 0"),
        ((X, X, T, 50, KEY), {}, TypeError, "schedule must be a gencore.diffusion.Schedule, got int"),
        (
            (X, X, T, SCHEDULE, None),
            {},
            TypeError,
            "key must be the gencore.Key that x_t was made with, unless noise is given, got NoneType",
        ),
        ((X, X, T, SCHEDULE, KEY), {"noise": X}, ValueError, "key must be None where noise is given, got Key"),
        (
            (X, X, T, SCHEDULE),
            {"noise": X[:1]},
            ValueError,
            r"noise must have the shape of x0, \(2, 3\), got \(1, 3\)",
        ),
        ((X, X, T, SCHEDULE), {"noise": X.double()}, TypeError, "noise must have the dtype of x0, torch.float32, got"),
        ((X, X, T, SCHEDULE), {"noise": 1.0}, TypeError, "noise must be a tensor, got float"),
        (
            (X, X, T, SCHEDULE, KEY),
            {"parameterization": "z"},
            ValueError,
            "parameterization must be one of eps, x0, v, velocity, got 'z'",
        ),
        (
            (X, X, T, SCHEDULE, KEY),
            {"weighting": "z"},
            ValueError,
            "weighting must be one of simple, snr, min_snr or a tensor .*, got 'z'",
        ),
        (
            (X, X, T, SCHEDULE, KEY),
            {"weighting": T},
            ValueError,
            r"weighting must have one value per step, 50, got shape \(2,\)",
        ),
        (
            (X, X, T, SCHEDULE, KEY),
            {"weighting": "min_snr", "gamma": 0.0},
            ValueError,
            "gamma must be more than 0, got 0.0",
        ),
        (
            (X, X, T, SCHEDULE, KEY),
            {"bound_weight": -1.0},
            ValueError,
            "bound_weight must be at least 0 and finite, got -1.0",
        ),
        ((X, X, T, SCHEDULE, KEY), {"bound_weight": "a"}, TypeError, "bound_weight must be a number, got str"),
    ],
)
def test_says_what_is_wrong(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.denoising_loss(*args, **kwargs)


@pytest.mark.parametrize(
    ("output", "kwargs", "message"),
    [
        (X, {"variance": "learned_range"}, "variance must be learned_range for a model_output of twice the channels"),
        (torch.zeros(2, 6), {}, "variance must be learned_range for a model_output of twice the channels"),
        (X, {"variance": "small"}, "variance must be one of fixed_small, fixed_large, learned_range, got 'small'"),
    ],
)
def test_bound_says_what_is_wrong(output, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.variational_bound(output, X, T, SCHEDULE, KEY, **kwargs)
    with pytest.raises(ValueError, match="schedule must be variance-preserving"):
        ops.variational_bound(X, X, T, diffusion.flow(50), KEY)
