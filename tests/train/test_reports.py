"""Losses on test images, the best checkpoint, pictures of samples: none of them touches the training."""

from __future__ import annotations

import os

import pytest
import torch
from PIL import Image
from train.comparing import assert_same, assert_same_runs, metrics, stopping, weights

from gencore import data, train
from gencore.data.conditions import conditions_for
from gencore.models.base import GenerativeModel, ModelPlugin, Step
from gencore.plugins import MODELS
from gencore.processes import ALONE
from gencore.train import TrainingError, checkpoint, reports
from gencore.train.log import read_metrics


def losses(run, phase="autoencoder"):
    name = f"validation/{phase}/loss"
    return {record["step"]: record[name] for record in read_metrics(run / "metrics.jsonl") if name in record}


def test_the_figure_does_not_depend_on_the_batch_size(trainer, tmp_path):
    found = {}
    for size in (1, 7, 16, 40, 100):
        made = trainer(tmp_path / "run", batch_size=size, steps=1, validate_every=1)
        made.begin()
        # Weights as after some training, the same for each size.
        trained = weights(tmp_path / "trained") if found else trainer(tmp_path / "trained", steps=8).fit().state_dict()
        made.model.load_state_dict(trained)
        found[size] = made._validated()
    for size in (1, 7, 40, 100):
        assert found[size] == pytest.approx(found[16], rel=1e-5)
    assert found[16].keys() == {"validation/critic/loss", "validation/autoencoder/loss"}


def test_it_is_the_loss_in_evaluation_mode_of_the_test_images(trainer, tmp_path):
    made = trainer(tmp_path / "run", validate_every=1)
    made.begin()
    seen = []
    for runner in made.runners:

        def spy(step, *, loss=runner.phase.loss):
            seen.append((step, [module.training for module in made.model.modules()]))
            return loss(step)

        object.__setattr__(runner.phase, "loss", spy)
    found = made._validated()
    assert all(not any(training) for _, training in seen)
    assert all(module.training for module in made.model.modules())
    images = torch.cat([step.batch.images for step, _ in seen[::2]])
    test = data.load("bars", "test")
    assert torch.equal(images, test.batch(torch.arange(len(test))).images)
    # The phases have different noise.
    assert len({repr(step.key) for step, _ in seen}) == len(seen)
    made.model.eval()
    first = seen[0][0]
    expected = [
        made.model._critic_loss(Step(step.batch, step.key)).value.item() * len(step.batch) for step, _ in seen[::2]
    ]
    assert first.number == first.total - 1 == 11
    assert found["validation/critic/loss"] == pytest.approx(sum(expected) / len(test), rel=1e-6)


def test_it_is_that_of_the_moving_average(trainer, tmp_path):
    made = trainer(tmp_path / "run", validate_every=1, steps=5, average={"decay": 0.9})
    made.fit()
    plain = trainer(tmp_path / "plain", validate_every=1, steps=5)
    plain.begin()
    plain.model.load_state_dict(checkpoint.read(tmp_path / "run").weights(ema=True))
    assert plain._validated() == pytest.approx(made._validated(), rel=1e-6)
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5]
    assert losses(tmp_path / "run")[5] == pytest.approx(made._validated()["validation/autoencoder/loss"])


@pytest.mark.parametrize(
    "settings",
    [
        {"validate_every": 2},
        {"validate_every": 1, "keep_best": True},
        {"sample_every": 5, "samples": 4},
        {"validate_every": 3, "sample_every": 2, "samples": 3, "average": {"decay": 0.9}},
    ],
)
def test_the_training_is_that_of_a_run_that_tells_nothing(trainer, tmp_path, settings):
    plain = {name: value for name, value in settings.items() if name == "average"}
    trainer(tmp_path / "plain", **plain).fit()
    trainer(tmp_path / "telling", **settings).fit()
    for name in ("model", "optimizer", *(["ema"] if plain else [])):
        assert_same(weights(tmp_path / "plain", name), weights(tmp_path / "telling", name))
    told = [
        {k: v for k, v in record.items() if not k.startswith("validation/")}
        for record in metrics(tmp_path / "telling")
        if "autoencoder/loss" in record
    ]
    assert told == metrics(tmp_path / "plain")


