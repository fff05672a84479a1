"""The settings of the denoising diffusion model: of its training, and of its sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gencore.config import field
from gencore.models.base import ModelConfig, SamplingConfig
from gencore.models.optimizers import Adam
from gencore.spec import DataSpec

# Beta rises to 20 / timesteps, and is a probability.
_LEAST_LINEAR = 21
_USES_EARLIER = ("dpm_solver", "dpm_solver_sde", "heun")
# Settings of one sampler.
_OF_ONE = {"eta": "ddim", "churn": "heun"}


@dataclass(frozen=True)
class Sampling(SamplingConfig):
    """How :class:`gencore.models.diffusion.DDPM` samples: what ``gencore sample --set`` takes."""

    of_conditions = ("guidance_scale", "guidance_rescale")

    sampler: Literal["ddpm", "ddim", "dpm_solver", "dpm_solver_sde", "euler", "euler_ancestral", "heun"] = field(
        "ddpm", doc="ddpm is Algorithm 2 of Ho et al. (2020); the others need fewer steps"
    )
    steps: int | None = field(None, ge=1, doc="steps; none: every one of the training for ddpm, 50 for the others")
    spacing: Literal["leading", "trailing", "linspace", "karras"] | None = field(
        None,
        doc="which of the training's steps are taken; trailing begins with the very last; none: karras for heun, "
        "trailing for the others",
    )
    eta: float = field(0.0, ge=0, le=1, doc="ddim: share of the noise that ddpm adds; 0 adds none")
    churn: float = field(0.0, ge=0, doc="heun: noise added before the steps (S_churn of Karras et al. 2022)")
    clip: bool = field(True, doc="keep every prediction of the image within what images can be")
    threshold: float | None = field(
        None, gt=0, le=1, doc="quantile for dynamic thresholding (Saharia et al. 2022), such as 0.995; none: not done"
    )
    guidance_scale: float = field(
        1.0,
        ge=0,
        doc="with classes: 1 is the model's own p(x|class), more is more typical of the class and less varied",
    )
    guidance_rescale: float = field(
        0.0, ge=0, le=1, doc="brings a guided prediction back to its own contrast (Lin et al. 2024); 0: not done"
    )

    resamples: int = field(
        1, ge=1, le=1000, doc="edit: times that each step is made, so that what is filled in fits (Lugmayr et al. 2022)"
    )

    @classmethod
    def from_settings(
        cls,
        settings: Mapping[str, Any],
        base: Mapping[str, Any] | None = None,
        *,
        prefix: str = "",
        known: Iterable[str] | None = None,
    ) -> Sampling:
        """:meth:`Config.from_settings`; another sampler leaves out what ``base`` says that only others use."""
        kept, sampler = dict(base or {}), settings.get("sampler")
        if sampler is not None:
            unused = [name for name, only in _OF_ONE.items() if sampler != only]
            unused += ["resamples"] if sampler in _USES_EARLIER else []
            for name in unused:
                kept.pop(name, None)
        return super().from_settings(settings, kept, prefix=prefix, known=known)

    def check(self) -> Iterable[str]:
        for name, only in _OF_ONE.items():
            if getattr(self, name) and self.sampler != only:
                yield f"{name}: is for sampler={only} only, was {getattr(self, name)} for {self.sampler}"
        if self.threshold is not None and not self.clip:
            yield "threshold: must be none without clip"

    def faults_of_editing(self) -> Iterable[str]:
        """What keeps these settings from filling in parts of images, a line each."""
        if self.resamples > 1 and self.sampler in _USES_EARLIER:
            yield f"resamples: must be 1 for sampler={self.sampler}, was {self.resamples}"

    def faults_with(self, timesteps: int, conditional: bool) -> Iterable[str]:
        """What does not go with a model of so many timesteps, with or without classes, a line each."""
        if self.steps is not None and self.steps > timesteps:
            yield f"steps: must be <= {timesteps}, the timesteps of the training, was {self.steps}"
        if not conditional:
            if self.guidance_scale != 1:
                yield f"guidance_scale: must be 1 for a model without classes, was {self.guidance_scale:g}"
            if self.guidance_rescale:
                yield f"guidance_rescale: must be 0 for a model without classes, was {self.guidance_rescale:g}"


def _adam() -> Adam:
    return Adam(lr=2e-4)


@dataclass(frozen=True)
class DDPMConfig(ModelConfig):
    """Settings of :class:`gencore.models.diffusion.DDPM`. The default network is small, for images like MNIST's."""

    channels: tuple[int, ...] = field(
        (32, 64, 64), ge=2, le=1 << 14, doc="channels at each resolution of the U-Net, each half the one before"
    )
    blocks_per_level: int = field(1, ge=1, le=64, doc="residual blocks at each resolution, on the way down")
    attention_levels: tuple[int, ...] = field((), ge=0, doc="resolutions with self-attention; 0 is the image's own")
    num_heads: int = field(1, ge=1, doc="of the self-attention")
    num_groups: int = field(8, ge=1, doc="of the group norms; divides every number of channels")
    scale_shift: bool = field(False, doc="time and class scale and shift the group norms instead of being added")
    dropout: float = field(0.0, ge=0, lt=1, doc="fraction of the values left out in residual blocks in training")
    timesteps: int = field(1000, ge=2, le=1 << 20, doc="T: steps from an image to noise")
    schedule: Literal["linear", "cosine"] = field("linear", doc="how the noise grows with the steps")
    parameterization: Literal["eps", "x0", "v"] = field(
        "eps", doc="what the network predicts: noise, image, or velocity"
    )
    weighting: Literal["simple", "snr", "min_snr"] = field("simple", doc="of the steps in the loss")
    gamma: float = field(5.0, gt=0, doc="where min_snr cuts the weight")
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = field(
        "fixed_small",
        doc="of a step from x_t to x_{t-1}; learned_range: the network says it (Nichol and Dhariwal 2021)",
    )
    bound_weight: float = field(0.001, gt=0, doc="learned_range: weight of the variational bound in the loss")
    conditional: bool = field(False, doc="tell the network the classes of the images")
    label_dropout: float = field(
        0.1, gt=0, lt=1, doc="conditional: share of images whose class it is not told, which guidance needs"
    )
    optimizer: Adam = dataclasses.field(default_factory=_adam)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    def check(self) -> Iterable[str]:
        if not self.channels:
            yield "channels: must not be empty, was ()"
            return
        wrong = [width for width in self.channels if width % self.num_groups]
        if wrong:
            yield f"channels: must be multiples of num_groups={self.num_groups}, but {wrong[0]} is not"
        if self.channels[0] % 2:
            yield f"channels: the first must be even, was {self.channels[0]}"
        if self.channels[0] == 2:
            yield "channels: the first must be at least 4, was 2"
        levels = len(self.channels)
        outside = [level for level in self.attention_levels if level >= levels]
        if outside:
            yield f"attention_levels: must be below {levels}, the number of channels, but {outside[0]} is not"
        if len(set(self.attention_levels)) < len(self.attention_levels):
            yield f"attention_levels: must be different, was {self.attention_levels}"
        attended = {self.channels[level] for level in (*self.attention_levels, levels - 1) if level < levels}
        indivisible = sorted(width for width in attended if width % self.num_heads)
        if indivisible:
            yield f"num_heads: must divide the channels at attention, {indivisible[0]}, was {self.num_heads}"
        if self.schedule == "linear" and self.timesteps < _LEAST_LINEAR:
            yield f"timesteps: must be at least {_LEAST_LINEAR} for schedule=linear, was {self.timesteps}"
        for fault in self.sampling.faults_with(self.timesteps, self.conditional):
            yield f"sampling.{fault}"

    def faults_with(self, spec: DataSpec) -> Iterable[str]:
        levels, smallest = len(self.channels), min(spec.image_shape[1:])
        if smallest >> (levels - 1) == 0:
            most = smallest.bit_length()
            yield f"channels: must be at most {most} for images of {smallest} pixels, were {levels}"
        if self.conditional and spec.num_classes == 0:
            yield "conditional: must be false for images without classes, was true"
