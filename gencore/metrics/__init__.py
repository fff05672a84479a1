"""Measures of generative models: pure functions of model, data set and key."""

from gencore.metrics.classes import Classifier, ClassReport, class_report, classify_samples, train_classifier
from gencore.metrics.likelihood import LikelihoodBound, likelihood_bound

__all__ = [
    "ClassReport",
    "Classifier",
    "LikelihoodBound",
    "class_report",
    "classify_samples",
    "likelihood_bound",
    "train_classifier",
]
