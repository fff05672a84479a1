"""Where classes enter a network (Mirza and Osindero, "Conditional Generative Adversarial Nets", 2014)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LabelledLatents(nn.Module):
    """(B, latents) and labels (B,) -> (B, latents + size): an embedding of the class beside the latents."""

    def __init__(self, num_classes: int, size: int):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, size)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return torch.cat((latents, self.embedding(labels).to(latents.dtype)), 1)


class LabelPlane(nn.Module):
    """(B, C, H, W) and labels (B,) -> (B, C + 1, H, W): an embedding of the class as a further channel."""

    def __init__(self, num_classes: int, height: int, width: int):
        super().__init__()
        self.size = height, width
        self.embedding = nn.Embedding(num_classes, height * width)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        plane = self.embedding(labels).to(images.dtype)
        return torch.cat((images, plane.unflatten(1, (1, *self.size))), 1)
