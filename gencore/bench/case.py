"""What a case is: of an op, of attention, or of a whole network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


@dataclass(frozen=True)
class Case:
    """One shape that an op must serve.

    Attributes:
        shape: of the op's main tensor; the first dimension numbers the samples.
        why: what the case is there for.
        layout: the memory format.
        draws: how many draws per input; None where the op draws once and adds no dimension.
        groups: of channels, for ops that have them.
        timed: the kinds of device that benchmarks time it on.
        presets: the workloads it is part of, of :data:`gencore.bench.cases.PRESETS`.
    """

    shape: tuple[int, ...]
    why: str
    layout: str = "contiguous"
    draws: int | None = None
    groups: int = 1
    timed: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()

    @property
    def memory_format(self) -> torch.memory_format:
        return _FORMATS[self.layout]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def shrunk(self) -> Case:
        """The same at a size that takes no time."""
        return replace(self, shape=tuple(min(size, 8) for size in self.shape), groups=min(self.groups, 4))

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        layout = "" if self.layout == "contiguous" else f"-{self.layout}"
        draws = "" if self.draws is None else f"-{self.draws}draws"
        groups = "" if self.groups == 1 else f"-{self.groups}groups"
        return f"{size}{layout}{draws}{groups}"


@dataclass(frozen=True)
class AttentionCase:
    """One problem that attention must solve.

    Attributes:
        batch, heads, queries, keys, size: queries and keys are tokens; a head has ``size`` channels.
        why: what the case is there for.
        layout: "heads", dense tensors (B, heads, tokens, size); "tokens", views of what a linear layer leaves, (B,
            tokens, 3, heads, size), or of two such where there are other keys than queries; "contiguous" or
            "channels_last", an image (B, 3 heads size, H, W) in that format.
        key_heads: of k and v, where heads of queries share them.
        hidden: what hides keys from queries: "causal", or "mask", a boolean one of pairs of tokens.
        timed: the kinds of device that benchmarks time it on.
        presets: the workloads it is part of, of :data:`gencore.bench.cases.PRESETS`.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    size: int
    why: str
    layout: str = "heads"
    key_heads: int | None = None
    hidden: Literal["causal", "mask"] | None = None
    timed: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()

    draws: ClassVar[None] = None

    @property
    def elements(self) -> int:
        """Of the longer ones of the op's tensors."""
        return self.batch * self.heads * max(self.queries, self.keys) * self.size

    @property
    def flops(self) -> int:
        """Multiplications and additions of one product of queries by keys; the forward pass takes two, and the backward
        pass five, one of which makes the probabilities again."""
        return 2 * self.batch * self.heads * self.queries * self.keys * self.size

    @property
    def memory_format(self) -> torch.memory_format:
        """Of an image."""
        return _FORMATS[self.layout]

    @property
    def image(self) -> tuple[int, int, int, int]:
        """The shape of q, k and v as one image, as near to a square as the number of tokens has it."""
        near = math.isqrt(self.queries)
        height = next((n for n in range(near, 0, -1) if self.queries % n == 0), 1)
        return self.batch, 3 * self.heads * self.size, height, self.queries // height

    def tensors(
        self, dtype: torch.dtype, device: str = "cpu", generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Standard normal q, k and v, or the one image that holds them. ``generator`` is one of the CPU."""

        def normal(*shape: int) -> Tensor:
            if generator is None:
                return torch.randn(shape, dtype=dtype, device=device)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        of_queries = (self.batch, self.heads, self.queries, self.size)
        of_keys = (self.batch, self.key_heads or self.heads, self.keys, self.size)
        if self.layout == "heads":
            return [normal(*of_queries), normal(*of_keys), normal(*of_keys)]
        if self.layout != "tokens":
            return [normal(*self.image).contiguous(memory_format=self.memory_format)]
        if self.queries == self.keys:
            parts = normal(self.batch, self.queries, 3, self.heads, self.size).transpose(1, 3).unbind(2)
        else:
            query = normal(self.batch, self.queries, self.heads, self.size).transpose(1, 2)
            parts = (query, *normal(self.batch, self.keys, 2, self.heads, self.size).transpose(1, 3).unbind(2))
        return list(parts)

    def shrunk(self) -> AttentionCase:
        """The same at a size that takes no time."""
        return replace(
            self,
            batch=min(self.batch, 1),
            heads=min(self.heads, 2),
            key_heads=None if self.key_heads is None else 1,
            queries=min(self.queries, 8),
            keys=min(self.keys, 8),
            size=min(self.size, 64),
        )

    def __str__(self) -> str:
        tokens = f"{self.queries}" if self.queries == self.keys else f"{self.queries}by{self.keys}"
        heads = f"{self.heads}" if self.key_heads is None else f"{self.heads}by{self.key_heads}"
        hidden = "" if self.hidden is None else f"-{self.hidden}"
        return f"{self.batch}x{heads}x{tokens}x{self.size}-{self.layout}{hidden}"


@dataclass(frozen=True)
class NetworkCase:
    """One input of a whole network, or one batch that a model is trained on or samples.

    Attributes:
        name: of the network or the model.
        batch, size: as many images, of ``size`` x ``size`` pixels, or of a VAE's latents.
        why: what the case is there for.
        timed: the kinds of device that benchmarks time it on.
        presets: the workloads it is part of, of :data:`gencore.bench.cases.PRESETS`.
        small: a network of the same kind of a few channels.
    """

    name: str
    batch: int
    size: int
    why: str
    timed: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    small: bool = False

    draws: ClassVar[None] = None
    layout: ClassVar[str] = "channels_last"

    @property
    def elements(self) -> int:
        """Pixels."""
        return self.batch * self.size**2

    def shrunk(self) -> NetworkCase:
        """The same at a size that takes no time."""
        return replace(self, batch=min(self.batch, 2), size=min(self.size, 8), small=True)

    def __str__(self) -> str:
        return f"{self.name}-{self.batch}x{self.size}x{self.size}{'-small' if self.small else ''}"


AnyCase = Case | AttentionCase | NetworkCase
