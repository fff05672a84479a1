"""What every model has from its base class, and how a plugin names its settings."""

import copy
import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from gencore import Key
from gencore.config import Config, ConfigError, field
from gencore.models import (
    Adam,
    Draw,
    GenerativeModel,
    Loss,
    ModelConfig,
    ModelPlugin,
    Optimizer,
    Phase,
    SamplingConfig,
    Step,
    freeze,
)
from gencore.models.base import checked_images, is_frozen, parts_of
from gencore.spec import Batch, Condition, DataSpec

SPEC = DataSpec(
    (1, 2, 3),
    (
        Condition("label", "class", ("a", "b", "c")),
        Condition("text", "text"),
        Condition("source", "image", shape=(3, 2, 3)),
    ),
)
LABELS, TEXTS, SOURCES = torch.tensor([0, 2]), ["x", "y"], torch.zeros(2, 3, 2, 3)


@dataclass(frozen=True)
class Settings(ModelConfig):
    size: int = field(3, ge=1)
    optimizer: Adam = dataclasses.field(default_factory=lambda: Adam(lr=1e-2, beta1=0.5))


@dataclass(frozen=True)
class Choice(SamplingConfig):
    of_conditions = ("strength",)

    steps: int = field(4, ge=1)
    strength: float = field(1.0)


class Other(Choice):
    pass


class Model(GenerativeModel):
    """Gives the number of the image; keeps what it was asked for."""

    def __init__(self, config=None, spec=SPEC, **takes):
        super().__init__(config or Settings(), spec)
        self.layer = nn.Linear(1, 1)
        self.takes = takes
        self.draws = []
        self.seen = []

    def generate(self, draw):
        self.draws.append(draw)
        self.seen.append((torch.is_grad_enabled(), [module.training for module in self.modules()]))
        return torch.arange(draw.n).float()[:, None, None, None].expand(-1, *self.spec.image_shape)


class Mute(GenerativeModel):
    pass


def drawn(model, *arguments, **options):
    model.sample(*arguments, **options)
    return model.draws[-1]


def test_keeps_what_it_is_built_with():
    config = Settings(size=4)
    model = Model(config)
    assert model.config is config
    assert model.spec is SPEC
    assert (model.sampling, model.plugin_name, dict(GenerativeModel.takes)) == (None, "", {})


def test_sample_is_generate_in_evaluation_mode_without_gradients():
    model = Model().train()
    model.layer.eval()
    images = model.sample(2, Key(0))
    assert images.shape == (2, 1, 2, 3)
    assert model.seen == [(False, [False, False])]
    # Every module has its own mode again.
    assert (model.training, model.layer.training) == (True, False)
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error():
    def fail(draw):
        raise ZeroDivisionError

    model = Model().train()
    model.generate = fail
    with pytest.raises(ZeroDivisionError):
        model.sample(2, Key(0))
    assert model.training
    assert model.layer.training


def test_what_generate_is_given():
    model, key = Model(), Key(3)
    draw = drawn(model, 2, key)
    assert draw == Draw(2, key)
    assert (draw.conditions, draw.sampling, draw.progress, draw.check_finite) == ({}, None, False, False)
    draw = drawn(model, np.int64(2), key, progress=True, check_finite=True)
    assert (draw.n, draw.progress, draw.check_finite) == (2, True, True)
    assert type(draw.n) is int
    assert model.sample(0, key).shape == (0, 1, 2, 3)


def test_sampling_is_the_models_own_or_what_is_asked_for():
    model = Model()
    model.sampling = Choice()
    assert drawn(model, 1, Key(0)).sampling is model.sampling
    asked = Choice(steps=7)
    assert drawn(model, 1, Key(0), sampling=asked).sampling is asked
    assert drawn(model, 1, Key(0)).sampling == Choice(), "the next call has the model's own again"


