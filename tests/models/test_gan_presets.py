import dataclasses

import pytest
import torch
from PIL import Image

from gencore import Key, ops
from gencore import train as training
from gencore.config import ConfigError
from gencore.models import Adam, RMSprop, Step
from gencore.models.gan import dcgan, plugin
from gencore.plugins import MODELS, PluginError, build_model
from gencore.spec import Batch, Condition, DataSpec
from gencore.train.errors import TrainingError

PRESETS = ("dcgan", "lsgan", "cgan", "wgan", "wgan-gp", "sngan", "r3gan")
# So small that a step is quick; the architectures are the presets' own.
SMALL = {"generator_channels": [8], "discriminator_channels": [8], "latent_size": 6}
LABELS = Condition("label", "class", tuple("abcdefghij"))


def small(name, spec, seed=0):
    torch.manual_seed(seed)
    preset = MODELS.load(name)
    return build_model(preset, preset.config_of(SMALL), spec).train()


def batch_for(spec, n=8):
    conditions = {"label": torch.arange(n) % 10} if spec.conditions else {}
    return Batch(ops.uniform((n, *spec.image_shape), Key(1)), conditions)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("spec", [DataSpec((1, 28, 28), (LABELS,)), DataSpec((3, 16, 16))], ids=["classes", "plain"])
def test_every_parameter_is_trained_and_all_is_a_function_of_the_key(name, spec):
    if name == "cgan" and not spec.conditions:
        with pytest.raises(ConfigError, match="conditioning: must be none or auto for images of no classes"):
            small(name, spec)
        return
    model, twin = small(name, spec), small(name, spec)
    for phase, other in zip(model.phases(), twin.phases(), strict=True):
        step = Step(batch_for(spec), Key(3), 1, 4)
        if name == "r3gan":
            # Its last convolutions begin as zero, and let no gradient past.
            for each in (model, twin):
                torch.manual_seed(5)
                for parameter in each.parameters():
                    parameter.data.add_(0.05 * torch.randn_like(parameter))
        loss, again = phase.loss(step), other.loss(step)
        assert torch.equal(loss.value, again.value)
        assert loss.value.isfinite()
        gradients = torch.autograd.grad(loss.value, phase.optimizer.parameters)
        assert all(gradient.isfinite().all() for gradient in gradients)
        moved = [gradient.abs().max().item() > 0 for gradient in gradients]
        # Some objectives are of differences of outputs, in which the last bias cancels out.
        cancels = phase.name == "discriminator" and model.config.objective in ("wasserstein", "relativistic")
        assert moved.count(False) == (1 if cancels else 0)
    images = model.sample(3, Key(0))
    assert images.shape == (3, *spec.image_shape)
    assert images.min() >= 0
    assert images.max() <= 1
    assert (model.takes == {"label": "optional"}) == (bool(spec.conditions) and name in ("cgan", "sngan"))


def test_defaults_are_the_papers():
    configs = {name: MODELS.load(name).config_of({}) for name in PRESETS}
    adam = {name: configs[name].generator_optimizer for name in PRESETS if name != "wgan"}
    for config in configs.values():
        assert config.generator_optimizer == config.discriminator_optimizer
    assert {name: (a.lr, a.beta1, a.beta2) for name, a in adam.items()} == {
        **dict.fromkeys(("dcgan", "lsgan", "cgan"), (2e-4, 0.5, 0.999)),
        "wgan-gp": (1e-4, 0.0, 0.9),
        "sngan": (2e-4, 0.0, 0.9),
        "r3gan": (2e-4, 0.0, 0.99),
    }
    assert configs["wgan"].generator_optimizer == RMSprop(lr=5e-5)
    assert isinstance(adam["dcgan"], Adam)
    assert {name: config.discriminator_steps for name, config in configs.items() if config.discriminator_steps > 1} == {
        "wgan": 5, "wgan-gp": 5, "sngan": 5,
    }  # fmt: skip
    penalties = {name: (c.weight_clip, c.gradient_penalty, c.r1, c.r2) for name, c in configs.items()}
    assert penalties == {
        **dict.fromkeys(("dcgan", "lsgan", "cgan", "sngan"), (None, 0.0, 0.0, 0.0)),
        "wgan": (0.01, 0.0, 0.0, 0.0),
        "wgan-gp": (None, 10.0, 0.0, 0.0),
        "r3gan": (None, 0.0, 1.0, 1.0),
    }


def digits(name, out, steps=2, **settings):
    return training.train(
        name, out=out, data="digits", steps=steps, device="cpu", progress=False,
        settings={**SMALL, "train.batch_size": 8, **settings},
    )  # fmt: skip


