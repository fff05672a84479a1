"""Definition of :func:`gencore.ops.diffusion_step`."""

from __future__ import annotations

import torch
from torch import Tensor


def diffusion_step(
    x: Tensor,
    output: Tensor | None,
    second: Tensor | None,
    history0: Tensor | None,
    history1: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    rows: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """(the next x, the prediction of x0); ``rows``, one or one per sample, have the columns of ``ops.STEP_COLUMNS``."""
    columns = rows.to(x.dtype).reshape(-1, 16, *[1] * (x.dim() - 1)).unbind(1)
    of_output, of_second, predict_x, predict_output, limit, x0_scale, of_x, direct, of_x0 = columns[:9]
    of_history0, of_history1, of_noise, log_scale, log_scale_slope, of_known, of_known_noise = columns[9:]
    y, x0 = of_x * x, None
    if output is not None:
        learned = output.shape != x.shape
        output, place = output.chunk(2, dim=1) if learned else (output, None)
        guided = of_output * output
        if second is not None:
            guided = guided + of_second * (second.chunk(2, dim=1)[0] if second.shape != x.shape else second)
        x0 = predict_x * x + predict_output * guided
        # Written so that NaN stays NaN, and so that an infinite limit is none; at the limit the derivative is 1.
        cut = torch.minimum(torch.maximum(x0.detach(), -limit), limit)
        x0 = x0_scale * torch.where(x0.abs() <= limit, x0, cut)
        y = y + direct * guided + of_x0 * x0
        if place is not None:
            # Where no noise is added none is scaled, however large the scale.
            scale = torch.where(of_noise == 0, 0, log_scale + log_scale_slope * place)
            of_noise = of_noise * torch.exp(scale)
    if history0 is not None:
        y = y + of_history0 * history0
    if history1 is not None:
        y = y + of_history1 * history1
    y = y + of_noise * noise
    if known is not None and mask is not None:
        y = mask * (of_known * known + of_known_noise * noise) + (1 - mask) * y
    return y, x0