@pytest.mark.parametrize(
    ("own", "asked", "message"),
    [
        (None, Choice(), "sampling must be None, got Choice"),
        (Choice(), SamplingConfig(), "sampling must be a Choice, got SamplingConfig"),
        (Choice(), Other(), "sampling must be a Choice, got Other"),
        (Choice(), {"steps": 3}, "sampling must be a Choice, got dict"),
    ],
)
def test_refuses_settings_of_another_kind(own, asked, message):
    model = Model()
    model.sampling = own
    with pytest.raises(TypeError) as info:
        model.sample(1, Key(0), sampling=asked)
    assert str(info.value) == message
    assert model.draws == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2.0, Key(0)), TypeError, "n must be an int, got float"),
        ((True, Key(0)), TypeError, "n must be an int, got bool"),
        ((-1, Key(0)), ValueError, "n must be at least 0, got -1"),
        ((2, 0), TypeError, "key must be a gencore.Key, got int; gencore.Key(seed) makes one"),
        ((2, None), TypeError, "key must be a gencore.Key, got NoneType; gencore.Key(seed) makes one"),
    ],
)
def test_refuses_what_is_no_number_or_key(arguments, error, message):
    with pytest.raises(error) as info:
        Model().sample(*arguments)
    assert str(info.value) == message


def test_conditions_that_are_taken():
    model = Model(label="optional", text="required", source="optional")
    given = {"label": LABELS, "text": TEXTS, "source": SOURCES}
    conditions = drawn(model, 2, Key(0), given).conditions
    assert torch.equal(conditions["label"], LABELS)
    assert conditions["text"] == ("x", "y")
    assert torch.equal(conditions["source"], SOURCES)
    # What is optional may be missing, and is not there then.
    assert drawn(model, 2, Key(0), {"text": TEXTS}).conditions == {"text": ("x", "y")}
    none = torch.tensor([-1, 1])
    assert torch.equal(drawn(model, 2, Key(0), {"text": TEXTS, "label": none}).conditions["label"], none)
    empty = drawn(model, 0, Key(0), {"text": [], "label": torch.zeros(0, dtype=torch.int64)}).conditions
    assert (empty["text"], len(empty["label"])) == ((), 0)


def test_conditions_are_brought_to_the_models_device():
    model = Model(label="optional", text="optional", source="optional").to("meta")
    conditions = drawn(model, 2, Key(0), {"label": LABELS, "text": TEXTS, "source": SOURCES}).conditions
    assert conditions["label"].device.type == conditions["source"].device.type == "meta"
    assert conditions["text"] == ("x", "y")


OPTIONAL = {"label": "optional"}
REQUIRED = {"label": "required"}


