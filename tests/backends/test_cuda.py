"""The CUDA backend, on a GPU or in the emulator: what the tests of the ops, which run on it too, do not hold."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from kernels import EmulatedOps, emulated, running
from support import laid_out, normals_of_blocks, same_bits

import gencore
from gencore import Key, diffusion, ops
from gencore.backends import cuda
from gencore.backends.reference.normal import normal as reference
from gencore.bench import cases
from gencore.schedule import Schedule

pytestmark = pytest.mark.gpu(or_emulator=True)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@contextmanager
def on_cuda(monkeypatch, keys_on_device: bool = False, tables_on_device: bool = False):
    """Runs ops on the CUDA backend; in the emulator, keys of three words and tables of one row count as being on the
    device if asked for."""
    monkeypatch.setattr(EmulatedOps, "keys_on_device", keys_on_device)
    monkeypatch.setattr(EmulatedOps, "tables_on_device", tables_on_device)
    with running("cuda"):
        yield


@pytest.mark.parametrize("case", cases.small(cases.NOISE), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_key_on_the_device(case, dtype, monkeypatch):
    key = Key(-3).stream(2**32 - 1).samples(2**33 + 5)
    with on_cuda(monkeypatch, keys_on_device=True):
        drawn = ops.normal(case.shape, key.to(DEVICE), dtype=dtype, device=DEVICE, memory_format=case.memory_format)
    assert same_bits(drawn, reference(case.shape, key, dtype=dtype))


@pytest.mark.parametrize("case", cases.small(cases.REPARAMETERIZE), ids=str)
def test_samples_and_gradients_have_the_bits_of_the_cpu(case, monkeypatch):
    """More than is promised, which is the noise alone: in float32 the same operations are done in the same order."""
    generator = torch.Generator().manual_seed(1)
    mu, logvar = (laid_out(torch.randn(case.shape, generator=generator), case) for _ in range(2))
    key = Key(torch.arange(case.shape[0]))

    def run(device):
        leaves = [x.to(device).requires_grad_() for x in (mu, logvar)]
        z = ops.reparameterize(*leaves, key, num_samples=case.draws)
        return z.detach(), *torch.autograd.grad(z, leaves, z.detach())

    with gencore.backend("cpu"):
        here = run("cpu")
    with on_cuda(monkeypatch):
        there = run(DEVICE)
    assert same_bits(there[0], here[0])
    for a, b in zip(there[1:], here[1:], strict=True):
        # Halving first or last makes a difference where the result is below the smallest normal number only.
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=float(torch.finfo(torch.float32).tiny))


def test_the_divergence_of_a_sample_does_not_depend_on_its_batch(monkeypatch):
    mu, logvar = (torch.randn(5, 3, 41, 37, device=DEVICE) for _ in range(2))
    with on_cuda(monkeypatch):
        _, whole = ops.reparameterize_kl(mu, logvar, Key(3))
        _, part = ops.reparameterize_kl(mu[1:4], logvar[1:4], Key(3).samples(1))
    assert same_bits(part, whole[1:4])


def step_inputs(case: cases.Case, dtype: torch.dtype, seed: int = 0) -> tuple[tuple[torch.Tensor, ...], dict]:
    """x, an output with a variance, coefficients; and what else a step can take, but where to write."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(channels: int = 1) -> torch.Tensor:
        shape = (case.shape[0], channels * case.shape[1], *case.shape[2:])
        return laid_out(torch.randn(shape, generator=generator).to(dtype), case)

    columns = torch.randn(len(ops.STEP_COLUMNS), generator=generator)
    coefficients = ops.step_coefficients(**dict(zip(ops.STEP_COLUMNS, columns.tolist(), strict=True)) | {"limit": 0.5})
    more = {"second": tensor(2), "history": (tensor(), tensor()), "known": tensor(), "mask": tensor().clamp(0, 1)}
    return (tensor(), tensor(2), coefficients), more


