"""The settings of the diffusion model: which sampler a name gives, and every fault."""

import pytest
import torch

from gencore import Key, ops
from gencore.config import ConfigError
from gencore.models import SamplingConfig, Step
from gencore.models.diffusion import DDPM, DDPMConfig, Sampling, plugin
from gencore.models.diffusion.model import _make_sampler
from gencore.plugins import build_model
from gencore.spec import Batch, Condition, DataSpec

SPEC = DataSpec((1, 8, 8))
CLASSES = DataSpec((1, 8, 8), (Condition("label", "class", ("a", "b")),))
SAMPLERS = ["ddpm", "ddim", "dpm_solver", "dpm_solver_sde", "euler", "euler_ancestral", "heun"]


def build(**settings):
    torch.manual_seed(0)
    return DDPM(DDPMConfig(channels=(8, 16), num_groups=4, **settings), SPEC)


def sampler_of(model, **settings):
    return _make_sampler(model.config, model.schedule, Sampling(**settings))


def test_samplers_by_name():
    model = build(timesteps=60)
    for name in SAMPLERS:
        # Heun's method calls the network twice a step, but for the last.
        assert len(sampler_of(model, sampler=name)) == {"ddpm": 60, "heun": 99}.get(name, 50), name
    churned, plain = (sampler_of(model, sampler="heun", steps=3, churn=churn).rows for churn in (1.0, 0.0))
    assert not torch.equal(churned, plain)


OWN = {"sampler": "ddim", "steps": 2}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_and_edit_take_the_sampler_of_the_call(name):
    """It calls the network as often as that sampler does, and leaves the model's own settings alone."""
    model, calls = build(timesteps=60, sampling=Sampling(**OWN)), []
    model.unet.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[1][0].item()))
    sampling = Sampling(sampler=name, steps=4)
    expected, own = (sampler_of(model, **settings).times for settings in ({"sampler": name, "steps": 4}, OWN))
    for make in (
        lambda **options: model.sample(1, Key(0), **options),
        lambda **options: model.edit(torch.zeros(1, 1, 8, 8), torch.zeros(1), Key(0), **options),
    ):
        for options, times in (({"sampling": sampling}, expected), ({}, own)):
            calls.clear()
            make(**options)
            assert calls == pytest.approx(times.tolist())
    assert model.sampling == model.config.sampling == Sampling(**OWN)


def test_dpm_solver_sde_adds_noise_and_the_other_does_not():
    model = build()
    noise = ops.STEP_COLUMNS.index("noise")
    for name, adds in (("dpm_solver", False), ("dpm_solver_sde", True), ("ddim", False)):
        assert bool((sampler_of(model, sampler=name, steps=5).rows[:, noise] != 0).any()) == adds
    assert bool((sampler_of(model, sampler="ddim", steps=5, eta=1.0).rows[:, noise] != 0).any())


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"sampler": "ddim", "steps": 1001}, "steps: must be <= 1000, the timesteps of the training, was 1001"),
        ({"eta": 0.5}, "eta: is for sampler=ddim only, was 0.5 for ddpm"),
        ({"churn": 2.0}, "churn: is for sampler=heun only, was 2.0 for ddpm"),
        ({"guidance_scale": 2.0}, "guidance_scale: must be 1 for a model without classes, was 2"),
        ({"guidance_rescale": 0.5}, "guidance_rescale: must be 0 for a model without classes, was 0.5"),
        ({"threshold": 0.9, "clip": False}, "threshold: must be none without clip"),
        ({"guidance_scale": -1.0}, "guidance_scale: must be >= 0, was -1.0"),
        ({"steps": 0}, "steps: must be >= 1, was 0"),
    ],
)
def test_faults_of_sampling(settings, fault):
    model = build()
    before = model.sampling
    for call in (
        lambda sampling: model.sample(1, Key(0), sampling=sampling),
        lambda sampling: model.edit(torch.zeros(1, 1, 8, 8), torch.zeros(1), Key(0), sampling=sampling),
    ):
        with pytest.raises(ConfigError) as info:
            call(Sampling(**settings))
        assert info.value.faults == [fault]
    assert model.sampling is before


def test_refuses_what_are_no_settings_of_sampling():
    model = build()
    for wrong, name in ((SamplingConfig(), "SamplingConfig"), ({"steps": 3}, "dict"), (DDPMConfig(), "DDPMConfig")):
        with pytest.raises(TypeError, match=f"sampling must be a Sampling, got {name}"):
            model.sample(1, Key(0), sampling=wrong)
        with pytest.raises(TypeError, match=f"sampling must be a Sampling, got {name}"):
            model.edit(torch.zeros(1, 1, 8, 8), torch.zeros(1), Key(0), sampling=wrong)


def test_settings_of_conditions_are_settings():
    names = Sampling.setting_names()
    assert set(Sampling.of_conditions) <= set(names)
    assert [name for name in names if "guidance" in name] == list(Sampling.of_conditions)
    assert SamplingConfig.of_conditions == ()


def test_resamples_are_for_editing():
    model = build(sampling=Sampling(sampler="heun", steps=2, resamples=2))
    assert model.sample(1, Key(0)).shape == (1, 1, 8, 8)
    with pytest.raises(ConfigError) as info:
        model.edit(torch.zeros(1, 1, 8, 8), torch.zeros(1), Key(0))
    assert info.value.faults == ["resamples: must be 1 for sampler=heun, was 2"]
    fitting = Sampling(sampler="ddim", steps=2, resamples=2)
    assert model.edit(torch.zeros(1, 1, 8, 8), torch.zeros(1), Key(0), sampling=fitting).shape == (1, 1, 8, 8)


