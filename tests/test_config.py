import dataclasses
import json
import pickle
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gencore.config import Config, ConfigError, Setting, field, merged
from gencore.models.vae import VAEConfig


@dataclass(frozen=True)
class Optimizer(Config):
    lr: float = field(1e-3, gt=0, lt=10, doc="step size")
    betas: tuple[float, float] = field((0.9, 0.999), ge=0, lt=1)
    clip: float | None = field(None, gt=0)


@dataclass(frozen=True)
class Model(Config):
    network: Literal["mlp", "conv"] = field("mlp")
    hidden: tuple[int, ...] = field((512, 256), ge=1)
    latent_size: int = field(20, ge=1, le=4096, doc="dimension of z")
    bias: bool = field(True)
    note: str = field("")
    seed: Optional[int] = field(None)  # noqa: UP045 the older spelling must work as well
    optimizer: Optimizer = dataclasses.field(default_factory=lambda: Optimizer(lr=2e-4))

    def check(self):
        if self.network == "conv" and not self.hidden:
            yield "hidden: must not be empty for network='conv', was ()"


@dataclass(frozen=True)
class Required(Config):
    size: int = field(ge=1)
    other: int = field(3)


def faults_of(call):
    with pytest.raises(ConfigError) as info:
        call()
    assert isinstance(info.value, ValueError)
    for fault in info.value.faults:
        assert f"\n  {fault}" in str(info.value)
    return info.value.faults


def test_defaults_are_checked_and_kept():
    assert Model().latent_size == 20
    assert Model() == Model(optimizer=Optimizer(lr=2e-4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Model().latent_size = 3


def test_all_faults_at_once():
    faults = faults_of(lambda: Model(network="rnn", hidden=(4, 0, 2.5), latent_size=5000, bias=1, note=3))
    assert faults == [
        "network: must be one of 'mlp', 'conv', was 'rnn'",
        "hidden[1]: must be >= 1, was 0",
        "hidden[2]: must be an integer, was 2.5",
        "latent_size: must be <= 4096, was 5000",
        "bias: must be true or false, was 1",
        "note: must be a string, was 3",
    ]


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: Model(latent_size=True), "latent_size: must be an integer, was True"),
        (lambda: Model(latent_size=2.0), "latent_size: must be an integer, was 2.0"),
        (lambda: Model(seed="x"), "seed: must be an integer or none, was 'x'"),
        (lambda: Model(optimizer=3), "optimizer: must be the settings of Optimizer, was 3"),
        (lambda: Model(hidden=3), "hidden: must be a tuple, each item an integer, was 3"),
        (lambda: Model(hidden="12"), "hidden: must be a tuple, each item an integer, was '12'"),
        (lambda: Optimizer(lr=True), "lr: must be a number, was True"),
        (lambda: Optimizer(lr=float("nan")), "lr: must be finite, was nan"),
        (lambda: Optimizer(lr=float("inf")), "lr: must be finite, was inf"),
        (lambda: Optimizer(lr=10**400), "lr: must be finite, was inf"),
        (lambda: Optimizer(lr=10), "lr: must be < 10, was 10.0"),
        (lambda: Optimizer(clip=0), "clip: must be > 0, was 0.0"),
        (lambda: Optimizer(betas=(0.9,)), "betas: must be a tuple of 2: a number, a number, was (0.9,)"),
        (lambda: Model(network="conv", hidden=()), "hidden: must not be empty for network='conv', was ()"),
    ],
)
def test_each_fault_says_what_it_must_be_and_was(make, fault):
    assert faults_of(make) == [fault]


def test_literal_tells_true_from_one():
    @dataclass(frozen=True)
    class Choice(Config):
        level: int = field(1)

    Choice.__annotations__["level"] = Literal[1, 2]
    assert Choice(level=2).level == 2
    assert faults_of(lambda: Choice(level=True)) == ["level: must be one of 1, 2, was True"]


def test_int_becomes_float_and_list_becomes_tuple():
    config = Model(hidden=[3, 4], optimizer=Optimizer(lr=1))
    assert config.hidden == (3, 4)
    assert type(config.optimizer.lr) is float
    assert hash(config) == hash(Model(hidden=(3, 4), optimizer=Optimizer(lr=1.0)))


def test_numbers_of_numpy_become_pythons():
    model = Model(
        hidden=(np.int64(8), 4), latent_size=np.uint8(3), seed=np.array(5),
        optimizer=Optimizer(lr=np.float32(0.5), betas=(np.int32(0), np.float64(0.5)), clip=np.float16(2)),
    )  # fmt: skip
    wanted = Model(hidden=(8, 4), latent_size=3, seed=5, optimizer=Optimizer(lr=0.5, betas=(0.0, 0.5), clip=2.0))
    assert model == wanted
    assert json.dumps(model.to_dict()) == json.dumps(wanted.to_dict())
    with pytest.raises(ConfigError, match="latent_size: must be >= 1, was 0"):
        Model(latent_size=np.int64(0))
    with pytest.raises(ConfigError, match="latent_size: must be an integer, was"):
        Model(latent_size=np.True_)
    with pytest.raises(ConfigError, match="lr: must be finite, was nan"):
        Optimizer(lr=np.float32("nan"))