@pytest.mark.parametrize("key_on_device", [False, True], ids=["key-here", "key-there"])
@pytest.mark.parametrize("table_on_device", [False, True], ids=["table-here", "table-there"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_keys_and_coefficients_of_one_row_wherever_they_are(key_on_device, table_on_device, layout, dtype, monkeypatch):
    case = cases.Case((3, 4, 9, 9), "", layout=layout)
    key, schedule = Key(-3).stream(2**32 - 1).samples(2**33 + 5), diffusion.linear(10)
    (x, output, coefficients), more = step_inputs(case, dtype)
    with gencore.backend("cpu"):
        step_here = ops.diffusion_step(x, output, coefficients, key, **more)
        noised_here = ops.add_noise(x, 7, schedule, key)
        loss_here = ops.denoising_loss(output, x, 7, schedule, key)

    def moved(value):
        return tuple(map(moved, value)) if isinstance(value, tuple) else value.to(DEVICE)

    with on_cuda(monkeypatch, key_on_device, table_on_device):
        x, output, more = x.to(DEVICE), output.to(DEVICE), {name: moved(value) for name, value in more.items()}
        key = key.to(DEVICE) if key_on_device else key
        coefficients = coefficients.to(DEVICE) if table_on_device else coefficients
        assert same_bits(ops.diffusion_step(x, output, coefficients, key, **more), step_here)
        assert same_bits(ops.add_noise(x, 7, schedule, key), noised_here)
        # Summed in another order; 729 positive terms.
        torch.testing.assert_close(ops.denoising_loss(output, x, 7, schedule, key).cpu(), loss_here, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_step_may_write_over_whatever_is_x(layout, monkeypatch):
    """Every input but the mask is x itself: no kernel reads it behind its writing, or as what nobody writes."""
    case = cases.Case((2, 8, 16, 16), "", layout=layout)
    (x, _, coefficients), more = step_inputs(case, torch.bfloat16)
    mask = more["mask"].to(DEVICE)

    def stepped(x, **where):
        return ops.diffusion_step(x, x, coefficients, Key(3), second=x, history=(x, x), known=x, mask=mask, **where)

    with on_cuda(monkeypatch):
        x = x.to(DEVICE)
        over = x.clone()
        y = stepped(x)
        assert stepped(over, out=over) is over
        assert same_bits(over, y)


@pytest.mark.parametrize("shape", [(5, 3, 41, 37), (3, 8, 130, 64)])
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(shape, monkeypatch):
    x0, output = torch.randn(shape, device=DEVICE), torch.randn(shape[0], 2 * shape[1], *shape[2:], device=DEVICE)
    t, schedule = torch.arange(shape[0], device=DEVICE), diffusion.linear(10)
    with on_cuda(monkeypatch):
        whole = ops.denoising_loss(output, x0, t, schedule, Key(3))
        part = ops.denoising_loss(output[1:], x0[1:], t[1:], schedule, Key(3).samples(1))
        # Not at a multiple of 16 bytes: read in another way, summed in the same order.
        shifted = torch.empty(x0.numel() + 1, device=DEVICE)[1:].view(shape).copy_(x0)
        assert same_bits(ops.denoising_loss(output, shifted, t, schedule, Key(3)), whole)
    assert same_bits(part, whole[1:])


def test_an_error_names_the_op_and_its_shapes(monkeypatch):
    words = Key(1).packed.data_ptr()
    out, rows = torch.empty(21).data_ptr(), torch.ones(2, 16, dtype=torch.float64).data_ptr()
    here, key = (0, None, None), (words, 0, False)
    noise = {"out": None, "dtype": 0, "shape": (3, 1, 7, 0), "key": key, "place": here}
    table = {"dtype": 0, "shape": (3, 1, 7, 0), "table": (rows, 2, None, True), "key": key, "place": here}
    loss = table | {"output": out, "x0": out, "noise": None, "learned": False}
    two_rows = {"dtype": 3, "shape": (2, 1, 7, 0), "table": (rows, 2, None, False)}
    step = dict.fromkeys(("output", "second", "history0", "history1", "known", "mask"))
    step |= {"x": out, "y": out, "prediction": out, "learned": False, "second_learned": False}
    with on_cuda(monkeypatch):
        module = cuda.load()._module
        with pytest.raises(ValueError, match=r"_cuda.normal of 1 x 3 x 7 float32 values, on device 0: invalid arg"):
            module.normal(**noise)
        with pytest.raises(
            ValueError, match="reparameterize of 2 x 3 x 8 bfloat16 values, channels_last with 4 channels"
        ):
            module.reparameterize(
                mu=None, logvar=None, z=None, slope=None, kl=None, dtype=2, shape=(3, 2, 8, 4), key=key, place=here
            )
        with pytest.raises(ValueError, match="invalid argument"):
            # Rows on the host cannot be arguments of a launch.
            module.uniform(**noise | {"out": words, "shape": (1, 1, 1, 0), "key": (words, 1, False)})
        with pytest.raises(ValueError, match=r"_cuda.add_noise of 1 x 2 x 7 float16 values, on device 0: invalid arg"):
            # Nor can two rows of coefficients.
            module.add_noise(**table | two_rows, x0=out, x_t=out, noise=None)
        with pytest.raises(ValueError, match=r"denoising_loss of 1 x 3 x 7 .*: invalid argument"):
            # Three samples, two rows and no index.
            module.denoising_loss(**loss, loss=out, error=None)
        with pytest.raises(ValueError, match=r"denoising_loss of 1 x 3 x 7 .*: invalid argument"):
            # The error is written by the CPU alone.
            module.denoising_loss(**loss | {"table": (rows, 1, None, True)}, loss=out, error=out)
        with pytest.raises(ValueError, match=r"denoising_loss_backward of 1 x 3 x 7 .*: invalid argument"):
            module.denoising_loss_backward(**loss, grad_loss=out, grad_output=out)
        with pytest.raises(ValueError, match=r"diffusion_step of 1 x 3 x 7 .*: invalid argument"):
            # A prediction without an output.
            module.diffusion_step(**table | step | {"table": (rows, 1, None, False)})
        with pytest.raises(ValueError, match="of 1 x 1 x 34359738368"):
            module.uniform(**noise | {"out": words, "shape": (1, 1, 2**35, 0)})
        with pytest.raises(ValueError, match="unknown dtype"):
            module.uniform(**noise | {"out": words, "dtype": 9, "shape": (1, 1, 1, 0)})
        with pytest.raises(RuntimeError, match="on device 99: "):
            module.uniform(**noise | {"out": words, "shape": (1, 1, 1, 0), "place": (99, None, None)})
        with pytest.raises(TypeError, match=r"normal: place.device must be an int, got None"):
            module.normal(**noise | {"place": (None, None, None)})


@pytest.mark.skipif(GPU, reason="a GPU has no order that could be chosen")
@pytest.mark.parametrize("seed", [1, 2])
def test_no_order_of_blocks_and_threads_matters(seed, monkeypatch):
    mu, logvar = (torch.randn(3, 5003) for _ in range(2))
    with emulated() as backend, gencore.backend("cuda"):
        emulator = backend._module._emulator
        in_order = ops.reparameterize_kl(mu, logvar, Key(3))
        emulator.set_schedule(seed)
        try:
            shuffled = ops.reparameterize_kl(mu, logvar, Key(3))
        finally:
            emulator.set_schedule(0)
    assert same_bits(shuffled[0], in_order[0])
    assert same_bits(shuffled[1], in_order[1])


@pytest.mark.skipif(GPU, reason="a GPU has no order that could be chosen")
def test_no_order_of_blocks_and_threads_matters_to_the_loss():
    x0, output, schedule = torch.randn(3, 2, 2503), torch.randn(3, 4, 2503), diffusion.linear(10)
    results = []
    with emulated() as backend, gencore.backend("cuda"):
        emulator = backend._module._emulator
        for seed in (0, 1, 2):
            emulator.set_schedule(seed)
            results.append(ops.denoising_loss(output, x0, torch.tensor([0, 5, 9]), schedule, Key(3)))
        emulator.set_schedule(0)
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])


@pytest.fixture
def last_blocks():
    """Runs the last two blocks of every launch: the others of a tensor of gigabytes take no memory and no time."""
    with emulated() as backend, gencore.backend("cuda"):
        emulator = backend._module._emulator
        emulator.set_blocks(-2, 2)
        yield emulator
        emulator.set_blocks(0, 0)


LARGE = pytest.mark.skipif(GPU, reason="on a GPU the slow tests run all of it")


@LARGE
@pytest.mark.parametrize("shape", [(1, (1 << 31) + 64), (3, (1 << 30) + 3), (1 << 20, 2051)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_noise_beyond_two_to_the_31_elements(shape, dtype, last_blocks):
    out, key = torch.empty(shape, dtype=dtype), Key(9).stream(2).samples(5)
    ops.normal(shape, key, out=out)
    first = shape[1] // 4 - 128
    want = normals_of_blocks(key, shape[0] - 1, first, 129)[: shape[1] - 4 * first]
    assert same_bits(out[-1, 4 * first :], want.to(dtype))


@LARGE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_and_gradients_beyond_two_to_the_31_elements(layout, last_blocks):
    case = cases.Case((2, 5, 1 << 14, (1 << 14) + 1), "", layout=layout)
    pixels = case.shape[2] * case.shape[3]
    mu, logvar, grad = (
        torch.empty(case.shape, dtype=torch.bfloat16, memory_format=case.memory_format) for _ in range(3)
    )
    for x, value in ((mu, 1.0), (logvar, 0.0), (grad, 2.0)):
        x[-1, :, -3:] = value
    z, _ = ops.reparameterize_kl(mu, logvar, Key(3))
    _, grad_logvar = torch.ops.gencore.reparameterize_backward(grad, None, None, logvar, Key(3).packed, None, False)
    for channel in (4,) if layout == "contiguous" else range(5):
        last = channel * pixels + pixels - 1
        eps = normals_of_blocks(Key(3), 1, last // 4, 1)[last % 4]
        assert z[1, channel, -1, -1] == (1 + eps).bfloat16()
        assert grad_logvar[1, channel, -1, -1] == eps.bfloat16()


@LARGE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_norm_beyond_two_to_the_31_elements(layout, last_blocks):
    """With groups that blocks keep, so that the last blocks need nothing of the others."""
    case = cases.Case((1 << 18, 32, 27, 18), "", layout=layout)
    x, g = (torch.empty(case.shape, dtype=torch.bfloat16, memory_format=case.memory_format) for _ in range(2))
    for tensor in (x, g):
        tensor[-2:] = torch.randn(2, *case.shape[1:])
    norm, backward = torch.ops.gencore.group_norm, torch.ops.gencore.group_norm_backward
    values, wanted = (None,) * 5, [True, *[False] * 5]
    results = []
    for x_, g_ in ((x, g), (x[-2:], g[-2:])):
        y, statistics = norm(x_, 2, *values, "silu", 1e-5)
        results.append((y, backward(g_, x_, statistics, 2, *values, "silu", wanted, 1e-5)[0]))
        last_blocks.set_blocks(0, 0)
    for large, small in zip(*results, strict=True):
        # The last block has the last group, or more.
        assert same_bits(large[-1, 16:], small[-1, 16:])


@LARGE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_steps_and_losses_beyond_two_to_the_31_elements(layout, last_blocks):
    case = cases.Case((2, 4, 1 << 14, (1 << 14) + 4), "", layout=layout)
    x, output = (
        torch.empty((2, channels, *case.shape[2:]), dtype=torch.bfloat16, memory_format=case.memory_format)
        for channels in (4, 8)
    )
    x[-1, :, -1, -4:], output[-1, :4, -1, -4:], output[-1, 4:, -1, -4:] = 1.0, 2.0, 0.5
    table = ops.step_coefficients(x=2.0, direct=1.0, noise=1.0, log_scale_slope=2.0)
    y = ops.diffusion_step(x, output, table, Key(3))
    x_t = ops.add_noise(x, torch.tensor([0, 1]), Schedule([0.9, 0.5], [0.1, 0.5]), Key(3))
    columns = torch.tensor([[1.0, 0.5, 1.0, 1.0, 0.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
    grad_loss = torch.full((2,), float(x[0].numel()))
    grad = torch.ops.gencore.denoising_loss_backward(grad_loss, output, x, columns, None, Key(3).packed, None)
    pixels, e = case.shape[2] * case.shape[3], torch.e
    for channel in (3,) if layout == "contiguous" else range(4):
        last = channel * pixels + pixels - 1
        eps = normals_of_blocks(Key(3), 1, last // 4, 1)[last % 4]
        assert y[1, channel, -1, -1] == torch.addcmul(torch.tensor(4.0), torch.tensor(e), eps).bfloat16()
        assert x_t[1, channel, -1, -1] == (0.5 + 0.5 * eps).bfloat16()
        assert grad[1, channel, -1, -1] == (2 * (2.0 - (1 + 0.5 * eps))).bfloat16()
        # gap = 0.5 + 1, nothing is moved.
        want = (1 - torch.exp(torch.tensor(-1.5))) / 2
        assert grad[1, 4 + channel, -1, -1] == want.bfloat16()


@pytest.mark.skipif(GPU, reason="a GPU writes there unseen")
def test_the_emulator_watches_the_ops():
    """A kernel that is told of more elements than its tensor has is caught: the other tests mean what they say."""
    out = torch.empty(2, 30)
    with emulated() as backend:
        out.data_ptr()
        with pytest.raises(RuntimeError, match=r"normal of 1 x 2 x 32 float32.*fill_kernel"):
            backend._module.normal(
                out=out.data_ptr(), dtype=0, shape=(2, 1, 32, 0), key=(Key(1).packed.data_ptr(), 0, False),
                place=(0, None, None),
            )  # fmt: skip
