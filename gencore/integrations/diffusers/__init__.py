"""Our kernels in diffusers' U-Nets, autoencoders and schedulers; docs/integrations.md says what they replace."""

from gencore.integrations.diffusers.acceleration import Acceleration as Acceleration
from gencore.integrations.diffusers.acceleration import accelerate as accelerate
from gencore.integrations.diffusers.parts import Explanation as Explanation
from gencore.integrations.diffusers.parts import Part as Part

__all__ = ["Acceleration", "Explanation", "Part", "accelerate"]
