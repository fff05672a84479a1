"""Group normalization as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gencore import ops
from gencore.arguments import integer
from gencore.ops.group_norm import Activation, check_activation


class GroupNorm(torch.nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` with the activation behind it and the embedding around it, as one kernel.

    y = act((GroupNorm(x + bias_in) * weight + bias) * (1 + scale) + shift); see :func:`gencore.ops.group_norm`.

    It takes the place of ``torch.nn.GroupNorm`` (and of the ``SiLU`` that follows) with the same parameters and state
    dict. Autocast leaves a half-precision ``input`` so.

    Args:
        num_groups, num_channels, eps, affine, device, dtype, bias: as :class:`torch.nn.GroupNorm` has them.
        activation: ``"silu"`` or None.

    Raises:
        ValueError: ``num_channels`` is no multiple of ``num_groups``, or ``activation`` is not known.

    >>> norm = GroupNorm(32, 64, activation="silu")
    >>> norm(torch.randn(2, 64, 8, 8), scale=torch.zeros(2, 64)).shape
    torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
    ) -> None:
        check_activation(activation)
        num_groups, num_channels = integer("num_groups", num_groups), integer("num_channels", num_channels)
        # Older PyTorch always has a bias, and no argument to say so.
        without: dict[str, Any] = {} if bias else {"bias": False}
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, **without)
        self.activation = activation

    def forward(
        self,
        input: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        bias_in: Tensor | None = None,
    ) -> Tensor:
        """``input`` is (N, C, ...); ``scale``, ``shift`` and ``bias_in`` are (N, C)."""
        return ops.group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            scale=scale,
            shift=shift,
            activation=self.activation,
            bias_in=bias_in,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation!r}")