@pytest.mark.parametrize(
    ("takes", "conditions", "error", "message"),
    [
        ({}, {"label": LABELS}, ValueError, "conditions must not hold 'label': this model takes none"),
        (OPTIONAL, {"text": TEXTS}, ValueError, "conditions must not hold 'text': this model takes label alone"),
        (
            {"label": "optional", "text": "optional"},
            {"labels": LABELS},
            ValueError,
            "conditions must not hold 'labels': this model takes label and text alone",
        ),
        (REQUIRED, {}, ValueError, "conditions must hold 'label' (classes): this model needs it"),
        ({"text": "required"}, {}, ValueError, "conditions must hold 'text' (strings): this model needs it"),
        ({"source": "required"}, {}, ValueError, "conditions must hold 'source' (images): this model needs it"),
        (OPTIONAL, {"label": [0, 1]}, TypeError, "conditions['label'] must be a tensor, got list"),
        (OPTIONAL, {"label": None}, TypeError, "conditions['label'] must be a tensor, got NoneType"),
        (OPTIONAL, {"label": LABELS.int()}, TypeError, "conditions['label'] must be int64, got torch.int32"),
        (OPTIONAL, {"label": LABELS[:1]}, ValueError, "conditions['label'] must be of shape (2,), got (1,)"),
        (OPTIONAL, {"label": LABELS[:, None]}, ValueError, "conditions['label'] must be of shape (2,), got (2, 1)"),
        (
            OPTIONAL,
            {"label": torch.tensor([-2, 0])},
            ValueError,
            "conditions['label'] must be from 0 to 2, or -1 for no class, got -2 to 0",
        ),
        (
            OPTIONAL,
            {"label": torch.tensor([-1, 3])},
            ValueError,
            "conditions['label'] must be from 0 to 2, or -1 for no class, got -1 to 3",
        ),
        # Who needs a class has no use for none.
        (
            REQUIRED,
            {"label": torch.tensor([-1, 2])},
            ValueError,
            "conditions['label'] must be from 0 to 2, got -1 to 2",
        ),
        ({"text": "optional"}, {"text": "xy"}, TypeError, "conditions['text'] must be a sequence of strings, got str"),
        (
            {"text": "optional"},
            {"text": ["x", 1]},
            TypeError,
            "conditions['text'] must be a sequence of strings, got list",
        ),
        (
            {"text": "optional"},
            {"text": LABELS},
            TypeError,
            "conditions['text'] must be a sequence of strings, got Tensor",
        ),
        ({"text": "optional"}, {"text": ["x"]}, ValueError, "conditions['text'] must hold 2 strings, got 1"),
        ({"source": "optional"}, {"source": [SOURCES]}, TypeError, "conditions['source'] must be a tensor, got list"),
        (
            {"source": "optional"},
            {"source": SOURCES.byte()},
            TypeError,
            "conditions['source'] must be of a floating dtype, got torch.uint8",
        ),
        (
            {"source": "optional"},
            {"source": SOURCES[:, :1]},
            ValueError,
            "conditions['source'] must be of shape (2, 3, 2, 3), got (2, 1, 2, 3)",
        ),
    ],
)
def test_conditions_that_are_refused(takes, conditions, error, message):
    model = Model(**takes)
    with pytest.raises(error) as info:
        model.sample(2, Key(0), conditions)
    assert str(info.value) == message
    assert model.draws == []


class Editor(Model):
    """Fills with the number of the sample, and keeps what it was asked."""

    def fill(self, draw, images, known):
        self.asked = (draw, images, known, self.training)
        return torch.full_like(images, 0.5)


def test_what_is_known_stays_and_the_rest_is_the_models():
    model, images = Editor().train(), torch.rand(2, 1, 2, 3)
    known = torch.tensor([[1, 0, 1], [0, 0, 1]])
    edited = model.edit(images, known, Key(3), progress=True)
    assert torch.equal(edited, torch.where(known.bool(), images, 0.5))
    draw, given, mask, training = model.asked
    assert (draw.n, draw.key, draw.progress, draw.check_finite, training) == (2, Key(3), True, False, False)
    assert torch.equal(given, images)
    assert (mask.dtype, mask.tolist()) == (torch.float32, known.tolist())
    assert model.training


@pytest.mark.parametrize(
    ("images", "known", "message"),
    [
        (torch.rand(2, 1, 3, 3), torch.ones(1), r"images must be of shape \(B, 1, 2, 3\), got \(2, 1, 3, 3\)"),
        (torch.rand(2, 1, 2, 3), torch.ones(2), "known must broadcast to the images"),
        (torch.rand(2, 1, 2, 3), torch.full((1,), 0.5), "known must be 1 where an image is kept"),
    ],
)
def test_editing_refuses_other_images_and_masks(images, known, message):
    model = Editor()
    with pytest.raises(ValueError, match=message):
        model.edit(images, known, Key(0))
    assert not hasattr(model, "asked")


def test_a_model_that_cannot_edit_says_so():
    assert Editor().can_edit
    assert not Model().can_edit
    with pytest.raises(NotImplementedError, match="Model cannot edit images"):
        Model().edit(torch.rand(1, 1, 2, 3), torch.ones(1), Key(0))