def test_another_sampler_leaves_behind_what_only_the_first_one_uses():
    base = Sampling(sampler="ddim", steps=5, eta=0.5, resamples=5, guidance_scale=2.0).to_dict()
    assert Sampling.from_settings({"sampler": "dpm_solver"}, base) == Sampling(
        sampler="dpm_solver", steps=5, guidance_scale=2.0
    )
    assert Sampling.from_settings({"sampler": "ddpm"}, base) == Sampling(steps=5, resamples=5, guidance_scale=2.0)
    assert Sampling.from_settings({"sampler": "ddim", "steps": "6"}, base) == Sampling.from_dict({**base, "steps": 6})
    churned = Sampling(sampler="heun", churn=2.0).to_dict()
    assert Sampling.from_settings({"sampler": "euler"}, churned) == Sampling(sampler="euler")
    # Both asked for at once, or the setting alone, is a mistake.
    with pytest.raises(ConfigError, match=r"eta: is for sampler=ddim only, was 0\.5 for euler"):
        Sampling.from_settings({"sampler": "euler", "eta": "0.5"}, base)
    with pytest.raises(ConfigError, match=r"churn: is for sampler=heun only, was 2\.0 for ddim"):
        Sampling.from_settings({"churn": "2"}, base)


def test_heun_takes_the_levels_that_suit_it_by_itself():
    """On the cosine schedule its 50 corrections have coefficients of at most 1 there, and of 9.8 with trailing ones."""
    model = build(schedule="cosine")
    rows = {
        spacing: sampler_of(model, sampler="heun", spacing=spacing).rows for spacing in (None, "karras", "trailing")
    }
    assert torch.equal(rows[None], rows["karras"])
    history = ops.STEP_COLUMNS.index("history0")
    assert rows[None][:, history].abs().max() <= 1
    assert rows["trailing"][:, history].abs().max() > 9
    # All others take the training's steps, from the very last.
    assert sampler_of(model, sampler="dpm_solver", steps=20).times[0] == 999


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"timesteps": 30, "sampling": Sampling(steps=40)},
            "sampling.steps: must be <= 30, the timesteps of the training, was 40",
        ),
        (
            {"sampling": Sampling(guidance_scale=3.0)},
            "sampling.guidance_scale: must be 1 for a model without classes, was 3",
        ),
        ({"channels": ()}, "channels: must not be empty, was ()"),
        ({"channels": (8, 12)}, "channels: must be multiples of num_groups=8, but 12 is not"),
        ({"channels": (9,), "num_groups": 3}, "channels: the first must be even, was 9"),
        ({"channels": (2,), "num_groups": 1}, "channels: the first must be at least 4, was 2"),
        ({"attention_levels": (3,)}, "attention_levels: must be below 3, the number of channels, but 3 is not"),
        ({"attention_levels": (1, 1)}, "attention_levels: must be different, was (1, 1)"),
        ({"num_heads": 3}, "num_heads: must divide the channels at attention, 64, was 3"),
        ({"timesteps": 20}, "timesteps: must be at least 21 for schedule=linear, was 20"),
        ({"label_dropout": 0.0}, "label_dropout: must be > 0, was 0.0"),
    ],
)
def test_faults_of_the_configuration(settings, fault):
    with pytest.raises(ConfigError) as info:
        DDPMConfig(**settings)
    assert info.value.faults == [fault]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"channels": (8,) * 5}, "channels: must be at most 4 for images of 8 pixels, were 5"),
        ({"conditional": True}, "conditional: must be false for images without classes, was true"),
    ],
)
def test_faults_of_a_configuration_with_the_data(settings, fault):
    config = DDPMConfig(**settings)
    assert list(config.faults_with(SPEC)) == [fault]
    with pytest.raises(ConfigError) as info:
        build_model(plugin, config, SPEC)
    assert info.value.faults == [fault]
    texts = DataSpec((1, 8, 8), (Condition("text", "text"),))
    assert list(config.faults_with(texts)) == [fault]
    assert list(config.faults_with(DataSpec((1, 16, 24), CLASSES.conditions))) == []


def test_guidance_is_for_a_model_with_classes():
    config = DDPMConfig(conditional=True, sampling=Sampling(guidance_scale=3.0, guidance_rescale=0.5))
    assert list(config.faults_with(CLASSES)) == []
    assert DDPM(config, CLASSES).takes == {"label": "optional"}


@pytest.mark.parametrize(
    "settings",
    [{"channels": (4,), "num_groups": 2}, {"channels": (8,) * 4}, {"timesteps": 21}, {"attention_levels": (0, 2)}],
)
def test_what_the_configuration_allows_can_be_built(settings):
    model = DDPM(DDPMConfig(**settings), SPEC)
    model.phases()[0].loss(Step(Batch(torch.zeros(2, 1, 8, 8)), Key(0))).value.backward()


def test_config_round_trip():
    config = DDPMConfig.from_settings({"channels": "16,32", "sampling.sampler": "ddim", "sampling.steps": "20"})
    assert config.sampling == Sampling(sampler="ddim", steps=20)
    assert DDPMConfig.from_dict(config.to_dict()) == config
    model = plugin.build(config, SPEC)
    assert model.config == config
    assert model.spec == SPEC
    assert model.sampling == config.sampling
