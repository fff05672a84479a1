import math
import sys

import pytest
import torch
from torch import nn

from gencore import Key, ops
from gencore.data import ImageDataset
from gencore.metrics import likelihood_bound
from gencore.models import GenerativeModel, ModelConfig
from gencore.plugins import PluginError
from gencore.processes import Processes

PIXELS = torch.arange(7 * 4, dtype=torch.uint8).reshape(7, 1, 2, 2)
LABELS = torch.arange(7) % 3
DATA = ImageDataset("toy", "test", PIXELS, LABELS, tuple("abc"))


class Known(GenerativeModel):
    """A bound that is minus the sum of the pixels, plus noise by the key, plus the number of draws."""

    def __init__(self):
        super().__init__(ModelConfig(), DATA.spec)
        self.layer = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
        self.layer[1].eval()
        self.seen = []

    def log_likelihood_bound(self, batch, key, num_samples=1):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.seen.append(batch.labels.tolist())
        return -255 * batch.images.flatten(1).sum(1) + ops.normal((len(batch),), key) + num_samples


def test_mean_error_and_units():
    model = Known()
    result = likelihood_bound(model, DATA, Key(3), num_samples=5, batch_size=3)
    bounds = -PIXELS.flatten(1).double().sum(1) + ops.normal((7,), Key(3)).double() + 5
    assert result.nats == pytest.approx(bounds.mean().item(), rel=1e-6)
    assert result.standard_error == pytest.approx(bounds.std().item() / math.sqrt(7), rel=1e-6)
    assert result.bits_per_dimension == pytest.approx(-bounds.mean().item() / 4 / math.log(2), rel=1e-6)
    assert (result.images, result.num_samples, result.dimensions) == (7, 5, 4)
    # With their conditions, which a bound of p(x | conditions) needs.
    assert model.seen == [part.tolist() for part in LABELS.split(3)]


def test_does_not_depend_on_the_batch_size():
    results = {likelihood_bound(Known(), DATA, Key(3), batch_size=size) for size in (1, 4, 100)}
    assert len(results) == 1


def test_a_bar_is_shown_when_asked_for(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    model = Known()
    plain = likelihood_bound(model, DATA, Key(3), batch_size=3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert likelihood_bound(model, DATA, Key(3), batch_size=3, progress=True) == plain
    assert "7/7" in capsys.readouterr().err


def test_limit():
    assert likelihood_bound(Known(), DATA, Key(3), limit=2).images == 2
    assert likelihood_bound(Known(), DATA, Key(3), limit=100).images == 7
    assert math.isnan(likelihood_bound(Known(), DATA, Key(3), limit=1).standard_error)


def test_every_module_keeps_its_own_mode():
    model = Known().train()
    model.layer[1].eval()
    likelihood_bound(model, DATA, Key(3))
    assert [module.training for module in model.modules()] == [True, True, True, False]


def test_refuses():
    with pytest.raises(TypeError, match="model must have a log_likelihood_bound, and GenerativeModel has none"):
        likelihood_bound(GenerativeModel(ModelConfig(), DATA.spec), DATA, Key(0))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        likelihood_bound(Known(), DATA, Key(0), batch_size=0)
    with pytest.raises(ValueError, match="limit must be at least 1 or None, got 0"):
        likelihood_bound(Known(), DATA, Key(0), limit=0)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ZeroDivisionError("zero"), PluginError, r"model plugin 'zoo' is broken: log_likelihood_bound\(\): ZeroDivisi"),
        # By it a model refuses images that it gives no likelihood to.
        (ValueError("the images are gray"), ValueError, "^the images are gray$"),
    ],
)
def test_a_plugin_whose_bound_fails_is_named(error, expected, message):
    def fail(batch, key, num_samples=1):
        raise error

    model = Known()
    model.log_likelihood_bound, model.plugin_name = fail, "zoo"
    with pytest.raises(expected, match=message) as info:
        likelihood_bound(model, DATA, Key(0))
    assert (info.value.__cause__ or info.value) is error


@pytest.mark.parametrize(("wrong", "shape"), [(torch.zeros(()), r"\(\)"), (torch.zeros(1), r"\(1,\)")])
def test_a_bound_is_one_of_each_image(wrong, shape):
    """A mean over the images would pass for the bound of each."""
    model = Known()
    model.log_likelihood_bound, model.plugin_name = lambda batch, key, num_samples=1: wrong, "zoo"
    with pytest.raises(PluginError, match=rf"model plugin 'zoo' is broken: .*must be of shape \(7,\), got {shape}"):
        likelihood_bound(model, DATA, Key(0))


def test_processes_share_the_images():
    """Each measures its own rows, with the noise that they have in one process."""
    whole, found, models = likelihood_bound(Known(), DATA, Key(3)), [], [Known() for _ in range(3)]

    class Part(Processes):
        def gathered(self, values):
            found.append(values)
            return [values]

    for rank, model in enumerate(models):
        likelihood_bound(model, DATA, Key(3), batch_size=2, processes=Part(rank, 3))
    assert [sum(map(len, model.seen)) for model in models] == [2, 2, 3]
    assert torch.cat(found).mean().item() == pytest.approx(whole.nats, rel=1e-12)
    assert torch.cat(found).std().item() / math.sqrt(7) == pytest.approx(whole.standard_error, rel=1e-12)
