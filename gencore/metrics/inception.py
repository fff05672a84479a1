"""FID proper: the features of Inception-v3 with the weights of TensorFlow, through torch-fidelity."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencore.metrics.errors import MissingWeightsError
from gencore.metrics.features import INCEPTION, rgb

# The file of torch-fidelity's releases, and where PyTorch keeps what it has downloaded.
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_SHA256 = "6726825d"
_PREPARED = "torch-fidelity Inception-v3 2048, 8 bits"
# Images that are looked at together.
_PIECE = 32


class InceptionV3:
    """Features of Inception-v3: (N, 2048), those of FID, KID and the Inception Score.

    Images are rounded to 8 bits, as those of a file are, and resized by torch-fidelity as TensorFlow 1 does, whose
    faults are a part of what FID is. Nothing is downloaded. With other weights than the published ones, which it knows
    by their hash, it has another name, and no figure of it is called FID.

    Args:
        weights: the file of the weights, ``weights-inception-2015-12-05-6726825d.pth``; None: where torch-fidelity
            keeps it once it has been used, the folder ``hub/checkpoints`` of PyTorch's cache.
        device: where the network is.

    Raises:
        MissingWeightsError: torch-fidelity is not installed, or there is no such file, or it holds other weights.
    """

    name = INCEPTION
    size = 2048

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MissingWeightsError(
                f"FID needs torch-fidelity: pip install torch-fidelity ({error.name or error} is missing)"
            ) from error
        path = default_weights() if weights is None else weights
        try:
            data = path.read_bytes()
        except OSError as error:
            raise MissingWeightsError(
                f"cannot read the weights of {self.name}: {path}: {error.strerror}; get {WEIGHTS} from the releases of "
                "torch-fidelity (github.com/toshas/torch-fidelity, v0.2.0), and put it there or name its place"
            ) from error
        try:
            # The library reads the file with pickle's full powers; this reads weights alone, and refuses others.
            torch.load(path, map_location="cpu", weights_only=True)
            network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            )
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise MissingWeightsError(f"{path} does not hold the weights of {self.name}: {reason}") from error
        if not hashlib.sha256(data).hexdigest().startswith(_SHA256):
            self.name = f"{INCEPTION}, other weights"
        self._network, self._device = network.to(device), device
        self.fingerprint = hashlib.blake2b(_PREPARED.encode() + data, digest_size=16).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        # It imports Pillow, which nothing else here needs.
        from gencore.pictures import pixels

        pieces = [self._network(pixels(rgb(piece)).to(self._device))[0].cpu() for piece in images.split(_PIECE)]
        return torch.cat(pieces)

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """p(class|image) of 1,008 classes, without the last layer's bias: those of the Inception Score."""
        return torch.softmax(features.to(self._device) @ self._network.fc.weight.T, 1).cpu()


def default_weights() -> Path:
    """Where torch-fidelity keeps the weights."""
    return Path(os.path.expanduser(torch.hub.get_dir())) / "checkpoints" / WEIGHTS
