"""Training and loading from Python, by names and settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train.comparing import assert_same, assert_same_runs, weights
from train.toys import LazyBars

from gencore import Key, data
from gencore.config import ConfigError
from gencore.data import MissingSplitError
from gencore.plugins import PluginError
from gencore.train import CheckpointError, TrainingError, checkpoint, load, train
from gencore.train.runs import make_trainer
from gencore.train.settings import Settings, apart

QUICK = {"train.batch_size": 16, "train.average.decay": 0.9}


@pytest.fixture
def quick(environment, tmp_path):
    """``train()`` into ``tmp_path / name`` with few steps."""

    def quick(name="run", model="toy", *, settings=None, **arguments):
        arguments = {"data": "bars", "steps": 3, "progress": False, **arguments}
        return train(model, out=tmp_path / name, settings={**QUICK, **(settings or {})}, **arguments)

    return quick


def test_a_model_is_trained_and_loaded(quick, tmp_path):
    model = quick(settings={"hidden": 8})
    assert not model.training
    assert model.config.hidden == 8
    averaged, loaded = load(str(tmp_path / "run")), load(tmp_path / "run", ema=False)
    assert_same(averaged.state_dict(), model.state_dict())
    assert torch.equal(averaged.sample(4, Key(0)), model.sample(4, Key(0)))
    assert_same(averaged.state_dict(), checkpoint.read(tmp_path / "run").weights(ema=True))
    assert not torch.equal(averaged.critic.weight, loaded.critic.weight)
    run = checkpoint.read_run(tmp_path / "run")
    assert (run.model, run.data, run.images, run.train["steps"]) == ("toy", "bars", 60, 3)


def test_a_run_goes_on_with_its_own_data(quick, tmp_path):
    quick()
    quick(data=None, resume=True, steps=5)
    assert checkpoint.read(tmp_path / "run").step == 5
    quick("tuned", data=None, start=tmp_path / "run")
    assert checkpoint.read_run(tmp_path / "tuned").data == "bars"


def test_settings_may_be_nested_values_or_texts(quick, tmp_path):
    quick("a", settings={"hidden": 8, "lr": 0.5, "train": {"clip": 1.0}, "train.seed": 3})
    quick("b", settings={"hidden": "8", "lr": "5e-1", "train.clip": "1", "train": {"seed": "3"}})
    assert checkpoint.read_run(tmp_path / "a") == checkpoint.read_run(tmp_path / "b")
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_a_run_goes_on(quick, tmp_path):
    quick("whole", steps=6)
    quick("parts", steps=4, settings={"hidden": 16})
    with pytest.raises(TrainingError, match="already holds a run"):
        quick("parts", steps=6)
    # With the settings of the run, which need not be given again.
    train("toy", out=tmp_path / "parts", data="bars", steps=6, resume=True, progress=False)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    with pytest.raises(CheckpointError, match="hidden: the run has 16, asked for is 4"):
        quick("parts", steps=6, settings={"hidden": 4}, resume=True)


def test_resuming_nothing_begins(quick, tmp_path):
    quick("whole")
    quick("run", resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "run")


def test_a_run_begins_with_the_weights_of_another(quick, tmp_path):
    quick("first", settings={"hidden": 8})
    before = checkpoint.read(tmp_path / "first").weights()
    made = make_trainer("toy", None, tmp_path / "second", apart(QUICK), start=checkpoint.read(tmp_path / "first"))
    made.begin()
    assert_same(made.model.state_dict(), before)
    assert made.run.config["hidden"] == 8
    model = quick("second", start=tmp_path / "first")
    assert not torch.equal(model.critic.weight, before["critic.weight"])
    assert checkpoint.read_run(tmp_path / "second").start == str(checkpoint.read(tmp_path / "first").directory)
    with pytest.raises(TrainingError, match=r"first.* holds model toy, but the model to train is toy-sampler"):
        quick("third", "toy-sampler", start=tmp_path / "first")


def test_epochs_without_steps(quick, tmp_path):
    quick(steps=None, settings={"train.epochs": 2, "train.batch_size": 30})
    # Two minibatches a step, of the critic.
    assert checkpoint.read(tmp_path / "run").step == 2


def test_the_best_checkpoint_is_loaded_by_its_name(quick, tmp_path):
    quick(settings={"train.validate_every": 1, "train.keep_best": True})
    best = load(tmp_path / "run" / "checkpoints" / "best", ema=False)
    step = checkpoint.best_step(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
    assert_same(best.state_dict(), checkpoint.read(folder).tensors("model"))


def test_models_that_take_conditions(quick, tmp_path):
    quick("pairs", "toy-translator", data="toy-pairs")
    source = data.load("toy-pairs", "test").batch(torch.arange(3)).conditions["source"]
    images = load(tmp_path / "pairs").sample(3, Key(0), {"source": source})
    assert images.shape == (3, 1, 4, 4)
    quick("texts", "toy-captions", data="toy-texts")
    assert load(tmp_path / "texts").sample(2, Key(0), {"text": ["row 1", ""]}).shape == (2, 1, 4, 4)


def test_a_run_of_a_model_without_phases(quick, tmp_path):
    trained = quick(model="toy-mean")
    assert_same(load(tmp_path / "run").state_dict(), trained.state_dict())
    assert checkpoint.read(tmp_path / "run").step == 0


def test_lazily_read_data(quick, tmp_path):
    quick("lazy", "toy-phases", data="lazy-bars", settings={"train.workers": 1})
    quick("plain", "toy-phases", data="lazy-bars", settings={"train.workers": 0})
    assert_same_runs(tmp_path / "lazy", tmp_path / "plain")
    assert checkpoint.read_run(tmp_path / "lazy").fingerprint == LazyBars().fingerprint


def test_all_faults_are_told_at_once(quick, tmp_path):
    with pytest.raises(ConfigError) as caught:
        quick(settings={"hiden": 3, "lr": -1, "train": {"batch_sise": 4}, "train.precision": "half"})
    faults = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 4
    for part in (
        "hiden: is not a setting; did you mean hidden",
        "lr: must be > 0",
        "train.batch_sise: is not a setting; did you mean train.batch_size",
    ):
        assert part in faults
    assert "train.precision: must be one of" in faults
    with pytest.raises(ConfigError, match=r"data\.size: is not a setting; data set bars has none"):
        quick(settings={"data.size": 3})
    assert not (tmp_path / "run").exists()


def test_names_that_are_none(quick, tmp_path):
    with pytest.raises(PluginError, match="'toyy'; did you mean toy"):
        quick(model="toyy")
    with pytest.raises(PluginError, match="'barz'; did you mean bars"):
        quick(data="barz")
    with pytest.raises(TrainingError, match="give the model to train, one of "):
        make_trainer(None, "bars", tmp_path / "run", Settings({}, {}, {}))
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        quick(start=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_validation_needs_a_test_split(environment, tmp_path):
    def read(name, split, settings):
        if split == "test":
            raise MissingSplitError("bars: there is no test split")
        return data.load(name, split, settings)

    with pytest.raises(TrainingError, match=r"train\.validate_every needs test images: bars: there is no test split"):
        make_trainer("toy", "bars", tmp_path / "run", apart({"train.validate_every": 1}), read=read)
    # Without it, that split is not asked for.
    make_trainer("toy", "bars", tmp_path / "run", apart({}), read=read)


def test_data_and_settings_are_those_of_the_run(quick, tmp_path):
    quick(settings={"hidden": 8})
    saved = checkpoint.read_run(tmp_path / "run")
    made = make_trainer(None, None, tmp_path / "run", apart({"train.steps": 5}), saved=saved)
    assert (made.run.data, made.run.config["hidden"], made.config.steps) == ("bars", 8, 5)
    assert made.config.average.decay == 0.9
    # Epochs that are asked for count, though the run had steps.
    made = make_trainer(None, None, tmp_path / "run", apart({"train.epochs": 2}), saved=saved)
    assert made.config.steps is None


def test_a_preset_is_trained_with_its_defaults(environment, tmp_path):
    train("beta-vae", out=tmp_path / "run", steps=1, settings={"train.batch_size": 4}, progress=False)
    run = checkpoint.read_run(tmp_path / "run")
    assert (run.model, run.data) == ("beta-vae", "digits")
    loaded = load(tmp_path / "run")
    assert loaded.plugin_name == "beta-vae"
    assert loaded.config.beta != type(loaded.config)().beta
    assert Path(tmp_path / "run" / "metrics.jsonl").exists()
