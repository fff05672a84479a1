"""The U-Net of diffusion models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore.arguments import as_int, integer
from gencore.nn.attention import SpatialSelfAttention
from gencore.nn.dropout import Dropout
from gencore.nn.embedding import TimeEmbedding
from gencore.nn.group_norm import GroupNorm
from gencore.nn.residual import Downsample, ResidualBlock, Upsample, zeroed
from gencore.noise import Key


class UNet(nn.Module):
    """Images and their time steps to images: what predicts the noise (or x0, or v) in a diffusion model.

    Level 0 has the resolution of the image, each further one half of it, rounded up. Going down, a level has
    ``blocks_per_level`` residual blocks; going up, one more, each of which is given the output of one place on the way
    down (its skip) beside its input. Between lie two residual blocks with self-attention between them. In the levels
    ``attention_levels``, self-attention follows each residual block. The time step, and the label where there are
    classes, become one embedding that every residual block is given.

    Args:
        in_channels: of the images.
        out_channels: of the result; left out, ``in_channels``. Twice as many where the variance is learned.
        channels: of each level; multiples of ``num_groups``.
        blocks_per_level: residual blocks per level on the way down.
        attention_levels: the levels with self-attention.
        middle_attention: whether there is self-attention at the lowest resolution's turning point.
        num_heads, head_size: the attention's number of heads, or the channels of a head, which ``num_heads`` then
            follows from; left out, one head.
        num_classes: 0 for a model without labels.
        dropout: in residual blocks, at least 0 and less than 1.
        scale_shift: adaptive group norm instead of adding the embedding; see :class:`ResidualBlock`.
        num_groups, norm_eps: of every group norm.
        embedding_size: of the embedding of time step and label; left out, ``4 * channels[0]``.
        frequency_shift: of the time step's sines and cosines; see :func:`timestep_embedding`.
        asymmetric_downsampling: pad as Ho et al.'s code does; see :class:`Downsample`.

    The last layer, and the last one of each residual branch, begin as zero, so that at first the result is 0.
    ``to(dtype)``, autocast and ``torch.compile(fullgraph=True)`` apply as to any module; the result is channels_last if
    module and images are. The names of the state dict are listed in docs/unet.md.

    Raises:
        TypeError, ValueError: an argument is not as above.

    >>> unet = UNet(in_channels=1, channels=(32, 64), attention_levels=(1,), num_classes=10)
    >>> x, t = torch.randn(2, 1, 28, 28), torch.tensor([0, 999])
    >>> unet(x, t, torch.tensor([3, -1])).shape
    torch.Size([2, 1, 28, 28])

    Source: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), appendix B; Nichol and Dhariwal, "Improved
    Denoising Diffusion Probabilistic Models" (2021), for heads and classes; Dhariwal and Nichol, "Diffusion Models Beat
    GANs on Image Synthesis" (2021), section 3; Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), for the
    null label.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        channels: Sequence[int] = (64, 128, 128),
        blocks_per_level: int = 2,
        attention_levels: Sequence[int] = (),
        middle_attention: bool = True,
        num_heads: int | None = None,
        head_size: int | None = None,
        num_classes: int = 0,
        dropout: float = 0.0,
        scale_shift: bool = False,
        num_groups: int = 32,
        norm_eps: float = 1e-5,
        embedding_size: int | None = None,
        frequency_shift: float = 1.0,
        asymmetric_downsampling: bool = False,
    ) -> None:
        super().__init__()
        channels, attention_levels = _tuple("channels", channels), _tuple("attention_levels", attention_levels)
        in_channels = integer("in_channels", in_channels, least=1)
        out_channels = in_channels if out_channels is None else integer("out_channels", out_channels, least=1)
        blocks_per_level = integer("blocks_per_level", blocks_per_level, least=1)
        num_groups = integer("num_groups", num_groups, least=1)
        num_classes = integer("num_classes", num_classes, least=0)
        _check(channels, attention_levels, dropout, num_groups)
        embedding_size = _embedding_size(channels[0], embedding_size, frequency_shift)
        at_middle = (len(channels) - 1,) if middle_attention else ()
        heads = _heads(channels, (*attention_levels, *at_middle), num_heads, head_size)
        self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes
        self.channels, self.attention_levels = channels, attention_levels

        def residual(channels_in: int, channels_out: int) -> ResidualBlock:
            options: dict[str, Any] = {"num_groups": num_groups, "eps": norm_eps}
            return ResidualBlock(
                channels_in, channels_out, embedding_size, dropout=dropout, scale_shift=scale_shift, **options
            )

        def attention(level: int) -> SpatialSelfAttention:
            return SpatialSelfAttention(channels[level], num_heads=heads[level], num_groups=num_groups, eps=norm_eps)

        self.time_embedding = TimeEmbedding(channels[0], embedding_size, frequency_shift=frequency_shift)
        # The first is the null label's, so that the index is the label + 1.
        self.class_embedding = nn.Embedding(num_classes + 1, embedding_size) if num_classes else None
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        last = len(channels) - 1
        width, skips = channels[0], [channels[0]]
        down = []
        for level, wanted in enumerate(channels):
            blocks = []
            for _ in range(blocks_per_level):
                blocks.append(residual(width, wanted))
                width = wanted
                skips.append(width)
            attentions = [attention(level) for _ in blocks] if level in attention_levels else []
            downsample = Downsample(width, asymmetric=asymmetric_downsampling) if level < last else None
            if downsample is not None:
                skips.append(width)
            down.append(_DownLevel(blocks, attentions, downsample))
        self.down = nn.ModuleList(down)

        middle = [attention(last)] if middle_attention else []
        self.middle = _Middle([residual(width, width), residual(width, width)], middle)

        up = []
        for level, wanted in reversed(list(enumerate(channels))):
            blocks = []
            for _ in range(blocks_per_level + 1):
                blocks.append(residual(width + skips.pop(), wanted))
                width = wanted
            attentions = [attention(level) for _ in blocks] if level in attention_levels else []
            up.append(_UpLevel(blocks, attentions, Upsample(width) if level > 0 else None))
        # A number is a resolution, on the way down and up.
        self.up = nn.ModuleList(reversed(up))

        self.norm_out = GroupNorm(num_groups, width, norm_eps, activation="silu")
        self.conv_out = zeroed(nn.Conv2d(width, out_channels, 3, padding=1))
        for stream, module in enumerate(module for module in self.modules() if isinstance(module, Dropout)):
            module.stream = stream

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, key: Key | None = None) -> Tensor:
        """The prediction.

        Args:
            x: (N, in_channels, H, W), of the parameters' dtype; any H and W.
            t: (N,), the time steps, of any integer or floating type.
            labels: (N,), int64, from 0 to num_classes - 1, or -1 for the null label; None is the null label for all.
            key: of the dropout, see :class:`gencore.nn.Dropout`; None: torch's generator.

        Returns:
            (N, out_channels, H, W).

        Raises:
            ValueError: a shape is not as above, labels are given to a model without classes, or are out of range.
        """
        _check_inputs(x, t, self.in_channels)
        embedding = F.silu(self._embedding(t, labels))
        hidden = self.conv_in(x)
        skips = [hidden]
        for level in self.down:
            hidden = level(hidden, embedding, skips, key)
        hidden = self.middle(hidden, embedding, key)
        for level in reversed(self.up):
            hidden = level(hidden, embedding, skips, key)
        output: Tensor = self.conv_out(self.norm_out(hidden))
        return output

    def _embedding(self, t: Tensor, labels: Tensor | None) -> Tensor:
        embedding: Tensor = self.time_embedding(t)
        if self.class_embedding is None:
            _check_no_labels(labels)
            return embedding
        index = _class_index(labels, t)
        if torch.compiler.is_compiling():
            return embedding + self.class_embedding(index)
        try:
            return embedding + self.class_embedding(index)
        except IndexError as error:
            raise ValueError(
                f"labels must be from 0 to {self.num_classes - 1}, or -1 for none, got {(index - 1).tolist()}"
            ) from error