def test_the_lines_hold_what_was_due(trainer, tmp_path):
    trainer(tmp_path / "run", validate_every=4, log_every=3, steps=10).fit()
    found = [
        (record["step"], "autoencoder/loss" in record, "validation/autoencoder/loss" in record)
        for record in read_metrics(tmp_path / "run" / "metrics.jsonl")
    ]
    assert found == [
        (3, True, False),
        (4, False, True),
        (6, True, False),
        (8, False, True),
        (9, True, False),
        (10, True, True),
    ]


def test_the_speed_is_told(trainer, tmp_path):
    trainer(tmp_path / "run", steps=6, batch_size=8).fit()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 2
    seconds = 0.0
    for record in records:
        passed = record["seconds"] - seconds
        seconds = record["seconds"]
        # Seconds are rounded to milliseconds.
        assert record["images_per_second"] == pytest.approx(3 * 8 / passed, rel=0.5)
        assert 0 <= record["waiting_for_data"] < 1


def test_waiting_for_data_is_told(trainer, tmp_path, monkeypatch):
    bars = data.load("bars", "train")
    batch, clock = bars.batch, [0.0]

    def slow(indices, key=None):
        clock[0] += 3.0
        return batch(indices, key)

    made = trainer(tmp_path / "run", images=bars, steps=2, log_every=1)
    made.begin()
    monkeypatch.setattr(bars, "batch", slow)
    for runner in made.runners:

        def timed(step, *, loss=runner.loss.loss):
            clock[0] += 1.0
            return loss(step)

        runner.loss.loss = timed
    monkeypatch.setattr(train.trainer.time, "monotonic", lambda: clock[0])
    made.fit()
    # Three minibatches a step: 3 s for each to come, 1 s to compute.
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert record["waiting_for_data"] == pytest.approx(0.75)
        assert record["images_per_second"] == pytest.approx(16 / 12)


def steered(trainer, out, figures, **settings):
    """A trainer whose validation gives these figures, by step."""
    made = trainer(out, validate_every=1, keep_best=True, checkpoint_every=100, steps=len(figures), **settings)
    made._validated = lambda: {"validation/critic/loss": figures[made.step - 1]}
    return made


def steps_of(run):
    return [int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(run)]


def test_the_best_checkpoint_is_kept(trainer, tmp_path):
    run = tmp_path / "run"
    made = steered(trainer, run, [5.0, 3.0, 4.0, 2.0, 6.0, 2.0, 7.0, 8.0], keep=1)
    seen, save = [], made._save

    def follow(is_best=False):
        save(is_best)
        seen.append((made.step, is_best, steps_of(run)))

    made._save = follow
    made.fit()
    # Saved when better than all before, and at the end; the best one is kept beside the newest.
    assert seen == [(1, True, [1]), (2, True, [2]), (4, True, [4]), (8, False, [4, 8])]
    assert os.readlink(run / "checkpoints" / "best") == "step-00000004"
    assert checkpoint.read(run / "checkpoints" / "best").step == 4
    assert checkpoint.read(run).step == 8
    best = train.load(run / "checkpoints" / "best")
    assert_same(best.state_dict(), checkpoint.read(run / "checkpoints" / "step-00000004").tensors("model"))
    assert not torch.equal(best.critic.weight, train.load(run).critic.weight)


def test_a_figure_that_is_no_number_is_never_the_best(trainer, tmp_path):
    steered(trainer, tmp_path / "run", [float("nan"), 3.0, float("nan"), 2.0, float("inf")], keep=1).fit()
    assert checkpoint.best_step(tmp_path / "run") == 4


@pytest.mark.parametrize("figures", [[5.0, 3.0, 4.0, 4.0, 9.0, 2.5], [5.0, 3.0, 4.0, 4.0, 9.0, 3.5]])
def test_a_run_that_goes_on_knows_its_best(trainer, tmp_path, figures):
    run = tmp_path / "run"
    steered(trainer, run, figures[:4], keep=1).fit()
    assert checkpoint.best_step(run) == 2
    resumed = trainer(run, validate_every=1, keep_best=True, checkpoint_every=100, steps=6, keep=1)
    resumed._validated = lambda: {"validation/critic/loss": figures[resumed.step - 1]}
    resumed.fit(resume=True)
    assert checkpoint.best_step(run) == (6 if figures[-1] == 2.5 else 2)
    assert steps_of(run) == ([6] if figures[-1] == 2.5 else [2, 6])


