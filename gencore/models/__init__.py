"""Models: the contract of a model plugin (:mod:`gencore.models.base`) and the built-in plugins, one package each."""

from gencore.models.base import (
    Adam,
    Autoencodes,
    Batch,
    Edits,
    Family,
    GenerativeModel,
    HasLatents,
    HasLikelihoodBound,
    Loss,
    ModelConfig,
    ModelPlugin,
    Phase,
)

__all__ = [
    "Adam",
    "Autoencodes",
    "Batch",
    "Edits",
    "Family",
    "GenerativeModel",
    "HasLatents",
    "HasLikelihoodBound",
    "Loss",
    "ModelConfig",
    "ModelPlugin",
    "Phase",
]