class _DownLevel(nn.Module):
    def __init__(
        self,
        residual: Sequence[ResidualBlock],
        attention: Sequence[SpatialSelfAttention],
        downsample: Downsample | None,
    ) -> None:
        super().__init__()
        self.residual = nn.ModuleList(residual)
        self.attention = nn.ModuleList(attention)
        self.downsample = downsample

    def forward(self, hidden: Tensor, embedding: Tensor, skips: list[Tensor], key: Key | None) -> Tensor:
        for index, block in enumerate(self.residual):
            hidden = block(hidden, embedding, key)
            if len(self.attention):
                hidden = self.attention[index](hidden)
            skips.append(hidden)
        if self.downsample is not None:
            hidden = self.downsample(hidden)
            skips.append(hidden)
        return hidden


class _Middle(nn.Module):
    def __init__(self, residual: Sequence[ResidualBlock], attention: Sequence[SpatialSelfAttention]) -> None:
        super().__init__()
        self.residual = nn.ModuleList(residual)
        self.attention = nn.ModuleList(attention)

    def forward(self, hidden: Tensor, embedding: Tensor, key: Key | None) -> Tensor:
        hidden = self.residual[0](hidden, embedding, key)
        for attention in self.attention:
            hidden = attention(hidden)
        output: Tensor = self.residual[1](hidden, embedding, key)
        return output


