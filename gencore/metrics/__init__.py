"""Measures of generative models: pure functions of model, data set and key."""

from gencore.metrics.classes import (
    Classifier,
    ClassReport,
    class_report,
    conditional_accuracy,
    draw_samples,
    sample_batches,
    train_classifier,
)
from gencore.metrics.frechet import FRECHET_NAME, frechet_distance
from gencore.metrics.kl import kl_divergence, nearest_normal
from gencore.metrics.likelihood import LikelihoodBound, likelihood_bound
from gencore.metrics.probe import linear_probe

__all__ = [
    "FRECHET_NAME",
    "ClassReport",
    "Classifier",
    "LikelihoodBound",
    "class_report",
    "conditional_accuracy",
    "draw_samples",
    "frechet_distance",
    "kl_divergence",
    "likelihood_bound",
    "linear_probe",
    "nearest_normal",
    "sample_batches",
    "train_classifier",
]