def test_a_mark_that_a_kill_prevented_is_made_up_for(trainer, tmp_path, monkeypatch):
    run = tmp_path / "run"
    figures = [5.0, 3.0, 4.0]

    mark_best = checkpoint.mark_best

    def killed(directory):
        if directory.name == "step-00000002":
            raise KeyboardInterrupt
        mark_best(directory)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "mark_best", killed)
        with pytest.raises(KeyboardInterrupt):
            steered(trainer, run, figures, keep=1).fit()
    # The checkpoint of step 2 is whole, but not marked.
    assert steps_of(run) == [1, 2]
    assert checkpoint.best_step(run) == 1
    steered(trainer, run, figures, keep=1).fit(resume=True)
    assert checkpoint.best_step(run) == 2
    assert steps_of(run) == [2, 3]


def test_the_best_is_the_same_after_an_interruption(trainer, tmp_path):
    settings = {"validate_every": 1, "keep_best": True, "steps": 9, "checkpoint_every": 3}
    trainer(tmp_path / "whole", **settings).fit()
    for stop_after in (2, 5, 7):
        with pytest.raises(KeyboardInterrupt):
            stopping(trainer(tmp_path / "parts", **settings), stop_after).fit(resume=True)
    trainer(tmp_path / "parts", **settings).fit(resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    assert checkpoint.best_step(tmp_path / "whole") == checkpoint.best_step(tmp_path / "parts")
    figures = losses(tmp_path / "whole", "critic")
    assert checkpoint.best_step(tmp_path / "whole") == min(figures, key=figures.__getitem__)


def test_what_comes_before_the_best_was_kept_does_not_count(trainer, tmp_path):
    # Steps 1 and 2 had lower losses, but no checkpoint of theirs is there.
    run = tmp_path / "run"
    figures = [1.0, 1.0, 4.0, 3.0]
    first = trainer(run, validate_every=1, checkpoint_every=3, steps=3)
    first._validated = lambda: {"validation/critic/loss": figures[first.step - 1]}
    first.fit()
    steered(trainer, run, figures, keep=1).fit(resume=True)
    assert checkpoint.best_step(run) == 4


def test_validation_needs_test_images(trainer, tmp_path):
    made = trainer(tmp_path / "run")
    with pytest.raises(TrainingError, match=r"train\.validate_every needs test images, and the data set has none"):
        train.Trainer(
            MODELS.load("toy"),
            made.model.config,
            made.data,
            train.TrainConfig(validate_every=1),
            tmp_path / "run",
            data_name="bars",
        )


def test_pictures_of_samples(trainer, tmp_path):
    made = trainer(tmp_path / "run", plugin="toy-sampler", sample_every=4, samples=9, steps=10)
    made.fit()
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["step-00000004.png", "step-00000008.png", "step-00000010.png"]
    sizes = {Image.open(tmp_path / "run" / "samples" / name).size for name in names}
    assert len(sizes) == 1
    assert not list((tmp_path / "run" / "samples").glob(".*"))


def test_samples_have_conditions_and_the_same_noise_at_every_step(trainer, tmp_path):
    made = trainer(tmp_path / "run", plugin="toy-sampler")
    conditions = conditions_for(made.model, made.data, 10, in_turns=True)
    assert conditions["label"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert conditions_for(made.model, made.data, 10, required=True) == {}
    images = reports.sampled(made.model, 10, 0, conditions, ALONE)
    assert torch.equal(images, reports.sampled(made.model, 10, 0, conditions, ALONE))
    translator = trainer(tmp_path / "run", plugin="toy-translator", images="toy-pairs")
    for in_order in (False, True):
        given = conditions_for(translator.model, translator.data, 70, required=True, in_order=in_order)["source"]
        # After the last image comes the first again.
        assert torch.equal(given[60:], given[:10])
        assert torch.equal(given[:10], translator.data.batch(torch.arange(10)).conditions["source"]) == in_order


def test_a_picture_of_a_model_that_has_broken_down_is_left_out(tmp_path):
    reports.write_picture(torch.full((4, 1, 4, 4), torch.nan), tmp_path / "samples.png")
    assert not (tmp_path / "samples.png").exists()


def test_pictures_need_a_model_that_samples(trainer, tmp_path):
    plugin = MODELS.load("toy-sampler")

    class Mute(GenerativeModel):
        def phases(self):
            return []

    with pytest.raises(TrainingError, match="needs a model that generates images, and mute does not"):
        trainer(tmp_path / "run", plugin=ModelPlugin("mute", "toy", plugin.config, Mute), sample_every=1)
    trainer(tmp_path / "run", plugin=ModelPlugin("mute", "toy", plugin.config, Mute)).fit()
