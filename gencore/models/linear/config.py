"""The settings of principal component analysis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gencore.config import field
from gencore.models.base import ModelConfig
from gencore.spec import DataSpec


@dataclass(frozen=True)
class PCAConfig(ModelConfig):
    """Settings of :class:`gencore.models.linear.PCA`."""

    latent_size: int = field(40, ge=1, le=1 << 16, doc="number of principal components")

    def faults_with(self, spec: DataSpec) -> Iterable[str]:
        pixels = math.prod(spec.image_shape)
        if self.latent_size > pixels:
            yield f"latent_size: must be at most the {pixels} values of an image, was {self.latent_size}"
