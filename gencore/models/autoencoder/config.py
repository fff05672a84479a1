"""The settings of the autoencoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gencore.config import field
from gencore.models.base import ModelConfig
from gencore.models.optimizers import Adam
from gencore.models.vae.networks import levels_fault
from gencore.spec import DataSpec


@dataclass(frozen=True)
class AutoencoderConfig(ModelConfig):
    """Settings of :class:`gencore.models.autoencoder.Autoencoder`.

    The layers' default sizes are those of Hinton and Salakhutdinov (2006) for MNIST.
    """

    network: Literal["mlp", "conv"] = field("mlp", doc="kind of encoder and decoder")
    hidden_sizes: tuple[int, ...] = field(
        (1000, 500, 250),
        ge=1,
        le=1 << 16,
        doc="mlp: units of each layer; conv: channels of each level, each level half the resolution",
    )
    latent_size: int = field(30, ge=1, le=1 << 16, doc="dimensions of the code")
    tied: bool = field(False, doc="mlp: the decoder's weights are the encoder's, transposed")
    loss: Literal["squared-error", "cross-entropy"] = field("squared-error", doc="of a pixel")
    optimizer: Adam = dataclasses.field(default_factory=Adam)

    def check(self) -> Iterable[str]:
        if self.network == "conv" and not self.hidden_sizes:
            yield "hidden_sizes: must not be empty for network='conv', was ()"
        if self.network == "conv" and self.tied:
            yield "tied: must be false for network='conv', was true"

    def faults_with(self, spec: DataSpec) -> Iterable[str]:
        if self.network == "conv" and (fault := levels_fault(self.hidden_sizes, spec.image_shape)):
            yield fault