class _UpLevel(nn.Module):
    def __init__(
        self, residual: Sequence[ResidualBlock], attention: Sequence[SpatialSelfAttention], upsample: Upsample | None
    ) -> None:
        super().__init__()
        self.residual = nn.ModuleList(residual)
        self.attention = nn.ModuleList(attention)
        self.upsample = upsample

    def forward(self, hidden: Tensor, embedding: Tensor, skips: list[Tensor], key: Key | None) -> Tensor:
        for index, block in enumerate(self.residual):
            hidden = block(torch.cat((hidden, skips.pop()), dim=1), embedding, key)
            if len(self.attention):
                hidden = self.attention[index](hidden)
        if self.upsample is not None:
            hidden = self.upsample(hidden, skips[-1].shape[-2:])
        return hidden


# Looks at tensors that torch.fx's tracer leaves for when the traced module runs.
@torch.fx.wrap
def _check_inputs(x: Tensor, t: Tensor, in_channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x must have the shape (N, {in_channels}, H, W), got {tuple(x.shape)}")
    if t.shape != x.shape[:1]:
        samples = x.shape[0]
        raise ValueError(f"t must have one time step per sample of x, the shape ({samples},), got {tuple(t.shape)}")


@torch.fx.wrap
def _check_no_labels(labels: Tensor | None) -> None:
    if labels is not None:
        raise ValueError("labels must be None for a model without classes (num_classes=0)")


@torch.fx.wrap
def _class_index(labels: Tensor | None, t: Tensor) -> Tensor:
    """The row of the class embedding for each sample: the label + 1, 0 for the null label."""
    if labels is None:
        return torch.zeros_like(t, dtype=torch.int64)
    if labels.shape != t.shape:
        raise ValueError(f"labels must have the shape ({len(t)},), one per sample of x, got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    return labels + 1


def _tuple(name: str, values: Any) -> tuple[int, ...]:
    numbers = tuple(map(as_int, values)) if isinstance(values, Sequence) else (None,)
    if None in numbers:
        raise TypeError(f"{name} must be a sequence of ints, got {values!r}")
    return numbers  # type: ignore[return-value]


def _check(channels: tuple[int, ...], attention_levels: tuple[int, ...], dropout: float, num_groups: int) -> None:
    if not channels:
        raise ValueError("channels must name at least one level, got ()")
    if any(width < 1 or width % num_groups for width in channels):
        raise ValueError(f"channels must be multiples of num_groups={num_groups}, got {channels}")
    levels = len(channels)
    if len(set(attention_levels)) != len(attention_levels) or any(not 0 <= i < levels for i in attention_levels):
        raise ValueError(f"attention_levels must be different levels from 0 to {levels - 1}, got {attention_levels}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")


def _embedding_size(width: int, embedding_size: int | None, frequency_shift: float) -> int:
    if width % 2:
        raise ValueError(f"channels[0] must be even, for as many sines as cosines of the time step, got {width}")
    if not 0 <= frequency_shift < width // 2:
        raise ValueError(
            f"frequency_shift must be at least 0 and less than channels[0] / 2 = {width // 2}, got {frequency_shift}"
        )
    return 4 * width if embedding_size is None else integer("embedding_size", embedding_size, least=1)


def _heads(
    channels: tuple[int, ...], levels: tuple[int, ...], num_heads: int | None, head_size: int | None
) -> dict[int, int]:
    """The number of heads at each level that has attention."""
    if num_heads is not None and head_size is not None:
        raise ValueError(f"num_heads and head_size must not both be given, got {num_heads} and {head_size}")
    name, divisor = "num_heads", 1 if num_heads is None else num_heads
    if head_size is not None:
        name, divisor = "head_size", head_size
    divisor = integer(name, divisor, least=1)
    for level in levels:
        if channels[level] % divisor:
            raise ValueError(f"{name} must divide the {channels[level]} channels of level {level}, got {divisor}")
    return {level: divisor if head_size is None else channels[level] // divisor for level in levels}
