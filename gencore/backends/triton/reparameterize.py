"""Fused reparameterized sampling. What each kernel computes is said in csrc/include/gencore/reparameterize.h."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import empty_draws, in_format, memory_format_of
from gencore.backends.triton._tiles import Cut, cut, device_of, key_arguments, place, values_of_tile
from gencore.backends.triton.noise import exponential, multiply_add, words_of_rows

_CONTIGUOUS = torch.contiguous_format
_PIECES = 1024


@triton.jit
def load(pointers, inside):
    """Elements in the arithmetic's type: float64 as it is, all others in float32."""
    x = tl.load(pointers, inside, other=0.0)
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit(do_not_specialize=["seed", "stream", "sample", "rows", "height", "width", "draws"])
def forward_kernel(
    mu, logvar, z, slope, kl, draws: tl.int64, key, seed: tl.int64, stream: tl.int64, sample: tl.int64,
    rows: tl.int64, height: tl.int64, width: tl.int64,
    PER_SAMPLE: tl.constexpr, CHANNELS_LAST: tl.constexpr, PARTIAL: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ITEM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    at, inside, row, row_exists, block, skip = place(rows, height, width, CHANNELS_LAST, PARTIAL, A, B, ITEM, UNIT)
    words = words_of_rows(key, seed, stream, sample, row, row_exists, PER_SAMPLE)
    mean = load(mu + at, inside)
    log_variance = load(logvar + at, inside)
    deviation = exponential(log_variance * 0.5)
    if kl is not None:
        # 1/2 (mu^2 + sigma^2 - 1 - logvar)
        square = multiply_add(mean, mean, multiply_add(deviation, deviation, -1.0))
        term = tl.where(inside, (square - log_variance) * 0.5, 0.0)
        tile, tiles = tl.program_id(0), tl.num_programs(0)
        total = tl.sum(term, axis=1, keep_dims=True)
        if CHANNELS_LAST:
            total = tl.sum(total, axis=0, keep_dims=True)
        tl.store(kl + row * tiles + tile, total, row_exists)
    elements = height * width * UNIT
    draw_blocks = (elements + 3) >> 2
    for draw in range(draws):
        first = block + (draw * draw_blocks).to(tl.uint32)
        noise = values_of_tile(first, skip, words, CHANNELS_LAST, PARTIAL, A, B, ITEM, False).to(mean.dtype)
        value = multiply_add(deviation, noise, mean)
        tl.store(z + (draw * (rows * elements) + at), value.to(z.dtype.element_ty), inside)
        if slope is not None:
            of_logvar = deviation * 0.5 * noise
            tl.store(slope + (draw * (rows * elements) + at), of_logvar.to(slope.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["pieces"])
def sum_kernel(x, total, pieces: tl.int64, SIZE: tl.constexpr):
    """The sum of a row's pieces, in float64: the lanes each add up theirs, then all are added up."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SIZE)
    partial = tl.zeros((SIZE,), tl.float64)
    for first in range(0, pieces, SIZE):
        partial += tl.load(x + row * pieces + first + lane, first + lane < pieces, other=0.0).to(tl.float64)
    tl.store(total + row, tl.sum(partial, axis=0).to(total.dtype.element_ty))


@triton.jit(do_not_specialize=["seed", "stream", "sample", "rows", "height", "width", "draws"])
def backward_kernel(
    grad_z, grad_kl, mu, logvar, grad_mu, grad_logvar, draws: tl.int64,
    key, seed: tl.int64, stream: tl.int64, sample: tl.int64, rows: tl.int64, height: tl.int64, width: tl.int64,
    PER_SAMPLE: tl.constexpr, CHANNELS_LAST: tl.constexpr, PARTIAL: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ITEM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    at, inside, row, row_exists, block, skip = place(rows, height, width, CHANNELS_LAST, PARTIAL, A, B, ITEM, UNIT)
    deviation = exponential(load(logvar + at, inside) * 0.5)
    # sum_d grad_z and sum_d grad_z eps
    plain = tl.zeros_like(deviation)
    weighted = tl.zeros_like(deviation)
    # Without grad_z there is no such term, not even 0 * infinity.
    if grad_z is not None:
        words = words_of_rows(key, seed, stream, sample, row, row_exists, PER_SAMPLE)
        elements = height * width * UNIT
        draw_blocks = (elements + 3) >> 2
        for draw in range(draws):
            first = block + (draw * draw_blocks).to(tl.uint32)
            noise = values_of_tile(first, skip, words, CHANNELS_LAST, PARTIAL, A, B, ITEM, False).to(plain.dtype)
            g = load(grad_z + (draw * (rows * elements) + at), inside)
            plain += g
            weighted = multiply_add(g, noise, weighted)
        weighted = weighted * deviation
    if grad_kl is not None:
        g_kl = load(grad_kl + row, row_exists)
        plain = multiply_add(g_kl, load(mu + at, inside), plain)
        weighted = multiply_add(g_kl, multiply_add(deviation, deviation, -1.0), weighted)
    if grad_mu is not None:
        tl.store(grad_mu + at, plain.to(grad_mu.dtype.element_ty), inside)
    tl.store(grad_logvar + at, (weighted * 0.5).to(grad_logvar.dtype.element_ty), inside)


def _cut(tensor: Tensor, memory_format: torch.memory_format) -> Cut:
    rows = tensor.shape[0]
    channels = 0 if memory_format is _CONTIGUOUS else tensor.shape[1]
    return cut(rows, tensor.numel() // rows, channels, tensor.element_size())


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    key: Tensor,
    num_samples: int | None = None,
    kl: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    memory_format = _CONTIGUOUS
    if not (mu.is_contiguous() and logvar.is_contiguous()):
        memory_format = memory_format_of(mu)
        mu, logvar = in_format(memory_format, mu, logvar)
    if kl is not None:
        # Which threads add up what depends on how wide the accesses are, and that on the addresses.
        mu, logvar = (x.clone() if x.data_ptr() % 16 else x for x in (mu, logvar))
    z = torch.empty_like(mu) if num_samples is None else empty_draws(mu, num_samples)
    if mu.numel() == 0:
        if kl is not None:
            kl.zero_()
        return z
    work, pieces = _cut(mu, memory_format), kl
    if kl is not None and work.tiles_per_row > 1:
        pieces = kl.new_empty(work.rows, work.tiles_per_row)
    *words, per_sample = key_arguments(key, mu)
    with device_of(mu):
        forward_kernel[work.grid](
            mu, logvar, z, slope, pieces, 1 if num_samples is None else num_samples, *words,
            work.rows, work.height, work.width, PER_SAMPLE=per_sample, **work.constants,
        )  # fmt: skip
        if pieces is not kl:
            sum_kernel[(work.rows,)](pieces, kl, work.tiles_per_row, SIZE=_PIECES, enable_fp_fusion=False)
    return z


def reparameterize_and_slope(
    mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None
) -> tuple[Tensor, Tensor]:
    slope = empty_draws(mu, num_samples)
    return reparameterize(mu, logvar, key, num_samples, slope=slope), slope


def reparameterize_kl(mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
    kl = mu.new_empty(mu.shape[0], dtype=torch.float64 if mu.dtype == torch.float64 else torch.float32)
    return reparameterize(mu, logvar, key, num_samples, kl), kl


def reparameterize_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor,
    key: Tensor,
    num_samples: int | None,
    with_grad_mu: bool,
) -> tuple[Tensor, Tensor]:
    memory_format = memory_format_of(logvar)
    if grad_z is not None and num_samples is not None:
        grad_z = grad_z.flatten(0, 1)
    grad_z, mu, logvar = in_format(memory_format, grad_z, mu, logvar)
    if grad_kl is not None:
        grad_kl = grad_kl.contiguous()
    grad_logvar = torch.empty_like(logvar)
    grad_mu = torch.empty_like(logvar) if with_grad_mu else None
    if logvar.numel():
        work = _cut(logvar, memory_format)
        *words, per_sample = key_arguments(key, logvar)
        with device_of(logvar):
            backward_kernel[work.grid](
                grad_z, grad_kl, mu, logvar, grad_mu, grad_logvar, 1 if num_samples is None else num_samples, *words,
                work.rows, work.height, work.width, PER_SAMPLE=per_sample, **work.constants,
            )  # fmt: skip
    return logvar.new_empty(0) if grad_mu is None else grad_mu, grad_logvar