def test_the_trainers_defaults_of_a_preset_and_what_overrides_them(tmp_path):
    own = {"batch_size": 64, "schedule": "cosine", "schedule_end": 0.25, "average": {"decay": 0.999}}
    assert MODELS.load("r3gan").train == own
    digits("r3gan", tmp_path / "own", **{"train.average.begin": 3})
    run = training.checkpoint.read_run(tmp_path / "own")
    assert run.train["schedule"] == "cosine"
    assert run.train["schedule_end"] == 0.25
    assert run.train["average"] == {"decay": 0.999, "begin": 3, "every": 1}
    digits("r3gan", tmp_path / "other", **{"train.average": None, "train.schedule": "constant"})
    run = training.checkpoint.read_run(tmp_path / "other")
    assert (run.train["schedule"], run.train["average"]) == ("constant", None)
    preset = plugin.preset("a", "", train={"average": {"decay": 0.9}}).preset("b", "", train={"average": {"every": 2}})
    assert preset.train == {"average": {"decay": 0.9, "every": 2}}


def test_wrong_defaults_of_the_trainer_are_the_plugins_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "gencore.plugins.MODELS.load", lambda name: dataclasses.replace(dcgan, train={"stepz": 3, "epochs": 0})
    )
    with pytest.raises(PluginError, match=r"dcgan.* its train is wrong: stepz: .*; epochs: must be >= 1"):
        digits("dcgan", tmp_path)


def test_weights_are_clipped_in_training(tmp_path):
    model = digits("wgan", tmp_path)
    assert max(parameter.abs().max().item() for parameter in model.discriminator.parameters()) <= 0.01 + 1e-9
    assert max(parameter.abs().max().item() for parameter in model.generator.parameters()) > 0.05


@pytest.mark.parametrize("name", ["sngan", "r3gan"])
def test_a_run_goes_on_to_the_same_bits(tmp_path, name):
    """Of what has a state of its own: spectral norm, batch norm, and the augmentation's probability."""
    augmentation = {
        "target": 0.9,
        "probability": 0.5,
        "final": None,
        "images": 100,
        "every": 2,
        "transforms": ("flip", "cutout"),
    }
    settings = {"augmentation": augmentation}
    # Nothing follows the length of the run, which changes here.
    settings |= {"train.schedule": "constant", "penalty_final": 1.0, "discriminator_steps": 1}
    settings |= {"train.average.decay": 0.9}
    whole = digits(name, tmp_path / "whole", steps=5, **settings).state_dict()
    digits(name, tmp_path / "parts", steps=3, **settings)
    parts = training.train(
        name, out=tmp_path / "parts", steps=5, resume=True, device="cpu", progress=False
    ).state_dict()
    assert whole["augmentation.probability"] != 0.5
    for key, tensor in whole.items():
        assert torch.equal(tensor, parts[key]), key
    # What is moving average above is not what goes on.
    files = [training.checkpoint.read(tmp_path / run).tensors("model") for run in ("whole", "parts")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


@pytest.mark.parametrize("name", ["dcgan", "r3gan"])
def test_what_is_not_finite_stops_with_the_step(tmp_path, name):
    rate = {f"{player}_optimizer.lr": 1e30 for player in ("generator", "discriminator")}
    with pytest.raises(TrainingError, match=r"of phase '(discriminator|generator)' is not finite at step \d;"):
        digits(name, tmp_path, steps=9, **rate)


def test_grey_images_in_a_model_of_colors_are_refused_in_one_line(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (10 * i, 255 - 10 * i, 0)).save(tmp_path / "photos" / f"{i}.png")
    settings = {**SMALL, "train.batch_size": 4, "data.size": 8}
    common = {"steps": 1, "device": "cpu", "progress": False}
    training.train("dcgan", out=tmp_path / "color", data=f"images:{tmp_path / 'photos'}", settings=settings, **common)
    told = "color.* holds a model of images with 3 channels, but those of digits have 1"
    with pytest.raises(TrainingError, match=told):
        training.train("dcgan", out=tmp_path / "grey", data="digits", start=tmp_path / "color", **common)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.batch_size": 1}, "train.batch_size: must be at least 2 images for each part of a minibatch"),
        ({"train.accumulate": 8}, "train.batch_size: must be at least 2 images for each part of a minibatch"),
    ],
)
def test_a_minibatch_of_one_image_is_refused_in_one_line(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        digits("dcgan", tmp_path, **settings)
