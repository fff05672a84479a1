"""Measures of generative models: pure functions of model, data set and key."""

from gencore.metrics.bootstrap import Estimate, mean_estimate, resampled
from gencore.metrics.classes import (
    Classifier,
    ClassReport,
    class_report,
    conditional_accuracy,
    draw_samples,
    sample_batches,
    train_classifier,
)
from gencore.metrics.efficientnet import EfficientNetLite0
from gencore.metrics.errors import MissingWeightsError
from gencore.metrics.features import ClassifierFeatures, FeatureExtractor, HasClasses, HasLayers, features_of
from gencore.metrics.frechet import FRECHET_NAME, Moments, frechet_distance, frechet_estimate, moments
from gencore.metrics.inception import InceptionV3
from gencore.metrics.inception_score import inception_score
from gencore.metrics.kernel import KernelDistance, kernel_distance
from gencore.metrics.kl import kl_divergence, nearest_normal
from gencore.metrics.likelihood import LikelihoodBound, likelihood_bound
from gencore.metrics.manifold import Manifold, manifold
from gencore.metrics.neighbours import Neighbours, nearest, nearest_in
from gencore.metrics.perceptual import perceptual_distance
from gencore.metrics.probe import linear_probe
from gencore.metrics.reconstruction import Reconstruction, reconstruction
from gencore.metrics.report import Figure, compare
from gencore.metrics.similarity import psnr, ssim

__all__ = [
    "FRECHET_NAME",
    "ClassReport",
    "Classifier",
    "ClassifierFeatures",
    "EfficientNetLite0",
    "Estimate",
    "FeatureExtractor",
    "Figure",
    "HasClasses",
    "HasLayers",
    "InceptionV3",
    "KernelDistance",
    "LikelihoodBound",
    "Manifold",
    "MissingWeightsError",
    "Moments",
    "Neighbours",
    "Reconstruction",
    "class_report",
    "compare",
    "conditional_accuracy",
    "draw_samples",
    "features_of",
    "frechet_distance",
    "frechet_estimate",
    "inception_score",
    "kernel_distance",
    "kl_divergence",
    "likelihood_bound",
    "linear_probe",
    "manifold",
    "mean_estimate",
    "moments",
    "nearest",
    "nearest_in",
    "nearest_normal",
    "perceptual_distance",
    "psnr",
    "reconstruction",
    "resampled",
    "sample_batches",
    "ssim",
    "train_classifier",
]