def test_a_model_that_cannot_generate_says_so():
    mute = Mute(ModelConfig(), SPEC)
    assert not mute.can_sample
    assert Model().can_sample
    with pytest.raises(NotImplementedError, match=r"^Mute cannot generate images$"):
        mute.sample(1, Key(0))
    with pytest.raises(NotImplementedError):
        mute.phases()


def test_where_a_model_lives():
    mute = Mute(ModelConfig(), SPEC)
    assert mute.device == torch.device("cpu")
    mute.register_buffer("mean", torch.zeros(2, device="meta"))
    assert mute.device == torch.device("meta")
    assert Model().to("meta").device == torch.device("meta")


def test_what_is_frozen_is_no_part_of_the_training():
    model, layers = Model(), nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    assert freeze(layers) is layers
    model.layers = layers
    model.train()
    assert (model.training, model.layer.training) == (True, True)
    assert [module.training for module in layers.modules()] == [False] * 3
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "layer.weight",
        "layer.bias",
    ]
    assert is_frozen(layers)
    assert not is_frozen(layers[0])
    assert not is_frozen(model)
    model.eval()
    model.train()
    assert not layers[1].training
    again = copy.deepcopy(model).train()
    assert is_frozen(again.layers)
    assert not again.layers[1].training


def test_what_is_frozen_within_a_module_stays_so():
    """However deep it lies."""
    model = Model()
    model.deep = nn.Sequential(nn.Sequential(freeze(nn.Dropout()), nn.Dropout()))
    model.train()
    assert [module.training for module in model.deep[0]] == [False, True]


def test_a_model_that_is_adopted_is_frozen():
    model, teacher = Model().train(), Model().train()
    teacher.plugin_name = "teacher"
    model.adopt("teacher", teacher)
    assert model.teacher is teacher
    assert parts_of(model) == {"teacher": teacher}
    assert "teacher.layer.weight" in model.state_dict()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not model.train().teacher.training
    # Nor does it train by itself.
    assert not teacher.train().training
    # A model that is a network of another one is no part, and what a part adopted is its own.
    older = Model()
    older.plugin_name = "older"
    teacher.adopt("older", older)
    model.inner, model.layers = Model(), nn.Sequential(Model())
    assert parts_of(model).keys() == {"teacher"}
    assert parts_of(teacher).keys() == {"older"}
    # Its own samples are made in evaluation mode, and it stays in it.
    model.sample(1, Key(0))
    assert not teacher.training


def test_only_the_model_of_a_plugin_is_adopted():
    with pytest.raises(ValueError, match="part must be the model of a plugin, got a Model that was built by itself"):
        Model().adopt("teacher", Model())
    with pytest.raises(TypeError, match="part must be a GenerativeModel, got Linear"):
        Model().adopt("teacher", nn.Linear(2, 2))


def test_start_needs_nothing():
    def no_run(directory):
        raise AssertionError("no run is asked for")

    assert Model().start(no_run, None) is None


def test_what_a_step_and_a_loss_leave_out():
    batch = Batch(torch.zeros(2, 1, 2, 3))
    assert Step(batch, Key(0)) == Step(batch, Key(0), number=0, total=1)
    loss = Loss(torch.zeros(()))
    assert loss.metrics == {}
    with pytest.raises(TypeError):
        loss.metrics["a"] = 1


def test_a_phase_draws_one_minibatch_in_every_step():
    optimizer = Optimizer([nn.Parameter(torch.zeros(1))])
    phase = Phase("fit", print, optimizer)
    assert (phase.repeats, phase.every, phase.batch_of) == (1, 1, None)
    assert Phase("penalty", print, optimizer, every=16, batch_of="fit").optimizer is phase.optimizer
    with pytest.raises(dataclasses.FrozenInstanceError):
        phase.repeats = 2


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (None, TypeError, "it must return a dense tensor, got NoneType"),
        (torch.zeros(2, 1, 2, 3).to_sparse(), TypeError, "it must return a dense tensor, got one of another layout"),
        (torch.zeros(2, 1, 3, 2), ValueError, "it must return images of shape (2, 1, 2, 3), got (2, 1, 3, 2)"),
        (torch.zeros(2, 1, 2, 3).byte(), TypeError, "it must return images of a floating dtype, got torch.uint8"),
    ],
)
def test_images_that_are_none(images, error, message):
    with pytest.raises(error) as info:
        checked_images(images, 2, SPEC)
    assert str(info.value) == message


