"""The trainer: phases, bits, resuming, refusals. Killing for real is in test_kill.py."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from train.comparing import assert_same, assert_same_runs, metrics, stopping, weights

from gencore import Key, data, train
from gencore.models.base import GenerativeModel, Loss, ModelConfig, ModelPlugin, Phase, Step, freeze
from gencore.models.optimizers import Adam, Optimizer
from gencore.plugins import MODELS, PluginError
from gencore.processes import Processes
from gencore.spec import Batch
from gencore.train import AverageConfig, CheckpointError, TrainConfig, Trainer, TrainingError, checkpoint
from gencore.train.descent import Descent, PhaseRunner
from gencore.train.log import read_metrics

EVERYTHING = {"average": {"decay": 0.9}, "clip": 0.5, "schedule": "cosine", "warmup": 3}


def test_training_lowers_the_loss(trainer, tmp_path):
    trainer(tmp_path / "run", steps=200, log_every=10).fit()
    losses = [record["autoencoder/loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]


def test_every_phase_runs_its_repeats_and_trains_its_parameters_only(trainer, tmp_path):
    made = trainer(tmp_path / "run", steps=3)
    made.begin()
    seen = []
    for runner in made.runners:

        def spy(step, *, name=runner.phase.name, loss=runner.loss.loss):
            state = {k: v.clone() for k, v in made.model.named_parameters()}
            seen.append((name, state))
            return loss(step)

        runner.loss.loss = spy
    made.fit()
    assert [name for name, _ in seen] == ["critic", "critic", "autoencoder"] * 3
    for (name, before), (_, after) in itertools.pairwise(seen):
        changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
        assert changed == ({"critic"} if name == "critic" else {"encoder", "decoder"})


def test_repetitions_have_minibatches_and_keys_of_their_own(trainer, tmp_path):
    made = trainer(tmp_path / "run", steps=2)
    made.begin()
    images, keys = [], []
    for runner in made.runners:

        def spy(step, *, loss=runner.loss.loss):
            images.append(tuple(step.batch.images.flatten().tolist()))
            keys.append(repr(step.key))
            return loss(step)

        runner.loss.loss = spy
    made.fit()
    assert len(set(images)) == len(set(keys)) == 6


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(trainer, tmp_path):
    torch.manual_seed(1)
    trainer(tmp_path / "a").fit()
    torch.manual_seed(2)
    trainer(tmp_path / "b").fit()
    trainer(tmp_path / "c", seed=1).fit()
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not torch.equal(weights(tmp_path / "a")["critic.weight"], weights(tmp_path / "c")["critic.weight"])


def test_torch_generator_is_left_alone(trainer, tmp_path):
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    trainer(tmp_path / "run").fit()
    train.load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("stop_after", [1, 4, 5, 7, 11])
def test_an_interrupted_run_goes_on_to_the_same_bits(trainer, tmp_path, stop_after):
    trainer(tmp_path / "whole", **EVERYTHING).fit()
    with pytest.raises(KeyboardInterrupt):
        stopping(trainer(tmp_path / "parts", **EVERYTHING), stop_after).fit()
    trainer(tmp_path / "parts", **EVERYTHING).fit(resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    assert weights(tmp_path / "whole", "ema")
    assert [record["step"] for record in metrics(tmp_path / "whole")] == [3, 6, 9, 12]


def test_checkpoints_by_time(trainer, tmp_path, monkeypatch):
    saved, clock = [], itertools.count(step=20)
    monkeypatch.setattr(train.trainer.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(Trainer, "_save", lambda self, is_best=False: saved.append(self.step))
    trainer(tmp_path / "a", checkpoint_every=1000, checkpoint_minutes=2).fit()
    trainer(tmp_path / "b", checkpoint_every=1000, checkpoint_minutes=None).fit()
    assert saved[-2:] == [12, 12]
    assert len(saved) > 4
    assert len(set(np.diff(saved[:-2]))) == 1


def test_training_state_of_other_shapes_is_refused(trainer, tmp_path):
    trainer(tmp_path / "run", average={"decay": 0.9}).fit()
    saved = checkpoint.read(tmp_path / "run")
    whole = {each: saved.tensors(each) for each in ("model", "ema", "optimizer")}
    for file, name in (("optimizer", "critic/critic.weight/exp_avg"), ("ema", "critic.weight")):
        tensors = {each: dict(named) for each, named in whole.items()}
        tensors[file][name] = torch.zeros(1, 15)
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        checkpoint.save(tmp_path / "run", saved.run, saved.step, tensors, saved.state, keep=1)
        with pytest.raises(CheckpointError, match=rf"{name} of shape \(1, 15\) for \(1, 16\)"):
            trainer(tmp_path / "run", average={"decay": 0.9}, steps=13).fit(resume=True)


def test_a_finished_run_goes_on_when_it_is_made_longer(trainer, tmp_path):
    trainer(tmp_path / "whole", steps=10).fit()
    trainer(tmp_path / "parts", steps=6).fit()
    trainer(tmp_path / "parts", steps=6).fit(resume=True)
    trainer(tmp_path / "parts", steps=10).fit(resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert checkpoint.read_run(tmp_path / "parts").train["steps"] == 10


def test_a_run_that_is_long_enough_is_left_as_it_is(trainer, tmp_path):
    trainer(tmp_path / "run", steps=6).fit()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    shorter = trainer(tmp_path / "run", steps=3)
    shorter.fit(resume=True)
    assert shorter.step == 6
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_the_length_of_a_schedule_cannot_change(trainer, tmp_path):
    trainer(tmp_path / "run", schedule="cosine", steps=6).fit()
    for steps in (3, 9):
        message = rf"length of a cosine schedule cannot change: train\.steps: the run has 6, asked for is {steps}"
        with pytest.raises(CheckpointError, match=message):
            trainer(tmp_path / "run", schedule="cosine", steps=steps).fit(resume=True)
    trainer(tmp_path / "run", schedule="cosine", steps=6, keep=1).fit(resume=True)


def test_a_run_from_before_a_setting_goes_on(trainer, tmp_path):
    trainer(tmp_path / "whole", steps=8).fit()
    trainer(tmp_path / "run", steps=4).fit()
    saved = checkpoint.read(tmp_path / "run")
    config = {name: value for name, value in saved.run.config.items() if name != "hidden"}
    settings = {name: value for name, value in saved.run.train.items() if name != "warmup"}
    older = replace(saved.run, config=config, train=settings)
    checkpoint.write_run(tmp_path / "run", older)
    shutil.rmtree(saved.directory)
    tensors = {name: weights(tmp_path / "whole", name) for name in ("model", "optimizer")}
    checkpoint.save(tmp_path / "run", older, 8, tensors, saved.state, keep=2)
    trainer(tmp_path / "run", steps=9).fit(resume=True)
    assert checkpoint.read(tmp_path / "run").step == 9
    with pytest.raises(CheckpointError, match="hidden: the run has 16, asked for is 8"):
        trainer(tmp_path / "run", {"hidden": 8}, steps=10).fit(resume=True)


def test_bfloat16_trains_and_keeps_float32_weights(trainer, tmp_path):
    trainer(tmp_path / "run", precision="bfloat16").fit()
    trainer(tmp_path / "exact").fit()
    tensors, exact = weights(tmp_path / "run"), weights(tmp_path / "exact")
    assert tensors["critic.weight"].dtype == torch.float32
    assert not torch.equal(tensors["encoder.0.weight"], exact["encoder.0.weight"])


def test_the_learning_rate_is_used_and_logged(trainer, tmp_path):
    made = trainer(tmp_path / "run", schedule="cosine", warmup=2, steps=12, log_every=1)
    used, one_step = [], made.advance

    def follow() -> None:
        one_step()
        used.append([group["lr"] for one in made.descents for group in one.optimizer.param_groups])

    made.advance = follow
    made.fit()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # Half way up the warm-up, half way down the cosine (after 2 + 5 of 2 + 10 steps), and one step before its end.
    for step, factor in ((1, 0.5), (8, 0.5), (12, 0.5 * (1 - math.cos(math.pi / 10)))):
        logged = [records[step - 1][f"{phase}/learning_rate"] for phase in ("critic", "autoencoder")]
        assert used[step - 1] == logged == pytest.approx([1e-2 * factor] * 2, rel=1e-12)


def test_a_step_is_one_of_adam_with_the_settings_of_the_phase(trainer, tmp_path):
    model = trainer(tmp_path / "run").model
    given = list(model.critic.parameters())
    settings = Adam(lr=0.1, beta1=0.3, beta2=0.6, eps=0.01, weight_decay=0.2)

    def loss(step):
        return Loss(torch.stack([(parameter - step.number).square().sum() for parameter in given]).sum())

    phase = Phase("critic", loss, Optimizer(given, settings))
    descent = Descent("critic", phase.optimizer, model, torch.device("cpu"))
    runner = PhaseRunner(0, phase, descent, Processes())
    descent.scale_rates(0.5)
    own = [parameter.detach().clone().requires_grad_() for parameter in given]
    adam = torch.optim.AdamW(own, lr=0.05, betas=(0.3, 0.6), eps=0.01, weight_decay=0.2, fused=True)
    for step in (1, 2):
        adam.zero_grad()
        torch.stack([(parameter - step).square().sum() for parameter in own]).sum().backward()
        adam.step()
        runner.clear()
        runner.add(Step(Batch(torch.zeros(1, 1, 4, 4)), Key(0), step, 2))
        runner.descend(step)
    for expected, parameter in zip(own, given, strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("vae", "float32"), ("vae", "bfloat16"), ("gan", "float32"), ("ddpm", "float32"), ("ddpm", "bfloat16")],
)
def test_the_real_models_go_on_to_the_same_bits(tmp_path, name, precision):
    plugin, images = MODELS.load(name), data.load("digits", "train")

    def made(out, steps):
        average = AverageConfig(decay=0.9)
        settings = TrainConfig(steps=steps, batch_size=16, precision=precision, average=average, clip=1.0)
        config = plugin.config_of({})
        return Trainer(plugin, config, images, settings, tmp_path / out, data_name="digits", progress=False)

    made("whole", 4).fit()
    made("parts", 2).fit()
    made("parts", 4).fit(resume=True)
    for file in ("model", "ema", "optimizer"):
        assert_same(weights(tmp_path / "whole", file), weights(tmp_path / "parts", file))


def test_clip_bounds_the_gradient(trainer, tmp_path):
    made = trainer(tmp_path / "run", clip=1e-3, steps=1)
    made.fit()
    for one in made.descents:
        norm = torch.nn.utils.get_total_norm([p.grad for p in one.parameters])
        assert norm <= 1.001e-3


def test_the_moving_average_is_the_average_of_the_weights(trainer, tmp_path):
    made = trainer(tmp_path / "run", average={"decay": 0.5}, steps=5)
    expected = {k: v.clone().double() for k, v in made.model.named_parameters()}
    one_step = made.advance

    def follow() -> None:
        decay = min(0.5, (1 + made.step) / (10 + made.step))
        one_step()
        for name, value in made.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach().double()

    made.advance = follow
    made.fit()
    averaged = weights(tmp_path / "run", "ema")
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name].double(), value, rtol=1e-5, atol=1e-6)
    loaded = train.load(tmp_path / "run")
    assert_same(dict(loaded.state_dict()), averaged)
    assert_same(dict(train.load(tmp_path / "run", ema=False).state_dict()), weights(tmp_path / "run"))


def test_a_loss_that_is_not_finite_names_phase_and_step_and_keeps_the_checkpoint(trainer, tmp_path):
    # The critic draws twice a step: its 12th draw is in step 6, after the checkpoint of step 4.
    with pytest.raises(TrainingError, match=r"'critic' is not finite at step 6; the last checkpoint is .*step-0*4"):
        trainer(tmp_path / "run", {"explode_at": 12}).fit()
    assert checkpoint.read(tmp_path / "run").step == 4
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "run").values())
    with pytest.raises(TrainingError, match="not finite at step 1; there is no checkpoint yet"):
        trainer(tmp_path / "other", {"explode_at": 1}).fit()


def test_a_folder_with_a_run_is_refused(trainer, tmp_path):
    trainer(tmp_path / "run").fit()
    with pytest.raises(TrainingError, match="already holds a run; go on with --resume"):
        trainer(tmp_path / "run").fit()


def test_resuming_another_run_names_every_difference(trainer, tmp_path):
    trainer(tmp_path / "run").fit()
    with pytest.raises(CheckpointError) as caught:
        trainer(tmp_path / "run", {"hidden": 8}, batch_size=4).fit(resume=True)
    assert "hidden: the run has 16, asked for is 8" in str(caught.value)
    assert "train.batch_size: the run has 16, asked for is 4" in str(caught.value)
    with pytest.raises(CheckpointError, match="model: the run has 'toy', asked for is 'toy-sampler'"):
        trainer(tmp_path / "run", plugin="toy-sampler").fit(resume=True)


def test_resuming_nothing_begins(trainer, tmp_path):
    trainer(tmp_path / "whole").fit()
    trainer(tmp_path / "run").fit(resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_what_killed_processes_left_is_removed(trainer, tmp_path):
    trainer(tmp_path / "run").fit()
    for name in (".run.json.1.tmp", ".metrics.jsonl.1.tmp", "checkpoints/.step-00000004.old/model.safetensors"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("")
    trainer(tmp_path / "run").fit(resume=True)
    assert [path.name for path in (tmp_path / "run").rglob(".*")] == [".lock"]


def test_a_run_that_came_to_no_checkpoint_is_no_run(trainer, tmp_path):
    with pytest.raises(TrainingError, match="not finite at step 1"):
        trainer(tmp_path / "run", {"explode_at": 1}).fit()
    trainer(tmp_path / "run").fit()
    trainer(tmp_path / "whole").fit()
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


def test_the_environment_changes_no_weights(trainer, tmp_path, monkeypatch):
    trainer(tmp_path / "plain").fit()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer(tmp_path / "run").fit()
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "run"))


def test_checkpoints_of_another_run_are_refused(trainer, tmp_path):
    trainer(tmp_path / "run").fit()
    trainer(tmp_path / "other", {"hidden": 8}).fit()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"step-0*12 is of another run: hidden: the run has 8, asked for is 16"):
        trainer(tmp_path / "run").fit(resume=True)


def test_two_processes_do_not_train_in_one_folder(trainer, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="another process is training"):
            trainer(tmp_path / "run").fit()


def test_metrics_are_strict_json(trainer, tmp_path):
    trainer(tmp_path / "run").fit()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=refuse)
        assert {"step", "seconds", "critic/loss", "critic/score", "autoencoder/gradient_norm"} <= record.keys()


def test_tensorboard_is_written(trainer, tmp_path):
    pytest.importorskip("tensorboard")
    trainer(tmp_path / "run", tensorboard=True).fit()
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_missing_tensorboard_leaves_no_folder(trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match=r"pip install 'gencore\[tensorboard\]'"):
        trainer(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_a_missing_cuda_device_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(TrainingError, match="there is no CUDA device"):
        train.trainer.choose_device("cuda")
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda"):
        train.trainer.choose_device("tpu")
    assert train.trainer.choose_device("auto").type == "cpu"


def test_a_device_without_kernels_is_not_chosen(monkeypatch):
    def no_kernels(*arguments, **options):
        raise ValueError("this version of gencore has CPU kernels only")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train.trainer.ops, "normal", no_kernels)
    assert train.trainer.choose_device("auto").type == "cpu"
    with pytest.raises(TrainingError, match="models cannot run on CUDA: this version of gencore has CPU kernels only"):
        train.trainer.choose_device("cuda")


@dataclass(frozen=True)
class _Config(ModelConfig):
    pass


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("twice", "two phases of one name"),
        ("repeats", "'fit' of its model must have repeats and every of at least 1, but has 0 and 1"),
        ("every", "'fit' of its model must have repeats and every of at least 1, but has 1 and 0"),
        ("foreign", "'fit' of its model must train parameters of the model that are not frozen"),
        ("frozen", "'fit' of its model must train parameters of the model that are not frozen"),
        ("loss", "the loss of phase 'fit' at step 1: TypeError: it must be a Loss with a scalar value"),
        ("number", "the loss of phase 'fit' at step 1: TypeError: it must be a Loss with a scalar value"),
        ("parameters", "'fit' of its model must have a gencore.models.Optimizer, but has list"),
        ("later", "must take the batch of an earlier phase that draws its own, but of 'later'"),
        ("borrowed", "must take the batch of an earlier phase that draws its own, but of 'second'"),
        ("out of step", "'second' of its model must run only in steps of 'fit', whose batch it takes"),
    ],
)
def test_a_model_that_breaks_the_contract_is_named(trainer, tmp_path, fault, message):
    class Broken(GenerativeModel):
        def __init__(self, config, spec):
            super().__init__(config, spec)
            self.weight = nn.Parameter(torch.zeros(2))
            self.part = freeze(nn.Linear(2, 2))

        def phases(self):
            own = Optimizer([self.weight])
            good = Phase("fit", lambda step: Loss(self.weight.sum()), own)
            second = replace(good, name="second", batch_of="fit")
            return {
                "twice": [good, good],
                "repeats": [replace(good, repeats=0)],
                "every": [replace(good, every=0)],
                "foreign": [replace(good, optimizer=Optimizer([nn.Parameter(torch.zeros(1))]))],
                "frozen": [replace(good, optimizer=Optimizer(self.part.parameters()))],
                "loss": [replace(good, loss=lambda step: Loss(self.weight))],
                "number": [replace(good, loss=lambda step: 1.0)],
                "parameters": [replace(good, optimizer=[self.weight])],
                "later": [replace(good, batch_of="later"), replace(good, name="later")],
                "borrowed": [good, second, replace(good, name="third", batch_of="second")],
                "out of step": [replace(good, every=2), second],
            }[fault]

    plugin = ModelPlugin("broken", "vae", _Config, Broken)
    with pytest.raises(PluginError, match=f"'broken' is broken: .*{re.escape(message)}"):
        trainer(tmp_path / "run", plugin=plugin).fit()


def test_what_goes_wrong_in_a_data_set_names_its_plugin(trainer, tmp_path, monkeypatch):
    made = trainer(tmp_path / "run")
    monkeypatch.setattr(made.data, "batch", lambda indices, key=None: {}["pixels"])
    with pytest.raises(PluginError, match=r"data set plugin 'bars' .* is broken: batch\(\): KeyError: 'pixels'"):
        made.fit()


def test_a_run_does_not_go_on_with_images_that_are_changed_in_another_way(trainer, tmp_path):
    def made(settings):
        new = trainer(tmp_path / "run", steps=4)
        new.run = dataclasses.replace(new.run, data_settings=settings)
        return new

    made({"flip": False, "cache": 1.0}).fit()
    with pytest.raises(CheckpointError, match=r"data.flip: the run has False, asked for is True"):
        made({"flip": True, "cache": 1.0}).fit(resume=True)
    # How the files are read is no part of it.
    made({"flip": False, "cache": 2.0}).fit(resume=True)
