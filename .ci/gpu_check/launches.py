"""The kernels of every op, launched once or a few times and held against the CPU's: launches.py BACKEND [NAME...].

It is what compute-sanitizer runs too: no pytest, few tensors, one process. NAMES are those of some launches. Without a
GPU BACKEND may be "emulated", the CUDA kernels in the emulator of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import verdicts  # noqa: E402
from torch import Tensor  # noqa: E402

import gencore  # noqa: E402
from gencore import Key, diffusion, ops  # noqa: E402

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SCHEDULE = diffusion.linear(50)
CL = torch.channels_last


@dataclass(frozen=True)
class Launch:
    """``run(draw)`` gives tensors that shall be the CPU's to ``bound``, relative to the largest value of each.

    ``draw(*shape)`` makes a leaf of standard normal values, the same on every device. A bound of 0 means equal bits.
    """

    name: str
    run: Callable[[Callable[..., Tensor]], Sequence[Tensor]]
    dtype: torch.dtype = F32
    bound: float = 0.0


def gradients(result: Tensor | tuple[Tensor, ...], *leaves: Tensor) -> list[Tensor]:
    """The results, and the gradients of their sums weighted by themselves."""
    results = result if isinstance(result, tuple) else (result,)
    return [*results, *torch.autograd.grad(sum(one.float().square().sum() for one in results), leaves)]


def reparameterized(draws: int | None = None, rows: bool = False, memory_format: torch.memory_format | None = None):
    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        mu, logvar = draw(2, 4, 9, 9, memory_format=memory_format), draw(2, 4, 9, 9, memory_format=memory_format)
        key = Key(torch.arange(2)) if rows else Key(3)
        return gradients(ops.reparameterize_kl(mu, logvar, key, num_samples=draws), mu, logvar)

    return run


def noised(memory_format: torch.memory_format | None = None):
    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        x0 = draw(3, 5, 16, 16, memory_format=memory_format)
        t = torch.tensor([0, 7, 49], device=x0.device)
        return [ops.add_noise(x0, t, SCHEDULE, Key(1))]

    return run


def losses(memory_format: torch.memory_format | None = None):
    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        x0 = draw(3, 5, 16, 16, memory_format=memory_format).detach()
        output = draw(3, 5, 16, 16, memory_format=memory_format)
        t = torch.tensor([0, 7, 49], device=x0.device)
        return gradients(ops.denoising_loss(output, x0, t, SCHEDULE, Key(1)), output)

    return run


def stepped(memory_format: torch.memory_format | None = None, everything: bool = False):
    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        def like(channels: int = 5) -> Tensor:
            return draw(3, channels, 16, 16, memory_format=memory_format).detach()

        x, coefficients = like(), {"predict_x": 1.1, "predict_output": -0.4, "x": 0.3, "x0": 0.7, "noise": 0.2}
        if not everything:
            return [ops.diffusion_step(x, like(), ops.step_coefficients(**coefficients), Key(2))]
        row = ops.step_coefficients(**coefficients, second=0.3, history0=0.5, history1=-0.1, limit=1.0, known_noise=0.2)
        more = {"second": like(), "history": (like(), like()), "known": like(), "mask": (like() > 0).to(x.dtype)}
        prediction = torch.empty_like(x)
        y = ops.diffusion_step(x, like(), row, Key(2), **more, prediction=prediction)
        learned = ops.step_coefficients(**coefficients, log_scale=-0.2, log_scale_slope=0.1)
        return [y, prediction, ops.diffusion_step(x, like(10), learned, Key(2))]

    return run


def normed(*shape: int, groups: int, memory_format: torch.memory_format | None = None, adaptive: bool = False):
    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        x, weight, bias = draw(*shape, memory_format=memory_format), draw(shape[1]), draw(shape[1])
        more = {"scale": draw(shape[0], shape[1]), "shift": draw(shape[0], shape[1])} if adaptive else {}
        y = ops.group_norm(x, groups, weight, bias, activation="silu", **more)
        return gradients(y, x, weight, bias, *more.values())

    return run


def norm_derived(*shape: int, groups: int, memory_format: torch.memory_format | None = None):
    """Group norm in forward mode, and the gradients of its gradients."""

    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        given, along = ([draw(*shape, memory_format=memory_format), draw(shape[1]), draw(shape[1])] for _ in range(2))

        def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return ops.group_norm(x, groups, weight, bias, activation="silu")

        along = [x.detach() for x in along]
        forwards = torch.func.jvp(normed, tuple(x.detach() for x in given), tuple(along))
        g = draw(*shape, memory_format=memory_format)
        grads = torch.autograd.grad(normed(*given), given, g, create_graph=True)
        return [*forwards, *torch.autograd.grad(grads, (g, *given), along)]

    return run


def activated(*shape: int, activation: str, memory_format: torch.memory_format | None = None):
    """With derivatives of first and second order."""

    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        x, bias, g = draw(*shape, memory_format=memory_format), draw(shape[1]), draw(*shape)
        x, bias, g = (tensor.detach().requires_grad_() for tensor in (x, bias, g))
        y = ops.bias_act(x, bias, activation, gain=1.5, clamp=2.0)
        grads = torch.autograd.grad(y, (x, bias), g, create_graph=True)
        more = torch.autograd.grad(grads, (g, x, bias), [draw(*shape), draw(shape[1])], allow_unused=True)
        return [y, *grads, *(one for one in more if one is not None)]

    return run


def attended(size: int, queries: int = 130, keys: int | None = None, heads: int = 2):
    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        q = draw(1, heads, queries, size)
        k, v = draw(1, heads, keys or queries, size), draw(1, heads, keys or queries, size)
        return gradients(ops.attention(q, k, v), q, k, v)

    return run


def attended_in_part(size: int, size_v: int, dropout: float = 0.0):
    """Attention with all that hides keys, heads that share keys, and values of another size."""

    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        q, k, v = draw(2, 4, 130, size), draw(2, 2, 150, size), draw(2, 2, 150, size_v)
        mask = draw(2, 1, 130, 150).detach()
        lengths = torch.tensor([70, 150], device=q.device)
        options = {"mask": mask, "causal": True, "key_lengths": lengths, "dropout": dropout, "key": Key(5)}
        return gradients(ops.attention(q, k, v, **options), q, k, v)

    return run


def derived(size: int, queries: int = 130, keys: int = 77, **options: Any):
    """Attention in forward mode, and the gradients of its gradients."""

    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        shapes = (1, 2, queries, size), (1, 2, keys, size), (1, 2, keys, size)
        qkv, along, g = [draw(*s) for s in shapes], [draw(*s).detach() for s in shapes], draw(*shapes[0])
        attend = functools.partial(ops.attention, **options)
        forwards = torch.func.jvp(attend, tuple(x.detach() for x in qkv), tuple(along))
        grads = torch.autograd.grad(attend(*qkv), qkv, g, create_graph=True)
        return [*forwards, *torch.autograd.grad(grads, (g, *qkv), along)]

    return run


def looked_at(size: int, memory_format: torch.memory_format):
    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        qkv = draw(1, 3 * 2 * size, 10, 13, memory_format=memory_format)
        return gradients(ops.spatial_attention(qkv, 2), qkv)

    return run


def filtered(*taps: int, memory_format: torch.memory_format | None = None, channels: int = 5):
    """Up, down and at rest, with a gradient, and a call in which nothing is usual."""

    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        x, filter = draw(2, channels, 12, 16, memory_format=memory_format), draw(*taps).detach()
        filter = filter if x.dtype == F64 else filter.float()
        results = [op(x, filter) for op in (ops.upsample2d, ops.downsample2d, ops.filter2d)]
        unusual = ops.upfirdn2d(x, filter, (3, 1), (2, 3), (5, 1, -1, 4), flip_filter=True, gain=0.3)
        return gradients((*results, unusual), x)

    return run


def drawn(op: Callable[..., Tensor], *shape: int, memory_format: torch.memory_format = torch.contiguous_format):
    def run(draw: Callable[..., Tensor]) -> Sequence[Tensor]:
        like = draw(1)
        return [op(shape, Key(7), dtype=like.dtype, device=like.device, memory_format=memory_format)]

    return run


# Roundings of the type, some of them one after another; in bfloat16 and float16 an exponential is the hardware's.
_LOSSES, _SUMS, _HALF = 1e-5, 2e-5, 4 * 2.0**-8
LAUNCHES = (
    Launch("normal", drawn(ops.normal, 3, 5003)),
    Launch("normal, channels_last", drawn(ops.normal, 2, 4, 9, 9, memory_format=CL), BF16),
    Launch("uniform", drawn(ops.uniform, 7, 33)),
    Launch("reparameterize", reparameterized(), F32, _LOSSES),
    Launch("reparameterize, draws", reparameterized(draws=3), F32, _LOSSES),
    Launch("reparameterize, a key each", reparameterized(rows=True, memory_format=CL), BF16, _HALF),
    Launch("add_noise", noised()),
    Launch("add_noise, channels_last", noised(CL), BF16),
    Launch("add_noise, float64", noised(), F64),
    Launch("add_noise, float16", noised(), F16),
    Launch("denoising_loss", losses(), F32, _LOSSES),
    Launch("denoising_loss, channels_last", losses(CL), BF16, _HALF),
    Launch("diffusion_step", stepped()),
    Launch("diffusion_step, channels_last", stepped(CL), BF16),
    Launch("diffusion_step, everything", stepped(everything=True), F32, _LOSSES),
    Launch("group_norm", normed(2, 20, 8, 8, groups=2), F32, _SUMS),
    Launch("group_norm, pieces", normed(1, 2, 110, 111, groups=2), F32, _SUMS),
    Launch("group_norm, channels_last", normed(2, 64, 16, 16, groups=8, memory_format=CL), BF16, _HALF),
    Launch("group_norm, whole groups", normed(4, 64, 20, 20, groups=32, adaptive=True), F16, _HALF),
    Launch("group_norm's derivatives", norm_derived(2, 20, 24, 24, groups=2), F32, 4 * _SUMS),
    Launch("group_norm's derivatives, rows", norm_derived(2, 64, 9, 9, groups=8, memory_format=CL), BF16, _HALF),
    Launch("bias_act, from y", activated(2, 20, 9, 9, activation="leaky_relu"), F32, _SUMS),
    Launch("bias_act", activated(4, 64, 32, 32, activation="gelu"), BF16, _HALF),
    Launch("bias_act, channels_last", activated(2, 64, 16, 16, activation="elu", memory_format=CL), F16, _HALF),
    Launch("bias_act, float64", activated(2, 6, 5, activation="softplus"), F64, 1e-12),
    Launch("attention, 40", attended(40), BF16, _HALF),
    Launch("attention, 64", attended(64), BF16, _HALF),
    Launch("attention, 80", attended(80), F16, _HALF),
    Launch("attention, 128", attended(128), BF16, _HALF),
    Launch("attention, 160", attended(160), BF16, _HALF),
    Launch("attention, 256", attended(256, 70), BF16, _HALF),
    Launch("attention, 512", attended(512, 70, heads=1), BF16, _HALF),
    Launch("attention, 77 keys", attended(40, 40, 77), F16, _HALF),
    Launch("attention, float32", attended(40, 70), F32, _SUMS),
    Launch("attention, float64", attended(20, 33), F64, 1e-12),
    Launch("attention, options", attended_in_part(64, 64), BF16, _HALF),
    Launch("attention, options, dropout", attended_in_part(40, 24, 0.2), F32, _SUMS),
    Launch("attention's derivatives, 40", derived(40), BF16, _HALF),
    Launch("attention's derivatives, 64", derived(64), BF16, _HALF),
    Launch("attention's derivatives, 128", derived(128, 70, 40), F16, _HALF),
    Launch("attention's derivatives, 160", derived(160, 33, 20), BF16, _HALF),
    Launch("attention's derivatives, float32", derived(40, 70), F32, _SUMS),
    Launch("attention's derivatives, float64", derived(20, 33), F64, 1e-12),
    Launch("attention's derivatives, options", derived(20, 33, 40, causal=True, dropout=0.2, key=Key(5)), F32, _SUMS),
    Launch("upfirdn2d", filtered(4, 4), F32, _SUMS),
    Launch("upfirdn2d, half", filtered(4, 4), BF16, _HALF),
    Launch("upfirdn2d, channels_last", filtered(4, 4, memory_format=CL, channels=24), F16, _HALF),
    Launch("upfirdn2d, separable", filtered(4), F32, _SUMS),
    Launch("upfirdn2d, separable, channels_last", filtered(5, memory_format=CL, channels=24), BF16, _HALF),
    Launch("upfirdn2d, float64", filtered(3, 5), F64, 1e-12),
    Launch("spatial_attention", looked_at(40, torch.contiguous_format), BF16, _HALF),
    Launch("spatial_attention, channels_last", looked_at(64, CL), BF16, _HALF),
)


def of(launch: Launch, device: str) -> list[Tensor]:
    """What a launch gives on a device, brought back."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, memory_format: torch.memory_format | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=generator).to(launch.dtype)
        drawn = drawn.to(device).contiguous(memory_format=memory_format or torch.contiguous_format)
        return drawn.requires_grad_()

    return [result.detach().cpu() for result in launch.run(draw)]


