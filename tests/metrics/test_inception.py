"""FID with torch-fidelity, where it is installed; its weights are not, so the network's are random."""

import pytest
import torch

from gencore import Key, ops
from gencore.metrics import InceptionV3, MissingWeightsError, compare, inception, kernel_distance
from gencore.metrics.report import figure_name


def test_only_the_published_weights_give_fid():
    assert [figure_name(measure, "Inception-v3") for measure in ("frechet", "kernel", "score", "recall")] == [
        "FID", "KID", "Inception Score", "recall (Inception-v3)",
    ]  # fmt: skip
    assert figure_name("frechet", "Inception-v3, other weights") == "FD (Inception-v3, other weights)"
    assert figure_name("frechet", "EfficientNet-Lite0") == "FD (EfficientNet-Lite0)"


def test_missing_weights_say_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert inception.default_weights() == tmp_path / "checkpoints" / inception.WEIGHTS
    with pytest.raises(MissingWeightsError) as info:
        InceptionV3()
    told = str(info.value)
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        assert "FID needs torch-fidelity: pip install torch-fidelity" in told
    else:
        assert f"{tmp_path / 'checkpoints' / inception.WEIGHTS}: No such file" in told
        assert "github.com/toshas/torch-fidelity" in told


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights, of the size that keeps activations as they are from layer to layer."""
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
    )
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    load, module.torch.load = module.torch.load, lambda *arguments, **options: {}
    strict = module.FeatureExtractorInceptionV3.load_state_dict
    module.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
    try:
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="none")
        for tensor in network.parameters():
            if tensor.dim() == 4:
                torch.nn.init.kaiming_normal_(tensor)
    finally:
        module.torch.load, module.FeatureExtractorInceptionV3.load_state_dict = load, strict
    torch.save(network.state_dict(), path)
    return path


def test_figures_are_those_of_torch_fidelity(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    eight_bits = (ops.uniform((30, 3, 24, 20), Key(1)) * 255).round()
    eight_bits[15:] *= 0.7
    eight_bits = eight_bits.round().to(torch.uint8)
    extractor = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    features, logits = extractor(eight_bits)
    ours = InceptionV3(weights)
    assert ours.name == "Inception-v3, other weights"
    found = ours(eight_bits.float() / 255)
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)
    real, fake = found[:15], found[15:]
    figures = {figure.measure: figure.estimate.value for figure in compare(ours, real, fake, replicates=0, key=Key(0))}
    statistics = [fid_features_to_statistics(features[rows].double()) for rows in (slice(15), slice(15, 30))]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert figures["frechet"] == pytest.approx(fid, rel=1e-3)
    options = {"kid_subsets": 1, "kid_subset_size": 15, "kid_degree": 3, "verbose": False}
    kid = kid_features_to_metric(features[:15].double(), features[15:].double(), **options)
    assert figures["kernel"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-3)
    assert kernel_distance(real, fake).estimate.value == figures["kernel"]
    prc = prc_features_to_metric(features[15:].double(), features[:15].double(), save_cpu_ram=True, verbose=False)
    assert (figures["precision"], figures["recall"]) == (
        pytest.approx(prc["precision"], abs=1e-6), pytest.approx(prc["recall"], abs=1e-6),
    )  # fmt: skip
    isc = isc_features_to_metric(logits[15:], splits=1, shuffle=False)
    assert figures["score"] == pytest.approx(isc["inception_score_mean"], rel=1e-4)


class Code:
    """What would run code where it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("the file's code was run",)


def test_the_file_runs_no_code(tmp_path):
    """torch-fidelity itself would load it with pickle."""
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    torch.save({"x": Code()}, tmp_path / "code.pth")
    with pytest.raises(MissingWeightsError, match="does not hold the weights of Inception-v3"):
        InceptionV3(tmp_path / "code.pth")
