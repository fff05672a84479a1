"""Batch norm whose scale and shift are those of a class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gencore._torch import has_values
from gencore.arguments import integer
from gencore.nn._checks import check_images


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm with a scale and a shift of its own for each class: y = gamma[label] (x - mean) / std + beta[label].

    Mean and variance are those of :class:`torch.nn.BatchNorm2d`, over images of all classes. So a result depends on the
    other images of the batch in training mode, and does not in evaluation mode. Scales start as 1 and shifts as 0.

    Half-precision images may meet float32 parameters, as under autocast: the result is of the images' dtype.

    Args:
        channels: of the images.
        num_classes: how many.
        eps, momentum, track_running_stats: as :class:`torch.nn.BatchNorm2d` has them.

    Raises:
        TypeError, ValueError: ``channels`` or ``num_classes`` is no int of at least 1.

    >>> norm = ConditionalBatchNorm2d(8, num_classes=10)
    >>> norm(torch.randn(4, 8, 5, 5), torch.tensor([3, 1, 4, 1])).shape
    torch.Size([4, 8, 5, 5])

    Source: Dumoulin et al., "A Learned Representation for Artistic Style" (2017), equation 5; de Vries et al.,
    "Modulating Early Visual Processing by Language" (2017), section 3.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        self.channels = integer("channels", channels, least=1)
        self.num_classes = integer("num_classes", num_classes, least=1)
        # A module of PyTorch's, so that what synchronizes batch norms over processes finds it.
        self.norm = nn.BatchNorm2d(channels, eps, momentum, affine=False, track_running_stats=track_running_stats)
        self.weight = nn.Parameter(torch.empty(self.num_classes, self.channels))
        self.bias = nn.Parameter(torch.empty(self.num_classes, self.channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scales of 1, shifts of 0, no statistics."""
        self.norm.reset_parameters()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, labels: Tensor) -> Tensor:
        """input (N, channels, H, W), labels (N,) int64 from 0 to num_classes - 1 -> (N, channels, H, W).

        Raises:
            TypeError: ``input`` is not of a floating dtype, or ``labels`` are not int64.
            ValueError: a shape or a label is not as above; the values of labels on a GPU are not waited for.
        """
        check_images("input", input, self.channels)
        index = _class_index(labels, input, self.num_classes)
        normed: Tensor = self.norm(input)
        scale, shift = self.weight[index], self.bias[index]
        # One operation, and so one rounding in half precision.
        return torch.addcmul(_per_image(shift, normed), _per_image(scale, normed), normed)

    def extra_repr(self) -> str:
        return f"{self.channels}, num_classes={self.num_classes}"


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.dtype)[:, :, None, None]


# Looks at tensors that torch.fx's tracer leaves for when the traced module runs.
@torch.fx.wrap
def _class_index(labels: Tensor, images: Tensor, num_classes: int) -> Tensor:
    """The labels, checked: before the running statistics are written."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of int64, got {got}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must have the shape ({len(images)},), one per image of input, got {tuple(labels.shape)}"
        )
    if not torch.compiler.is_compiling() and labels.is_cpu and has_values(labels) and len(labels):
        least, most = (int(each) for each in labels.aminmax())
        if least < 0 or most >= num_classes:
            raise ValueError(f"labels must be from 0 to {num_classes - 1}, got one of {least if least < 0 else most}")
    return labels
