"""Principal component analysis, as a plugin."""

from gencore.models.base import ModelPlugin
from gencore.models.linear.config import PCAConfig
from gencore.models.linear.decomposition import Components, principal_components
from gencore.models.linear.model import PCA

__all__ = ["PCA", "Components", "PCAConfig", "plugin", "principal_components"]

plugin = ModelPlugin(
    name="pca",
    family="linear",
    config=PCAConfig,
    build=PCA,
    summary="principal component analysis with a normal distribution of the components; exact likelihood",
)