def test_from_dict_reports_unknown_keys_and_every_fault():
    values = {"latentsize": 3, "hidden": [0], "optimizer": {"lr": -1, "beta": 2}, "xyzzy": 1}
    faults = faults_of(lambda: Model.from_dict(values))
    assert faults[0] == "latentsize: is not a setting; did you mean latent_size?"
    assert faults[1].startswith("xyzzy: is not a setting; there are network, hidden, ")
    assert faults[2:] == [
        "hidden[0]: must be >= 1, was 0",
        "optimizer.beta: is not a setting; did you mean betas?",
        "optimizer.lr: must be > 0, was -1.0",
    ]


def test_from_dict_reports_cross_checks_beside_unknown_keys():
    faults = faults_of(lambda: Model.from_dict({"network": "conv", "hidden": [], "hiden": 1}))
    assert faults == [
        "hiden: is not a setting; did you mean hidden?",
        "hidden: must not be empty for network='conv', was ()",
    ]


def test_required_fields():
    assert Required.from_dict({"size": 2}) == Required(2)
    assert faults_of(lambda: Required.from_dict({"other": "x"})) == [
        "size: must be given",
        "other: must be an integer, was 'x'",
    ]


def test_nested_settings_left_out_keep_the_default_of_their_field():
    config = Model.from_dict({"optimizer": {"clip": 2}})
    assert config.optimizer == Optimizer(lr=2e-4, clip=2.0)


def test_from_settings():
    config = Model.from_settings(
        {
            "hidden": "256, 128",
            "bias": "False",
            "seed": "7",
            "note": "a=b,c",
            "network": "conv",
            "optimizer.lr": "1e-3",
            "optimizer.betas": "(0.5,0.9)",
            "optimizer.clip": "none",
        },
        base={"latent_size": 4, "optimizer": {"clip": 1.0}},
    )
    assert config == Model("conv", (256, 128), 4, False, "a=b,c", 7, Optimizer(1e-3, (0.5, 0.9), None))
    assert Model.from_settings({"seed": "None", "hidden": ""}) == Model(hidden=())
    assert Model.from_settings({"hidden": "3"}).hidden == (3,)
    assert Model.from_settings({"optimizer.clip": "1"}).optimizer == Optimizer(lr=2e-4, clip=1.0)


def test_from_settings_leaves_base_alone():
    base = {"optimizer": {"lr": 0.1}}
    Model.from_settings({"optimizer.lr": "0.2"}, base)
    assert base == {"optimizer": {"lr": 0.1}}


def test_from_settings_reports_every_fault():
    settings = {
        "latent_size": "many",
        "hidden": "3,x",
        "bias": "maybe",
        "network": "rnn",
        "optimizer": "adam",
        "optimizer.beta": "1",
        "note.x": "1",
        "latent": "3",
        "optimizer.lr": "-1",
    }
    assert faults_of(lambda: Model.from_settings(settings)) == [
        "latent_size: must be an integer, was 'many'",
        "hidden: must be a tuple, each item an integer, was '3,x'",
        "bias: must be true or false, was 'maybe'",
        "network: must be one of 'mlp', 'conv', was 'rnn'",
        "optimizer: is a group of settings, set one of optimizer.lr, optimizer.betas, optimizer.clip",
        "optimizer.beta: is not a setting; did you mean optimizer.betas?",
        "note.x: note is no group of settings",
        "latent: is not a setting; did you mean latent_size?",
        "optimizer.lr: must be > 0, was -1.0",
    ]


def test_names_are_suggested_whatever_their_case():
    assert faults_of(lambda: Model.from_settings({"LATENT": "3"})) == [
        "LATENT: is not a setting; did you mean latent_size?"
    ]


def test_the_settings_that_there_are_are_named():
    assert faults_of(lambda: Required.from_settings({"xyzzy": "3", "size": "1"})) == [
        "xyzzy: is not a setting; there are size, other"
    ]
    assert faults_of(lambda: VAEConfig.from_settings({"xyzzy": "3"}))[0].startswith(
        "xyzzy: is not a setting; there are network, hidden_sizes, latent_size, "
    )
    assert Model.setting_names() == [
        "network", "hidden", "latent_size", "bias", "note", "seed", "optimizer.lr", "optimizer.betas", "optimizer.clip",
    ]  # fmt: skip


def test_settings_that_are_no_strings_are_taken_as_they_are():
    config = Model.from_settings(
        {"hidden": [3, 4], "bias": False, "seed": None, "optimizer.lr": 1, "optimizer.clip": np.float32(0.5)}
    )
    assert config == Model(hidden=(3, 4), bias=False, optimizer=Optimizer(lr=1.0, clip=0.5))
    assert faults_of(lambda: Model.from_settings({"latent_size": 2.5, "bias": 1, "optimizer": 3})) == [
        "optimizer: is a group of settings, set one of optimizer.lr, optimizer.betas, optimizer.clip",
        "latent_size: must be an integer, was 2.5",
        "bias: must be true or false, was 1",
    ]


