"""The settings of generative adversarial networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gencore.config import field
from gencore.models.base import ModelConfig
from gencore.models.gan.augmentation import AugmentationConfig
from gencore.models.gan.networks.levels import size_fault
from gencore.models.gan.objectives import OBJECTIVES
from gencore.models.optimizers import Adam, RMSprop
from gencore.spec import DataSpec

Network = Literal["mlp", "dcgan", "resnet", "r3gan"]
NormKind = Literal["none", "batch", "layer"]
Conditioning = Literal["none", "embedding", "projection"]

# Channels of a group of r3gan's 3x3 convolutions, which see twice the channels of a resolution.
_GROUP = 8


def _adam() -> Adam:
    # beta1 = 0.5: momentum makes the two players circle each other (Radford et al. 2016, section 3).
    return Adam(lr=5e-4, beta1=0.5)


def _rmsprop() -> RMSprop:
    return RMSprop(lr=5e-5)


@dataclass(frozen=True)
class GANSettings(ModelConfig):
    """What all of :class:`gencore.models.gan.GAN` have in common, which is all but the optimisers."""

    network: Network = field("mlp", doc="architecture of both players; resnet is that of SNGAN")
    latent_size: int = field(64, ge=1, le=1 << 16, doc="dimensions of the latent z, standard normal")
    generator_sizes: tuple[int, ...] = field((256, 512), ge=1, le=1 << 16, doc="mlp: units of the hidden layers")
    discriminator_sizes: tuple[int, ...] = field((512, 256), ge=1, le=1 << 16, doc="mlp: units of the hidden layers")
    generator_channels: tuple[int, ...] = field(
        (32, 64, 128), ge=1, le=1 << 14, doc="others: at each resolution, the finest first; the last for coarser ones"
    )
    discriminator_channels: tuple[int, ...] = field((32, 64, 128), ge=1, le=1 << 14, doc="the discriminator's")
    blocks_per_level: int = field(1, ge=1, le=64, doc="r3gan: residual blocks at each resolution")
    generator_norm: NormKind = field(
        "layer", doc="of hidden layers; with batch, images depend on each other in training"
    )
    discriminator_norm: NormKind = field("none", doc="of hidden layers, but for the first")
    spectral_norm: bool = field(False, doc="divide each of the discriminator's weights by its largest singular value")
    dropout: float = field(0.0, ge=0, lt=1, doc="mlp, dcgan: fraction of the discriminator's hidden values left out")
    conditioning: Literal["none", "embedding", "projection", "auto"] = field(
        "none", doc="how both players are told the classes; auto: projection where the images have classes, else none"
    )
    embedding_size: int = field(32, ge=1, le=1 << 14, doc="of a class beside the latents")
    objective: Literal["minimax", "non-saturating", "least-squares", "wasserstein", "hinge", "relativistic"] = field(
        "non-saturating", doc="what the players minimise"
    )
    label_smoothing: float = field(
        0.0, ge=0, lt=0.5, doc="minimax, non-saturating: the discriminator's target for real images is 1 less this"
    )
    discriminator_steps: int = field(1, ge=1, doc="k of Algorithm 1: steps of the discriminator per generator step")
    weight_clip: float | None = field(
        None, gt=0, doc="largest size of the discriminator's weights, cut after each of its steps; none: not cut"
    )
    gradient_penalty: float = field(
        0.0, ge=0, doc="weight of (|gradient| - 1)^2 between real images and samples (WGAN-GP)"
    )
    r1: float = field(4.0, ge=0, doc="gamma: weight of |gradient|^2 / 2 on real images, in [-1, 1]")
    r2: float = field(0.0, ge=0, doc="the same on samples")
    penalty_final: float = field(1.0, ge=0, doc="share of r1 and r2 at the end of the training, by half a cosine")
    penalty_every: int = field(1, ge=1, doc="steps from one penalty to the next, whose weight is as many times larger")
    augmentation: AugmentationConfig | None = field(None, doc="of all that the discriminator sees; none: as it is")

    def check(self) -> Iterable[str]:
        players = ("generator", "discriminator")
        for name in (f"{player}_channels" for player in players):
            channels = getattr(self, name)
            if not channels:
                yield f"{name}: must not be empty, was ()"
            if self.network == "r3gan" and (wrong := [width for width in channels if width % _GROUP]):
                yield f"{name}: must be multiples of {_GROUP} for network=r3gan, but {wrong[0]} is not"
        for name in (f"{player}_norm" for player in players):
            if self.network == "r3gan" and getattr(self, name) != "none":
                yield f"{name}: must be none for network=r3gan, was {getattr(self, name)}"
        if self.dropout and self.network not in ("mlp", "dcgan"):
            yield f"dropout: must be 0 for network={self.network}, was {self.dropout:g}"
        objective = OBJECTIVES[self.objective]
        if self.label_smoothing and not objective.is_probabilistic:
            yield f"label_smoothing: must be 0 for objective={self.objective}, was {self.label_smoothing:g}"
        penalties = {name: getattr(self, name) for name in ("gradient_penalty", "r1", "r2")}
        if self.discriminator_norm == "batch":
            for name, weight in penalties.items():
                if weight:
                    yield (
                        f"{name}: must be 0 for discriminator_norm=batch, with which the gradient of an image is "
                        f"one of others too, was {weight:g}"
                    )
        if self.penalty_every > 1 and not any(penalties.values()):
            yield f"penalty_every: must be 1 without a penalty, was {self.penalty_every}"
        if self.augmentation is not None and self.augmentation.target is not None and not objective.has_sides:
            yield (
                f"augmentation.target: must be none for objective={self.objective}, whose scores have no sign to go "
                f"by, was {self.augmentation.target:g}"
            )

    def faults_with(self, spec: DataSpec) -> Iterable[str]:
        if self.network != "mlp" and (fault := size_fault(self.network, *spec.image_shape[1:])) is not None:
            yield fault
        if self.conditioning in ("embedding", "projection") and spec.num_classes < 2:
            which = "one class, which says nothing" if spec.num_classes else "no classes"
            yield f"conditioning: must be none or auto for images of {which}, was {self.conditioning}"
        height, width = spec.image_shape[1:]
        if self.augmentation is not None and "rotate" in self.augmentation.transforms and height != width:
            yield f"augmentation.transforms: rotate must have square images, but they are {height}x{width}"

    def conditioning_of(self, spec: DataSpec) -> Conditioning:
        """How the players of such images are told their classes."""
        if self.conditioning == "auto":
            return "projection" if spec.num_classes > 1 else "none"
        return self.conditioning

    @property
    def has_conditional_norm(self) -> bool:
        """Whether the generator has batch norms that can be told the class."""
        return self.network in ("dcgan", "resnet") and self.generator_norm == "batch"


@dataclass(frozen=True)
class GANConfig(GANSettings):
    """Settings of :class:`gencore.models.gan.GAN`, trained by Adam. The defaults show all classes of MNIST and
    scikit-learn's digits."""

    generator_optimizer: Adam = dataclasses.field(default_factory=_adam)
    discriminator_optimizer: Adam = dataclasses.field(default_factory=_adam)


@dataclass(frozen=True)
class WGANConfig(GANSettings):
    """The same, trained by RMSprop: a critic that moves by momentum is unstable (Arjovsky et al. 2017, section 4)."""

    generator_optimizer: RMSprop = dataclasses.field(default_factory=_rmsprop)
    discriminator_optimizer: RMSprop = dataclasses.field(default_factory=_rmsprop)