def test_images_are_float32_without_a_graph():
    images = checked_images(torch.ones(2, 1, 2, 3, dtype=torch.bfloat16, requires_grad=True), 2, SPEC)
    assert images.dtype == torch.float32
    assert not images.requires_grad
    assert (images == 1).all()


# Plugins and their presets.

PLUGIN = ModelPlugin("plain", "toy", Settings, Model, "a toy")


def test_a_plugin_has_the_settings_of_its_config():
    assert PLUGIN.preset_of is None
    assert PLUGIN.config_of({}) == Settings()
    assert PLUGIN.config_of({"size": 5}) == Settings(size=5)
    with pytest.raises(ConfigError) as info:
        PLUGIN.config_of({"size": 0, "siz": 1})
    assert info.value.faults == ["siz: is not a setting; did you mean size?", "size: must be >= 1, was 0"]


def test_a_preset_is_the_plugin_with_other_defaults():
    preset = PLUGIN.preset("quick", "a quick toy", size=8, optimizer={"lr": 0.1})
    assert (preset.name, preset.summary, preset.preset_of) == ("quick", "a quick toy", "plain")
    assert (preset.family, preset.config, preset.build) == (PLUGIN.family, Settings, Model)
    # A group that names some settings leaves the others as the class has them by default.
    assert preset.config_of({}) == Settings(8, Adam(lr=0.1, beta1=0.5))
    # What is asked for comes before both, setting by setting.
    config = preset.config_of({"optimizer": {"beta2": 0.9}})
    assert config == Settings(8, Adam(lr=0.1, beta1=0.5, beta2=0.9))
    assert preset.config_of({"size": 2, "optimizer": {"lr": 1}}) == Settings(2, Adam(lr=1.0, beta1=0.5))
    assert PLUGIN.defaults == {}
    assert PLUGIN.config_of({}) == Settings()


def test_a_preset_of_a_preset():
    quick = PLUGIN.preset("quick", "a quick toy", size=8, optimizer={"lr": 0.1})
    quicker = quick.preset("quicker", "a quicker toy", optimizer={"beta1": 0.0})
    assert quicker.preset_of == "plain"
    assert quicker.config_of({}) == Settings(8, Adam(lr=0.1, beta1=0.0))
    assert quick.config_of({}) == Settings(8, Adam(lr=0.1, beta1=0.5))


def test_a_preset_may_have_a_group_or_none():
    """None for a group of settings, and the settings of one that has no default."""

    @dataclass(frozen=True)
    class Inner(Config):
        a: int = field(1)
        b: int = field(2)

    @dataclass(frozen=True)
    class Outer(ModelConfig):
        inner: Inner | None = field(None)

    # The annotations are strings, and the names are known in this function only.
    Outer.__annotations__["inner"] = Inner | None
    plugin = ModelPlugin("outer", "toy", Outer, Model)
    preset = plugin.preset("inner", "", inner={"a": 3})
    assert preset.config_of({}).inner == Inner(3, 2)
    assert preset.config_of({"inner": {"b": 5}}).inner == Inner(3, 5)
    assert preset.config_of({"inner": None}).inner is None


def test_defaults_of_a_preset_are_not_shared():
    values = {"lr": 0.1}
    preset = PLUGIN.preset("quick", "", optimizer=values)
    values["lr"] = 0.2
    assert preset.config_of({}).optimizer.lr == 0.1
    preset.config_of({"optimizer": {"lr": 0.3}})
    assert preset.config_of({}).optimizer.lr == 0.1