def test_a_mapping_names_the_settings_of_a_group():
    assert Model.from_settings({"optimizer": {"clip": "2", "betas": (0, 0.5)}}) == Model(
        optimizer=Optimizer(lr=2e-4, betas=(0.0, 0.5), clip=2.0)
    )
    base = {"optimizer": {"lr": 0.1, "clip": 1.0}}
    assert Model.from_settings({"optimizer": {"clip": "none"}}, base).optimizer == Optimizer(lr=0.1)
    assert base == {"optimizer": {"lr": 0.1, "clip": 1.0}}
    assert faults_of(lambda: Model.from_settings({"optimizer": {"lrr": 1, "lr": "x"}})) == [
        "optimizer.lrr: is not a setting; did you mean optimizer.lr?",
        "optimizer.lr: must be a number, was 'x'",
    ]


def test_faults_bear_the_prefix():
    assert faults_of(lambda: Model.from_settings({"latent": "3", "bias": "x", "seed": 0.5}, prefix="model.")) == [
        "model.latent: is not a setting; did you mean model.latent_size?",
        "model.bias: must be true or false, was 'x'",
        "model.seed: must be an integer or none, was 0.5",
    ]


def test_a_name_of_another_group_may_have_been_meant():
    """Such as one of the trainer's among those of the model: only the caller knows them."""
    known = ["latent_size", "optimizer.lr", "train.batch_size", "train.steps"]
    for name, meant in (
        ("batchsize", "train.batch_size"),
        ("num_steps", "train.steps"),
        ("learning_rate", "optimizer.lr"),
        ("Latent", "latent_size"),
    ):
        assert faults_of(lambda name=name: Model.from_settings({name: "3"}, known=known)) == [
            f"{name}: is not a setting; did you mean {meant}?"
        ]


@dataclass(frozen=True)
class Averaged(Config):
    """With a group that there may be or not."""

    average: Optimizer | None = field(None, doc="none: no average")
    steps: int = field(3)


def test_a_group_that_may_be_none():
    assert Averaged.from_settings({"average.lr": "0.5"}) == Averaged(Optimizer(lr=0.5))
    assert Averaged.from_settings({"average": {"clip": 2}}, {"average": {"lr": 0.5}}) == Averaged(
        Optimizer(0.5, clip=2)
    )
    assert Averaged.from_settings({"average": "none"}, {"average": {"lr": 0.5}}) == Averaged()
    assert Averaged.from_settings({"average": None}, {"average": {"lr": 0.5}}) == Averaged()
    # From a base without it, setting by setting.
    assert Averaged.from_settings({"average.lr": "0.5", "average.clip": "1"}, {"average": None}) == Averaged(
        Optimizer(0.5, clip=1.0)
    )
    assert faults_of(lambda: Averaged.from_settings({"average": "yes"})) == [
        "average: is a group of settings, set one of average.lr, average.betas, average.clip"
    ]
    assert faults_of(lambda: Averaged.from_dict({"average": {"lr": 0}})) == ["average.lr: must be > 0, was 0.0"]
    assert Averaged.from_dict(Averaged(Optimizer()).to_dict()) == Averaged(Optimizer())
    settings = {setting.name: setting for setting in Averaged.describe()}
    assert (settings["average"].default, settings["average"].doc) == (None, "none: no average")
    assert settings["average.lr"] == Setting("average.lr", "a number", 1e-3, "step size")


def test_merging_leaves_both_alone():
    base, over = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "e": {"f": 6}, "d": {"g": 7}}
    result = merged(base, over)
    assert result == {"a": {"b": 5, "c": 2}, "d": {"g": 7}, "e": {"f": 6}}
    result["a"]["b"] = result["e"]["f"] = 0
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}
    assert over == {"a": {"b": 5}, "e": {"f": 6}, "d": {"g": 7}}
    # What is no group stands in place of one.
    assert merged(base, {"a": None}) == {"a": None, "d": 3}


finite = st.floats(1e-6, 9.0)
optimizers = st.builds(
    Optimizer, lr=finite, betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), clip=st.none() | finite
)
models = st.builds(
    Model,
    network=st.sampled_from(["mlp", "conv"]),
    hidden=st.lists(st.integers(1, 99), min_size=1).map(tuple),
    latent_size=st.integers(1, 4096),
    bias=st.booleans(),
    note=st.text(),
    seed=st.none() | st.integers(),
    optimizer=optimizers,
)


@given(models)
def test_round_trip_through_json_is_exact(config):
    again = Model.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert repr(again) == repr(config)


def test_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(ConfigError("Model", ["a: must be b, was c"])))
    assert error.faults == ["a: must be b, was c"]
    assert str(error) == "Model has 1 fault:\n  a: must be b, was c"


def test_describe_lists_nested_settings_with_the_defaults_in_force():
    settings = {setting.name: setting for setting in Model.describe()}
    assert settings["latent_size"] == Setting("latent_size", "an integer", 20, "dimension of z")
    assert settings["optimizer.lr"].default == 2e-4
    assert settings["optimizer.lr"].doc == "step size"
    assert "optimizer" not in settings