def fault(got: list[Tensor], want: list[Tensor], bound: float) -> str | None:
    """What is wrong with results; None if nothing is."""
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {number} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        if bound == 0:
            if not torch.equal(a, b):
                return f"result {number} differs in {(a != b).float().mean():.2%} of its bits' values"
            continue
        # Of what is 0 everywhere, as a second derivative may be, the error itself.
        largest = b.double().abs().max().item() or 1.0
        error = (a.double() - b.double()).abs().max().item() / largest
        # A NaN is no number's neighbour.
        if not error <= bound:
            return f"result {number} is off by {error:.2g} of the largest value, {bound:.2g} would be rounding"
    return None


@contextlib.contextmanager
def running(backend: str) -> Iterator[str]:
    """Ops run by a backend; gives the device that their tensors are on."""
    if backend != "emulated":
        with gencore.backend(backend):
            yield "cuda"
        return
    from kernels import emulated

    with emulated(), gencore.backend("cuda"):
        yield "cpu"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=("cuda", "triton", "emulated"))
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*(launch.name for launch in LAUNCHES), []])
    parser.add_argument("--from", dest="first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--faults", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    chosen = [launch for launch in LAUNCHES if not given.names or launch.name in given.names]
    faults = given.faults
    for number, launch in enumerate(chosen[given.first :], start=given.first):
        with gencore.backend("cpu"):
            want = of(launch, "cpu")
        begin = time.perf_counter()
        try:
            with running(given.backend) as device:
                found = fault(of(launch, device), want, launch.bound)
        except Exception as error:
            traceback.print_exc()
            found = f"{type(error).__name__}: {error}"
        faults += found is not None
        seconds = time.perf_counter() - begin
        print(f"{launch.name} ({given.backend}): {found or 'ok'} ({seconds:.2f} s)", flush=True)
        verdicts.add(f"{given.backend}: {launch.name}", "passed" if found is None else "failed", seconds, found or "")
        if found is not None and verdicts.is_lost():
            verdicts.go_on_from(number + 1, [given.backend, *given.names, "--faults", str(faults)])
    return faults


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
