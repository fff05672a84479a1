"""Models: the contract of a model plugin (:mod:`gencore.models.base`) and the built-in plugins, one package each."""

from gencore.models.base import (
    Autoencodes,
    Draw,
    GenerativeModel,
    HasLatents,
    HasLikelihoodBound,
    Loss,
    ModelConfig,
    ModelPlugin,
    Phase,
    SamplingConfig,
    Step,
    freeze,
)
from gencore.models.optimizers import SGD, Adam, Optimizer, OptimizerConfig, RMSprop

__all__ = [
    "SGD",
    "Adam",
    "Autoencodes",
    "Draw",
    "GenerativeModel",
    "HasLatents",
    "HasLikelihoodBound",
    "Loss",
    "ModelConfig",
    "ModelPlugin",
    "Optimizer",
    "OptimizerConfig",
    "Phase",
    "RMSprop",
    "SamplingConfig",
    "Step",
    "freeze",
]
